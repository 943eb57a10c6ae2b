"""What stops a run: signals, numbers that are not finite, too little memory, a reader that hangs."""

import contextlib
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from medsd import MedSDPipeline
from medsd.config import FinetuneUNetConfig
from medsd.errors import InputError
from medsd.training import guard
from medsd.training.best import Best
from medsd.training.guard import ENOUGH, Guard, Preempted, smaller
from medsd.training.latents import EncodedLatents
from medsd.training.state import TrainState
from medsd.training.stopwatch import FlopCounter
from tests import test_finetune_vae
from tests.conftest import REPOSITORY
from tests.test_recipes import losses, train

QUIET = {"validation_steps": 0, "checkpointing_steps": 0}


def status(folder):
    return json.loads((folder / "status.json").read_text())


def lines(folder):
    """Of metrics.jsonl, without the time."""
    return [json.loads(line) | {"time": 0} for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder):
    """Every tensor of a run's last checkpoint."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return {file.name: load_file(file) for file in last.glob("*.safetensors") if file.name != "processes.safetensors"}


def same(one, other):
    pairs = [(value, other[file][name]) for file, tensors in one.items() for name, value in tensors.items()]
    return all(ours.numpy().tobytes() == theirs.numpy().tobytes() for ours, theirs in pairs)


def at_update(monkeypatch, number, act):
    """Call `act` within so manieth update."""
    calls = iter(range(1, 1000))
    real = TrainState.finish_update

    def finish(self):
        if next(calls) == number:
            act()
        real(self)

    monkeypatch.setattr(TrainState, "finish_update", finish)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 75), ("SIGHUP", 129)])
def test_a_signal_saves_at_the_end_of_its_update(phantom_data, tmp_path, monkeypatch, capsys, name, code):
    whole = train(phantom_data, tmp_path / "whole", max_train_steps=4, **QUIET | {"checkpointing_steps": 4})
    folder = tmp_path / "unet"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_update(patch, 2, lambda: os.kill(os.getpid(), signal.Signals[name]))
        train(phantom_data, folder, max_train_steps=4, **QUIET)
    assert stopped.value.code == code and losses(folder) == losses(whole)[:2]
    told = f"{name}: checkpoint-2 is saved; go on with --resume_from_checkpoint latest"
    assert f"stopped by {told}" in capsys.readouterr().out
    assert status(folder) == {"state": "preempted", "step": 2, "reason": told}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(phantom_data, folder, max_train_steps=4, **QUIET | {"checkpointing_steps": 4}, resume_from_checkpoint="latest")
    assert losses(folder) == losses(whole) and same(files(folder), files(whole))


def test_a_log_line_counts_what_came_before_a_resume(phantom_data, tmp_path, monkeypatch):
    flags = QUIET | {"logging_steps": 3, "max_train_steps": 4}
    whole, folder = train(phantom_data, tmp_path / "whole", **flags), tmp_path / "unet"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_update(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(phantom_data, folder, **flags)
    assert not (folder / "metrics.jsonl").exists()
    shutil.copytree(folder, tmp_path / "split")
    train(phantom_data, folder, **flags, resume_from_checkpoint="latest")
    assert lines(folder) == lines(whole) and [line["step"] for line in lines(whole)] == [3, 4]
    halves = flags | {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    split = train(phantom_data, tmp_path / "split", **halves, resume_from_checkpoint="latest")
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)


def test_a_signal_before_the_first_update_saves_nothing(phantom_data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        hold = Guard.hold
        patch.setattr(Guard, "hold", lambda self: hold(self) or os.kill(os.getpid(), signal.SIGUSR1))
        train(phantom_data, tmp_path / "unet", max_train_steps=4, **QUIET)
    told = "SIGUSR1: no update was made; start again with --resume_from_checkpoint latest"
    assert stopped.value.code == 75 and status(tmp_path / "unet") == {"state": "preempted", "step": 0, "reason": told}
    assert not list((tmp_path / "unet").glob("checkpoint-*"))


def test_a_look_that_is_broken_off_is_made_up_for(phantom_data, tmp_path, monkeypatch):
    flags = {"max_train_steps": 4, "validation_steps": 2, "checkpointing_steps": 4}
    whole = train(phantom_data, tmp_path / "whole", **flags)
    folder = tmp_path / "unet"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("medsd.training.preview.HeldOut.loss", lambda self: os.kill(os.getpid(), signal.SIGTERM))
        train(phantom_data, folder, **flags)
    assert status(folder)["step"] == 2 and not (folder / "best").exists()
    train(phantom_data, folder, **flags, resume_from_checkpoint="latest")
    assert same(files(folder), files(whole))
    kept = [json.loads((path / "metrics.jsonl").read_text().splitlines()[2])["validation_loss"] for path in (folder, whole)]
    assert kept[0] == kept[1]


def test_a_failing_look_costs_nothing(phantom_data, tmp_path, monkeypatch):
    flags = {"max_train_steps": 4, "validation_steps": 2, "checkpointing_steps": 2}
    whole, folder = train(phantom_data, tmp_path / "whole", **flags), tmp_path / "unet"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("medsd.training.preview.HeldOut.loss", lambda self: 1 / 0)
        train(phantom_data, folder, **flags)
    assert status(folder)["state"] == "failed" and (folder / "checkpoint-2").is_dir()
    train(phantom_data, folder, **flags, resume_from_checkpoint="latest")
    assert same(files(folder), files(whole))
    shutil.rmtree(folder / "checkpoint-4")
    train(phantom_data, folder, **flags, resume_from_checkpoint="latest")
    assert lines(folder) == lines(whole), "the look at step 2 was made up for, and stands there once"


def test_a_signal_while_something_is_written_waits_for_it(phantom_data, tmp_path, monkeypatch):
    """The best model and a checkpoint are whole."""
    flags = {"max_train_steps": 2, "validation_steps": 1, "checkpointing_steps": 1}
    whole = train(phantom_data, tmp_path / "whole", **flags)
    for number, (place, name) in enumerate({("medsd.training.loop", "save_checkpoint"), ("medsd.inference.folder", "publish")}):
        folder = tmp_path / f"unet{number}"
        module = importlib.import_module(place)
        real = getattr(module, name)

        def terminated(*arguments, real=real):
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments)

        with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
            patch.setattr(module, name, terminated)
            train(phantom_data, folder, **flags)
        assert MedSDPipeline.from_pretrained(folder / "best").class_names if name == "publish" else not (folder / "best").exists()
        train(phantom_data, folder, **flags, resume_from_checkpoint="latest")
        assert same(files(folder), files(whole)) and MedSDPipeline.from_pretrained(folder / "best").class_names


def test_a_signal_while_the_final_model_is_written_comes_too_late(phantom_data, tmp_path, monkeypatch):
    received, real = [], importlib.import_module("medsd.inference.folder").publish

    def terminated(*arguments):
        received.append(os.kill(os.getpid(), signal.SIGTERM))
        return real(*arguments)

    monkeypatch.setattr("medsd.inference.folder.publish", terminated)
    folder = train(phantom_data, tmp_path / "unet", max_train_steps=2, **QUIET)
    assert len(received) == 1 and status(folder)["state"] == "finished" and MedSDPipeline.from_pretrained(folder).class_names


def test_a_signal_before_a_run_begins_is_told_unless_it_had_finished(phantom_data, tmp_path, monkeypatch):
    folder = train(phantom_data, tmp_path / "unet", max_train_steps=2, **QUIET | {"checkpointing_steps": 2})
    monkeypatch.setattr("recipes.finetune_unet.train", lambda *arguments: os.kill(os.getpid(), signal.SIGUSR1))
    for before, after in (("finished", "finished"), ("failed", "preempted")):
        (folder / "status.json").write_text(json.dumps({"state": before, "step": 2, "reason": ""}))
        with pytest.raises(SystemExit):
            train(phantom_data, folder, max_train_steps=2, **QUIET, resume_from_checkpoint="latest")
        assert status(folder)["state"] == after and status(folder)["step"] == 2
    fresh = tmp_path / "fresh"
    with pytest.raises(SystemExit):
        train(phantom_data, fresh, max_train_steps=2, **QUIET)
    assert status(fresh) == {"state": "preempted", "step": 0, "reason": "SIGUSR1"}
    monkeypatch.undo()
    train(phantom_data, fresh, max_train_steps=2, **QUIET, resume_from_checkpoint="latest")
    assert status(fresh)["state"] == "finished"


def test_a_signal_that_comes_while_processes_agree_counts_the_next_time(monkeypatch):
    with Guard() as watch:
        watch.hold()
        monkeypatch.setattr(Guard, "_highest", lambda self: os.kill(os.getpid(), signal.SIGTERM) or 0)
        accelerator = SimpleNamespace(num_processes=2)
        assert watch.agreed(accelerator) == 0 and watch.level > ENOUGH
        monkeypatch.setattr(Guard, "_highest", lambda self: self.level)
        assert watch.agreed(accelerator) == watch.decided > ENOUGH


def test_signals_of_one_moment_count_once_and_the_last_kind_wins():
    with Guard() as watch:
        watch.hold()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert watch.preempted("x").code == 130
        with pytest.raises(Preempted), watch.interruptible():
            raise AssertionError("a signal had come before")
        os.kill(os.getpid(), signal.SIGTERM)  # Kept again.
        watch.release()
        with pytest.raises(Preempted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_impatient_user_stops_at_once(monkeypatch):
    monkeypatch.setattr(guard, "IMPATIENT", 0.05)
    with Guard() as watch, pytest.raises(Preempted):
        watch.hold()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one was kept")


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Guard() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert watch.level == 0
            watch.enough()
            assert watch.level == ENOUGH
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


# What is not finite


def poison_input(patch, bad):
    real = EncodedLatents.__call__

    def source(self, batch, draws):
        return real(self, batch | {"images": torch.full(batch["images"].shape, torch.nan)} if bad() else batch, draws)

    patch.setattr(EncodedLatents, "__call__", source)


def poison_latent(patch, bad):
    real = EncodedLatents.__call__

    def source(self, batch, draws):
        latents, emphasis = real(self, batch, draws)
        return latents * torch.inf if bad() else latents, emphasis

    patch.setattr(EncodedLatents, "__call__", source)


def poison_loss(patch, bad):
    """The loss alone: its gradient is finite."""
    real = TrainState.learn
    patch.setattr(TrainState, "learn", lambda self, a, loss, most: real(self, a, loss + torch.nan if bad() else loss, most))


def poison_gradient(patch, bad):
    """The gradient alone: the loss is finite."""
    real = TrainState._update

    def update(self, *arguments):
        if bad():
            next(iter(self.parameters.values())).grad.view(-1)[0] = torch.inf
        real(self, *arguments)

    patch.setattr(TrainState, "_update", update)


POISONS = {"input": poison_input, "latent": poison_latent, "loss": poison_loss, "gradient": poison_gradient}


def at(*wanted):
    """Whether this call is one of those."""
    calls = iter(range(1, 1000))
    return lambda: next(calls) in wanted


@pytest.mark.parametrize("where", POISONS)
def test_an_update_that_is_not_finite_is_skipped_and_counted(phantom_data, tmp_path, monkeypatch, where):
    flags = {"max_train_steps": 6, **QUIET, "checkpointing_steps": 1, "checkpoints_total_limit": None}
    with monkeypatch.context() as patch:
        POISONS[where](patch, at(2, 3, 5))
        folder = train(phantom_data, tmp_path / "unet", **flags)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 2, 2, 3, 3]
    assert [line["loss"] is None for line in lines] == [where != "gradient" and step in {2, 3, 5} for step in range(1, 7)]
    weights = [load_file(folder / f"checkpoint-{step}" / "weights.safetensors") for step in range(1, 7)]
    moved = [any(not torch.equal(after[name], before[name]) for name in after) for before, after in zip(weights, weights[1:], strict=False)]
    assert moved == [False, False, True, False, True]
    for tensors in files(folder).values():
        assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point() and "best" not in tensors)


def test_one_bad_micro_batch_skips_its_whole_update(phantom_data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison_loss(patch, at(3))
        folder = train(phantom_data, tmp_path / "unet", gradient_accumulation_steps=2, train_batch_size=2, max_train_steps=3, **QUIET)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 1] and all(line["loss"] > 0 for line in lines)


def test_the_8bit_optimizer_skips_too(phantom_data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison_gradient(patch, at(2))
        folder = train(phantom_data, tmp_path / "unet", use_8bit_adam=True, max_train_steps=3, **QUIET | {"checkpointing_steps": 3})
    assert files(folder)["memory.safetensors"]["skipped"].tolist() == [1, 0]
    assert all(value.isfinite().all() for value in files(folder)["weights.safetensors"].values())


def test_a_discriminator_skips_for_itself(phantom_data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison_loss(patch, at(4))  # The discriminator's second one.
        flags = {"gan_start": 1, "max_train_steps": 3, **QUIET, "checkpointing_steps": 3}
        folder = test_finetune_vae.train(phantom_data, tmp_path / "vae", **flags)
    counts = [load_file(folder / "checkpoint-3" / place / "memory.safetensors")["skipped"].tolist() for place in ("", "discriminator")]
    assert counts == [[0, 0], [1, 0]]


def test_a_run_of_skipped_updates_ends_it_with_a_checkpoint(phantom_data, tmp_path, monkeypatch):
    monkeypatch.setattr("medsd.training.loop.MOST_SKIPPED", 3)
    folder = tmp_path / "unet"
    with monkeypatch.context() as patch, pytest.raises(InputError, match="not finite in 3 updates in a row.*checkpoint-6 has the weights"):
        poison_latent(patch, at(2, 4, 5, 6))
        train(phantom_data, folder, max_train_steps=9, **QUIET | {"checkpointing_steps": 3})
    assert status(folder)["state"] == "failed" and status(folder)["step"] == 6
    train(phantom_data, folder, max_train_steps=9, **QUIET, resume_from_checkpoint="latest")
    assert files(folder)["memory.safetensors"]["skipped"].tolist() == [4, 0] and status(folder)["state"] == "finished"


# Memory

OUT_OF_MEMORY = """
import resource, sys
from medsd import MedSDPipeline
from medsd.config import FinetuneUNetConfig
from medsd.training import setup
from recipes import finetune_unet

