"""Train on nested shares of the patients, with several seeds and models; classify, generate and evaluate; draw what more patients bring.

    python recipes/sweep_data_size.py --config recipes/configs/phantom_sweep.yaml
    python recipes/sweep_data_size.py --fractions 0.1 0.3 1.0 --seeds 0 1 2 --models tiny small
    python recipes/sweep_data_size.py --models runs/phantom/unet runs/phantom/long --output_dir runs/phantom/sweep_of_pipelines

A *cell* is one model, share and seed, in a folder of its own; its *steps* are other recipes, which run one after the other, and cells
side by side. Started again after it was stopped, it goes on: a step that is done is not done again.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsd.commandline import parse, run
from medsd.config import ClassifyConfig, EvaluateConfig, FinetuneUNetConfig, RecipeConfig, SweepConfig
from medsd.config.sweep import PRESETS, model_name
from medsd.errors import InputError

if TYPE_CHECKING:
    from tqdm import tqdm

    from medsd.data.dataset import DataInfo
    from medsd.seats import Seat

PLACES = frozenset({"pipeline", "dataset_name", "output_dir", "scores", "sweep", "overwrite"})
"""Fields of classify.py and evaluate.py that do not change what they compute."""


@dataclass(frozen=True)
class Step:
    """One recipe of a cell."""

    name: str
    recipe: type[RecipeConfig]
    flags: tuple[str, ...]
    folder: Path
    """What it writes, in the cell's."""
    data: str
    """The data's fingerprint."""

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def record(self) -> Path:
        """What determined its result; written when it is done."""
        return self.folder.with_name(f"{self.name}.json")

    @cached_property
    def config(self) -> RecipeConfig:
        """As the recipe will read it; raises InputError for what it would refuse."""
        return parse(self.recipe, self.flags)

    @property
    def settings(self) -> dict[str, Any]:
        """What determines its result."""
        config = self.config
        if isinstance(config, FinetuneUNetConfig):
            return config.settings(1) | {"max_train_steps": config.max_train_steps, "data": self.data}
        return {name: value for name, value in asdict(config).items() if name not in PLACES} | {"data": self.data}

    def is_done(self) -> bool:
        """Raises InputError where it was done with other settings."""
        if not self.record.is_file() or not self.folder.is_dir():
            return False
        before, now = json.loads(self.record.read_text()), json.loads(json.dumps(self.settings))
        changed = sorted(name for name in before.keys() | now if before.get(name) != now.get(name))
        if changed:
            told = "; ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in changed)
            raise InputError(f"{self.folder} was made with other settings ({told}): use those, another --output_dir, or --overwrite")
        return True


@dataclass(frozen=True)
class Cell:
    """One model, share of the patients and seed."""

    model: str
    fraction: float
    seed: int
    folder: Path
    steps: tuple[Step, ...]

    def is_done(self) -> bool:
        """Whether every step is."""
        return all(step.is_done() for step in self.steps)


def main(config: SweepConfig) -> None:
    """Into a folder that no other sweep writes."""
    from medsd.data.dataset import load_info
    from medsd.data.prepare import prepare_default
    from medsd.output import alone_in
    from medsd.runtime import quiet_libraries

    quiet_libraries()
    check_folder(config)
    with alone_in(Path(config.output_dir)):
        prepare_default(config.dataset_name, SweepConfig().dataset_name)
        cells = plan(config, load_info(config.dataset_name))
        begin(config, cells)
        try:
            sweep(config, cells)
        except BaseException as error:
            write_status(config, cells, "failed" if isinstance(error, InputError) else "stopped", str(error))
            if isinstance(error, KeyboardInterrupt):
                print("the same command goes on from what is done")
            raise
        write_status(config, cells, "finished")
        say(config, results(config, cells))


def check_folder(config: SweepConfig) -> None:
    """Raise InputError where the sweep may neither begin nor go on in its folder."""
    from medsd.output import check_output

    record = Path(config.output_dir) / "config.yaml"
    goes_on = record.is_file() and record.read_text().startswith(f"{config.section}:")
    if config.overwrite or not goes_on:
        inputs = [config.dataset_name, *(model for model in config.models if model not in PRESETS)]
        check_output(Path(config.output_dir), config.overwrite, inputs, "sweep_data_size.py")


