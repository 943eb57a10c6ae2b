"""Features in two dimensions."""

import warnings

import numpy as np
from numpy.typing import NDArray

FEWEST = 16
"""Images that UMAP is asked for at least."""
NEIGHBOURS = 15


def embed(features: NDArray, seed: int = 0) -> tuple[NDArray, str]:
    """Features `(N, D)`, N >= 2 -> positions `(N, 2)`, and the method: `UMAP` where umap-learn is installed, else `PCA`.

    Each feature is standardised first. One thread and a fixed seed, so that the same features give the same picture (McInnes et al., 2018).
    """
    values = np.asarray(features, np.float64)
    spread = values.std(0)
    values = (values - values.mean(0)) / np.where(spread > 0, spread, 1)
    try:
        if len(values) < FEWEST:
            return _principal(values), "PCA"
        return _umap(values, seed), "UMAP"
    except ModuleNotFoundError:
        return _principal(values), "PCA"


def _umap(values: NDArray, seed: int) -> NDArray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of TensorFlow, which is not missed, and of scikit-learn's next version.
        from umap import UMAP

        return UMAP(n_neighbors=NEIGHBOURS, init="pca", random_state=seed, n_jobs=1).fit_transform(values)


def _principal(values: NDArray) -> NDArray:
    """The first two principal components, each pointing to where its largest loading is positive."""
    _, _, axes = np.linalg.svd(values, full_matrices=False)
    axes = axes[:2] if len(axes) > 1 else np.vstack([axes, np.zeros_like(axes)])
    signs = np.sign(axes[np.arange(2), np.abs(axes).argmax(1)])
    return values @ (axes * signs[:, None]).T
