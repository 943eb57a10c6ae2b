"""Are samples copies of training images? Their nearest training images against the nearest images of patients that were held out.

Words. A *query* is an image that is asked about: a sample, or a held-out image. In a *space* (pixels, or an extractor's features) its
*closeness* is log(distance to the nearest training image) - log(distance to the nearest held-out image of another patient): smooth images
are nearer to everything, which cancels. Held-out queries say which closeness chance brings, however many training images there are. A
*score* is the lowest closeness over the spaces, each in robust deviations (`_deviations`). A query is *flagged* where at most a
share `rate` of the held-out queries scores as low (a conformal test: Vovk et al., 2005), and a *copy* where it lies far beyond them all.
Distances between distributions of such numbers: Meehan et al. (AISTATS 2020); nearest neighbours of samples: Carlini et al. (2023).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import adaptive_avg_pool2d

from medsd.errors import InputError
from medsd.evaluation.classification import auroc, interval
from medsd.evaluation.resampling import drawn_weights, patient_numbers
from medsd.evaluation.shares import binomial_interval

Floats = NDArray[np.float64]

SIDE, SHIFT = 32, 2
"""Pixels of the images that are compared, and how far they are moved each way: 4 of 64 px."""
WHITENING = 0.5
"""Power of the training images' mean spectrum that spectra are divided by: 0 lets the outline speak alone, 1 the noise."""
SMALLEST = 1e-6
"""Distances below it count as it."""
UNLIKELY = 0.025
COPY_DEVIATIONS = 10.0
"""Below the median of held-out queries."""
ROUNDING = 1e-9
BLOCK = 256
"""Queries, and images that they are compared with, at a time."""


@dataclass(frozen=True)
class Neighbours:
    """Of Q queries in one space."""

    training: Floats
    """`(Q,)` distance to the nearest training image."""
    held_out: Floats
    """`(Q,)` distance to the nearest held-out image of another patient."""
    nearest: NDArray
    """`(Q,)` place of the nearest training image."""

    @property
    def closeness(self) -> Floats:
        """`(Q,)`: below 0, nearer to the training images than to others."""
        return np.log(np.maximum(self.training, SMALLEST)) - np.log(np.maximum(self.held_out, SMALLEST))


@dataclass(frozen=True)
class Findings:
    """Of N samples and H held-out images."""

    scores: Floats
    """`(N,)`, robust deviations; the lower, the nearer to the training images."""
    held_out_scores: Floats
    """`(H,)`."""
    p_values: Floats
    """`(N,)` share of held-out queries, the sample among them, that scores as low."""
    flagged: NDArray
    """`(N,)` boolean."""
    copies: NDArray
    """`(N,)` boolean."""
    nearest: NDArray
    """`(N,)` place of the training image that is nearest in the space which says most."""
    space: list[str]
    """N names of that space."""
    threshold: float
    """Scores below it are flagged."""
    patients: int
    """Of the held-out images."""


def find_copies(
    samples: dict[str, Neighbours], held_out: dict[str, Neighbours], rate: float = 0.01, patients: int | None = None
) -> Findings:
    """Which samples are nearer to training images than chance brings, at a false-positive rate of `rate`.

    `samples` and `held_out` have the same spaces; the latter are images of so many `patients`, by default of one each. Raises InputError
    where there are too few held-out images for that rate: it takes 1 / rate - 1 of them.
    """
    count = len(next(iter(held_out.values())).training)
    if rate * (count + 1) < 1 - ROUNDING:
        needed, possible = math.ceil(1 / rate - ROUNDING) - 1, math.ceil(1e4 / (count + 1)) / 1e4
        raise InputError(f"{count} held-out images: a false-positive rate of {rate:g} takes {needed} or more; allow {possible:g}")
    pairs = [_deviations(samples[name].closeness, held_out[name].closeness, rate) for name in held_out]
    ours, theirs = (np.stack(part) for part in zip(*pairs, strict=True))
    scores, reference = ours.min(0), np.sort(theirs.min(0))
    threshold = reference[math.floor(rate * (count + 1) + ROUNDING) - 1]
    flagged = scores < threshold
    telling = ours.argmin(0)
    return Findings(
        scores=scores,
        held_out_scores=reference,
        p_values=(1 + np.searchsorted(reference, scores, side="right")) / (count + 1),
        flagged=flagged,
        copies=flagged & (scores < min(reference[0], -COPY_DEVIATIONS)),
        nearest=np.stack([samples[name].nearest for name in held_out])[telling, np.arange(len(scores))],
        space=[list(held_out)[index] for index in telling],
        threshold=float(threshold),
        patients=count if patients is None else patients,
    )


