"""Models on their way to a Hub: the gate, what travels, the card, and what comes back in plain diffusers."""

import ast
import json
import re
import shlex
import shutil
import sys
from dataclasses import fields

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from medsd import MedSDPipeline
from medsd.commandline import parse
from medsd.config import FinetuneUNetConfig, PushConfig
from medsd.data.dataset import DataInfo, load_info
from medsd.data.hypotheses import Hypotheses
from medsd.errors import InputError
from medsd.hub.contents import INFO_KEYS, collect, weights_sha256
from medsd.hub.facts import Facts
from medsd.hub.gate import Outgoing
from medsd.hub.loading import loading
from medsd.hub.model import parcel, push_model
from medsd.hub.standalone import in_one_file, pipeline_source
from medsd.hub.upload import Target
from medsd.inference.auditor import audit_folder
from medsd.inference.calibration import Calibration
from medsd.inference.info import Base, PipelineInfo
from medsd.training.pushing import Destination, check_destination
from recipes import push
from tests.card_numbers import BY_CLASS, BY_SUBGROUP, CALIBRATION, CLASSIFICATION, GENERATED, assert_data, assert_numbers, tables
from tests.hub_server import card_errors, front_of
from tests.test_finetune_vae import train as train_vae
from tests.test_recipes import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(phantom_data, tmp_path_factory):
    """A pixel run, audited."""
    folder = train(phantom_data, tmp_path_factory.mktemp("push") / "unet")
    audit_folder(folder, str(phantom_data), 64, CPU)
    return folder


@pytest.fixture(scope="module")
def vae(phantom_data, tmp_path_factory):
    return train_vae(phantom_data, tmp_path_factory.mktemp("push_vae") / "vae")


@pytest.fixture
def copied(run, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(run, tmp_path / "unet")


def text_of(content):
    return (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", "replace")


def passed(folder):
    record = json.loads((folder / "audit.json").read_text()) | {"verdict": "passed", "copies": 0}
    (folder / "audit.json").write_text(json.dumps(record))


def test_what_travels_and_what_stays(copied, phantom_data):
    passed(copied)
    (copied / "notes.txt").write_text("Mrs Doe")
    (copied / "unet" / "optimizer.bin").write_text("state")
    found = parcel(Outgoing(copied, phantom_data), "user/heads")
    assert set(found) == {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
        "medsd.json",
        "config.yaml",
        "environment.json",
        "audit.json",
        "pipeline.py",
        "README.md",
    }
    everything = "\n".join(map(text_of, found.values()))
    assert str(copied) not in everything and str(phantom_data) not in everything and '"_name_or_path"' not in everything
    assert "max_train_steps: 2" in text_of(found["config.yaml"]) and "output_dir" not in text_of(found["config.yaml"])


def test_weights_without_an_audit_stay(copied, phantom_data):
    passed(copied)
    weights = load_file(copied / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, copied / "unet" / "diffusion_pytorch_model.safetensors")
    command = rf"its audit\.json is of other weights.*Type python recipes/push\.py --pipeline {copied} .*--audit_samples 256"
    with pytest.raises(InputError, match=command):
        parcel(Outgoing(copied, phantom_data), "user/heads")
    (copied / "audit.json").unlink()
    with pytest.raises(InputError, match=r"it has no audit\.json"):
        parcel(Outgoing(copied, phantom_data), "user/heads")
    card = text_of(parcel(Outgoing(copied, phantom_data, skip_audit=True), "user/heads")["README.md"])
    assert "Not audited for copies of training images" in card


@pytest.mark.parametrize(
    ("changes", "looked"),
    [
        ({"sampling": {"num_inference_steps": 1}}, "64 images of 1 steps,"),
        ({"samples": 10, "held_out": 50}, "10 images of 30 steps"),
        ({"samples": 2, "held_out": 2}, "2 images of 30 steps"),
        (
            {"held_out": 999, "false_positive_rate": 0.9},
            r"a rate of false alarms of 0\.9; at least 64 of 20 steps, at a rate of at most 0\.01, count",
        ),
    ],
    ids=["noise", "few", "all of few", "lax"],
)
def test_an_audit_that_looked_at_little_does_not_count(copied, phantom_data, changes, looked):
    passed(copied)
    record = json.loads((copied / "audit.json").read_text())
    (copied / "audit.json").write_text(json.dumps(record | {"samples": 64} | changes))
    with pytest.raises(InputError, match=looked):
        parcel(Outgoing(copied, phantom_data), "user/heads")


def test_a_failed_audit_closes_the_gate(copied, phantom_data):
    record = json.loads((copied / "audit.json").read_text()) | {"verdict": "failed", "copies": 3}
    (copied / "audit.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="failed its audit .3 copies"):
        parcel(Outgoing(copied, phantom_data), "user/heads")


def test_an_audit_that_failed_is_not_replaced_by_a_luckier_one(copied, phantom_data):
    record = json.loads((copied / "audit.json").read_text()) | {"verdict": "failed"}
    (copied / "audit.json").write_text(json.dumps(record))
    audit_folder(copied, str(phantom_data), 64, CPU, seed=7)
    assert json.loads((copied / "audit.json").read_text())["verdict"] == "failed"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model_index.json", {"note": "hf_ABCDEFGHIJKLMNOPQRSTUV"}),
        ("environment.json", {"host": "/home/doe/scans/head"}),
        ("environment.json", {"host": "C:\\scans\\head"}),
        ("tokenizer/tokenizer_config.json", {"note": "PH00003"}),
    ],
    ids=["token", "path", "path of Windows", "patient"],
)
def test_what_names_somebody_closes_the_gate(copied, phantom_data, file, text):
    passed(copied)
    (copied / file).write_text(json.dumps(json.loads((copied / file).read_text()) | text))
    with pytest.raises(InputError, match=rf"in {file} holds a .*nothing was sent") as refused:
        parcel(Outgoing(copied, phantom_data), "user/heads")
    assert not any(value in str(refused.value) for value in text.values())


def test_a_secret_in_a_header_closes_the_gate(copied, phantom_data):
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "by": "patient PH00003"})
    with pytest.raises(InputError, match=r"the header in unet/.* holds a patient's id"):
        parcel(Outgoing(copied, phantom_data, skip_audit=True), "user/heads")


