"""Small copies of public collections in their exact layout on disk, drawn by the phantom.

Each writer returns its folder (what --data_dir names) or, for one file, the file. Sizes are in pixels and can be small.
"""

from functools import cache

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from medsd.data.collections import HAEMORRHAGES, KINDS
from medsd.data.phantom_anatomy import CLASSES, slice_image

RSNA_FINDINGS = ((), ("epidural",), ("subdural", "subarachnoid"), ("intraparenchymal",), ("epidural", "subdural", "intraventricular"), ())
"""Findings of the images of `write_rsna2019`, over and over."""
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Affine of the BraTS volumes: the first axis runs to the left, the second to the back, the third upwards."""
OASIS_1_HEADER = "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay"
NIH_HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height]"


@cache
def bleeding(patient, index, findings, size):
    """HU `(size, size)` with all these bleeds, and their mask (0 or 1)."""
    image, mask = slice_image(0, patient, index, findings[0] if findings else "normal", size)
    for finding in findings[1:]:
        other, more = slice_image(0, patient, index, finding, size)
        image, mask = np.where(more > 0, other, image), np.maximum(mask, more)
    return image[0], mask[0]


def grey(patient, index, findings=(), size=32):
    """An 8-bit view (brain window) `(size, size)`."""
    return np.clip(bleeding(patient, index, findings, size)[0] * (255 / 80), 0, 255).astype(np.uint8)


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, ""]))


def rsna_id(number):
    return f"ID_{(number * 2654435761 + 0x12CADC6AF) % 16**9:09x}"


def write_rsna2019(folder, patients=4, slices=6, size=32):
    """`stage_2_train/ID_*.dcm` and `stage_2_train.csv`: six lines an image, those of the first image twice, as in the real file."""
    lines = []
    for number in range(patients * slices):
        patient, index = divmod(number, slices)
        findings = RSNA_FINDINGS[number % len(RSNA_FINDINGS)]
        write_rsna_dicom(folder / "stage_2_train" / f"{rsna_id(number)}.dcm", number, patient, index, findings, size)
        truth = {**{name: name in findings for name in HAEMORRHAGES}, "any": bool(findings)}
        lines += [f"{rsna_id(number)}_{kind},{int(truth[kind])}" for kind in KINDS]
    write_lines(folder / "stage_2_train.csv", ["ID,Label", *lines, *lines[: len(KINDS)]])
    return folder


def write_rsna_dicom(path, number, patient, index, findings, size):
    """With the header of RSNA's files, where every id and UID is `ID_` and a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pydicom.config.disable_value_validation():
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        scan = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        scan.SOPInstanceUID, scan.Modality, scan.PatientID = path.stem, "CT", f"ID_{patient:08x}"
        scan.StudyInstanceUID, scan.SeriesInstanceUID, scan.StudyID = f"ID_{patient:010x}", f"ID_{patient + 4096:010x}", ""
        scan.ImagePositionPatient, scan.ImageOrientationPatient = [-110, -110, 6.0 * index], [1, 0, 0, 0, 1, 0]
        scan.SamplesPerPixel, scan.PhotometricInterpretation = 1, "MONOCHROME2"
        scan.Rows = scan.Columns = size
        scan.PixelSpacing = [220 / size, 220 / size]
        scan.BitsAllocated, scan.BitsStored, scan.HighBit, scan.PixelRepresentation = 16, 16, 15, 1
        scan.WindowCenter, scan.WindowWidth, scan.RescaleIntercept, scan.RescaleSlope = 30, 80, -1024, 1
        scan.PixelData = (bleeding(patient, index, findings, size)[0] + 1024).astype("<i2").tobytes()
        scan.save_as(path, enforce_file_format=True)


def write_adni(folder, subjects=6, slices=3, size=32):
    """`AD_NC/train|test/AD|NC/SUBJECT_SLICE.jpeg`: every third subject is in the test folder, every other one has AD."""
    for subject in range(subjects):
        place = folder / "AD_NC" / ("test" if subject % 3 == 2 else "train") / ("AD" if subject % 2 == 0 else "NC")
        for index in range(slices):
            save(grey(subject, index, size=size), place / f"{218391 + 1000 * subject}_{78 + index}.jpeg")
    return folder


