"""Near duplicates: copies of an image are found however they were re-saved, other images are not, and no near pair of hashes is missed."""

import csv
import io
import warnings
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from medsd.data import duplicates
from medsd.data.duplicates import (
    GUARANTEED_DISTANCE,
    find_near_duplicates,
    hashes,
    hashes_both_ways,
    mirrored,
    near_pairs,
    thumbnail,
)
from medsd.data.files import read_image
from medsd.errors import InputError

SIDE = 192


def head(seed: int) -> np.ndarray:
    """A slice `(192, 192)` uint8: a skull that all seeds share, and some ventricles, lesions and texture of its own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    radius = np.hypot(x / 0.75, y / 0.9)
    brain = 90 + sum(rng.normal(0, 12) * np.cos(a * x + b * y + c) for a, b, c in rng.uniform(-25, 25, (12, 3)))
    for _ in range(6):
        u, v, size = *rng.uniform(-0.5, 0.5, 2), rng.uniform(0.05, 0.2)
        brain[np.hypot(x - u, y - v) < size] += rng.normal(0, 60)
    return np.where(radius < 0.9, brain, np.where(radius < 1, 220, 4)).clip(0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


COPIES = {
    "the same": lambda image: image,
    "JPEG": lambda image: jpeg(image, 40),
    "resized": lambda image: np.asarray(Image.fromarray(image).resize((130, 150), Image.Resampling.BICUBIC)),
    "brightened": lambda image: (image * 0.7 + 60).astype(np.uint8),
    "in HU": lambda image: image.astype(np.int16) * 8 - 1024,
    "all at once": lambda image: jpeg(np.asarray(Image.fromarray(image).resize((100, 100))) // 2 + 20, 60),
}


def small(image: np.ndarray) -> np.ndarray:
    return thumbnail(image[None])


@pytest.fixture(scope="module")
def heads() -> np.ndarray:
    return np.stack([small(head(seed)) for seed in range(60)])


def brute_force(first: np.ndarray, second: np.ndarray, distance: int, groups: np.ndarray | None = None) -> list[list[int]]:
    near = np.triu(np.bitwise_count(first[:, None] ^ second[None]).sum(2, dtype=int) <= distance, 1)
    if groups is not None:
        near &= groups[:, None] != groups[None]
    return np.argwhere(near).tolist()


def packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint64)


def near_copies(bits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each row `(256,)` with 0 to 14 bits flipped."""
    return bits ^ (rng.random(bits.shape).argsort(1) < rng.integers(0, 15, (len(bits), 1)))


def skewed_bits(rng: np.random.Generator, count: int, free: int) -> np.ndarray:
    """Random rows; half of them differ among themselves in `free` of the 256 bits only."""
    bits = rng.random((count, 256)) < 0.5
    bits[::2, free:] = bits[0, free:]
    return bits


