"""Folders, tables, NIfTI trees and npz files as rows, and every way in which they can be wrong."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from medsd.data.files import is_nifti
from medsd.data.metadata import Facts
from medsd.data.rows import stem_of, words_of
from medsd.data.sources import findings_table, image_folder, nifti_tree, npz, table
from medsd.errors import InputError
from tests.collection_layouts import write_chest_csv, write_chexpert, write_medmnist


def touch(folder, *names):
    """Files whose content no source looks at."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def lines(folder, *text):
    (folder / "labels.csv").write_text("\n".join(text))
    return Path("labels.csv")


def test_names_are_taken_apart():
    assert is_nifti(Path("a.nii")) and is_nifti(Path("a.NII.GZ")) and not is_nifti(Path("a.nii.png")) and not is_nifti(Path("a.gz"))
    assert stem_of("a.nii.gz") == stem_of("a.png") == "a" and stem_of("case_1.nii.png") == "case_1.nii"
    assert words_of("BraTS-GLI_T1ce.x y") == ["brats", "gli", "t1ce", "x", "y"]


def test_class_folders_and_splits(tmp_path):
    touch(tmp_path / "a", "cat/1.png", "cat/deep/2.jpg", "dog/1.png", "cat/notes.txt", "cat/._1.png", ".hidden/3.png")
    found = {row.name: (row.label, row.split) for row in image_folder(tmp_path / "a")}
    assert found == {"cat/1.png": ("cat", None), "cat/deep/2.jpg": ("cat", None), "dog/1.png": ("dog", None)}
    touch(tmp_path / "b", "Training/cat/1.png", "val/cat/2.png", "test/dog/1.png")
    assert [(row.label, row.split) for row in image_folder(tmp_path / "b")] == [("cat", "train"), ("dog", "test"), ("cat", "validation")]


def test_a_flat_folder_is_one_class(tmp_path):
    rows = image_folder(touch(tmp_path / "flat", "1.png", "2.png", "readme.txt"))
    assert [(row.name, row.findings) for row in rows] == [("1.png", ("image",)), ("2.png", ("image",))]
    rows = image_folder(touch(tmp_path / "split", "train/1.png", "test/1.png"))
    assert {(row.name, row.label, row.split) for row in rows} == {
        ("train/1.png", "image", "train"),
        ("test/1.png", "image", "test"),
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "no such folder"),
        (("notes.txt",), "one folder per class is expected"),
        (("cat/1.png", "image/x.txt"), r"class image: no image that this --source reads \(x.txt is none\) in image"),
        (("train/cat/1.png", "train/dog/x.txt"), "class dog: no image that .* in train/dog"),
        (("train/cat/1.png", "extra/1.png"), "splits or classes"),
    ],
)
def test_folders_without_images_are_refused(tmp_path, names, message):
    touch(tmp_path / "scans", *names)
    with pytest.raises(InputError, match=message):
        image_folder(tmp_path / "scans")


def test_images_without_a_line_are_counted_and_masks_are_none(tmp_path):
    folder = touch(tmp_path, "1.png", "2.png", "3.png", "m/1.png")
    labels = lines(folder, "file,label,mask", "1.png,cat,m/1.png")
    assert table(folder, labels, "label", mask_column="mask").notes == ("2 images have no line in labels.csv and are left out",)
    several = lines(folder, "file,mass,mask", "1.png,1,m/1.png", "2.png,-1,")
    notes = findings_table(folder, several, ("mass",), mask_column="mask").notes
    assert len(notes) == 2 and notes[1] == "1 images have no line in labels.csv and are left out"
    whole = lines(folder, "file,label,mask", "1.png,cat,m/1.png", "2.png,cat,", "3.png,dog,")
    assert table(folder, whole, "label", mask_column="mask").notes == ()