def write_oasis_png(folder, cases=6, slices=3, size=32):
    """`keras_png_slices_data/keras_png_slices_[seg_]train|validate|test/`: four cases of six to train on; masks 0, 85, 170, 255."""
    for case in range(1, cases + 1):
        split = {5: "validate", 0: "test"}.get(case % 6, "train")
        for index in range(slices):
            image, data = grey(case, index, size=size), folder / "keras_png_slices_data"
            save(image, data / f"keras_png_slices_{split}" / f"case_{case:03d}_slice_{index}.nii.png")
            save(image // 64 * 85, data / f"keras_png_slices_seg_{split}" / f"seg_{case:03d}_slice_{index}.nii.png")
    return folder


def volume_of(patient, findings=(), size=32, slices=6):
    """HU and mask `(size, size, slices)` in LPS order; the bleed is in every slice but the first and the last."""
    pairs = [bleeding(patient, index, findings if 0 < index < slices - 1 else (), size) for index in range(slices)]
    return tuple(np.stack([pair[part].T for pair in pairs], axis=-1) for part in (0, 1))


def write_volume(path, voxels, affine=LPS):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def tissue(voxels):
    """HU as a skull-stripped scan in arbitrary units: 0 outside, up to 1000."""
    return np.where(voxels < 100, np.clip(voxels, 0, 100) * 10, 0).astype(np.int16)


def write_oasis_nifti(folder, subjects=4, size=32, slices=6):
    """neurite-oasis: `OASIS_OAS1_0001_MR1/aligned_norm.nii.gz` beside derived files, and `oasis_cross-sectional.csv`.

    The last subject has a second session, MR2, and no CDR in the table.
    """
    lines = []
    for subject in range(1, subjects + 1):
        scan = tissue(volume_of(subject, size=size, slices=slices)[0])
        for session in ("MR1", "MR2") if subject == subjects else ("MR1",):
            name = f"OAS1_{subject:04d}_{session}"
            for file, voxels in {"aligned_norm": scan / np.float32(1000), "orig": scan}.items():
                write_volume(folder / f"OASIS_{name}" / f"{file}.nii.gz", voxels)
            for file, step in {"aligned_seg4": 250, "aligned_seg35": 30, "seg4": 250}.items():
                write_volume(folder / f"OASIS_{name}" / f"{file}.nii.gz", (scan // step).astype(np.uint8))
            clinical = ",,," if subject == subjects else f"2,3,29,{(subject % 2) / 2}"
            lines.append(f"{name},{'FM'[subject % 2]},R,{60 + subject},{clinical},1344,0.743,1.306,N/A")
    write_lines(folder / "oasis_cross-sectional.csv", [OASIS_1_HEADER, *lines])
    return folder


def write_brats(folder, year=2020, cases=3, size=32, slices=6):
    """`CASE/CASE_flair.nii[.gz]` and so on with the names of 2020, 2021 or 2023; of 2023 the first patient has two timepoints."""
    names = {
        2020: [f"BraTS20_Training_{case + 1:03d}" for case in range(cases)],
        2021: [f"BraTS2021_{case:05d}" for case in range(cases)],
        2023: [f"BraTS-GLI-{case // 2:05d}-{case % 2:03d}" for case in range(cases)],
    }[year]
    for case, name in enumerate(names):
        for modality, voxels in brats_volumes(case, year, size, slices).items():
            write_volume(folder / name / f"{name}{'-' if year == 2023 else '_'}{modality}.nii{'' if year == 2020 else '.gz'}", voxels)
    return folder


def brats_volumes(case, year, size, slices):
    """The four modalities (int16; float32 in 2020) and the labels 0, 2 and 4 (3 in 2023), by the names of the year."""
    hu, tumour = volume_of(case, ("intraparenchymal",), size, slices)
    scan, tumour = tissue(hu), tumour.astype(np.int16)
    inverse, kind = np.where(scan > 0, 1000 - scan, 0), np.float32 if year == 2020 else np.int16
    core = tumour * (np.arange(size) % 2 == 0)[:, None, None]
    seg = (2 * tumour + (1 if year == 2023 else 2) * core).astype(np.uint8)
    volumes = {"t1": scan, "t1ce": scan + 300 * tumour, "t2": inverse, "flair": inverse + 200 * tumour}
    newer = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"} if year == 2023 else {}
    return {**{newer.get(name, name): voxels.astype(kind) for name, voxels in volumes.items()}, "seg": seg}


def write_medmnist(folder, name="pneumoniamnist", classes=2, findings=0, counts=(8, 4, 4)):
    """`NAME.npz` of 28 px with labels `(N, 1)`, class after class, or with `findings` > 0 `(N, findings)` of 0 and 1."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for index, (split, count) in enumerate(zip(("train", "val", "test"), counts, strict=True)):
        numbers = np.arange(count)
        scans = [grey(int(n), index, (CLASSES[1 + n % 5],), 32)[2:30, 2:30] for n in numbers]
        arrays[f"{split}_images"] = np.stack(scans)
        flags = (numbers[:, None] + np.arange(max(findings, 1))) % 3 == 0
        arrays[f"{split}_labels"] = flags.astype(np.uint8) if findings else (numbers % classes)[:, None].astype(np.uint8)
    np.savez(folder / f"{name}.npz", **arrays)
    return folder / f"{name}.npz"


def write_chest_csv(folder, patients=4, size=32):
    """NIH ChestX-ray14: `images_001/images/00000001_000.png`, two a patient, and `Data_Entry_2017.csv` with joined findings."""
    named = ("No Finding", "Cardiomegaly", "Cardiomegaly|Effusion", "Effusion")
    lines = []
    for number in range(2 * patients):
        patient, follow_up = divmod(number, 2)
        file = f"{patient + 1:08d}_{follow_up:03d}.png"
        save(grey(patient, follow_up, size=size), folder / "images_001" / "images" / file)
        lines.append(
            f"{file},{named[number % 4]},{follow_up},{patient + 1},{58 + patient},{'MF'[patient % 2]},{('PA', 'AP')[follow_up]},9,9"
        )
    write_lines(folder / "Data_Entry_2017.csv", [NIH_HEADER, *lines])
    return folder


def write_chexpert(folder, patients=4, size=32):
    """CheXpert: `CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg` and `train.csv` with 1.0, 0.0, -1.0 and nothing.

    The first patient has 1 and 0, the second a -1, the third an empty cell, and so on.
    """
    cells, lines = ("1.0,0.0", "-1.0,1.0", ",0.0"), []
    for patient in range(patients):
        path = f"CheXpert-v1.0-small/train/patient{patient + 1:05d}/study1/view1_frontal.jpg"
        save(grey(patient, 0, size=size), folder / path)
        lines.append(f"{path},{('Female', 'Male')[patient % 2]},68,Frontal,AP,{cells[patient % 3]}")
    write_lines(folder / "train.csv", ["Path,Sex,Age,Frontal/Lateral,AP/PA,Cardiomegaly,Edema", *lines])
    return folder