def crowd(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return packed((rng.random(256) < 0.5) ^ (rng.random((count, 256)) < 0.002))


@pytest.mark.parametrize("is_mirrored", [False, True])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_found_however_it_was_saved(heads, name, is_mirrored):
    image = head(7)
    copy = COPIES[name](image[:, ::-1] if is_mirrored else image)
    (pair,) = find_near_duplicates(np.concatenate([heads, small(copy)[None]]))
    assert (pair.first, pair.second, pair.mirrored) == (7, len(heads), is_mirrored)
    assert 0.98 < pair.correlation <= 1


def test_other_images_of_the_same_shape_are_not_pairs(heads):
    alike = np.corrcoef(heads.reshape(len(heads), -1)) - np.eye(len(heads))
    assert alike.max() > 0.7
    assert find_near_duplicates(heads) == []


def test_what_the_hash_proposes_the_correlation_decides(heads):
    noisy = np.clip(heads[:1] + np.random.default_rng(0).normal(0, 20, heads[:1].shape), 0, 255).astype(np.uint8)
    both = np.concatenate([heads[:1], noisy])
    value = np.corrcoef(both.reshape(2, -1))[0, 1]
    (pair,) = find_near_duplicates(both, correlation=value - 0.001)
    assert pair.correlation == pytest.approx(value, abs=1e-5)
    assert find_near_duplicates(both, correlation=value + 0.001) == []


def test_a_symmetric_image_and_its_copy_are_one_plain_pair(heads):
    symmetric = np.maximum(heads[0], mirrored(heads[0]))
    (pair,) = find_near_duplicates(np.stack([symmetric, symmetric]))
    assert not pair.mirrored


def test_constant_images_match_nothing():
    thumbnails = np.stack([small(np.full((32, 32), value, np.int16)) for value in (0, 7, -1000)])
    assert not thumbnails.any()
    assert find_near_duplicates(np.concatenate([thumbnails, np.full((2, 64, 64), 9, np.uint8)])) == []


def test_only_pairs_of_two_groups_are_listed(heads):
    three = np.stack([heads[0], heads[0], mirrored(heads[0])])
    assert [(pair.first, pair.second) for pair in find_near_duplicates(three)] == [(0, 1), (0, 2), (1, 2)]
    assert [(pair.first, pair.second) for pair in find_near_duplicates(three, np.array([5, 5, -1]))] == [(0, 2), (1, 2)]
    assert find_near_duplicates(three, np.zeros(3, int)) == []


def test_a_thumbnail_is_the_mean_of_areas():
    values = np.random.default_rng(0).integers(0, 1000, (64, 64))
    plain = small(values)
    low, high = np.sort(values.ravel())[[20, -21]]
    np.testing.assert_array_equal(plain, np.rint(np.clip((values - low) * 255 / (high - low), 0, 255)))
    np.testing.assert_array_equal(thumbnail(np.kron(values, np.ones((1, 5, 3)))), plain)
    np.testing.assert_array_equal(thumbnail(np.stack([values - 9, values + 9])), plain)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_image_that_is_not_finite_is_refused(bad):
    image = np.random.default_rng(0).normal(size=(1, 64, 64))
    image[:, :3] = bad
    with pytest.raises(InputError, match="not finite"):
        thumbnail(image)


def test_the_mirrored_hash_is_the_hash_of_the_mirror_image(heads):
    plain, flipped = hashes_both_ways(heads)
    np.testing.assert_array_equal(plain, hashes(heads))
    np.testing.assert_array_equal(flipped, hashes(mirrored(heads)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("free", [256, 60])
@pytest.mark.parametrize("groups", [None, 3])
def test_bands_miss_no_pair_within_the_guaranteed_distance(monkeypatch, free, groups):
    monkeypatch.setattr(duplicates, "BUCKET", 16)
    rng = np.random.default_rng(0)
    bits = skewed_bits(rng, 2000, free)
    bits[1500:] = near_copies(bits[:500], rng)
    values, others = packed(bits), packed(np.roll(near_copies(bits, rng), 700, axis=0))
    groups = groups and rng.integers(0, groups, 2000)
    for other in (None, others):
        expected = brute_force(values, values if other is None else other, GUARANTEED_DISTANCE, groups)
        assert len(expected) > 200
        assert near_pairs(values, other, groups, GUARANTEED_DISTANCE).tolist() == expected


def test_pairs_that_differ_in_all_bands_but_one_are_found(monkeypatch):
    """With each row's complement all bits are equally informative: band b of the 11 is bits b, b + 11, b + 22, ..."""
    monkeypatch.setattr(duplicates, "BUCKET", 16)
    rng = np.random.default_rng(0)
    bits = rng.random((550, 256)) < 0.5
    flipped = np.zeros_like(bits)
    flipped[:, : GUARANTEED_DISTANCE + 1] = np.arange(550)[:, None] % (GUARANTEED_DISTANCE + 1) != np.arange(GUARANTEED_DISTANCE + 1)
    values = packed(np.concatenate([bits, bits ^ flipped, ~bits, ~bits ^ flipped]))
    expected = [[row + part, row + part + 550] for part in (0, 1100) for row in range(550)]
    assert near_pairs(values, max_distance=GUARANTEED_DISTANCE).tolist() == expected


@pytest.mark.filterwarnings("error")
def test_a_folder_that_was_copied_whole_is_no_crowd():
    values = packed(np.random.default_rng(0).random((2000, 256)) < 0.5)
    pairs = near_pairs(np.concatenate([values, values]))
    assert pairs.tolist() == [[row, row + 2000] for row in range(2000)]


def test_no_hashes_make_no_pairs():
    assert near_pairs(np.zeros((0, 4), np.uint64)).shape == (0, 2)


def test_a_crowd_costs_little_and_what_it_leaves_out_is_told():
    values = crowd(20_000)
    groups = np.repeat([0, 1], [19_000, 1000])
    with pytest.warns(UserWarning, match=r"up to \d+ pairs"):
        pairs = near_pairs(values, groups=groups)
    assert set(pairs.ravel().tolist()) == set(range(20_000))
    assert len(pairs) < 1_000_000


def test_a_crowd_of_one_group_costs_nothing():
    values = crowd(20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(near_pairs(values, groups=np.zeros(20_000, int))) == 0


def test_the_known_copies_in_a_real_collection_are_found(real_data):
    folder = real_data / "brain_mri_4class"
    with (folder / "known_issues.csv").open(newline="") as file:
        issues = [row["paths"].split(";") for row in csv.DictReader(file) if not row["kind"].startswith("label_conflict")]
    paths = sorted({path for issue in issues for path in issue})
    found = find_near_duplicates(np.stack([thumbnail(read_image(folder / path)) for path in paths]))
    known = {pair for issue in issues for pair in combinations(sorted(issue), 2)}
    assert known <= {(paths[pair.first], paths[pair.second]) for pair in found}
