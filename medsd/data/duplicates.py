"""Identical, nearly identical and mirrored images: proposed by a banded hash, decided by correlation.

Words. A *thumbnail* is an image shrunk to 64 x 64 grey bytes. A *hash* is 256 bits of its cosine transform. A *band* is a
set of hash bits; rows with one value in a band share a *bucket* and are compared. The *distance* of two hashes is their number
of differing bits. A *group* is a number per image, such as its split: only pairs of two groups are wanted.

With d + 1 disjoint bands, hashes at distance d or less agree in a whole band. That pigeonhole holds for any choice of bits, so
bands are cut from the bits that vary most among the rows at hand, and a bucket that is still large is cut again, by the bits
that vary inside it. Only in a crowd, over `BUCKET` rows of which an eighth of the pairs are near anyway or over `TOUGH_BUCKET`
that no bands tell apart, is each row compared with `HUBS` rows rather than with all; a warning tells how many pairs that left
out.

Measured on brain_mri_4class (711 MRI slices, 103 known pairs of copies and mirror images). Known pairs differ by up to 6 bits
and correlate above 0.9995. Of all 240 pairs that correlate above 0.98, 230 are within `PROPOSED_DISTANCE` and found; the rest
are copies with clipped or sharpened contrast. Among 406 slices of T1CE MRI (brain_mri_t1ce_3class) no two of different pseudo
groups correlate above 0.95, so no second rule guards against false positives.

Covered: re-encoding, resizing, brightness and contrast, and all of these in a left-right mirror image. Not covered: up-down
mirror images, turns by 90 or 180 degrees, crops and shifts.
"""

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from medsd.errors import InputError

THUMBNAIL_SIDE = 64
HASH_BITS = 256
GUARANTEED_DISTANCE = 10
"""Every pair of hashes within this distance is compared, but for those in crowds that the warning counts."""
PROPOSED_DISTANCE = 16
"""Pairs up to this distance are worth a correlation, where a band brings them together."""
BUCKET = 1024
"""Rows that are compared each with each; more of them are cut into further bands."""
TOUGH_BUCKET = 16384
"""Rows that are compared each with each where no bands tell them apart."""
HUBS = 32
"""Rows that stand for a crowd of near ones."""

_TAILS = 0.005
_NOISE = 32.0
"""What a coefficient, of the orthonormal transform of values from 0 to 255, exceeds if its bit is set. Grey noise of deviation 1
gives coefficients of deviation 1. The measured hits are nearer at 32 than from 0 to 16; 64 draws other images near too."""
_CHUNK_IMAGES = 1024
_CHUNK_PAIRS = 1 << 20


class Thumbnails(Protocol):
    """Thumbnails `(N, 64, 64)` uint8 in memory, mapped from a file, or read on demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Any) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """Two rows, `first < second`, that show one image; `mirrored` if one is the left-right mirror image of the other."""

    first: int
    second: int
    mirrored: bool
    correlation: float
    """Pearson's, of the thumbnails, one of them mirrored if `mirrored`."""


def thumbnail(image: np.ndarray) -> np.ndarray:
    """An image `(C, H, W)` of any unit -> grey uint8 `(64, 64)`: mean of channels and of areas, whatever the aspect ratio.

    The 0.5 and 99.5 percentiles of the shrunk image become 0 and 255. Where they are equal, as in a constant image, all is 0.

    Raises:
        InputError: pixels that are not finite.
    """
    grey = image[0] if len(image) == 1 else image.mean(0, dtype=np.float32)
    with np.errstate(invalid="ignore"):
        shrunk = _area_weights(grey.shape[0]) @ grey.astype(np.float32) @ _area_weights(grey.shape[1]).T
    tail = int(_TAILS * shrunk.size)
    ranked = np.partition(shrunk.ravel(), (tail, shrunk.size - 1 - tail))
    low, high = ranked[tail], ranked[-1 - tail]
    if not np.isfinite(high - low):
        raise InputError(f"an image {image.shape} has pixels that are not finite: mend or leave out its file.")
    if high <= low:
        return np.zeros(shrunk.shape, np.uint8)
    return np.rint(np.clip((shrunk - low) * (255 / (high - low)), 0, 255)).astype(np.uint8)


def mirrored(thumbnails: np.ndarray) -> np.ndarray:
    """Left-right mirror images of `(..., H, W)`, as a view."""
    return thumbnails[..., ::-1]


def hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Hashes `(N, 4)` uint64 of thumbnails `(N, 64, 64)`.

    A bit tells whether one of the 256 cosine coefficients of lowest spatial frequency without the mean is clearly positive, in
    the spirit of pHash (Zauner 2010). Unlike differences of neighbours, no bit belongs to the dark border that all images of a
    scanner share.
    """
    return hashes_both_ways(thumbnails)[0]


def near_pairs(
    hashes: np.ndarray,
    other: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    max_distance: int = PROPOSED_DISTANCE,
) -> np.ndarray:
    """Pairs `(M, 2)` int64, `i < j`, ascending, of hashes `i` and `j` within `max_distance` bits.

    Where nothing is warned of, all pairs within `GUARANTEED_DISTANCE` are among them, and ever fewer of those beyond. Memory is a
    small multiple of the hashes and of the pairs. The warning counts the pairs left out: see the module's text.

    Args:
        hashes: `(N, 4)` uint64.
        other: if given, also `(N, 4)`: pairs of `hashes[i]` and `other[j]` instead, with `i < j` again.
        groups: `(N,)` ints: only pairs of two groups. All pairs if left out.
    """
    search = _Search(hashes, other, groups, max_distance)
    search.run(np.argsort(search.group, kind="stable"))
    if search.left_out:
        warnings.warn(
            f"up to {search.left_out} pairs of images were not compared for near duplicates: in crowds of over {BUCKET} that look "
            f"nearly equal, each was compared with {HUBS} others only.",
            stacklevel=2,
        )
    return search.pairs()


def find_near_duplicates(
    thumbnails: Thumbnails,
    groups: np.ndarray | None = None,
    correlation: float = 0.98,
    hashed: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[NearDuplicate]:
    """All pairs of images that a correlation of their thumbnails above `correlation` calls the same, by `(first, second)`.

    A pair that is alike both plainly and mirrored is listed once, as what it is more. Images without contrast at the hash's
    frequencies match nothing, constant ones above all.

    Args:
        thumbnails: `(N, 64, 64)` uint8, or whatever gives some of them for an array of indices: they are read in pieces.
        groups: `(N,)` ints: only pairs of two groups. All pairs if left out.
        correlation: Pearson's, in (0, 1).
        hashed: what `hashes_both_ways` gives for them, where that is known already.
    """
    plain, flipped = hashed or hashes_both_ways(thumbnails)
    rows = np.flatnonzero(plain.any(1) | flipped.any(1))
    kept = None if groups is None else np.asarray(groups)[rows]
    found = {}
    for is_mirrored, other in ((False, None), (True, flipped[rows])):
        pairs = rows[near_pairs(plain[rows], other, kept)]
        for (first, second), value in zip(pairs.tolist(), _correlations(thumbnails, pairs, is_mirrored).tolist(), strict=True):
            if value > max(correlation, found[first, second].correlation if (first, second) in found else 0):
                found[first, second] = NearDuplicate(first, second, is_mirrored, value)
    return [found[pair] for pair in sorted(found)]


@lru_cache(maxsize=64)
def _area_weights(length: int) -> np.ndarray:
    """Weights `(64, length)` of the mean over each 64th of a line of pixels, parts of pixels counted in part."""
    edges = np.linspace(0, length, THUMBNAIL_SIDE + 1)
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (overlap.clip(0) * (THUMBNAIL_SIDE / length)).astype(np.float32)


@lru_cache(maxsize=1)
def _frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Vertical and horizontal frequencies `(256,)` of the hash, in half periods per side, low ones first."""
    vertical, horizontal = np.indices((THUMBNAIL_SIDE, THUMBNAIL_SIDE)).reshape(2, -1)
    lowest = np.argsort(np.hypot(vertical, horizontal), kind="stable")[1 : HASH_BITS + 1]
    return vertical[lowest], horizontal[lowest]


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """Orthonormal cosines `(F, 64)`, one frequency per row, as many as the hash needs."""
    count = 1 + max(part.max() for part in _frequencies())
    places = (2 * np.arange(THUMBNAIL_SIDE) + 1) * np.pi / (2 * THUMBNAIL_SIDE)
    waves = np.cos(np.arange(count)[:, None] * places) * math.sqrt(2 / THUMBNAIL_SIDE)
    waves[0] /= math.sqrt(2)
    return waves.astype(np.float32)