def test_a_table_names_files_by_path_name_or_stem(tmp_path):
    folder = touch(tmp_path, "x/1.png", "y/2.png", "y/3.png", "y/4.nii.gz", "m/1.png")
    labels = lines(
        folder,
        "Image_ID,label,who,fold,mask,Patient Age,Sex,Manufacturer,secret",
        "x/1.png,cat,p1,train,m/1.png,64,F,GE,s",
        "2.png,dog,,valid,,,,,s",
        "3,cat,p1,test,,,,,s",
        "4,dog,p2,test,,,,,s",
    )
    rows = table(folder, labels, "label", None, "who", "fold", "mask", accepts=lambda path: path.suffix == ".png" or is_nifti(path)).rows
    assert [row.name for row in rows] == ["x/1.png", "y/2.png", "y/3.png", "y/4.nii.gz"]
    assert [row.findings for row in rows] == [("cat",), ("dog",), ("cat",), ("dog",)]
    assert [(row.patient, row.split) for row in rows] == [("p1", "train"), (None, "validation"), ("p1", "test"), ("p2", "test")]
    assert [row.mask for row in rows] == [folder / "m/1.png", None, None, None]
    assert rows[0].facts == Facts("60-69", "female", "GE", None) and rows[1].facts == Facts()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (["file,label", "2.png,"], 'labels.csv, line 2: "label" is empty; give the image a label or drop the line'),
        (["file,label", "x/1.png,cat", "2.png,-1"], 'line 3: "label" is -1, which names no class; .*drop the line'),
        (["file,label", "x/1.png,NaN"], '"label" is NaN'),
        (["scan,label", "a,b"], "--image_column"),
        (["file,class", "2.png,cat"], 'no column "label" \\(--label_column\\); it has file, class'),
        (["file,label", "gone.png,cat"], 'line 2: image "gone.png" is not below'),
        (["file,label", "1.png,cat"], '2 files are called "1.png"'),
        (["file,label", "2.png,cat", "y/2.png,dog"], "several lines for y/2.png"),
        (["file,label"], "no line in it"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, text, message):
    folder = touch(tmp_path, "x/1.png", "y/1.png", "y/2.png")
    with pytest.raises(InputError, match=message):
        table(folder, lines(folder, *text), "label")


