"""The README's commands as a newcomer types them, in an empty folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

ACCELERATE = str(Path(sys.executable).with_name("accelerate"))


def type_in(folder, *words):
    """A command of the README, run in `folder` with the recipes beside it."""
    link = folder / "recipes"
    if not link.exists():
        link.symlink_to(REPOSITORY / "recipes")
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_chain_without_flags(tmp_path):
    quick = ["--max_train_steps", "30", "--logging_steps", "10"]
    trained = type_in(tmp_path, ACCELERATE, "launch", "recipes/finetune_unet.py", *quick)
    assert trained.returncode == 0, trained.stderr
    assert "validation auroc" in trained.stdout + trained.stderr and "next: python recipes/classify.py" in trained.stdout
    assert json.loads((tmp_path / "runs/phantom/unet/status.json").read_text())["state"] == "finished"
    scored = type_in(tmp_path, sys.executable, "recipes/classify.py", "--max_pairs", "4", "--max_samples", "60")
    assert scored.returncode == 0 and "auroc" in scored.stdout, scored.stderr
    drawn = type_in(tmp_path, sys.executable, "recipes/generate.py", "--num_images", "2", "--num_inference_steps", "3")
    assert drawn.returncode == 0 and (tmp_path / "runs/phantom/images/overview.png").is_file(), drawn.stderr
    for answer in (trained, scored, drawn):
        for noise in ("torchvision", "kernels-community", "Traceback", "FutureWarning", "DeprecationWarning"):
            assert noise not in answer.stdout + answer.stderr
    again = type_in(tmp_path, sys.executable, "recipes/generate.py")
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith("error: runs/phantom/images is not empty")
    assert "Traceback" not in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pneumoniamnist", "brain_mri", "ct_contrast"])
def test_a_yaml_end_to_end(name, tmp_path, real_data):
    folder = {"pneumoniamnist": "pneumoniamnist_28", "brain_mri": "brain_mri_t1ce_3class", "ct_contrast": "ct_contrast_dicom"}[name]
    config = ["--config", f"recipes/configs/{name}.yaml"]
    data = type_in(tmp_path, sys.executable, "recipes/prepare_data.py", *config, "--data_dir", str(real_data / folder))
    assert data.returncode == 0, data.stderr
    quick = ["--max_train_steps", "2", "--train_batch_size", "2"]
    trained = type_in(tmp_path, sys.executable, "recipes/finetune_unet.py", *config, *quick)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs" / name / "unet" / "model_index.json").is_file()


@pytest.mark.slow
def test_two_processes_train_together(tmp_path, phantom_data, monkeypatch):
    """An autoencoder with its discriminator, then a UNet on cached moments with importance sampling; both resume."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    launch = [ACCELERATE, "launch", "--multi_gpu", "--num_processes", "2"]
    common = ["--dataset_name", str(phantom_data), "--train_batch_size", "4", "--logging_steps", "1", "--report_to", "none"]
    common += ["--lr_scheduler", "constant", "--checkpointing_steps", "2"]
    vae = [*launch, "recipes/finetune_vae.py", *common, "--output_dir", "vae", "--gan_start", "2"]
    unet = [*launch, "recipes/finetune_unet.py", *common, "--output_dir", "unet", "--vae", "vae", "--cache_latents"]
    for command in (vae, [*unet, "--timestep_sampling", "importance"]):
        for more in (["--max_train_steps", "2"], ["--max_train_steps", "3", "--resume_from_checkpoint", "latest"]):
            answer = type_in(tmp_path, *command, *more)
            assert answer.returncode == 0, answer.stderr[-3000:]
    for folder in ("vae", "unet"):
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
        assert json.loads((tmp_path / folder / "status.json").read_text())["state"] == "finished"