resume = setup.resume

def limited(*arguments):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 10**9, -1))
    return resume(*arguments)

setup.resume = limited
finetune_unet.main(FinetuneUNetConfig(
    dataset_name=sys.argv[1], output_dir=sys.argv[2], train_batch_size=1024, auto_batch_size=sys.argv[3] == "auto", max_train_steps=2,
    logging_steps=1, validation_steps=0, report_to="none"))
"""


@pytest.mark.slow
def test_a_host_without_memory_gets_smaller_micro_batches(phantom_data, tmp_path):
    """The address space is limited once the model is built, so that a batch of 1024 images does not fit."""

    def run(*words):
        command = [sys.executable, "-c", OUT_OF_MEMORY, str(phantom_data), *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)

    refused = run(str(tmp_path / "refused"), "no")
    assert "out of memory with --train_batch_size 1024" in refused.stderr and "--auto_batch_size" in refused.stderr
    assert status(tmp_path / "refused")["state"] == "failed"
    answer = run(str(tmp_path / "unet"), "auto")
    assert answer.returncode == 0 and "out of memory with 1024 images in a micro-batch: on with 512" in answer.stdout, answer.stderr[-2000:]
    whole = train(phantom_data, tmp_path / "whole", train_batch_size=1024, lr_scheduler="cosine", **QUIET)
    assert losses(tmp_path / "unet") == pytest.approx(losses(whole), rel=1e-5)


def test_smaller_micro_batches_see_as_many_images():
    config = FinetuneUNetConfig(train_batch_size=12, gradient_accumulation_steps=2, auto_batch_size=True, overwrite=True)
    seen = []
    while config.train_batch_size > 1:
        config = smaller(config, "no room", saved=False)
        seen.append((config.train_batch_size, config.gradient_accumulation_steps))
    assert seen == [(6, 4), (3, 8), (1, 24)] and config.resume_from_checkpoint == "latest" and not config.overwrite
    with pytest.raises(InputError, match="out of memory with --train_batch_size 1 .no room.: --gradient_checkpointing"):
        smaller(config, "no room", saved=True)
    config = FinetuneUNetConfig(train_batch_size=2, auto_batch_size=True, resume_from_checkpoint="checkpoint-2")
    assert [smaller(config, "no room", saved).resume_from_checkpoint for saved in (False, True)] == ["checkpoint-2", "latest"]


@pytest.mark.parametrize("place", ["recipes.finetune_unet.build_network", "medsd.training.preview.HeldOut.numbers"])
def test_memory_that_does_not_suffice_outside_of_an_update_is_said_so(phantom_data, tmp_path, monkeypatch, place):
    """Smaller micro-batches would not help; and before the first update what was there is still there."""
    folder, calls = train(phantom_data, tmp_path / "unet", **QUIET), []

    def full(*arguments):
        calls.append(arguments)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(place, full)
    with pytest.raises(InputError, match="out of memory outside of an update .no room.: a smaller --preset"):
        train(phantom_data, folder, auto_batch_size=True, overwrite=True)
    assert len(calls) == 1
    if place.endswith("build_network"):
        assert MedSDPipeline.from_pretrained(folder).class_names and status(folder)["state"] == "finished"


# The best look


@pytest.mark.parametrize("higher", [True, False])
def test_the_best_look_is_remembered(higher):
    best, sign = Best("score", higher, patience=2), 1 if higher else -1
    values = [math.inf, 1.0, 3.0, math.nan, 2.0, 4.0, 4.0, None]
    found = [best.improved(step, {} if value is None else {"score": sign * value}) for step, value in enumerate(values)]
    assert found == [False, True, True, False, False, True, False, False] and best.step == 5 and best.hopeless
    assert not Best("score", higher, patience=None).hopeless


def test_early_stopping_leaves_the_best_and_goes_on_after_a_resume(phantom_data, tmp_path, monkeypatch):
    script = {1: 0.9, 2: 0.7, 3: 0.8, 4: 0.75, 5: 0.6, 6: 0.9, 7: 0.9}
    flags = {"max_train_steps": 7, "validation_steps": 1, "early_stopping": 2, "checkpointing_steps": 1, "checkpoints_total_limit": None}
    folder, looks = tmp_path / "unet", iter([*script.values()])
    monkeypatch.setattr("medsd.training.preview.HeldOut.numbers", lambda self: {"validation_loss": next(looks)})
    train(phantom_data, folder, **flags)
    reason = "no better look in 2: the best one was validation loss 0.7000 at step 2"
    assert status(folder) == {"state": "finished", "step": 4, "reason": reason}
    best = load_file(folder / "best" / "unet" / "diffusion_pytorch_model.safetensors")
    kept = load_file(folder / "checkpoint-2" / "ema.safetensors")
    assert all(torch.equal(value, kept[f"unet.{name}"]) for name, value in best.items())
    part, looks = tmp_path / "part", iter([script[3], script[4], 0.0])
    shutil.copytree(folder / "checkpoint-3", part / "checkpoint-3")
    train(phantom_data, part, **flags, resume_from_checkpoint="latest")
    assert status(part) == status(folder)
    looks = iter([script[4], 0.0])
    train(phantom_data, folder, **flags, resume_from_checkpoint="latest")
    assert status(folder)["step"] == 4, "it had been stopped"


def test_a_longer_run_keeps_the_last_look_and_the_best(phantom_data, tmp_path, monkeypatch):
    script = {2: 0.7, 3: 0.5, 4: 0.9, 6: 0.8}
    monkeypatch.setattr("medsd.training.preview.HeldOut.numbers", lambda self: {"validation_loss": next(looks)})
    flags = {"lr_scheduler": "constant", "validation_steps": 2, "checkpointing_steps": 2}
    looks = iter([script[2], script[3]])
    folder = train(phantom_data, tmp_path / "unet", max_train_steps=3, **flags)
    best = (folder / "best" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    looks = iter([script[3], script[4], script[6]])
    train(phantom_data, folder, max_train_steps=6, **flags, resume_from_checkpoint="latest")
    seen = {line["step"]: line["validation_loss"] for line in lines(folder) if "validation_loss" in line}
    assert seen == script and (folder / "best" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == best


@pytest.mark.parametrize("damaged", [False, True])
def test_the_best_model_of_an_abandoned_branch_gives_way(phantom_data, tmp_path, monkeypatch, damaged):
    monkeypatch.setattr("medsd.training.preview.HeldOut.numbers", lambda self: {"validation_loss": next(looks)})
    flags = {"max_train_steps": 3, "validation_steps": 1, "checkpointing_steps": 1, "checkpoints_total_limit": None}
    looks = iter([0.5, 0.6, 0.2])
    folder = train(phantom_data, tmp_path / "unet", **flags)
    told = folder / "best" / "best.json"
    assert json.loads(told.read_text()) == {"step": 3, "metric": "validation_loss", "value": 0.2}
    if damaged:
        told.write_text("")
    looks = iter([0.6, 0.55])
    train(phantom_data, folder, **flags, learning_rate=0.01, allow_config_change=True, resume_from_checkpoint="checkpoint-2")
    assert json.loads(told.read_text()) == {"step": 3, "metric": "validation_loss", "value": 0.55}
    best = load_file(folder / "best" / "unet" / "diffusion_pytorch_model.safetensors")
    kept = load_file(folder / "checkpoint-3" / "ema.safetensors")
    assert all(torch.equal(value, kept[f"unet.{name}"]) for name, value in best.items())


def test_another_best_metric_begins_anew(phantom_data, tmp_path, monkeypatch):
    monkeypatch.setattr("medsd.training.preview.HeldOut.numbers", lambda self: {"validation_loss": 0.9, "validation_auroc": 0.5})
    flags = {"validation_steps": 1, "checkpointing_steps": 1, "lr_scheduler": "constant"}
    folder = train(phantom_data, tmp_path / "unet", max_train_steps=2, best_metric="auroc", **flags)
    flags |= {"early_stopping": 2, "allow_config_change": True, "resume_from_checkpoint": "latest"}
    train(phantom_data, folder, max_train_steps=9, **flags)
    assert status(folder)["reason"] == "no better look in 2: the best one was validation loss 0.9000 at step 2"


def test_a_look_at_a_model_that_is_not_finite_ends_no_run(phantom_data, tmp_path, monkeypatch):
    def poison(self):
        for value in self.parameters.values():
            value.data.fill_(math.nan)

    monkeypatch.setattr(TrainState, "finish_update", poison)
    folder = train(phantom_data, tmp_path / "unet", max_train_steps=2, validation_steps=2, checkpointing_steps=0, use_ema=False)
    assert lines(folder)[-1] == {"step": 2, "time": 0, "validation_loss": None, "validation_auroc": None}


def test_looks_without_a_number_are_said_to_be_so(phantom_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("medsd.training.preview.HeldOut.loss", lambda self: math.nan)
    flags = {"validation_steps": 1, "early_stopping": 2, "checkpointing_steps": 0}
    folder = train(phantom_data, tmp_path / "unet", max_train_steps=4, **flags)
    reason = "no better look in 2: validation loss was never finite"
    assert status(folder) == {"state": "finished", "step": 2, "reason": reason} and not (folder / "best").exists()
    assert f"stopped early: {reason}\n" in capsys.readouterr().out
    train(phantom_data, tmp_path / "last", max_train_steps=2, **flags)
    assert status(tmp_path / "last") == {"state": "finished", "step": 2, "reason": ""}, "it was over anyway"


def test_a_best_value_is_kept_exactly():
    best = Best("score", higher=True, patience=3)
    assert [best.improved(step, {"score": 0.7}) for step in range(4)] == [True, False, False, False] and best.hopeless


@pytest.mark.parametrize(("flags", "message"), [({"early_stopping": 2}, "--early_stopping"), ({"best_metric": "auroc"}, "--best_metric")])
def test_what_cannot_be_measured_cannot_be_gone_by(phantom_data, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        train(phantom_data, tmp_path / "unet", unconditional=True, **flags | {"best_metric": "auroc"})
    assert not (tmp_path / "unet").exists()


# What training takes


def test_flops_are_those_of_all_passes():
    """Two FLOPs for each weight and image, thrice in training; what is computed once a batch counts once a batch."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.each = torch.nn.Linear(8, 4), torch.nn.Linear(4, 6)

        def forward(self, images):
            return self.each(images + self.table(torch.zeros(10, 8)).sum())

    network = Network()
    counter = FlopCounter(network)
    for _ in range(4):
        network(torch.zeros(5, 4))
    once = 2 * (5 * 4 * 6 + 10 * 8 * 4)
    assert counter.total() == 4 * 3 * once
    network.each.weight.requires_grad_(False)
    network.table.weight.requires_grad_(False)
    assert counter.total() == 4 * 2 * once


