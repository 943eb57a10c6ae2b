"""Augmentation and shrinking against geometry, and the loader against the data set itself."""

import json
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from medsd.data.dataset import INFO_FILE, DataInfo, data_features, load_dataset, pack
from medsd.data.geometry import fit_square
from medsd.data.intensity import Labels, Range, Recorded, Stack
from medsd.data.transforms import (
    Augmentation,
    TrainingOrder,
    TrainingRows,
    at_resolution,
    column,
    pixel_statistics,
    recorded_ranges,
    rotate_and_scale,
    row_classes,
    sample_images,
    sample_rows,
    shift,
    shrink_batch,
    to_unit,
    training_loader,
)
from medsd.errors import InputError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit_images(channels=1, side=16, count=8):
    return torch.rand(count, channels, side, side, generator=generator(5)) * 2 - 1


def test_no_augmentation_draws_nothing_and_hands_the_images_back():
    images, draws = unit_images(), generator()
    before = draws.get_state()
    assert Augmentation()(images, draws) is images and torch.equal(draws.get_state(), before)


def test_a_shift_alone_draws_what_it_always_drew():
    images, draws, expected = unit_images(), generator(3), generator(3)
    moved = Augmentation(shift=2)(images, draws)
    offsets = torch.randint(-2, 3, (len(images), 2), generator=expected)
    assert torch.equal(moved, shift(images, offsets)) and torch.equal(draws.get_state(), expected.get_state())


def test_quarter_turns_are_exact():
    images = unit_images(channels=2, count=4)
    turned = rotate_and_scale(images, torch.tensor([0.0, 90.0, 180.0, -90.0]), torch.ones(4), label_channels=1)
    expected = torch.stack([torch.rot90(image, turns, (-2, -1)) for image, turns in zip(images, (0, 1, 2, -1), strict=True)])
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


def test_enlarging_flattens_a_ramp():
    ramp = torch.linspace(-1, 1, 17).expand(1, 1, 17, 17).contiguous()
    for scale in (0.8, 1.25, 2.0):
        enlarged = rotate_and_scale(ramp, torch.zeros(1), torch.tensor([scale]))
        torch.testing.assert_close(enlarged, (ramp / scale).clamp(-1, 1), atol=1e-5, rtol=0)


def test_labels_are_turned_without_a_new_value():
    mask = torch.randint(0, 2, (8, 1, 16, 16), generator=generator()).float() * 2 - 1
    images = torch.cat([mask, mask], 1)
    augment = Augmentation(shift=2, rotation=20, scale=0.2, intensity=0.3, flip="both", label_channels=1)
    grey, labels = augment(images, generator()).split(1, 1)
    assert set(labels.unique().tolist()) == {-1, 1} and len(grey.unique()) > 10
    assert ((grey > 0) == (labels > 0)).float().mean() > 0.8
    assert torch.equal(augment(images, generator()), augment(images, generator()))
    assert not torch.equal(augment(images, generator()), augment(images, generator(1)))


@pytest.mark.parametrize(("flip", "axes"), [("horizontal", [(), (-1,)]), ("vertical", [(), (-2,)]), ("both", [(), (-1,), (-2,), (-2, -1)])])
def test_flips_are_mirrored_or_not(flip, axes):
    images = unit_images(count=64)
    flipped = Augmentation(flip=flip)(images, generator())
    matches = torch.stack([(flipped == images.flip(axis)).flatten(1).all(1) for axis in axes])
    assert torch.equal(matches.sum(0), torch.ones(64, dtype=torch.long)) and matches.float().mean(1).min() > 0.5 / len(axes)


def test_intensity_is_one_gain_and_offset_per_image_within_the_range():
    images = unit_images(channels=2, count=32) * 0.5
    changed = Augmentation(intensity=0.2)(images, generator())
    for before, after in zip(images, changed, strict=True):
        gain, offset = np.polyfit(before.flatten().numpy(), after.flatten().numpy(), 1)
        assert abs(gain - 1) <= 0.2 and abs(offset) <= 0.2
        torch.testing.assert_close(before * gain + offset, after, atol=1e-5, rtol=0)
    assert changed.flatten(1).mean(1).std() > 0.05 and Augmentation(intensity=1.0)(images * 2, generator()).abs().max() <= 1


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_training_shrinks_as_the_pipeline_does(dtype):
    image = np.random.default_rng(0).integers(0, 200, (3, 24, 24)).astype(dtype)
    for side in (24, 12, 8, 6):
        small = shrink_batch(torch.from_numpy(image)[None], side, label_channels=1)[0].numpy()
        np.testing.assert_allclose(small[:2], fit_square(image[:2], side, "pad")[0], atol=1e-4)
        np.testing.assert_array_equal(small[2:], fit_square(image[2:], side, "pad", nearest=True)[0])
        alone = shrink_batch(torch.from_numpy(image[2:])[None], side, label_channels=1)[0].numpy()
        np.testing.assert_array_equal(alone, small[2:])


def test_to_unit_shrinks_before_it_clips():
    images = torch.tensor([[[[-1000, 100], [100, 100]]]], dtype=torch.int16)
    assert to_unit(images, Range(0, 100), resolution=1).item() == -1
    assert to_unit(images, Range(0, 100)).mean() == 0.5


# The loader