def test_a_wrong_split_or_column_is_refused(tmp_path):
    labels = lines(touch(tmp_path, "1.png"), "file,label,fold", "1.png,cat,holdout")
    with pytest.raises(InputError, match='split "holdout"'):
        table(tmp_path, labels, "label", split_column="fold")
    with pytest.raises(InputError, match="--patient_column"):
        table(tmp_path, labels, "label", patient_column="who")
    with pytest.raises(InputError, match='no column "lesion"'):
        table(tmp_path, labels, "label", mask_column="lesion")
    with pytest.raises(InputError, match="no such file"):
        table(tmp_path, Path("none.csv"), "label")
    with pytest.raises(InputError, match="a byte 0 in a cell"):
        table(tmp_path, lines(tmp_path, "file,label", "1.png,ca\0t"), "label")
    (tmp_path / "latin.csv").write_bytes("file,label\n1.png,böse\n".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        table(tmp_path, Path("latin.csv"), "label")


def test_findings_in_several_columns(tmp_path):
    folder = touch(tmp_path, "1.png", "2.png", "3.png", "4.png")
    labels = lines(folder, "file,edema,mass,who,view", "1,1,0,a,AP", "2,1.0,True,a,PA", "3,no,0.0,b,", "4,YES,false,b,x")
    collection = findings_table(folder, labels, ("mass", "edema"), patient_column="who")
    assert [row.findings for row in collection.rows] == [("edema",), ("mass", "edema"), (), ("edema",)]
    assert collection.class_names == ("mass", "edema") and collection.multi_label and collection.notes == ()
    assert [row.patient for row in collection.rows] == ["a", "a", "b", "b"]
    assert [row.facts.view for row in collection.rows] == ["AP", "PA", None, None]


@pytest.mark.parametrize(
    ("uncertain", "expected"),
    [
        ("drop", [("Cardiomegaly",), ("Cardiomegaly",)]),
        ("positive", [("Cardiomegaly",), ("Cardiomegaly", "Edema"), ("Cardiomegaly",), ("Cardiomegaly",)]),
        ("negative", [("Cardiomegaly",), ("Edema",), (), ("Cardiomegaly",)]),
    ],
)
def test_uncertain_findings_follow_the_flag(tmp_path, uncertain, expected):
    collection = findings_table(write_chexpert(tmp_path), Path("train.csv"), ("Cardiomegaly", "Edema"), uncertain)
    assert [row.findings for row in collection.rows] == expected
    assert bool(collection.notes) == (uncertain == "drop") and all("2 of 4 images left out" in note for note in collection.notes)
    assert collection.rows[0].facts == Facts("60-69", "female", None, "AP")


def test_one_column_of_flags_is_one_finding(tmp_path):
    labels = lines(touch(tmp_path, "1.png", "2.png"), "file,edema", "1,1", "2,0")
    assert [row.findings for row in findings_table(tmp_path, labels, ("edema",)).rows] == [("edema",), ()]


def test_findings_joined_in_one_column(tmp_path):
    folder = write_chest_csv(tmp_path / "nih")
    collection = findings_table(folder, Path("Data_Entry_2017.csv"), ("Finding Labels",), patient_column="Patient ID")
    assert Counter(row.findings for row in collection.rows) == dict.fromkeys(
        [(), ("Cardiomegaly",), ("Cardiomegaly", "Effusion"), ("Effusion",)], 2
    )
    assert collection.class_names is None and collection.multi_label
    assert [row.patient for row in collection.rows] == list("11223344")
    assert collection.rows[1].facts == Facts("50-59", "male", None, "AP")
    labels = lines(touch(tmp_path, "1.png", "2.png", "3.png"), "file,found", "1,mass; edema", "2,No finding", "3,")
    found = {rule: [row.findings for row in findings_table(tmp_path, labels, ("found",), rule).rows] for rule in ("drop", "negative")}
    assert found == {"drop": [("edema", "mass"), ()], "negative": [("edema", "mass"), (), ()]}
    with pytest.raises(InputError, match='labels.csv, line 4: "found" is empty'):
        findings_table(tmp_path, labels, ("found",), "positive")


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        (["file,a,b", "1,1,0", "2,maybe,0"], ("a", "b"), 'labels.csv, line 3: "a" is "maybe"; 0 or 1'),
        (["file,a,b", "1,1,2"], ("a", "b"), 'line 2: "b" is "2"'),
        (["file,a", "1,mass", "2,1"], ("a",), 'line 3: "a" is "1", with "1" in it'),
        (["file,a", "1,mass|", "2,mass"], ("a",), 'line 2: "a" is "mass|"'),
        (["file,a", "1,mass|No Finding"], ("a",), 'with "No Finding" in it'),
        (["file,a,b", "1,-1,1", "2,,0"], ("a", "b"), "no line without an uncertain finding; --uncertain negative"),
        (["file,a", "1,1"], ("a", "b"), 'no column "b"'),
        (["file,a,b", "1,1,0", "1.png,1,0"], ("a", "b"), "several lines for 1.png"),
    ],
)
def test_wrong_findings_are_refused(tmp_path, text, columns, message):
    with pytest.raises(InputError, match=message.replace("|", "\\|")):
        findings_table(touch(tmp_path, "1.png", "2.png"), lines(tmp_path, *text), columns)


CASES = ("p1/x_t1.nii.gz", "p1/x_T1ce.nii", "p1/x-seg.nii.gz", "p2/y_t1.nii.gz", "p2/y_t1ce.nii.gz", "p2/y_seg.nii.gz")


def test_every_volume_is_a_row(tmp_path):
    rows = nifti_tree(touch(tmp_path / "a", "well/1.nii", "ill/2.nii.gz", "ill/2.json")).rows
    assert [(row.name, row.findings) for row in rows] == [("ill/2.nii.gz", ("ill",)), ("well/1.nii", ("well",))]
    assert nifti_tree(touch(tmp_path / "b", "1.nii")).rows[0].findings == ("image",)
    labels = lines(tmp_path / "a", "file,grade,who", "1,low,p", "2.nii.gz,high,q")
    rows = nifti_tree(tmp_path / "a", labels=labels, label_column="grade", patient_column="who").rows
    assert [(row.name, row.label, row.patient) for row in rows] == [("well/1.nii", "low", "p"), ("ill/2.nii.gz", "high", "q")]


