"""NIfTI: voxels are nibabel's own, and slices lie as radiologists look at them whatever the file's axes are."""

import gzip
import itertools
import struct
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from medsd.data.decode import DecodeOptions, decode_row
from medsd.data.files import read_file, read_image
from medsd.data.nifti import AXES, read_volume, volume_shape
from medsd.data.rows import Row
from medsd.errors import InputError

SHAPE = (6, 7, 8)
SPACING = np.array([1.5, 2.0, 3.0])
OPTIONS = DecodeOptions(8)


def save(path, voxels, affine=None, kind=nibabel.Nifti1Image, slope=None):
    image = kind(voxels, np.diag([*SPACING, 1]) if affine is None else affine)
    if slope is not None:
        image.header.set_slope_inter(*slope)
    nibabel.save(image, path)
    return path


def edited(path, offset, layout, *values):
    """The file with some bytes of its header overwritten."""
    content = bytearray(path.read_bytes())
    struct.pack_into(layout, content, offset, *values)
    path.write_bytes(content)
    return path


def oblique(angle, axes, flips):
    """An affine whose file axes are `axes` of the patient, `flips` of them turned round, and all rotated by `angle` degrees."""
    columns = np.eye(3)[:, list(axes)] * flips
    turn = np.radians(angle)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ columns * SPACING[list(axes)]
    affine[:3, 3] = 10, -20, 30
    return affine


def world(affine, shape=SHAPE, axis=0):
    """A volume whose voxels are the patient's coordinate `axis` (to the right... left, front, up) in mm."""
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return nibabel.affines.apply_affine(affine, places)[..., axis].astype(np.float32)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
@pytest.mark.parametrize("angle", [0, 20])
def test_slices_lie_as_radiologists_look_at_them(tmp_path, axes, flips, angle):
    """RAS+ coordinates grow to the patient's right, front and up; the patient's right is left in the picture."""
    affine = oblique(angle, axes, flips)
    right, front, up = (read_volume(save(tmp_path / f"{axis}.nii", world(affine, axis=axis), affine)) for axis in range(3))
    down, across = np.diff, lambda picture: np.diff(picture, axis=1)
    axial, coronal, sagittal = (lambda volume, axis=axis: volume.slice(axis, 2)[0] for axis in ("axial", "coronal", "sagittal"))
    assert (across(axial(right)) < 0).all() and (down(axial(front), axis=0) < 0).all()
    assert (across(coronal(right)) < 0).all() and (down(coronal(up), axis=0) < 0).all()
    assert (across(sagittal(front)) < 0).all() and (down(sagittal(up), axis=0) < 0).all()
    assert (np.diff([picture.mean() for picture in up.slices("axial")]) > 0).all()
    assert (np.diff([picture.mean() for picture in front.slices("coronal")]) > 0).all()
    assert (np.diff([picture.mean() for picture in right.slices("sagittal")]) > 0).all()
    np.testing.assert_allclose(right.spacing, SPACING, rtol=1e-5)
    shape = tuple(SHAPE[list(axes).index(axis)] for axis in range(3))
    assert right.voxels.shape[1:] == volume_shape(tmp_path / "0.nii") == shape
    for axis, (rows, columns) in {"axial": (1, 0), "coronal": (2, 0), "sagittal": (2, 1)}.items():
        assert right.slice(axis, 0).shape == (1, shape[rows], shape[columns]) and right.depth(axis) == shape[AXES[axis]]
        np.testing.assert_allclose(right.pixel_spacing(axis), (SPACING[rows], SPACING[columns]), rtol=1e-5)


def test_the_patients_left_hand(tmp_path):
    """A bright voxel at the patient's left, front and top (LPS file): right, up and in the last slice of the picture."""
    voxels = np.zeros(SHAPE, np.int16)
    voxels[-1, 0, -1] = 100
    path = save(tmp_path / "a.nii.gz", voxels, np.diag([-1.0, -1.0, 1.0, 1.0]))
    image = read_image(path)
    assert image.shape == (8, 1, 7, 6) and image[-1, 0, 0, 0] == 0
    # In RAS the file's first axis falls: its last index is the smallest x, which is the patient's left.
    assert image[-1, 0, 0, -1] == 100 and (image != 0).sum() == 1


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("slope", [None, (2.0, -5.0), (0.1, 0.0)])
@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_values_are_nibabels(tmp_path, kind, slope, suffix):
    voxels = np.random.default_rng(0).integers(0, 100, SHAPE).astype(kind)
    path = save(tmp_path / f"a.{suffix}", voxels, slope=slope)
    expected = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    np.testing.assert_array_equal(read_volume(path).voxels[0], expected.astype(np.float32))


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_both_versions_either_byte_order_and_extensions(tmp_path, kind):
    voxels = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    header = kind.header_class(endianness=">")
    header.set_data_dtype(np.int16)
    image = kind(voxels, np.diag([*SPACING, 1]), header)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Jane Roe" * 10))
    nibabel.save(image, tmp_path / "a.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").voxels[0], voxels)
    assert volume_shape(tmp_path / "a.nii") == SHAPE


