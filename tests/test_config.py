"""Flags, YAML sections, folder chain and exit codes."""

import subprocess
import sys
import time

import pytest
from tqdm import tqdm

from medsd.commandline import parse, run
from medsd.config import RECIPES, ClassifyConfig, FinetuneUNetConfig, GenerateConfig, PrepareDataConfig
from medsd.errors import InputError
from tests.conftest import REPOSITORY


def write(folder, text, name="scan.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_bare_booleans_lists_and_underscores():
    config = parse(PrepareDataConfig, ["--windows", "brain", "subdural", "--overwrite", "--split_fractions", "0.5", "0.25", "0.25"])
    assert config.windows == ("brain", "subdural") and config.overwrite and config.split_fractions == (0.5, 0.25, 0.25)
    assert not parse(FinetuneUNetConfig, ["--no_use_ema"]).use_ema


def test_folders_are_a_chain_without_flags():
    assert PrepareDataConfig().output_dir == FinetuneUNetConfig().dataset_name == ClassifyConfig().dataset_name == "runs/phantom/data"
    assert FinetuneUNetConfig().output_dir == GenerateConfig().pipeline == ClassifyConfig().pipeline == "runs/phantom/unet"


def test_rules_between_fields_hold_for_yaml_and_flags_together(tmp_path):
    path = write(tmp_path, "finetune_unet:\n  rank: 4\nprepare_data:\n  source: images\n  prompt_template: a {name} of {label}\n")
    assert parse(FinetuneUNetConfig, ["--config", path, "--pretrained_model_name_or_path", "x"]).rank == 4
    config = parse(PrepareDataConfig, ["--config", path, "--data_dir", "scans"])
    assert config.prompt_template == "a {name} of {label}" and config.output_dir == "runs/scan/data"


def test_a_yaml_names_the_chain_and_flags_win(tmp_path):
    path = write(tmp_path, "finetune_unet:\n  preset: small\n  train_batch_size: 8\n  learning_rate: 1.0e-4\n")
    config = parse(FinetuneUNetConfig, ["--config", path, "--train_batch_size", "4"])
    assert (config.preset, config.train_batch_size, config.learning_rate) == ("small", 4, 1e-4)
    assert config.dataset_name == "runs/scan/data" and config.output_dir == "runs/scan/unet"
    assert parse(ClassifyConfig, [f"--config={path}"]).output_dir == "runs/scan/scores"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("finetune_unets: {}\n", "unknown section"),
        ("finetune_unet:\n  train_batch: 8\n", "train_batch"),
        ("finetune_unet:\n  train_batch_size: many\n", "train_batch_size"),
        ("- a\n", "unknown section"),
        ("finetune_unet: [1]\n", "finetune_unet"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_yaml_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        parse(FinetuneUNetConfig, ["--config", write(tmp_path, text)])


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (FinetuneUNetConfig, {"preset": "tiny", "pretrained_model_name_or_path": "x"}, "--preset"),
        (FinetuneUNetConfig, {"preset": "tiny", "rank": 4}, "--rank"),
        (FinetuneUNetConfig, {"push_to_hub": True}, "--hub_model_id"),
        (FinetuneUNetConfig, {"codec": "kl"}, "--vae"),
        (FinetuneUNetConfig, {"proportion_empty_prompts": 1.5}, "--proportion_empty_prompts"),
        (FinetuneUNetConfig, {"lora_alpha": 4}, "--rank"),
        (FinetuneUNetConfig, {"train_batch_size": 0}, "--train_batch_size 0"),
        (ClassifyConfig, {"max_pairs": -1}, "--max_pairs"),
        (ClassifyConfig, {"delta": 2.0}, "--delta"),
        (PrepareDataConfig, {"source": "images"}, "--data_dir"),
        (PrepareDataConfig, {"prompt_template": "a scan"}, "{label}"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(recipe, flags, message):
    with pytest.raises(InputError, match=message):
        recipe(**flags)


@pytest.mark.parametrize(
    ("argv", "error", "code"),
    [
        (["--no_such_flag"], None, 2),
        (["--config", "nowhere.yaml"], None, 2),
        (["--preset", "tiny", "--pretrained_model_name_or_path", "x"], None, 2),
        ([], InputError("mend me"), 1),
        ([], OSError("disk full"), 1),
        ([], KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(monkeypatch, capsys, argv, error, code):
    def main(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["recipe.py", *argv])
    with pytest.raises(SystemExit) as stopped:
        run(main, FinetuneUNetConfig)
    assert stopped.value.code == code
    if "--preset" in argv:
        assert capsys.readouterr().err == "error: --pretrained_model_name_or_path and --preset exclude each other: drop one\n"
    if isinstance(error, Exception):
        assert capsys.readouterr().err == f"error: {error}\n"


def test_an_error_has_a_line_of_its_own(monkeypatch, capsys):
    def main(config):
        bars.append(tqdm(total=3))
        raise InputError("mend me")

    bars = []
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    with pytest.raises(SystemExit):
        run(main, FinetuneUNetConfig)
    assert "error: mend me" in capsys.readouterr().err.splitlines()
    bars[0].close()


def test_debug_shows_the_traceback(monkeypatch):
    def main(config):
        raise InputError("mend me")

    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    monkeypatch.setenv("MEDSD_DEBUG", "1")
    with pytest.raises(InputError):
        run(main, FinetuneUNetConfig)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.section)
def test_help_is_quick_and_names_every_flag(recipe):
    from dataclasses import fields

    command = [sys.executable, f"recipes/{recipe.section}.py", "--help"]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1
    assert all(f"--{field.name}" in answer.stdout for field in fields(recipe))
    assert "--config" in answer.stdout


def test_help_imports_nothing_heavy():
    code = """
import sys
sys.argv, sys.path = ["x", "--help"], ["recipes", *sys.path]
import finetune_unet
try:
    finetune_unet.run(finetune_unet.main, finetune_unet.FinetuneUNetConfig)
except SystemExit:
    print("HEAVY", [name for name in ("torch", "numpy", "diffusers", "datasets") if name in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "HEAVY []" in answer.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"source": "images", "patient_column": "who"}, "--patient_column names a column"),
        ({"source": "npz", "labels": "l.csv", "split_column": "fold"}, "--split_column names a column"),
        ({"source": "images", "multi_label": True}, "--multi_label needs --labels"),
        ({"source": "csv", "labels": "l.csv", "channels": ("t1",)}, "--channels stacks volumes"),
        ({"source": "nifti", "labels": "l.csv", "mask_column": "m"}, "--mask_column is for images"),
        ({"source": "images", "split_fractions": (0.8, 0.1, 0.2)}, "--split_fractions 0.8 0.1 0.2: three shares"),
    ],
)
def test_flags_that_a_source_does_not_read_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        PrepareDataConfig(data_dir="d", **flags)


def test_an_empty_list_in_a_yaml_names_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("prepare_data:\n  prompt_metadata: []\n")
    assert parse(PrepareDataConfig, ["--config", str(tmp_path / "a.yaml")]).prompt_metadata is None
    assert parse(PrepareDataConfig, ["--prompt_metadata"]).prompt_metadata == ()


def test_a_learning_rate_is_above_0():
    with pytest.raises(InputError, match="--learning_rate -1.0"):
        FinetuneUNetConfig(learning_rate=-1.0)
