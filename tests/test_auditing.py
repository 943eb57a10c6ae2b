"""Generated images to be judged: how many of each class, and what the audit says of a pipeline's folder."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch

from medsd import MedSDPipeline
from medsd.data.dataset import load_dataset, load_info
from medsd.data.transforms import column, row_labels
from medsd.errors import InputError
from medsd.evaluation.resampling import mean_with_interval
from medsd.hub.contents import weights_sha256
from medsd.inference.auditing import Seen, audit_record, audit_rows, copies_among, membership_signal, own_prompts, replaces, unit_images
from medsd.inference.extractors import extract, load_extractor
from medsd.inference.gallery import Gallery
from medsd.inference.generating import Sampling, describe_scheduler, use_scheduler
from medsd.inference.judging import APART, Judged, judged_rows, matching_places, plan_samples
from medsd.report.images import class_grids
from medsd.training.discriminative import chosen_extractor
from medsd.training.fitting import adopt


@pytest.fixture(scope="module")
def pipe(phantom_data):
    torch.manual_seed(0)
    pipe = MedSDPipeline.from_preset("tiny", load_info(phantom_data), pixel_std=0.5)
    pipe.set_progress_bar_config(disable=True)
    adopt(pipe, load_info(phantom_data))
    return pipe


def test_classes_are_generated_as_often_as_they_are_real():
    labels = np.array([0] * 60 + [1] * 30 + [2] + [-1] * 9)
    plan = plan_samples(labels, ["a", "b", "c", "d"], 45, batch_size=16)
    counts = {name: sum(len(batch.indices) for batch in plan if batch.class_name == name) for name in "abcd"}
    assert counts == {"a": 30, "b": 15, "c": 1, "d": 0}
    assert max(len(batch.indices) for batch in plan) == 16
    assert [index for batch in plan if batch.class_name == "a" for index in batch.indices] == list(range(30))


def test_nothing_to_compare_with_is_said():
    with pytest.raises(InputError, match="nothing to compare"):
        plan_samples(np.array([-1, -1]), ["a", "b"], 10, 4)


def test_matching_places_are_of_the_classes_wanted():
    labels = np.array([0, 1, 0, 1, 1, 2, -1])
    places = matching_places(labels, np.array([1, 5, 0]), seed=3)
    assert sorted(labels[places]) == [0, 1, 1, 1] and np.array_equal(places, np.sort(places))
    assert np.array_equal(places, matching_places(labels, np.array([1, 5, 0]), seed=3))


def test_a_stopped_drawing_goes_on_and_comes_out_the_same(pipe, tmp_path):
    plan, sampling = plan_samples(np.array([0, 1, 1]), pipe.class_names, 6, 2), Sampling(num_inference_steps=2)

    def judged(name):
        gallery = Gallery(tmp_path / name, {"a": 1})
        gallery.begin()
        return Judged(gallery, plan, pipe.class_names)

    whole, shared, drawn = judged("whole"), judged("shared"), []
    whole.draw(pipe, sampling, 0, 1)
    shared.draw(pipe, sampling, 1, 2)
    shared.draw(pipe, sampling, 0, 1, drawn.append)
    assert sum(drawn) < 6
    assert torch.equal(torch.cat(list(whole.batches())), torch.cat(list(shared.batches())))
    assert whole.labels.tolist() == [0, 0, 1, 1, 1, 1] and whole.told(5)[-1] == {"class": pipe.class_names[1], "seed": 5 + APART + 3}


def test_planted_training_images_fail_the_audit_of_a_folder(pipe, phantom_data, tmp_path):
    training, held_out = (load_dataset(phantom_data, split) for split in ("train", "test"))
    extractor = load_extractor("unet", pipe, pipe.device)
    planted, looked_at = next(unit_images(pipe.data, training)())[:12].flip(-1), []
    samples = Seen.of(lambda: iter([planted]), extract(extractor, planted).values)
    found, rate = audit_rows(extractor, samples, pipe.data, training, held_out, 0.05, looked_at.append)
    assert rate == 0.05 and sum(looked_at) == 2 * len(training) + len(held_out)
    assert found.copies.all() and found.nearest.tolist() == list(range(12))
    pipe.save_pretrained(tmp_path / "unet")
    keys = column(training, "key").to_pylist()
    record = audit_record(
        tmp_path / "unet",
        pipe.fingerprint(),
        pipe.data,
        found,
        0.05,
        "unet sha256:0",
        keys,
        [{"class": None, "index": i} for i in range(12)],
        {"num_inference_steps": 30},
    )
    assert record["verdict"] == "failed" and record["weights_sha256"] == weights_sha256(tmp_path / "unet")
    assert record["flagged_samples"][3]["nearest"] == keys[3] and json.dumps(record)


def test_the_audit_is_of_exactly_these_weights(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "unet")
    before = weights_sha256(tmp_path / "unet")
    with torch.no_grad():
        weight = next(pipe.text_encoder.parameters())
        weight += 1
        pipe.save_pretrained(tmp_path / "other")
        weight -= 1
    assert weights_sha256(tmp_path / "other") != before
    with pytest.raises(InputError, match="no safetensors"):
        weights_sha256(tmp_path)


def test_one_held_out_patient_is_no_reference(pipe):
    small = Seen(torch.zeros(3, 1, 32, 32), np.zeros((3, 2)), ["a"] * 3)
    with pytest.raises(InputError, match="two or more"):
        copies_among(small, small, np.zeros((3, 2)), small, 0.5)


def test_an_untrained_model_knows_no_members(pipe, phantom_data):
    training, held_out = (load_dataset(phantom_data, split) for split in ("train", "test"))
    signal = membership_signal(pipe, training, held_out)
    low, high = signal["membership_auroc_ci"]
    assert low < 0.55 and high > 0.45


def test_prompts_are_each_image_s_own(pipe, phantom_data):
    rows = load_dataset(phantom_data, "test")
    prompts = own_prompts(pipe, row_labels(rows))
    assert prompts == list(rows["prompt"])
    assert own_prompts(pipe, np.array([-1])) == [""]


def test_a_mean_s_interval_goes_by_patient():
    draws = np.random.default_rng(0)
    values = np.repeat(draws.normal(size=40), 5)
    by_patient = mean_with_interval("x", values, [str(i // 5) for i in range(200)])
    by_image = mean_with_interval("x", values, [str(i) for i in range(200)])
    assert by_patient["x"] == by_image["x"] == pytest.approx(values.mean())
    assert np.diff(by_patient["x_ci"]) > 1.5 * np.diff(by_image["x_ci"])
    assert mean_with_interval("x", values, ["a"] * 200)["x_ci"] is None


def test_images_are_judged_in_the_pipeline_s_classes(pipe, phantom_data, tmp_path):
    rows, labels = judged_rows(pipe, str(phantom_data), "test")
    assert labels.tolist() == list(load_dataset(phantom_data, "test")["label"]) == list(rows["label"])
    shutil.copytree(phantom_data, tmp_path / "data")
    names = load_info(phantom_data).class_names
    others = ["hygroma", *names[:0:-1]]  # None of ours, and the rest the other way round.
    info = json.loads((tmp_path / "data/medsd.json").read_text())
    (tmp_path / "data/medsd.json").write_text(json.dumps(info | {"class_names": others}))
    known, labels = judged_rows(pipe, str(tmp_path / "data"), "test")
    assert [others[label] for label in known["label"]] == [names[label] for label in labels]
    assert len(known) == sum(label > 0 for label in rows["label"])
    assert len(judged_rows(pipe, str(tmp_path / "data"), "test", [f"hygroma={names[0]}"])[0]) == len(rows)


def test_an_audit_of_fewer_samples_replaces_none_of_more(tmp_path):
    sampling = {"num_inference_steps": 30}
    audit = {"weights_sha256": "a", "samples": 80, "held_out": 48, "verdict": "passed", "sampling": sampling, "false_positive_rate": 0.01}
    audit |= {"training_images": 9, "flagged": 0, "copies": 0, "membership_auroc": 0.5}
    assert replaces(audit, tmp_path)
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    assert replaces(audit, tmp_path) and not replaces(audit | {"samples": 70}, tmp_path)
    assert replaces(audit | {"samples": 12, "verdict": "failed"}, tmp_path)
    assert replaces(audit | {"samples": 12, "weights_sha256": "b"}, tmp_path)
    assert not replaces(audit | {"samples": 99, "sampling": {"num_inference_steps": 1}}, tmp_path), "an audit of noise"
    (tmp_path / "audit.json").write_text(json.dumps({"weights_sha256": "a", "samples": 99, "held_out": 48, "verdict": "passed"}))
    assert replaces(audit, tmp_path), "an older medsd did not say how images were drawn"
    (tmp_path / "audit.json").write_text(json.dumps(audit | {"verdict": "failed"}))
    assert not replaces(audit, tmp_path) and replaces(audit | {"samples": 81}, tmp_path)
    (tmp_path / "audit.json").write_text("{")
    assert replaces(audit, tmp_path), "a damaged one"


def test_rows_of_few_images_end_in_black(pipe, phantom_data, tmp_path):
    rows, labels = judged_rows(pipe, str(phantom_data), "test")
    kept = np.sort(np.concatenate([np.flatnonzero(labels == number)[: 1 if number == 2 else 3] for number in (0, 2)]))
    gallery = Gallery(tmp_path / "drawn", {"a": 1})
    gallery.begin()
    judged = Judged(gallery, plan_samples(labels[kept], pipe.class_names, len(kept), 2), pipe.class_names)
    judged.draw(pipe, Sampling(num_inference_steps=2), 0, 1)
    grids = class_grids(pipe, rows.select(kept), labels[kept], judged)
    assert grids.keys() == {"real", "generated"}
    for sheet in grids.values():
        assert sheet.shape == (6, 3, 32, 32)
        assert (sheet.reshape(6, 3, -1).max(2) > 0).tolist() == [[True] * 3, [False] * 3, [True, False, False], *[[False] * 3] * 3]


def test_a_judge_sees_images_as_the_pipeline_does(pipe, phantom_data, tmp_path):
    shutil.copytree(phantom_data, tmp_path / "data")
    info = json.loads((tmp_path / "data/medsd.json").read_text())
    (tmp_path / "data/medsd.json").write_text(json.dumps(info | {"unit": "grey value"}))
    with pytest.raises(InputError, match="prepare it alike"):
        chosen_extractor(str(tmp_path / "data"), pipe, str(phantom_data))


def test_a_scheduler_is_described_alike_in_every_process(pipe):
    other = copy.copy(pipe)
    use_scheduler(other, "DPMSolverMultistepScheduler")
    assert any(name.startswith("_") for name in other.scheduler.config)
    assert not any(name.startswith("_") for name in describe_scheduler(other)) and describe_scheduler(other) != describe_scheduler(pipe)
