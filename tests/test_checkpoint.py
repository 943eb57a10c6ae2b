"""Checkpoints: whole or noticed, atomic, pruned after success, of the same settings, and without pickle."""

import fcntl
import json
import os
import pickle
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file

from medsd import output
from medsd.errors import InputError
from medsd.output import alone_in, check_output, clear_folder
from medsd.training.checkpoint import checkpoints, damage, find_checkpoint, newest_whole, save_checkpoint
from medsd.training.state import spread
from tests.test_recipes import losses, train

TENSORS = {"weights": {"a": torch.arange(6.0), "b": torch.ones(3)}, "deeper/weights": {"c": torch.zeros(2, 2)}, "empty": {}}


def save(run, step, kept=None, abandoned=()):
    return save_checkpoint(run, step, TENSORS.items(), {"step": step}, kept, abandoned)


def changed(content, how):
    middle = len(content) // 2
    return {
        "bit": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
        "first bit": bytes([content[0] ^ 1]) + content[1:],
        "cut": content[:-1],
        "emptied": b"",
        "longer": content + b" ",
    }[how]


@pytest.fixture(scope="module")
def run(phantom_data, tmp_path_factory):
    """Four steps, a checkpoint after each second one."""
    return train(phantom_data, tmp_path_factory.mktemp("run") / "unet", max_train_steps=4, checkpointing_steps=2, validation_steps=0)


def test_a_checkpoint_is_whole_and_says_so(tmp_path):
    folder = save(tmp_path, 3)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {*(f"{name}.safetensors" for name in TENSORS), "state.json", "manifest.json"}
    assert damage(folder) is None and newest_whole(tmp_path) == folder
    assert torch.equal(load_file(folder / "deeper" / "weights.safetensors")["c"], torch.zeros(2, 2))


@pytest.mark.parametrize("how", ["bit", "first bit", "cut", "emptied", "longer", "gone"])
@pytest.mark.parametrize("name", ["weights.safetensors", "deeper/weights.safetensors", "state.json", "manifest.json"])
def test_every_damage_is_noticed_and_latest_is_the_one_before(tmp_path, name, how, capsys):
    before, last = save(tmp_path, 1), save(tmp_path, 2)
    file = last / name
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(changed(file.read_bytes(), how))
    assert damage(last) and damage(before) is None
    assert find_checkpoint(tmp_path, "latest") == before and "checkpoint-2 is damaged" in capsys.readouterr().out
    with pytest.raises(InputError, match="checkpoint-2 is damaged"):
        find_checkpoint(tmp_path, "checkpoint-2")
    shutil.rmtree(before)
    with pytest.raises(InputError, match="every checkpoint of"):
        find_checkpoint(tmp_path, "latest")


def test_every_bit_of_a_manifest_counts(tmp_path):
    folder = save(tmp_path, 1)
    content = (folder / "manifest.json").read_bytes()
    for place in range(len(content)):
        (folder / "manifest.json").write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        assert damage(folder), place


