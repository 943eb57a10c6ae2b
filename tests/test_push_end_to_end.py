"""Trained, audited and pushed as a user types it, and loaded elsewhere: the same bits with medsd, and in an environment without it."""

import json
import os
import site
import subprocess
import sys
import venv

import pytest

from medsd.data.dataset import load_info
from medsd.training.fitting import adopt
from tests.conftest import REPOSITORY
from tests.hub_server import TOKEN, Repository, card_errors, hub
from tests.test_pipeline import pipeline, small_vae

QUICK = ["--max_train_steps", "2", "--validation_steps", "0", "--checkpointing_steps", "1", "--train_batch_size", "4"]
QUICK += ["--report_to", "none", "--audit_samples", "64"]
TRAIN = """
import sys
from accelerate.state import AcceleratorState, GradientState
from medsd.commandline import parse
from medsd.config import FinetuneUNetConfig, FinetuneVAEConfig
from recipes import finetune_unet, finetune_vae

LORA = ["--pretrained_model_name_or_path", "user/base", "--rank", "2", "--lora_alpha", "6"]
data, work, *quick = sys.argv[1:]
runs = {
    "pixels": (finetune_unet, FinetuneUNetConfig, ["--push_checkpoints"]),
    "vae": (finetune_vae, FinetuneVAEConfig, []),
    "sd": (finetune_unet, FinetuneUNetConfig, ["--vae", f"{work}/vae"]),
    "lora": (finetune_unet, FinetuneUNetConfig, LORA),
    "own": (finetune_unet, FinetuneUNetConfig, [*LORA, "--vae", f"{work}/vae"]),
}
for name, (recipe, config, flags) in runs.items():
    words = ["--dataset_name", data, "--output_dir", f"{work}/{name}", "--push_to_hub", "--hub_model_id", f"user/{name}", *quick, *flags]
    recipe.main(parse(config, words))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
"""
SHOW = """
import hashlib, json, sys
import torch

def shown(pipe, prompt, **size):
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "guidance_scale": 1.0, "output_type": "latent"}
    latents = pipe(prompt=prompt, **options, **size).images
    return {"weights": weights(pipe), "latents": hashlib.sha256(latents.numpy().tobytes()).hexdigest()}

def weights(pipe):
    parts = {name: getattr(pipe, name, None) for name in ("unet", "vae", "text_encoder")}
    return {name: digest(part.state_dict()) for name, part in parts.items() if part is not None}

def digest(state):
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        if not any(word in name for word in ("lora", "base_layer", "token_embedding")):
            found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()

def scored(pipe):
    noise = torch.randint(0, 80, (2, 1, 32, 32), generator=torch.Generator().manual_seed(1)).numpy().astype("int16")
    return pipe.classify(list(noise), mode="full", max_pairs=4).log_likelihoods.tolist()

where = {name: place for name, place in zip(("pixels", "sd", "lora", "own", "vae"), sys.argv[1:])}
prompt = "a head CT with <epidural>"
"""
WITH_MEDSD = (
    SHOW
    + """
from medsd import MedSDPipeline
from medsd.models.autoencoders import load_vae

found = {}
for name in ("pixels", "sd", "lora", "own"):
    pipe = MedSDPipeline.from_pretrained(where[name])
    found[name] = shown(pipe, prompt) | {"nats": scored(pipe)}
found["vae"] = digest(load_vae(where["vae"]).state_dict())
print(json.dumps(found))
"""
)
WITHOUT_MEDSD = (
    SHOW
    + """
from contextlib import suppress
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline

with suppress(ImportError):
    from medsd import MedSDPipeline
    raise SystemExit("medsd is installed here")
pipe = DiffusionPipeline.from_pretrained(where["pixels"], custom_pipeline=where["pixels"], trust_remote_code=True)
found = {"pixels": shown(pipe, prompt) | {"nats": scored(pipe)}}
found["sd"] = shown(StableDiffusionPipeline.from_pretrained(where["sd"]), prompt)
for name in ("lora", "own"):
    parts = {"vae": AutoencoderKL.from_pretrained(where[name], subfolder="vae")} if name == "own" else {}
    pipe = StableDiffusionPipeline.from_pretrained("user/base", **parts)
    pipe.load_lora_weights(where[name], weight_name="pytorch_lora_weights.safetensors")
    for token in ("normal", "epidural", "subdural", "subarachnoid", "intraparenchymal", "intraventricular"):
        pipe.load_textual_inversion(where[name], weight_name=f"learned_embeds/{token}.safetensors")
    found[name] = shown(pipe, prompt, height=32, width=32)
found["vae"] = digest(AutoencoderKL.from_pretrained(where["vae"]).state_dict())
print(json.dumps(found))
"""
)