def test_channels_are_stacked_and_the_mask_labels_slices(tmp_path):
    collection = nifti_tree(touch(tmp_path, *CASES), ("t1ce", "t1", "mask"))
    assert [row.name for row in collection.rows] == ["p1", "p2"] and collection.notes == ()
    assert [file.name for file in collection.rows[0].files] == ["x_T1ce.nii", "x_t1.nii.gz"]
    assert [row.mask.name for row in collection.rows] == ["x-seg.nii.gz", "y_seg.nii.gz"]
    assert collection.mask_channel and collection.mask_classes == ("no lesion", "lesion")
    assert all(row.findings == () and row.split is None for row in collection.rows)
    alone = nifti_tree(tmp_path, ("post=t1ce",))
    assert not alone.mask_channel and alone.mask_classes is None and {row.findings for row in alone.rows} == {("image",)}
    assert [row.mask for row in alone.rows] == [None, None] and alone.rows[0].files[0].name == "x_T1ce.nii"


def test_cases_are_labelled_by_folders_or_a_table(tmp_path):
    touch(tmp_path / "a", *(f"{place}{name}" for place, name in zip(["train/low/"] * 3 + ["test/high/"] * 3, CASES, strict=True)))
    collection = nifti_tree(tmp_path / "a", ("t1", "mask"))
    assert {(row.name, row.findings, row.split) for row in collection.rows} == {
        ("train/low/p1", ("low",), "train"),
        ("test/high/p2", ("high",), "test"),
    }
    assert collection.mask_classes is None and collection.mask_channel
    labels = lines(touch(tmp_path / "b", *CASES), "case,label,sex", "p2,high,m", "p1,low,f")
    rows = nifti_tree(tmp_path / "b", ("t1", "mask"), labels, image_column="case").rows
    assert [(row.name, row.label, row.facts.sex, row.mask.name) for row in rows] == [
        ("p2", "high", "male", "y_seg.nii.gz"),
        ("p1", "low", "female", "x-seg.nii.gz"),
    ]


def test_the_folder_itself_can_be_the_case(tmp_path):
    row = nifti_tree(touch(tmp_path / "case_7", "x_t1.nii", "x_t2.nii"), ("t1", "t2")).rows[0]
    assert row.name == "case_7" and [file.name for file in row.files] == ["x_t1.nii", "x_t2.nii"]


def test_cases_that_lack_channels_are_left_out_and_counted(tmp_path):
    collection = nifti_tree(touch(tmp_path, *CASES, "p3/z_t1.nii", "p4/ct.nii", "p5/ct.nii"), ("t1", "t1ce"))
    assert [row.name for row in collection.rows] == ["p1", "p2"]
    assert collection.notes == (
        "folders left out for lack of a channel: 1 (the first: p3 has no t1ce)",
        "folders left out without any of the channels: 2",
    )


@pytest.mark.parametrize(
    ("names", "channels", "message"),
    [
        (CASES, ("t1", "t2"), "has a volume for each of --channels t1 t2: p1 has no t2"),
        (CASES, ("dwi",), "NAME=WORD"),
        ((*CASES, "p2/again_t1.nii"), ("t1", "mask"), r"p2: 2 files for channel t1 \(again_t1.nii, y_t1.nii.gz\)"),
        ((*CASES, "p2/label.nii"), ("t1", "mask"), "p2: 2 files for channel mask"),
        (CASES, ("t1", "t1"), "a channel twice"),
        (CASES, ("mask", "t1"), "put it last"),
        (CASES, ("mask",), "behind at least one image"),
        ((*CASES, "low/p3/t1.nii"), ("t1",), "low/p3 lies in a folder for a class, p1 does not"),
        ((*CASES, "train/p3/t1.nii"), ("t1",), "train/p3 lies in a folder for a split, p1 does not"),
        ((), ("t1",), "no such folder"),
    ],
)
def test_wrong_channels_are_refused(tmp_path, names, channels, message):
    touch(tmp_path / "scans", *names)
    with pytest.raises(InputError, match=message):
        nifti_tree(tmp_path / "scans", channels)


def test_npz_reads_labels_only(tmp_path):
    file = write_medmnist(tmp_path)
    collection = npz(file, ("normal", "pneumonia"))
    assert Counter(row.split for row in collection.rows) == {"train": 8, "validation": 4, "test": 4}
    assert [row.label for row in collection.rows[:3]] == ["normal", "pneumonia", "normal"] and not collection.multi_label
    assert (collection.rows[9].array, collection.rows[9].index) == ("val_images", 1)
    assert npz(tmp_path).rows == npz(file).rows and npz(file).class_names is None and npz(file).rows[1].label == "1"


