"""The command `medsd`, what is in the wheel and the source archive, and a training in an environment that knows the wheel alone."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from medsd import __version__
from medsd.__main__ import main
from tests.conftest import REPOSITORY

CARRIED = "medsd/_recipes"
PRIVATE = (
    "scan.dcm",
    "labels.csv",
    "notes.md",
    "token",
    ".env",
    "recipes/runs/unet/weights.safetensors",
    "recipes/configs/labels.csv",
    "medsd/data/salt",
    "docs/images/patient.dcm",
    "benchmarks/results/keys.parquet",
)
"""What may lie in a checkout beside its own files."""


def tracked():
    """The checkout's own files; all of them where it is an unpacked source archive."""
    if (REPOSITORY / ".git").exists():
        return subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    return [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def build(source, folder, *targets):
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder), *targets]
    subprocess.run(command, cwd=source, capture_output=True, check=True)


def content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Wheel and source archive, made where private files lie beside the checkout's own."""
    folder = tmp_path_factory.mktemp("archives")
    for name in {*tracked(), *PRIVATE}:
        target = folder / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in PRIVATE:
            target.write_text("private")
        else:
            shutil.copyfile(REPOSITORY / name, target)
    build(folder / "checkout", folder)
    return folder / f"medsd-{__version__}-py3-none-any.whl", folder / f"medsd-{__version__}.tar.gz"


def test_the_wheel_holds_the_package_and_the_recipes(archives):
    expected = {name for name in tracked() if name.startswith("medsd/")}
    expected |= {name.replace("recipes", CARRIED, 1) for name in tracked() if name.startswith("recipes/")} | {f"{CARRIED}/constraints.txt"}
    about = f"medsd-{__version__}.dist-info"
    expected |= {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE")}
    assert content(archives[0]).keys() == expected


def test_the_source_archive_holds_what_is_tracked_and_makes_the_same_wheel(archives, tmp_path):
    with tarfile.open(archives[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"medsd-{__version__}"
    found = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert found == {*tracked(), "PKG-INFO"}
    build(unpacked, tmp_path, "--target", "wheel")
    assert content(tmp_path / archives[0].name) == content(archives[0])


def test_the_command_copies_the_recipes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["recipes"])
    assert capsys.readouterr().out.splitlines()[-1] == "next: accelerate launch recipes/finetune_unet.py"
    main(["recipes", "my own"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].endswith("type 'my own'/") and printed[2] == "next: accelerate launch 'my own/finetune_unet.py'"
    copied = {str(path.relative_to("my own")) for path in Path("my own").rglob("*") if path.is_file()}
    assert copied >= {name.removeprefix("recipes/") for name in tracked() if name.startswith("recipes/")} | {"constraints.txt"}
    assert not any("__pycache__" in name for name in copied)


def test_the_command_leaves_a_folder_alone_that_is_not_empty(tmp_path, capsys):
    (tmp_path / "finetune_unet.py").write_text("edited")
    with pytest.raises(SystemExit) as stopped:
        main(["recipes", str(tmp_path)])
    assert stopped.value.code == 1 and (tmp_path / "finetune_unet.py").read_text() == "edited"
    assert capsys.readouterr().err == f"error: {tmp_path} is not an empty folder: name one that is empty or not there yet\n"


@pytest.mark.parametrize(("flag", "said"), [("--help", "recipes"), ("--version", f"medsd {__version__}")])
def test_the_command_answers_at_once(flag, said):
    code = f"""
import sys
from medsd.__main__ import main
try:
    main(["{flag}"])
except SystemExit:
    print("HEAVY", [name for name in ("torch", "numpy", "tyro") if name in sys.modules])
"""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert said in answer.stdout and "HEAVY []" in answer.stdout
    assert min(seconds) < 1


@pytest.mark.slow
def test_the_wheel_trains_in_an_empty_environment(archives, tmp_path):
    """Elsewhere, so that nothing is imported from the checkout: the default phantom, and five updates."""

    def say(*words):
        done = subprocess.run([*words], cwd=tmp_path, env=alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-2000:]
        return done.stdout

    scripts = tmp_path / "environment" / "bin"
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PYTEST"))}
    # pip reads 0 as --no-compile: modules are compiled when they are imported.
    alone |= {"PATH": f"{scripts}:{os.environ['PATH']}", "PIP_NO_COMPILE": "0"}
    say(sys.executable, "-m", "venv", "environment")
    say("pip", "install", "-c", str(REPOSITORY / "constraints.txt"), str(archives[0]))
    assert "torchvision" not in say("pip", "list")
    home = say("python", "-c", "import medsd; print(medsd.__file__)")
    assert Path(home.strip()).is_relative_to(scripts.parent)
    assert say("medsd", "recipes", "my_recipes").endswith("next: accelerate launch my_recipes/finetune_unet.py\n")
    assert (tmp_path / "my_recipes" / "constraints.txt").read_bytes() == (REPOSITORY / "constraints.txt").read_bytes()
    little = ("--max_train_steps", "5", "--train_batch_size", "4", "--validation_steps", "0")
    say("accelerate", "launch", "my_recipes/finetune_unet.py", *little)
    status = json.loads((tmp_path / "runs" / "phantom" / "unet" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 5)