@pytest.fixture(scope="module")
def world(phantom_data, tmp_path_factory):
    """A Hub with a base model of others, and five runs that were pushed to it."""
    work = tmp_path_factory.mktemp("world")
    info = load_info(phantom_data)
    base = pipeline(info.with_words(), small_vae(1))
    adopt(base, info.without_classes())
    base.save_pretrained(work / "base")
    (work / "base" / "medsd.json").unlink()
    with hub() as server:
        files = {path.relative_to(work / "base").as_posix(): path.read_bytes() for path in (work / "base").rglob("*") if path.is_file()}
        server.repositories["models/user/base"] = Repository(True, {"main": files})
        done = python(server, work / "trained", TRAIN, str(phantom_data), str(work), *QUICK)
        yield server, work, done


def python(server, cache, script, *words, interpreter=sys.executable, cwd=REPOSITORY):
    environment = os.environ | server.environment(cache) | {"TQDM_DISABLE": "1", "PYTHONPATH": ""}
    done = subprocess.run([str(interpreter), "-c", script, *words], env=environment, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_what_was_pushed(world):
    server, work, done = world
    for name in ("pixels", "vae", "sd", "lora", "own"):
        repository = server.repositories[f"models/user/{name}"]
        local = {path.relative_to(work / name).as_posix(): path.read_bytes() for path in (work / name).rglob("*.safetensors")}
        sent = {path: content for path, content in repository.files.items() if path.endswith(".safetensors")}
        assert repository.private and sent and all(local[path] == content for path, content in sent.items())
        assert card_errors(repository.files["README.md"].decode(), "model") == []
        assert json.loads(repository.files["audit.json"])["verdict"] == "passed"
    assert "model_index.json" in server.repositories["models/user/sd"].files
    assert "pipeline.py" not in server.repositories["models/user/sd"].files
    assert json.loads(server.repositories["models/user/lora"].files["medsd.json"])["base"]["name"] == "user/base"
    assert TOKEN not in server.texts() + done.stdout + done.stderr and str(work) not in server.texts()


@pytest.mark.slow
def test_each_checkpoint_has_a_branch_that_says_that_nobody_audited_it(world):
    server, work, _ = world
    branches = server.repositories["models/user/pixels"].branches
    assert set(branches) == {"main", "checkpoint-1", "checkpoint-2"}
    assert "after 1 updates" in branches["checkpoint-1"]["README.md"].decode()
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert branches["checkpoint-2"][weights] == branches["main"][weights] != branches["checkpoint-1"][weights]
    assert "Not audited" in branches["checkpoint-2"]["README.md"].decode() and "Not audited" not in branches["main"]["README.md"].decode()


@pytest.mark.slow
def test_it_comes_back_as_it_was(world, tmp_path):
    server, work, _ = world
    names = ("pixels", "sd", "lora", "own", "vae")
    here, there = (
        json.loads(python(server, tmp_path / kind, WITH_MEDSD, *(f"{place}/{name}" for name in names)).stdout)
        for kind, place in (("here", work), ("there", "user"))
    )
    assert there == here
    venv.create(tmp_path / "plain", with_pip=False)
    plain = tmp_path / "plain" / "bin" / "python"
    packages = next((tmp_path / "plain").glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    words = (f"user/{name}" for name in names)
    without = json.loads(python(server, tmp_path / "without", WITHOUT_MEDSD, *words, interpreter=plain, cwd=tmp_path).stdout)
    assert without["pixels"] == here["pixels"] and without["vae"] == here["vae"]
    assert all(without[name]["latents"] == here[name]["latents"] for name in ("sd", "lora", "own"))
    assert all(without[name]["weights"]["unet"] == here[name]["weights"]["unet"] for name in ("sd", "lora", "own"))
    assert (
        without["own"]["weights"]["vae"] == here["own"]["weights"]["vae"] == here["sd"]["weights"]["vae"] != here["lora"]["weights"]["vae"]
    )
