"""How fast and how complete is the search for near duplicates?

    python benchmarks/duplicates.py --count 1000000
    python benchmarks/duplicates.py --images 20000
    python benchmarks/duplicates.py --data FOLDER

`--count` searches random hashes, a fifth of which share 192 of their 256 bits, with 1,000 planted pairs at distances from 0 to
the guaranteed one. `--images` searches random smooth thumbnails with 1,000 planted noisy copies, every other one mirrored.
`--data` searches FOLDER/brain_mri_4class for the pairs in its known_issues.csv, and FOLDER/brain_mri_t1ce_3class across its
pseudo groups, where none is known. Each prints its time, the process's peak memory and how many known pairs were found.
"""

import argparse
import csv
import resource
import time
from itertools import combinations
from pathlib import Path

import numpy as np

from medsd.data.duplicates import (
    GUARANTEED_DISTANCE,
    HASH_BITS,
    PROPOSED_DISTANCE,
    THUMBNAIL_SIDE,
    find_near_duplicates,
    near_pairs,
    thumbnail,
)
from medsd.data.files import read_image

PLANTED = 1000
SHARED_BITS = 192


def report(name: str, seconds: float, found: np.ndarray, known: np.ndarray, count: int) -> None:
    """Of pairs `(M, 2)` among `count` rows."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    hits = np.isin(known @ [count, 1], found @ [count, 1]).sum()
    print(f"{name}: {seconds:.1f} s, peak {peak:.2f} GiB, {len(found)} pairs, {hits} of {len(known)} known pairs")


def planted_rows(rng: np.random.Generator, count: int) -> np.ndarray:
    """Rows `(PLANTED, 2)` for the pairs, the lower one first, no row twice."""
    return np.sort(rng.permutation(count)[: 2 * PLANTED].reshape(PLANTED, 2), axis=1)


def skewed_hashes(rng: np.random.Generator, count: int) -> np.ndarray:
    hashes = rng.integers(0, 2**64, (count, HASH_BITS // 64), np.uint64)
    shared = np.packbits(rng.permutation(HASH_BITS) < SHARED_BITS).view(np.uint64)
    block = slice(0, count // 5)
    hashes[block] = (hashes[block] & ~shared) | (hashes[0] & shared)
    return hashes


def search_hashes(count: int, max_distance: int) -> None:
    rng = np.random.default_rng(0)
    hashes, planted = skewed_hashes(rng, count), planted_rows(rng, count)
    for place, (first, second) in enumerate(planted):
        flipped = rng.permutation(HASH_BITS) < place % (GUARANTEED_DISTANCE + 1)
        hashes[second] = hashes[first] ^ np.packbits(flipped).view(np.uint64)
    start = time.perf_counter()
    pairs = near_pairs(hashes, max_distance=max_distance)
    report(f"{count} hashes", time.perf_counter() - start, pairs, planted, count)


def smooth_thumbnails(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random 12 x 12 values, stretched."""
    coarse = rng.normal(size=(count, 12, 12)).astype(np.float32)
    waves = np.cos(np.pi * np.arange(12) * (np.arange(THUMBNAIL_SIDE)[:, None] + 0.5) / THUMBNAIL_SIDE).astype(np.float32)
    return np.clip(128 + 8 * (waves @ coarse @ waves.T), 0, 255).astype(np.uint8)


def search_images(count: int) -> None:
    rng = np.random.default_rng(0)
    thumbnails, planted = smooth_thumbnails(rng, count), planted_rows(rng, count)
    for place, (first, second) in enumerate(planted):
        copy = thumbnails[first][:, :: 1 if place % 2 else -1]
        thumbnails[second] = np.clip(copy + rng.normal(0, 2, copy.shape), 0, 255)
    start = time.perf_counter()
    found = find_near_duplicates(thumbnails)
    report(f"{count} thumbnails", time.perf_counter() - start, rows_of(found), planted, count)


def rows_of(found: list) -> np.ndarray:
    return np.array([(pair.first, pair.second) for pair in found], int).reshape(-1, 2)


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def known_pairs(folder: Path, paths: list[str]) -> np.ndarray:
    """Rows `(M, 2)` of `paths` that a duplicate or mirror image line of known_issues.csv names together."""
    issues = [row["paths"] for row in read_table(folder / "known_issues.csv") if not row["kind"].startswith("label_conflict")]
    rows = [sorted(paths.index(path) for path in issue.split(";")) for issue in issues]
    return np.array(sorted({pair for row in rows for pair in combinations(row, 2)}))


def search_folder(folder: Path, group_column: str | None) -> None:
    table = read_table(folder / "labels.csv")
    paths = [row["path"] for row in table]
    groups = np.unique([row[group_column] for row in table], return_inverse=True)[1] if group_column else None
    start = time.perf_counter()
    found = find_near_duplicates(np.stack([thumbnail(read_image(folder / path)) for path in paths]), groups)
    seconds = time.perf_counter() - start
    known = np.zeros((0, 2), int) if group_column else known_pairs(folder, paths)
    report(f"{folder.name}, {len(paths)} images", seconds, rows_of(found), known, len(paths))
    print(f"  {sum(pair.mirrored for pair in found)} of them mirrored")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, help="hashes")
    parser.add_argument("--max_distance", type=int, default=PROPOSED_DISTANCE, help="bits, for --count")
    parser.add_argument("--images", type=int, help="thumbnails")
    parser.add_argument("--data", type=Path, help="folder of real images")
    args = parser.parse_args()
    if args.count:
        search_hashes(args.count, args.max_distance)
    if args.images:
        search_images(args.images)
    if args.data:
        search_folder(args.data / "brain_mri_4class", None)
        search_folder(args.data / "brain_mri_t1ce_3class", "pseudo_group")


if __name__ == "__main__":
    main()
