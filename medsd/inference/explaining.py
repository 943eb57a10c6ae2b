"""`MedSDPipeline` as a witness: where an image speaks for its class, and what it would look like as another."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from medsd.data.transforms import to_unit
from medsd.errors import InputError
from medsd.inference.evidence import BLUR, Evidence, element_evidence
from medsd.inference.plan import pair_noise
from medsd.inference.scoring import ScoringMixin


class ExplainingMixin(ScoringMixin):
    """What explains one image's class."""

    @torch.no_grad()
    def evidence(
        self,
        image: np.ndarray | Image.Image,
        class_name: str | None = None,
        against: str | None = None,
        max_pairs: int = 64,
        seed: int = 0,
        ranges: np.ndarray | None = None,
        weighting: str | None = None,
    ) -> Evidence:
        """The log-odds of two classes, shared out over the image's pixels, in nats.

        `class_name` and `against` default to the most probable class and the next one; of findings, name single ones, and `against`
        defaults to none of them. `against=""` is the empty prompt (of findings: none of them), for data in which no class is the normal
        one; a folder without classes takes two prompts. `ranges` `(1, C, 2)` and `weighting` as in `classify`. Raises InputError for an
        unknown class.
        """
        if against is None and self.data.multi_label and () in self.hypotheses.sets:
            against = ""
        if class_name is None or against is None:
            order = self._most_probable(image, max_pairs, seed, ranges, weighting)
            class_name = class_name if class_name is not None else next(name for name in order if name != against)
            against = against if against is not None else next(name for name in order if name != class_name)
        latents = self.encode_images([image], ranges)
        conditions = self.encode_prompts([self._prompt_of(class_name), self._prompt_of(against)])
        plan = self._plan(latents, max_pairs, weighting, seed, self.calibration_for(weighting))
        elements = self._within_memory(
            lambda rows: element_evidence(self._predict, self.noise_schedule, latents[0], conditions, plan, rows),
            min(self.batch_rows(), -(-2 * len(plan) // 16) * 16),
        )
        pixels = self.codec.spread(elements).cpu().numpy()
        blurred = gaussian_filter(pixels, BLUR * len(pixels), mode="reflect")
        return Evidence(blurred, self.unit_image(image, ranges), class_name, against)

    @torch.no_grad()
    def counterfactual(
        self,
        image: np.ndarray | Image.Image,
        class_name: str,
        strength: float = 0.5,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        seed: int = 0,
        ranges: np.ndarray | None = None,
        output_type: str = "source",
    ) -> Any:
        """The image as `class_name` might show it: noised to `strength` of the schedule, then denoised as that class (Meng et al., 2022).

        The same seed noises every image alike, so that two counterfactuals of one image differ by their classes alone. Returns what
        `__call__` does for `output_type`, of one image.
        """
        if not 0 < strength <= 1:
            raise InputError(f"strength {strength}: above 0 and at most 1 is expected")
        latents = self.encode_images([image], ranges)
        noise = pair_noise(seed, 0, tuple(latents.shape[1:]))[None].to(latents)
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        first = num_inference_steps - max(1, round(strength * num_inference_steps))
        noised = self.scheduler.add_noise(latents, noise, self.scheduler.timesteps[first : first + 1])
        condition = self.encode_prompts([self._prompt_of(class_name)])
        generator = torch.Generator().manual_seed(seed)
        denoised = self._denoise(noised, condition, num_inference_steps, guidance_scale, generator, first)
        return self._finish(denoised, output_type)

    def _most_probable(
        self, image: np.ndarray | Image.Image, pairs: int, seed: int, ranges: np.ndarray | None, weighting: str | None
    ) -> list[str]:
        """The hypotheses, the most probable first."""
        output = self.classify([image], mode="full", max_pairs=pairs, seed=seed, ranges=ranges, weighting=weighting)
        return [output.hypotheses[index] for index in output.posterior.probabilities[0].argsort()[::-1]]

    def _prompt_of(self, name: str) -> str:
        """Of a class or of a set of findings, `"a|b"`; of none of them, or the empty prompt where there is no such set.

        Where there are no classes, a name is a prompt itself.
        """
        if not self.class_names:
            return name
        prompts = {"": ""} | dict(zip(self.class_names, self.data.prompts, strict=True))
        prompts |= dict(zip(self.hypotheses.names(self.class_names), self.hypotheses.prompts(self.data), strict=True))
        if name not in prompts:
            raise InputError(f'unknown class "{name}"; this pipeline knows {", ".join(self.class_names) or "none"}')
        return prompts[name]

    def unit_image(self, image: np.ndarray | Image.Image, ranges: np.ndarray | None = None) -> np.ndarray:
        """An image as the model sees it, `(C, R, R)` in `[-1, 1]`; `ranges` as in `evidence`."""
        own = None if ranges is None else torch.as_tensor(ranges, dtype=torch.float32)
        return to_unit(torch.from_numpy(self.fit_image(image).astype(np.float32))[None], self.data.intensity_map, own)[0].numpy()
