"""Twenty places where others have hidden code: none of it is executed, whether the file is refused or passed over."""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from medsd import MedSDPipeline, load_dataset, read_image
from medsd.errors import InputError
from medsd.models.autoencoders import load_vae
from medsd.models.convert import load_monai_bundle, load_single_file
from tests.conftest import REPOSITORY
from tests.test_recipes import train

PROGRAM = "import os\nos.mkdir({path!r})\n"


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def made(phantom_data, tmp_path_factory):
    """A pixel run with a checkpoint."""
    return train(phantom_data, tmp_path_factory.mktemp("planted") / "unet", validation_steps=0)


@pytest.fixture
def bed(made, tmp_path):
    """A copy of the run, and the folder that planted code would make."""
    return shutil.copytree(made, tmp_path / "unet"), tmp_path / "executed"


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def resume(bed, data):
    train(data, bed, max_train_steps=3, validation_steps=0, resume_from_checkpoint="latest")


def in_checkpoint(name):
    def plant(bed, trap, data):
        (bed / "checkpoint-2" / name).write_bytes(pickle.dumps(Trap(trap)))
        return lambda: resume(bed, data)

    return plant


def in_state(bed, trap, data):
    (bed / "checkpoint-2" / "state.json").write_bytes(pickle.dumps(Trap(trap)))
    return lambda: resume(bed, data)


def weights_as_pickle(part, stem):
    def plant(bed, trap, data):
        for file in (bed / part).glob("*.safetensors"):
            file.unlink()
        torch.save({"a": Trap(trap)}, bed / part / f"{stem}.bin")
        return lambda: MedSDPipeline.from_pretrained(bed)

    return plant


def custom_pipeline(bed, trap, data):
    (bed / "pipeline.py").write_text(PROGRAM.format(path=str(trap)))
    change_json(bed / "model_index.json", _class_name=["pipeline", "MedSDPipeline"])
    return lambda: MedSDPipeline.from_pretrained(bed)


def custom_part(bed, trap, data):
    (bed / "unet" / "mine.py").write_text(PROGRAM.format(path=str(trap)))
    change_json(bed / "model_index.json", unet=["mine", "UNet"])
    return lambda: MedSDPipeline.from_pretrained(bed)


def auto_map(bed, trap, data):
    (bed / "text_encoder" / "modeling.py").write_text(PROGRAM.format(path=str(trap)))
    change_json(bed / "text_encoder" / "config.json", auto_map={"AutoModel": "modeling.Model"}, model_type="mine")
    return lambda: MedSDPipeline.from_pretrained(bed)


