"""Intensity maps invert, in numpy and in torch."""

import json

import numpy as np
import pytest
import torch

from medsd.data.intensity import (
    Labels,
    Range,
    Recorded,
    Stack,
    Windows,
    intensity_from_dict,
    label_channels,
    parse_windows,
    percentile_range,
)
from medsd.errors import InputError

BOTH = pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
MRI_AND_MASK = Stack(((Recorded("percentiles", ((0.0, 100.0), (-1.0, 3.0))), 2), (Labels((0, 1, 2, 4)), 1)))


@BOTH
def test_windows_invert_where_one_of_them_sees(convert):
    windows = parse_windows(("brain", "subdural", "bone"))
    hounsfield = np.linspace(-790, 1990, 500, dtype=np.float64)[None, None, None]
    unit = windows.to_unit(convert(hounsfield))
    assert tuple(unit.shape) == (1, 3, 1, 500) and unit.max() <= 1 and unit.min() >= -1
    np.testing.assert_allclose(np.asarray(windows.from_unit(unit)), hounsfield, atol=1e-6)


def test_windows_saturate_at_the_widest():
    windows = parse_windows(("40/80",))
    unit = windows.to_unit(np.array([[[-1000.0, 40.0, 3000.0]]]))
    np.testing.assert_allclose(unit, [[[-1, 0, 1]]])
    np.testing.assert_allclose(windows.from_unit(unit), [[[0, 40, 80]]])


@BOTH
def test_range_inverts_every_grey_value(convert):
    grey = np.arange(256, dtype=np.float32)[None, None]
    mapped = Range(0, 255)
    assert np.rint(np.asarray(mapped.from_unit(mapped.to_unit(convert(grey))))).tolist() == grey.tolist()


def test_a_map_survives_its_record():
    for mapped in (Range(-3.0, 9.5), parse_windows(("brain", "600/2800")), *(part for part, _ in MRI_AND_MASK.parts), MRI_AND_MASK):
        assert intensity_from_dict(json.loads(json.dumps(mapped.to_dict()))) == mapped
    assert intensity_from_dict({"kind": "range", "low": 0.0, "high": 255.0}) == Range(0.0, 255.0)


@BOTH
@pytest.mark.parametrize("names", [("lung",), ("lung", "abdomen", "bone"), ("-500/200", "300/400")], ids=str)
def test_float32_windows_give_hounsfield_back_within_half_a_unit(convert, names):
    windows = parse_windows(names)
    hounsfield = np.arange(-1024, 3072, dtype=np.float32)[None, None]
    again = np.asarray(windows.from_unit(windows.to_unit(convert(hounsfield))))
    seen = np.any([abs(hounsfield - centre) < width / 2 for centre, width in windows.windows], axis=0)
    assert seen.sum() > 500 and abs(again - hounsfield)[seen].max() < 0.5


@BOTH
def test_a_window_that_nearly_saturates_is_not_taken_at_its_word(convert):
    """What a model makes of air is not quite -1 in a window of the brain, where it would read as fat."""
    windows = parse_windows(("lung", "abdomen", "bone"))
    hounsfield = np.arange(-1200, 1800, dtype=np.float32)[None, None]
    error = np.random.default_rng(0).uniform(-0.05, 0.05, (3, hounsfield.size)).astype(np.float32)[:, None]
    unit = np.clip(np.asarray(windows.to_unit(hounsfield)).reshape(3, 1, -1) + error, -1, 1).reshape(3, 1, -1)
    again = np.asarray(windows.from_unit(convert(unit)))
    assert abs(again - hounsfield).max() < 0.051 * 2800 / 2


@BOTH
def test_recorded_ranges_map_each_image_and_channel_on_its_own(convert):
    mapped = Recorded("voi", ((0.0, 10.0), (0.0, 20.0)))
    ranges = np.array([[[0, 100], [50, 60]], [[-8, 8], [1000, 3000]]], np.float32)
    shares = np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 1, 3, 4)
    image = ranges[..., :1, None] + shares * (ranges[..., 1:, None] - ranges[..., :1, None])
    unit = mapped.to_unit(convert(image), convert(ranges))
    np.testing.assert_allclose(np.asarray(unit), np.broadcast_to(shares * 2 - 1, image.shape), atol=1e-5)
    np.testing.assert_allclose(np.asarray(mapped.from_unit(unit, convert(ranges))), image, rtol=1e-5, atol=1e-4)
    nominal = np.asarray(mapped.from_unit(unit))
    np.testing.assert_allclose(nominal, shares * [[[[10]], [[20]]]] * np.ones((2, 1, 1, 1)), atol=1e-4)
    assert mapped.to_unit(convert(image * 0 + 4000), convert(ranges)).max() == 1


@BOTH
def test_a_new_image_is_measured_by_its_own_percentiles(convert):
    mapped = Recorded("percentiles", ((0.0, 1.0), (0.0, 1.0)))
    brain = np.zeros((3, 2, 32, 32), np.float32)
    brain[:, :, 8:24, 8:24] = np.random.default_rng(0).uniform(100, 200, (3, 2, 16, 16))
    own = np.array([[percentile_range(plane) for plane in image] for image in brain], np.float32)
    expected = np.asarray(mapped.to_unit(convert(brain), convert(own)))
    np.testing.assert_allclose(np.asarray(mapped.to_unit(convert(brain))), expected, atol=1e-6)
    assert (expected == -1).mean() > 0.7 and expected.max() == 1
    np.testing.assert_allclose(np.asarray(mapped.to_unit(convert(brain[0] * 7 + 0))), expected[0], atol=1e-5)


