"""From files to a data folder: geometry, splits, privacy, refusals."""

import csv
import io
import json
import os
import stat
from dataclasses import replace

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from medsd.commandline import parse
from medsd.config import PrepareDataConfig
from medsd.data.dataset import load_dataset, load_info
from medsd.data.files import is_raster
from medsd.data.geometry import fit_square
from medsd.data.intensity import Range, parse_windows
from medsd.data.prepare import PrepareOptions, load_salt, prepare, prepare_phantom
from medsd.data.shards import panels_of
from medsd.data.sources import image_folder, npz, table
from medsd.data.splits import SPLITS
from medsd.data.transforms import TrainingOrder, shift
from medsd.errors import InputError
from medsd.output import check_output
from recipes.prepare_data import main

OPTIONS = PrepareOptions(resolution=16, num_workers=0)
SALT = b"a salt for tests only"


def images(folder, classes=("benign", "malignant"), count=12, side=20, seed=0):
    generator = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.fromarray(generator.integers(0, 256, (side, side + 4), dtype=np.uint8)).save(folder / name / f"Doe-{index}.png")
    return folder


def test_folder_to_data_and_back(tmp_path):
    rows = image_folder(images(tmp_path / "scans"))
    summary = prepare(rows, tmp_path / "data", OPTIONS, SALT, "test")
    assert sum(summary["images"].values()) == 24 and summary["patient_rule"] == {"file": 24}
    plain = datasets.load_dataset(str(tmp_path / "data"))
    assert list(plain) == ["train", "validation", "test"] and plain["train"].features["label"].names == ["benign", "malignant"]
    first = load_dataset(tmp_path / "data", split="train")[0]
    assert first["image"].shape == (1, 16, 16) and first["image"].dtype == np.uint8
    assert first["prompt"] in {"a medical image of <benign>", "a medical image of <malignant>"}
    assert first["preview"].size == (16, 16)


def test_streaming_reads_the_same_shards(tmp_path):
    prepare(image_folder(images(tmp_path / "scans")), tmp_path / "data", OPTIONS, SALT, "test")
    stream = datasets.load_dataset(str(tmp_path / "data"), split="test", streaming=True)
    keys = [row["key"] for row in stream]
    assert keys == list(load_dataset(tmp_path / "data", split="test")["key"])
    decoded = load_dataset(tmp_path / "data", split="test", streaming=True)
    for row, other in zip(decoded, load_dataset(tmp_path / "data", split="test"), strict=True):
        np.testing.assert_array_equal(row["image"], other["image"])
        assert row["key"] == other["key"] and row["label"] == other["label"]


