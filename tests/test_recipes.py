"""What a user types: every recipe's main for two steps, resumes, and refusals."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from medsd import MedSDPipeline, load_dataset
from medsd.config import ClassifyConfig, FinetuneUNetConfig, GenerateConfig
from medsd.data.dataset import data_features, load_info, pack
from medsd.data.intensity import Recorded
from medsd.data.prompts import prompt_of
from medsd.data.transforms import TrainingOrder, recorded_ranges, row_classes
from medsd.errors import InputError
from medsd.models import conditioning
from medsd.training import latents, preview
from medsd.training.fitting import adopt
from recipes import classify, finetune_unet, generate

QUICK = {
    "max_train_steps": 2,
    "validation_steps": 2,
    "checkpointing_steps": 1,
    "logging_steps": 1,
    "train_batch_size": 4,
    "report_to": "none",
    "lr_scheduler": "constant",
}


def train(data, folder, **flags):
    config = FinetuneUNetConfig(dataset_name=str(data), output_dir=str(folder), **(QUICK | flags))
    finetune_unet.main(config)
    return folder


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def run(phantom_data, tmp_path_factory):
    """A pixel run of two steps."""
    return train(phantom_data, tmp_path_factory.mktemp("run") / "unet", report_to="tensorboard")


def test_a_run_holds_what_the_contract_says(run):
    names = {path.name for path in run.iterdir()}
    expected = {"model_index.json", "unet", "text_encoder", "tokenizer", "scheduler", "medsd.json", "config.yaml", "metrics.jsonl"}
    assert expected | {"environment.json", "status.json", "checkpoint-1", "checkpoint-2", "preview.png", "tensorboard"} <= names
    assert json.loads((run / "status.json").read_text()) == {"state": "finished", "step": 2, "reason": ""}
    assert json.loads((run / "model_index.json").read_text())["_class_name"] == "MedSDPipeline"
    assert json.loads((run / "environment.json").read_text())["attention"] == "torch SDPA"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["validation_loss"] < 5 and 0 <= last["validation_auroc"] <= 1
    assert Image.open(run / "preview.png").height > Image.open(run / "preview.png").width


def test_resume_gives_the_same_losses_and_weights(phantom_data, run, tmp_path):
    other = tmp_path / "unet"
    shutil.copytree(run / "checkpoint-1", other / "checkpoint-1")
    train(phantom_data, other, resume_from_checkpoint="latest")
    assert losses(other) == losses(run)[1:]
    for name, value in load_file(run / "unet" / "diffusion_pytorch_model.safetensors").items():
        torch.testing.assert_close(load_file(other / "unet" / "diffusion_pytorch_model.safetensors")[name], value, rtol=0, atol=0)


def test_latest_starts_anew_without_a_checkpoint(phantom_data, run, tmp_path):
    assert losses(train(phantom_data, tmp_path / "unet", resume_from_checkpoint="latest")) == losses(run)


def test_accumulation_counts_updates(phantom_data, tmp_path):
    folder = train(
        phantom_data, tmp_path / "unet", gradient_accumulation_steps=2, gradient_checkpointing=True, mixed_precision="bf16", random_shift=2
    )
    assert len(losses(folder)) == 2 and all(np.isfinite(losses(folder)))


def test_8bit_adam_steps_on_a_cpu_and_resumes(phantom_data, run, tmp_path):
    folder = train(phantom_data, tmp_path / "unet", use_8bit_adam=True, max_train_steps=1, learning_rate=0.01, use_ema=False)
    before = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    train(phantom_data, folder, use_8bit_adam=True, learning_rate=0.01, use_ema=False, resume_from_checkpoint="latest")
    after = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_unconditional_generates_and_refuses_to_classify(phantom_data, tmp_path):
    folder = train(phantom_data, tmp_path / "unet", unconditional=True)
    pipe = MedSDPipeline.from_pretrained(folder)
    assert pipe.class_names == []
    assert pipe(num_inference_steps=2, output_type="source").images.shape == (1, 1, 32, 32)
    with pytest.raises(InputError, match="two or more"):
        pipe.classify([load_dataset(phantom_data, "test")[0]["image"]])


def test_words_instead_of_tokens(phantom_data, tmp_path):
    pipe = MedSDPipeline.from_pretrained(train(phantom_data, tmp_path / "unet", class_tokens="words"))
    assert pipe.data.prompts[1] == "a head CT with epidural" and pipe.data.class_tokens == []


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_predictions(phantom_data, tmp_path, prediction_type):
    pipe = MedSDPipeline.from_pretrained(
        train(phantom_data, tmp_path / "unet", prediction_type=prediction_type, snr_gamma=5.0, loss_type="huber")
    )
    assert pipe.scheduler.config.prediction_type == pipe.noise_schedule.config.prediction_type == prediction_type


def test_lora_reloads_equal_with_another_alpha(phantom_data, run, tmp_path):
    flags = {"pretrained_model_name_or_path": str(run), "rank": 2, "lora_alpha": 8, "learning_rate": 0.05, "use_ema": False}
    folder = train(phantom_data, tmp_path / "lora", **flags)
    assert (folder / "pytorch_lora_weights.safetensors").is_file() and not (folder / "unet").exists()
    embeds = load_file(folder / "learned_embeds" / "epidural.safetensors")
    pipe = MedSDPipeline.from_pretrained(folder)
    token = pipe.tokenizer.convert_tokens_to_ids("<epidural>")
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[token], embeds["<epidural>"])
    checkpoint = load_file(folder / "checkpoint-2" / "weights.safetensors")
    adapted = dict(pipe.unet.named_parameters())
    trained = {name.removeprefix("unet."): value for name, value in checkpoint.items() if name.startswith("unet.")}
    assert trained and all(
        torch.equal(adapted[name.replace(".default.", ".default_0.")] if name not in adapted else adapted[name], value)
        for name, value in trained.items()
    )
    layer = next(module for module in pipe.unet.modules() if hasattr(module, "scaling"))
    assert set(layer.scaling.values()) == {4.0}
    again = tmp_path / "elsewhere" / "again"
    pipe.save_pretrained(again)
    image, other = (
        p(class_name="normal", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for p in (MedSDPipeline.from_pretrained(again), MedSDPipeline.from_pretrained(folder))
    )
    np.testing.assert_array_equal(image, other)


def test_going_on_from_a_lora_run_trains_the_merged_model(phantom_data, run, tmp_path):
    lora = train(phantom_data, tmp_path / "lora", pretrained_model_name_or_path=str(run), rank=2, learning_rate=0.05)
    adapted = MedSDPipeline.from_pretrained(lora)
    with pytest.raises(InputError, match="only this machine has"):
        adapted.push_to_hub("somebody/something")
    with pytest.raises(InputError, match="LoRA run"):
        train(phantom_data, tmp_path / "twice", pretrained_model_name_or_path=str(lora), rank=2)
    images = list(load_dataset(phantom_data, "test")[:2]["image"])
    expected = adapted.classify(images, mode="full", max_pairs=4).log_likelihoods
    adapted.merge_lora()
    np.testing.assert_allclose(adapted.classify(images, mode="full", max_pairs=4).log_likelihoods, expected, rtol=1e-4)
    folder = train(phantom_data, tmp_path / "full", pretrained_model_name_or_path=str(lora))
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file() and MedSDPipeline.from_pretrained(folder).info.base is None


def test_lora_of_a_half_precision_base(phantom_data, run, tmp_path):
    folder = train(phantom_data, tmp_path / "lora", pretrained_model_name_or_path=str(run), rank=2, mixed_precision="bf16")
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_overwrite_checks_before_it_deletes(phantom_data, run, tmp_path):
    folder = train(phantom_data, tmp_path / "unet")
    unfit = [{"vae": "nowhere"}, {"pretrained_model_name_or_path": str(folder)}, {"enable_xformers_memory_efficient_attention": True}]
    for flags in [*unfit, {"unconditional": True, "best_metric": "auroc"}]:
        with pytest.raises(InputError):
            train(phantom_data, folder, overwrite=True, **flags)
    assert MedSDPipeline.from_pretrained(folder).class_names
    for recipe, config in ((generate, GenerateConfig), (classify, ClassifyConfig)):
        with pytest.raises(InputError, match="which only finetune_unet.py replaces"):
            recipe.main(config(output_dir=str(folder), overwrite=True))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("do not lose")
    with pytest.raises(InputError, match="not the folder of one run"):
        train(phantom_data, mine, overwrite=True)
    assert (mine / "thesis.txt").read_text() == "do not lose"


def test_a_lora_run_notices_a_changed_base(phantom_data, tmp_path):
    base = train(phantom_data, tmp_path / "base")
    folder = train(phantom_data, tmp_path / "lora", pretrained_model_name_or_path=str(base), rank=2)
    train(phantom_data, base, overwrite=True, seed=7)
    with pytest.raises(InputError, match="changed since"):
        MedSDPipeline.from_pretrained(folder)


def test_only_class_tokens_of_a_pretrained_text_encoder_learn(phantom_data, run, tmp_path):
    folder = train(phantom_data, tmp_path / "unet", pretrained_model_name_or_path=str(run), use_ema=False, learning_rate=0.01)
    before, after = (load_file(path / "text_encoder" / "model.safetensors") for path in (run, folder))
    tokens = MedSDPipeline.from_pretrained(folder).tokenizer.convert_tokens_to_ids(MedSDPipeline.from_pretrained(folder).data.class_tokens)
    for name, value in before.items():
        same = (value == after[name]).reshape(len(value), -1).all(1) if value.ndim else value == after[name]
        if "token_embedding" in name:
            assert not same[tokens].all() and same[[row for row in range(len(value)) if row not in tokens]].all()
        else:
            assert same.all(), name


def test_a_run_goes_on_with_other_classes(phantom_data, run, tmp_path):
    pipe = MedSDPipeline.from_pretrained(run)
    info = replace(
        load_info(phantom_data),
        class_names=["glioma", "normal"],
        class_tokens=["<glioma>", "<normal>"],
        prompts=["an MRI of <glioma>", "an MRI of <normal>"],
    )
    size = len(pipe.tokenizer)
    adopt(pipe, info)
    assert pipe.class_names == ["glioma", "normal"] and len(pipe.tokenizer) == size + 1
    pipe.save_pretrained(tmp_path / "next")
    assert MedSDPipeline.from_pretrained(tmp_path / "next").class_names == ["glioma", "normal"]


def test_generate_writes_images_by_class(run, tmp_path):
    config = GenerateConfig(
        pipeline=str(run), output_dir=str(tmp_path / "images"), num_images=3, num_inference_steps=2, batch_size=2, guidance_scale=2.0
    )
    generate.main(config)
    manifest = [json.loads(line) for line in (tmp_path / "images" / "manifest.jsonl").read_text().splitlines()]
    assert len(manifest) == 18 and manifest[2].items() >= {"file": "normal/00002.png", "class": "normal", "seed": 2}.items()
    assert Image.open(tmp_path / "images" / "epidural" / "00000.png").size == (32, 32)
    generate.main(replace(config, output_dir=str(tmp_path / "one"), class_name=("epidural",), num_images=1))
    one, batch = (np.asarray(Image.open(tmp_path / name / "epidural" / "00000.png")).astype(int) for name in ("one", "images"))
    assert np.abs(one - batch).max() <= 1
    with pytest.raises(InputError, match="not empty"):
        generate.main(config)


def test_classify_writes_scores_and_calibrates_the_folder(phantom_data, run, tmp_path):
    config = ClassifyConfig(pipeline=str(run), dataset_name=str(phantom_data), output_dir=str(tmp_path / "scores"), max_pairs=4)
    classify.main(config)
    table = pyarrow.parquet.read_table(tmp_path / "scores" / "likelihoods.parquet").to_pydict()
    assert list(table)[:6] == ["key", "patient_id", "label", "prediction", "pairs", "rows"] and {
        "loglik/normal",
        "se/epidural",
        "prob/subdural",
    } <= set(table)
    assert sum(table[f"prob/{name}"][0] for name in set(table["label"])) == pytest.approx(1)
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert {"n", "auroc", "auroc_ci", "ece", "ece_floor", "rows_per_image", "seconds_per_image", "auroc/epidural"} <= set(metrics)
    assert metrics["calibrated"] and MedSDPipeline.from_pretrained(run).info.calibration.temperature > 0
    with pytest.raises(InputError, match="not empty"):
        classify.main(config)


def test_data_that_does_not_fit_the_pipeline_is_refused(phantom_data, run, tmp_path):
    other = shutil.copytree(phantom_data, tmp_path / "data")
    for change, message in {
        "unit": ("grey value", "data of the same kind"),
        "resolution": (16, "--resolution 32"),
        "class_names": (["a", "b"], "no class in common"),
    }.items():
        record = json.loads((phantom_data / "medsd.json").read_text())
        (other / "medsd.json").write_text(json.dumps(record | {change: message[0]}))
        with pytest.raises(InputError, match=message[1]):
            classify.main(ClassifyConfig(pipeline=str(run), dataset_name=str(other), output_dir=str(tmp_path / "scores")))
    with pytest.raises(InputError, match="no data folder"):
        classify.main(ClassifyConfig(pipeline=str(run), dataset_name=str(run), output_dir=str(tmp_path / "scores")))


@pytest.mark.parametrize("mode", ["decide", "full"])
def test_other_modes_elbo_and_train_prior(phantom_data, run, tmp_path, mode):
    weighting, prior = ("elbo", "uniform") if mode == "full" else ("uniform", "train")
    classify.main(
        ClassifyConfig(
            pipeline=str(run),
            dataset_name=str(phantom_data),
            output_dir=str(tmp_path / "scores"),
            mode=mode,
            weighting=weighting,
            prior=prior,
            calibrate="none",
            max_pairs=4,
            max_samples=8,
        )
    )
    assert json.loads((tmp_path / "scores" / "metrics.json").read_text())["n"] == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"enable_xformers_memory_efficient_attention": True}, "xformers"),
        ({"mixed_precision": "fp16"}, "needs a GPU"),
        ({"allow_tf32": True}, "--allow_tf32 is for a GPU"),
        ({"pixel_factor": 5}, "--pixel_factor"),
        ({"pretrained_model_name_or_path": "RUN", "codec": "kl"}, "codec is pixels"),
        ({"pixel_factor": 32}, "--resolution"),
        ({"pretrained_model_name_or_path": "nowhere/at/all"}, "no such folder"),
        ({"vae": "nowhere"}, "nowhere: no AutoencoderKL"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "checkpoint-9"),
        ({"dataset_name": "nowhere"}, "prepare_data.py"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="refusals of a CPU machine")
def test_refusals(phantom_data, run, tmp_path, flags, message):
    flags = {name: str(run) if value == "RUN" else value for name, value in flags.items()}
    data = flags.pop("dataset_name", phantom_data)
    with pytest.raises(InputError, match=message):
        train(data, tmp_path / "unet", **flags)
    with pytest.raises(InputError):
        MedSDPipeline.from_pretrained(tmp_path / "unet")


def test_a_used_folder_a_missing_part_and_an_unfinished_run_are_refused(phantom_data, tmp_path):
    folder = train(phantom_data, tmp_path / "unet")
    with pytest.raises(InputError, match="--overwrite"):
        train(phantom_data, folder)
    (folder / "unet" / "config.json").rename(tmp_path / "config.json")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="unet/ is missing"):
        MedSDPipeline.from_pretrained(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(InputError, match="not a finished pipeline"):
        MedSDPipeline.from_pretrained(folder)
    (folder / "status.json").write_text(json.dumps({"state": "running", "step": 1, "reason": ""}))
    with pytest.raises(InputError, match="running at step 1; wait for its end, or go on with .* if it was killed"):
        MedSDPipeline.from_pretrained(folder)


def test_a_failed_run_says_so(phantom_data, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no more")

    monkeypatch.setattr("medsd.objectives.diffusion.denoising_error", broken)
    with pytest.raises(RuntimeError):
        train(phantom_data, tmp_path / "unet")
    assert json.loads((tmp_path / "unet" / "status.json").read_text())["state"] == "failed"
    with pytest.raises(InputError, match="failed at step 0"):
        MedSDPipeline.from_pretrained(tmp_path / "unet")


AGES = ("30-39", "60-69", "90+")


@pytest.fixture(scope="module")
def findings_data(phantom_data, tmp_path_factory):
    """The phantom with several findings, facts in the prompts, and a range recorded for each image."""
    folder = tmp_path_factory.mktemp("findings") / "data"
    info = load_info(phantom_data)
    features = data_features(info.class_names, multi_label=True, with_mask=False, with_range=True)
    for split in ("train", "validation", "test"):
        rows = load_dataset(phantom_data, split)
        changed = [with_findings(row, number, info) for number, row in enumerate(rows)]
        (folder / "data").mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist(changed, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    intensity = Recorded("percentiles", ((0.0, 90.0),)).to_dict()
    (folder / "medsd.json").write_text(json.dumps(replace(info, multi_label=True, intensity=intensity).to_dict()))
    return folder


def with_findings(row, number, info):
    labels = [int(index == row["label"] or (index == 1 and number % 5 == 0)) for index in range(len(info.class_names))]
    tokens = [token for token, holds in zip(info.class_tokens, labels, strict=True) if holds]
    facts = {"age_band": AGES[number % 3], "sex": "female" if number % 2 else None}
    return {
        "key": row["key"],
        "image": pack(row["image"]),
        "labels": labels,
        "prompt": prompt_of(tokens, "a head CT with {label}", facts) if number % 7 else info.prompts[row["label"]],
        "patient_id": row["patient_id"],
        "intensity_range": [[float(row["image"].min()), float(row["image"].max()) + 1]],
    }


def test_findings_and_facts_are_trained_on_and_drawn_by_finding(findings_data, tmp_path):
    flags = {"random_shift": 1, "random_rotation": 5.0, "random_scale": 0.1, "random_intensity": 0.1, "random_flip": "horizontal"}
    folder = train(findings_data, tmp_path / "unet", class_sampling="sqrt", resolution=16, **flags)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["validation_loss"] < 5 and "validation_auroc" not in last
    pipe = MedSDPipeline.from_pretrained(folder)
    assert pipe.data.multi_label and pipe.data.resolution == 16
    assert pipe.tokenizer.tokenize("a head CT with <epidural>, 60-69 years, female") == [
        *("a</w>", "head</w>", "ct</w>", "with</w>", "<epidural>", ",</w>"),
        *("6</w>", "0</w>", "-</w>", "6</w>", "9</w>", "years</w>", ",</w>", "female</w>"),
    ]
    generate.main(
        GenerateConfig(
            pipeline=str(folder), output_dir=str(tmp_path / "images"), class_name=("epidural",), num_images=1, num_inference_steps=2
        )
    )
    assert Image.open(tmp_path / "images" / "epidural" / "00000.png").size == (16, 16)
    source = pipe(class_name="epidural", num_inference_steps=2, output_type="source").images
    assert source.min() >= 0 and source.max() <= 90


def test_sets_of_findings_are_scored(findings_data, phantom_data, run, tmp_path):
    """Hypotheses are the sets seen in training; a finding's probability is the sum over the sets that hold it."""
    folder = train(findings_data, tmp_path / "unet", validation_steps=0)
    config = ClassifyConfig(
        pipeline=str(folder), dataset_name=str(findings_data), output_dir=str(tmp_path / "scores"), max_pairs=4, group_by="patient"
    )
    classify.main(config)
    pipe, metrics = MedSDPipeline.from_pretrained(folder), json.loads((tmp_path / "scores" / "metrics.json").read_text())
    shown = np.array(load_dataset(findings_data, "train")["labels"])
    assert set(pipe.hypotheses.sets) == {tuple(np.flatnonzero(row)) for row in shown} and sum(pipe.hypotheses.counts) == len(shown)
    assert 0 <= metrics["auroc"] <= 1 and metrics["auroc/epidural"] is not None and "patient_auroc" in metrics
    assert metrics["patient_accuracy"] is not None and "patient_accuracy" not in metrics["reasons"]
    table = pyarrow.parquet.read_table(tmp_path / "scores" / "likelihoods.parquet")
    rows = load_dataset(findings_data, "test")
    images = {row["key"]: (row["image"], row["intensity_range"]) for row in rows}
    key = table["key"][0].as_py()
    output = pipe.classify([images[key][0]], max_pairs=4, ranges=np.array([images[key][1]]))
    holds = pipe.hypotheses.membership(6)
    np.testing.assert_allclose(output.probabilities[0], output.posterior.probabilities[0] @ holds)
    np.testing.assert_array_equal([table[f"prob/{name}"][0].as_py() for name in pipe.class_names], output.probabilities[0])
    assert output.predictions[0] == table["prediction"][0].as_py()
    for pipeline, data, scores in ((folder, phantom_data, "single"), (run, findings_data, "sets")):
        classify.main(replace(config, pipeline=str(pipeline), dataset_name=str(data), output_dir=str(tmp_path / scores)))
        assert json.loads((tmp_path / scores / "metrics.json").read_text())["n"] > 0


