"""Public collections in their own layout: rows, findings, patients, splits, and what is refused."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from medsd.data.collections import (
    COLLECTIONS,
    HAEMORRHAGES,
    MEDMNIST_CLASSES,
    adni,
    brats,
    medmnist,
    oasis,
    read_collection,
    rsna2019,
)
from medsd.data.files import read_file
from medsd.data.metadata import Facts
from medsd.data.prompts import class_tokens
from medsd.data.splits import check_patient_overlap
from medsd.errors import InputError
from tests.collection_layouts import (
    RSNA_FINDINGS,
    brats_volumes,
    rsna_id,
    write_adni,
    write_brats,
    write_lines,
    write_medmnist,
    write_oasis_nifti,
    write_oasis_png,
    write_rsna2019,
)

TABLE = "stage_2_train.csv"


def edit(file, change):
    """Rewrite a text file's lines."""
    write_lines(file, change(file.read_text().splitlines()))


def lines_of(number, **values):
    """RSNA's six lines of one image."""
    kinds = (*HAEMORRHAGES, "any")
    return [f"{rsna_id(number)}_{kind},{values.get(kind, 0)}" for kind in kinds]


@pytest.fixture
def rsna(tmp_path):
    return write_rsna2019(tmp_path / "rsna", patients=2, slices=6)


def test_rsna_findings_are_all_that_hold(rsna):
    collection = rsna2019(rsna)
    found = {row.file.stem: set(row.findings) for row in collection.rows}
    assert found == {rsna_id(number): set(RSNA_FINDINGS[number % 6]) for number in range(12)}
    assert collection.class_names == HAEMORRHAGES and collection.multi_label and collection.notes == ()
    assert collection.prompt_template == "a head CT with {label}"
    assert all(row.patient is None and row.split is None and row.name == f"stage_2_train/{row.file.name}" for row in collection.rows)


def test_rsna_patients_stand_in_the_headers(rsna):
    header = read_file(rsna / "stage_2_train" / f"{rsna_id(7)}.dcm").header
    assert (header.patient, header.modality, header.sop_uid) == ("ID_00000001", "CT", rsna_id(7))


def test_rsna_findings_do_not_depend_on_the_order_of_lines(rsna):
    before = rsna2019(rsna).rows
    edit(rsna / TABLE, lambda lines: [lines[0], *sorted(lines[1:], key=lambda line: line[::-1])])
    assert rsna2019(rsna).rows == before


def test_rsna_subsets_are_taken_and_counted(rsna):
    (rsna / "stage_2_train" / f"{rsna_id(1)}.dcm").unlink()
    edit(rsna / TABLE, lambda lines: [line for line in lines if not line.startswith((rsna_id(2), rsna_id(3)))])
    collection = rsna2019(rsna)
    assert len(collection.rows) == 9
    assert collection.notes == (
        f"6 lines of {TABLE} are about images that are not there",
        f"2 DICOM files have no line in {TABLE} and are left out",
    )


def test_rsna_below_another_folder_and_with_a_table_of_ones_own(rsna, tmp_path):
    assert len(rsna2019(tmp_path).rows) == 12
    (rsna / TABLE).rename(rsna / "stage_1_train.csv")
    assert len(rsna2019(rsna).rows) == 12
    (rsna / "stage_1_train.csv").rename(rsna / "mine.csv")
    with pytest.raises(InputError, match=f"has no {TABLE}: put it there, or name the table with --labels"):
        rsna2019(rsna)
    assert len(rsna2019(rsna, Path("mine.csv")).rows) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines, f"{rsna_id(1)}_epidural,0"], f"line 80: {rsna_id(1)}_epidural was 1 before and is 0 here"),
        (lambda lines: [*lines, f"{rsna_id(0)}_any,1"], f"{rsna_id(0)}_any was 0 before and is 1 here"),
        (lambda lines: [line for line in lines if line != f"{rsna_id(4)}_subdural,1"], f"1 images lack one .* first: {rsna_id(4)}"),
        (lambda lines: [line.replace("_any,1", "_any,0") for line in lines], f"not the union .* in 8 images; the first: {rsna_id(1)}"),
        (
            lambda lines: [lines[0], *lines_of(0, any=1), *(line for line in lines[1:] if rsna_id(0) not in line)],
            f"in 1 images; the first: {rsna_id(0)}",
        ),
        (lambda lines: [*lines, f"{rsna_id(1)}_subdual,0"], f"line 80: {rsna_id(1)}_subdual,0 is not ID_NAME_KIND"),
        (lambda lines: [*lines, f"{rsna_id(1)}_any,0.7"], "line 80"),
        (lambda lines: [*lines, f"{rsna_id(1)}_any"], "line 80"),
        (lambda lines: ["image,label", *lines[1:]], "does not begin with ID,Label"),
        (lambda lines: [lines[0], *lines_of(99)], "no line for any DICOM file"),
    ],
)
def test_rsna_tables_that_contradict_themselves_are_refused(rsna, change, message):
    edit(rsna / TABLE, change)
    with pytest.raises(InputError, match=message):
        rsna2019(rsna)


