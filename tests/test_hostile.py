"""Folders of models that others made to harm: each is refused in one line, and nothing in it runs or is read outside it."""

import ctypes
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from transformers import ViTConfig, ViTModel

from medsd import MedSDPipeline
from medsd.data.dataset import load_info
from medsd.errors import InputError
from medsd.models.autoencoders import load_vae
from medsd.models.lora import add_lora
from medsd.models.vision import load_vision_model
from medsd.training.fitting import record_base
from tests.conftest import REPOSITORY
from tests.hub_server import Repository, hub
from tests.test_convert import Surprise
from tests.test_pipeline import pipeline, small_vae
from tests.test_transplant import TWO

CASES = {}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def hostile(kind, words, load=MedSDPipeline.from_pretrained):
    """Register what spoils a good folder of this kind; its refusal says `words`."""

    def register(spoil):
        CASES[spoil.__name__] = (kind, words, load, spoil)
        return spoil

    return register


@pytest.fixture(scope="module")
def good(phantom_data, tmp_path_factory):
    """Folders that load, one of each kind."""
    home = tmp_path_factory.mktemp("good")
    info = load_info(phantom_data)
    pipe = pipeline(info, small_vae(1))
    pipe.save_pretrained(home / "sd")
    add_lora(pipe.unet, 2, 2, torch.float32)
    record_base(pipe, str(home / "sd"), None)
    pipe.save_pretrained(home / "lora")
    DDPMPipeline(UNet2DModel(**TWO), DDIMScheduler()).save_pretrained(home / "unconditional")
    small_vae(1).save_pretrained(home / "vae")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(home / "vision")
    (home / "file").mkdir()
    return home


class Watch:
    """Files under a folder that any process opens or reads, as the kernel sees it."""

    OPENED, READ, OF_FOLDER = 0x20, 0x1, 0x40000000

    def __init__(self, folder):
        libc = ctypes.CDLL(None, use_errno=True)
        self.queue = libc.inotify_init1(os.O_NONBLOCK)
        for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            assert libc.inotify_add_watch(self.queue, str(place).encode(), self.OPENED | self.READ) > 0

    def seen(self):
        """Whether there was a read since the last call."""
        try:
            events = os.read(self.queue, 1 << 16)
        except BlockingIOError:
            return False
        found = False
        while events:
            mask, length = int.from_bytes(events[4:8], "little"), int.from_bytes(events[12:16], "little")
            found, events = found or not mask & self.OF_FOLDER, events[16 + length :]
        return found

    def close(self):
        os.close(self.queue)