SIDE = 8
INFO = DataInfo(
    class_names=["a", "b"],
    prompts=["of <a>", "of <b>"],
    class_tokens=["<a>", "<b>"],
    intensity=Stack(((Recorded("percentiles", ((0.0, 50.0),)), 1), (Labels((0, 1)), 1))).to_dict(),
    resolution=SIDE,
    resize="pad",
    image_channels=2,
    unit="grey value",
    fingerprint="",
)
FINDINGS = [[0, 0], [1, 0], [1, 0], [1, 0], [1, 1], [0, 1]]


def write(folder, multi_label, dtype=np.int16, ranges=True, count=24):
    """A prepared folder of `count` images, whose rows are also returned."""
    draws = np.random.default_rng(0)
    rows = []
    for number in range(count):
        image = np.stack([draws.integers(0, 99, (SIDE, SIDE)), draws.integers(0, 2, (SIDE, SIDE))]).astype(dtype)
        labels = {"labels": FINDINGS[number % 6]} if multi_label else {"label": int(number % 4 == 0)}
        range_ = {"intensity_range": [[number, number + 50], [0, 1]]} if ranges else {}
        rows.append({"key": str(number), "image": pack(image), "prompt": f"of {number}"} | labels | range_)
    (folder / "data").mkdir(parents=True)
    schema = data_features(["a", "b"], multi_label, False, ranges).arrow_schema
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    pyarrow.parquet.write_table(table, folder / "data" / "train-00000-of-00001.parquet")
    info = replace(INFO, multi_label=multi_label)
    (folder / INFO_FILE).write_text(json.dumps(info.to_dict()))
    return load_dataset(folder, "train")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write(tmp_path_factory.mktemp("single") / "data", multi_label=False)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_hold_the_rows_in_the_order_of_the_plan(dataset, workers):
    rows = sample_rows(dataset, 20, seed=1)
    order = TrainingOrder(row_classes(rows), 6, "sqrt", seed=2)
    loader = training_loader(TrainingRows(rows, np.arange(20) + 100), order, workers)
    for indices, batch in zip(iter(order), (next(loader) for _ in range(5)), strict=False):
        wanted = [rows[index] for index in indices]
        assert batch["images"].dtype == torch.int16 and batch["images"].shape == (6, 2, SIDE, SIDE)
        np.testing.assert_array_equal(batch["images"], np.stack([row["image"] for row in wanted]))
        assert batch["labels"].tolist() == [row["label"] for row in wanted]
        assert batch["prompts"].tolist() == [100 + index for index in indices]
        np.testing.assert_array_equal(batch["ranges"], [row["intensity_range"] for row in wanted])


@pytest.mark.parametrize(("stored", "kept"), [("uint8", torch.uint8), ("uint16", torch.int32), ("float32", torch.float32)])
def test_the_source_type_is_kept(tmp_path, stored, kept):
    batch = TrainingRows(write(tmp_path / "data", False, np.dtype(stored), ranges=False))[[3, 1]]
    assert batch["images"].dtype == kept and set(batch) == {"images", "labels", "rows"}


def test_the_loader_leaves_the_pictures_alone(dataset, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a preview was decoded")

    monkeypatch.setattr("datasets.features.Image.decode_example", refuse)
    batch = TrainingRows(dataset)[[0, 1]]
    batch["images"] += 1
    assert column(dataset, "prompt").to_pylist()[:2] == ["of 0", "of 1"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_order_that_ends_is_read_to_its_end_and_mistakes_come_out(dataset, workers):
    rows = TrainingRows(dataset)
    assert [len(batch["labels"]) for batch in training_loader(rows, [[0], [1, 2], [3]], workers)] == [1, 2, 1]
    with pytest.raises(IndexError):
        list(training_loader(rows, [[0], [10_000]], workers))


def test_findings_are_sampled_by_an_images_rarest(tmp_path):
    rows = write(tmp_path / "data", multi_label=True)
    classes = row_classes(rows)
    assert classes.tolist() == [2, 0, 0, 0, 1, 1] * 4  # Of the findings 0 (16 times) and 1 (8 times), and neither.
    assert TrainingRows(rows)[[4, 0]]["labels"].tolist() == [[1, 1], [0, 0]]
    drawn = [index for batch, _ in zip(TrainingOrder(classes, 24, "balanced"), range(200), strict=False) for index in batch]
    shares = np.bincount(classes[drawn]) / len(drawn)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)


def test_samples_use_each_images_own_range(dataset):
    unit = sample_images(dataset, INFO.intensity_map, limit=24)
    images, ranges = np.stack(dataset[:]["image"]).astype(np.float32), np.asarray(dataset[:]["intensity_range"], np.float32)
    np.testing.assert_allclose(unit, INFO.intensity_map.to_unit(images, ranges), atol=1e-6)
    np.testing.assert_array_equal(recorded_ranges(dataset), ranges)
    mean, std = pixel_statistics(dataset, INFO.intensity_map, resolution=4)
    small = sample_images(dataset, INFO.intensity_map, 24, resolution=4)
    assert small.shape == (24, 2, 4, 4) and set(small[:, 1].unique().tolist()) == {-1, 1}
    assert (mean, std) == (pytest.approx(small.mean().item()), pytest.approx(small.std().item()))


def test_a_resolution_that_blocks_do_not_make_up_is_refused():
    assert at_resolution(INFO, 4).resolution == 4 and at_resolution(INFO, None) == INFO
    for wanted in (3, 16):
        with pytest.raises(InputError, match="--resolution"):
            at_resolution(INFO, wanted)


def test_an_empty_split_is_refused(dataset):
    with pytest.raises(InputError, match="empty"):
        TrainingOrder(row_classes(dataset.select([])), 4)