def plan(config: SweepConfig, info: "DataInfo") -> list[Cell]:
    """Every cell, seed by seed; raises InputError for flags that a step would refuse."""
    cells = []
    for seed, fraction, model in product(config.seeds, config.fractions, config.models):
        folder = Path(config.output_dir) / f"{model_name(model)}-{fraction:g}-{seed}"
        cells.append(Cell(model_name(model), fraction, seed, folder, steps(config, info, model, fraction, seed, folder)))
    return cells


def steps(config: SweepConfig, info: "DataInfo", model: str, fraction: float, seed: int, cell: Path) -> tuple[Step, ...]:
    """Train; classify, where images have classes to tell; generate and evaluate."""
    from medsd.data.intensity import label_channels

    unet, scores, report = (cell / name for name in ("unet", "scores", "report"))
    preset, pretrained = (model, "None") if model in PRESETS else ("None", model)
    start = ("--preset", preset, "--pretrained_model_name_or_path", pretrained)
    training = ("--train_fraction", str(fraction), "--seed", str(seed), "--resume_from_checkpoint", "latest", "--no_push_to_hub")
    judged = ("--scores", str(scores), "--sweep", str(cell / "sweep"), "--features", features(config, info))

    def step(name: str, recipe: type[RecipeConfig], folder: Path, *flags: str) -> Step:
        yaml = ("--config", config.config) if config.config else ()
        shared = ("--dataset_name", config.dataset_name, "--output_dir", str(folder), "--no_overwrite")
        made = Step(name, recipe, (*yaml, *shared, *flags), folder, info.fingerprint)
        _ = made.config
        return made

    train = step("train", FinetuneUNetConfig, unet, *start, *training)
    classify = step("classify", ClassifyConfig, scores, "--pipeline", str(unet))
    evaluate = step("evaluate", EvaluateConfig, report, "--pipeline", str(unet), *judged)
    has_classes = len(info.class_names) > 1 and not label_channels(info.intensity_map, info.image_channels)
    return (train, classify, evaluate) if has_classes and not train.config.unconditional else (train, evaluate)


def features(config: SweepConfig, info: "DataInfo") -> str:
    """Of the flag, else of a ResNet that tells the data's classes."""
    if config.features is None and (info.multi_label or len(info.class_names) < 2):
        raise InputError(f"{config.dataset_name} has no classes to train a ResNet on: say with --features what images are compared by")
    return config.features or config.dataset_name


def begin(config: SweepConfig, cells: Sequence[Cell]) -> None:
    """Make the folder, or say what is in it; raises InputError where a step was done with other settings."""
    import yaml

    from medsd.output import clear_folder, write_text, writing

    folder = Path(config.output_dir)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if config.overwrite:
            clear_folder(folder)
    if done := sum(cell.is_done() for cell in cells):
        print(f"{done} of {len(cells)} cells are done already: going on")
    write_text(folder / "config.yaml", yaml.safe_dump({config.section: json.loads(json.dumps(asdict(config)))}, sort_keys=False))
    write_status(config, cells, "running")


def write_status(config: SweepConfig, cells: Sequence[Cell], state: str, reason: str = "") -> None:
    """`status.json`: running, finished, failed or stopped, and how many cells are done."""
    from medsd.output import write_text

    found = {"state": state, "done": sum(cell.is_done() for cell in cells), "cells": len(cells), "reason": reason}
    write_text(Path(config.output_dir) / "status.json", json.dumps(found) + "\n")


def sweep(config: SweepConfig, cells: Sequence[Cell]) -> None:
    """Cells side by side, each on a seat of its own; the first step that fails stops all."""
    from tqdm import tqdm

    from medsd.seats import seats, side_by_side

    waiting = [cell for cell in cells if not cell.is_done()]
    places = seats(config.parallel, max(1, len(waiting)))
    if waiting:
        print(f"{len(waiting)} cells to do, {len(places)} at once, {places[0]} each")
    with tqdm(total=sum(len(cell.steps) for cell in waiting), desc="sweep", unit="step", smoothing=0, disable=not waiting) as bar:
        side_by_side([partial(work, cell, bar) for cell in waiting], places, lambda: write_results(config, results(config, cells)))
    write_results(config, results(config, cells))


