"""Readers: pixels come out in the source's unit, and nothing but the allow-list leaves a header."""

import csv
from dataclasses import asdict

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medsd.data.files import is_dicom, read_file, read_image
from medsd.errors import InputError


def dicom(path, stored, signed=False, **tags):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    settings = {
        "Modality": "CT",
        "PatientID": "Jane Roe",
        "PatientName": "Roe^Jane",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": int(signed),
    }
    for name, value in (settings | tags).items():
        setattr(dataset, name, value)
    dataset.PixelData = stored.astype(np.int16 if signed else np.uint16).tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_dicom_is_in_hounsfield_units(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.array([[0, 1024], [1064, 4095]]), RescaleSlope=1, RescaleIntercept=-1024)
    pixels = read_image(path)
    assert pixels.dtype == np.int16
    np.testing.assert_array_equal(pixels, [[[-1024, 0], [40, 3071]]])


def test_fractional_slopes_stay_exact(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.array([[1, 3]]), RescaleSlope=0.5, RescaleIntercept=0)
    np.testing.assert_array_equal(read_image(path), np.array([[[0.5, 1.5]]], dtype=np.float32))


def test_a_file_named_by_its_uid_is_dicom(tmp_path):
    assert is_dicom(dicom(tmp_path / "1.2.840.113", np.ones((2, 2)))) and not is_dicom(tmp_path / "labels.csv")


def test_monochrome1_is_inverted(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.array([[10, 200]]), PhotometricInterpretation="MONOCHROME1", Modality="DX")
    np.testing.assert_array_equal(read_image(path), [[[200, 10]]])


def test_padding_becomes_the_smallest_real_value(tmp_path):
    stored = np.array([[-2000, 24], [100, -2000]])
    path = dicom(tmp_path / "a.dcm", stored, signed=True, RescaleSlope=1, RescaleIntercept=-1024, PixelPaddingValue=-2000)
    np.testing.assert_array_equal(read_image(path), [[[-1000, -1000], [-924, -1000]]])


def test_only_the_allow_list_leaves_a_header(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.ones((2, 2)), InstanceNumber=7, PixelSpacing=[0.5, 0.4], InstitutionName="Hospital")
    header = read_file(path).header
    assert header.patient == "Jane Roe" and header.instance_number == 7 and header.pixel_spacing == (0.5, 0.4)
    assert "Hospital" not in str(asdict(header)) and "Roe^Jane" not in str(asdict(header))


def test_sixteen_bit_png_is_kept(tmp_path):
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0], ramp)


def test_grey_in_three_channels_is_one_channel(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([grey, grey, grey + 1], -1)).save(tmp_path / "colour.png")
    Image.fromarray(np.stack([grey, grey], -1), mode="LA").save(tmp_path / "alpha.png")
    assert read_image(tmp_path / "grey.png").shape == (1, 8, 8)
    assert read_image(tmp_path / "colour.png").shape == (3, 8, 8)
    assert read_image(tmp_path / "alpha.png").shape == (1, 8, 8)


def test_npz_and_npy_without_pickle(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.arange(8, dtype=np.uint8).reshape(2, 2, 2))
    np.testing.assert_array_equal(read_file(tmp_path / "a.npz", "images", 1).pixels, [[[4, 5], [6, 7]]])
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="evil.npy"):
        read_image(tmp_path / "evil.npy")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.png", b"not a png", "cannot be decoded"), ("a.dcm", b"not dicom", "cannot be decoded"), ("a.mp4", b"", "not a kind of image")],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        read_image(tmp_path / name)


def test_missing_file():
    with pytest.raises(InputError, match="nowhere.png: no such file"):
        read_image("nowhere.png")


def test_real_ct_equals_pydicom(real_data):
    files = sorted((real_data / "ct_contrast_dicom" / "dicom_dir").glob("*.dcm"))
    assert files
    for file in files:
        dataset = pydicom.dcmread(file)
        expected = dataset.pixel_array.astype(float) * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        pixels = read_image(file)[0]
        padding = dataset.get("PixelPaddingValue")
        real = (
            np.ones(pixels.shape, bool) if padding is None else dataset.pixel_array != np.array(padding).astype(dataset.pixel_array.dtype)
        )
        np.testing.assert_array_equal(pixels[real], expected[real])
        assert pixels.dtype == np.int16 and pixels.max() > 255


def test_zoo_of_transfer_syntaxes_never_raises_anything_else(real_data):
    folder = real_data / "dicom_zoo"
    read = 0
    with (folder / "manifest.csv").open() as stream:
        for line in csv.DictReader(stream):
            try:
                read += read_image(folder / line["path"]).ndim == 3
            except InputError:
                continue
    assert read >= 25
