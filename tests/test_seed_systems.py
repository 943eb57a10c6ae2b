"""Each system that medsd replaces, from its collection's layout to generated images, by its YAML at toy size."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from medsd import MedSDPipeline
from medsd.commandline import parse
from medsd.config import FinetuneUNetConfig, FinetuneVAEConfig, GenerateConfig, PrepareDataConfig
from recipes import finetune_unet, finetune_vae, generate, prepare_data
from tests import collection_layouts as layouts
from tests.conftest import REPOSITORY

TINY = ["--max_train_steps", "2", "--train_batch_size", "2", "--report_to", "none"]
SIDE = 32


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """Types a recipe's command line in an empty folder, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    (tmp_path / "salt").write_bytes(b"a salt for tests only")

    def run(recipe, config, name, *flags):
        recipe.main(parse(config, ["--config", str(REPOSITORY / "recipes" / "configs" / f"{name}.yaml"), *flags]))

    return run


def prepare(typed, name, write, *flags):
    write(Path("data"))
    common = ["--resolution", str(SIDE), "--num_workers", "0", "--salt_file", "salt", "--duplicates", "keep"]
    typed(prepare_data, PrepareDataConfig, name, *common, *flags)


def smaller(name, section):
    """Flags that make a preset tiny, where the YAML names a preset."""
    content = yaml.safe_load((REPOSITORY / "recipes" / "configs" / f"{name}.yaml").read_text())[section]
    return ["--preset", "tiny"] if "preset" in content else []


def draw(typed, name):
    typed(generate, GenerateConfig, name, "--num_images", "2", "--num_inference_steps", "2")
    pictures = [np.asarray(Image.open(line["file"])) for line in manifest(name)]
    assert pictures and all(picture.std() > 0 for picture in pictures)
    return MedSDPipeline.from_pretrained(f"runs/{name}/unet")


def manifest(name):
    folder = Path(f"runs/{name}/images")
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return [line | {"file": folder / line["file"]} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adni_ldm", "adni_vqvae"])
def test_adni(typed, name):
    prepare(typed, name, layouts.write_adni)
    joins = ["--gan_start", "1"] if name == "adni_ldm" else []
    typed(finetune_vae, FinetuneVAEConfig, name, *TINY, *smaller(name, "finetune_vae"), *joins)
    typed(finetune_unet, FinetuneUNetConfig, name, *TINY, *smaller(name, "finetune_unet"))
    pipe = draw(typed, name)
    assert pipe.codec.kind == ("kl" if name == "adni_ldm" else "vq")
    assert pipe.class_names == (["AD", "NC"] if name == "adni_ldm" else [])


@pytest.mark.slow
def test_oasis(typed):
    prepare(typed, "oasis_ddpm", layouts.write_oasis_png)
    typed(finetune_unet, FinetuneUNetConfig, "oasis_ddpm", *TINY, *smaller("oasis_ddpm", "finetune_unet"))
    pipe = draw(typed, "oasis_ddpm")
    assert (pipe.codec.kind, pipe.codec.factor, pipe.class_names) == ("pixels", 1, [])
    assert (pipe.scheduler.config.beta_end, pipe.scheduler.config.prediction_type) == (0.02, "epsilon")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "channels"), [("brats_1ch", 1), ("brats_2ch", 2), ("brats_5ch", 5)])
def test_brats(typed, name, channels):
    prepare(typed, name, layouts.write_brats)
    typed(finetune_unet, FinetuneUNetConfig, name, *TINY, *smaller(name, "finetune_unet"))
    pipe = draw(typed, name)
    assert pipe.codec.image_channels == channels and len(pipe.class_names) == 2
    if channels > 1:
        source = pipe(class_name="tumour", num_inference_steps=2, output_type="source").images
        assert set(np.unique(source[:, -1])) <= {0.0, 1.0, 2.0, 4.0}


@pytest.mark.slow
def test_rsna_transfer(typed):
    """An unconditional model of MRI becomes a conditional one of CT, in an autoencoder that became one of three windows."""
    prepare(typed, "adni_ldm", layouts.write_adni)
    typed(finetune_vae, FinetuneVAEConfig, "adni_ldm", *TINY, *smaller("adni_ldm", "finetune_vae"), "--gan_start", "2")
    first = [*TINY, *smaller("adni_ldm", "finetune_unet"), "--unconditional", "--output_dir", "runs/adni_ldm/unconditional"]
    typed(finetune_unet, FinetuneUNetConfig, "adni_ldm", *first)
    prepare(typed, "rsna_transfer", lambda folder: layouts.write_rsna2019(Path("ct")), "--data_dir", "ct")
    typed(finetune_vae, FinetuneVAEConfig, "rsna_transfer", *TINY)
    typed(finetune_unet, FinetuneUNetConfig, "rsna_transfer", *TINY)
    pipe = draw(typed, "rsna_transfer")
    assert pipe.vae.config.in_channels == 3 and "epidural" in pipe.class_names and pipe.reads_prompts
