"""`MedSDPipeline` as a classifier: images -> latents -> losses -> class probabilities, and their calibration."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from medsd.data.dataset import DataInfo
from medsd.data.files import pixels_of
from medsd.data.geometry import fit_square
from medsd.data.hypotheses import Hypotheses
from medsd.data.intensity import label_channels
from medsd.data.transforms import to_unit
from medsd.errors import InputError
from medsd.inference.calibration import Belief, Calibration
from medsd.inference.info import PipelineInfo
from medsd.inference.likelihood import ROWS, Posterior, Scores, posterior, score_classes
from medsd.inference.plan import Plan, make_plan
from medsd.inference.race import Full, Rule, Settle, promised_rule
from medsd.models.codec import Codec

ENCODE_BATCH = 16
GPU_ROWS = 512
"""Rows of a call on a GPU at first; halved where memory does not suffice."""
FEW_NUMBERS = 256
"""Of each tensor, in a fingerprint."""
MODES = ("posterior", "decide", "full")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Progress = Callable[[int], None]
Found = TypeVar("Found")


@dataclass(frozen=True)
class ClassifyOutput:
    """Of N images, K classes and H hypotheses: the classes themselves, or sets of findings where several can hold."""

    predictions: list[str]
    """Class names (prompts, where the folder has no classes); of findings, those that hold, joined by `|`. The most probable, in mode
    `decide` what the race ended on, which a near-tie can tell from it."""
    probabilities: np.ndarray
    """`(N, K)`; rows sum to 1, except of findings, each of which holds or not."""
    calibrated: bool
    """Whether a temperature and class bias, fitted for as many pairs, stand behind the probabilities; without, they are far too sure."""
    hypotheses: list[str]
    """H names."""
    batch_size: int
    """Rows of every call of the UNet."""
    precision: str
    """fp32, bf16 or fp16."""
    scores: Scores
    """Every pair's loss."""
    posterior: Posterior
    """Over the hypotheses."""

    @property
    def log_likelihoods(self) -> np.ndarray:
        """`(N, H)` nats, up to a constant per image."""
        return self.scores.log_likelihoods

    @property
    def standard_errors(self) -> np.ndarray:
        """`(N, H)` nats, of the difference to the leading hypothesis."""
        return self.scores.standard_errors

    @property
    def intervals(self) -> np.ndarray:
        """`(N, K, 2)`: standard errors carried over to the probabilities, which endless pairs would put here in 95 of 100 cases."""
        return self.posterior.intervals

    @property
    def pairs(self) -> np.ndarray:
        """`(N, H)` (timestep, noise) pairs spent."""
        return self.scores.pairs

    @property
    def rows(self) -> np.ndarray:
        """`(N,)` UNet rows spent."""
        return self.scores.rows

    @property
    def p_flip(self) -> np.ndarray:
        """`(N,)` probability that endless pairs would put another hypothesis first: what more rows would settle."""
        return self.posterior.p_flip

    @property
    def entropy(self) -> np.ndarray:
        """`(N,)` nats, of the hypotheses' probabilities: what they would not."""
        return self.posterior.entropy