def test_an_rsna_table_that_is_no_text_is_refused(rsna):
    (rsna / TABLE).write_bytes(b"ID,Label\nID_1_any\xff,1\n")
    with pytest.raises(InputError, match="save it as comma-separated UTF-8"):
        rsna2019(rsna)


def test_rsna_files_twice_are_refused(rsna):
    shutil.copytree(rsna / "stage_2_train", rsna / "stage_1_train")
    with pytest.raises(InputError, match="two files are called ID_.*, in stage_1_train and stage_2_train"):
        rsna2019(rsna)


@pytest.mark.parametrize("inside", ["", "AD_NC"])
def test_adni_patients_and_splits(tmp_path, inside):
    collection = adni(write_adni(tmp_path) / inside)
    assert Counter((row.label, row.split) for row in collection.rows) == {
        **{("AD", None): 6, ("AD", "test"): 3},
        **{("NC", None): 6, ("NC", "test"): 3},
    }
    assert {row.patient for row in collection.rows} == {str(218391 + 1000 * subject) for subject in range(6)}
    assert all(row.file.name.startswith(f"{row.patient}_") and row.index is None for row in collection.rows)
    assert collection.rows[0].name == f"{'' if inside else 'AD_NC/'}test/AD/220391_78.jpeg"


def test_adni_subjects_in_names_and_other_groups(tmp_path):
    for group, name in {"CN": "ADNI_002_S_0295_MR_3.nii", "MCI": "I118671_011_S_10021.png", "AD": "003_S_1059/0001.png"}.items():
        (tmp_path / group / name).parent.mkdir(parents=True)
        (tmp_path / group / name).write_bytes(b"")
    assert {(row.label, row.patient) for row in adni(tmp_path).rows} == {
        ("CN", "002_S_0295"),
        ("MCI", "011_S_10021"),
        ("AD", "003_S_1059"),
    }


def test_adni_of_one_group(tmp_path):
    folder = write_adni(tmp_path, subjects=1) / "AD_NC" / "train"
    assert {row.label for row in adni(folder).rows} == {"AD"}


def test_adni_files_without_a_subject_are_refused(tmp_path):
    folder = write_adni(tmp_path)
    (folder / "AD_NC" / "train" / "NC" / "scan.jpeg").write_bytes(b"")
    with pytest.raises(InputError, match="AD_NC/train/NC/scan.jpeg: no subject in the name; 218391_78.jpeg"):
        adni(folder)


def test_an_adni_subject_in_train_and_test_is_found_by_the_split_check(tmp_path):
    folder = write_adni(tmp_path)
    shutil.copy(folder / "AD_NC/test/AD/220391_78.jpeg", folder / "AD_NC/train/AD/220391_79.jpeg")
    rows = adni(folder).rows
    with pytest.raises(InputError, match="patient"):
        check_patient_overlap([row.patient for row in rows], [row.split or "train" for row in rows])


@pytest.mark.parametrize("inside", ["", "keras_png_slices_data"])
def test_oasis_slices_keep_their_splits_and_masks(tmp_path, inside):
    collection = oasis(write_oasis_png(tmp_path) / inside)
    assert Counter(row.split for row in collection.rows) == {"train": 12, "validation": 3, "test": 3}
    assert {(row.split, row.patient) for row in collection.rows if row.split != "train"} == {
        ("validation", "case_005"),
        ("test", "case_006"),
    }
    assert {row.findings for row in collection.rows} == {("brain",)} and not collection.mask_channel and not collection.multi_label
    row = next(row for row in collection.rows if row.file.name == "case_001_slice_2.nii.png")
    assert row.mask.parts[-2:] == ("keras_png_slices_seg_train", "seg_001_slice_2.nii.png") and row.mask.is_file()


