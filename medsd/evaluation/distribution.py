"""How alike generated and real images are, from their features: FID, KID, precision, recall, density and coverage.

Words. Features are `(N, D)`, a row per image. A *weight* is how often an image counts: 1, or in a resample 0, 1, 2, ... The *floor* of a
distance is what it is between two sets of real images of other patients: what a perfect generator would show at these numbers of images.
Distances and kernels are computed in blocks, so that memory does not grow with the square of the number of images.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medsd.errors import InputError
from medsd.evaluation.classification import interval
from medsd.evaluation.features import Features, check_same
from medsd.evaluation.resampling import drawn_weights, patient_numbers

Floats = NDArray[np.float64]

NEIGHBOURS = 5
"""k of the balls around images (Naeem et al., ICML 2020, section 5)."""
BLOCK_ELEMENTS = 2**22
FEW_RESAMPLES, EIGEN_WORK = 20, 200 * 512**3
"""Of the Fréchet distance, whose every resample costs D^3: as many as `EIGEN_WORK` allows, but at least so few."""
NAMES = ("fid", "kid", "precision", "recall", "density", "coverage")


def distribution_metrics(
    generated: Features,
    real: Features,
    patients: Sequence[str],
    other: Features | None = None,
    other_patients: Sequence[str] | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Generated against real images, with 95 % bootstrap intervals: real images by patient, generated ones one by one.

    Args:
        generated: M images, more than `NEIGHBOURS`.
        real: N images, more than `NEIGHBOURS`.
        patients: N ids.
        other: real images of other patients, about M of them, for the floors.
        other_patients: their ids; default a patient each.

    Returns:
        `fid`, `kid`, `precision`, `recall`, `density`, `coverage`, each with `NAME_ci` and `NAME_floor`; `kid_floor_ci`; `extractor`,
        `n_real`, `n_generated`, `n_floor`. The intervals of the last four of the six take the balls around the images as given; that of
        `fid` is moved by the bias that resampling adds. Where images of one patient are alike, balls are small and even the floors of
        precision, density and coverage far below 1. None, with a sentence in `reasons`, where there are too few images or patients.

    Raises InputError for features of different extractors.
    """
    check_same(generated, real, *([other] if other else []))
    found: dict[str, Any] = {"extractor": real.extractor, "n_real": len(real), "n_generated": len(generated), "reasons": {}}
    floors = [*(f"{name}_floor" for name in NAMES), "kid_floor_ci"]
    missing = [*NAMES, *(f"{name}_ci" for name in NAMES), *floors]
    if min(len(generated), len(real)) <= NEIGHBOURS:
        why = f"{len(generated)} generated and {len(real)} real images: more than {NEIGHBOURS} of each are needed."
        return found | dict.fromkeys(missing) | {"reasons": dict.fromkeys(missing, why)}
    draws = np.random.default_rng(seed)
    ones = np.arange(len(generated))
    units = patient_numbers(patients)
    real_counts, generated_counts = (drawn_weights(some, resamples, draws) for some in (units, ones))
    found |= _distances(generated.values, real.values, generated_counts, real_counts, ones, units)
    for name, (values, counts) in _shares(generated.values, real.values, generated_counts, real_counts).items():
        series = counts @ values / counts.sum(1)
        found |= {name: float(series[0]), f"{name}_ci": interval(series)}
    if other is None or len(other) <= NEIGHBOURS:
        why = f"{len(other) if other else 0} other real images to compare with: more than {NEIGHBOURS} are needed."
        found |= dict.fromkeys(floors)
        found["reasons"] |= dict.fromkeys(floors, why)
    else:
        others = np.arange(len(other)) if other_patients is None else patient_numbers(other_patients)
        floor = _distances(other.values, real.values, drawn_weights(others, resamples, draws), real_counts, others, units)
        found |= {"n_floor": len(other), "fid_floor": floor["fid"], "kid_floor": floor["kid"], "kid_floor_ci": floor["kid_ci"]}
        found |= {f"{name}_floor": share for name, share in precision_recall(other.values, real.values).items()}
    lost = [name for name in missing if found[name] is None and name not in found["reasons"]]
    found["reasons"] |= dict.fromkeys(
        lost, f"Real images of {units.max() + 1} patients: too few to resample, or to compare with each other."
    )
    return found


