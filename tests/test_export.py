"""Synthetic images in files: values come back within what each format promises, and every file says what it is."""

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels import apply_modality_lut

from medsd import read_image
from medsd.data.dicom import dicom_header
from medsd.data.export import SYNTHETIC, Origin, display_range, to_16_bits, write_dicom, write_nifti, write_png
from medsd.data.intensity import Labels, Range, Recorded, Stack, Windows, label_channels, nominal_ranges, parse_windows
from medsd.errors import InputError

ORIGIN = Origin("epidural", 7, "0123456789abcdef", "30 steps")


def between(low, high, shape=(24, 20), seed=0):
    """Values of which both ends are some."""
    values = np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)
    values[0, 0], values[-1, -1] = low, high
    return values


def dicom(path, image, extent, unit="HU", shown=None, origin=ORIGIN):
    return write_dicom(path, image, unit, extent, shown or extent, origin)


@pytest.mark.parametrize("extent", [(-15.0, 115.0), (-1024.0, 3071.0), (0.0, 1.0), (12.345678, 812.3), (-3e-4, 2e-4), (0.0, 4e6)])
def test_dicom_values_come_back_within_half_a_step(tmp_path, extent):
    image = between(*extent)
    told = dicom(tmp_path / "a.dcm", image, extent)
    half = told["slope"] / 2 + np.spacing(np.float32(max(map(abs, extent))))
    assert told["slope"] < (extent[1] - extent[0]) / 2**16 * 2.6
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    for back in (apply_modality_lut(dataset.pixel_array, dataset), read_image(tmp_path / "a.dcm")[0]):
        np.testing.assert_allclose(back, image, rtol=0, atol=half)


def test_a_dicom_says_that_nobody_is_in_it(tmp_path):
    dicom(tmp_path / "a.dcm", between(-15, 115), (-15.0, 115.0), shown=(0.0, 80.0))
    header = pydicom.dcmread(tmp_path / "a.dcm")
    assert header.SOPClassUID.name == "Secondary Capture Image Storage" and header.Modality == "CT"
    assert header.ConversionType == "SYN" and header.SyntheticData == "YES" and list(header.ImageType) == ["DERIVED", "SECONDARY"]
    assert header.PatientName == header.PatientID == "SYNTHETIC" and header.BurnedInAnnotation == "NO"
    assert SYNTHETIC in header.DerivationDescription and "seed 7" in header.DerivationDescription
    about_people = [element for element in header if element.keyword.startswith(("Patient", "Study", "Institution", "Referring"))]
    assert {str(element.value) for element in about_people} == {"SYNTHETIC", "", str(header.StudyInstanceUID)}
    assert dicom_header(header).voi == (0.0, 80.0) and not dicom_header(header).burned_in
    assert "PixelSpacing" not in header


def test_uids_follow_what_is_drawn(tmp_path):
    image = between(0, 80)
    same = [dicom(tmp_path / f"{n}.dcm", image, (0.0, 80.0)) for n in range(2)]
    assert same[0] == same[1] and (tmp_path / "0.dcm").read_bytes() == (tmp_path / "1.dcm").read_bytes()
    other_seed = dicom(tmp_path / "2.dcm", image, (0.0, 80.0), origin=Origin("epidural", 8, ORIGIN.model, ORIGIN.sampling))
    other_image = dicom(tmp_path / "3.dcm", between(0, 80, seed=1), (0.0, 80.0))
    assert len({told["sop_uid"] for told in (same[0], other_seed, other_image)}) == 3
    assert all(pydicom.uid.UID(told["sop_uid"]).is_valid for told in (same[0], other_seed))


def test_a_class_in_any_script_and_length_fits_a_header(tmp_path):
    dicom(tmp_path / "a.dcm", between(0, 1), (0.0, 1.0), "grey value", origin=Origin("脑出血\\" + "x" * 100, 0, "m" * 16))
    header = pydicom.dcmread(tmp_path / "a.dcm")
    assert header.SeriesDescription.startswith("Synthetic: 脑出血/x") and header.Modality == "OT" and header.RescaleType == "US"


def test_16_bit_png_holds_values_and_the_way_back(tmp_path):
    image = between(-15, 115)
    write_png(tmp_path / "a.png", to_16_bits(image, -15.0, 115.0), ORIGIN.texts() | {"Low": "-15.0"})
    stored = read_image(tmp_path / "a.png")[0]
    assert stored.min() == 0 and stored.max() == 65535
    np.testing.assert_allclose(-15 + stored / 65535 * 130, image, rtol=0, atol=130 / 65535 / 2 + 1e-5)
    with Image.open(tmp_path / "a.png") as opened:
        assert (
            opened.text["Description"] == SYNTHETIC and "class epidural, seed 7" in opened.text["Comment"] and opened.text["Low"] == "-15.0"
        )
    assert to_16_bits(np.float32([[-99, 999]]), -15.0, 115.0).tolist() == [[0, 65535]]


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_comes_back_in_the_same_orientation(tmp_path, channels, name):
    image = np.random.default_rng(0).normal(size=(channels, 9, 7)).astype(np.float32)
    write_nifti(tmp_path / name, image, "synthetic " + "é" * 100)
    np.testing.assert_array_equal(read_image(tmp_path / name), image)
    nifti = nibabel.load(tmp_path / name)
    assert nifti.shape == (7, 9, 1) + ((channels,) if channels > 1 else ())
    assert bytes(nifti.header["descrip"]).startswith(b"synthetic ????")


def test_nifti_bytes_are_those_of_the_image(tmp_path):
    image = np.zeros((1, 4, 4), np.float32)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, image, "synthetic")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert nibabel.load(tmp_path / "a.nii.gz").header.get_xyzt_units()[0] == "unknown"


STACK = Stack(((Recorded("percentiles", ((0.0, 900.0), (5.0, 80.0))), 2), (Labels((0.0, 1.0, 4.0)), 1)))


@pytest.mark.parametrize(
    ("intensity", "channels"), [(Range(-3.0, 9.0), 2), (parse_windows(("brain", "bone")), 1), (Labels((0.0, 2.0, 4.0)), 1), (STACK, 3)]
)
def test_nominal_ranges_are_what_comes_back_of_the_ends(intensity, channels):
    ranges = nominal_ranges(intensity, channels)
    shape = (intensity.channels(channels), 2, 2)
    ends = [intensity.from_unit(np.full(shape, end, np.float32)).min((1, 2)) for end in (-1, 1)]
    np.testing.assert_allclose(np.transpose(ends), ranges)
    assert len(ranges) == channels and label_channels(intensity, channels) <= channels


def test_a_viewer_opens_with_the_narrowest_window():
    assert display_range(Windows(((600.0, 2800.0), (40.0, 80.0))), 1) == (0.0, 80.0)
    assert display_range(Range(0.0, 255.0), 1) == (0.0, 255.0)


def test_a_range_without_values_is_refused(tmp_path):
    for write in (lambda: to_16_bits(np.zeros((2, 2)), 3.0, 3.0), lambda: dicom(tmp_path / "a.dcm", np.zeros((2, 2)), (3.0, 3.0))):
        with pytest.raises(InputError, match="holds no values"):
            write()
    assert not (tmp_path / "a.dcm").exists()
