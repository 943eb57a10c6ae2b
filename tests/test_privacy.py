"""Hundreds of planted identities in everything a source can hold: none may be written outside DATA.private."""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
import warnings
import zlib
from dataclasses import dataclass, field

import nibabel
import numpy as np
import pyarrow.parquet
import pydicom
import pytest
from nibabel.nifti1 import Nifti1Extension
from PIL import Image, PngImagePlugin
from pydicom.datadict import DicomDictionary, dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from tests.conftest import REPOSITORY

SIDE = 24
CLASSES = ("benign", "malignant")
PIECE = 8
"""A planted string is found by any eight characters of it."""
LISTED = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientAge",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
)
UNREADABLE = ("RescaleSlope", "PhotometricInterpretation", "NumberOfFrames", "BitsAllocated", "Rows", "PixelRepresentation")
"""Elements without which there are no pixels."""
NUMBERS = ("PatientWeight", "PatientSize", "SeriesNumber", "AcquisitionNumber", "ExposureTime", "XRayTubeCurrent", "KVP", "TableHeight")
SEQUENCES = ("OtherPatientIDsSequence", "RequestAttributesSequence", "OriginalAttributesSequence", "PersonIdentificationCodeSequence")


@dataclass
class Planter:
    """Strings that occur nowhere else; `names` are those of files and folders, which the terminal may show."""

    texts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def text(self):
        self.texts.append(f"Zq{self._hash()[:12]}")
        return self.texts[-1]

    def code(self):
        return self.text().upper()

    def name(self):
        self.names.append(f"Yk{self._hash()[:12]}")
        return self.names[-1]

    def number(self, digits=8):
        self.texts.append(str(int(self._hash(), 16))[:digits])
        return self.texts[-1]

    def uid(self):
        self.texts.append(f"1.2.826.0.1.{int(self._hash(), 16) % 10**20}")
        return self.texts[-1]

    def _hash(self):
        return hashlib.sha256(f"planted {len(self.texts)} {len(self.names)}".encode()).hexdigest()


def needles(planted):
    """Every eight characters in a row of the planted strings and of their plain hashes, as sorted uint64."""
    pieces = set()
    for text in planted:
        for form in (text, hashlib.sha256(text.encode()).hexdigest()[:16], hashlib.md5(text.encode()).hexdigest()):
            low = form.lower().encode()
            pieces |= {low[start : start + PIECE] for start in range(len(low) - PIECE + 1)}
    return np.sort(np.frombuffer(b"".join(pieces), np.uint64))


