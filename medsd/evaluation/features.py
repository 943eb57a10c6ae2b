"""Features of images, and who made them: numbers of different extractors say nothing of each other."""

from dataclasses import dataclass

import numpy as np

from medsd.errors import InputError


@dataclass(frozen=True)
class Features:
    """Of N images."""

    values: np.ndarray
    """`(N, D)` float32."""
    extractor: str
    """Name and hash of the network, such as `unet sha256:0123456789abcdef`."""

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, chosen: np.ndarray) -> "Features":
        return Features(self.values[chosen], self.extractor)


def check_same(*features: Features) -> None:
    """Raise InputError where features of different extractors are about to be compared."""
    names = sorted({some.extractor for some in features})
    if len(names) > 1:
        raise InputError(f"features of {' and of '.join(names)} cannot be compared: extract both with one --features")