def test_every_row_is_trained_on_its_own_prompt_and_range(findings_data, tmp_path, monkeypatch):
    """Each batch's numbers, looked up in the table that was tokenized, are the rows' prompts."""
    tables, numbers, ranges, to_unit = [], [], [], latents.to_unit
    tokenize, drop = conditioning.tokenize, conditioning.drop_prompts
    monkeypatch.setattr(conditioning, "tokenize", lambda tokenizer, prompts: tables.append(prompts) or tokenize(tokenizer, prompts))
    monkeypatch.setattr(conditioning, "drop_prompts", lambda prompts, *others: numbers.append(prompts) or drop(prompts, *others))
    monkeypatch.setattr(latents, "to_unit", lambda images, *others: ranges.append(others[1]) or to_unit(images, *others))
    train(findings_data, tmp_path / "unet", validation_steps=0, class_tokens="words")
    table, rows = tables[-1], load_dataset(findings_data, "train")
    assert table[:6] == load_info(findings_data).with_words().prompts and table[-1] == "" and table[6:-1] == sorted(table[6:-1])
    assert "a head CT with epidural and subdural, 60-69 years, female" not in table[:6]
    order = TrainingOrder(row_classes(rows), 4)
    assert len(numbers) == 2
    for indices, batch, own in zip(order, numbers, ranges[-2:], strict=False):
        np.testing.assert_array_equal(own, recorded_ranges(rows)[indices])
        words = [rows[index]["prompt"].replace("<", "").replace(">", "") for index in indices]
        assert [table[number] for number in batch] == words


