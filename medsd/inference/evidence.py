"""Where in an image its class lies: the classifier's log-odds between two classes, shared out over pixels."""

from dataclasses import dataclass

import numpy as np
import torch

from medsd.inference.likelihood import ROWS, Predict
from medsd.inference.plan import Plan
from medsd.objectives.diffusion import denoising_elements

BLUR = 0.025
"""Standard deviation of a map's blur, over the image's side: single pixels say more of the noise than of the class."""


@dataclass(frozen=True)
class Evidence:
    """Of one image, at the model's resolution R."""

    map: np.ndarray
    """`(R, R)` nats: what each pixel says for `class_name` and not for `against`, blurred; the sum is the log-likelihoods' difference."""
    image: np.ndarray
    """`(C, R, R)` in `[-1, 1]`, as the model sees it."""
    class_name: str
    against: str

    @property
    def peak(self) -> tuple[int, int]:
        """Row and column of the pixel that speaks loudest for `class_name`."""
        row, column = np.unravel_index(self.map.argmax(), self.map.shape)
        return int(row), int(column)

    def described(self) -> list[str]:
        """Lines of a caption: of which classes it speaks, and how loud."""
        return [f"{self.class_name} against {self.against or 'nothing named'}", f"{self.map.sum():.3g} nats, largest {self.map.max():.3g}"]


@torch.no_grad()
def element_evidence(
    predict: Predict,
    scheduler: object,
    latent: torch.Tensor,
    conditions: torch.Tensor,
    plan: Plan,
    batch_size: int = ROWS,
) -> torch.Tensor:
    """What each element of a latent `(c, h, w)` says for the first of two `conditions` `(2, tokens, dim)`, in nats, `(c, h, w)`.

    Mean over pairs of weight x (error under the second - error under the first) / d: the same pairs for both, so that only what the
    class changes is left. The sum over all d elements is the difference of log-likelihoods.
    """
    device, pairs = latent.device, len(plan)
    total = torch.zeros_like(latent, dtype=torch.float32)
    half = batch_size // 2
    for start in range(0, pairs, half):
        chosen = (torch.arange(half) + start).clamp(max=pairs - 1)
        there = (torch.arange(half) + start < pairs).to(device)
        timesteps, noise = plan.timesteps[chosen].to(device).repeat(2), plan.noise[chosen].to(device).repeat(2, 1, 1, 1)
        condition = conditions.repeat_interleave(half, 0)
        errors = denoising_elements(predict, scheduler, latent.expand(2 * half, -1, -1, -1), noise, timesteps, condition)
        own, other = errors.chunk(2)
        total += torch.einsum("b,bchw->chw", plan.weights[chosen].to(device) * there, other - own)
    return total / (pairs * latent.numel())