def test_the_oldest_go_after_success_and_so_does_what_was_left_behind(tmp_path):
    for step in (1, 2, 3, 12):
        save(tmp_path, step, kept=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-12"]
    save(tmp_path, 4, kept=2, abandoned=[tmp_path / "checkpoint-12", tmp_path / "checkpoint-4"])
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-4"}


def test_a_save_that_is_cut_off_leaves_what_was_there(tmp_path, monkeypatch):
    """At each of its steps: what was renamed is whole, and the next save clears up."""
    before, flush, wanted = save(tmp_path, 1), output.flush, 0

    def cut_off(path):
        if next(calls) == wanted:
            raise KeyboardInterrupt
        flush(path)

    monkeypatch.setattr(output, "flush", cut_off)
    while True:
        calls, wanted = iter(range(100)), wanted + 1
        try:
            save(tmp_path, 2, kept=1)
        except KeyboardInterrupt:
            assert newest_whole(tmp_path) in {before, tmp_path / "checkpoint-2"}
        else:
            break
    assert wanted > 5 and {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}


def test_a_full_disk_names_the_folder_and_costs_nothing(phantom_data, run, tmp_path):
    """A limit on the size of files stands for a full disk or a quota."""
    folder = shutil.copytree(run, tmp_path / "unet")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(InputError, match=r"unet/checkpoint-6 could not be written .*make room.*those before it are as they were"):
            resumed = {"checkpointing_steps": 2, "validation_steps": 0, "resume_from_checkpoint": "latest"}
            train(phantom_data, folder, max_train_steps=6, **resumed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    assert newest_whole(folder).name == "checkpoint-4" and not list(folder.glob(".checkpoint*"))
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    train(phantom_data, folder, max_train_steps=6, **resumed)
    assert losses(folder)[:4] == losses(run) and len(losses(folder)) == 6


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"learning_rate": 0.5}, "learning_rate 0.001 -> 0.5"),
        ({"loss_type": "l1"}, "loss_type l2 -> l1"),
        ({"train_batch_size": 8}, "effective_batch_size 4 -> 8"),
        ({"seed": 3}, "seed 0 -> 3"),
        ({"lr_scheduler": "cosine"}, "lr_scheduler constant -> cosine"),
        ({"max_train_samples": 20}, "max_train_samples None -> 20"),
    ],
)
def test_a_change_that_matters_is_named_and_refused(phantom_data, run, tmp_path, flags, named):
    folder = shutil.copytree(run, tmp_path / "unet")
    before = {name: (folder / name).read_text() for name in ("config.yaml", "status.json", "metrics.jsonl")}
    resumed = {"max_train_steps": 5, "validation_steps": 0, "resume_from_checkpoint": "latest"}
    with pytest.raises(InputError, match=f"{named}.*--allow_config_change"):
        train(phantom_data, folder, **resumed, **flags)
    assert before == {name: (folder / name).read_text() for name in before}
    train(phantom_data, folder, **resumed, **flags, allow_config_change=True)
    assert len(losses(folder)) == 5


def test_other_data_are_named_and_refused(phantom_data, run, tmp_path):
    other = shutil.copytree(phantom_data, tmp_path / "data")
    record = json.loads((other / "medsd.json").read_text())
    (other / "medsd.json").write_text(json.dumps(record | {"fingerprint": "another"}))
    folder = shutil.copytree(run, tmp_path / "unet")
    with pytest.raises(InputError, match="data .* -> another"):
        train(other, folder, max_train_steps=5, resume_from_checkpoint="latest")


def test_another_window_is_another_setting(phantom_data, run, tmp_path):
    """The stored pixels, and with them the fingerprint, are the same."""
    other = shutil.copytree(phantom_data, tmp_path / "data")
    record = json.loads((other / "medsd.json").read_text())
    record["intensity"]["windows"] = [[40.0, 80.0]]
    (other / "medsd.json").write_text(json.dumps(record))
    folder = shutil.copytree(run, tmp_path / "unet")
    with pytest.raises(InputError, match="data's intensity .* -> "):
        train(other, folder, max_train_steps=5, resume_from_checkpoint="latest")


def test_a_run_goes_on_in_its_own_folder_or_an_empty_one(phantom_data, run, tmp_path, capsys):
    data, finished, foreign, lost = (tmp_path / name for name in ("data", "finished", "foreign", "lost"))
    shutil.copytree(phantom_data, data)
    shutil.copytree(run, finished)
    for path in checkpoints(finished):
        shutil.rmtree(path)
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    for folder in (data, finished, foreign):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for wanted in ("latest", str(run / "checkpoint-2")):
            with pytest.raises(InputError, match="is not empty"):
                train(phantom_data, folder, resume_from_checkpoint=wanted)
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for wanted, said in (("latest", f"no checkpoint in {lost}: starting anew"), (str(run / "checkpoint-4"), "going on from")):
        lost.mkdir()
        shutil.copy(run / "environment.json", lost)  # Killed before its first checkpoint.
        train(phantom_data, lost, max_train_steps=5, validation_steps=0, resume_from_checkpoint=wanted)
        assert said in capsys.readouterr().out
        shutil.rmtree(lost)
    train(phantom_data, tmp_path / "fresh", max_train_steps=3, resume_from_checkpoint=str(run / "checkpoint-2"), validation_steps=0)
    assert f"going on from {run / 'checkpoint-2'}" in capsys.readouterr().out