def test_without_classes_every_prompt_is_empty(findings_data, tmp_path):
    pipe = MedSDPipeline.from_pretrained(train(findings_data, tmp_path / "unet", unconditional=True))
    assert pipe.class_names == [] and "years</w>" not in pipe.tokenizer.get_vocab()


def test_ranges_of_the_data_reach_the_latents(findings_data, tmp_path):
    pipe = MedSDPipeline.from_pretrained(train(findings_data, tmp_path / "unet", validation_steps=0))
    rows = load_dataset(findings_data, "test")
    images, ranges = list(rows["image"]), recorded_ranges(rows)
    unit = pipe.codec.decode(pipe.encode_images(images, ranges)).numpy()
    low, high = ranges[..., 0, None, None], ranges[..., 1, None, None]
    np.testing.assert_allclose(unit, (np.stack(images) - low) / (high - low) * 2 - 1, atol=1e-4)
    with pytest.raises(InputError, match="one per image"):
        pipe.encode_images(images, ranges[:1])


def test_held_out_images_have_their_own_prompts_and_ranges(findings_data, tmp_path, monkeypatch):
    pipe = MedSDPipeline.from_pretrained(train(findings_data, tmp_path / "unet", validation_steps=0))
    rows, seen = load_dataset(findings_data, "validation"), []
    monkeypatch.setattr(preview, "denoising_error", lambda *arguments: seen.extend(arguments) or torch.zeros(1))
    held_out = preview.HeldOut(pipe, str(findings_data))
    held_out.loss()
    latents, conditions = seen[2], seen[5]
    images = [image.tobytes() for image in rows["image"]]
    order = [images.index(image.tobytes()) for image in held_out.images]
    assert len(set(order)) == len(rows)
    with torch.no_grad():
        torch.testing.assert_close(latents, pipe.encode_images(list(rows["image"]), recorded_ranges(rows))[order])
        torch.testing.assert_close(conditions, pipe.encode_prompts(list(rows["prompt"]))[order])