def test_npz_with_an_empty_split_and_flat_labels(tmp_path):
    arrays = {"train_images": np.zeros((2, 4, 4)), "train_labels": np.array([1, 0]), "test_images": np.zeros((0, 4, 4))}
    np.savez(tmp_path / "x.npz", **arrays, test_labels=np.zeros((0, 1), np.uint8))
    assert [(row.label, row.split) for row in npz(tmp_path / "x.npz").rows] == [("1", "train"), ("0", "train")]


def test_npz_with_several_findings(tmp_path):
    file = write_medmnist(tmp_path, findings=4)
    collection = npz(file, ("a", "b", "c", "d"))
    assert collection.multi_label and collection.class_names == ("a", "b", "c", "d")
    with np.load(file) as archive:
        expected = [tuple("abcd"[k] for k in np.flatnonzero(line)) for line in archive["train_labels"]]
    assert [row.findings for row in collection.rows[:8]] == expected and ("a", "d") in expected
    assert npz(file).class_names == ("0", "1", "2", "3") and npz(file).rows[0].findings == ("0", "3")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_images": np.zeros((2, 4, 4))}, "train_images has no train_labels"),
        ({"pictures": np.zeros(2)}, "no array ends in _images"),
        ({"train_images": np.zeros((2, 4, 4)), "train_labels": np.array([[0], [2]])}, "label 2 has no name"),
        ({"train_images": np.zeros((1, 4, 4)), "train_labels": np.array([[0, 2]])}, "2 numbers 0 or 1"),
        ({"train_images": np.zeros((1, 4, 4)), "train_labels": np.array([[0, 1, 1]])}, "2 numbers 0 or 1"),
        ({"fold_images": np.zeros((1, 4, 4)), "fold_labels": np.array([[0]])}, 'split "fold"'),
        (
            {
                "train_images": np.zeros((1, 4, 4)),
                "train_labels": np.ones((1, 2)),
                "val_images": np.zeros((1, 4, 4)),
                "val_labels": np.ones((1, 1)),
            },
            "different numbers of labels",
        ),
        ({"train_images": np.zeros((2, 28, 28, 28)), "train_labels": np.zeros(2)}, "no volumes"),
        ({"train_images": np.zeros((1, 4, 4)), "train_labels": np.array(["a"])}, "an array of type <U1"),
        ({"train_images": np.zeros((1, 4, 4)), "train_labels": np.zeros((1, 1, 1))}, "has the shape"),
    ],
)
def test_wrong_npz_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=message):
        npz(tmp_path / "x.npz", ("a", "b"))


def test_a_folder_without_one_npz_is_refused(tmp_path):
    with pytest.raises(InputError, match="0 npz files"):
        npz(tmp_path)
    (tmp_path / "x.npz").write_bytes(b"PK broken")
    with pytest.raises(InputError, match="x.npz: cannot be decoded"):
        npz(tmp_path)


def test_real_glioma_volumes(real_data):
    collection = nifti_tree(real_data / "nifti_glioma_4ch", ("t1", "t1c", "t2", "fla", "mask=simple"))
    (row,) = collection.rows
    assert [file.name.split("_")[1] for file in row.files] == ["t1", "t1c", "t2", "fla"] and row.mask.name == "simple.nii.gz"
    assert collection.mask_channel and collection.mask_classes == ("no lesion", "lesion")
    assert collection.notes == ("folders left out for lack of a channel: 1 (the first: TCGA-FG-6692_native has no t1c)",)
    assert len(nifti_tree(real_data / "nifti_glioma_4ch", ("t1",)).rows) == 2
    with pytest.raises(InputError, match="look like volumes of one case: stack them with --channels"):
        nifti_tree(real_data / "nifti_glioma_4ch")


def test_real_chest_xrays(real_data):
    rows = table(real_data / "chest_xray_hannover", Path("data.csv"), "projection", patient_column="patient_id").rows
    assert Counter(row.label for row in rows) == {"ap": 32, "pa": 24}
    assert all(row.facts.view == row.label.upper() and row.facts.sex in {"female", "male"} and row.patient for row in rows)
    assert rows[0].name == "png/fff13f3a.png" and rows[0].patient == "024e7871"


