"""`MedSDPipeline` learns what its losses mean, from labelled images."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from medsd.errors import InputError
from medsd.inference.calibration import Answers, Belief, Calibration
from medsd.inference.fitting import Score, fit
from medsd.inference.likelihood import NotFinite, Scores
from medsd.inference.plan import Plan
from medsd.inference.race import Full
from medsd.inference.scoring import Progress, ScoringMixin, fast_precision
from medsd.inference.sharing import fit_together


class CalibratingMixin(ScoringMixin):
    """What fits a calibration."""

    def calibrate(
        self,
        images: Sequence[np.ndarray | Image.Image],
        labels: Sequence[str | int] | np.ndarray,
        weighting: str = "uniform",
        max_pairs: int = 64,
        seed: int = 0,
        groups: Sequence[str] | None = None,
        group_unit: str = "patient",
        batch_size: int | None = None,
        progress: Progress = lambda rows: None,
        ranges: np.ndarray | None = None,
        accelerator: Accelerator | None = None,
    ) -> Calibration:
        """Fit how losses become probabilities on labelled held-out images, with all pairs; see `medsd.inference.fitting`.

        `classify` uses it from then on, and `save_pretrained` keeps it in `medsd.json`. `labels` are class names or indices, or findings
        `(N, K)` of 0 and 1; `groups` name each image's patient (or series, as `group_unit` says), whose images are not parted by
        cross-validation; `ranges` as in `encode_images`; processes of an `accelerator`, all of which call this, share the scoring.

        Raises InputError for an unknown class and for a class without an image, NotFinite where an image's error is not finite.
        """
        for name, given in (("labels", labels), ("groups", groups)):
            if given is not None and len(given) != len(images):
                raise InputError(f"{len(given)} {name} for {len(images)} images: one per image is expected")
        answers, known = self._answers(labels, None if groups is None else np.asarray(groups))
        kept = np.flatnonzero(known)
        latents = self.encode_images([images[int(index)] for index in kept], None if ranges is None else np.asarray(ranges)[kept])
        conditions = self.encode_prompts(self._choices(None)[1])
        calls = self.batch_rows(batch_size)

        def measure(chosen: torch.Tensor, plan: Plan, precision: str) -> Scores:
            belief = Belief(Calibration.none(len(conditions)))
            try:
                return self._score(latents[chosen], conditions, plan, Full(), belief, precision, calls, progress)
            except NotFinite as error:
                raise NotFinite(str(error), kept[chosen.numpy()[list(error.images)]].tolist()) from error

        def fitted(score: Score) -> Calibration:
            fast = self._precision(fast_precision(self._execution_device), None)
            return fit(score, self.noise_schedule, tuple(latents.shape[1:]), answers, weighting, max_pairs, seed, fast)

        calibration = replace(fit_together(fitted, measure, accelerator), group_unit=group_unit)
        self.info = replace(self.info, calibration=calibration)
        return calibration

    def _answers(self, labels: Sequence[str | int] | np.ndarray, groups: np.ndarray | None) -> tuple[Answers, np.ndarray]:
        """What to fit, and which images `(N,)` have a hypothesis at all."""
        if self.data.multi_label:
            numbers = self.hypotheses.numbers(np.asarray(labels))
            known = numbers >= 0
            if known.sum() < 2:
                raise InputError(f"{known.sum()} images to calibrate on have a set of findings that was seen in training: take more")
            design, prior = self.hypotheses.membership(len(self.class_names)), self.hypotheses.prior()
            return Answers(numbers[known], design, prior, None if groups is None else groups[known]), known
        numbers = np.array([self._class_index(label) for label in labels])
        missing = sorted(set(range(len(self.class_names))) - set(numbers.tolist()))
        if missing:
            raise InputError(
                f"no image of {self.class_names[missing[0]]} to calibrate on: take more images (--max_samples, --max_calibration), or do "
                "without (--calibrate none)"
            )
        return Answers.of_classes(numbers, len(self.class_names), groups), np.ones(len(numbers), dtype=bool)

    def _class_index(self, label: str | int) -> int:
        if label in self.class_names:
            return self.class_names.index(label)
        if isinstance(label, int | np.integer) and 0 <= label < len(self.class_names):
            return int(label)
        raise InputError(f'unknown class "{label}"; this pipeline knows {", ".join(self.class_names) or "none"}')