def test_scores_use_the_recorded_range_of_each_image(phantom_data, findings_data, tmp_path, monkeypatch):
    """A single-label copy of the data: classify passes validation's and test's own ranges."""
    data = tmp_path / "data"
    (data / "data").mkdir(parents=True)
    info = load_info(findings_data)
    (data / "medsd.json").write_text(json.dumps(replace(info, multi_label=False).to_dict()))
    features = data_features(info.class_names, multi_label=False, with_mask=False, with_range=True)
    for split in ("train", "validation", "test"):
        rows = pyarrow.parquet.read_table(findings_data / "data" / f"{split}-00000-of-00001.parquet").drop(["labels"]).to_pylist()
        labels = load_dataset(phantom_data, split)["label"]
        table = pyarrow.Table.from_pylist(
            [row | {"label": label} for row, label in zip(rows, labels, strict=True)], schema=features.arrow_schema
        )
        pyarrow.parquet.write_table(table, data / "data" / f"{split}-00000-of-00001.parquet")
    folder, passed, encode = train(data, tmp_path / "unet"), [], MedSDPipeline.encode_images
    monkeypatch.setattr(
        MedSDPipeline, "encode_images", lambda pipe, images, ranges=None: passed.append(ranges) or encode(pipe, images, ranges)
    )
    classify.main(ClassifyConfig(pipeline=str(folder), dataset_name=str(data), output_dir=str(tmp_path / "scores"), max_pairs=2))
    for ranges, split in zip(passed, ("validation", "test"), strict=True):
        rows = load_dataset(data, split)
        np.testing.assert_array_equal(ranges, recorded_ranges(rows.select(np.argsort(rows["key"]))))