def test_a_key_that_medsd_does_not_write_is_refused(copied, phantom_data):
    record = json.loads((copied / "medsd.json").read_text())
    for spoilt, named in ((record | {"patients": ["a"]}, "patients"), (record | {"data": record["data"] | {"who": 1}}, "data.who")):
        (copied / "medsd.json").write_text(json.dumps(spoilt))
        with pytest.raises(InputError, match=f"holds {named}, which medsd did not write"):
            parcel(Outgoing(copied, phantom_data, skip_audit=True), "user/heads")


def test_the_allowed_keys_are_those_that_are_written(run):
    of_parts = {"data": DataInfo, "hypotheses": Hypotheses, "calibration": Calibration, "base": Base}
    assert INFO_KEYS.keys() == {field.name for field in fields(PipelineInfo)}
    assert all(INFO_KEYS[part] == {field.name for field in fields(kind)} for part, kind in of_parts.items())
    assert json.loads((run / "medsd.json").read_text())["codec"].keys() == INFO_KEYS["codec"]


def test_data_must_be_what_it_was_trained_on(copied, phantom_data, tmp_path):
    passed(copied)
    other = shutil.copytree(phantom_data, tmp_path / "other")
    with pytest.raises(InputError, match=r"other\.private/keys\.parquet is not there"):
        parcel(Outgoing(copied, other), "user/heads")
    info = json.loads((other / "medsd.json").read_text()) | {"fingerprint": "0" * 64}
    (other / "medsd.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match="is not the data that"):
        parcel(Outgoing(copied, other), "user/heads")


def test_an_autoencoder_is_audited_by_its_reconstructions(vae, phantom_data):
    with pytest.raises(InputError, match=r"Type python recipes/push\.py .*--audit_samples 256"):
        parcel(Outgoing(vae, phantom_data), "user/vae")
    record = audit_folder(vae, str(phantom_data), 64, CPU)
    assert record["samples"] == 54 and record["copies"] == 0 and 0 <= record["membership_auroc"] <= 1
    assert record["weights_sha256"] == weights_sha256(vae) and record["extractor"].startswith("codec")
    passed(vae)
    found = parcel(Outgoing(vae, phantom_data), "user/vae")
    assert "reconstructions.png" not in found and "diffusion_pytorch_model.safetensors" in found
    card = text_of(found["README.md"])
    psnr = json.loads((vae / "metrics.json").read_text())["psnr"]
    assert_numbers(card, json.loads((vae / "metrics.json").read_text()), json.loads((vae / "audit.json").read_text()), [], "autoencoder")
    assert f"| PSNR, decibels | {psnr:.3f} |" in card and "54 reconstructions of held-out images" in card
    assert "AutoencoderKL.from_pretrained" in card and card_errors(card, "model") == []


def test_an_autoencoder_that_paints_training_images_fails(vae, phantom_data, tmp_path, monkeypatch):
    from medsd.data.dataset import load_dataset
    from medsd.inference import auditor
    from medsd.inference.auditing import unit_images
    from medsd.inference.folder import read_info

    learnt = torch.cat(list(unit_images(read_info(vae).data, load_dataset(phantom_data, "train").select(range(40)))()))
    monkeypatch.setattr(auditor, "reconstruct", lambda codec, batch, device: learnt.repeat(2, 1, 1, 1)[: len(batch)])
    copied = shutil.copytree(vae, tmp_path / "vae")
    assert audit_folder(copied, str(phantom_data), 24, CPU)["verdict"] == "failed"


def test_the_card_says_what_the_records_say(copied, phantom_data, tmp_path):
    passed(copied)
    report = tmp_path / "report"
    (report / "figures").mkdir(parents=True)
    metrics = {
        "weights_sha256": weights_sha256(copied),
        "split": "test",
        "n": 36,
        "n_real": 36,
        "n_generated": 12,
        "extractor": "unet sha256:0",
    }
    metrics |= {"auroc": 0.8765432, "auroc_ci": [0.7, 0.91234], "ece": 0.0412, "ece_floor": 0.031, "nll": 0.5, "balanced_accuracy": 0.75}
    metrics |= {"fid": 27.86126, "fid_ci": [13.5, 45.5], "fid_floor": 1.626, "kid": 0.1, "auroc/epidural": 0.9, "calibrated": True}
    row = {"column": "sex", "value": "F", "n": 20, "patients": 12, "auroc": 0.85, "auroc_ci": [0.6, 0.95], "nll": None}
    metrics["subgroups"] = [row | dict.fromkeys(("balanced_accuracy", "ece")), row | {"value": "M", "patients": 3}]
    (report / "metrics.json").write_text(json.dumps(metrics))
    for name in ("generated", "real", "audit_pairs", "roc"):
        shutil.copy(copied / "preview.png", report / "figures" / f"{name}.png")
    found = parcel(Outgoing(copied, phantom_data, report, "cc-by-nc-4.0"), "user/heads")
    assert {"figures/generated.png", "figures/roc.png"} == {path for path in found if path.startswith("figures/")}
    card = text_of(found["README.md"])
    assert "| sex | M |" not in card and len(json.loads(text_of(found["metrics.json"]))["subgroups"]) == 1
    assert card_errors(card, "model") == [] and front_of(card.encode())["license"] == "cc-by-nc-4.0"
    parsed = ModelCard(card)
    assert ModelCard(str(parsed)).data.to_dict() == parsed.data.to_dict()
    values = {result.metric_name: result.metric_value for result in parsed.data.eval_results}
    assert values == {name: metrics[name] for name in ("auroc", "balanced_accuracy", "ece", "nll", "fid", "kid")}
    assert "| AUROC | 0.877 [0.700, 0.912] |" in card and "| FID | 27.861 [13.500, 45.500] | 1.626 |" in card
    assert "| sex | F | 20 | 12 | 0.850 [0.600, 0.950] |  |  |  |" in card and "| epidural | 0.900 |" in card
    sent, audit = json.loads(text_of(found["metrics.json"])), json.loads(text_of(found["audit.json"]))
    assert_numbers(card, sent, audit, json.loads((copied / "medsd.json").read_text())["data"]["class_names"])


def test_every_number_stands_in_its_place(copied, phantom_data, tmp_path):
    passed(copied)
    classes = json.loads((copied / "medsd.json").read_text())["data"]["class_names"]
    names = [*CLASSIFICATION.values(), *CALIBRATION.values(), *GENERATED.values(), *(f"{name}_floor" for name in GENERATED.values())]
    names += [f"{stem}/{name}" for stem in BY_CLASS for name in classes]
    metrics = {name: (index + 1) / 1000 for index, name in enumerate(names)}
    metrics |= {f"{name}_ci": [value - 0.0005, value + 0.5] for name, value in metrics.items()}
    row = {name: 0.9 + index / 100 for index, name in enumerate(BY_SUBGROUP)}
    subgroups = [{"column": "sex", "value": sex, "n": n, "patients": n - 1} | row for sex, n in (("F", 40), ("M", 30))]
    told = {"n": 36, "n_real": 35, "n_generated": 12, "extractor": "unet", "split": "test", "subgroups": subgroups, "rows_per_image": 87.5}
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "metrics.json").write_text(json.dumps(metrics | told | {"weights_sha256": weights_sha256(copied)}))
    card = text_of(parcel(Outgoing(copied, phantom_data, tmp_path / "report"), "user/heads")["README.md"])
    assert len(tables(card)["By class"]) == 6 and len(tables(card)["Classification"]) == 9
    assert_numbers(card, metrics | told, json.loads((copied / "audit.json").read_text()), classes)
    assert "36 images of the test split" in card and "87.500 passes" in card and "12 generated against 35 real images" in card
    swapped = metrics | told | {"auroc": metrics["nll"], "nll": metrics["auroc"]}
    with pytest.raises(AssertionError):
        assert_numbers(card, swapped, None, classes)