def test_oasis_slices_without_masks(tmp_path):
    folder = write_oasis_png(tmp_path) / "keras_png_slices_data"
    for masks in folder.glob("*_seg_*"):
        shutil.rmtree(masks)
    assert {row.mask for row in oasis(folder).rows} == {None}


def test_oasis_slices_take_no_table_and_no_single_split(tmp_path):
    folder = write_oasis_png(tmp_path) / "keras_png_slices_data"
    with pytest.raises(InputError, match="--labels: the keras_png_slices"):
        oasis(folder, Path("x.csv"))
    with pytest.raises(InputError, match="name the folder above it"):
        oasis(folder / "keras_png_slices_train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "keras_png_slices_seg_test" / "seg_006_slice_1.nii.png").unlink(),
            "keras_png_slices_test/case_006_slice_1.nii.png has no seg_006_slice_1.nii.png in keras_png_slices_seg_test",
        ),
        (lambda folder: (folder / "keras_png_slices_test" / "thumbnail.png").touch(), "case_001_slice_0.nii.png is expected"),
        (lambda folder: (folder / "keras_png_slices_extra").mkdir(), "keras_png_slices_extra: train, validate or test"),
        (
            lambda folder: shutil.rmtree(folder / "keras_png_slices_test") or (folder / "keras_png_slices_test").mkdir(),
            "no PNG slices in it",
        ),
    ],
)
def test_wrong_oasis_slices_are_refused(tmp_path, change, message):
    folder = write_oasis_png(tmp_path) / "keras_png_slices_data"
    change(folder)
    with pytest.raises(InputError, match=message):
        oasis(folder)


def test_oasis_volumes_are_one_a_session(tmp_path):
    collection = oasis(write_oasis_nifti(tmp_path))
    assert [row.name for row in collection.rows][-2:] == [f"OASIS_OAS1_0004_MR{k}/aligned_norm.nii.gz" for k in (1, 2)]
    assert [row.patient for row in collection.rows] == ["OAS1_0001", "OAS1_0002", "OAS1_0003", "OAS1_0004", "OAS1_0004"]
    assert all(row.mask == row.file.with_name("aligned_seg4.nii.gz") and row.label == "brain" for row in collection.rows)


def test_oasis_volumes_with_a_table(tmp_path):
    collection = oasis(write_oasis_nifti(tmp_path), Path("oasis_cross-sectional.csv"), "CDR")
    assert [(row.patient, row.label) for row in collection.rows] == [("OAS1_0001", "0.5"), ("OAS1_0002", "0.0"), ("OAS1_0003", "0.5")]
    assert collection.rows[1].facts == Facts("60-69", "female") and collection.prompt_template == "a brain MRI, CDR {label}"
    assert collection.notes == ("2 of 5 volumes have no CDR in oasis_cross-sectional.csv and are left out",)