def test_fourth_axis_is_channels(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 9, (*SHAPE, 3)).astype(np.int16)
    path = save(tmp_path / "a.nii", voxels)
    assert read_image(path).shape == (8, 3, 7, 6) and volume_shape(path) == (*SHAPE, 3)
    np.testing.assert_array_equal(read_volume(path).voxels, np.moveaxis(voxels, -1, 0))
    with pytest.raises(InputError, match="^b.nii: a volume of shape"):
        read_image(save(tmp_path / "b.nii", np.zeros((*SHAPE, 9), np.int16)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e35])
def test_voxels_that_are_no_numbers(tmp_path, bad):
    voxels = np.zeros(SHAPE, np.float32)
    voxels[1, 2, 3] = bad
    with pytest.raises(InputError, match="^a.nii: pixels"):
        read_image(save(tmp_path / "a.nii", voxels))


@pytest.mark.parametrize(
    ("offset", "layout", "values", "message"),
    [
        (40, "<8h", (3, 32767, 32767, 32767, 1, 1, 1, 1), "the header claims 65"),
        (40, "<8h", (4, 32767, 32767, 32767, 8, 1, 1, 1), "the header claims 52"),
        (40, "<8h", (3, 6, 7, -8, 1, 1, 1, 1), "the header claims an image of shape"),
        (40, "<8h", (2, 6, 56, 1, 1, 1, 1, 1), "a volume of shape"),
        (40, "<8h", (3, 6, 7, 9, 1, 1, 1, 1), "cannot be decoded"),
        (70, "<h", (128,), "voxels of type"),
        (70, "<h", (1792,), "voxels of type"),
        (108, "<f", (1e15,), "the header claims that voxels begin"),
        (108, "<f", (np.nan,), "cannot be decoded|the header claims"),
        (112, "<2f", (np.inf, 1.0), "the header claims a slope"),
        (112, "<2f", (1.0, np.inf), "cannot be decoded"),
        (280, "<4f", (0, 0, 0, 0), "the header claims voxels of"),
        (280, "<4f", (np.nan, 0, 0, 0), "the header claims voxels of"),
    ],
)
def test_lies_are_refused(tmp_path, offset, layout, values, message, capfd):
    path = edited(save(tmp_path / "a.nii", np.ones(SHAPE, np.int16)), offset, layout, *values)
    if offset == 70:
        edited(path, 72, "<h", {128: 24, 1792: 128}[values[0]])
    with pytest.raises(InputError, match=f"^a.nii: ({message})"):
        read_image(path)
    assert capfd.readouterr().err == ""


def test_128_tebibytes_are_refused_at_once(tmp_path):
    path = save(tmp_path / "a.nii", np.ones(SHAPE, np.int16), kind=nibabel.Nifti2Image)
    edited(path, 16, "<8q", 3, 2**16, 2**15, 2**15, 1, 1, 1, 1)
    with pytest.raises(InputError, match="^a.nii: the header claims 131072.0 GiB"):
        read_image(path)


def test_no_more_is_inflated_than_the_header_tells_of(tmp_path):
    """2 GB of zeros behind a small volume, in a file of 2 MB."""
    content = save(tmp_path / "a.nii", np.ones(SHAPE, np.int16)).read_bytes()
    zeros = gzip.compress(bytes(2**26), 1)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content) + 32 * zeros)
    assert read_image(tmp_path / "b.nii.gz").shape == (8, 1, 7, 6)


def mask_volume():
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:4, 2:4, 3:5] = 2
    return mask


def ball():
    """Bright in the middle slices, nearly nothing in the others."""
    voxels = np.zeros(SHAPE, np.int16)
    voxels[1:5, 1:6, 2:6] = 1000
    voxels[0, 0, 0] = 500
    return voxels


@pytest.mark.parametrize(
    ("axis", "slices", "expected"),
    [
        ("axial", "all", range(8)),
        ("axial", "content", range(2, 6)),
        ("axial", "mask", range(3, 5)),
        ("coronal", "content", range(1, 6)),
        ("coronal", "mask", range(2, 4)),
        ("sagittal", "content", range(1, 5)),
        ("sagittal", "mask", range(2, 4)),
    ],
)
def test_which_slices_become_images(tmp_path, axis, slices, expected):
    row = Row("a", (save(tmp_path / "a.nii", ball()),), mask=save(tmp_path / "m.nii", mask_volume()))
    made = list(decode_row(row, DecodeOptions(8, axis=axis, slices=slices, mask_classes=("healthy", "ill"))))
    assert [image.frame for image in made] == list(expected)
    volume, mask = read_volume(row.file), read_volume(row.mask)
    for image in made:
        picture, labels = volume.slice(axis, image.frame), mask.slice(axis, image.frame)
        assert image.findings == (("ill",) if labels.any() else ("healthy",))
        assert (image.image == 1000).sum() == (picture == 1000).sum() and (image.mask == 2).sum() == (labels == 2).sum()
        assert (image.height is not None) == (axis == "axial")


