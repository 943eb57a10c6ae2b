"""The tutorial and the how-tos as they are typed, in an empty folder without a network; only with fewer steps, images and pairs."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from medsd.commandline import parse
from medsd.config import RECIPES
from medsd.data.phantom import write_phantom
from tests import collection_layouts as layouts
from tests.conftest import REPOSITORY
from tests.hub_server import hub

pytestmark = pytest.mark.slow

DOCS = REPOSITORY / "docs"
CONFIGS = {recipe.section: recipe for recipe in RECIPES}
TRAINING = ["--max_train_steps", "2", "--train_batch_size", "2", "--report_to", "none"]
SMALLER = {
    "prepare_data": ["--num_workers", "0", "--duplicates", "keep", "--salt_file", "salt"],
    "finetune_vae": TRAINING,
    "finetune_unet": TRAINING,
    "generate": ["--num_images", "2", "--num_inference_steps", "2"],
    "classify": ["--max_pairs", "4", "--max_samples", "12"],
    "evaluate": ["--num_samples", "64", "--num_inference_steps", "20"],
}
"""Flags that are typed behind those of the page, so they win."""
HOW_TO = {
    "prepare_data": ["--resolution", "32"],
    "finetune_vae": ["--preset", "tiny", "--gan_start", "1"],
    "finetune_unet": ["--preset", "tiny", "--mixed_precision", "no"],
    "classify": ["--calibrate", "none"],
}
HEADS = "write_phantom(Path('scans'))"
FEWER_HEADS = "write_phantom(Path('scans'), patients=24, size=64)"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def commands(page):
    """The words of every command of a recipe, and of `python -c`, in order."""
    for block in blocks(page, "bash"):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["accelerate", "launch"]:
                words[:2] = ["python"]
            if words[:1] == ["python"] and (words[1].startswith("recipes/") or words[1] == "-c"):
                yield words[1:]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty folder with the recipes in it, and with a salt and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "salt").write_bytes(b"a salt for tests only")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    return tmp_path


def type_in(words, *smaller):
    """A recipe's command, in this process."""
    name = Path(words[0]).stem
    config = parse(CONFIGS[name], [*words[1:], *SMALLER.get(name, []), *smaller])
    import_module(f"recipes.{name}").main(config)
    return config


def test_the_tutorial(empty, capsys):
    """What it says will be there is there."""
    for words in commands("tutorial.md"):
        if words[0] == "-c":
            assert HEADS in words[1]
            exec(words[1].replace(HEADS, FEWER_HEADS), {})
        elif words[0] != "recipes/push.py" or "--dry_run" in words:
            type_in(words)
        else:
            pushing = words
    said = capsys.readouterr().out
    assert "patient from: PatientID (144 images)" in said and "files would be sent" in said
    for block in blocks("tutorial.md", "python"):
        exec(block, {})
    for file in re.findall(r"`(runs/tutorial/[\w./]+)`", (DOCS / "tutorial.md").read_text()):
        assert (empty / file).exists(), file
    run = empty / "runs" / "tutorial"
    assert json.loads((run / "unet" / "status.json").read_text())["state"] == "finished"
    assert {"auroc", "auroc_ci"} <= json.loads((run / "scores" / "metrics.json").read_text()).keys()
    assert json.loads((run / "unet" / "audit.json").read_text())["verdict"] == "passed"
    elsewhere = re.search(r"```\n(from diffusers import DiffusionPipeline\n.*?)```", (DOCS / "tutorial.md").read_text(), re.DOTALL)[1]
    with hub() as server:
        options = {
            "env": os.environ | server.environment(empty / "hub"),
            "cwd": empty,
            "capture_output": True,
            "text": True,
            "timeout": 300,
        }
        for words in (pushing, ["-c", elsewhere + "print(type(pipe).__name__, pipe.class_names)"]):
            done = subprocess.run([sys.executable, *words], **options)
            assert done.returncode == 0, done.stderr
        assert "epidural" in done.stdout and server.repositories["models/user/name"].private


def write_png_and_csv(folder):
    layouts.write_medmnist(folder)
    lines = ["file,label,patient"]
    for patient in range(12):
        for index in range(2):
            layouts.save(layouts.grey(patient, index), folder / "images" / f"{patient:02d}_{index}.png")
            lines.append(f"images/{patient:02d}_{index}.png,{('benign', 'malignant')[patient % 2]},p{patient:02d}")
    layouts.write_lines(folder / "labels.csv", lines)


def write_chest(folder):
    """In the layout of the Hannover repository."""
    lines = ["image_id,patient_id,projection,age,sex"]
    for number in range(24):
        layouts.save(layouts.grey(number // 2, number % 2), folder / "png" / f"{number}.png")
        lines.append(f"{number},{number // 2},{('ap', 'pa')[number % 2]},60,M")
    layouts.write_lines(folder / "data.csv", lines)


PAGES = {
    "png": {"scans": write_png_and_csv, "data": write_chest},
    "dicom": {"scans": lambda folder: write_phantom(folder, patients=12, size=64)},
    "medmnist": {"data": layouts.write_medmnist},
    "rsna2019": {"data": lambda folder: layouts.write_rsna2019(folder, patients=12)},
    "adni": {"data": lambda folder: layouts.write_adni(folder, subjects=12)},
    "oasis": {"data": lambda folder: layouts.write_oasis_nifti(folder, subjects=13), "slices": layouts.write_oasis_png},
    "brats": {"data": lambda folder: layouts.write_brats(folder, cases=8)},
}
"""What has to lie where, for each page."""


def test_there_is_data_for_every_collection():
    assert set(PAGES) == {path.stem for path in (DOCS / "howto").glob("*.md")} - {"rented_gpu"}


@pytest.mark.parametrize("page", PAGES)
def test_a_how_to(page, empty):
    """At 32 px, and with the preset tiny in place of what wants a GPU."""
    for folder, write in PAGES[page].items():
        write(empty / folder)
    if page == "medmnist" and os.environ.get("MEDSD_TEST_DATA"):
        (empty / "data" / "pneumoniamnist.npz").unlink()
        real = Path(os.environ["MEDSD_TEST_DATA"]) / "pneumoniamnist_28" / "pneumoniamnist.npz"
        (empty / "data" / "pneumoniamnist.npz").symlink_to(real)
    for words in commands(f"howto/{page}.md"):
        config = type_in(words, *HOW_TO.get(Path(words[0]).stem, []))
        assert getattr(config, "dry_run", False) or any(Path(config.output_dir).iterdir())