def hashes_both_ways(thumbnails: Thumbnails) -> tuple[np.ndarray, np.ndarray]:
    """Hashes `(N, 4)` of the thumbnails and of their mirror images, whose odd horizontal coefficients change sign.

    A small coefficient leaves its bit unset in both, so noise sets few bits, and a constant image has the hash 0 twice.
    """
    vertical, horizontal = _frequencies()
    signs = np.where(horizontal % 2, -1, 1).astype(np.float32)
    plain, flipped = np.zeros((2, len(thumbnails), HASH_BITS // 64), np.uint64)
    for start in range(0, len(thumbnails), _CHUNK_IMAGES):
        chunk = slice(start, start + _CHUNK_IMAGES)
        spectrum = _cosines() @ (thumbnails[chunk].astype(np.float32) @ _cosines().T)
        coefficients = spectrum.reshape(len(spectrum), -1).take(vertical * len(_cosines()) + horizontal, axis=1)
        plain[chunk] = _packed(coefficients > _NOISE)
        flipped[chunk] = _packed(coefficients * signs > _NOISE)
    return plain, flipped


def _packed(bits: np.ndarray) -> np.ndarray:
    """Bits `(N, 256)` -> `(N, 4)` uint64, bit b of a row being bit b % 64 of its word b // 64."""
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint64)


def _correlations(thumbnails: Thumbnails, pairs: np.ndarray, is_mirrored: bool) -> np.ndarray:
    """Pearson's correlation `(M,)` of each pair `(M, 2)`, the second image mirrored if asked."""
    values = np.zeros(len(pairs))
    for start in range(0, len(pairs), _CHUNK_IMAGES):
        chunk = slice(start, start + _CHUNK_IMAGES)
        first, second = thumbnails[pairs[chunk, 0]], thumbnails[pairs[chunk, 1]]
        values[chunk] = (_standardised(first) * _standardised(mirrored(second) if is_mirrored else second)).sum(1)
    return values.clip(-1, 1)


def _standardised(thumbnails: np.ndarray) -> np.ndarray:
    """Thumbnails as rows `(N, 4096)` of mean 0 and length 1; constant ones as 0."""
    rows = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    rows -= rows.mean(1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


class _Search:
    """One call of `near_pairs`. Its rows are the hashes, then the other side's if there is one.

    A pair of rows is wanted if their groups differ and, of two sides, the first is of `hashes` and the lower image.
    """

    def __init__(self, hashes: np.ndarray, other: np.ndarray | None, groups: np.ndarray | None, max_distance: int) -> None:
        self.count = len(hashes)
        self.two_sided = other is not None
        self.words = hashes if other is None else np.concatenate([hashes, other])
        group = np.arange(self.count) if groups is None else np.unique(groups, return_inverse=True)[1]
        self.group = group if other is None else np.concatenate([group, group])
        self.max_distance = max_distance
        self.left_out = 0
        self.codes = np.zeros(0, np.int64)
        self.pending: list[np.ndarray] = []
        self.pending_count = 0

    def pairs(self) -> np.ndarray:
        """The pairs `(M, 2)` found, ascending, each once."""
        self._merge()
        return np.stack(np.divmod(self.codes, max(self.count, 1)), axis=1)

    def run(self, rows: np.ndarray) -> None:
        """Find the near pairs of `rows`, which are in the order of their groups."""
        whole = self._buckets(rows, np.zeros(0, int))
        if len(rows) <= BUCKET or not _pair_count(*whole[1:]):
            self._compare(*whole)
        elif self._is_crowd(rows):
            self._compare_with_hubs(rows)
        else:
            self._run_bands(whole)

    def _run_bands(self, whole: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Go by bands if they halve the work at least. Else compare all pairs, or, were that too many, those with hubs."""
        rows = whole[0]
        banded = [self._buckets(rows, band) for band in _bands(self.words[rows])]
        if 2 * sum(_pair_count(starts, stops) for _, starts, stops in banded) <= _pair_count(*whole[1:]):
            for buckets in banded:
                self._run_buckets(*buckets)
        elif len(rows) <= TOUGH_BUCKET:
            self._compare(*whole)
        else:
            self._compare_with_hubs(rows)

    def _buckets(self, rows: np.ndarray, band: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`rows` sorted by bucket and group, and for each the first and last place, exclusive, of its bucket's later groups."""
        keys = _keys(self.words[rows], band)
        order = np.argsort(keys, kind="stable")
        rows, keys = rows[order], keys[order]
        return rows, _run_stops(keys, self.group[rows]), _run_stops(keys)

    def _run_buckets(self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> None:
        """Compare the rows of each small bucket, and run the large ones for themselves."""
        ends = np.unique(stops)
        sizes = np.diff(ends, prepend=0)
        self._compare(rows, starts, np.where(np.repeat(sizes, sizes) > BUCKET, starts, stops))
        for end, size in zip(ends[sizes > BUCKET], sizes[sizes > BUCKET], strict=True):
            if starts[end - size] < end:
                self.run(rows[end - size : end])

    def _compare(self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> None:
        """Compare each of `rows` with those at places `starts` to `stops`, exclusive, of `rows`."""
        words = self.words[rows]
        totals = np.cumsum(stops - starts)
        cuts = np.searchsorted(totals, np.arange(0, totals[-1:].sum(), _CHUNK_PAIRS), side="right")
        for low, high in pairwise([*cuts, len(rows)]):
            counts = stops[low:high] - starts[low:high]
            first = np.repeat(np.arange(low, high), counts)
            second = np.arange(len(first)) + np.repeat(starts[low:high] - np.cumsum(counts) + counts, counts)
            near = _distances(words.take(first, 0), words.take(second, 0)) <= self.max_distance
            self._keep(rows[first[near]], rows[second[near]])

    def _compare_with_hubs(self, rows: np.ndarray) -> None:
        """Compare all rows with a few, taken from every group in turn."""
        group = self.group[rows]
        sizes = np.unique(group, return_counts=True)[1]
        place_in_group = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = rows[np.argsort(place_in_group, kind="stable")]
        self.left_out += (len(rows) ** 2 - int((sizes**2).sum())) // 2
        for place, hub in enumerate(rows[:HUBS]):
            later = rows[place + 1 :]
            later = later[self.group[later] != self.group[hub]]
            self.left_out -= len(later)
            near = later[_distances(self.words[later], self.words[hub]) <= self.max_distance]
            self._keep(np.full(len(near), hub), near)

    def _is_crowd(self, rows: np.ndarray) -> bool:
        """Whether over an eighth of the wanted pairs are so near that no band need tell them apart.

        Judged by pairing each row with one other, in an order that owes nothing to that of the files.
        """
        others = rows[np.random.default_rng(0).permutation(len(rows))]
        wanted = self.group[rows] != self.group[others]
        distances = _distances(self.words[rows[wanted]], self.words[others[wanted]])
        return 8 * np.count_nonzero(distances <= GUARANTEED_DISTANCE) > len(distances)

    def _keep(self, first: np.ndarray, second: np.ndarray) -> None:
        first, second = np.minimum(first, second), np.maximum(first, second)
        if self.two_sided:
            wanted = (first < self.count) & (first < second - self.count)
            first, second = first[wanted], second[wanted] - self.count
        self.pending.append(first * self.count + second)
        self.pending_count += len(first)
        if self.pending_count > max(_CHUNK_PAIRS, len(self.codes)):
            self._merge()

    def _merge(self) -> None:
        """Drop repeats, so that what is held stays within a small multiple of the pairs."""
        self.codes = np.unique(np.concatenate([self.codes, *self.pending]))
        self.pending, self.pending_count = [], 0


def _pair_count(starts: np.ndarray, stops: np.ndarray) -> int:
    return int((stops - starts).sum())


def _bands(words: np.ndarray) -> list[np.ndarray]:
    """Disjoint sets of bits, one more than the guaranteed distance, of enough bits to tell the rows of `words` `(N, 4)` apart.

    The bits nearest to being set in half the rows are dealt out in turn.
    """
    ones = np.zeros(HASH_BITS, int)
    for start in range(0, len(words), _CHUNK_IMAGES):
        chunk = np.ascontiguousarray(words[start : start + _CHUNK_IMAGES]).view(np.uint8)
        ones += np.unpackbits(chunk, axis=1, bitorder="little").sum(0, dtype=int)
    bands = GUARANTEED_DISTANCE + 1
    bits = min(len(words).bit_length() * bands, HASH_BITS)
    chosen = np.argsort(np.abs(2 * ones - len(words)), kind="stable")[:bits]
    return [chosen[band::bands] for band in range(bands)]


def _keys(words: np.ndarray, band: np.ndarray) -> np.ndarray:
    """The bits `band` of the rows of `words` `(N, 4)`, as one uint64 per row."""
    keys = np.zeros(len(words), np.uint64)
    for bit in band:
        keys = keys << np.uint64(1) | words[:, bit // 64] >> np.uint64(bit % 64) & np.uint64(1)
    return keys


def _run_stops(*columns: np.ndarray) -> np.ndarray:
    """For each place `(N,)`, where the run of equal values in all columns that it lies in stops, exclusive."""
    changes = np.zeros(len(columns[0]), bool)
    changes[-1:] = True
    for column in columns:
        changes[:-1] |= column[1:] != column[:-1]
    stops = np.flatnonzero(changes) + 1
    return np.repeat(stops, np.diff(stops, prepend=0))


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.einsum("nw->n", np.bitwise_count(first ^ second), dtype=np.uint16)