def by_class(
    generated: Features,
    generated_labels: NDArray,
    real: Features,
    labels: NDArray,
    patients: Sequence[str],
    class_names: Sequence[str],
    other: Features | None = None,
    other_labels: NDArray | None = None,
    other_patients: Sequence[str] | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """`distribution_metrics` within each class, as `NAME/CLASS`; labels are class indices."""
    found: dict[str, Any] = {"reasons": {}}
    for number, name in enumerate(class_names):
        own = np.flatnonzero(labels == number)
        theirs = np.flatnonzero(other_labels == number) if other is not None and other_labels is not None else None
        known = None if theirs is None else other[theirs]
        who = None if theirs is None or other_patients is None else [other_patients[place] for place in theirs]
        sides = (generated[generated_labels == number], real[own], [patients[place] for place in own])
        measured = distribution_metrics(*sides, known, who, resamples, seed)
        found["reasons"] |= {f"{key}/{name}": reason for key, reason in measured.pop("reasons").items()}
        del measured["extractor"]
        found |= {_of_class(key, name): value for key, value in measured.items()}
    return found


def _of_class(key: str, name: str) -> str:
    """`fid` -> `fid/CLASS`, `fid_ci` -> `fid/CLASS_ci`, as in the metrics of classification."""
    return f"{key.removesuffix('_ci')}/{name}_ci" if key.endswith("_ci") else f"{key}/{name}"


def frechet_distance(first: ArrayLike, second: ArrayLike) -> float:
    """FID: squared Fréchet distance of two Gaussians with the mean and covariance of features `(N, D)` and `(M, D)`.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) (Heusel et al., NeurIPS 2017, eq. 6); the last trace by symmetric matrices, so that
    covariances without full rank do no harm.
    """
    (mean, covariance), (other_mean, other_covariance) = (_moments(np.asarray(x, np.float64), None) for x in (first, second))
    return _frechet(mean, covariance, other_mean, other_covariance)


def kernel_distance(first: ArrayLike, second: ArrayLike) -> float:
    """KID: unbiased squared maximum mean discrepancy under the kernel (x . y / D + 1)^3 (Binkowski et al., ICLR 2018, eq. 4).

    Of all images, where others average over subsets; it can be below 0.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    counts, units = zip(*((np.ones((1, len(some))), np.arange(len(some))) for some in (first, second)), strict=True)
    return float(_kernel_distances(first, second, *counts, *units)[0])


def precision_recall(generated: ArrayLike, real: ArrayLike, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """`precision`, `recall` (Kynkäänniemi et al., NeurIPS 2019, eqs. 1-2), `density`, `coverage` (Naeem et al., ICML 2020, eqs. 3-4).

    A ball around an image reaches to its k-th nearest image of the same set.
    """
    generated, real = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    if min(len(generated), len(real)) <= neighbours:
        raise InputError(f"{len(generated)} and {len(real)} images: more than {neighbours} of each are needed")
    ones = np.ones((1, len(generated))), np.ones((1, len(real)))
    return {name: float(values.mean()) for name, (values, _) in _shares(generated, real, *ones, neighbours).items()}


def _distances(
    first: NDArray, second: NDArray, first_counts: Floats, second_counts: Floats, first_units: NDArray, second_units: NDArray
) -> dict[str, Any]:
    """`fid`, `kid` and their intervals; units `(N,)` are what is drawn: patients, or images."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    resamples = 1 + max(FEW_RESAMPLES, EIGEN_WORK // first.shape[1] ** 3)
    pairs = zip(first_counts[:resamples], second_counts[:resamples], strict=False)
    frechet = np.array([_frechet(*_moments(first, one), *_moments(second, two)) for one, two in pairs])
    both = min(len(first_counts), len(second_counts))
    kernel = _kernel_distances(first, second, first_counts[:both], second_counts[:both], first_units, second_units)
    moved = np.concatenate([frechet[:1], np.maximum(frechet[1:] - (frechet[1:].mean() - frechet[0]), 0)]) if both > 1 else frechet
    return {
        "fid": float(frechet[0]),
        "fid_ci": interval(moved) if both > 1 else None,
        "kid": float(kernel[0]) if np.isfinite(kernel[0]) else None,
        "kid_ci": interval(kernel) if both > 1 else None,
    }


def _moments(features: Floats, weights: Floats | None) -> tuple[Floats, Floats]:
    """Mean `(D,)` and unbiased covariance `(D, D)`."""
    weights = np.ones(len(features)) if weights is None else weights
    mean = weights @ features / weights.sum()
    centred = features - mean
    return mean, (weights[:, None] * centred).T @ centred / (weights.sum() - 1)


def _frechet(mean: Floats, covariance: Floats, other_mean: Floats, other: Floats) -> float:
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    between = np.linalg.eigvalsh(root.T @ other @ root)
    common = np.sqrt(np.maximum(between, 0)).sum()
    return float(((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other) - 2 * common)


def _kernel_distances(
    first: Floats, second: Floats, first_counts: Floats, second_counts: Floats, first_units: NDArray, second_units: NDArray
) -> Floats:
    """`(R,)`, NaN where all images of a side are of one unit.

    Images of one patient are not compared with each other, nor is an image that is drawn twice: they are alike for that, which would add
    to the distance.
    """
    within = []
    for some, counts, units in ((first, first_counts, first_units), (second, second_counts, second_units)):
        drawn = np.stack([np.bincount(units, row) for row in counts])
        pairs = drawn.sum(1) ** 2 - (drawn**2).sum(1)
        sums = _kernel_sums(some, some, counts, counts, units)
        within.append(np.divide(sums, pairs, out=np.full(len(sums), np.nan), where=pairs > 0))
    across = _kernel_sums(first, second, first_counts, second_counts)
    return within[0] + within[1] - 2 * across / (first_counts.sum(1) * second_counts.sum(1))


def _kernel_sums(first: Floats, second: Floats, first_counts: Floats, second_counts: Floats, units: NDArray | None = None) -> Floats:
    """`(R,)` sum of the kernel over all pairs, each as often as it is drawn; of one set of images without those of one unit."""
    sums, width = np.zeros(len(first_counts)), first.shape[1]
    for rows in _blocks(len(first), len(second)):
        kernel = (first[rows] @ second.T / width + 1) ** 3
        if units is not None:
            kernel[units[rows][:, None] == units] = 0
        sums += np.einsum("rj,rj->r", first_counts[:, rows] @ kernel, second_counts)
    return sums


def _shares(
    generated: Floats, real: Floats, generated_counts: Floats, real_counts: Floats, neighbours: int = NEIGHBOURS
) -> dict[str, tuple[Floats, Floats]]:
    """What is averaged for each measure: a value for each generated or real image, and how often these count."""
    generated, real = generated.astype(np.float64), real.astype(np.float64)
    real_radii, generated_radii = ball_radii(real, neighbours), ball_radii(generated, neighbours)
    balls = _over_rows(lambda squares: (squares <= real_radii).sum(1), generated, real)
    recalled = _over_rows(lambda squares: (squares <= generated_radii).any(1), real, generated)
    nearest = _over_rows(lambda squares: squares.min(1), real, generated)
    return {
        "precision": ((balls > 0).astype(float), generated_counts),
        "recall": (recalled.astype(float), real_counts),
        "density": (balls / neighbours, generated_counts),
        "coverage": ((nearest <= real_radii).astype(float), real_counts),
    }


def ball_radii(features: Floats, neighbours: int) -> Floats:
    """`(N,)` squared distance of each image to its k-th nearest other one."""
    return _over_rows(lambda squares: np.partition(squares, neighbours, axis=1)[:, neighbours], features, features)


def _over_rows(summary: Callable[[Floats], NDArray], first: Floats, second: Floats) -> NDArray:
    """`summary` of the squared distances `(rows, M)`, for all N rows."""
    norms = (second**2).sum(1)
    parts = []
    for rows in _blocks(len(first), len(second)):
        some = first[rows]
        parts.append(summary(np.maximum((some**2).sum(1)[:, None] + norms - 2 * some @ second.T, 0)))
    return np.concatenate(parts)


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Cut `rows` so that a block of so many columns is small."""
    height = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))
