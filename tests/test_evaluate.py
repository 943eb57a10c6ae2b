"""`recipes/evaluate.py` as a user types it: numbers, audit and report, resumed, refused."""

import json
import shutil
from dataclasses import replace

import pyarrow.parquet
import pytest
import torch
from diffusers import AutoencoderKL

from medsd import MedSDPipeline
from medsd.config import ClassifyConfig, EvaluateConfig
from medsd.data.dataset import load_dataset, load_info
from medsd.data.phantom import write_phantom
from medsd.data.prepare import PrepareOptions, prepare_phantom
from medsd.errors import InputError
from medsd.hub.contents import weights_sha256
from medsd.report.collect import no_scores
from medsd.training.fitting import adopt
from recipes import classify, evaluate


@pytest.fixture(scope="module", autouse=True)
def few_pairs_and_pixels():
    """Of what looks at real images with many pairs each, whose bounds are tested elsewhere, and of figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "BOUND_IMAGES", 8)
        patch.setattr(evaluate, "BOUND_PAIRS", 4)
        patch.setattr("medsd.inference.auditing.MEMBERS", 24)
        patch.setattr("medsd.report.page.CHART_DPI", 50)
        patch.setattr("medsd.report.page.PICTURE_DPI", 50)
        yield


@pytest.fixture(scope="module")
def run(phantom_data, tmp_path_factory):
    """An untrained pipeline of the phantom, scored."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    info = load_info(phantom_data)
    pipe = MedSDPipeline.from_preset("tiny", info, pixel_std=0.5)
    adopt(pipe, info)
    pipe.save_pretrained(folder / "unet")
    classify.main(
        ClassifyConfig(
            pipeline=str(folder / "unet"), dataset_name=str(phantom_data), output_dir=str(folder / "scores"), max_pairs=2, calibrate="none"
        )
    )
    return folder


@pytest.fixture(scope="module")
def config(run, phantom_data):
    return EvaluateConfig(
        pipeline=str(run / "unet"),
        dataset_name=str(phantom_data),
        output_dir=str(run / "report"),
        scores=str(run / "scores"),
        sweep=str(run / "sweep"),
        num_samples=48,
        num_inference_steps=2,
    )


@pytest.fixture(scope="module")
def report(config, run):
    evaluate.main(config)
    return run / "report"


def test_numbers_of_all_parts(report):
    metrics = json.loads((report / "metrics.json").read_text())
    for name in ("fid", "kid", "precision", "recall", "density", "coverage", "auroc", "bits_per_dim", "similarity_of_generated"):
        low, high = metrics[f"{name}_ci"]
        assert low <= metrics[name] <= high or name in {"kid"}, name
    assert metrics["fid"] > 3 * metrics["fid_floor"]  # An untrained model draws nothing like a head.
    assert metrics["n_generated"] == 48 and metrics["extractor"].startswith("unet sha256:")
    assert metrics["psnr"] is None and "no autoencoder" in metrics["reasons"]["psnr"]
    assert metrics["fid/epidural"] > 0 and metrics["agreement"] is None
    assert all(name in metrics["reasons"] for name, value in metrics.items() if value is None and name != "calibration")


def test_the_audit_is_of_these_weights_and_lies_in_the_pipeline_too(report, run):
    audit = json.loads((report / "audit.json").read_text())
    assert audit["weights_sha256"] == weights_sha256(run / "unet") and audit["verdict"] == "passed" and audit["copies"] == 0
    assert json.loads((run / "unet/audit.json").read_text()) == audit


def test_the_report_names_no_path(report, run, phantom_data):
    page = (report / "report.html").read_text()
    assert str(run) not in page and str(phantom_data) not in page
    for folder in (report,):
        for file in (*folder.glob("*.json"), *folder.glob("*.html")):
            assert str(run.parent) not in file.read_text() and run.name not in file.read_text(), file
    assert all(heading in page for heading in ("Numbers", "Images", "Classifier", "Copies of training images"))
    assert {"generated.png", "real.png", "roc.png", "audit_distances.png"} <= {file.name for file in (report / "figures").iterdir()}


def test_a_stopped_run_goes_on_from_what_is_drawn(config, run, monkeypatch):
    monkeypatch.setattr(evaluate, "classifier", lambda evaluation: (_ for _ in ()).throw(KeyboardInterrupt))
    again = replace(config, output_dir=str(run / "again"))
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(again)
    assert not (run / "again").exists()
    monkeypatch.undo()
    monkeypatch.setattr("medsd.inference.judging.draw_batch", None)  # Nothing is drawn twice.
    evaluate.main(again)
    first, second = (json.loads((run / name / "metrics.json").read_text()) for name in ("report", "again"))
    assert first["fid"] == second["fid"] and not list(run.glob(".again*"))


def test_without_scores_there_is_a_report_all_the_same(config, run):
    evaluate.main(replace(config, output_dir=str(run / "unscored"), scores=str(run / "nothing"), num_samples=12))
    metrics = json.loads((run / "unscored/metrics.json").read_text())
    assert metrics["auroc"] is None and "classify.py" in metrics["reasons"]["auroc"] and metrics["auroc_ci"] is None
    assert str(run) not in json.dumps(metrics)


