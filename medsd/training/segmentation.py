"""A small U-Net that learns to segment from generated images and masks, or from real ones, and is tested on real ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from medsd.data.intensity import IntensityMap, Labels, Stack
from medsd.data.transforms import Augmentation
from medsd.errors import InputError
from medsd.evaluation.overlap import dice_metrics
from medsd.evaluation.resampling import together
from medsd.training.patience import train_until_stale

WIDTHS = (16, 32, 64, 128)
EPOCHS, BATCH = 60, 32
SEGMENTED_AT_ONCE = 128


@dataclass(frozen=True)
class Pairs:
    """N images and their masks."""

    images: torch.Tensor
    """`(N, C, R, R)` float32 in `[-1, 1]`."""
    masks: torch.Tensor
    """`(N, R, R)` int64, the number of each pixel's label; 0 is the background."""

    @classmethod
    def of(cls, unit: torch.Tensor, labels: Labels) -> "Pairs":
        """Of images whose last channel is the mask, `(N, C + 1, R, R)` in `[-1, 1]`; each pixel has the label that is nearest."""
        places = (unit[:, -1] + 1) * ((len(labels.values) - 1) / 2)
        return cls(unit[:, :-1], places.round().long().clamp(0, len(labels.values) - 1))

    def __len__(self) -> int:
        return len(self.masks)


def mask_labels(intensity: IntensityMap) -> Labels | None:
    """Labels of an image's last channel; None where it holds no mask."""
    last = intensity.parts[-1][0] if isinstance(intensity, Stack) else None
    return last if isinstance(last, Labels) else None


def label_names(labels: Labels) -> list[str]:
    """The values of all labels but the background."""
    return [f"{value:g}" for value in labels.values[1:]]


def check_segmentation(side: int) -> None:
    """Raise InputError where MONAI is missing, or images of `side` pixels cannot be halved as the U-Net does."""
    if find_spec("monai") is None:
        raise InputError('segmentation needs MONAI: pip install -c constraints.txt -e ".[segmentation]"')
    steps = 2 ** (len(WIDTHS) - 1)
    if side % steps or side == steps:
        raise InputError(f"a U-Net halves images {len(WIDTHS) - 1} times: {side} px is not a larger multiple of {steps}")


def segmentation_utility(
    synthetic: Pairs,
    real: Pairs,
    validation: Pairs,
    test: Pairs,
    patients: Sequence[str],
    labels: Labels,
    seed: int = 0,
    epochs: int = EPOCHS,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """`utility/KIND/dice/LABEL` and its `_ci` by patient, of the KINDs `synthetic` and `real`; with `reasons`. See `dice_metrics`.

    `real` are as many training pairs as `synthetic`, or as there are; `patients` those of the N test pairs. The real validation pairs say
    when to stop in both cases.
    """
    found = []
    for kind, train in {"synthetic": synthetic, "real": real}.items():
        model = fit_unet(train, validation, len(labels.values), seed, epochs, progress)
        metrics = dice_metrics(segmented(model, test.images), test.masks.numpy(), label_names(labels), patients)
        found.append(together([metrics | {"pairs": len(train)}], f"utility/{kind}/"))
    return together(found)


def fit_unet(
    train: Pairs, validation: Pairs, labels: int, seed: int, epochs: int = EPOCHS, progress: Callable[[], Any] = lambda: None
) -> nn.Module:
    """With shift and rotation, until the validation loss, Dice and cross-entropy, no longer falls (`train_until_stale`).

    `progress` is called after each epoch. Raises InputError as `check_segmentation` does.
    """
    model, loss_of = _model_and_loss(train.images.shape[1], labels, train.images.shape[-1], seed)
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    change = Augmentation(shift=train.images.shape[-1] // 16, rotation=10.0, label_channels=1)
    stacked = torch.cat([train.images, train.masks[:, None].float()], 1)

    def epoch() -> None:
        for chosen in torch.randperm(len(train), generator=draws).split(BATCH):
            batch = change(stacked[chosen], draws)
            loss = loss_of(model(batch[:, :-1]), batch[:, -1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train_until_stale(model, epochs, epoch, lambda: _held_out_loss(model, validation, loss_of), progress)


@torch.no_grad()
def segmented(model: nn.Module, images: torch.Tensor) -> np.ndarray:
    """Label numbers `(N, R, R)` of images `(N, C, R, R)`."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in images.split(SEGMENTED_AT_ONCE)]).numpy()


def _model_and_loss(channels: int, labels: int, side: int, seed: int) -> tuple[nn.Module, nn.Module]:
    check_segmentation(side)
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UNet(2, channels, labels, WIDTHS, (2,) * (len(WIDTHS) - 1), num_res_units=2)
    return model, DiceCELoss(to_onehot_y=True, softmax=True, batch=True)


@torch.no_grad()
def _held_out_loss(model: nn.Module, pairs: Pairs, loss_of: nn.Module) -> float:
    model.eval()
    parts = zip(pairs.images.split(SEGMENTED_AT_ONCE), pairs.masks.split(SEGMENTED_AT_ONCE), strict=True)
    return sum(loss_of(model(images), masks[:, None]).item() * len(masks) for images, masks in parts) / len(pairs)
