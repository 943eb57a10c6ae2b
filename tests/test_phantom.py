"""The phantom: the same slice every time, honest DICOM, bleeds where their class says, and no class told by brightness alone."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from medsd.data import phantom
from medsd.data.geometry import fit_square
from medsd.data.intensity import Windows
from medsd.data.phantom import write_phantom
from medsd.data.phantom_anatomy import BLEED_AREA, CLASSES, MAX_SLICES, SCALP_BLEED_AREA, slice_image
from medsd.data.phantom_head import SCANNERS, Anatomy, anatomy_of, draw_patient, stream_of
from medsd.data.prepare import PHANTOM_WINDOW
from medsd.errors import InputError

BLEEDS = CLASSES[1:]
PATIENTS, SLICES, SIZE = 8, 6, 128


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("phantom"), PATIENTS, SLICES, SIZE, seed=3)


@pytest.fixture(scope="module")
def rows(written) -> list[dict[str, str]]:
    with written.open(newline="") as file:
        return list(csv.DictReader(file))


def anatomy(patient: int, index: int, label: str) -> Anatomy:
    """The geometry that `slice_image(0, patient, index, label)` draws into."""
    areas = stream_of(0, patient, index + 1, 0).uniform(*zip(SCALP_BLEED_AREA, BLEED_AREA, strict=True))
    swelling = areas[1] if label == "intraventricular" else 0.0
    return anatomy_of(draw_patient(0, patient), index, SIZE, swelling, stream_of(0, patient, index + 1, 1))


def bleeds(label: str, count: int = 24):
    """Pairs of geometry and mask `(size, size)` from all levels of several patients."""
    for patient in range(count):
        index = patient % MAX_SLICES
        yield anatomy(patient, index, label), slice_image(0, patient, index, label)[1][0] > 0


@pytest.mark.parametrize("label", CLASSES)
def test_a_slice_is_the_same_every_time_and_has_the_promised_form(label):
    image, mask = slice_image(5, 2, 3, label, size=64)
    again, mask_again = slice_image(5, 2, 3, label, size=64)
    other, _ = slice_image(6, 2, 3, label, size=64)
    assert np.array_equal(image, again) and np.array_equal(mask, mask_again) and not np.array_equal(image, other)
    assert image.shape == mask.shape == (1, 64, 64)
    assert image.dtype == np.float32 and mask.dtype == np.uint8 and mask.max() == (label != "normal")
    assert image.min() >= -1000 and image.max() <= 3000 and np.array_equal(image, np.rint(image))


def test_slices_and_patients_differ():
    images = [slice_image(0, patient, index, "normal", size=64)[0] for patient in range(6) for index in range(4)]
    assert len({image.tobytes() for image in images}) == len(images)


def test_normal_has_an_empty_mask():
    assert not any(mask.any() for _, mask in bleeds("normal"))


@pytest.mark.parametrize("label", BLEEDS)
def test_every_bleed_lies_inside_the_skull_and_has_its_area(label):
    for place, mask in bleeds(label):
        assert place.depth[mask].min() > 0
        assert BLEED_AREA[0] - 20 < np.count_nonzero(mask) * place.pixel**2 < BLEED_AREA[1] + 20


@pytest.mark.parametrize("label", BLEEDS)
def test_blood_is_as_dense_as_blood(label):
    for patient in range(12):
        image, mask = slice_image(0, patient, patient, label)
        assert 45 < np.median(image[mask > 0]) < 85


def arc(place: Anatomy, mask: np.ndarray) -> float:
    """Length of the inner skull beside the mask, mm."""
    turns = np.unique(np.floor(np.rad2deg(place.angle[mask]) / 3))
    return len(turns) * np.deg2rad(3) * place.inner[mask].mean()


def test_an_epidural_bleed_is_a_thick_lens_on_the_skull():
    for place, mask in bleeds("epidural"):
        assert place.depth[mask].min() < 2 * place.pixel
        assert arc(place, mask) < 5.5 * place.depth[mask].max()


def test_a_subdural_bleed_is_a_long_thin_crescent_on_one_side_of_the_skull():
    for place, mask in bleeds("subdural"):
        assert place.depth[mask].min() < 2 * place.pixel and np.percentile(place.depth[mask], 90) < 14
        assert arc(place, mask) > 5.5 * np.percentile(place.depth[mask], 90)
        assert len(np.unique(np.sign(place.midline[mask]))) == 1


def test_a_subarachnoid_bleed_follows_several_sulci():
    for place, mask in bleeds("subarachnoid"):
        assert len(np.unique(place.sulcus[mask])) >= 3
        between = (place.depth > 4) & (place.depth < 12) & np.isin(place.sulcus, place.sulcus[mask])
        assert place.beside[mask].mean() < 0.75 * place.beside[between & ~mask].mean()


def test_an_intraparenchymal_bleed_is_clear_of_skull_ventricles_and_falx():
    for place, mask in bleeds("intraparenchymal"):
        assert place.depth[mask].min() > 7 and place.ventricles[mask].max() < 0
        assert len(np.unique(np.sign(place.midline[mask]))) == 1


def test_an_intraventricular_bleed_fills_a_part_of_the_ventricles():
    for place, mask in bleeds("intraventricular"):
        inside = place.ventricles > 0
        assert inside[mask].all() and 0.2 < mask.sum() / inside.sum() < 0.95


def test_every_slice_has_blood_outside_the_skull_and_never_in_the_mask():
    for label in CLASSES:
        for patient in range(6):
            place, (image, mask) = anatomy(patient, 2, label), slice_image(0, patient, 2, label)
            outside = place.height > 0
            assert np.count_nonzero((image[0] > 50) & (image[0] < 90) & outside) > 10
            assert not (mask[0] > 0)[outside].any()


@pytest.mark.parametrize("scanner", SCANNERS)
def test_dicom_gives_back_the_same_hu_on_every_scanner(scanner, tmp_path):
    patient = next(p for p in range(100) if draw_patient(0, p).scanner == scanner)
    header = phantom._header(0, patient, "PH", 64)
    image, _ = slice_image(0, patient, 4, "epidural", size=64)
    phantom._write_dicom(tmp_path / "a.dcm", header, image[0], draw_patient(0, patient), 4)
    read = pydicom.dcmread(tmp_path / "a.dcm")
    assert np.array_equal(read.pixel_array * float(read.RescaleSlope) + float(read.RescaleIntercept), image[0])
    assert read.PixelRepresentation == scanner.signed and read.ManufacturerModelName == scanner.model


def test_the_written_files_agree_with_the_table(written, rows):
    labels = Counter(row["label"] for row in rows)
    assert len(rows) == PATIENTS * SLICES and set(labels) == set(CLASSES) and len(set(labels.values())) == 1
    for number, row in enumerate(rows):
        read = pydicom.dcmread(written.parent / row["file"])
        image, mask = slice_image(3, number // SLICES, number % SLICES, row["label"])
        assert np.array_equal(read.pixel_array * float(read.RescaleSlope) + float(read.RescaleIntercept), image[0])
        assert np.array_equal(np.asarray(Image.open(written.parent / row["mask"])), mask[0] * 255)
        assert read.PatientID == row["patient_id"] and read.InstanceNumber == number % SLICES + 1
        assert (read.Modality, read.BodyPartExamined, read.PhotometricInterpretation) == ("CT", "HEAD", "MONOCHROME2")


def test_uids_are_unique_per_slice_shared_per_series_and_the_same_every_time(written, rows, tmp_path):
    headers = [pydicom.dcmread(written.parent / row["file"], stop_before_pixels=True) for row in rows]
    assert len({header.SOPInstanceUID for header in headers}) == len(rows)
    assert len({(header.PatientID, header.StudyInstanceUID, header.SeriesInstanceUID) for header in headers}) == PATIENTS
    assert all(header.SOPInstanceUID.is_valid and header.SeriesInstanceUID.is_valid for header in headers)
    again = write_phantom(tmp_path, 1, SLICES, SIZE, seed=3).parent / rows[0]["file"]
    assert again.read_bytes() == (written.parent / rows[0]["file"]).read_bytes()


def test_an_interrupted_write_leaves_no_table(tmp_path, monkeypatch):
    write_phantom(tmp_path, 1, 2, 32)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(phantom, "_write_dicom", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path, 1, 2, 32)
    assert not (tmp_path / "labels.csv").exists()


@pytest.mark.parametrize(
    "wrong", [dict(label="stroke"), dict(index=MAX_SLICES), dict(index=-1), dict(patient=-1), dict(size=8), dict(seed=-1)]
)
def test_a_wrong_slice_is_refused(wrong):
    with pytest.raises(InputError):
        slice_image(**{"seed": 0, "patient": 0, "index": 0, "label": "normal", "size": 64, **wrong})


@pytest.mark.parametrize("wrong", [{"patients": 0}, {"slices": 0}, {"slices": MAX_SLICES + 1}, {"size": 8}, {"seed": -1}])
def test_a_wrong_phantom_is_refused_before_anything_is_written(wrong, tmp_path):
    with pytest.raises(InputError):
        write_phantom(tmp_path / "new", **{"patients": 1, "slices": 1, **wrong})
    assert not (tmp_path / "new").exists()


def best_logistic_auroc(features: np.ndarray, labels: np.ndarray, train: np.ndarray) -> float:
    """Macro one-vs-rest AUROC on the rest of the rows, of the best of four regularisations."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    aurocs = []
    for strength in (0.01, 0.1, 1, 10):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000)).fit(features[train], labels[train])
        aurocs.append(roc_auc_score(labels[~train], model.predict_proba(features[~train]), multi_class="ovr", average="macro"))
    return max(aurocs)


