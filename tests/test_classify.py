"""What a user of classify.py relies on: scores that depend on nothing but the image, runs that go on, foreign data, evidence."""

import json
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from scipy.special import softmax

from medsd import MedSDPipeline
from medsd.config import ClassifyConfig, FinetuneUNetConfig
from medsd.data.dataset import load_dataset, load_info
from medsd.data.transforms import recorded_ranges, stratified
from medsd.errors import InputError
from medsd.inference import scoring
from medsd.inference.likelihood import posterior
from medsd.inference.pictures import LINE
from medsd.output import alone_in
from recipes import classify, finetune_unet
from tests.conftest import REPOSITORY
from tests.test_processes import ENVIRONMENT, LAUNCHERS

QUICK = {"max_pairs": 4, "mode": "decide"}


@pytest.fixture(scope="module")
def run(phantom_data, tmp_path_factory):
    """A trained pipeline, calibrated on plans of 4 pairs."""
    folder = tmp_path_factory.mktemp("run") / "unet"
    flags = {"max_train_steps": 20, "train_batch_size": 8, "validation_steps": 0, "report_to": "none"}
    finetune_unet.main(FinetuneUNetConfig(dataset_name=str(phantom_data), output_dir=str(folder), **flags))
    config = ClassifyConfig(pipeline=str(folder), dataset_name=str(phantom_data), output_dir=str(folder.with_name("first")), **QUICK)
    classify.main(config)
    return folder


def score(run, data, output_dir, **flags):
    classify.main(ClassifyConfig(pipeline=str(run), dataset_name=str(data), output_dir=str(output_dir), **(QUICK | flags)))
    return output_dir


def table(folder):
    return pyarrow.parquet.read_table(folder / "likelihoods.parquet")


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def rewritten(data, folder, change):
    """A copy of a data set whose rows of every split went through `change`."""
    shutil.copytree(data, folder)
    for file in (folder / "data").glob("*.parquet"):
        old = pyarrow.parquet.read_table(file)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(change(old.to_pylist()), schema=old.schema), file)
    return folder


def test_columns_are_those_of_the_contract(run):
    scores = table(run.with_name("first"))
    names = MedSDPipeline.from_pretrained(run).class_names
    expected = ["key", "patient_id", "label", "prediction", "pairs", "rows"]
    expected += [f"{kind}/{name}" for kind in ("loglik", "se", "prob") for name in names]
    assert scores.column_names[: len(expected)] == expected
    assert scores["key"].to_pylist() == sorted(scores["key"].to_pylist())
    found = metrics(run.with_name("first"))
    assert found["n"] == len(scores) and found["failed"] == 0 and found["batch_size"] == 64
    assert 0 < found["rows_per_image"] <= 24 and found["seconds_per_image"] > 0 and len(found["risk_coverage"]) == 10