def test_oasis_2_and_3_by_session_or_subject(tmp_path):
    names = [
        *("OAS2_0001_MR1/mpr-1.nii", "OAS2_0001_MR2/mpr-1.nii", "OAS2_0002_MR1/mpr-1.nii", "OAS2_0002_MR1/mpr_mask.nii"),
        *(f"sub-OAS30001/ses-d0129/anat/sub-OAS30001_ses-d0129_{kind}.nii.gz" for kind in ("T1w", "T2w")),
        *("OAS30002_MR_d0653/anat2/NIFTI/x.nii.gz", "atlas/brain.nii"),
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    collection = oasis(tmp_path)
    assert {row.patient for row in collection.rows} == {"OAS2_0001", "OAS2_0002", "OAS30001", "OAS30002"} and len(collection.rows) == 5
    assert collection.notes == ("1 volumes name no OASIS subject and are left out",)
    write_lines(tmp_path / "two.csv", ["Subject ID,MRI ID,Group", "OAS2_0001,OAS2_0001_MR1,Converted", "OAS2_0001,OAS2_0001_MR2,Demented"])
    assert [row.label for row in oasis(tmp_path, Path("two.csv"), "Group").rows] == ["Converted", "Demented"]
    write_lines(tmp_path / "three.csv", ["OASIS_session_label,dx", "OAS30001_MR_d0129,AD", "OAS30002_MR_d0653,CN"])
    found = {(row.patient, row.label) for row in oasis(tmp_path, Path("three.csv"), "dx").rows}
    assert found == {("OAS30001", "AD"), ("OAS30002", "CN")}
    write_lines(tmp_path / "subjects.csv", ["Subject,dx", "OAS2_0001,AD"])
    assert len(oasis(tmp_path, Path("subjects.csv"), "dx").rows) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["ID,Age", "OAS1_0001_MR1,60"], 'no column "CDR" \\(--label_column\\); it has ID, Age'),
        (["who,CDR", "OAS1_0001_MR1,0"], "no column MRI ID, ID"),
        (["ID,CDR", "OAS1_0001_MR1,0", "OAS1_0001_MR1,0.5"], "line 3: OAS1_0001_MR1 is 0.5 here and 0 before"),
        (["ID,CDR", "OAS1_0001_MR1,"], "gives no CDR for any of the 5 volumes"),
    ],
)
def test_wrong_oasis_tables_are_refused(tmp_path, lines, message):
    write_lines(write_oasis_nifti(tmp_path, slices=1) / "wrong.csv", lines)
    with pytest.raises(InputError, match=message):
        oasis(tmp_path, Path("wrong.csv"), "CDR")


@pytest.mark.parametrize("year", [2020, 2021, 2023])
def test_brats_channels_of_every_year(tmp_path, year):
    folder = write_brats(tmp_path, year)
    collection = brats(folder)
    words = [[file.name.split(".")[0].replace("-", "_").split("_")[-1] for file in row.files] for row in collection.rows]
    assert words == [["t1n", "t1c", "t2w", "t2f"] if year == 2023 else ["t1", "t1ce", "t2", "flair"]] * 3
    assert all(row.mask.name.split(".")[0].endswith("seg") and row.findings == () and row.mask.is_file() for row in collection.rows)
    assert collection.mask_classes == ("no tumour", "tumour") and not collection.mask_channel
    patients = {2020: "BraTS20_Training_001", 2021: "BraTS2021_00000", 2023: "BraTS-GLI-00000"}
    assert collection.rows[0].patient == patients[year] and len({row.patient for row in collection.rows}) == (2 if year == 2023 else 3)


def test_brats_numbers_of_channels(tmp_path):
    folder = write_brats(tmp_path, 2023, cases=1)
    for channels, files, mask_channel in [
        (("t1ce",), ["t1c"], False),
        (("T1c", "mask"), ["t1c"], True),
        (("flair", "t1", "seg"), ["t2f", "t1n"], True),
        (("t1", "t1ce", "t2", "flair", "mask"), ["t1n", "t1c", "t2w", "t2f"], True),
    ]:
        collection = brats(folder, channels)
        (row,) = collection.rows
        assert [file.name.split("-")[-1] for file in row.files] == [f"{word}.nii.gz" for word in files]
        assert collection.mask_channel is mask_channel and row.mask.name.endswith("seg.nii.gz")


def test_brats_case_355(tmp_path):
    case = write_brats(tmp_path / "MICCAI_BraTS2020_TrainingData", cases=1) / "BraTS20_Training_001"
    (case / f"{case.name}_seg.nii").rename(case / "W39_1998.09.19_Segm.nii")
    (row,) = brats(tmp_path).rows
    assert row.mask.name == "W39_1998.09.19_Segm.nii" and row.name == "MICCAI_BraTS2020_TrainingData/BraTS20_Training_001"


def test_brats_fixture_has_tumours_in_some_slices():
    volumes = brats_volumes(0, 2020, 32, 6)
    holding = (volumes["seg"] > 0).any((0, 1))
    assert holding.any() and not holding.all() and set(volumes["seg"].ravel().tolist()) == {0, 2, 4}
    assert set(brats_volumes(0, 2023, 32, 6)["seg"].ravel().tolist()) == {0, 2, 3}