@BOTH
def test_a_constant_image_has_a_place_and_comes_back(convert):
    mapped = Recorded("percentiles", ((5.0, 5.0),))
    image = convert(np.full((1, 4, 4), 5.0, np.float32))
    for ranges in (None, convert(np.array([[5.0, 5.0]], np.float32))):
        unit = mapped.to_unit(image, ranges)
        assert np.all(np.asarray(unit) == -1) and np.all(np.asarray(mapped.from_unit(unit, ranges)) == 5)


def test_percentiles_leave_the_background_out():
    generator = np.random.default_rng(0)
    volume = np.zeros((100, 120, 130), np.float32)
    volume[20:60, 30:90, 30:90] = generator.uniform(100, 200, (40, 60, 60))
    low, high = percentile_range(volume)
    assert low == pytest.approx(100.5, abs=0.3) and high == pytest.approx(199.5, abs=0.3)
    scored = volume.copy()
    scored[volume > 0] = generator.normal(0.3, 1, (volume > 0).sum())
    low, high = percentile_range(scored)
    assert low == pytest.approx(0.3 - 2.576, abs=0.1) and high == pytest.approx(0.3 + 2.576, abs=0.1)


def test_percentiles_of_a_large_volume_see_every_column():
    volume = np.zeros((160, 160, 160), np.int16)
    volume[:, :, 1::5] = 7
    volume[:, :, 2::5] = 9
    assert percentile_range(volume) == (7.0, 9.0)


def test_percentiles_of_images_with_one_or_two_values():
    assert percentile_range(np.full((4, 4), 3)) == (3.0, 3.0)
    assert percentile_range(np.eye(8, dtype=np.uint8)) == (0.0, 1.0)


@BOTH
def test_labels_come_back_and_others_go_to_the_nearest(convert):
    labels = Labels((0, 1, 2, 4))
    mask = np.array([[[0.0, 1.0, 2.0, 4.0]]], np.float32)
    unit = labels.to_unit(convert(mask))
    np.testing.assert_allclose(np.asarray(unit), [[[-1, -1 / 3, 1 / 3, 1]]], atol=1e-6)
    for noise in (-0.33, 0.0, 0.33):
        assert np.asarray(labels.from_unit(unit + noise)).tolist() == mask.tolist()
    assert np.asarray(labels.from_unit(labels.to_unit(convert(np.array([[[-3.0, 1.4, 3.2, 9.0]]]))))).tolist() == [[[0, 1, 4, 4]]]


@pytest.mark.parametrize("values", [(), (1,), (2, 1), (1, 1)])
def test_labels_that_are_no_scale_are_refused(values):
    with pytest.raises(InputError, match="ascending"):
        Labels(values)


@BOTH
def test_a_stack_maps_each_channel_by_its_own_map(convert):
    image = np.stack([np.linspace(0, 100, 8), np.linspace(-1, 3, 8), np.array([0, 1, 2, 4] * 2)])[None, :, None].astype(np.float32)
    ranges = np.array([[[0, 100], [-1, 3], [0, 0]]], np.float32)
    unit = MRI_AND_MASK.to_unit(convert(image), convert(ranges))
    np.testing.assert_allclose(np.asarray(unit)[0, 0, 0], np.linspace(-1, 1, 8), atol=1e-6)
    np.testing.assert_allclose(np.asarray(unit)[0, 2, 0, :4], [-1, -1 / 3, 1 / 3, 1], atol=1e-6)
    for own in (convert(ranges), None):
        np.testing.assert_allclose(np.asarray(MRI_AND_MASK.from_unit(unit, own)), image, atol=1e-4)
    assert MRI_AND_MASK.channels(3) == 3 and label_channels(MRI_AND_MASK, 3) == 1 and label_channels(Range(0, 1), 3) == 0
    with pytest.raises(InputError, match="takes 3 channels"):
        MRI_AND_MASK.channels(2)


def test_a_stack_finds_the_recorded_range_behind_windows():
    stack = Stack(((parse_windows(("brain", "bone")), 1), (Recorded("percentiles", ((0.0, 1.0),)), 1)))
    image, ranges = np.array([[[40.0, 900.0]], [[5.0, 15.0]]]), np.array([[0.0, 0.0], [5.0, 15.0]])
    unit = stack.to_unit(image, ranges)
    np.testing.assert_allclose(unit[2], [[-1, 1]])
    np.testing.assert_allclose(stack.from_unit(unit, ranges), image, atol=1e-6)


def test_a_stack_after_windows_counts_channels_on_both_sides():
    stack = Stack(((parse_windows(("brain", "bone")), 1), (Labels((0, 1)), 1)))
    image = np.array([[[40.0, 900.0]], [[0.0, 1.0]]])
    assert stack.channels(2) == 3 and stack.to_unit(image).shape == (3, 1, 2)
    np.testing.assert_allclose(stack.from_unit(stack.to_unit(image)), image, atol=1e-6)
    with pytest.raises(InputError, match="last"):
        Stack(((Labels((0, 1)), 1), (Range(0, 1), 1)))


def test_windows_of_a_colour_image_are_refused():
    with pytest.raises(InputError, match="3"):
        Windows(((40, 80),)).channels(3)


@pytest.mark.parametrize("name", ["liver", "40/0", "40-80", "/"])
def test_unknown_windows_are_refused(name):
    with pytest.raises(InputError, match="--windows"):
        parse_windows((name,))