@pytest.fixture
def scene(good, tmp_path):
    """Where a hostile folder lies: its neighbour that must not be read, and the file that code would write."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads are watched with Linux' inotify")
    shutil.copytree(good / "sd", tmp_path / "outside")
    watch = Watch(tmp_path / "outside")
    yield tmp_path, tmp_path / "outside", tmp_path / "ran", watch
    watch.close()


def spoiled(good, scene, name):
    """The hostile folder, in the place of a good one of its kind."""
    home, outside, ran, _ = scene
    kind, _, _, spoil = CASES[name]
    folder = home / kind
    shutil.copytree(good / kind, folder)
    if kind == "lora":
        shutil.copytree(good / "sd", home / "sd", dirs_exist_ok=True)
    return spoil(folder, outside, ran) or folder


def edit(file, **changes):
    record = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(record | changes))


def pickled(file, ran):
    torch.save({"weight": Surprise(ran)}, file)


def pickled_instead(weights, name, ran):
    weights.unlink()
    pickled(weights.with_name(name), ran)


def code(file, ran):
    file.write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")


def link(path, target):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(target)


def shards(file, name):
    """An index that takes every weight of a part from the file `name`."""
    file.unlink()
    index = {"metadata": {"total_size": 4}, "weight_map": {"conv_in.weight": name}}
    Path(f"{file}.index.json").write_text(json.dumps(index))


@hostile("sd", "unet/ holds pickled weights")
def pickled_unet(folder, outside, ran):
    pickled_instead(folder / "unet" / WEIGHTS, "diffusion_pytorch_model.bin", ran)


@hostile("sd", "vae/ holds pickled weights")
def pickled_vae(folder, outside, ran):
    pickled_instead(folder / "vae" / WEIGHTS, "diffusion_pytorch_model.bin", ran)


@hostile("sd", "text_encoder/ holds pickled weights")
def pickled_text_encoder(folder, outside, ran):
    pickled_instead(folder / "text_encoder" / "model.safetensors", "pytorch_model.bin", ran)


@hostile("sd", "cannot be loaded")
def pickle_that_calls_itself_safetensors(folder, outside, ran):
    pickled(folder / "unet" / WEIGHTS, ran)


@hostile("sd", "cannot be loaded")
def pickles_of_both_names(folder, outside, ran):
    (folder / "text_encoder" / "model.safetensors").write_bytes(pickle.dumps(Surprise(ran)))
    pickled(folder / "text_encoder" / "pytorch_model.bin", ran)


@hostile("sd", "a pipeline's own code")
def own_pipeline(folder, outside, ran):
    edit(folder / "model_index.json", _class_name=["pipeline", "Mine"])
    code(folder / "pipeline.py", ran)


@hostile("sd", "from mine, not diffusers or transformers")
def part_of_own_module(folder, outside, ran):
    edit(folder / "model_index.json", unet=["mine", "Mine"])
    code(folder / "mine.py", ran)
    code(folder / "unet" / "mine.py", ran)


@hostile("sd", "from os, not diffusers or transformers")
def part_of_the_standard_library(folder, outside, ran):
    edit(folder / "model_index.json", scheduler=["os", "system"])


@hostile("sd", "code of its own (auto_map)")
def text_encoder_of_own_code(folder, outside, ran):
    edit(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "mine.Mine"})
    code(folder / "text_encoder" / "mine.py", ran)


@hostile("sd", "code of its own (auto_map)")
def tokenizer_of_own_code(folder, outside, ran):
    edit(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]}, tokenizer_class="Mine")
    code(folder / "tokenizer" / "mine.py", ran)


@hostile("sd", "code of its own (attn_implementation)")
def attention_from_the_hub(folder, outside, ran):
    edit(folder / "text_encoder" / "config.json", attn_implementation="someone/kernel")


@hostile("sd", "code of its own (_attn_implementation)")
def attention_from_the_hub_in_a_part_of_the_part(folder, outside, ran):
    edit(folder / "text_encoder" / "config.json", text_config={"_attn_implementation": "someone/kernel"})


@hostile("sd", "code of its own (quantization_config)")
def quantization_of_others(folder, outside, ran):
    edit(folder / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


@hostile("sd", "leads to a model outside the folder")
def adapters_in_a_part(folder, outside, ran):
    edit(folder / "text_encoder" / "adapter_config.json", base_model_name_or_path=str(outside / "text_encoder"), peft_type="LORA")


@hostile("sd", "names a file outside its folder")
def index_of_the_parent(folder, outside, ran):
    shards(folder / "unet" / WEIGHTS, f"../../outside/unet/{WEIGHTS}")


@hostile("sd", "names a file outside its folder")
def index_of_an_absolute_path(folder, outside, ran):
    shards(folder / "text_encoder" / "model.safetensors", str(outside / "text_encoder" / "model.safetensors"))


@hostile("sd", "names a file outside its folder")
def index_of_a_variant(folder, outside, ran):
    shards(folder / "vae" / WEIGHTS, f"../../outside/vae/{WEIGHTS}")
    (folder / "vae" / f"{WEIGHTS}.index.json").rename(folder / "vae" / f"{WEIGHTS}.index.fp16.json")


@hostile("sd", "names a file outside its folder")
def vocabulary_elsewhere(folder, outside, ran):
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    names = {"vocab_file": "vocab.json", "merges_file": "merges.txt", "tokenizer_file": "tokenizer.json"}
    there = {key: str(outside / "tokenizer" / name) for key, name in names.items() if (outside / "tokenizer" / name).is_file()}
    assert there
    edit(folder / "tokenizer" / "tokenizer_config.json", tokenizer_class="CLIPTokenizer", **there)


@hostile("sd", "is a link to a place outside")
def linked_weights(folder, outside, ran):
    link(folder / "unet" / WEIGHTS, outside / "unet" / WEIGHTS)


@hostile("sd", "is a link to a place outside")
def linked_part(folder, outside, ran):
    link(folder / "vae", outside / "vae")


@hostile("sd", "is a link to a place outside")
def linked_by_a_chain(folder, outside, ran):
    link(folder / "within.json", "../outside/unet/config.json")
    link(folder / "unet" / "config.json", "../within.json")


@hostile("sd", "is a link to a place outside")
def linked_index(folder, outside, ran):
    link(folder / "model_index.json", outside / "model_index.json")


@hostile("sd", "is a link to a place outside")
def linked_record(folder, outside, ran):
    link(folder / "medsd.json", outside / "medsd.json")


@hostile("sd", "is damaged")
def endless_nest(folder, outside, ran):
    (folder / "model_index.json").write_text('{"a":' * 200_000 + "1" + "}" * 200_000)


@hostile("sd", "not as medsd writes it")
def record_of_other_types(folder, outside, ran):
    edit(folder / "medsd.json", codec=[["__import__('os').system('id')"]])


@hostile("sd", "cannot be loaded")
def weights_longer_than_their_file(folder, outside, ran):
    header = json.dumps({"conv_in.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / "unet" / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)


@hostile("lora", "misses pytorch_lora_weights.safetensors")
def pickled_adapters(folder, outside, ran):
    pickled_instead(folder / "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", ran)


@hostile("lora", "cannot be loaded")
def pickled_adapters_that_call_themselves_safetensors(folder, outside, ran):
    pickled(folder / "pytorch_lora_weights.safetensors", ran)
    pickled(folder / "pytorch_lora_weights.bin", ran)


@hostile("lora", "is a link to a place outside")
def linked_embeddings(folder, outside, ran):
    token = next((folder / "learned_embeds").glob("*"))
    link(token, outside / "unet" / WEIGHTS)


@hostile("lora", "adapters of itself")
def adapters_of_themselves(folder, outside, ran):
    edit(folder / "medsd.json", base={"name": ".", "revision": None, "sha256": "0" * 64})


@hostile("lora", "no Hub id")
def adapters_of_a_path_that_calls_itself_an_id(folder, outside, ran):
    edit(folder / "medsd.json", base={"name": str(outside), "revision": None, "sha256": None})


@hostile("lora", "whose weights have changed")
def adapters_of_a_model_that_was_changed(folder, outside, ran):
    torch.save({"weight": Surprise(ran)}, folder.parent / "sd" / "unet" / WEIGHTS)


@hostile("lora", "no safetensors weights")
def adapters_with_a_pickled_autoencoder(folder, outside, ran):
    shutil.copytree(folder.parent / "sd" / "vae", folder / "vae")
    pickled_instead(folder / "vae" / WEIGHTS, "diffusion_pytorch_model.bin", ran)


@hostile("unconditional", "unet/ holds pickled weights")
def pickled_unconditional_unet(folder, outside, ran):
    pickled_instead(folder / "unet" / WEIGHTS, "diffusion_pytorch_model.bin", ran)


@hostile("unconditional", "from mine, not diffusers or transformers")
def scheduler_of_own_code(folder, outside, ran):
    edit(folder / "model_index.json", scheduler=["mine", "Mine"])
    code(folder / "mine.py", ran)
    code(folder / "scheduler" / "mine.py", ran)


@hostile("unconditional", "is a link to a place outside")
def linked_unconditional_unet(folder, outside, ran):
    link(folder / "unet", outside / "unet")


@hostile("vae", "names a file outside its folder", load_vae)
def index_of_an_autoencoder(folder, outside, ran):
    shards(folder / WEIGHTS, f"../outside/vae/{WEIGHTS}")


@hostile("vae", "safetensors", load_vae)
def pickled_autoencoder(folder, outside, ran):
    pickled_instead(folder / WEIGHTS, "diffusion_pytorch_model.bin", ran)


@hostile("vae", "is a link to a place outside", load_vae)
def linked_autoencoder(folder, outside, ran):
    link(folder / WEIGHTS, outside / "vae" / WEIGHTS)


@hostile("vision", "code of its own (auto_map)", load_vision_model)
def features_of_own_code(folder, outside, ran):
    edit(folder / "config.json", auto_map={"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}, model_type="mine")
    code(folder / "mine.py", ran)


@hostile("vision", "safetensors", load_vision_model)
def pickled_features(folder, outside, ran):
    pickled_instead(folder / "model.safetensors", "pytorch_model.bin", ran)


@hostile("file", "Python objects, which could run code")
def pickled_checkpoint(folder, outside, ran):
    pickled(folder / "model.ckpt", ran)
    return folder / "model.ckpt"


@hostile("file", "model.pt")
def archive_that_climbs_out(folder, outside, ran):
    """Names in the archive lead to a file outside, which an extraction would write."""
    torch.save({"state_dict": {"a": torch.ones(1)}}, folder / "good.pt")
    with zipfile.ZipFile(folder / "good.pt") as source, zipfile.ZipFile(folder / "model.pt", "w") as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
        target.writestr("../../ran", b"written")
        target.writestr(str(ran), b"written")
    return folder / "model.pt"


@hostile("file", "Python objects, which could run code")
def bundle_of_pickles(folder, outside, ran):
    (folder / "models").mkdir()
    pickled(folder / "models" / "model.pt", ran)


@hostile("file", "is a link to a place outside")
def linked_bundle(folder, outside, ran):
    (folder / "models").mkdir()
    link(folder / "models" / "model.safetensors", outside / "unet" / WEIGHTS)


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_line(good, scene, name):
    _, _, ran, watch = scene
    _, words, load, _ = CASES[name]
    folder = spoiled(good, scene, name)
    watch.seen()
    with pytest.raises(InputError, match=".") as refusal:
        load(str(folder))
    said = str(refusal.value)
    assert words in said and folder.name in said and "\n" not in said.strip() and len(said) < 500, said
    assert not ran.exists() and not watch.seen()


def test_the_good_ones_load(good):
    for name in ("sd", "lora", "unconditional"):
        MedSDPipeline.from_pretrained(good / name)
    load_vae(str(good / "vae"))
    load_vision_model(str(good / "vision"))


def test_pickles_and_reads_would_be_seen(scene):
    """What the tests above watch for does happen where it is let happen."""
    home, outside, ran, watch = scene
    pickled(home / "evil.bin", ran)
    torch.load(home / "evil.bin", weights_only=False)
    assert ran.exists() and not watch.seen()
    (home / "link").symlink_to(outside / "model_index.json")
    (home / "link").read_text()
    assert watch.seen() and not watch.seen()
    (home / "part").symlink_to(outside / "unet")
    from safetensors.torch import load_file

    load_file(home / "part" / WEIGHTS)
    assert watch.seen()


@pytest.mark.parametrize("name", ["pickled_unet", "own_pipeline", "index_of_the_parent", "linked_weights"])
def test_a_recipe_says_so_in_one_line(good, scene, phantom_data, name):
    home, _, ran, watch = scene
    folder = spoiled(good, scene, name)
    watch.seen()
    command = [sys.executable, str(REPOSITORY / "recipes" / "generate.py"), "--pipeline", str(folder), "--output_dir", str(home / "made")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode != 0 and line.startswith("error: ") and CASES[name][1] in line
    assert not ran.exists() and not watch.seen() and not (home / "made").exists()


FROM_THE_HUB = (
    "pickled_unet",
    "own_pipeline",
    "part_of_own_module",
    "text_encoder_of_own_code",
    "index_of_the_parent",
    "pickled_adapters",
    "scheduler_of_own_code",
    "features_of_own_code",
)
LOAD = """
import sys
from medsd import MedSDPipeline
from medsd.errors import InputError
from medsd.models.vision import load_vision_model

