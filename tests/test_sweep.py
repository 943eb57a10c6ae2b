"""`recipes/sweep_data_size.py` as a user types it: a cell's folders, going on, refusals, kills; and the numbers that it draws."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from scipy.stats import t

from medsd.config import FinetuneUNetConfig, FinetuneVAEConfig, SweepConfig
from medsd.data.dataset import load_dataset, load_info
from medsd.data.transforms import column, training_rows
from medsd.errors import InputError
from medsd.evaluation.repeats import mean_of_seeds
from medsd.report.collect import read_sweep
from medsd.report.sweep import with_metric
from medsd.seats import Seat, last_words, seats, side_by_side
from recipes import finetune_unet, finetune_vae, sweep_data_size
from tests.conftest import REPOSITORY
from tests.test_recipes import losses

QUICK = {
    "finetune_unet": {
        "max_train_steps": 4,
        "train_batch_size": 4,
        "validation_steps": 0,
        "checkpointing_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "lr_warmup_steps": 2,
    },
    "classify": {"mode": "full", "max_pairs": 2, "max_samples": 24, "calibrate": "none"},
    "evaluate": {"num_samples": 12, "num_inference_steps": 2, "max_samples": 18},
}
TRAIN = {"max_train_steps": 2, "train_batch_size": 4, "validation_steps": 0, "logging_steps": 1, "report_to": "none"}


def written(folder, **sections):
    """A YAML of quick cells."""
    path = folder / "quick.yaml"
    path.write_text(yaml.safe_dump({name: QUICK[name] | sections.get(name, {}) for name in QUICK}))
    return str(path)


def sweep_config(data, folder, yaml_file=None, **flags):
    chosen = {"fractions": (0.5,), "seeds": (1,), "features": "unet"} | flags
    return SweepConfig(config=yaml_file, dataset_name=str(data), output_dir=str(folder), **chosen)


def table(folder):
    with (folder / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def swept(phantom_data, tmp_path_factory):
    """A sweep of one cell, and its config."""
    folder = tmp_path_factory.mktemp("sweep")
    config = sweep_config(phantom_data, folder / "sweep", written(folder))
    sweep_data_size.main(config)
    return folder / "sweep", config


def test_a_cell_is_trained_on_its_patients_and_its_numbers_are_those_of_its_report(swept, phantom_data):
    folder, _ = swept
    (row,) = table(folder)
    rows = training_rows(load_dataset(phantom_data, "train"), 0.5, None, 1)
    assert (row["model"], row["fraction"], row["seed"]) == ("tiny", "0.5", "1")
    assert int(row["images"]) == len(rows) and int(row["patients"]) == len(set(column(rows, "patient_id").to_pylist()))
    trained = yaml.safe_load((folder / "tiny-0.5-1" / "unet" / "config.yaml").read_text())["finetune_unet"]
    assert (trained["train_fraction"], trained["seed"], trained["preset"]) == (0.5, 1, "tiny")
    metrics = json.loads((folder / "tiny-0.5-1" / "report" / "metrics.json").read_text())
    for name in ("auroc", "balanced_accuracy", "ece", "nll", "fid", "kid", "precision", "recall", "density", "coverage"):
        assert float(row[name]) == metrics[name]
        assert [float(row[f"{name}_{side}"]) for side in ("low", "high")] == metrics[f"{name}_ci"]
    assert float(row["fid_floor"]) == metrics["fid_floor"] and float(row["training_seconds"]) > 0
    assert not any("/" in name for name in row)
    assert json.loads((folder / "status.json").read_text()) == {"state": "finished", "done": 1, "cells": 1, "reason": ""}
    assert (folder / "data_size.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_done_is_not_done_again(swept, capsys):
    folder, config = swept
    before = {path: path.stat().st_mtime_ns for path in (folder / "tiny-0.5-1").rglob("*")}
    (folder / "results.csv").unlink()
    sweep_data_size.main(config)
    assert {path: path.stat().st_mtime_ns for path in (folder / "tiny-0.5-1").rglob("*")} == before
    said = capsys.readouterr().out
    assert "1 of 1 cells are done already" in said and len(table(folder)) == 1
    assert ["tiny", table(folder)[0]["patients"]] in [line.split()[:2] for line in said.splitlines()]


def test_a_report_shows_a_sweep_of_its_own_data_alone(swept, phantom_data, tmp_path):
    folder, _ = swept
    assert [row["model"] for row in read_sweep(folder, str(phantom_data))] == ["tiny"]
    info = json.loads((phantom_data / "medsd.json").read_text())
    (tmp_path / "medsd.json").write_text(json.dumps(info | {"fingerprint": "another"}))
    assert read_sweep(folder, str(tmp_path)) == [] and read_sweep(tmp_path, str(phantom_data)) == []


def test_a_cell_of_other_settings_is_named_and_stays(swept, phantom_data, tmp_path):
    folder, config = swept
    other = written(tmp_path, classify={"max_pairs": 3})
    with pytest.raises(InputError, match=r"tiny-0.5-1/scores was made with other settings \(max_pairs 2 -> 3\)"):
        sweep_data_size.main(sweep_config(phantom_data, folder, other))
    with pytest.raises(InputError, match="tiny-0.5-1/unet was made with other settings .*max_train_steps 4 -> 5"):
        sweep_data_size.main(sweep_config(phantom_data, folder, written(tmp_path, finetune_unet={"max_train_steps": 5})))
    assert len(table(folder)) == 1 and json.loads((folder / "status.json").read_text())["state"] == "finished"


def test_a_failing_cell_stops_the_sweep_and_says_why(phantom_data, tmp_path):
    config = sweep_config(phantom_data, tmp_path / "sweep", written(tmp_path, finetune_unet={"resolution": 24}), fractions=(0.5, 1.0))
    expected = r"sweep/tiny-\S+, train: --resolution 24: the data has 32 px.*\(all of it in \S+/train.log; the same command goes on\)"
    with pytest.raises(InputError, match=expected):
        sweep_data_size.main(config)
    status = json.loads((tmp_path / "sweep" / "status.json").read_text())
    assert status["state"] == "failed" and status["done"] == 0 and "--resolution 24" in status["reason"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fractions": (0.1, 1.5)}, r"--fractions 1.5: shares of the patients"),
        ({"fractions": (0.0,)}, "--fractions 0: shares"),
        ({"fractions": ()}, "--fractions: one or more"),
        ({"seeds": (0, 0)}, "--seeds: 0 is there twice"),
        ({"seeds": (-1,)}, "--seeds -1: 0 or more"),
        ({"models": ("runs/a/unet", "runs/b/unet/")}, "--models: unet is there twice"),
        ({"parallel": 0}, "--parallel 0: 1 or more"),
    ],
)
def test_flags_out_of_range_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        SweepConfig(**flags)


def test_what_a_step_would_refuse_is_refused_before_any_begins(phantom_data, tmp_path):
    wrong = written(tmp_path, finetune_unet={"rank": 4})
    with pytest.raises(InputError, match="--rank is for a pretrained model"):
        sweep_data_size.main(sweep_config(phantom_data, tmp_path / "sweep", wrong))
    assert not (tmp_path / "sweep").exists()
    assert sweep_data_size.plan(sweep_config(phantom_data, tmp_path, wrong, models=("mine",)), load_info(phantom_data))


def test_a_folder_of_something_else_is_left_alone(swept, phantom_data, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is not"):
            sweep_data_size.main(sweep_config(phantom_data, tmp_path, overwrite=overwrite))
    cell = swept[0] / "tiny-0.5-1"
    with pytest.raises(InputError, match="trained pipeline"):
        sweep_data_size.main(sweep_config(phantom_data, cell / "unet", overwrite=True))
    assert (tmp_path / "mine.txt").is_file() and (cell / "unet" / "model_index.json").is_file()


def test_data_without_classes_is_neither_classified_nor_judged_by_a_resnet(phantom_data, tmp_path):
    info = load_info(phantom_data)
    config = sweep_config(phantom_data, tmp_path, written(tmp_path, finetune_unet={"unconditional": True}))
    (cell,) = sweep_data_size.plan(config, info)
    assert [step.name for step in cell.steps] == ["train", "evaluate"]
    with pytest.raises(InputError, match="--features"):
        sweep_data_size.features(SweepConfig(), info.without_classes())
    assert sweep_data_size.features(SweepConfig(dataset_name="d"), info) == "d"


def only(data, folder, keys):
    """A copy of the data with just these rows to train on."""
    shutil.copytree(data, folder)
    (file,) = (folder / "data").glob("train-*.parquet")
    found = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(found.filter(np.isin(found["key"].to_pylist(), keys)), file)
    return folder


@pytest.mark.parametrize(("recipe", "config"), [(finetune_unet, FinetuneUNetConfig), (finetune_vae, FinetuneVAEConfig)])
def test_a_fraction_trains_as_data_of_these_patients_alone(phantom_data, tmp_path, recipe, config):
    keys = column(training_rows(load_dataset(phantom_data, "train"), 0.3, None, 5), "key").to_pylist()
    less = only(phantom_data, tmp_path / "less", keys)
    recipe.main(config(dataset_name=str(phantom_data), output_dir=str(tmp_path / "a"), train_fraction=0.3, seed=5, **TRAIN))
    recipe.main(config(dataset_name=str(less), output_dir=str(tmp_path / "b"), seed=5, **TRAIN))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(losses(tmp_path / "a")) == 2


@pytest.mark.parametrize("seed", [0, 3])
def test_fractions_are_nested_whole_patients(phantom_data, seed):
    rows = load_dataset(phantom_data, "train")
    patients = column(rows, "patient_id").to_pylist()
    chosen = [training_rows(rows, fraction, None, seed) for fraction in (0.1, 0.3, 0.7, 1.0)]
    keys = [set(column(some, "key").to_pylist()) for some in chosen]
    assert keys[0] < keys[1] < keys[2] < keys[3] and len(keys[3]) == len(rows)
    for some in chosen:
        own = column(some, "patient_id").to_pylist()
        assert all(own.count(patient) == patients.count(patient) for patient in set(own))
    limited = column(training_rows(rows, 0.3, 5, seed), "key").to_pylist()
    assert len(limited) == 5 and set(limited) <= keys[1]
    assert set(column(training_rows(rows, 0.3, None, seed + 1), "key").to_pylist()) != keys[1]


@pytest.mark.parametrize("fraction", [0, 1.2])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(InputError, match="--train_fraction"):
        FinetuneUNetConfig(train_fraction=fraction)


def test_all_patients_are_the_default():
    assert (
        FinetuneUNetConfig(train_fraction=1).settings(1)
        == FinetuneUNetConfig().settings(1)
        != FinetuneUNetConfig(train_fraction=0.5).settings(1)
    )


def test_the_interval_of_seeds_covers_the_truth_as_often_as_it_says():
    """Three seeds, whose chance is independent, on patients whose chance they share."""
    draws = np.random.default_rng(0)
    for of_seeds, of_patients in ((1.0, 0.2), (1.0, 1.0), (0.2, 1.0)):
        covered = 0
        for _ in range(2000):
            values = draws.normal(0, of_patients) + draws.normal(0, of_seeds, 3)
            _, low, high = mean_of_seeds(values, values - 1.96 * of_patients, values + 1.96 * of_patients)
            covered += low <= 0 <= high
        assert 0.94 < covered / 2000 < 0.99


def test_the_interval_of_seeds_has_the_right_limits():
    mean, low, high = mean_of_seeds([0.7, 0.8, 0.9], [0.7, 0.8, 0.9], [0.7, 0.8, 0.9])
    np.testing.assert_allclose([low, high], t.interval(0.95, 2, mean, 0.1 / np.sqrt(3)))
    assert mean_of_seeds([0.7], [0.6], [0.9]) == pytest.approx((0.7, 0.6, 0.9))


def test_a_table_keeps_what_only_some_rows_have():
    from medsd.report.sweep import as_csv, metric_columns, picture, summary

    metrics = {
        "n": 3,
        "auroc": 0.5,
        "auroc_ci": [0.25, 0.75],
        "nll": 1.0,
        "nll_ci": None,
        "auroc/a": 0.1,
        "reasons": {},
        "calibrated": True,
    }
    assert metric_columns(metrics | {"fid": None}) == {"n": 3, "auroc": 0.5, "auroc_low": 0.25, "auroc_high": 0.75, "nll": 1.0}
    first = {"model": "tiny", "patients": 5, "seed": 0, "auroc": 0.5, "auroc_low": 0.25, "auroc_high": 0.75}
    rows = [first, {"model": "small", "patients": 5, "seed": 0, "fid": 20.0}]
    assert as_csv(rows).splitlines() == [
        "model,patients,seed,auroc,auroc_low,auroc_high,fid",
        "tiny,5,0,0.5,0.25,0.75,",
        "small,5,0,,,,20.0",
    ]
    head, tiny, small = summary(rows, ["auroc", "fid"])
    assert head.split() == ["model", "patients", "auroc", "fid"]
    assert tiny.split() == ["tiny", "5", "0.500", "[0.250,", "0.750]", "none"]
    assert small.split() == ["small", "5", "none", "20.0", "[20.0,", "20.0]"]
    assert picture(rows, ["auroc", "fid"]).height > 1.8 * picture(rows, ["auroc"]).height


def test_distances_in_features_of_several_networks_are_not_drawn():
    rows = [{"model": "tiny", "patients": 7, "fid": 1.0, "auroc": 0.5, "extractor": name} for name in ("unet sha256:0", "unet sha256:1")]
    assert with_metric(rows, "fid") == [] and with_metric(rows, "auroc") == rows and with_metric(rows[:1] * 2, "fid") == rows[:1] * 2


def test_seats_share_all_cores_and_no_core_twice():
    cores = os.sched_getaffinity(0)
    for count in range(1, len(cores) + 1):
        places = seats(count, 100)
        assert len(places) == count and sorted(core for seat in places for core in seat.cores) == sorted(cores)
    assert len(seats(None, 1)) == 1 and len(seats(len(cores) + 3, 100)) == len(cores) + 3


def test_no_job_is_lost_on_seats_that_are_alike():
    def job(number, seat):
        yield subprocess.Popen(["true"])
        done.append(number)

    done: list[int] = []
    side_by_side([partial(job, number) for number in range(6)], seats(len(os.sched_getaffinity(0)) + 3, 6), lambda: None)
    assert sorted(done) == list(range(6))


def test_jobs_run_side_by_side_and_end_together():
    def job(seat, seconds, steps, fails=False):
        for _ in range(steps):
            running = subprocess.Popen(["sleep", str(seconds)])
            processes.append(running)
            yield running
        if fails:
            raise InputError("mend me")

    processes, ended, began = [], [], time.monotonic()
    places = [Seat((0,)), Seat((1,))]
    side_by_side([partial(job, seconds=0.5, steps=2)] * 4, places, lambda: ended.append(time.monotonic() - began))
    assert len(processes) == 8 and len(ended) == 4 and 2.0 <= ended[-1] < 4.0
    with pytest.raises(InputError, match="mend me"):
        side_by_side([partial(job, seconds=60, steps=1), partial(job, seconds=0.1, steps=1, fails=True)], places, list)
    assert processes[8].returncode == -signal.SIGTERM


def test_the_last_error_of_the_last_process_counts(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("$ a\nerror: old\n$ b\n  1%\r 2%\rerror: new\nnoise\n")
    assert last_words(log) == "new"
    log.write_text("$ a\nerror: old\n$ b\n  1%\r 2%\nKeyError: 'x'\n")
    assert last_words(log) == "KeyError: 'x'"
    log.write_text("$ a\nerror: old\n$ b\n")
    assert last_words(log) == "it ended without a word"


def test_a_step_is_confined_and_does_not_outlive_the_sweep(tmp_path):
    core = max(os.sched_getaffinity(0))
    (tmp_path / "recipe.py").write_text(
        "import os, time\nfrom medsd.runtime import follow_launcher\nfollow_launcher()\n"
        "print(os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS'], os.getpid(), flush=True)\ntime.sleep(60)\n"
    )
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom medsd.seats import Seat, start\nfolder = Path(sys.argv[1])\n"
        f"start(folder / 'recipe.py', [], Seat(({core},)), folder / 'log', folder / 'unet')\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY)
    lines = waited(lambda: (tmp_path / "log").is_file() and (tmp_path / "log").read_text().split("\n")[1:-1])
    affinity, threads, child = lines[-1].rsplit(" ", 2)
    assert affinity == f"{{{core}}}" and threads == "1"
    parent.kill()
    parent.wait()
    waited(lambda: not alive(int(child)))


def waited(condition, seconds=20):
    """The condition's value once it holds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_killed_sweep_ends_as_one_that_was_not(phantom_data, tmp_path):
    """Killed in the training of the first cells, in the second half, and while nothing may be there yet."""
    yaml_file = written(tmp_path, finetune_unet={"max_train_steps": 40, "checkpointing_steps": 5})

    def begin(folder):
        flags = ["--dataset_name", str(phantom_data), "--output_dir", str(folder), "--features", "unet", "--fractions", "0.3", "1.0"]
        command = [sys.executable, "recipes/sweep_data_size.py", "--config", yaml_file, *flags, "--seeds", "0", "--parallel", "2"]
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert begin(tmp_path / "whole").wait() == 0
    folder = tmp_path / "killed"
    for wanted in ("config.yaml", "tiny-*/unet/checkpoint-10", "tiny-*/train.json", "tiny-*/scores/metrics.json"):
        process = begin(folder)
        waited(lambda wanted=wanted: list(folder.glob(wanted)), 300)
        process.kill()
        process.wait()
    assert begin(folder).wait() == 0
    compared = [
        [{name: value for name, value in row.items() if "seconds" not in name} for row in table(some)]
        for some in (tmp_path / "whole", folder)
    ]
    assert compared[0] == compared[1] and len(compared[0]) == 2