def test_stacked_channels_and_mask(tmp_path):
    first, second = ball(), ball().astype(np.float32) / 3
    files = (save(tmp_path / "a.nii", first), save(tmp_path / "b.nii", second))
    row = Row("case", files, ("ill",), mask=save(tmp_path / "m.nii", mask_volume()))
    made = list(decode_row(row, DecodeOptions(8, slices="all", mask_channel=True)))
    assert len(made) == 8 and made[4].image.shape == (3, 8, 8) and made[4].image.dtype == np.float32
    np.testing.assert_allclose(made[4].image[0] / 3, made[4].image[1], rtol=1e-6)
    assert made[4].mask is None and made[4].mask_labels == [0, 2] and len(made[4].ranges) == 4


def test_volumes_that_do_not_fit(tmp_path):
    files = (save(tmp_path / "a.nii", ball()), save(tmp_path / "b.nii", ball()[:, :, :-1]))
    with pytest.raises(InputError, match=r"^b.nii: \(6, 7, 7\) voxels beside \(6, 7, 8\) of a.nii"):
        list(decode_row(Row("case", files), OPTIONS))
    with pytest.raises(InputError, match="^b.nii: "):
        list(decode_row(Row("case", files[:1], mask=files[1]), OPTIONS))
    with pytest.raises(InputError, match="^a.nii: has no mask"):
        list(decode_row(Row("case", files[:1]), DecodeOptions(8, slices="mask")))
    with pytest.raises(InputError, match="^c.nii: no such file"):
        list(decode_row(Row("case", (files[0], tmp_path / "c.nii")), OPTIONS))


def test_a_volume_is_not_one_image(tmp_path):
    with pytest.raises(InputError, match="^a.nii: 8 frames"):
        read_file(save(tmp_path / "a.nii", ball()))


def test_real_volumes_equal_nibabel(real_data):
    files = sorted((real_data / "nifti_glioma_4ch").rglob("*.nii.gz"))
    assert len(files) == 6
    for file in files:
        canonical = nibabel.as_closest_canonical(nibabel.load(file))
        volume = read_volume(file)
        np.testing.assert_array_equal(volume.voxels[0], np.asarray(canonical.dataobj), err_msg=file.name)
        np.testing.assert_allclose(volume.spacing, canonical.header.get_zooms()[:3], rtol=1e-5)
        assert volume_shape(file) == canonical.shape


def test_volumes_in_different_places_are_not_stacked(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 100, (8, 8, 8)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1, -1, 1, 1])), tmp_path / "a_t1.nii")
    for name, affine in {"same": np.diag([-1, -1, 1, 1]), "turned": np.eye(4)}.items():
        nibabel.save(nibabel.Nifti1Image((voxels > 50).astype(np.uint8), affine), tmp_path / f"{name}.nii")
    row = Row("a", (tmp_path / "a_t1.nii",), mask=tmp_path / "same.nii")
    assert len(list(decode_row(row, DecodeOptions(8, slices="all")))) == 8
    with pytest.raises(InputError, match="turned.nii lies elsewhere in space than a_t1.nii"):
        list(decode_row(replace(row, mask=tmp_path / "turned.nii"), DecodeOptions(8)))


def test_a_small_step_across_thick_slices_is_no_other_place(tmp_path):
    affines = [np.diag([0.4, 0.4, 5, 1.0]) for _ in range(3)]
    affines[1][2, 3], affines[2][0, 3] = 0.5, 0.5
    for number, affine in enumerate(affines):
        nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.uint8), affine), tmp_path / f"{number}.nii")
    first, near, far = (read_volume(tmp_path / f"{number}.nii") for number in range(3))
    assert near.voxels_from(first) == pytest.approx(0.1) and far.voxels_from(first) == pytest.approx(1.25)


def test_channels_of_different_kinds_are_kept_in_32_bits(tmp_path):
    draws = np.random.default_rng(0)
    nibabel.save(nibabel.Nifti1Image(draws.integers(2**20, 2**21, (8, 8, 8)).astype(np.int32), np.eye(4)), tmp_path / "a.nii")
    nibabel.save(nibabel.Nifti1Image(draws.random((8, 8, 8)).astype(np.float32), np.eye(4)), tmp_path / "b.nii")
    first = next(decode_row(Row("a", (tmp_path / "a.nii", tmp_path / "b.nii")), DecodeOptions(8, slices="all")))
    assert first.image.dtype == np.float32