def test_a_long_prompt_is_read_by_a_preset_and_refused_by_a_pretrained_model(phantom_data, run, tmp_path):
    data = shutil.copytree(phantom_data, tmp_path / "data")
    for split in ("train", "validation"):
        file = data / "data" / f"{split}-00000-of-00001.parquet"
        table = pyarrow.parquet.read_table(file)
        place = table.column_names.index("prompt")
        prompts = [f"{prompt}, {'very ' * 30}old" for prompt in table["prompt"].to_pylist()]
        pyarrow.parquet.write_table(table.set_column(place, table.schema.field("prompt"), [prompts]), file)
    pipe = MedSDPipeline.from_pretrained(train(data, tmp_path / "unet"))
    assert pipe.tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings == 39
    with pytest.raises(InputError, match="tokens long, the text encoder reads 24"):
        train(data, tmp_path / "other", pretrained_model_name_or_path=str(run))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("shared", [1, 40])
def test_a_long_table_is_encoded_only_where_it_is_needed(shared):
    seen = []

    def text_encoder(ids):
        seen.append(len(ids))
        return (ids.float()[..., None] * 2,)

    table = torch.arange(33 * 5).reshape(33, 5)
    chosen = torch.tensor([7, 32, 7, 0] * shared)
    torch.testing.assert_close(conditioning.encode_chosen(text_encoder, table, chosen), table[chosen].float()[..., None] * 2)
    assert seen == [3 if shared == 1 else 33]


