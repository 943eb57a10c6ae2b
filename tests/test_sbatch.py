"""The SLURM script, with `srun` and `scontrol` played by small scripts: the training and its signals are real."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.test_processes import wait_for
from tests.test_recipes import losses

SCRIPT = REPOSITORY / "recipes" / "configs" / "accelerate" / "train.sbatch"
SRUN = """#!/bin/bash
shift
for number in 0 1; do SLURM_PROCID=$number SLURM_LOCALID=$number SLURM_NTASKS=2 setsid "$@" & echo $! >> "$PLAY/tasks"; done
worst=0
for task in $(jobs -p); do wait "$task"; code=$?; [ $code -gt $worst ] && worst=$code; done
exit $worst
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$PLAY/requeued"; fi
"""


@pytest.fixture
def play(tmp_path):
    """A folder with the two commands."""
    for name, content in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def submit(play, data, *flags):
    words = [str(play / "unet"), "recipes/finetune_unet.py", "--dataset_name", str(data), "--train_batch_size", "4", "--logging_steps", "1"]
    words += ["--report_to", "none", "--validation_steps", "0", "--checkpointing_steps", "0", "--lr_scheduler", "constant", *flags]
    path = f"{play}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(os.getpid()), "PLAY": str(play), "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(["bash", str(SCRIPT), *words], cwd=REPOSITORY, env=os.environ | job, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_job_whose_time_is_up_is_queued_again_and_then_finishes(phantom_data, play):
    metrics = play / "unet" / "metrics.jsonl"
    first = submit(play, phantom_data, "--max_train_steps", "1000")
    wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 2)
    for task in (play / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    first.send_signal(signal.SIGUSR1)
    assert "training is preempted" in first.communicate(timeout=60)[0] and first.returncode == 0
    status = json.loads((play / "unet" / "status.json").read_text())
    assert status["reason"].startswith("SIGUSR1") and (play / "requeued").read_text() == f"requeue {os.getpid()}\n"
    second = submit(play, phantom_data, "--max_train_steps", str(status["step"] + 2))
    assert "training is finished" in second.communicate(timeout=90)[0] and second.returncode == 0
    assert len(losses(play / "unet")) == status["step"] + 2 and (play / "requeued").read_text().count("\n") == 1


@pytest.mark.slow
def test_a_job_that_fails_is_not_queued_again(phantom_data, play):
    """Although an earlier start was preempted."""
    (play / "unet").mkdir()
    (play / "unet" / "status.json").write_text('{"state": "preempted", "step": 3, "reason": "SIGTERM"}')
    job = submit(play, phantom_data, "--max_train_steps", "2", "--early_stopping", "3")
    job.communicate(timeout=90)
    assert job.returncode == 2 and not (play / "requeued").exists()
