"""Every collection from its own layout on disk to a data set, as a user types it."""

import json

import numpy as np
import pytest
from PIL import Image

from medsd.commandline import parse
from medsd.config import PrepareDataConfig
from medsd.data.dataset import load_dataset, load_info
from medsd.data.splits import SPLITS
from recipes.prepare_data import main
from tests import collection_layouts as layouts
from tests.conftest import REPOSITORY


@pytest.fixture
def prepared(tmp_path):
    """Runs the recipe with a YAML of recipes/configs and further flags, and gives the data folder."""
    (tmp_path / "salt").write_bytes(b"a salt for tests only")

    def run(*flags):
        common = ["--output_dir", str(tmp_path / "data"), "--salt_file", str(tmp_path / "salt"), "--num_workers", "0", "--resolution", "32"]
        main(parse(PrepareDataConfig, [*flags, *common]))
        return tmp_path / "data"

    return run


def yaml(name):
    return ["--config", str(REPOSITORY / "recipes" / "configs" / f"{name}.yaml")]


def rows(data):
    return [row for split in SPLITS if list((data / "data").glob(f"{split}-*")) for row in load_dataset(data, split)]


def test_rsna_keeps_every_finding(tmp_path, prepared):
    layouts.write_rsna2019(tmp_path / "rsna")
    data = prepared(*yaml("rsna2019"), "--data_dir", str(tmp_path / "rsna"))
    info, found = load_info(data), rows(data)
    assert info.multi_label and info.unit == "HU" and info.channels == 3
    several = [row for row in found if sum(row["labels"]) > 1]
    none = [row for row in found if not any(row["labels"])]
    assert several and none
    names = [info.class_tokens[index] for index in np.flatnonzero(several[0]["labels"])]
    assert all(name in several[0]["prompt"] for name in names) and "no finding" in none[0]["prompt"]
    owners = {}
    for split in SPLITS:
        for patient in load_dataset(data, split)["patient_id"] if list((data / "data").glob(f"{split}-*")) else []:
            assert owners.setdefault(patient, split) == split


@pytest.mark.parametrize(("name", "channels"), [("brats_1ch", 1), ("brats_2ch", 2), ("brats", 4), ("brats_5ch", 5)])
def test_brats_variants(tmp_path, prepared, name, channels):
    layouts.write_brats(tmp_path / "brats")
    data = prepared(*yaml(name), "--data_dir", str(tmp_path / "brats"))
    info, found = load_info(data), rows(data)
    assert info.channels == channels and set(info.class_names) == {"no tumour", "tumour"}
    for row in found:
        tumour = info.class_names[row["label"]] == "tumour"
        if name.endswith(("2ch", "5ch")):
            labels = row["image"][-1]
            unit = info.intensity_map.to_unit(row["image"].astype(np.float32), np.array(row["intensity_range"]))
            again = info.intensity_map.from_unit(unit, np.array(row["intensity_range"]))
            np.testing.assert_array_equal(again[-1], labels)
        else:
            labels = row["mask"][0]
        # A lesion of a few pixels may be lost by shrinking, never made.
        assert tumour or not labels.any()
    assert any(info.class_names[row["label"]] == "tumour" for row in found)


def test_adni_carves_validation_from_train_by_subject(tmp_path, prepared):
    layouts.write_adni(tmp_path / "adni")
    data = prepared(*yaml("adni_ldm"), "--data_dir", str(tmp_path / "adni"), "--duplicates", "keep")
    summary = json.loads((data / "summary.json").read_text())
    assert set(load_info(data).class_names) == {"AD", "NC"} and all(summary["images"].values())
    assert set(summary["patient_rule"]) == {"patient column"}


@pytest.mark.parametrize("name", ["oasis_ddpm", "oasis_nifti"])
def test_oasis(tmp_path, prepared, name):
    (layouts.write_oasis_png if name == "oasis_ddpm" else layouts.write_oasis_nifti)(tmp_path / "oasis")
    data = prepared(*yaml(name), "--data_dir", str(tmp_path / "oasis"), "--duplicates", "keep")
    assert rows(data) and load_info(data).channels == 1


def test_medmnist_and_unconditional_folders(tmp_path, prepared):
    layouts.write_medmnist(tmp_path / "pneumoniamnist.npz")
    data = prepared(*yaml("medmnist"), "--data_dir", str(tmp_path / "pneumoniamnist.npz"), "--duplicates", "keep")
    assert set(load_info(data).class_names) == {"normal", "pneumonia"}


def test_uncertain_findings_follow_the_flag(tmp_path, prepared):
    layouts.write_chexpert(tmp_path / "chex")
    table = next((tmp_path / "chex").rglob("*.csv"))
    header = table.read_text().splitlines()[0].split(",")
    findings = header[5:8]
    flags = ["--source", "csv", "--data_dir", str(tmp_path / "chex"), "--labels", str(table), "--image_column", header[0]]
    flags += ["--multi_label", "--label_column", *findings, "--uncertain", "negative", "--duplicates", "keep"]
    info = load_info(prepared(*flags))
    assert info.multi_label and list(info.class_names) == findings


@pytest.mark.parametrize("several", [False, True])
def test_masks_named_by_a_table(tmp_path, prepared, several):
    folder, generator = tmp_path / "scans", np.random.default_rng(0)
    folder.mkdir()
    lines, kept = ["file,lesion,label,contour"], []
    for number in range(12):
        mask = np.zeros((32, 32), np.uint8)
        mask[number : number + 4, 5:9] = number % 2
        Image.fromarray(generator.integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"{number}_m.png")
        lines.append(f"{number}.png,{number % 2},{'ab'[number % 2]},{number}_m.png")
        kept.append(mask)
    (folder / "t.csv").write_text("\n".join(lines))
    flags = ["--source", "csv", "--data_dir", str(folder), "--labels", "t.csv", "--mask_column", "contour"]
    found = rows(prepared(*flags, *(["--multi_label", "--label_column", "lesion"] if several else [])))
    assert sorted(row["mask"][0].tobytes() for row in found) == sorted(mask.tobytes() for mask in kept)


def test_metadata_reaches_prompt_and_columns(tmp_path, prepared, real_data):
    """The real table may know an age, or none at all; a prompt says what is known and no more."""
    source = real_data / "chest_xray_hannover"
    data = prepared(*yaml("chest_xray_hannover"), "--data_dir", str(source), "--prompt_metadata", "age_band", "sex")
    info, found = load_info(data), rows(data)
    for row in found:
        facts = [f"{row['age_band']} years"] * bool(row["age_band"]) + [row["sex"]] * bool(row["sex"])
        prompt = f"a chest X-ray, <{info.class_names[row['label']]}> projection"
        assert row["prompt"] == ", ".join([prompt, *facts])
    assert {row["sex"] for row in found} >= {"female", "male"}
    assert {row["view"] for row in found} <= {"AP", "PA", None}


def test_a_dry_run_writes_nothing(tmp_path, prepared, capsys):
    layouts.write_rsna2019(tmp_path / "rsna")
    before = sorted(tmp_path.rglob("*"))
    prepared(*yaml("rsna2019"), "--data_dir", str(tmp_path / "rsna"), "--dry_run")
    said = capsys.readouterr().out
    assert "epidural" in said and "patients" in said and "about 1 minute with" in said and "MB, and" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_volumes_are_counted_without_being_cut(tmp_path, prepared, capsys):
    layouts.write_brats(tmp_path / "brats")
    prepared(*yaml("brats"), "--data_dir", str(tmp_path / "brats"), "--dry_run")
    assert "by the masks" in capsys.readouterr().out