def audit_summary(found: Findings, rate: float) -> dict[str, Any]:
    """`samples`, `held_out`, `flagged`, `flagged_share` and its `_ci`, `copies`, `false_positive_rate`, and the `verdict`.

    `failed` where a sample is a copy, or more are flagged than chance brings in one of 40 audits of models that copy nothing: `chance`, the
    probability of so many, is below 0.025. The threshold is itself one of few held-out scores, so that number is beta-binomial; they
    count as few as the held-out patients, whose images are alike, so that false alarms are rarer than that. Else `passed`.
    """
    from scipy.stats import betabinom

    flagged, count, copies = int(found.flagged.sum()), len(found.scores), int(found.copies.sum())
    low, high = binomial_interval(flagged, count)
    held_out = len(found.held_out_scores)
    chance = float(betabinom.sf(flagged - 1, count, rate * (found.patients + 1), (1 - rate) * (found.patients + 1)))
    return {
        "samples": count,
        "held_out": held_out,
        "false_positive_rate": rate,
        "flagged": flagged,
        "flagged_share": flagged / count,
        "flagged_share_ci": [low, high],
        "chance": chance,
        "copies": copies,
        "verdict": "failed" if copies or chance < UNLIKELY else "passed",
    }


def membership(training_losses: Floats, held_out_losses: Floats, patients: Sequence[str], resamples: int = 1000, seed: int = 0) -> dict:
    """How well the denoising error tells training images from held-out ones (Carlini et al., USENIX Security 2023, section 5).

    `(T,)` and `(H,)` losses of single images at the same pairs, and the T + H patients. Returns `membership_auroc`, 0.5 where it tells
    nothing and 1 where every training image has the lower error, its interval by patient, and `memorization_gap`, the difference of the
    mean losses over the held-out mean.
    """
    losses, member = np.concatenate([training_losses, held_out_losses]), np.arange(len(patients)) < len(training_losses)
    series = auroc(-losses, member, drawn_weights(patient_numbers(patients), resamples, np.random.default_rng(seed)))
    gap = 1 - float(np.mean(training_losses) / np.mean(held_out_losses))
    return {"membership_auroc": float(series[0]), "membership_auroc_ci": interval(series), "memorization_gap": gap}


def pixel_neighbours(
    queries: torch.Tensor,
    training: torch.Tensor,
    held_out: torch.Tensor,
    query_patients: Sequence[str] | None = None,
    held_out_patients: Sequence[str] | None = None,
) -> Neighbours:
    """In pixels: 1 - the best correlation over mirror images and shifts, of images `(., C, H, W)` in `[-1, 1]`, half whitened.

    So that brightness, contrast, mirroring and small shifts do not hide a copy. Held-out images of a query's own patient are left out.
    """
    filters = whitening(training)
    small, large, other = (reduce(images, filters) for images in (queries, training, held_out))
    parts = []
    for start in range(0, len(small), BLOCK):
        versions = list(_versions(small[start : start + BLOCK]))
        excluded = _same_patient(query_patients, held_out_patients, slice(start, start + BLOCK))
        parts.append((*_most_alike(versions, large), _most_alike(versions, other, excluded)[0]))
    to_training, places, to_held_out = (torch.cat(part) for part in zip(*parts, strict=True))
    return Neighbours(_numpy(1 - to_training), _numpy(1 - to_held_out), places.numpy())


def feature_neighbours(
    queries: Floats,
    training: Sequence[Floats],
    held_out: Sequence[Floats],
    query_patients: Sequence[str] | None = None,
    held_out_patients: Sequence[str] | None = None,
) -> Neighbours:
    """In features `(., D)`, each divided by its deviation over the first of `training`: Euclidean.

    `training` and `held_out` may hold several versions of the same images, such as mirror images, of which the nearest counts.
    """
    scale = training[0].std(0) + 1e-12
    parts = []
    for start in range(0, len(queries), BLOCK):
        some = queries[start : start + BLOCK] / scale
        excluded = _same_patient(query_patients, held_out_patients, slice(start, start + BLOCK))
        parts.append(
            (
                *_nearest(some, [version / scale for version in training]),
                _nearest(some, [version / scale for version in held_out], excluded)[0],
            )
        )
    to_training, places, to_held_out = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Neighbours(to_training, to_held_out, places)


