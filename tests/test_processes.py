"""Runs as `accelerate launch` starts them: several processes, sharded weights, launchers that are killed. Two gloo processes on a CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import REPOSITORY
from tests.test_recipes import losses

ACCELERATE = str(Path(sys.executable).with_name("accelerate"))
CONFIGS = REPOSITORY / "recipes" / "configs" / "accelerate"
LAUNCHERS = {
    1: [ACCELERATE, "launch", "--num_processes", "1"],
    2: [ACCELERATE, "launch", "--multi_gpu", "--num_processes", "2"],
    "fsdp2": [ACCELERATE, "launch", "--config_file", str(CONFIGS / "fsdp2.yaml"), "tests/fsdp_on_cpu.py"],
    "zero2": [ACCELERATE, "launch", "--config_file", str(CONFIGS / "zero2.yaml"), "tests/fsdp_on_cpu.py"],
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
COMMON = ["--logging_steps", "1", "--report_to", "none", "--lr_scheduler", "constant", "--validation_steps", "0", "--random_shift", "2"]

pytestmark = pytest.mark.slow


def words(processes, folder, data, *flags):
    return [*LAUNCHERS[processes], "recipes/finetune_unet.py", "--dataset_name", str(data), "--output_dir", str(folder), *COMMON, *flags]


def launch(processes, folder, data, *flags):
    answer = subprocess.run(
        words(processes, folder, data, *flags), cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return folder


def weights(folder, step):
    """Bytes of everything that a checkpoint holds, without torch's own generators, of which each process has one."""
    names = ("weights", "ema", "optimizer", "memory")
    return {name: (folder / f"checkpoint-{step}" / f"{name}.safetensors").read_bytes() for name in names}


@pytest.fixture(scope="module")
def whole(phantom_data, tmp_path_factory):
    """One process with batches of 8, 20 updates."""
    flags = ["--train_batch_size", "8", "--max_train_steps", "20"]
    return launch(1, tmp_path_factory.mktemp("whole") / "unet", phantom_data, *flags)


@pytest.mark.parametrize("processes", [2, "fsdp2", "zero2"])
def test_two_processes_train_as_one_with_twice_the_batch_and_resume(phantom_data, whole, tmp_path, processes):
    flags = ["--train_batch_size", "4", "--checkpointing_steps", "5"]
    folder = launch(processes, tmp_path / "unet", phantom_data, *flags, "--max_train_steps", "20")
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)
    part = tmp_path / "part"
    shutil.copytree(folder / "checkpoint-15", part / "checkpoint-15")
    launch(processes, part, phantom_data, *flags, "--max_train_steps", "20", "--resume_from_checkpoint", "latest")
    assert losses(part) == losses(folder)[15:] and weights(part, 20) == weights(folder, 20)
    final, other = (load_file(run / "unet" / "diffusion_pytorch_model.safetensors") for run in (folder, whole))
    assert all((value - other[name]).abs().max() < 1e-3 for name, value in final.items())


DISCRIMINATIVE = ["--discriminative_weight", "0.1", "--max_train_steps", "4"]


@pytest.fixture(scope="module")
def discriminative(phantom_data, tmp_path_factory):
    """One process with the discriminative term and batches of 8."""
    return launch(1, tmp_path_factory.mktemp("discriminative") / "unet", phantom_data, *DISCRIMINATIVE, "--train_batch_size", "8")


@pytest.mark.parametrize("processes", [2, "fsdp2"])
def test_the_discriminative_term_is_that_of_one_process(phantom_data, discriminative, tmp_path, processes):
    """Within more than other losses, since it is made of small differences of them."""
    folder = launch(processes, tmp_path / "unet", phantom_data, *DISCRIMINATIVE, "--train_batch_size", "4")
    assert losses(folder) == pytest.approx(losses(discriminative), abs=1e-4)


def test_adapters_and_class_tokens_are_sharded_in_half_precision(phantom_data, whole, tmp_path):
    flags = ["--pretrained_model_name_or_path", str(whole), "--rank", "2", "--mixed_precision", "bf16", "--checkpointing_steps", "2"]
    folder = launch("fsdp2", tmp_path / "unet", phantom_data, *flags, "--train_batch_size", "4", "--max_train_steps", "4")
    plain = launch(1, tmp_path / "one", phantom_data, *flags, "--train_batch_size", "8", "--max_train_steps", "4")
    assert losses(folder) == pytest.approx(losses(plain), rel=0.02)
    assert (folder / "learned_embeds" / "epidural.safetensors").is_file()
    table = load_file(folder / "checkpoint-4" / "weights.safetensors")["text_encoder.embeddings.token_embedding.weight"]
    before = load_file(whole / "text_encoder" / "model.safetensors")["embeddings.token_embedding.weight"]
    moved = (table[: len(before)] != before).any(1).sum()
    assert 0 < moved <= 6


def wait_for(condition, seconds=90.0):
    until = time.monotonic() + seconds
    while not (met := condition()):
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.02)
    return met


def living(folder):
    """Processes whose command line names the run's folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(folder).encode() in (place / "cmdline").read_bytes()
                and "Z" not in (place / "stat").read_text().rsplit(")", 1)[1].split()[0]
            ):
                found.append(int(place.name))
        except OSError:  # It ended while we looked.
            continue
    return found


@pytest.mark.parametrize(("processes", "target"), [(1, "launcher"), (2, "launcher"), (2, "child")])
def test_a_terminated_run_saves_and_leaves_nobody_behind(phantom_data, tmp_path, processes, target):
    """The checkpoint is of the update in which the signal came, or the next; what comes of it is tested in `test_guard`."""
    flags = ["--train_batch_size", "4", "--max_train_steps", "1000", "--checkpointing_steps", "0"]
    folder = tmp_path / "unet"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words(processes, folder, phantom_data, *flags), cwd=REPOSITORY, env=ENVIRONMENT, **quiet)
    wait_for(lambda: (folder / "metrics.jsonl").is_file() and len((folder / "metrics.jsonl").read_text().splitlines()) > 2)
    victim = process.pid if target == "launcher" else max(living(folder))
    os.kill(victim, signal.SIGTERM)
    logged = len((folder / "metrics.jsonl").read_text().splitlines())
    process.wait(60)
    wait_for(lambda: not living(folder), seconds=20)
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "preempted" and status["reason"].startswith("SIGTERM: checkpoint-")
    assert 0 <= status["step"] - logged <= 2 and (folder / f"checkpoint-{status['step']}").is_dir()


@pytest.mark.parametrize(
    ("processes", "recipe", "flags", "message"),
    [
        (2, "finetune_unet", ["--auto_batch_size"], "--auto_batch_size is for one process"),
        ("fsdp2", "finetune_vae", [], "an autoencoder fits one GPU"),
    ],
)
def test_a_launch_that_does_not_fit_is_refused(phantom_data, tmp_path, processes, recipe, flags, message):
    command = words(processes, tmp_path / "run", phantom_data, *flags)
    command[command.index("recipes/finetune_unet.py")] = f"recipes/{recipe}.py"
    answer = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert answer.returncode == 1 and f"error: {message}" in answer.stderr.replace("a launch as FSDP: ", "")
    assert not (tmp_path / "run").exists()