def test_going_back_leaves_the_abandoned_branch_behind(phantom_data, run, tmp_path, capsys):
    """And keeps what it went on from."""
    folder = shutil.copytree(run, tmp_path / "unet")
    flags = {"max_train_steps": 6, "validation_steps": 0, "checkpointing_steps": 6, "learning_rate": 0.01, "allow_config_change": True}
    train(phantom_data, folder, **flags, resume_from_checkpoint=str(folder / "checkpoint-2"))
    said = capsys.readouterr().out
    assert "warning: checkpoint-4 will be removed" in said and "changed since checkpoint-2: learning_rate 0.001 -> 0.01" in said
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-6"]


def test_a_strange_line_of_metrics_is_dropped(phantom_data, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "unet")
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"a": 1}\n[]\nhalf of i')
    train(phantom_data, folder, max_train_steps=5, validation_steps=0, resume_from_checkpoint="latest")
    assert len(losses(folder)) == 5


def test_a_changed_base_is_noticed(phantom_data, run, tmp_path):
    base = shutil.copytree(run, tmp_path / "base")
    flags = {"pretrained_model_name_or_path": str(base), "rank": 2, "validation_steps": 0}
    folder = train(phantom_data, tmp_path / "lora", **flags)
    shutil.rmtree(base)
    train(phantom_data, base, seed=5, validation_steps=0)
    with pytest.raises(InputError, match="frozen .* -> "):
        train(phantom_data, folder, **flags, max_train_steps=3, resume_from_checkpoint="latest")