def custom_tokenizer(bed, trap, data):
    (bed / "tokenizer" / "tokenization.py").write_text(PROGRAM.format(path=str(trap)))
    changes = {"auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None]}}
    change_json(bed / "tokenizer" / "tokenizer_config.json", **changes)
    return lambda: MedSDPipeline.from_pretrained(bed)


def pickled_autoencoder(bed, trap, data):
    (bed / "vae").mkdir()
    (bed / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    torch.save({"a": Trap(trap)}, bed / "vae" / "diffusion_pytorch_model.bin")
    return lambda: load_vae(str(bed / "vae"))


def single_file(bed, trap, data):
    torch.save({"state_dict": {"model.diffusion_model.x": Trap(trap)}}, bed / "model.ckpt")
    return lambda: load_single_file(str(bed / "model.ckpt"))


def bundle_weights(bed, trap, data):
    (bed / "configs").mkdir()
    (bed / "models").mkdir()
    (bed / "configs" / "inference.json").write_text("{}")
    (bed / "configs" / "metadata.json").write_text("{}")
    torch.save({"a": Trap(trap)}, bed / "models" / "autoencoder.pt")
    torch.save({"a": Trap(trap)}, bed / "models" / "model.pt")
    return lambda: load_monai_bundle(str(bed))


def bundle_expression(bed, trap, data):
    (bed / "configs").mkdir()
    content = {"imports": ["$import os"], "autoencoder_def": f"$__import__('os').mkdir({str(trap)!r})"}
    (bed / "configs" / "inference.json").write_text(json.dumps(content))
    return lambda: load_monai_bundle(str(bed))


def yaml_tag(bed, trap, data):
    (bed / "mine.yaml").write_text(f"finetune_unet: !!python/object/apply:os.mkdir ['{trap}']\n")
    return lambda: command("finetune_unet.py", "--config", str(bed / "mine.yaml"))


def saved_config(bed, trap, data):
    (bed / "config.yaml").write_text(f"finetune_unet:\n  output_dir: !!python/object/apply:os.mkdir ['{trap}']\n")
    return lambda: command("finetune_unet.py", "--config", str(bed / "config.yaml"))


def array_archive(bed, trap, data):
    arrays = {f"{split}_{kind}": np.array([Trap(trap)], dtype=object) for split in ("train", "test") for kind in ("images", "labels")}
    np.savez(bed / "mine.npz", **arrays)
    return lambda: command("prepare_data.py", "--source", "npz", "--data_dir", str(bed / "mine.npz"), "--output_dir", str(bed / "data"))


def array_file(bed, trap, data):
    np.save(bed / "image.npy", np.array([Trap(trap)], dtype=object))
    return lambda: read_image(bed / "image.npy")


def data_script(bed, trap, data):
    copy = shutil.copytree(data, bed / "data")
    (copy / "data.py").write_text(PROGRAM.format(path=str(trap)))
    return lambda: load_dataset(copy, "train")


PLACES = {
    "optimizer.bin of a checkpoint": in_checkpoint("optimizer.bin"),
    "random states of a checkpoint": in_checkpoint("random_states_0.pkl"),
    "custom state of a checkpoint": in_checkpoint("custom_checkpoint_0.pkl"),
    "tensors of a checkpoint": in_checkpoint("optimizer.safetensors"),
    "manifest of a checkpoint": in_checkpoint("manifest.json"),
    "state of a checkpoint": in_state,
    "a UNet's pickle": weights_as_pickle("unet", "diffusion_pytorch_model"),
    "a text encoder's pickle": weights_as_pickle("text_encoder", "pytorch_model"),
    "an autoencoder's pickle": pickled_autoencoder,
    "a pipeline's code": custom_pipeline,
    "a part's code": custom_part,
    "a text encoder's code": auto_map,
    "a tokenizer's code": custom_tokenizer,
    "a single file": single_file,
    "a MONAI bundle's weights": bundle_weights,
    "a MONAI bundle's expressions": bundle_expression,
    "a YAML tag": yaml_tag,
    "a run's config.yaml": saved_config,
    "an npz archive": array_archive,
    "an npy file": array_file,
    "a data folder's script": data_script,
}


REFUSED = {
    "a UNet's pickle": (InputError, "unet/ holds pickled weights"),
    "a text encoder's pickle": (InputError, "text_encoder/ holds pickled weights"),
    "an autoencoder's pickle": (InputError, "no safetensors weights"),
    "a pipeline's code": (InputError, "a pipeline's own code, which is never run"),
    "a part's code": (InputError, "takes unet from mine"),
    "a text encoder's code": (InputError, "asks for code of its own"),
    "a tokenizer's code": (InputError, "asks for code of its own"),
    "a single file": (InputError, "holds Python objects"),
    "a MONAI bundle's weights": (InputError, "holds Python objects"),
    "a MONAI bundle's expressions": (InputError, "holds no weights"),
    "an npy file": (InputError, "Python objects"),
    "a data folder's script": (RuntimeError, "scripts are no longer supported"),
}
"""How; the others are passed over, or refused by the command line."""


def command(recipe, *words):
    """As typed, since the command line is what reads a YAML."""
    answer = subprocess.run([sys.executable, f"recipes/{recipe}", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert answer.returncode in {1, 2} and "error:" in answer.stderr, answer.stderr


@pytest.mark.parametrize("place", PLACES)
def test_planted_code_is_not_executed(bed, phantom_data, place):
    folder, trap = bed
    attempt, (kind, message) = PLACES[place](folder, trap, phantom_data), REFUSED.get(place, (None, None))
    with pytest.raises(kind, match=message) if kind else contextlib.nullcontext():
        attempt()
    assert not trap.exists()


def test_the_traps_work(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "pickled")))
    exec(PROGRAM.format(path=str(tmp_path / "run")))
    assert {path.name for path in tmp_path.iterdir()} == {"pickled", "run"} and len(PLACES) >= 20