def test_the_card_counts_what_the_summary_counts(copied, phantom_data):
    passed(copied)
    card = text_of(parcel(Outgoing(copied, phantom_data), "user/heads")["README.md"])
    assert_data(card, json.loads((phantom_data / "summary.json").read_text()))
    assert len({tuple(row[1:]) for row in tables(card)["Data"]}) > 1


def test_a_report_of_other_weights_stays(copied, phantom_data, tmp_path, capsys):
    passed(copied)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "metrics.json").write_text(json.dumps({"auroc": 0.9, "weights_sha256": "0"}))
    assert "metrics.json" not in parcel(Outgoing(copied, phantom_data, tmp_path / "report"), "user/heads")
    assert "which is of other weights" in capsys.readouterr().out


def test_a_run_ends_with_its_card(run, phantom_data):
    card = (run / "README.md").read_text()
    assert "# unet" in card and "Not for clinical use" in card and str(phantom_data) not in card


def test_adapters_of_a_local_base_are_refused_and_merged(run, phantom_data, tmp_path, capsys):
    lora = train(phantom_data, tmp_path / "lora", pretrained_model_name_or_path=str(run), rank=2)
    with pytest.raises(InputError, match="--merge_lora"):
        push.main(PushConfig(pipeline=str(lora)))
    push.main(PushConfig(pipeline=str(lora), merge_lora=True, audit_samples=64, dry_run=True))
    shown = capsys.readouterr().out
    assert "unet/diffusion_pytorch_model.safetensors" in shown and "generated images, drawn in 30 steps, were compared" in shown
    merged, pipe = MedSDPipeline.from_pretrained(tmp_path / "lora_merged"), MedSDPipeline.from_pretrained(lora)
    images = [torch.randint(0, 80, (1, 32, 32)).numpy().astype("int16")]
    ours, theirs = (some.classify(images, mode="full", max_pairs=4).log_likelihoods for some in (pipe, merged))
    assert abs(ours - theirs).max() < 1e-2