def test_real_brain_mri_in_folders_and_in_a_table(real_data):
    rows = image_folder(real_data / "brain_mri_4class")
    assert Counter((row.split, row.label) for row in rows)[("train", "notumor")] == 152 and len(rows) == 711
    rows = table(real_data / "brain_mri_t1ce_3class", Path("labels.csv"), "label", patient_column="pseudo_group").rows
    assert Counter(row.label for row in rows) == {"glioma": 182, "pituitary": 126, "meningioma": 98}


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        ([f"{name}/p{number}/{image}.png" for name in ("cat", "dog") for number in range(3) for image in range(2)], {"/p0", "/p1", "/p2"}),
        (
            [f"{split}/cat/{number}/1.png" for split in ("train", "test") for number in range(3)],
            {"train/0", "train/2", "test/0"},
        ),
        (["COVID/images1/1.png", "COVID/images2/2.png", "Normal/images1/1.png"], {None}),
        ([f"cat/{plane}/1.png" for plane in ("axial", "coronal", "sagittal")], {None}),
        ([f"cat/{weighting}/1.png" for weighting in ("t1", "t2", "flair")], {None}),
        ([*(f"train/cat/p{number}/1.png" for number in range(3)), "train/cat/2.png"], {None}),
    ],
)
def test_numbered_folders_below_classes_are_patients(tmp_path, names, groups):
    rows = image_folder(touch(tmp_path, *names))
    assert {row.group for row in rows} >= groups and all(row.patient is None for row in rows) and (None in groups or rows[0].group)


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (("p1/a_t1.nii", "p1/a_t2.nii"), True),
        (("MS/p1_t2_flair.nii.gz", "MS/p2_t2_flair.nii.gz"), False),
        (("MS/p1_t1.nii.gz", "MS/p2_t1.nii.gz", "HC/p3.nii.gz"), False),
        (("MS/p1_t1.nii.gz", "MS/p1_seg.nii.gz"), True),
    ],
)
def test_volumes_of_one_case_are_not_taken_for_cases(tmp_path, names, refused):
    folder = touch(tmp_path, *names)
    if refused:
        with pytest.raises(InputError, match="look like volumes of one case: stack them with --channels t1"):
            nifti_tree(folder)
    else:
        assert len(nifti_tree(folder).rows) == len(names)


def test_folders_of_nnu_net_are_no_classes(tmp_path):
    folder = touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    with pytest.raises(InputError, match="imagesTr is no class"):
        nifti_tree(folder)


def test_tables_with_other_separators_are_named(tmp_path):
    folder = touch(tmp_path, "1.png")
    for separator, name in {";": "semicolons", "\t": "tabs"}.items():
        with pytest.raises(InputError, match=f"separated by {name}: save it with commas"):
            table(folder, lines(folder, separator.join(["file", "label"]), separator.join(["1.png", "cat"])), "label")


def test_a_file_of_another_kind_is_not_called_missing(tmp_path):
    folder = touch(tmp_path, "1.png", "x/2.dcm")
    with pytest.raises(InputError, match='image "2.dcm" is no kind of file that this --source reads'):
        table(folder, lines(folder, "file,label", "2.dcm,cat"), "label")


def test_a_wrong_folder_in_a_table_is_named(tmp_path):
    folder = touch(tmp_path, "img/1.png")
    with pytest.raises(InputError, match='image "images/1.png" is not there, but img/1.png is'):
        table(folder, lines(folder, "file,label", "images/1.png,cat"), "label")


def test_an_empty_split_is_left_to_be_divided(tmp_path):
    folder = touch(tmp_path, "1.png", "2.png")
    rows = table(folder, lines(folder, "file,label,fold", "1.png,cat,test", "2.png,cat,"), "label", split_column="fold").rows
    assert [row.split for row in rows] == ["test", None]


def test_one_wrong_flag_is_not_taken_for_a_name(tmp_path):
    folder = touch(tmp_path, "1.png", "2.png", "3.png")
    with pytest.raises(InputError, match='line 3: "edema" is "maybe"; 0 or 1 is expected'):
        findings_table(folder, lines(folder, "file,edema", "1.png,0.0", "2.png,maybe", "3.png,1"), ("edema",))
