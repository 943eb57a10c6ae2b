"""Intensity maps invert, in numpy and in torch."""

import numpy as np
import pytest
import torch

from medsd.data.intensity import Range, Windows, intensity_from_dict, parse_windows
from medsd.errors import InputError


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
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


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_range_inverts_every_grey_value(convert):
    grey = np.arange(256, dtype=np.float32)[None, None]
    mapped = Range(0, 255)
    assert np.rint(np.asarray(mapped.from_unit(mapped.to_unit(convert(grey))))).tolist() == grey.tolist()


def test_a_map_survives_its_record():
    for mapped in (Range(-3.0, 9.5), parse_windows(("brain", "600/2800"))):
        assert intensity_from_dict(mapped.to_dict()) == mapped


def test_windows_of_a_colour_image_are_refused():
    with pytest.raises(InputError, match="3"):
        Windows(((40, 80),)).channels(3)


@pytest.mark.parametrize("name", ["liver", "40/0", "40-80", "/"])
def test_unknown_windows_are_refused(name):
    with pytest.raises(InputError, match="--windows"):
        parse_windows((name,))
