"""Readers of pictures and arrays: depth and values are kept, and what would be changed silently is refused."""

import io
import struct
import threading
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from medsd.data.arrays import NpzMember
from medsd.data.files import is_dicom, is_nifti, is_raster, read_file, read_frames, read_image, read_mask
from medsd.errors import InputError

SHORT, LONG = 3, 4


def tiff_page(pixels, start, photometric=1, sample_format=1, subfile=0, following=False):
    """One uncompressed page that begins at byte `start`: pixels, then its tags."""
    data, samples = pixels.tobytes(), pixels.shape[2] if pixels.ndim == 3 else 1
    bits = [8 * pixels.itemsize] * samples
    extra = struct.pack(f"<{samples}H", *bits) if samples > 2 else b""
    place = start + len(data)
    tags = [
        (254, LONG, 1, subfile),
        (256, LONG, 1, pixels.shape[1]),
        (257, LONG, 1, pixels.shape[0]),
        (258, SHORT, samples, place if extra else bits[0]),
        (259, SHORT, 1, 1),
        (262, SHORT, 1, photometric),
        (273, LONG, 1, start),
        (277, SHORT, 1, samples),
        (278, LONG, 1, pixels.shape[0]),
        (279, LONG, 1, len(data)),
        (339, SHORT, 1, sample_format),
    ]
    place += len(extra)
    end = place + 2 + 12 * len(tags) + 4
    listed = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    next_tags = end + following if following else 0
    return place, data + extra + struct.pack("<H", len(tags)) + listed + struct.pack("<I", next_tags)