@pytest.mark.slow
def test_neither_the_histogram_nor_a_thumbnail_tells_the_class():
    labels = phantom._labels(0, 400 * SLICES)
    slices = (slice_image(0, k // SLICES, k % SLICES, label)[0] for k, label in enumerate(labels))
    shrunk = np.stack([fit_square(image, 64, "pad")[0][0] for image in slices])
    prepared = (Windows((PHANTOM_WINDOW,)).to_unit(shrunk[:, None])[:, 0] + 1) / 2
    numbers, train = np.array([CLASSES.index(label) for label in labels]), np.arange(len(labels)) < 280 * SLICES
    histograms = np.array([np.histogram(image, 64, (0, 1))[0] for image in prepared])
    thumbnails = prepared.reshape(-1, 8, 8, 8, 8).mean((2, 4)).reshape(-1, 64)
    assert best_logistic_auroc(histograms, numbers, train) <= 0.70
    assert best_logistic_auroc(thumbnails, numbers, train) <= 0.85


def test_several_bleeds_share_the_area_of_one():
    """Neither the area of blood nor its brightness tells how many there are; each lies where its class says."""
    single, both, inside = [], [], []
    for patient in range(16):
        index = patient % MAX_SLICES
        pixel = anatomy(patient, index, "normal").pixel
        _, one = slice_image(0, patient, index, "epidural", SIZE)
        image, two = slice_image(0, patient, index, "epidural|intraventricular", SIZE)
        single.append((one > 0).sum() * pixel**2)
        both.append((two > 0).sum() * pixel**2)
        geometry = anatomy_of(draw_patient(0, patient), index, SIZE, 0.0, stream_of(0, patient, index + 1, 1))
        inside.append(((two[0] > 0) & (geometry.depth < 12)).any() and ((two[0] > 0) & (geometry.depth > 25)).any())
    assert np.mean(both) == pytest.approx(np.mean(single), rel=0.15) and np.mean(inside) > 0.9
    with pytest.raises(InputError, match='no class "stroke"'):
        slice_image(0, 0, 0, "epidural|stroke", 64)


def test_a_phantom_of_findings(tmp_path):
    """None, one or two in a slice, in the promised shares; heads of another seed are other people."""
    table = write_phantom(tmp_path, 60, 6, 32, seed=4, multi_label=True)
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    count = Counter(0 if line["label"] == phantom.NO_FINDING else line["label"].count("|") + 1 for line in lines)
    np.testing.assert_allclose([count[number] / 360 for number in range(3)], phantom.SHARES, atol=0.08)
    assert {name for line in lines for name in line["label"].split("|")} == {*BLEEDS, phantom.NO_FINDING}
    assert all(line["patient_id"].endswith("-4") for line in lines) and phantom.is_phantom(tmp_path)
    empty = [line for line in lines if line["label"] == phantom.NO_FINDING]
    assert not any(np.asarray(Image.open(tmp_path / line["mask"])).any() for line in empty)
