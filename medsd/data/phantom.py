"""The embedded default: a procedural head CT with the classes of RSNA-2019, written as real DICOM. Nobody's data.

`phantom_anatomy` draws a slice; here slices become files, with masks of their bleeds and a table of labels.
"""

import csv
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsd.data.phantom_anatomy import CLASSES, MAX_SLICES, check_numbers, slice_image
from medsd.data.phantom_head import SLICE_STEP, Patient, draw_patient, stream_of
from medsd.errors import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

KINDS = ("dicom", "masks")


FINDINGS = CLASSES[1:]
"""Where several can hold, or none."""
NO_FINDING = "No Finding"
SHARES = (1 / 6, 1 / 2, 1 / 3)
"""Of slices without, with one and with two findings, where several can hold."""


def write_phantom(folder: Path, patients: int = 500, slices: int = 6, size: int = 128, seed: int = 0, multi_label: bool = False) -> Path:
    """Write `FOLDER/dicom/PATIENT/NN.dcm`, `FOLDER/masks/PATIENT/NN.png` (8-bit, 0 or 255) and `FOLDER/labels.csv`.

    The table has the columns file, label, patient_id, mask, with paths relative to FOLDER. It is written last, so
    a folder without it is unfinished. Every six slices in a row hold each class once. With `multi_label` a slice has none, one or two
    bleeds, joined by `|`, in `SHARES`. Returns the table's path. Raises InputError for numbers out of range.
    """
    if patients < 1 or not 1 <= slices <= MAX_SLICES:
        raise InputError(f"a phantom of {patients} patients with {slices} slices; at least 1, and 1 to {MAX_SLICES}, are expected")
    check_numbers(seed, patients - 1, slices - 1, size)
    table, unfinished = folder / "labels.csv", folder / "labels.csv.unfinished"
    table.unlink(missing_ok=True)
    labels = (_findings if multi_label else _labels)(seed, patients * slices)
    rows = [row for patient in range(patients) for row in _write_patient(folder, seed, patient, labels[patient * slices :][:slices], size)]
    with unfinished.open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "patient_id", "mask"), *rows])
    unfinished.replace(table)
    return table


def is_phantom(folder: Path) -> bool:
    """Whether a folder holds nothing but a phantom, whole or not."""
    patients = [child.name for kind in KINDS if (folder / kind).is_dir() for child in (folder / kind).glob("[!.]*")]
    known = {*KINDS, "labels.csv", "labels.csv.unfinished"}
    own = all(child.name in known for child in folder.glob("[!.]*"))
    return own and all(re.fullmatch(r"PH\d{5}(-\d+)?", name) for name in patients)


def patient_name(seed: int, patient: int) -> str:
    """Id of a patient: heads of another seed are other people."""
    return f"PH{patient:05d}" + (f"-{seed}" if seed else "")


def _labels(seed: int, count: int) -> list[str]:
    """Independent of everything else that is drawn from the seed."""
    rng = stream_of(seed, 0, 0, 1)
    return [CLASSES[k] for _ in range(0, count, len(CLASSES)) for k in rng.permutation(len(CLASSES))][:count]


def _findings(seed: int, count: int) -> list[str]:
    """Bleeds of a slice, in the order of the classes."""
    rng = stream_of(seed, 0, 0, 2)
    shown = [sorted(rng.choice(len(FINDINGS), rng.choice(len(SHARES), p=SHARES), replace=False)) for _ in range(count)]
    return ["|".join(FINDINGS[index] for index in chosen) or NO_FINDING for chosen in shown]


def _write_patient(folder: Path, seed: int, patient: int, labels: list[str], size: int) -> list[tuple[str, str, str, str]]:
    from PIL import Image

    name, rows = patient_name(seed, patient), []
    for kind in KINDS:
        (folder / kind / name).mkdir(parents=True, exist_ok=True)
    header = _header(seed, patient, name, size)
    for index, label in enumerate(labels):
        file, mask_file = f"dicom/{name}/{index:02d}.dcm", f"masks/{name}/{index:02d}.png"
        image, mask = slice_image(seed, patient, index, CLASSES[0] if label == NO_FINDING else label, size)
        _write_dicom(folder / file, header, image[0], draw_patient(seed, patient), index)
        Image.fromarray(mask[0] * 255).save(folder / mask_file)
        rows.append((file, label, name, mask_file))
    return rows


def _header(seed: int, patient: int, name: str, size: int) -> "Dataset":
    """What the files of one patient share."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    head = draw_patient(seed, patient)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.ImageType = CTImageStorage, ["DERIVED", "SECONDARY", "AXIAL"]
    header.PatientID, header.PatientName = name, "Phantom"
    header.StudyInstanceUID, header.SeriesInstanceUID = _uid(seed, patient, "study"), _uid(seed, patient, "series")
    header.FrameOfReferenceUID = _uid(seed, patient, "frame")
    header.Modality, header.BodyPartExamined, header.SeriesNumber = "CT", "HEAD", 1
    header.Manufacturer, header.ManufacturerModelName = "medsd phantom", head.scanner.model
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.PixelSpacing = [f"{head.field_of_view / size:.6f}"] * 2
    header.SliceThickness = header.SpacingBetweenSlices = SLICE_STEP
    header.WindowCenter, header.WindowWidth = 40, 80
    header.RescaleSlope, header.RescaleIntercept, header.RescaleType = head.scanner.slope, head.scanner.intercept, "HU"
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.Rows = header.Columns = size
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    header.PixelRepresentation = int(head.scanner.signed)
    return header


def _write_dicom(path: Path, header: "Dataset", hu: np.ndarray, head: Patient, index: int) -> None:
    """`hu` `(size, size)` in whole HU; the header's per-slice elements are overwritten."""
    header.InstanceNumber = index + 1
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = _uid(header.SeriesInstanceUID, index)
    first = (head.field_of_view / hu.shape[1] - head.field_of_view) / 2
    header.ImagePositionPatient = [f"{first:.4f}", f"{first:.4f}", f"{head.first_level + SLICE_STEP * index:.4f}"]
    stored = np.rint((hu - head.scanner.intercept) / head.scanner.slope)
    header.PixelData = stored.astype("<i2" if head.scanner.signed else "<u2").tobytes()
    header.save_as(path, enforce_file_format=True)


def _uid(*key: int | str) -> str:
    """The same key, the same UID."""
    digest = hashlib.sha256("/".join(map(str, ("medsd-phantom", *key))).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"