def tiff(path, *pages):
    """A little-endian TIFF; each page is (pixels, options)."""
    content, first = b"", None
    for number, (pixels, options) in enumerate(pages):
        following = 0
        if number + 1 < len(pages):
            ahead = pages[number + 1][0]
            following = ahead.nbytes + (2 * ahead.shape[2] if ahead.ndim == 3 else 0)
        place, made = tiff_page(pixels, 8 + len(content), following=following, **options)
        first, content = first or place, content + made
    path.write_bytes(b"II*\0" + struct.pack("<I", first) + content)
    return path


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(path, width, height, depth, colour, rows):
    """A PNG of any depth: colour 0 is grey, 2 RGB, 4 grey with transparency."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""))
    return path


def test_kinds_by_name(tmp_path):
    for name, start in {"1.2.840.113": b"DICM", "IM0001": b"DICM", "LICENSE": b"", "DICOMDIR": b"DICM", "notes.1": b""}.items():
        (tmp_path / name).write_bytes(bytes(128) + start)
    assert is_dicom(tmp_path / "1.2.840.113") and is_dicom(tmp_path / "IM0001") and is_dicom(tmp_path / "a.DCM")
    assert not any(is_dicom(tmp_path / name) for name in ("labels.csv", "LICENSE", "DICOMDIR", "notes.1", "none"))
    assert is_nifti(tmp_path / "a.NII.GZ") and not is_nifti(tmp_path / "a.gz") and is_raster(tmp_path / "a.JPG")


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("high", [4096, 65536])
def test_sixteen_bits_are_kept(tmp_path, suffix, high):
    ramp = np.linspace(0, high - 1, 4096).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    pixels = read_image(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(pixels[0], ramp)
    assert pixels.dtype == (np.int16 if high == 4096 else np.uint16)


@pytest.mark.parametrize(
    ("values", "sample_format"),
    [
        (np.array([[0, 2**32 - 1], [2**31, 7]], np.uint32), 1),
        (np.array([[0, 2**16], [2**31 - 1, 7]], np.uint32), 1),
        (np.array([[-5, 70000]], np.int32), 2),
        (np.array([[-5, 32000]], np.int16), 2),
        (np.array([[0.5, -1e9]], np.float32), 3),
    ],
)
def test_tiff_of_any_depth(tmp_path, values, sample_format):
    np.testing.assert_array_equal(read_image(tiff(tmp_path / "a.tif", (values, {"sample_format": sample_format})))[0], values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_tiff_that_is_not_finite(tmp_path, bad):
    path = tiff(tmp_path / "a.tif", (np.array([[0, bad]], np.float32), {"sample_format": 3}))
    with pytest.raises(InputError, match="^a.tif: pixels"):
        read_image(path)


def test_white_is_zero(tmp_path):
    values = np.array([[0, 250]], np.uint8)
    np.testing.assert_array_equal(read_image(tiff(tmp_path / "a.tif", (values, {"photometric": 0}))), [[[255, 5]]])
    with pytest.raises(InputError, match="^b.tif: .*0 is white"):
        read_image(tiff(tmp_path / "b.tif", (values.astype(np.uint16), {"photometric": 0})))


def test_colour_of_sixteen_bits_is_refused(tmp_path):
    grey = tiff(tmp_path / "a.tif", (np.zeros((2, 2, 3), np.uint8), {"photometric": 2}))
    assert read_image(grey).shape == (1, 2, 2)
    deep = [tiff(tmp_path / "b.tif", (np.zeros((2, 2, 3), np.uint16), {"photometric": 2}))]
    deep += [
        png(tmp_path / f"{colour}.png", 1, 1, 16, colour, b"\0" + bytes(range(2 * samples))) for colour, samples in ((2, 3), (4, 2), (6, 4))
    ]
    for path in deep:
        with pytest.raises(InputError, match=f"^{path.name}: colour of 16 bits"):
            read_image(path)


def test_pages_of_a_tiff_are_frames(tmp_path):
    pages = np.random.default_rng(0).integers(0, 60000, (3, 4, 6)).astype(np.uint16)
    path = tiff(tmp_path / "a.tif", *((page, {}) for page in pages))
    np.testing.assert_array_equal(read_image(path), pages[:, None])
    np.testing.assert_array_equal(read_image(path, frame=1), pages[1][None])
    for frame in (-1, 3):
        with pytest.raises(InputError, match=f"^a.tif: frame {frame} of 3"):
            read_image(path, frame=frame)
    with pytest.raises(InputError, match="^a.tif: 3 frames in one file"):
        read_file(path)


def test_smaller_copies_in_a_tiff_are_no_frames(tmp_path):
    path = tiff(tmp_path / "a.tif", (np.ones((4, 4), np.uint8), {}), (np.ones((2, 2), np.uint8), {"subfile": 1}))
    assert read_image(path).shape == (1, 4, 4)


def test_pages_of_different_sizes(tmp_path):
    path = tiff(tmp_path / "a.tif", (np.ones((4, 4), np.uint8), {}), (np.ones((2, 2), np.uint8), {}))
    assert [image.pixels.shape for image in read_frames(path)] == [(1, 4, 4), (1, 2, 2)]
    with pytest.raises(InputError, match="^a.tif: 2 frames of different sizes"):
        read_image(path)


def test_the_preview_in_a_photograph_is_no_frame(tmp_path):
    photograph, preview = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (4, 3))
    photograph.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    assert read_image(tmp_path / "a.jpg").shape == (3, 6, 8)


def test_exif_turns_the_image(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("L", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (1, 8, 4)


def test_channels(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([grey, grey, grey + 1], -1)).save(tmp_path / "colour.png")
    Image.fromarray(np.stack([grey, grey], -1)).save(tmp_path / "alpha.png")
    Image.fromarray(grey > 20).save(tmp_path / "bits.png")
    Image.new("P", (8, 8), 3).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "grey.png").shape == (1, 8, 8)
    assert read_image(tmp_path / "colour.png").shape == (3, 8, 8)
    assert read_image(tmp_path / "alpha.png").shape == (1, 8, 8)
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png")[0], np.where(grey > 20, 255, 0))
    assert read_image(tmp_path / "palette.png").shape == (1, 8, 8)


def test_images_may_be_written_to(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.ones((4, 4), np.uint8))
    for name in ("a.png", "a.npy"):
        read_image(tmp_path / name)[0, 0, 0] = 9


def test_another_kind_of_file_under_a_raster_name_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", format="GIF")
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    for name in ("a.png", "b.png"):
        with pytest.raises(InputError, match=f"^{name}: cannot be decoded"):
            read_image(tmp_path / name)


def test_huge_png_is_refused_before_it_is_decoded(tmp_path):
    for side in (20_000, 2**31 - 1):
        path = png(tmp_path / "a.png", side, side, 16, 0, b"\0")
        with pytest.raises(InputError, match=r"^a.png: (the header claims|cannot be decoded \(DecompressionBombError)"):
            read_image(path)


def test_npz_and_npy(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.arange(8, dtype=np.uint8).reshape(2, 2, 2), labels=np.zeros(2))
    np.testing.assert_array_equal(read_file(tmp_path / "a.npz", "images", 1).pixels, [[[4, 5], [6, 7]]])
    volume = np.asfortranarray(np.arange(2 * 3 * 5 * 3).reshape(2, 3, 5, 3))
    np.savez_compressed(tmp_path / "b.npz", volume)
    np.testing.assert_array_equal(read_file(tmp_path / "b.npz", None, 1).pixels, np.moveaxis(volume[1], -1, 0))
    np.save(tmp_path / "c.npy", np.float16([[0.5, 2]]))
    np.testing.assert_array_equal(read_image(tmp_path / "c.npy"), [[[0.5, 2]]])


@pytest.mark.parametrize(
    ("member", "index", "message"),
    [
        ("images", 2, "row 2 of an array"),
        ("images", -1, "row -1"),
        ("nothing", 0, "holds no array nothing"),
        (None, None, "holds 2 arrays"),
    ],
)
def test_npz_without_such_a_row(tmp_path, member, index, message):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 2, 2)), labels=np.zeros(2))
    with pytest.raises(InputError, match=f"^a.npz: {message}"):
        read_file(tmp_path / "a.npz", member, index)


def test_rows_are_streamed(tmp_path):
    """Reading a row takes no more than that row, whatever the array's size."""
    stream = io.BytesIO()
    np.save(stream, np.arange(4 * 10**6, dtype=np.uint8).reshape(4, 1000, 1000))
    read = []

    class Counted(io.BytesIO):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    member = NpzMember(Counted(stream.getvalue()))
    read.clear()
    np.testing.assert_array_equal(member.row(2)[0, :3], np.arange(2 * 10**6, 2 * 10**6 + 3) % 256)
    assert read == [10**6]