def test_names_stay_in_the_private_folder(tmp_path):
    (images(tmp_path / "scans") / "benign" / "Doe-broken.png").write_bytes(b"broken")
    prepare(image_folder(tmp_path / "scans"), tmp_path / "data", replace(OPTIONS, max_quarantine=0.2), SALT, "test")
    for file in (tmp_path / "data").rglob("*"):
        assert file.is_dir() or b"Doe" not in file.read_bytes()
    quarantine = json.loads((tmp_path / "data" / "quarantine.jsonl").read_text())
    assert quarantine["stage"] == "decode" and "cannot be decoded" in quarantine["reason"]
    private = tmp_path / "data.private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    keys = pyarrow.parquet.read_table(private / "keys.parquet").to_pydict()
    assert set(keys) == {"key", "file", "frame", "patient", "sop_uid"} and "Doe-0.png" in keys["file"][0]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    rows = image_folder(images(tmp_path / "scans"))
    for name, order in {"a": rows, "b": rows}.items():
        prepare(order, tmp_path / name, OPTIONS, SALT, "test")
    for file in (tmp_path / "a").rglob("*.*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_table_with_patients_splits_by_patient(tmp_path):
    folder = images(tmp_path / "scans", count=30)
    with (folder / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["file", "label", "who"])
        writer.writeheader()
        for row in image_folder(folder):
            writer.writerow({"file": row.name, "label": row.label, "who": int(row.file.stem.split("-")[1]) // 3})
    rows = table(folder, folder / "labels.csv", "label", patient_column="who").rows
    prepare(rows, tmp_path / "data", OPTIONS, SALT, "test")
    owners = {split: set(load_dataset(tmp_path / "data", split=split)["patient_id"]) for split in ("train", "validation", "test")}
    assert not owners["train"] & owners["test"] and not owners["train"] & owners["validation"] and not owners["validation"] & owners["test"]
    assert sum(map(len, owners.values())) == 10


def test_given_splits_are_kept_and_checked(tmp_path):
    folder = images(tmp_path / "scans", count=6)
    lines = ["image,label,patient,fold"] + [
        f"{row.name},{row.label},p{i},{'test' if i % 3 == 0 else 'training'}" for i, row in enumerate(image_folder(folder))
    ]
    (folder / "labels.csv").write_text("\n".join(lines))
    rows = table(folder, folder / "labels.csv", "label", patient_column="patient", split_column="fold").rows
    assert prepare(rows, tmp_path / "data", OPTIONS, SALT, "test")["images"] == {"train": 8, "validation": 0, "test": 4}
    with pytest.raises(InputError, match="patient"):
        prepare([replace(row, patient="one") for row in rows], tmp_path / "other", OPTIONS, SALT, "test")
    assert not (tmp_path / "other").exists()


def test_duplicates_across_splits(tmp_path):
    folder = tmp_path / "scans"
    for split, seed in {"train": 0, "test": 1}.items():
        images(folder / split, count=4, seed=seed)
    copied = folder / "test" / "benign" / "Doe-0.png"
    (folder / "train" / "benign" / "Doe-0.png").write_bytes(copied.read_bytes())
    rows = image_folder(folder)
    with pytest.raises(InputError, match="--duplicates"):
        prepare(rows, tmp_path / "data", OPTIONS, SALT, "test")
    summary = prepare(rows, tmp_path / "data", replace(OPTIONS, duplicates="drop"), SALT, "test")
    assert summary["images"] == {"train": 7, "validation": 0, "test": 8} and summary["duplicates_dropped"] == 1


def test_medmnist_keeps_its_splits(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in {"train": 8, "val": 4, "test": 4}.items():
        arrays[f"{split}_images"] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count).reshape(-1, 1) % 2
    np.savez(tmp_path / "mnist.npz", **arrays)
    rows = npz(tmp_path / "mnist.npz", ("normal", "pneumonia")).rows
    summary = prepare(rows, tmp_path / "data", replace(OPTIONS, resolution=32, class_names=("normal", "pneumonia")), SALT, "test")
    assert summary["images"] == {"train": 8, "validation": 4, "test": 4}
    first = load_dataset(tmp_path / "data", split="train")[0]
    np.testing.assert_array_equal(first["image"][0, 2:30, 2:30], arrays["train_images"][0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "images", "--data_dir", "nowhere"], "no such folder"),
        (["--source", "images", "--data_dir", "{tmp}/empty"], "one folder per class"),
        (["--source", "images", "--data_dir", "{tmp}/hollow"], "class hollow_class: no image"),
        (["--source", "csv", "--data_dir", "{tmp}/scans", "--labels", "no.csv"], "no.csv"),
        (["--source", "csv", "--data_dir", "{tmp}/scans", "--labels", "missing.csv"], 'image "gone.png"'),
        (["--source", "csv", "--data_dir", "{tmp}/scans", "--labels", "columns.csv"], "--image_column"),
        (["--source", "csv", "--data_dir", "{tmp}/scans", "--labels", "unlabelled.csv"], "is empty"),
        (["--source", "csv", "--data_dir", "{tmp}/scans", "--labels", "twice.csv"], "several lines for benign/Doe-0.png"),
        (["--source", "csv", "--data_dir", "{tmp}/scans", "--labels", "latin.csv"], "UTF-8"),
        (["--source", "images", "--data_dir", "{tmp}/mixed"], "splits or classes"),
        (["--source", "csv", "--data_dir", "{tmp}/scans", "--labels", "missing.csv", "--mask_column", "m"], 'no column "m"'),
        (["--source", "images", "--data_dir", "{tmp}"], "would be taken for a class"),
        (["--source", "npz", "--data_dir", "{tmp}/broken.npz"], "broken.npz: cannot be decoded"),
        (["--source", "npz", "--data_dir", "{tmp}/scans"], "npz"),
        (["--source", "images", "--data_dir", "{tmp}/scans", "--class_names", "benign", "other"], "--class_names"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, flags, message):
    folder = images(tmp_path / "scans")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "hollow_class").mkdir(parents=True)
    images(tmp_path / "mixed" / "train", count=2)
    (tmp_path / "mixed" / "extra").mkdir()
    (tmp_path / "broken.npz").write_bytes(b"PK broken")
    (folder / "twice.csv").write_text("file,label\nbenign/Doe-0.png,benign\nbenign/Doe-0.png,malignant\n")
    (folder / "latin.csv").write_bytes("file,label\nbenign/Doe-0.png,b\u00f6se\n".encode("latin-1"))
    (folder / "missing.csv").write_text("file,label\ngone.png,benign\n")
    (folder / "columns.csv").write_text("scan,label\na,b\n")
    (folder / "unlabelled.csv").write_text("file,label\nbenign/Doe-0.png,\n")
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    salt = tmp_path / "salt"
    salt.write_bytes(SALT)
    config = parse(PrepareDataConfig, [*flags, "--output_dir", str(tmp_path / "data"), "--salt_file", str(salt), "--num_workers", "0"])
    with pytest.raises(InputError, match=message):
        main(config)
    assert not (tmp_path / "data").exists()


def test_a_used_output_folder_is_refused(tmp_path):
    rows = image_folder(images(tmp_path / "scans"))
    prepare(rows, tmp_path / "data", OPTIONS, SALT, "test")
    with pytest.raises(InputError, match="--overwrite"):
        prepare(rows, tmp_path / "data", OPTIONS, SALT, "test")
    prepare(rows[:10] + rows[12:], tmp_path / "data", OPTIONS, SALT, "test", overwrite=True)


def test_overwrite_never_takes_the_sources(tmp_path):
    folder = images(tmp_path / "scans")
    (folder / "medsd.json").write_text("{}")
    with pytest.raises(InputError, match="--overwrite would replace"):
        prepare(image_folder(folder), folder, OPTIONS, SALT, "test", overwrite=True)
    assert len(image_folder(folder)) == 24


def test_too_many_broken_files_stop_the_run(tmp_path):
    folder = images(tmp_path / "scans")
    for index in range(4):
        (folder / "benign" / f"Doe-{index}.png").write_bytes(b"broken")
    with pytest.raises(InputError, match="4 of 24 files"):
        prepare(image_folder(folder), tmp_path / "data", OPTIONS, SALT, "test")


def test_the_salt_is_made_once_and_kept_private(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    first, name = load_salt(None)
    assert load_salt(None) == (first, name) and len(first) == 64
    assert stat.S_IMODE((tmp_path / "medsd" / "salt").stat().st_mode) == 0o600
    with pytest.raises(InputError, match="no such file"):
        load_salt(tmp_path / "typo")
    (tmp_path / "weak").write_text("short")
    with pytest.raises(InputError, match="--salt_file"):
        load_salt(tmp_path / "weak")


def test_geometry_keeps_aspect_and_mean_and_never_enlarges():
    wide = np.arange(2 * 40 * 80, dtype=np.int16).reshape(2, 40, 80)
    padded, scale = fit_square(wide, 20, "pad")
    assert padded.shape == (2, 20, 20) and padded.dtype == np.int16 and scale == (0.25, 0.25)
    np.testing.assert_allclose(padded[:, 5:15].mean(), wide.mean(), atol=1)
    assert (padded[:, :5] == wide.min()).all()
    assert fit_square(wide, 20, "crop")[0].shape == fit_square(wide, 20, "stretch")[0].shape == (2, 20, 20)
    small, scale = fit_square(np.full((1, 3, 3), 7, np.uint8), 8, "pad")
    assert scale == (1.0, 1.0) and (small == 7).all() and small.shape == (1, 8, 8)


def test_area_averaging_is_exact():
    image = np.arange(64, dtype=np.float32).reshape(1, 8, 8)
    np.testing.assert_allclose(fit_square(image, 4, "pad")[0], image.reshape(1, 4, 2, 4, 2).mean((2, 4)))


def test_shift_moves_down_and_right():
    import torch

    image = torch.arange(9.0).view(1, 1, 3, 3)
    moved = shift(image, torch.tensor([[1, 0]]))
    assert moved[0, 0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    moved = shift(image, torch.tensor([[0, -1]]))
    assert moved[0, 0].tolist() == [[1, 2, 2], [4, 5, 5], [7, 8, 8]]


def take(order, batches):
    stream = iter(order)
    return [next(stream) for _ in range(batches)]


def test_training_order_visits_every_row_once_an_epoch_and_can_start_anywhere():
    labels = [0, 1] * 5
    stream = take(TrainingOrder(labels, 5, seed=1), 6)
    assert sorted(stream[0] + stream[1]) == sorted(stream[2] + stream[3]) == list(range(10))
    assert stream[0] != stream[2]
    assert take(TrainingOrder(labels, 5, seed=1, start=3), 3) == stream[3:]
    ranks = [take(TrainingOrder(labels, 5, seed=1, rank=rank, world=2), 3) for rank in (0, 1)]
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == stream


def test_balanced_sampling_draws_classes_equally():
    labels = [0] * 90 + [1] * 10
    for rule, share in {"natural": 0.1, "sqrt": 0.25, "balanced": 0.5}.items():
        drawn = np.concatenate(take(TrainingOrder(labels, 100, rule, seed=0), 60))
        assert abs(np.mean(np.asarray(labels)[drawn] == 1) - share) < 0.03


def test_real_ct_keeps_its_bits(real_data, tmp_path):
    folder = real_data / "ct_contrast_dicom"
    from medsd.data.files import is_dicom

    rows = table(folder, folder / "overview.csv", "Contrast", "dicom_name", accepts=is_dicom).rows
    prepare(rows, tmp_path / "data", replace(OPTIONS, resolution=128), SALT, "test")
    info = load_info(tmp_path / "data")
    assert info.unit == "HU" and info.channels == 3
    everything = np.stack([row["image"] for split in ("train", "test") for row in load_dataset(tmp_path / "data", split=split)])
    assert everything.dtype == np.int16 and everything.min() <= -1000 and everything.max() > 1000


def test_real_jpegs_split_by_group(real_data, tmp_path):
    folder = real_data / "brain_mri_t1ce_3class"
    rows = table(folder, folder / "labels.csv", "label", "path", patient_column="pseudo_group", accepts=is_raster).rows
    summary = prepare(rows, tmp_path / "data", replace(OPTIONS, duplicates="drop"), SALT, "test")
    assert sum(summary["images"].values()) + summary["duplicates_dropped"] == 406


def test_what_is_not_a_data_sets_is_never_replaced(tmp_path):
    rows = image_folder(images(tmp_path / "scans"))
    (tmp_path / "thesis").write_text("my thesis")
    with pytest.raises(InputError, match="is a file"):
        prepare(rows, tmp_path / "thesis", OPTIONS, SALT, "test")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link to .*elsewhere"):
        prepare(rows, tmp_path / "link", OPTIONS, SALT, "test")
    (tmp_path / "data.private").mkdir()
    (tmp_path / "data.private" / "mine.csv").write_text("keep")
    with pytest.raises(InputError, match="holds mine.csv, which is not of a data set"):
        prepare(rows, tmp_path / "data", OPTIONS, SALT, "test")
    (tmp_path / "data.private" / "mine.csv").unlink()
    prepare(rows, tmp_path / "data", OPTIONS, SALT, "test")
    (tmp_path / "data" / "notes.md").write_text("keep")
    with pytest.raises(InputError, match="holds notes.md"):
        prepare(rows, tmp_path / "data", OPTIONS, SALT, "test", overwrite=True)
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="has the keys of a data set that is elsewhere"):
        prepare(rows, tmp_path / "data", OPTIONS, SALT, "test")
    assert (tmp_path / "thesis").read_text() == "my thesis" and (tmp_path / "link").is_symlink()
    with pytest.raises(InputError, match="which only prepare_data.py replaces"):
        check_output(tmp_path / "moved", overwrite=True, recipe="finetune_unet.py")


def test_another_folder_is_not_taken_for_the_phantoms(tmp_path):
    folder = images(tmp_path / "scans")
    with pytest.raises(InputError, match="say with --source what they are"):
        prepare_phantom(tmp_path / "data", OPTIONS, folder)
    assert not (folder / "labels.csv").exists()


def test_patients_in_the_place_of_classes_are_refused(tmp_path):
    for number in range(6):
        images(tmp_path / "scans", count=1, classes=(f"sub-{number:02d}",), seed=number)
    rows = image_folder(tmp_path / "scans")
    with pytest.raises(InputError, match=r"6 classes \(sub-00, sub-01, sub-02, ...\) of 6 patients"):
        prepare(rows, tmp_path / "data", OPTIONS, SALT, "test")
    names = tuple(sorted(row.label for row in rows))
    assert prepare(rows, tmp_path / "data", replace(OPTIONS, class_names=names), SALT, "test")


def test_few_patients_with_every_class_are_no_classes(tmp_path):
    names = tuple(f"organ {letter}" for letter in "abcdef")
    rows = image_folder(images(tmp_path / "scans", classes=names, count=4))
    made = prepare([replace(row, patient=row.file.name) for row in rows], tmp_path / "data", OPTIONS, SALT, "test")
    assert sum(made["patients"].values()) == 4


def test_windows_are_not_for_grey_values_of_8_bits(tmp_path):
    rows = image_folder(images(tmp_path / "scans"))
    with pytest.raises(InputError, match="--windows are in HU"):
        prepare(rows, tmp_path / "data", replace(OPTIONS, intensity=parse_windows(("brain",))), SALT, "test")


def test_a_mask_may_be_missing_in_some_rows(tmp_path):
    folder = images(tmp_path / "scans")
    rows = image_folder(folder)
    Image.fromarray(np.eye(20, 24, dtype=np.uint8)).save(tmp_path / "mask.png")
    rows = [replace(rows[0], mask=tmp_path / "mask.png"), *rows[1:]]
    summary = prepare(rows, tmp_path / "data", OPTIONS, SALT, "test")
    loaded = [row["mask"] for name in SPLITS if summary["images"][name] for row in load_dataset(tmp_path / "data", name)]
    assert sum(mask is not None for mask in loaded) == 1


def test_names_that_are_no_text_are_prepared(tmp_path):
    folder = images(tmp_path / "scans")
    first = sorted(folder.rglob("*.png"))[0]
    first.rename(os.fsdecode(os.fsencode(first.parent) + b"/\xff.png"))
    summary = prepare(image_folder(folder), tmp_path / "data", OPTIONS, SALT, "test")
    assert sum(summary["images"].values()) == len(list(folder.rglob("*.png")))


def test_what_a_table_tells_is_checked_before_anything_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("medsd.data.staging.decode_row", lambda *_: pytest.fail("decoded"))
    rows = image_folder(images(tmp_path / "scans"))
    for wrong, message in {
        tuple(replace(row, patient="one", split=("train", "test")[number % 2]) for number, row in enumerate(rows)): "in several splits",
        tuple(replace(row, findings=(("a", "A ")[number % 2],)) for number, row in enumerate(rows)): "share the class token",
    }.items():
        with pytest.raises(InputError, match=message):
            prepare(wrong, tmp_path / "data", OPTIONS, SALT, "test")
    with pytest.raises(InputError, match="not in --class_names"):
        prepare(rows, tmp_path / "data", replace(OPTIONS, class_names=("benign",)), SALT, "test")
    assert not (tmp_path / "data").exists()


def test_a_damaged_or_lacking_split_is_one_line(tmp_path):
    prepare(image_folder(images(tmp_path / "scans")), tmp_path / "data", replace(OPTIONS, split_fractions=(0, 0.5, 0.5)), SALT, "test")
    with pytest.raises(InputError, match="has no train split, only validation, test"):
        load_dataset(tmp_path / "data", "train")
    shard = next((tmp_path / "data" / "data").glob("test-*"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read .*: prepare it anew"):
        load_dataset(tmp_path / "data", "test")


def test_the_contact_sheet_shows_channels_and_masks(tmp_path):
    unit = np.stack([np.full((8, 8), value) for value in (-1.0, 0.0, 1.0, -1.0)])
    mask = np.array([[[0, 4]]], np.uint8).repeat(8, 1).repeat(4, 2)
    panels = panels_of(((unit + 1) * 50).astype(np.uint8), mask, Range(0, 100), None)
    greys = [np.asarray(Image.open(io.BytesIO(panel))) for panel in panels]
    assert [grey.mean().round(-1) for grey in greys] == [0, 130, 260, 0, 130] and greys[4][:, :4].max() < 9
    assert len(panels_of(np.zeros((3, 8, 8), np.uint8), None, Range(0, 100), None)) == 1
