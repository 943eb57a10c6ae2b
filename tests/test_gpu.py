"""What needs a CUDA device."""

import json

import numpy as np
import pytest
import torch

from medsd import MedSDPipeline, load_dataset
from medsd.config import FinetuneUNetConfig, FinetuneVAEConfig
from recipes import finetune_unet, finetune_vae

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
QUICK = {"max_train_steps": 4, "validation_steps": 4, "checkpointing_steps": 2, "logging_steps": 1, "report_to": "none"}


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_training_on_a_gpu(phantom_data, tmp_path, mixed_precision):
    finetune_unet.main(
        FinetuneUNetConfig(dataset_name=str(phantom_data), output_dir=str(tmp_path / "unet"), mixed_precision=mixed_precision, **QUICK)
    )
    lines = [json.loads(line) for line in (tmp_path / "unet" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_a_gpu_and_a_cpu_give_the_same_scores(phantom_data, tmp_path):
    finetune_unet.main(FinetuneUNetConfig(dataset_name=str(phantom_data), output_dir=str(tmp_path / "unet"), **QUICK))
    images = list(load_dataset(phantom_data, "test")[:4]["image"])
    scores = []
    for device in ("cpu", "cuda"):
        pipe = MedSDPipeline.from_pretrained(tmp_path / "unet").to(device)
        scores.append(pipe.classify(images, mode="full", max_pairs=8).log_likelihoods)
    differences = [values - values[:, :1] for values in scores]
    np.testing.assert_allclose(differences[1], differences[0], atol=0.02 * np.abs(differences[0]).max())


@pytest.mark.parametrize("codec", ["kl", "vq"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_autoencoders_and_cached_latents_on_a_gpu(phantom_data, tmp_path, monkeypatch, codec, mixed_precision):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    common = {"dataset_name": str(phantom_data), "mixed_precision": mixed_precision} | QUICK
    finetune_vae.main(FinetuneVAEConfig(output_dir=str(tmp_path / "vae"), codec=codec, gan_start=2, **common))
    finetune_unet.main(FinetuneUNetConfig(output_dir=str(tmp_path / "unet"), vae=str(tmp_path / "vae"), cache_latents=True, **common))
    for folder in ("vae", "unet"):
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