def work(cell: Cell, bar: "tqdm", seat: "Seat") -> Iterator[subprocess.Popen]:
    """The processes of a cell's steps, one after the other. After a step that is done anew, the later ones are, too.

    Raises InputError where one has failed.
    """
    from medsd.output import write_text
    from medsd.seats import last_words, start

    anew, began = False, time.perf_counter()
    cell.folder.mkdir(exist_ok=True)
    for step in cell.steps:
        if anew or not step.is_done():
            anew = True
            again = ("--overwrite",) if step.name != "train" and step.folder.is_dir() else ()
            script = Path(__file__).with_name(f"{step.recipe.section}.py")
            process = start(script, (*step.flags, *again), seat, step.log, step.folder)
            yield process
            if process.returncode:
                raise InputError(f"{cell.folder}, {step.name}: {last_words(step.log)} (all of it in {step.log}; the same command goes on)")
            write_text(step.record, json.dumps(step.settings, indent=2) + "\n")
        bar.update()
    bar.write(f"{cell.folder.name} in {time.perf_counter() - began:.0f} s")


def results(config: SweepConfig, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each cell that is done: by model, share and seed, in the order of the flags."""
    from medsd.data.dataset import load_dataset
    from medsd.data.transforms import column, training_rows
    from medsd.report.sweep import metric_columns

    dataset, rows = load_dataset(config.dataset_name, "train"), []
    names = [model_name(model) for model in config.models]
    for cell in sorted(cells, key=lambda cell: names.index(cell.model)):
        if cell.is_done():
            trained = training_rows(dataset, *cell.steps[0].config.subset)
            known = {"model": cell.model, "fraction": cell.fraction, "patients": len(column(trained, "patient_id").unique())}
            known |= {"images": len(trained), "seed": cell.seed, "training_seconds": training_seconds(cell.steps[0])}
            metrics = json.loads((cell.steps[-1].folder / "metrics.json").read_text())
            rows.append(known | {"extractor": metrics["extractor"]} | metric_columns(metrics))
    return rows


def training_seconds(step: Step) -> float | None:
    """Of all updates, also of those before a kill, at the rate of the last start; without looks and checkpoints."""
    updates = json.loads((step.folder / "status.json").read_text())["step"]
    profile = json.loads((step.folder / "environment.json").read_text()).get("profile")
    images = updates * step.config.train_batch_size * step.config.gradient_accumulation_steps
    return round(images / profile["images_per_second"], 1) if profile else None


def write_results(config: SweepConfig, rows: Sequence[dict[str, Any]]) -> None:
    """`results.csv` and `data_size.png`."""
    from medsd.output import write_text, writing
    from medsd.report.sweep import as_csv, picture, with_metric

    folder = Path(config.output_dir)
    write_text(folder / "results.csv", as_csv(rows))
    if drawn := [metric for metric in config.metrics if with_metric(rows, metric)]:
        made, file = folder / ".data_size.png.partial", folder / "data_size.png"
        with writing(file):
            picture(rows, drawn).save(made, "PNG")
            os.replace(made, file)


def say(config: SweepConfig, rows: Sequence[dict[str, Any]]) -> None:
    """Means over seeds, and what is missing."""
    from medsd.report.sweep import summary, with_metric

    print(*summary(rows, config.metrics), sep="\n")
    print(f"means of {len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}, with 95 % intervals of seeds and patients together")
    if missing := [metric for metric in config.metrics if not with_metric(rows, metric)]:
        print(f"note: nothing is drawn of {', '.join(missing)}: no cell has it, or it is of features that are each pipeline's own")
    print(f"table in {Path(config.output_dir) / 'results.csv'}, figure in {Path(config.output_dir) / 'data_size.png'}")


if __name__ == "__main__":
    run(main, SweepConfig)