def test_scores_depend_on_neither_order_nor_batch(run, phantom_data, tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "IMAGES_AT_ONCE", 7)
    shuffled = rewritten(
        phantom_data, tmp_path / "data", lambda rows: [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    )
    again = score(run, shuffled, tmp_path / "scores", batch_size=20)
    assert table(again).equals(table(run.with_name("first")))


@pytest.mark.slow
def test_two_processes_score_the_same(run, phantom_data, tmp_path):
    words = ["recipes/classify.py", "--pipeline", str(run), "--dataset_name", str(phantom_data), "--output_dir", str(tmp_path / "scores")]
    flags = ["--mode", "decide", "--max_pairs", "4", "--batch_size", "32"]
    answer = subprocess.run([*LAUNCHERS[2], *words, *flags], cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert table(tmp_path / "scores").equals(table(run.with_name("first")))


@pytest.mark.slow
def test_two_processes_calibrate_as_one(run, phantom_data, tmp_path):
    """The second scores its share of what the fit of the first asks for."""
    made = []
    for processes in (1, 2):
        pipeline, scores = shutil.copytree(run, tmp_path / f"unet-{processes}"), tmp_path / f"scores-{processes}"
        words = ["recipes/classify.py", "--pipeline", str(pipeline), "--dataset_name", str(phantom_data), "--output_dir", str(scores)]
        flags = ["--mode", "decide", "--max_pairs", "4", "--seed", "1"]
        answer = subprocess.run(
            [*LAUNCHERS[processes], *words, *flags], cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr[-3000:]
        assert answer.stdout.count("calibrated on") == 1
        made.append(MedSDPipeline.from_pretrained(pipeline).info.calibration)
    assert "seed 1" in made[0].source and made[0] == made[1]
    assert table(tmp_path / "scores-1").equals(table(tmp_path / "scores-2"))


def test_a_stopped_run_goes_on_and_scores_no_image_twice(run, phantom_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classify, "IMAGES_AT_ONCE", 8)
    scored, ask = [], MedSDPipeline.classify

    def counted(pipe, images, **options):
        scored.append(len(images))
        if len(scored) == 3:
            raise KeyboardInterrupt
        return ask(pipe, images, **options)

    monkeypatch.setattr(MedSDPipeline, "classify", counted)
    with pytest.raises(KeyboardInterrupt):
        score(run, phantom_data, tmp_path / "scores")
    assert not (tmp_path / "scores").exists() and sum(scored[:2]) == 16
    score(run, phantom_data, tmp_path / "scores")
    assert "16 images are scored already" in capsys.readouterr().out
    assert sum(scored[:2]) + sum(scored[3:]) == len(table(tmp_path / "scores"))
    assert table(tmp_path / "scores").equals(table(run.with_name("first")))
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_two_runs_do_not_share_a_folder(run, phantom_data, tmp_path):
    with alone_in(tmp_path / "scores"), pytest.raises(InputError, match="scores"):
        score(run, phantom_data, tmp_path / "scores")
    assert list(tmp_path.iterdir()) == []


def test_parts_of_other_settings_are_not_mixed_in(run, phantom_data, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(classify, "finish", lambda *arguments: None)
        score(run, phantom_data, tmp_path / "scores", seed=1)
    score(run, phantom_data, tmp_path / "scores")
    assert table(tmp_path / "scores").equals(table(run.with_name("first")))


def test_what_failed_of_other_keys_is_not_of_this_run(run, phantom_data, tmp_path, monkeypatch):
    def damage(rows):
        rows[0]["image"] |= {"shape": [3, 5, 7]}
        return rows

    data, key = rewritten(phantom_data, tmp_path / "data", damage), load_dataset(phantom_data, "test")["key"][2]
    with monkeypatch.context() as broken:
        broken.setattr(classify, "finish", lambda *arguments: None)
        score(run, data, tmp_path / "scores", calibrate="none")
    folder = score(run, data, tmp_path / "scores", calibrate="none", keys=(key,))
    assert table(folder)["key"].to_pylist() == [key] and metrics(folder)["failed"] == 0


def test_a_bad_image_does_not_end_the_run(run, phantom_data, tmp_path):
    def damage(rows):
        rows[0]["image"] |= {"shape": [3, 5, 7]}
        rows[1]["image"] = {"bytes": np.full((1, 32, 32), np.nan, np.float32).tobytes(), "shape": [1, 32, 32], "dtype": "float32"}
        return rows

    data = rewritten(phantom_data, tmp_path / "data", damage)
    own = shutil.copytree(run, tmp_path / "unet")  # It keeps the calibration.
    assert metrics(score(own, data, tmp_path / "calibrated"))["failed"] == 2
    folder = score(run, data, tmp_path / "scores", calibrate="none")
    failures = [json.loads(line) for line in (folder / "failed.jsonl").read_text().splitlines()]
    bad = load_dataset(phantom_data, "test")["key"][:2]
    assert {failure["key"] for failure in failures} == set(bad) and all(failure["reason"] for failure in failures)
    first = table(run.with_name("first"))
    assert table(folder).equals(first.filter(~np.isin(first["key"].to_numpy(), bad)))
    assert metrics(folder)["failed"] == 2


def test_an_image_whose_error_is_not_finite_does_not_end_the_run(run, phantom_data, tmp_path, monkeypatch, capsys):
    """Neither of the images to score nor of those to calibrate on."""
    encode = MedSDPipeline.encode_images
    bad = [load_dataset(phantom_data, split)[4] for split in ("test", "validation")]

    def damaged(pipe, images, ranges=None):
        latents = encode(pipe, images, ranges)
        for place, image in enumerate(images):
            if any(np.array_equal(image, row["image"]) for row in bad):
                latents[place] = torch.nan
        return latents

    monkeypatch.setattr(MedSDPipeline, "encode_images", damaged)
    own = shutil.copytree(run, tmp_path / "unet")
    folder = score(own, phantom_data, tmp_path / "scores", seed=1)
    failures = [json.loads(line) for line in (folder / "failed.jsonl").read_text().splitlines()]
    assert [failure["key"] for failure in failures] == [bad[0]["key"]] and "not finite" in failures[0]["reason"]
    assert len(table(folder)) == len(table(run.with_name("first"))) - 1
    assert f"could not be used, such as {bad[1]['key']}" in capsys.readouterr().out
    assert MedSDPipeline.from_pretrained(own).info.calibration.report["images"] == len(load_dataset(phantom_data, "validation")) - 1


def test_images_of_a_group_are_joined(run, phantom_data, tmp_path):
    """By a temperature that was fitted to groups of that kind, and to no other."""

    def by_class(rows):
        return [row | {"patient_id": f"{row['label']}-{number % 3}"} for number, row in enumerate(rows)]

    data = rewritten(phantom_data, tmp_path / "data", by_class)
    own = shutil.copytree(run, tmp_path / "unet")
    folder = score(own, data, tmp_path / "scores", group_by="patient", seed=1)
    groups, found = pyarrow.parquet.read_table(folder / "groups.parquet"), metrics(folder)
    calibration = MedSDPipeline.from_pretrained(own).info.calibration
    assert calibration.group_temperature > 0 and calibration.joins("series") == (None, "mean")
    assert 6 < len(groups) <= 18 and sum(groups["images"].to_pylist()) == found["n"]
    assert found["patient_accuracy"] is not None and found["patient_auroc_ci"] is not None
    one = groups["patient_id"][0].as_py()
    images = table(folder).filter(np.array([patient == one for patient in table(folder)["patient_id"].to_pylist()]))
    logits = np.stack([np.log(images[f"prob/{name}"].to_numpy()) for name in load_info(data).class_names], 1).sum(0)
    expected = softmax(logits / calibration.group_temperature)
    np.testing.assert_allclose([groups[f"prob/{name}"][0].as_py() for name in load_info(data).class_names], expected, rtol=1e-6)


def test_what_decide_answered_is_what_its_accuracy_counts(run):
    found, scores = metrics(run.with_name("first")), table(run.with_name("first"))
    right = np.array(scores["label"].to_pylist()) == np.array(scores["prediction"].to_pylist())
    assert found["accuracy"] == pytest.approx(right.mean())


def test_classes_of_other_data_match_by_name_or_by_map(run, phantom_data, tmp_path):
    """Other names, another order, one class that the pipeline does not know, and images without a label."""
    names = load_info(phantom_data).class_names
    theirs = ["healthy", *names[:0:-1]]

    def renamed(rows):
        for number, row in enumerate(rows):
            row["label"] = None if number == 0 else theirs.index("healthy" if names[row["label"]] == "normal" else names[row["label"]])
        return rows

    data = tmp_path / "data"
    shutil.copytree(phantom_data, data)
    record = load_info(phantom_data).to_dict() | {"class_names": theirs, "fingerprint": "other"}
    (data / "medsd.json").write_text(json.dumps(record))
    for file in (data / "data").glob("*.parquet"):
        rows = load_dataset(phantom_data, file.name.split("-")[0])
        features = rows.with_format(None).features.copy()
        features["label"] = type(features["label"])(names=theirs)
        old = pyarrow.parquet.read_table(file)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(renamed(old.to_pylist()), schema=features.arrow_schema), file)
    folder = score(run, data, tmp_path / "scores", calibrate="none", label_map=("healthy=normal",))
    first, mapped = table(run.with_name("first")), table(folder)
    assert mapped.drop(["label"]).equals(first.drop(["label"]))
    assert mapped["label"].to_pylist().count(None) == 1 and metrics(folder)["n"] == len(first) - 1
    by_name = score(run, data, tmp_path / "by_name", calibrate="none")
    assert metrics(by_name)["n"] == sum(label not in (None, "normal") for label in mapped["label"].to_pylist())
    with pytest.raises(InputError, match='there is no class "haelthy"'):
        score(run, data, tmp_path / "typo", calibrate="none", label_map=("haelthy=normal",))


def test_priors(run, phantom_data, tmp_path):
    names = MedSDPipeline.from_pretrained(run).class_names
    (tmp_path / "prior.yaml").write_text("".join(f"{name}: {1 if name == 'normal' else 1e-6}\n" for name in names))
    folder = score(run, phantom_data, tmp_path / "scores", prior=str(tmp_path / "prior.yaml"), mode="full", calibrate="none")
    assert set(table(folder)["prediction"].to_pylist()) == {"normal"}
    trained = score(run, phantom_data, tmp_path / "train", prior="train", mode="full", calibrate="none")
    counts = np.bincount(load_dataset(phantom_data, "train")["label"], minlength=6) + 1.0
    pipe = MedSDPipeline.from_pretrained(run)
    np.testing.assert_allclose(pipe.hypotheses.prior(), counts / counts.sum())
    odds = np.log(table(trained)["prob/normal"].to_numpy() / table(folder)["prob/normal"].to_numpy())
    assert (odds < 0).all()
    for text, message in (("normal: 1\n", "is not in both"), ("[", "cannot be read")):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            score(run, phantom_data, tmp_path / "wrong", prior=str(tmp_path / "wrong.yaml"), calibrate="none")


def test_samples_keep_the_proportions_and_do_not_depend_on_the_order():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    keys = [f"{number:03d}" for number in range(100)]
    chosen = stratified(labels, keys, 20, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [12, 6, 2]
    order = np.random.default_rng(0).permutation(100)
    again = order[stratified(labels[order], [keys[place] for place in order], 20, seed=0)]
    assert again.tolist() == chosen.tolist()
    assert len(set(labels[stratified(labels, keys, 3, seed=1)])) == 3
    assert stratified(labels, keys, None, 0).tolist() == list(range(100))


def test_keys_and_evidence(run, phantom_data, tmp_path):
    keys = load_dataset(phantom_data, "test")["key"][3:5]
    folder = score(run, phantom_data, tmp_path / "scores", keys=(*keys, keys[0]), evidence=True, calibrate="none")
    assert table(folder)["key"].to_pylist() == sorted(keys)
    for key in keys:
        name = key.replace("/", "_")
        assert np.load(folder / "evidence" / f"{name}.npy").shape == (32, 32)
        width, height = Image.open(folder / "evidence" / f"{name}.png").size
        assert width >= 256 and height == 256 + 2 * LINE + 6, "under two lines of caption"
    with pytest.raises(InputError, match="--keys nobody"):
        score(run, phantom_data, tmp_path / "none", keys=("nobody",), calibrate="none")


def test_evidence_adds_up_to_the_log_odds(run, phantom_data):
    pipe, image = MedSDPipeline.from_pretrained(run), load_dataset(phantom_data, "test")[0]["image"]
    pipe.info = replace(pipe.info, calibration=None)
    output = pipe.classify([image], mode="full", max_pairs=8)
    odds = output.log_likelihoods[0, 1] - output.log_likelihoods[0, 0]
    evidence = pipe.evidence(image, class_name=pipe.class_names[1], against=pipe.class_names[0], max_pairs=8)
    assert abs(odds) > 1 and evidence.map.sum() == pytest.approx(odds, rel=1e-3) and evidence.image.shape == (1, 32, 32)
    chosen, order = pipe.evidence(image, max_pairs=8), output.posterior.probabilities[0].argsort()
    assert (chosen.class_name, chosen.against) == (output.hypotheses[order[-1]], output.hypotheses[order[-2]])
    beside_first = pipe.evidence(image, against=chosen.class_name, max_pairs=8)
    assert beside_first.class_name == chosen.against and beside_first.map.sum() < 0 < chosen.map.sum()


def test_evidence_goes_on_with_fewer_rows_where_memory_does_not_suffice(run, phantom_data, monkeypatch):
    pipe, image = MedSDPipeline.from_pretrained(run), load_dataset(phantom_data, "test")[0]["image"]
    whole, predict, calls = pipe.evidence(image, "epidural", "normal", max_pairs=32), MedSDPipeline._predict, []

    def small(pipe, x_t, *arguments):
        calls.append(len(x_t))
        if len(x_t) > 32:
            raise torch.OutOfMemoryError("no room")
        return predict(pipe, x_t, *arguments)

    monkeypatch.setattr(MedSDPipeline, "_predict", small)
    np.testing.assert_allclose(pipe.evidence(image, "epidural", "normal", max_pairs=32).map, whole.map, atol=1e-4 * np.abs(whole.map).max())
    assert calls == [64, 32, 32]


def test_evidence_against_the_empty_prompt(run, phantom_data):
    pipe, image = MedSDPipeline.from_pretrained(run), load_dataset(phantom_data, "test")[0]["image"]
    pipe.info = replace(pipe.info, calibration=None)
    odds = np.diff(pipe.classify([image], prompts=["", pipe.data.prompts[2]], mode="full", max_pairs=8).log_likelihoods[0])
    evidence = pipe.evidence(image, pipe.class_names[2], "", max_pairs=8)
    assert evidence.against == "" and evidence.map.sum() == pytest.approx(odds[0], rel=1e-3)


def test_a_counterfactual_stays_near_and_follows_its_class(run, phantom_data):
    pipe, image = MedSDPipeline.from_pretrained(run), load_dataset(phantom_data, "test")[0]["image"]
    pipe.set_progress_bar_config(disable=True)
    near, far = (pipe.counterfactual(image, "epidural", strength, 10) for strength in (0.1, 0.9))
    shown = pipe.data.intensity_map.from_unit(pipe.data.intensity_map.to_unit(image[None].astype(np.float32)))
    assert near.shape == (1, 1, 32, 32) and np.abs(near - shown).mean() < np.abs(far - shown).mean()
    np.testing.assert_array_equal(near, pipe.counterfactual(image, "epidural", 0.1, 10))
    assert not np.array_equal(far, pipe.counterfactual(image, "normal", 0.9, 10))
    for wrong in ({"class_name": "nothing"}, {"class_name": "normal", "strength": 0.0}):
        with pytest.raises(InputError):
            pipe.counterfactual(image, **wrong)


def test_a_prior_and_a_weighting_that_do_not_fit_are_refused(run, phantom_data):
    pipe, image = MedSDPipeline.from_pretrained(run), load_dataset(phantom_data, "test")[0]["image"]
    for wrong in ({"prior": np.full(5, 0.2)}, {"prior": -np.ones(6)}, {"weighting": "other"}, {"mode": "other"}, {"precision": "other"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            pipe.classify([image], max_pairs=2, **wrong)


def test_decide_answers_what_its_race_ended_on(run, phantom_data, monkeypatch):
    """Not what is most probable on average over the pairs that were left out, of which nothing was promised."""
    pipe, rows = MedSDPipeline.from_pretrained(run), load_dataset(phantom_data, "test")

    def averaged_otherwise(*arguments):
        found = posterior(*arguments)
        return replace(found, probabilities=found.probabilities[:, ::-1])

    monkeypatch.setattr(scoring, "posterior", averaged_otherwise)
    for mode in ("decide", "posterior"):
        output = pipe.classify(list(rows["image"]), max_pairs=4, mode=mode, ranges=recorded_ranges(rows))
        expected = output.posterior.leader if mode == "decide" else output.probabilities.argmax(1)
        assert output.predictions == [output.hypotheses[number] for number in expected]
    assert (output.posterior.leader != output.probabilities.argmax(1)).any()


def test_a_calibration_for_other_pairs_or_weights_is_not_claimed(run, phantom_data, tmp_path):
    for name, flags, calibrated in (("same", {}, True), ("pairs", {"max_pairs": 6}, False), ("weights", {"weighting": "elbo"}, False)):
        found = metrics(score(run, phantom_data, tmp_path / name, calibrate="none", max_samples=12, **flags))
        assert found["calibrated"] is calibrated


def test_calibration_wants_a_label_and_a_group_for_each_image(run, phantom_data):
    pipe, image = MedSDPipeline.from_pretrained(run), load_dataset(phantom_data, "test")[0]["image"]
    for wrong in ({"labels": [0]}, {"labels": [0, 1], "groups": ["a", "b", "c"]}):
        with pytest.raises(InputError, match=f"{list(wrong)[-1]} for 2 images"):
            pipe.calibrate([image, image], **wrong)


def test_the_same_calibration_is_fitted_once(run, phantom_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(MedSDPipeline, "calibrate", lambda *arguments, **options: pytest.fail("it is there"))
    score(run, phantom_data, tmp_path / "scores")
    assert "calibrated before" in capsys.readouterr().out


def test_patients_of_the_training_data_are_warned_of(run, phantom_data, tmp_path, capsys):
    other = rewritten(phantom_data, tmp_path / "data", lambda rows: rows)
    (other / "medsd.json").write_text(json.dumps(load_info(phantom_data).to_dict() | {"fingerprint": "other"}))
    score(run, other, tmp_path / "scores", split="train", calibrate="none", max_samples=12)
    assert "patients are among those that the pipeline was trained on" in capsys.readouterr().out
    assert metrics(tmp_path / "scores")["n"] == 12


@pytest.mark.slow
def test_a_compiled_unet_scores_nearly_the_same(run, phantom_data):
    pipe, images = MedSDPipeline.from_pretrained(run), load_dataset(phantom_data, "test")[:4]["image"]
    plain = pipe.classify(images, mode="full", max_pairs=4, precision="fp32").log_likelihoods
    pipe.compile_scoring()
    compiled = pipe.classify(images, mode="full", max_pairs=4, precision="fp32").log_likelihoods
    assert pipe._compiled is not None and np.abs(compiled - plain).max() < 1e-3 * np.abs(plain).max()