def test_merged_adapters_take_no_other_place(run, phantom_data, tmp_path):
    lora = train(phantom_data, tmp_path / "lora", pretrained_model_name_or_path=str(run), rank=2)
    shutil.copytree(run, tmp_path / "lora_merged")
    with pytest.raises(InputError, match="lora_merged holds something else already; move it away"):
        push.main(PushConfig(pipeline=str(lora), merge_lora=True))
    assert weights_sha256(tmp_path / "lora_merged") == weights_sha256(run)


def test_merged_adapters_keep_an_audit_that_failed(run, phantom_data, tmp_path):
    lora = train(phantom_data, tmp_path / "lora", pretrained_model_name_or_path=str(run), rank=2)
    flags = {"pipeline": str(lora), "merge_lora": True, "audit_samples": 64, "dry_run": True}
    push.main(PushConfig(**flags))
    merged = tmp_path / "lora_merged"
    record = json.loads((merged / "audit.json").read_text()) | {"verdict": "failed", "copies": 2}
    (merged / "audit.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="failed its audit"):
        push.main(PushConfig(**flags))


def test_data_that_is_gone_is_not_asked_for_on_the_hub(copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(re.sub(r"dataset_name: .*", "dataset_name: runs/data", config))
    with pytest.raises(InputError, match=r"runs/data: the data that .*unet was trained on is not there; name it with --dataset_name"):
        push.main(PushConfig(pipeline=str(copied)))


def test_names_of_the_data_are_known_where_its_hub_id_is_named(copied, phantom_data):
    """The folder that the training read is still here, and so is what may not be named."""
    passed(copied)
    outgoing = Outgoing(copied, "user/data")
    assert outgoing.secrets().by_length == Outgoing(copied, phantom_data).secrets().by_length != {}
    (copied / "config.yaml").unlink()
    assert outgoing.secrets().by_length == {}


@pytest.mark.parametrize("options", [{"skip_audit": True}, {"checkpoint": 2}])
def test_what_nobody_audited_becomes_public_where_somebody_answers_for_it(copied, phantom_data, options):
    with pytest.raises(InputError, match="needs --confirm_public_data"):
        push_model(Outgoing(copied, phantom_data, **options), Target("user/heads", private=False))
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        push_model(Outgoing(copied, phantom_data, **options, confirmed=True), Target("user/heads", private=False))


def test_an_embedding_of_no_token_stays(copied, phantom_data):
    passed(copied)
    (copied / "learned_embeds").mkdir()
    save_file({"<epidural>": torch.ones(4)}, copied / "learned_embeds" / "epidural.safetensors")
    found = collect(copied)
    assert "learned_embeds/epidural.safetensors" in found
    shutil.copy(copied / "learned_embeds" / "epidural.safetensors", copied / "learned_embeds" / "PH00003.safetensors")
    with pytest.raises(InputError, match=r"learned_embeds holds PH00003\.safetensors, which is of none of its class tokens"):
        collect(copied)


@pytest.mark.parametrize("base", [None, ("user/base", "main")])
@pytest.mark.parametrize(("classes", "prompts"), [((), ()), (('a "b"', "c\\"), ('of "b"', "of c"))], ids=["unconditional", "quotes"])
def test_what_the_card_tells_to_type_is_python(base, classes, prompts):
    data = {"class_names": classes, "prompts": prompts, "class_tokens": [f"<{number}>" for number in range(len(classes))], "resolution": 32}
    for kind, name in (
        ("pipeline", "StableDiffusionPipeline"),
        ("pipeline", "MedSDPipeline"),
        ("lora", "lora"),
        ("autoencoder", "VQModel"),
    ):
        said = loading(Facts("user/x", kind, name, {"data": data, "own_vae": True}, base=base, revision="v1"))
        blocks = re.findall(r"```python\n(.*?)```", said, re.DOTALL)
        assert blocks and all(ast.parse(block) for block in blocks)


def test_a_push_that_failed_says_what_pushes_it_where_it_was_meant_to_go():
    assert Destination("user/x").command == "python recipes/push.py --hub_model_id user/x"
    public = parse(PushConfig, shlex.split(Destination("user/x", private=False).command)[2:])
    assert public.hub_model_id == "user/x" and not public.hub_private_repo


def test_a_destination_is_checked_before_the_training(phantom_data, tmp_path):
    info = load_info(phantom_data)
    with pytest.raises(InputError, match="hf auth login"):
        check_destination(Destination("user/heads"), info, str(phantom_data))


def test_checkpoints_go_to_private_repositories_only():
    flags = {"push_to_hub": True, "hub_model_id": "user/heads", "push_checkpoints": True}
    assert FinetuneUNetConfig(**flags).push_checkpoints
    with pytest.raises(InputError, match="a private repository"):
        FinetuneUNetConfig(**flags, hub_private_repo=False)


def test_one_file_holds_all_that_the_pipeline_needs():
    source = pipeline_source()
    tree = ast.parse(source)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.split(".")[0] in {"medsd", ""}]
    assert {name.split(".")[0] for name in imported} <= {
        *sys.stdlib_module_names,
        "numpy",
        "torch",
        "diffusers",
        "transformers",
        "PIL",
        "scipy",
    }
    assert source == pipeline_source() and "def denoising_error(" in source and source.count("class DiffusionClassifierPipeline") == 1


def test_two_names_that_are_the_same_do_not_fit_into_one_file(tmp_path, monkeypatch):
    from medsd.hub import standalone

    (tmp_path / "a.py").write_text("from medsd.b import second\n\ndef same():\n    pass\n\ndef first():\n    same()\n    second()\n")
    (tmp_path / "b.py").write_text("def same():\n    pass\n\ndef second():\n    same()\n")
    monkeypatch.setattr(standalone, "PACKAGE", tmp_path)
    standalone.read_module.cache_clear()
    with pytest.raises(ValueError, match=r"same is a name in medsd\.b and in medsd\.a"):
        in_one_file("medsd.a", "first")
    standalone.read_module.cache_clear()


def test_imports_within_functions_and_comments(tmp_path, monkeypatch):
    from medsd.hub import standalone

    (tmp_path / "a.py").write_text(
        'import math\n\nLIMIT = 3\n"""Of what."""\nUNUSED = 4\n\n\ndef first(x):\n    """Twice."""\n    from medsd.b import second\n\n'
        "    # Why it is so.\n    return second(math.floor(x)) + LIMIT\n"
    )
    (tmp_path / "b.py").write_text("import os\n\n\ndef second(x):\n    return 2 * x\n")
    monkeypatch.setattr(standalone, "PACKAGE", tmp_path)
    standalone.read_module.cache_clear()
    source = in_one_file("medsd.a", "first")
    standalone.read_module.cache_clear()
    names = {}
    exec(source, names)
    assert names["first"](2.5) == 7 and "# Why it is so." in source and "Of what." in source
    assert "UNUSED" not in source and "import os" not in source and "medsd.b" not in source


def test_what_was_pushed_is_saved_as_it_was(copied, phantom_data, tmp_path):
    """(What it says in plain diffusers is in test_push_shapes.py.)"""
    passed(copied)
    pushed = tmp_path / "pushed"
    for path, content in parcel(Outgoing(copied, phantom_data), "user/heads").items():
        (pushed / path).parent.mkdir(parents=True, exist_ok=True)
        (pushed / path).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    MedSDPipeline.from_pretrained(pushed).save_pretrained(tmp_path / "again")
    index = json.loads((pushed / "model_index.json").read_text())
    assert index.pop("record") == json.loads((tmp_path / "again" / "medsd.json").read_text())
    again = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index == {name: value for name, value in again.items() if name != "_name_or_path"}
    assert weights_sha256(tmp_path / "again") == weights_sha256(pushed)


def test_a_folder_that_is_not_there_or_not_trained_is_named(tmp_path):
    with pytest.raises(InputError, match="gone: no such folder; name one that a training has finished"):
        push.main(PushConfig(pipeline=str(tmp_path / "gone")))
    with pytest.raises(InputError, match="holds neither a pipeline nor an autoencoder"):
        push.main(PushConfig(pipeline=str(tmp_path)))


def test_links_and_foreign_files_do_not_travel(copied, phantom_data, tmp_path):
    passed(copied)
    outside = tmp_path / "diffusion_pytorch_model.safetensors"
    shutil.move(copied / "unet" / "diffusion_pytorch_model.safetensors", outside)
    (copied / "unet" / "diffusion_pytorch_model.safetensors").symlink_to(outside)
    with pytest.raises(InputError, match="is a link"):
        collect(copied)
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (copied / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(InputError, match="holds no safetensors"):
        collect(copied)
