"""Models of every shape on their way to a Hub: plain diffusers draws and classifies with each as medsd does."""

import json
import os
import subprocess
import sys

import pytest

from medsd.data.phantom import write_phantom
from medsd.data.prepare import PrepareOptions, prepare_phantom
from medsd.hub.contents import weights_sha256
from medsd.hub.gate import Outgoing
from medsd.hub.model import parcel
from tests.hub_server import card_errors
from tests.test_finetune_vae import train as train_vae
from tests.test_recipes import train

SHAPES = {
    "pixels": {},
    "quantised latents": {"vae": "vq"},
    "a learned variance": {"learned_variance": True},
    "no classes": {"unconditional": True},
    "images with masks": {"mask_channel": True},
    "findings": {"multi_label": True},
    "no signal at the end": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}
TOLD = """
import json, sys
without, *folders = sys.argv[1:]
if without == "True":
    sys.modules["medsd"] = None
    from diffusers import DiffusionPipeline
else:
    from medsd import MedSDPipeline
import torch

for folder in folders:
    if without == "True":
        pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    else:
        pipe = MedSDPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    seeded = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "source"}
    names = list(pipe.class_names)
    images = pipe(class_name=names[-1] if names else None, **seeded).images
    told = {"kind": type(pipe).__module__.split(".")[0], "images": images.tobytes().hex(), "names": names}
    if names:
        scores = pipe.classify(list(images), mode="full", max_pairs=4)
        told |= {"nats": scores.log_likelihoods.tolist(), "predictions": scores.predictions}
    print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def pushed(phantom_data, tmp_path_factory):
    """What a Hub would receive of each, trained for two steps; `best` as well."""
    work = tmp_path_factory.mktemp("shapes")
    vq = train_vae(phantom_data, work / "vq", codec="vq")
    folders = {}
    for number, (shape, flags) in enumerate(SHAPES.items()):
        data = phantom_data
        if own := {name: value for name, value in flags.items() if name in {"mask_channel", "multi_label"}}:
            write_phantom(work / f"dicom_{number}", patients=24, slices=4, size=64, multi_label="multi_label" in own)
            prepare_phantom(work / f"data_{number}", PrepareOptions(resolution=32, num_workers=0, **own), work / f"dicom_{number}")
            data = work / f"data_{number}"
        others = {"vae": str(vq)} if "vae" in flags else {name: value for name, value in flags.items() if name not in own}
        run = train(data, work / f"run_{number}", **others)
        folders[shape] = sent(Outgoing(run, data, skip_audit=True), work / f"pushed_{number}")
        if shape == "pixels":
            folders["the best of a run"] = sent(Outgoing(run / "best", data, skip_audit=True), work / "pushed_best")
    return work, folders


def sent(outgoing, folder):
    for path, content in parcel(outgoing, "user/model").items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    assert weights_sha256(folder) == weights_sha256(outgoing.folder)
    return folder


def told(folders, tmp_path, without):
    words = [sys.executable, "-c", TOLD, str(without), *map(str, folders.values())]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(folders, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
def test_plain_diffusers_says_what_medsd_says(pushed, tmp_path):
    _, folders = pushed
    ours, theirs = (told(folders, tmp_path, without) for without in (False, True))
    assert {answer.pop("kind") for answer in ours.values()} == {"medsd"}
    assert {answer.pop("kind") for answer in theirs.values()} == {"diffusers_modules"}
    assert theirs == ours
    assert "nats" in ours["findings"] and "nats" not in ours["no classes"] and not ours["no classes"]["names"]


@pytest.mark.slow
def test_each_says_what_it_is(pushed):
    work, folders = pushed
    cards = {shape: (folder / "README.md").read_text() for shape, folder in folders.items()}
    for card in cards.values():
        assert card_errors(card, "model") == [] and "Not audited" in card and str(work) not in card
    assert "unconditional-image-generation" in cards["no classes"] and "text-to-image" in cards["findings"]
    assert (folders["the best of a run"] / "config.yaml").is_file()