def test_scores_of_another_pipeline_or_other_images_are_left_out(run, phantom_data, tmp_path):
    pipe = MedSDPipeline.from_pretrained(run / "unet")
    scores = json.loads((run / "scores/metrics.json").read_text())
    assert scores["pipeline"] == pipe.fingerprint() and no_scores(run / "scores", pipe, str(phantom_data)) == ""
    (tmp_path / "metrics.json").write_text(json.dumps(scores | {"pipeline": "another"}))
    shutil.copy(run / "scores/likelihoods.parquet", tmp_path)
    assert "another pipeline" in no_scores(tmp_path, pipe, str(phantom_data))
    (tmp_path / "metrics.json").write_text(json.dumps(scores))
    table = pyarrow.parquet.read_table(tmp_path / "likelihoods.parquet")
    trained = load_dataset(str(phantom_data), "train")["key"][: len(table)]
    pyarrow.parquet.write_table(table.set_column(0, "key", [trained]), tmp_path / "likelihoods.parquet")
    assert "other images" in no_scores(tmp_path, pipe, str(phantom_data))


def test_an_unconditional_pipeline_is_judged_as_a_whole(config, run, phantom_data, tmp_path):
    torch.manual_seed(0)
    info = load_info(phantom_data).without_classes()
    pipe = MedSDPipeline.from_preset("tiny", info, pixel_std=0.5)
    adopt(pipe, info)
    pipe.save_pretrained(tmp_path / "unet")
    evaluate.main(replace(config, pipeline=str(tmp_path / "unet"), output_dir=str(tmp_path / "out"), num_samples=12))
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["fid"] > 0 and metrics["auroc"] is None and not any(name.startswith("fid/") for name in metrics)


@pytest.mark.slow
def test_what_others_learn_from_the_images(config, run, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))  # Where a ResNet of the data may be from an earlier run.
    monkeypatch.setattr("medsd.training.discriminative.QUICK_EPOCHS", 4)
    monkeypatch.setattr("medsd.training.discriminative.QUICK_UPDATES", 30)
    evaluate.main(replace(config, output_dir=str(run / "utility"), utility=True, features=config.dataset_name))
    metrics = json.loads((run / "utility/metrics.json").read_text())
    assert metrics["extractor"].startswith("resnet sha256:")
    assert metrics["agreement"] <= metrics["agreement_of_real"]
    assert 0 <= metrics["utility/synthetic/auroc"] <= 1 and metrics["utility/real/images"] == 48


def test_what_cannot_be_judged_is_refused(config, run, tmp_path):
    with pytest.raises(InputError, match="not empty"):
        evaluate.main(replace(config, scores=str(run / "nothing")) if (run / "report").exists() else config)
    with pytest.raises(InputError, match="--features"):
        evaluate.main(replace(config, output_dir=str(tmp_path / "a"), features="no/such/thing"))
    other = tmp_path / "data"
    shutil.copytree(config.dataset_name, other)
    info = json.loads((other / "medsd.json").read_text())
    (other / "medsd.json").write_text(json.dumps(info | {"unit": "grey value"}))
    with pytest.raises(InputError, match="same kind"):
        evaluate.main(replace(config, output_dir=str(tmp_path / "b"), dataset_name=str(other)))


def test_other_data_with_other_names_is_judged_without_an_audit(config, run, tmp_path, capsys, monkeypatch):
    other = tmp_path / "data"
    shutil.copytree(config.dataset_name, other)
    info = json.loads((other / "medsd.json").read_text())
    names = [f"a {name}" for name in info["class_names"]]
    (other / "medsd.json").write_text(json.dumps(info | {"fingerprint": "0" * 64, "class_names": names}))
    patients = set(load_dataset(str(other), "test")["patient_id"])
    monkeypatch.setattr("medsd.inference.folder.training_patients", lambda folder: {*list(patients)[:2], "another"})
    small = replace(config, output_dir=str(tmp_path / "out"), dataset_name=str(other), num_samples=12)
    with pytest.raises(InputError, match="--label_map"):
        evaluate.main(small)
    evaluate.main(replace(small, label_map=tuple(f"{name}={ours}" for name, ours in zip(names, info["class_names"], strict=True))))
    said = capsys.readouterr().out
    assert "no audit" in said and "2 patients" in said and not (tmp_path / "out/audit.json").exists()
    there, here = (json.loads((folder / "metrics.json").read_text()) for folder in (run / "scores", tmp_path / "out"))
    assert there["auroc"] == here["auroc"] and here["fid"] > 0 and "fid/epidural" in here


KINDS = {"findings": {"multi_label": True}, "images with masks, in latents": {"mask_channel": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_data(kind, tmp_path):
    write_phantom(tmp_path / "dicom", patients=24, slices=4, size=64, multi_label=kind == "findings")
    prepare_phantom(tmp_path / "data", PrepareOptions(resolution=32, num_workers=0, **KINDS[kind]), tmp_path / "dicom")
    info = load_info(tmp_path / "data")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(2, 2, block_out_channels=(32, 32), latent_channels=4, **blocks) if "latents" in kind else None
    pipe = MedSDPipeline.from_preset("tiny", info, vae, pixel_std=0.5)
    adopt(pipe, info)
    pipe.save_pretrained(tmp_path / "unet")
    flags = {name: str(tmp_path / name) for name in ("scores", "sweep")} | {"num_samples": 12, "num_inference_steps": 2}
    evaluate.main(EvaluateConfig(str(tmp_path / "unet"), str(tmp_path / "data"), output_dir=str(tmp_path / "out"), **flags))
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["fid"] > 0 and (metrics["bits_per_dim"] is None) == (metrics["psnr"] is not None) == (vae is not None)
    assert {f"fid/{name}" for name in info.class_names} <= metrics.keys()
    assert json.loads((tmp_path / "out/audit.json").read_text())["samples"] == metrics["n_generated"] >= 10