def test_a_run_says_what_it_took(phantom_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("medsd.training.setup.FlopCounter", FlopCounter)
    folder = train(phantom_data, tmp_path / "unet", validation_steps=0)
    found = json.loads((folder / "environment.json").read_text())["profile"]
    assert found["flops_per_second"] > 1e6 and found["images_per_second"] > 0 and found["peak_memory_gb"] > 0.1
    assert sum(found[f"share_{phase}"] for phase in ("data", "forward", "backward", "optimizer")) == pytest.approx(1, abs=1e-3)
    assert "TFLOP/s" in capsys.readouterr().out


def test_what_cannot_be_counted_costs_nothing():
    class Network(torch.nn.Module):
        def forward(self, numbers):
            return numbers.unique()

    network = Network()
    counter = FlopCounter(network)
    network(torch.arange(3))
    assert counter.total() is None


# Readers


def test_a_reader_that_hangs_or_fails_is_noticed():
    from medsd.data.transforms import training_loader

    class Rows:
        def __getitem__(self, indices):
            if indices == [2]:
                time.sleep(60)
            if indices == [3]:
                raise OSError("gone")
            return {"rows": torch.tensor(indices)}

    ahead = training_loader(Rows(), [[0], [1], [2]], 2, patience=0.2)
    assert [int(next(ahead)["rows"]) for _ in range(2)] == [0, 1]
    with pytest.raises(InputError, match=r"rows \[2\].* not read within"):
        next(ahead)
    with pytest.raises(OSError, match="gone"):
        list(training_loader(Rows(), [[0], [3]], 1))