def found_in(content, wanted):
    """Pieces of planted strings in bytes, as they stand or in UTF-16."""
    found = set()
    for form in (content.lower(), content.lower().replace(b"\0", b"")):
        for offset in range(min(PIECE, len(form) - PIECE + 1)):
            windows = np.frombuffer(form, np.uint64, (len(form) - offset) // PIECE, offset)
            found |= {piece.tobytes() for piece in windows[np.isin(windows, wanted)]}
    return found


def contents(path, chunks=frozenset({b"IHDR", b"IDAT", b"IEND"})):
    """A file's bytes, and what is compressed in them; a PNG may hold these `chunks`."""
    raw = path.read_bytes()
    parts = [raw]
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        parts += [key + value for key, value in (pyarrow.parquet.read_metadata(path).metadata or {}).items()]
        parts += [leaf for row in table.to_pylist() for leaf in leaves(row)]
    for part in list(parts):
        if part.startswith(b"\x89PNG"):
            kinds, text = png_chunks(part)
            assert kinds <= chunks, kinds
            parts.append(text)
    return b"\0".join(parts)


def leaves(value):
    """Every value of nested lists and dictionaries, as bytes."""
    if isinstance(value, dict | list):
        for child in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from leaves(child)
    else:
        yield value if isinstance(value, bytes) else str(value).encode()


def png_chunks(content):
    """Kinds of chunks, and all but the pixels, decompressed where they can be."""
    place, kinds, texts = 8, set(), []
    while place < len(content):
        size, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        kinds.add(kind)
        data = content[place + 8 : place + 8 + size]
        texts.append(data if kind != b"IDAT" else zlib.decompressobj().decompress(data))
        place += 12 + size
    return kinds, b"\0".join(texts)


def noise(number, kind=np.uint8, shape=(SIDE, SIDE)):
    coarse = np.random.default_rng(number).integers(0, 250, tuple(side // 3 for side in shape))
    return np.kron(coarse, np.ones((3,) * len(shape))).astype(kind)


def places(folder, planter, suffix, count):
    """A path per image: CLASS/PLANTED/PLANTED.suffix."""
    for number in range(count):
        path = folder / CLASSES[number % 2] / planter.name() / f"{planter.name()}{suffix}"
        path.parent.mkdir(parents=True)
        yield number, path


def write_dicoms(folder, planter):
    """Six that can be read; one without pixels, seven with a header whose words an error message could quote."""
    for number, path in places(folder, planter, ".dcm", 6):
        save_dicom(identified(planter, number, LISTED if number else every_text()), path)
    for _, path in places(folder, planter, ".dcm", 1):
        scan = identified(planter, 90)
        del scan.PixelData
        scan.Modality = planter.code()
        save_dicom(scan, path)
    for keyword in UNREADABLE:
        for _, path in places(folder, planter, ".dcm", 1):
            scan = identified(planter, 91)
            scan[keyword] = DataElement(keyword, "LO", planter.text())
            save_dicom(scan, path)
    for _, path in places(folder, planter, ".dcm", 1):
        save_dicom(identified(planter, 92), path)
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", planter.uid()[:19].encode() + b"\0"))
    return ["--source", "dicom"]


def save_dicom(scan, path):
    with pydicom.config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scan.save_as(path, enforce_file_format=True)


def identified(planter, number, keywords=LISTED):
    """A CT slice with an identity in these elements, in sequences, in private elements and around them."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.SourceApplicationEntityTitle, meta.PrivateInformationCreatorUID = planter.text(), planter.uid()
    meta.PrivateInformation = planter.text().encode()
    scan = FileDataset("", {}, file_meta=meta, preamble=planter.text().ljust(128).encode())
    with pydicom.config.disable_value_validation():
        fill(scan, planter, keywords)
        for keyword in SEQUENCES:
            item = Dataset()
            fill(item, planter, LISTED)
            setattr(scan, keyword, [item])
        hide(scan, planter)
        scan.SOPClassUID, scan.Modality, scan.SpecificCharacterSet = CTImageStorage, "CT", "ISO_IR 100"
        meta.MediaStorageSOPInstanceUID = scan.SOPInstanceUID
        scan.Manufacturer = f"GE {planter.text()}"
        scan.ImagePositionPatient, scan.ImageOrientationPatient = [0, 0, number], [1, 0, 0, 0, 1, 0]
        scan.SamplesPerPixel, scan.PhotometricInterpretation, scan.PixelSpacing = 1, "MONOCHROME2", [1, 1]
        scan.Rows = scan.Columns = SIDE
        scan.BitsAllocated, scan.BitsStored, scan.HighBit, scan.PixelRepresentation = 16, 16, 15, 1
        scan.RescaleIntercept, scan.RescaleSlope = -1024, 1
        scan.PixelData = (noise(number) + np.int16(1000)).astype("<i2").tobytes()
    return scan


def fill(scan, planter, keywords):
    plants = {
        "DA": planter.number,
        "TM": lambda: planter.number(12),
        "DT": lambda: planter.number(14),
        "UI": planter.uid,
        "CS": planter.code,
    }
    for keyword in keywords:
        setattr(scan, keyword, plants.get(dictionary_VR(keyword), planter.text)())
    for keyword in NUMBERS:
        setattr(scan, keyword, planter.number())


def every_text():
    """Keywords of all elements that hold text, a date or a UID: more than the basic confidentiality profile names."""
    kinds = {"PN", "LO", "SH", "LT", "ST", "UT", "UC", "AE", "UR", "AS", "CS", "DA", "TM", "DT", "UI"}
    return [entry[4] for tag, entry in DicomDictionary.items() if tag >> 16 > 2 and entry[0] in kinds and entry[4]]


def hide(scan, planter):
    """Private elements: text, bytes, a sequence; and an overlay's comment."""
    block = scan.private_block(0x0029, planter.text(), create=True)
    block.add_new(0x10, "LO", planter.text())
    block.add_new(0x11, "OB", planter.text().encode() + planter.text().encode("utf-16-le"))
    block.add_new(0x12, "UN", planter.text().encode())
    item = Dataset()
    item.PatientName, item.PatientID = planter.text(), planter.text()
    block.add_new(0x13, "SQ", [item])
    scan.add_new(0x60000022, "LO", planter.text())


def write_rasters(folder, planter):
    savers = {".png": save_png, ".jpg": save_jpeg, ".tif": save_tiff}
    for suffix, save in savers.items():
        for number, path in places(folder, planter, suffix, 3):
            save(Image.fromarray(noise(number + 10 * len(suffix) + ord(suffix[1]))), path, planter)
        for _, path in places(folder, planter, suffix, 1):
            save(Image.fromarray(noise(0)), path, planter)
            path.write_bytes(path.read_bytes()[:-300])
    for _, path in places(folder, planter, ".png", 1):
        path.write_text(f"{planter.text()} is no picture")
    return ["--source", "images"]


def exif(planter):
    tags = Image.Exif()
    for tag in (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298, 0x9286):
        tags[tag] = planter.text()
    return tags


def save_png(image, path, planter):
    info = PngImagePlugin.PngInfo()
    info.add_text(planter.text(), planter.text())
    info.add_text("Comment", planter.text(), zip=True)
    info.add_itxt("Author", planter.text(), planter.text()[:2], planter.text())
    info.add_itxt("Title", planter.text(), zip=True)
    image.save(path, pnginfo=info, exif=exif(planter))


def save_jpeg(image, path, planter):
    image.save(path, quality=95, comment=planter.text(), exif=exif(planter))


def save_tiff(image, path, planter):
    image.save(path, tiffinfo={tag: planter.text() for tag in (269, 270, 271, 272, 285, 305, 306, 315, 316, 33432, 65000)})


def write_volumes(folder, planter):
    for number, path in places(folder, planter, ".nii.gz", 4):
        nibabel.save(identified_volume(planter, number), path)
    for _, path in places(folder, planter, ".nii", 1):
        nibabel.save(identified_volume(planter, 9), path)
        path.write_bytes(path.read_bytes()[:-200])
    return ["--source", "nifti", "--slices", "all"]


def identified_volume(planter, number):
    volume = nibabel.Nifti1Image(noise(number, np.int16, (SIDE, SIDE, 6)), np.eye(4))
    for name in ("descrip", "aux_file", "intent_name", "db_name"):
        volume.header[name] = planter.text()
    volume.header.extensions.append(Nifti1Extension("comment", planter.text().encode()))
    volume.header.extensions.append(Nifti1Extension("afni", f'<AFNI name="{planter.text()}"/>'.encode()))
    return volume


def write_table(folder, planter):
    columns = ("file", "label", "who", "age", "sex", "view", planter.text())
    lines = [",".join(columns)]
    for number, path in places(folder, planter, ".png", 6):
        save_png(Image.fromarray(noise(number + 50)), path, planter)
        cells = [path.relative_to(folder).as_posix(), CLASSES[number % 2], *(planter.text() for _ in columns[2:])]
        lines.append(",".join(cells))
    (folder / "list.csv").write_text("\n".join(lines))
    return ["--source", "csv", "--labels", "list.csv", "--patient_column", "who"]


def write_npz(folder, planter):
    arrays = {planter.text(): np.arange(3), f"{planter.text()}_labels": np.array([planter.text()])}
    for number, (split, count) in enumerate({"train": 6, "val": 2, "test": 2}.items()):
        arrays[f"{split}_images"] = np.stack([noise(100 * number + index) for index in range(count)])
        arrays[f"{split}_labels"] = np.arange(count)[:, None] % 2
    folder.mkdir()
    np.savez(folder / f"{planter.name()}.npz", **arrays)
    return ["--source", "npz"]


WRITERS = {"dicom": write_dicoms, "images": write_rasters, "nifti": write_volumes, "csv": write_table, "npz": write_npz}


def run_recipe(place, name, flags):
    """Run the recipe as a user does, with its words in a log beside the data; returns exit code and what others could read meanwhile."""
    command = [
        sys.executable,
        REPOSITORY / "recipes" / "prepare_data.py",
        *flags,
        "--data_dir",
        f"in/{name}",
        "--output_dir",
        f"out/{name}",
        "--salt_file",
        "salt",
    ]
    environment = os.environ | {"XDG_CONFIG_HOME": str(place / "config"), "PYTHONPATH": str(REPOSITORY)}
    # A random salt would now and then make a hash in which eight digits of a planted number stand by chance.
    (place / "salt").write_text("a salt that is the same in every run")
    open_folders = set()
    with (place / "out" / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--resolution", str(SIDE), "--num_workers", "1"], cwd=place, env=environment, stdout=log, stderr=log
        )
        while process.poll() is None:
            open_folders |= readable_by_others(place / "out", name)
            time.sleep(0.005)
    return process.returncode, open_folders


def readable_by_others(folder, name):
    """Folders with source ids in them that others may enter; a new one is empty until its mode is set."""
    found = set()
    for private in (f".{name}.staging", f"{name}.private", f".{name}.private.partial"):
        try:
            mode = (folder / private).stat().st_mode & 0o777
            if mode != 0o700 and any((folder / private).iterdir()):
                found.add(private)
        except OSError:  # Not there yet, or gone while it was looked at.
            continue
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_no_planted_identity_is_written_outside_the_private_folder(tmp_path, name):
    planter = Planter()
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
    flags = WRITERS[name](tmp_path / "in" / name, planter)
    code, open_folders = run_recipe(tmp_path, name, [*flags, "--max_quarantine", "0.9"])
    log = (tmp_path / "out" / f"{name}.log").read_text()
    assert code == 0, log
    assert not open_folders and sorted(path.name for path in (tmp_path / "out").iterdir()) == [name, f"{name}.log", f"{name}.private"]
    everything, texts = needles([*planter.texts, *planter.names]), needles(planter.texts)
    assert not found_in(log.encode(), texts) and str(tmp_path) not in log
    written = [file for file in (tmp_path / "out" / name).rglob("*") if file.is_file()]
    assert len(written) >= 6
    for file in written:
        assert not found_in(contents(file) + str(file.relative_to(tmp_path)).encode(), everything), file
        assert str(tmp_path).encode() not in contents(file)
    private = b"".join(contents(file) for file in (tmp_path / "out" / f"{name}.private").rglob("*"))
    assert found_in(private, needles(planter.names)), "the private folder is where file names are kept"
    quarantine = (tmp_path / "out" / name / "quarantine.jsonl").read_text().splitlines()
    assert len(quarantine) == {"dicom": 8, "images": 4, "nifti": 1}.get(name, 0), quarantine
    assert all(set(json.loads(line)) == {"key", "stage", "reason"} for line in quarantine)


@pytest.mark.parametrize("flags", [[], ["--dry_run"]], ids=["refused", "dry run"])
@pytest.mark.parametrize("name", ["dicom", "images", "nifti"])
def test_a_refusal_quotes_no_header(tmp_path, name, flags):
    planter = Planter()
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
    kind = WRITERS[name](tmp_path / "in" / name, planter)
    run_recipe(tmp_path, name, [*kind, *flags])
    log = (tmp_path / "out" / f"{name}.log").read_text()
    assert not found_in(log.encode(), needles(planter.texts)) and str(tmp_path) not in log, log


def test_hundreds_of_identities_are_planted_and_would_be_found(tmp_path):
    planter = Planter()
    for name, writer in WRITERS.items():
        writer(tmp_path / name, planter)
    planted = [*planter.texts, *planter.names]
    assert len(set(planted)) == len(planted) >= 200
    wanted = needles(planted)
    picture = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Title", "plain")
    Image.fromarray(noise(0)).save(picture, "PNG")
    table = pyarrow.table({"deep": [[{"bytes": planted[0].encode()}]], "preview": [picture.getvalue()]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert found_in(contents(tmp_path / "a.parquet"), wanted)
    (tmp_path / "b.txt").write_text(f"--{planted[1][2:10].upper()}--", encoding="utf-16")
    assert found_in(contents(tmp_path / "b.txt"), wanted)
    assert not found_in(b"nothing of this kind, 1.2.840.10008.1.2.1", wanted)