def test_gradients_of_prompts_are_added_in_one_order():
    """However many threads add them: a resumed run has to learn the same to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    table = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0))
    numbers, weights = torch.arange(2048) % 4, torch.randn(2048, 8, 64, generator=torch.Generator().manual_seed(1))

    def gradient():
        encoded = table.clone().requires_grad_()
        (conditioning.encode_chosen(lambda ids: (encoded[ids[:, 0]],), torch.arange(4)[:, None], numbers) * weights).sum().backward()
        return encoded.grad.numpy().tobytes()

    try:
        assert len({gradient() for _ in range(30)}) == 1
    finally:
        torch.set_num_threads(threads)


def test_an_autoencoder_is_trained_at_a_lower_side(findings_data, tmp_path):
    from medsd.config import FinetuneVAEConfig
    from recipes import finetune_vae

    flags = QUICK | {"max_train_steps": 1, "random_rotation": 5.0, "resolution": 16}
    finetune_vae.main(FinetuneVAEConfig(dataset_name=str(findings_data), output_dir=str(tmp_path / "vae"), **flags))
    assert json.loads((tmp_path / "vae" / "medsd.json").read_text())["data"]["resolution"] == 16
    assert Image.open(tmp_path / "vae" / "preview.png").size == (8 * 16 * 8, 2 * 16 * 8)
    with pytest.raises(InputError, match="--resolution 12"):
        finetune_vae.main(
            FinetuneVAEConfig(dataset_name=str(findings_data), output_dir=str(tmp_path / "vae2"), **flags | {"resolution": 12})
        )


@pytest.mark.parametrize(
    "flags", [{"random_rotation": -1.0}, {"random_scale": 1.0}, {"random_intensity": 2.0}, {"random_shift": -1}], ids=str
)
def test_augmentation_out_of_range_is_refused(flags):
    with pytest.raises(InputError, match=f"--{next(iter(flags))}"):
        FinetuneUNetConfig(**flags)