def test_pickles_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", images=np.array([[{"a": 1}]], dtype=object))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(InputError, match=f"^{name}: "):
            read_image(tmp_path / name)


def test_npz_that_claims_terabytes(tmp_path):
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1000000, 1000000), }"
    content = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", content)
    for index in (None, 0):
        with pytest.raises(InputError, match="^a.npz: the header claims"):
            read_file(tmp_path / "a.npz", "images", index)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"not a png", "cannot be decoded"),
        ("a.dcm", b"not dicom", "cannot be decoded"),
        ("a.nii", b"not nifti", "not a NIfTI volume"),
        ("a.nii.gz", b"not gzip", "cannot be decoded"),
        ("a.npz", b"not zip", "cannot be decoded"),
        ("a.npy", b"not npy", "cannot be decoded"),
        ("a.mp4", b"", "not a kind of image"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^{name}: {message}"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["nowhere.png", "a\0b.png", "a" * 300 + ".png"])
def test_missing_file(name):
    with pytest.raises(InputError, match="png: (no such file|cannot be decoded)"):
        read_image(name)


def test_threads_leave_the_warnings_as_they_were(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(tmp_path / "a.png")
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [read_image(tmp_path / "a.png") for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_deflate"])
def test_a_turned_tiff_is_turned_back(tmp_path, orientation, compression):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.tif", compression=compression, exif=exif)
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), read_image(tmp_path / "a.png"))


def test_labels_of_a_palette_mask_are_its_indices(tmp_path):
    labels = np.arange(16, dtype=np.uint8).reshape(4, 4) % 4
    image = Image.fromarray(labels).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    image.putdata(labels.ravel().tolist())
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png")[0], labels)
    assert read_image(tmp_path / "a.png").shape == (3, 4, 4)
    image.convert("RGB").save(tmp_path / "b.png")
    with pytest.raises(InputError, match="b.png: a mask of 3 channels"):
        read_mask(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("shape", "expected"), [((9, 8, 4), (4, 9, 8)), ((9, 8, 2), (2, 9, 8)), ((1, 9, 10), (1, 9, 10)), ((4, 30, 40), (4, 30, 40))]
)
def test_channels_of_an_array_are_all_kept(tmp_path, shape, expected):
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    np.save(tmp_path / "a.npy", array)
    pixels = read_image(tmp_path / "a.npy")
    assert pixels.shape == expected
    np.testing.assert_array_equal(pixels, array if shape == expected else np.moveaxis(array, -1, 0))


def test_an_array_of_a_volume_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((20, 30, 40), np.int16))
    with pytest.raises(InputError, match="C up to 8"):
        read_image(tmp_path / "a.npy")