def whitening(training: torch.Tensor) -> torch.Tensor:
    """Factor of every frequency `(SIDE, SIDE // 2 + 1)`, 0 for the mean."""
    power = sum(torch.fft.rfft2(adaptive_avg_pool2d(part.float(), SIDE)).abs().square().mean(1).sum(0) for part in training.split(BLOCK))
    factors = (power / len(training)).sqrt().clamp(min=1e-6) ** -WHITENING
    factors[0, 0] = 0
    return factors


def reduce(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Images `(N, C, H, W)` -> `(N, C, SIDE, SIDE)`, filtered."""
    parts = [torch.fft.rfft2(adaptive_avg_pool2d(part.float(), SIDE)) * factors for part in images.split(BLOCK)]
    return torch.cat([torch.fft.irfft2(part, s=(SIDE, SIDE)) for part in parts])


def unit_rows(images: torch.Tensor) -> torch.Tensor:
    """`(N, C, H, W)` -> `(N, C H W)` of length 1."""
    rows = images.flatten(1)
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-9)


def _versions(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """The images and their mirror images, moved, as rows of length 1."""
    for mirrored in (images, images.flip(-1)):
        for down in range(-SHIFT, SHIFT + 1):
            for right in range(-SHIFT, SHIFT + 1):
                yield unit_rows(torch.roll(mirrored, (down, right), (2, 3)))


def _most_alike(
    versions: Sequence[torch.Tensor], images: torch.Tensor, excluded: NDArray | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best correlation `(Q,)` of any version of each query with any of M images, and its place `(Q,)`; without `excluded` `(Q, M)`."""
    best, places = torch.full((len(versions[0]),), -1.0), torch.zeros(len(versions[0]), dtype=torch.long)
    for start in range(0, len(images), BLOCK):
        rows = unit_rows(images[start : start + BLOCK])
        alike = versions[0] @ rows.T
        for version in versions[1:]:
            torch.maximum(alike, version @ rows.T, out=alike)
        if excluded is not None:
            alike[torch.from_numpy(excluded[:, start : start + BLOCK])] = -1.0
        found = alike.max(1)
        places = torch.where(found.values > best, found.indices + start, places)
        best = torch.maximum(best, found.values)
    return best, places


def _nearest(queries: Floats, versions: Sequence[Floats], excluded: NDArray | None = None) -> tuple[Floats, NDArray]:
    """Distance `(Q,)` to the nearest of M images in any version of them, and its place `(Q,)`; without `excluded` `(Q, M)`."""
    best, places = np.full(len(queries), np.inf), np.zeros(len(queries), int)
    for start in range(0, len(versions[0]), BLOCK):
        squares = np.min([_squares(queries, version[start : start + BLOCK]) for version in versions], axis=0)
        if excluded is not None:
            squares[excluded[:, start : start + BLOCK]] = np.inf
        nearest = squares.argmin(1)
        found = squares[np.arange(len(queries)), nearest]
        places = np.where(found < best, nearest + start, places)
        best = np.minimum(best, found)
    return np.sqrt(best), places


def _squares(first: Floats, second: Floats) -> Floats:
    return np.maximum((first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T, 0)


def _same_patient(queries: Sequence[str] | None, held_out: Sequence[str] | None, chosen: slice) -> NDArray | None:
    """`(q, M)` for some of the queries."""
    return None if queries is None else np.asarray(queries[chosen])[:, None] == np.asarray(held_out)


def _deviations(samples: Floats, held_out: Floats, rate: float) -> tuple[Floats, Floats]:
    """Closeness of both in robust deviations from the held-out median.

    Samples that are no copies stray to either side alike, so where they stray further to the far side than held-out images do, as those
    of a blurred model may, theirs are shrunk to match.
    """
    centre = np.median(held_out)
    scale = max(1.4826 * float(np.median(np.abs(held_out - centre))), 1e-6)
    ours, theirs = (samples - centre) / scale, (held_out - centre) / scale
    far = [max(float(np.quantile(some, 1 - rate, method="higher")), 1.0) for some in (ours, theirs)]
    return ours / max(1.0, far[0] / far[1]), theirs


def _numpy(values: torch.Tensor) -> Floats:
    return values.double().numpy()