def test_what_does_not_matter_may_change(phantom_data, run, tmp_path):
    """Other folders, workers, cadence, and another split of the same effective batch: the losses stay."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(run / "checkpoint-2", folder / "checkpoint-2")
    data = shutil.copytree(phantom_data, tmp_path / "data")
    flags = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "logging_steps": 2}
    train(data, folder, max_train_steps=4, resume_from_checkpoint="latest", checkpointing_steps=1, **flags)
    assert losses(folder) == pytest.approx([sum(losses(run)[2:]) / 2], rel=1e-5)


def test_a_default_may_be_typed(phantom_data, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "unet")
    typed = {"learning_rate": 1e-3, "snr_gamma": 20.0, "preset": "tiny", "codec": "pixels", "pixel_factor": 4, "resolution": 32}
    typed |= {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
    train(phantom_data, folder, **typed, max_train_steps=5, validation_steps=0, resume_from_checkpoint="latest")
    assert len(losses(folder)) == 5


def test_a_finished_run_stays_as_it_is(phantom_data, run, tmp_path, capsys):
    """With a calibration that it has been given since."""
    folder = shutil.copytree(run, tmp_path / "unet")
    info = json.loads((folder / "medsd.json").read_text())
    (folder / "medsd.json").write_text(json.dumps(info | {"calibration": {"temperature": 2.0, "bias": [0.0] * 6}}))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"}
    train(phantom_data, folder, max_train_steps=4, validation_steps=0, resume_from_checkpoint="latest")
    assert "4 of 4 updates are done: there was nothing to train" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in before}
    (folder / "status.json").unlink()  # Killed before the model was whole.
    shutil.rmtree(folder / "unet")
    train(phantom_data, folder, max_train_steps=4, validation_steps=0, resume_from_checkpoint="latest")
    written = "unet/diffusion_pytorch_model.safetensors"
    assert (folder / written).read_bytes() == (run / written).read_bytes()


@pytest.mark.parametrize("flags", [{"resume_from_checkpoint": "latest"}, {"overwrite": True}])
def test_two_runs_in_one_folder_are_refused(phantom_data, run, tmp_path, flags):
    folder = shutil.copytree(run, tmp_path / "unet")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with alone_in(folder), pytest.raises(InputError, match="another run is writing to .*unet: wait"):
        train(phantom_data, folder, max_train_steps=5, **flags)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    train(phantom_data, folder, max_train_steps=5, validation_steps=0, **flags)
    assert json.loads((folder / "status.json").read_text()) == {"state": "finished", "step": 5, "reason": ""}
    with alone_in(tmp_path / "new"), pytest.raises(InputError, match="another run is writing to .*new: wait"):
        train(phantom_data, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"unet"}


def test_a_lock_that_is_removed_while_it_is_waited_for_does_not_count(tmp_path, monkeypatch):
    """The one before has ended between the opening of its file and the locking."""
    real, calls = fcntl.flock, []

    def late(handle, kind):
        if not calls:
            (tmp_path / ".unet.lock").unlink()
        calls.append(handle)
        real(handle, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with alone_in(tmp_path / "unet"):
        assert len(calls) == 2
        with pytest.raises(InputError, match="another run is writing to"), alone_in(tmp_path / "unet"):
            raise AssertionError("it was let in")
    assert not any(tmp_path.iterdir())


def test_an_overwrite_that_is_cut_off_can_be_done_again(run, tmp_path, monkeypatch):
    """At each of its steps."""
    wanted, real = 0, {name: getattr(os, name) for name in ("replace", "unlink")}

    def cut_off(name):
        def act(*arguments, **options):
            if next(calls) == wanted:
                raise KeyboardInterrupt
            return real[name](*arguments, **options)

        return act

    while True:
        folder = shutil.copytree(run, tmp_path / f"unet{wanted}")
        calls, wanted = iter(range(1, 1000)), wanted + 1
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, cut_off(name))
            try:
                clear_folder(folder)
            except KeyboardInterrupt:
                check_output(folder, overwrite=True, recipe="finetune_unet.py")
            else:
                break
        shutil.rmtree(folder)
    assert wanted > 20 and not any(folder.iterdir())


def test_only_its_own_recipe_replaces_an_unfinished_training(run, tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    for name in ("config.yaml", "status.json"):
        shutil.copy(run / name, folder)
    for recipe in ("", "finetune_vae.py"):
        with pytest.raises(InputError, match="a training of another recipe"):
            check_output(folder, overwrite=True, recipe=recipe)
    check_output(folder, overwrite=True, recipe="finetune_unet.py")


def test_an_abandoned_branch_does_not_come_back(tmp_path, monkeypatch):
    """Where its removal is cut off."""
    for step in (1, 5, 6):
        save(tmp_path, step)
    real = shutil.rmtree

    def cut_off(path, **options):
        if path.name.endswith(".old") and path.exists():
            raise KeyboardInterrupt
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 3, abandoned=[tmp_path / "checkpoint-5", tmp_path / "checkpoint-6"])
    assert newest_whole(tmp_path).name == "checkpoint-3"


def test_moments_lie_in_memory_as_their_weights_do():
    """As fused optimizers want on a GPU, where convolutions are channels-last."""
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    moment = torch.randn(4, 3, 3, 3)
    placed = spread(moment, "optimizer/state/0/exp_avg", [weight])
    assert placed.stride() == weight.stride() != moment.stride() and torch.equal(placed, moment)
    assert spread(torch.tensor(3.0), "optimizer/state/0/step", [weight]) == 3


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "pytorch_model.bin", "weights.safetensors"]
)
def test_no_pickle_is_read(phantom_data, run, tmp_path, name):
    folder = shutil.copytree(run, tmp_path / "unet")
    planted = folder / "checkpoint-4" / name
    planted.write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    train(phantom_data, folder, max_train_steps=5, validation_steps=0, resume_from_checkpoint="latest")
    assert not (tmp_path / "executed").exists()
    assert losses(folder)[:4] == losses(run)
