"""The Dockerfile, without an engine: what it may hold, and its steps in folders and virtual environments instead of layers.

What only an engine can show, nobody has seen here: Debian's packages, users, volumes, GPUs. Hadolint reads the file in `.ci/run`.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import REPOSITORY

IMAGE = "image"
"""The last stage, which has no name."""
OF_AN_ENGINE = ("apt-get update", "useradd")
"""How the RUN lines begin that change the machine itself."""


def instructions():
    """Instruction and arguments of each line, comments left away."""
    text = re.sub(r"^#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def stages():
    """Name of a stage -> the image or stage that it begins with, and its steps."""
    found = {}
    for word, rest in instructions():
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            found[name or IMAGE] = (parent, [])
        elif found:
            list(found.values())[-1][1].append((word, rest))
    return found


def steps(stage, variant):
    """Those of the stages it stands on, and its own."""
    parent, own = stages()[stage]
    parent = parent.replace("${VARIANT}", variant)
    return [*(steps(parent, variant) if parent in stages() else []), *own]


def arguments(word):
    return [rest for instruction, rest in instructions() if instruction == word]


def copied():
    """What COPY takes from the checkout."""
    return {name for rest in arguments("COPY") if not rest.startswith("--from") for name in shlex.split(rest)[:-1]}


def installed_by_name():
    """Packages that a pip line names itself."""
    commands = [command for rest in arguments("RUN") for command in re.findall(r"pip install ([^&]*)", rest)]
    words = {word for command in commands for word in re.sub(r"(-c|-r|--index-url) \S+", "", command).split()}
    return {word for word in words if not word.startswith(("-", "/"))}


def test_only_the_default_variant_and_the_other_are_there():
    assert arguments("ARG") == ["VARIANT=gpu"]
    assert stages().keys() == {"base", "wheel", "cpu", "gpu", IMAGE}


def test_the_base_is_one_release_and_the_user_is_not_root():
    outside = {parent for parent, _ in stages().values()} - {*stages(), "${VARIANT}"}
    assert all(re.fullmatch(r"[\w/]+:\d+\.\d+\.\d+-[\w-]+", parent) for parent in outside)
    assert [rest for word, rest in steps(IMAGE, "gpu") if word == "USER"][-1] == "1000"


def test_every_package_is_of_the_tested_set():
    pinned = set(re.findall(r"^([\w-]+)==", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    assert installed_by_name() == {"hatchling", "torch", "xformers", "bitsandbytes"} <= pinned
    for command in re.findall(r"pip install [^&]*", " && ".join(arguments("RUN"))):
        assert "--no-cache-dir" in command and ("-c constraints.txt" in command or "--no-deps" in command)


def test_the_gpu_variant_has_what_the_extra_names():
    extra = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    assert installed_by_name() - {"hatchling", "torch"} == {requirement.split("==")[0] for requirement in extra}


def test_the_context_holds_what_is_copied_and_nothing_else():
    lines = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*" and {line[1:] for line in lines if line.startswith("!")} == copied()
    assert all((REPOSITORY / name).exists() for name in copied())


def test_nothing_secret_or_from_anywhere_else():
    assert not arguments("ADD") and not re.search(r"token|password|secret=", " ".join(arguments("ENV") + arguments("ARG")), re.IGNORECASE)
    assert set(re.findall(r"https?://\S+", str(instructions()))) == {"https://download.pytorch.org/whl/cpu"}


class Replay:
    """A stage's steps in `folder / stage`, and its Python in a virtual environment beside it."""

    def __init__(self, folder, stage, variant):
        self.folder, self.root, self.workdir, self.volumes, self.skipped = folder, folder / stage, folder / stage, [], []
        subprocess.run([sys.executable, "-m", "venv", folder / f"{stage}_python"], check=True)
        self.environment = {name: os.environ[name] for name in os.environ if name.startswith(("PIP_", "OMP_", "LANG", "SSL_"))}
        # A registry that cannot be reached is not asked again; pip reads 0 as --no-compile: modules are compiled when they are imported.
        self.environment |= {"PIP_RETRIES": "0", "PIP_NO_COMPILE": "0", "PATH": f"{folder / f'{stage}_python'}/bin:{os.environ['PATH']}"}
        for word, rest in steps(stage, variant):
            self.step(word, rest)

    def step(self, word, rest):
        match word:
            case "RUN" if not rest.startswith(OF_AN_ENGINE):
                self.say(self.inside(rest))
            case "RUN" | "USER":
                self.skipped.append(rest)
            case "WORKDIR":
                self.workdir = self.root / rest.removeprefix("/")
                self.workdir.mkdir(parents=True, exist_ok=True)
            case "COPY":
                self.copy(rest)
            case "ENV":
                self.environment |= dict(pair.split("=", 1) for pair in shlex.split(self.inside(rest)))
            case "VOLUME":
                self.volumes = [self.root / name.removeprefix("/") for name in json.loads(rest)]
                for volume in self.volumes:
                    volume.mkdir(parents=True, exist_ok=True)
            case "CMD":
                self.command = shlex.join(json.loads(rest))
            case _:
                raise AssertionError(f"{word} is not known here")

    def inside(self, text):
        """With the image's absolute paths in the folder that plays it."""
        return re.sub(r"(?<![\w:/])/(opt|medsd|home)\b", rf"{self.root}/\1", text)

    def say(self, command):
        done = subprocess.run(["sh", "-c", command], cwd=self.workdir, env=self.environment, text=True, capture_output=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    def copy(self, rest):
        stage = re.match(r"--from=(\S+) ", rest)
        *sources, target = shlex.split(rest.removeprefix(stage[0]) if stage else rest)
        for source in sources:
            origin = self.folder / stage[1] / source.removeprefix("/") if stage else REPOSITORY / source
            place = self.workdir / self.inside(target)
            if origin.is_dir():
                shutil.copytree(origin, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(origin, place / origin.name)

    def files(self):
        """Outside of the volumes."""
        return {path for path in self.root.rglob("*") if path.is_file() and not any(map(path.is_relative_to, self.volumes))}


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    """The CPU variant, from its first step to the last."""
    folder = tmp_path_factory.mktemp("containers")
    Replay(folder, "wheel", "cpu")
    return Replay(folder, IMAGE, "cpu")


@pytest.mark.slow
def test_the_cpu_variant_trains_and_writes_to_its_volumes_alone(container, phantom_data):
    assert [step.split()[0] for step in container.skipped] == ["apt-get", "useradd", "1000"]
    assert container.say("python -c 'import torch; print(torch.version.cuda)'") == "None\n"
    assert "torchvision" not in container.say("pip list")
    before = container.files()
    container.say(f"{container.command} --dataset_name {phantom_data} --max_train_steps 2 --train_batch_size 4 --validation_steps 0")
    status = json.loads((container.workdir / "runs" / "phantom" / "unet" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 2)
    assert container.files() == before


@pytest.mark.slow
def test_what_the_gpu_variant_adds_goes_with_this_torch(container):
    """It is imported only: here torch is of the CPU variant, and a kernel needs a GPU."""
    version = "python -c 'import torch; print(torch.__version__)'"
    before = container.say(version)
    container.workdir = container.root / "opt" / "medsd"
    container.say(next(rest for word, rest in stages()["gpu"][1] if word == "RUN"))
    container.say("python -c 'import xformers.ops, bitsandbytes, diffusers'")
    assert container.say(version) == before and "torchvision" not in container.say("pip list")