@pytest.mark.parametrize(
    ("lost", "channels", "message"),
    [
        ("seg", None, "BraTS20_Training_002 has no seg file: move cases of the validation"),
        ("t2", None, "BraTS20_Training_002 has no t2 file"),
        (None, ("t1", "dwi"), "--channels dwi: BraTS has t1, t1ce, t2, flair, mask"),
        (None, ("t1ce", "t1c"), "a channel twice"),
        (None, ("mask",), "behind at least one image"),
        (None, ("mask", "t1"), "put it last"),
    ],
)
def test_wrong_brats_cases_are_refused(tmp_path, lost, channels, message):
    folder = write_brats(tmp_path, cases=2, slices=3)
    if lost:
        (folder / "BraTS20_Training_002" / f"BraTS20_Training_002_{lost}.nii").unlink()
    with pytest.raises(InputError, match=message):
        brats(folder, channels)


def test_brats_files_twice_or_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="no BraTS case below"):
        brats(tmp_path)
    case = write_brats(tmp_path, cases=1, slices=1) / "BraTS20_Training_001"
    shutil.copy(case / f"{case.name}_t1.nii", case / f"{case.name}_t1.nii.gz")
    with pytest.raises(InputError, match="BraTS20_Training_001 has two files for t1"):
        brats(tmp_path)


def test_medmnist_classes_are_known_by_the_file(tmp_path):
    assert len(MEDMNIST_CLASSES) == 12
    assert all(len(class_tokens(names)) == len(names) for names in MEDMNIST_CLASSES.values())
    assert medmnist(write_medmnist(tmp_path / "a")).rows[1].label == "pneumonia"
    assert medmnist(write_medmnist(tmp_path / "b", "octmnist_64", classes=4)).class_names[2] == "drusen"
    chest = medmnist(write_medmnist(tmp_path / "c", "chestmnist", findings=14))
    assert chest.multi_label and len(chest.class_names) == 14 and chest.rows[1].findings[0] == "effusion"
    other = medmnist(write_medmnist(tmp_path / "d", "mine"))
    assert other.class_names is None and [row.label for row in other.rows[:2]] == ["0", "1"]
    assert medmnist(tmp_path / "a", ("no", "yes")).class_names == ("no", "yes")
    with pytest.raises(InputError, match="label 2 has no name"):
        medmnist(write_medmnist(tmp_path / "e", "breastmnist", classes=3))


def test_real_pneumoniamnist(real_data):
    collection = medmnist(real_data / "pneumoniamnist_28")
    assert collection.class_names == ("normal", "pneumonia")
    assert Counter(row.split for row in collection.rows) == {"train": 2428, "validation": 270, "test": 468}
    assert Counter(row.label for row in collection.rows if row.split == "train") == {"normal": 1214, "pneumonia": 1214}


def test_a_collection_is_read_by_its_name(tmp_path):
    write_adni(tmp_path / "adni"), write_brats(tmp_path / "brats", cases=1, slices=1), write_oasis_nifti(tmp_path / "oasis", slices=1)
    assert read_collection("adni", tmp_path / "adni") == adni(tmp_path / "adni")
    assert read_collection("brats", tmp_path / "brats", channels=("t1",)) == brats(tmp_path / "brats", ("t1",))
    table = Path("oasis_cross-sectional.csv")
    assert read_collection("oasis", tmp_path / "oasis", table, "CDR") == oasis(tmp_path / "oasis", table, "CDR")
    assert set(COLLECTIONS) == {"rsna2019", "adni", "oasis", "brats"}


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("adni", {"labels": Path("x.csv")}, "--labels has no meaning for --source adni"),
        ("rsna2019", {"channels": ("t1",)}, "--channels has no meaning for --source rsna2019"),
        ("brats", {"labels": Path("x.csv")}, "--labels has no meaning"),
    ],
)
def test_flags_without_meaning_are_refused(tmp_path, source, flags, message):
    with pytest.raises(InputError, match=message):
        read_collection(source, tmp_path, **flags)


@pytest.mark.parametrize("source", COLLECTIONS)
def test_missing_and_empty_folders_are_refused(tmp_path, source):
    with pytest.raises(InputError, match="no such folder"):
        read_collection(source, tmp_path / "nowhere")
    with pytest.raises(InputError):
        read_collection(source, tmp_path)