for name in sys.argv[1:]:
    try:
        (load_vision_model if "features" in name else MedSDPipeline.from_pretrained)(name)
    except InputError as error:
        print(" ".join([name, *str(error).split()]))
"""


def test_the_hub_gives_none_either(good, scene):
    home, outside, ran, watch = scene
    with hub() as server:
        for name in FROM_THE_HUB:
            folder = spoiled(good, scene, name)
            offer(server, name, folder)
            shutil.rmtree(folder)
        shutil.copytree(good / "lora", home / "lora")
        base = json.loads((home / "lora" / "medsd.json").read_text())["base"]
        edit(home / "lora" / "medsd.json", base=base | {"name": str(outside)})
        offer(server, "local_base", home / "lora")
        offer(server, "good", good / "sd")
        offer(server, "good_features", good / "vision")
        watch.seen()
        names = [f"someone/{name}" for name in (*FROM_THE_HUB, "local_base", "good", "good_features")]
        environment = os.environ | server.environment(home / "cache")
        done = subprocess.run(
            [sys.executable, "-c", LOAD, *names], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
        )
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert done.returncode == 0 and list(said) == names[:-2], done.stderr
    assert "asks for code of its own (auto_map)" in said["someone/features_of_own_code"]
    assert "on its maker's machine: ask for the merged model" in said["someone/local_base"]
    assert not ran.exists() and not watch.seen()


def offer(server, name, folder):
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    server.repositories[f"models/someone/{name}"] = Repository(False, {"main": files})