class ScoringMixin:
    """What a pipeline scores with; it brings UNet, codec, data and noise schedule."""

    unet: Any
    info: PipelineInfo
    codec: Codec
    data: DataInfo
    class_names: list[str]
    noise_schedule: Any
    _most_rows: int | None = None
    _compiled: Any = None

    @torch.no_grad()
    def classify(
        self,
        images: Sequence[np.ndarray | Image.Image],
        prompts: Sequence[str] | None = None,
        mode: str = "posterior",
        weighting: str | None = None,
        max_pairs: int = 64,
        delta: float = 0.05,
        prior: np.ndarray | None = None,
        seed: int = 0,
        precision: str | None = None,
        batch_size: int | None = None,
        progress: Progress = lambda rows: None,
        ranges: np.ndarray | None = None,
    ) -> ClassifyOutput:
        """Class probabilities of images by the Diffusion Classifier (Li et al., ICCV 2023).

        Args:
            images: arrays `(C, H, W)` in the source's unit (see `medsd.read_image`), or PIL images.
            prompts: one per class, instead of the pipeline's own classes.
            mode: `full` scores every pair; `decide` stops at one class, which is another than that of all pairs with probability `delta`
                at most (near-ties apart); `posterior` stops when probabilities are known well.
            weighting: `uniform` or `elbo`, see `medsd.inference.plan`; default that of the calibration, else uniform.
            max_pairs: pairs an image and class, at most.
            prior: probability of each hypothesis before the image is seen, `(H,)`; default uniform, for findings their sets' frequency in
                training.
            seed: of timesteps and noise.
            precision: fp32, bf16 or fp16; default what the calibration found as good as fp32, where the device has it.
            batch_size: rows of each call of the UNet, rounded up to a multiple of 16; default `batch_rows`.
            progress: called with the number of rows of each call.
            ranges: see `encode_images`.

        Raises InputError for fewer than two classes, or images that do not fit.
        """
        hypotheses, texts = self._choices(prompts)
        calibration = self.calibration_for(weighting) if texts == self.hypotheses.prompts(self.data) else None
        default_prior = prior is None
        if default_prior and prompts is None and self.data.multi_label:
            prior = self.hypotheses.prior()
        if prior is not None and (np.shape(prior) != (len(texts),) or not np.all(np.asarray(prior) >= 0)):
            raise InputError(
                f"a prior of shape {np.shape(prior)}: {len(texts)} probabilities of 0 or more, one for each hypothesis, are expected"
            )
        belief = Belief(calibration or Calibration.none(len(texts)), prior)
        chosen = self._precision(precision, calibration)
        calls = self.batch_rows(batch_size)
        # Risks were measured under the prior that is the default.
        measured = belief.calibration if default_prior else replace(belief.calibration, risks=())
        rule = choose_rule(mode, delta, measured, max_pairs)
        latents = self.encode_images(images, ranges)
        plan = self._plan(latents, max_pairs, weighting, seed, calibration)
        scores = self._score(latents, self.encode_prompts(texts), plan, rule, belief, chosen, calls, progress)
        findings = prompts is None and self.data.multi_label
        membership = self.hypotheses.membership(len(self.class_names)) if findings else None
        believed = posterior(scores, belief.calibration, prior, membership)
        probabilities = believed.probabilities
        # The promise of `decide` is about the class that the race ended on.
        answers = believed.leader if mode == "decide" else probabilities.argmax(1)
        predictions = [hypotheses[index] for index in answers]
        if findings:
            # Summed one after the other: a matrix product's last bit depends on how many images there are.
            probabilities = (probabilities[:, :, None] * membership).sum(1)
            predictions = predictions if mode == "decide" else self._findings(probabilities)
        calibrated = calibration is not None and calibration.fits(max_pairs)
        return ClassifyOutput(predictions, probabilities, calibrated, hypotheses, self.batch_rows(batch_size), chosen, scores, believed)

    def calibration_for(self, weighting: str | None) -> Calibration | None:
        """What scores of that weighting are calibrated by; None where there is nothing."""
        kept = self.info.calibration
        return kept if kept and weighting in {None, kept.weighting} else None

    @property
    def hypotheses(self) -> Hypotheses:
        """What the pipeline chooses between; of findings without a record of training, none of them and each alone."""
        classes = range(len(self.class_names))
        alone = tuple((index,) for index in classes)
        unknown = ((), *alone) if self.data.multi_label else alone
        return self.info.hypotheses or Hypotheses(unknown, (0,) * len(unknown))

    def _choices(self, prompts: Sequence[str] | None) -> tuple[list[str], list[str]]:
        """Names of the hypotheses, and their prompts."""
        if prompts is not None:
            names = self.class_names if list(prompts) == self.data.prompts else list(prompts)
            texts = list(prompts)
        else:
            names, texts = self.hypotheses.names(self.class_names), self.hypotheses.prompts(self.data)
        if len(texts) < 2:
            raise InputError(f"{len(texts)} classes: classification needs two or more; give prompts=[...]")
        return list(names), texts

    def _findings(self, probabilities: np.ndarray) -> list[str]:
        return ["|".join(name for name, holds in zip(self.class_names, row > 0.5, strict=True) if holds) for row in probabilities]

    def _plan(self, latents: torch.Tensor, pairs: int, weighting: str | None, seed: int, calibration: Calibration | None) -> Plan:
        wanted = weighting or (calibration.weighting if calibration else "uniform")
        shape = tuple(latents.shape[1:])
        return make_plan(self.noise_schedule, pairs, shape, wanted, seed, calibration.proposal if calibration else None)

    def _score(
        self,
        latents: torch.Tensor,
        conditions: torch.Tensor,
        plan: Plan,
        rule: Rule,
        belief: Belief,
        precision: str,
        batch_size: int,
        progress: Progress,
    ) -> Scores:
        dtype = PRECISIONS[precision]
        context = nullcontext() if dtype is None else torch.autocast(latents.device.type, dtype)
        with torch.no_grad(), context:
            return self._within_memory(
                lambda rows: score_classes(self._predict, self.noise_schedule, latents, conditions, plan, rule, belief, rows, progress),
                batch_size,
            )

    def _within_memory(self, compute: Callable[[int], Found], rows: int) -> Found:
        """`compute(rows)`, with fewer rows a call from here on where memory does not suffice."""
        while True:
            try:
                return compute(rows)
            except torch.OutOfMemoryError:
                if rows <= 16:
                    raise
                rows = self._most_rows = rows // 32 * 16

    def _predict(self, x_t: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The UNet in its own precision, without a variance that it may have learned."""
        unet = self.unet if self._compiled is None else self._compiled
        return unet(x_t.to(self.unet.dtype), timesteps, condition.to(self.unet.dtype)).sample[:, : x_t.shape[1]]

    def compile_scoring(self) -> None:
        """Score with a compiled UNet, on a GPU with CUDA graphs, which calls of one fixed size allow; the first call takes minutes."""
        on_gpu = self._execution_device.type == "cuda"
        self._compiled = torch.compile(self.unet, mode="reduce-overhead" if on_gpu else "default", dynamic=False)

    def _precision(self, wanted: str | None, calibration: Calibration | None) -> str:
        if wanted is not None and wanted not in PRECISIONS:
            raise InputError(f"precision {wanted} is none of {', '.join(PRECISIONS)}")
        if self.unet.dtype != torch.float32:
            return next(name for name, dtype in PRECISIONS.items() if dtype == self.unet.dtype)
        found = calibration.precision if calibration else "fp32"
        return wanted or (found if found == fast_precision(self._execution_device) else "fp32")

    def batch_rows(self, wanted: int | None = None) -> int:
        """Rows of each call of the UNet: `wanted`, rounded up to a multiple of 16, else 64 on a CPU and `GPU_ROWS` on a GPU; or what is
        left of them by halving where memory did not suffice."""
        usual = ROWS if self._execution_device.type == "cpu" else GPU_ROWS
        rows = usual if wanted is None else -(-wanted // 16) * 16
        return rows if self._most_rows is None else min(rows, self._most_rows)

    def fingerprint(self) -> str:
        """Of the weights, from a few numbers of each."""
        digest = hashlib.sha256()
        for part in (self.unet, self.text_encoder, self.vae):
            for name, value in part.state_dict().items() if part is not None else ():
                digest.update(f"{name} {tuple(value.shape)}".encode())
                digest.update(value.detach().flatten()[:FEW_NUMBERS].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def encode_images(self, images: Sequence[np.ndarray | Image.Image], ranges: np.ndarray | None = None) -> torch.Tensor:
        """Latents `(N, c, h, w)` of images in the source's unit, brought to the model's resolution.

        `ranges` `(N, C, 2)`, low and high of each channel, are for an intensity map that is recorded per image; without them
        each image is measured.
        """
        if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
            raise InputError("one image: a list of arrays (C, H, W) in the source's unit, or of PIL images, is expected")
        if not len(images):
            raise InputError("no image to encode")
        if ranges is not None and len(ranges) != len(images):
            raise InputError(f"{len(ranges)} ranges for {len(images)} images: one per image is expected")
        fitted, device = [self.fit_image(image) for image in images], self._execution_device
        latents = []
        for start in range(0, len(fitted), ENCODE_BATCH):
            part = slice(start, start + ENCODE_BATCH)
            batch = torch.from_numpy(np.stack(fitted[part]).astype(np.float32)).to(device)
            own = None if ranges is None else torch.as_tensor(ranges[part], dtype=torch.float32, device=device)
            unit = to_unit(batch, self.data.intensity_map, own)
            # Always so many at once, since an encoder's bits depend on it.
            full = torch.cat([unit, unit[-1:].expand(ENCODE_BATCH - len(unit), -1, -1, -1)])
            latents.append(self.codec.encode(full)[: len(unit)])
        return torch.cat(latents)

    def fit_image(self, image: np.ndarray | Image.Image) -> np.ndarray:
        """An image in the source's unit, `(C, R, R)` at the model's resolution R; raises InputError for what cannot be an image of its."""
        pixels = pixels_of(image) if isinstance(image, Image.Image) else np.asarray(image)
        expected, data = self.data.image_channels, self.data
        if pixels.ndim != 3:
            raise InputError(f"an image of shape {pixels.shape}; (channels, height, width) is expected, in the source's unit")
        if len(pixels) == 1 and expected == 3:
            pixels = pixels.repeat(3, 0)
        if len(pixels) != expected:
            raise InputError(f"an image of {len(pixels)} channels; this pipeline was trained on images of {expected}")
        if data.unit == "HU" and pixels.dtype == np.uint8:
            warnings.warn("8-bit grey values are taken for HU: give the DICOM or NIfTI file that the image was made from", stacklevel=2)
        if not np.isfinite(pixels).all():
            raise InputError("an image with values that are not finite: its file is damaged, or was written so")
        grey = expected - label_channels(data.intensity_map, expected)
        parts = [(pixels[:grey], False), (pixels[grey:], True)]
        return np.concatenate([fit_square(part, data.resolution, data.resize, nearest)[0] for part, nearest in parts if len(part)])


def choose_rule(mode: str, delta: float, calibration: Calibration, pairs: int) -> Rule:
    """The rule of a mode; raises InputError for an unknown one."""
    if mode not in MODES:
        raise InputError(f"mode {mode} is none of {', '.join(MODES)}")
    if mode == "full":
        return Full()
    if mode == "posterior":
        return Settle(spread=calibration.spread, together=calibration.vote)
    return promised_rule(calibration, delta, pairs)


def fast_precision(device: torch.device) -> str:
    """The half precision that the device computes natively; fp32 where there is none."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return "bf16" if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
