"""Score the class likelihoods of a data set with a diffusion model, calibrate them on the validation split, and measure them.

    python recipes/classify.py
    python recipes/classify.py --pipeline runs/pneumoniamnist/unet --dataset_name runs/pneumoniamnist/data
    accelerate launch --config_file recipes/configs/accelerate/ddp.yaml recipes/classify.py --mode decide --delta 0.01

Started again after it was stopped, it goes on: no image is scored twice.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsd.commandline import run
from medsd.config import ClassifyConfig
from medsd.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

    from medsd.inference.parts import Parts
    from medsd.inference.pipeline import MedSDPipeline
    from medsd.inference.scoring import ClassifyOutput

IMAGES_AT_ONCE = 128
"""Scored and kept together, so that the last calls of a look are not half empty."""
EVIDENCE_IMAGES = 16


def main(config: ClassifyConfig) -> None:
    """Calibrate, score, measure, write."""
    from medsd.inference.parts import Parts
    from medsd.inference.pipeline import MedSDPipeline
    from medsd.output import check_output
    from medsd.runtime import quiet_libraries, start_processes

    quiet_libraries()
    output_dir = Path(config.output_dir)
    check_output(output_dir, config.overwrite, [config.pipeline, config.dataset_name])
    accelerator = start_processes()
    pipe = MedSDPipeline.from_pretrained(config.pipeline).to(accelerator.device)
    check_fit(config, pipe)
    if config.compile:
        pipe.compile_scoring()
    calibrate(config, pipe, accelerator)
    rows, labels = chosen_rows(config, pipe, config.split, config.max_samples)
    prior = class_prior(config, pipe)
    parts = Parts(output_dir, settings(config, pipe, prior))
    with accelerator.main_process_first():
        if accelerator.is_main_process and (done := parts.begin()):
            print(f"{done} images are scored already: going on")
    score(config, pipe, accelerator, rows, labels, prior, parts)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(config, pipe, rows, labels, parts)


def check_fit(config: ClassifyConfig, pipe: "MedSDPipeline") -> None:
    """Raise InputError where the data set cannot be scored by this pipeline."""
    from medsd.data.dataset import available_splits, load_info
    from medsd.data.intensity import label_channels

    info, splits = load_info(config.dataset_name), available_splits(config.dataset_name)
    if len(pipe.class_names) < 2 and not pipe.data.multi_label:
        raise InputError(f"{config.pipeline} knows {len(pipe.class_names)} classes: classification needs two or more")
    if label_channels(pipe.data.intensity_map, pipe.data.image_channels):
        raise InputError(f"{config.pipeline} was trained on images with their masks, which tell the class: train one on the images alone")
    if info.unit != pipe.data.unit:
        raise InputError(f"{config.dataset_name} is in {info.unit}, the pipeline in {pipe.data.unit}: prepare data of the same kind")
    if info.resolution < pipe.data.resolution:
        raise InputError(f"{config.dataset_name} has {info.resolution} px: prepare it at the model's --resolution {pipe.data.resolution}")
    ours = set(class_map(config, pipe, info.class_names).values())
    if info.class_names and not ours:
        raise InputError(
            f"{config.dataset_name} has {info.class_names}, the pipeline knows {pipe.class_names}: no class in common; say which is which "
            "with --label_map THEIRS=OURS"
        )
    for needed in {config.split, config.calibrate} - {"none"}:
        if needed not in splits:
            raise InputError(f"{config.dataset_name} has no {needed} split: change --split, or add --calibrate none")


def class_map(config: ClassifyConfig, pipe: "MedSDPipeline", names: list[str]) -> dict[str, str]:
    """Class of the data set -> class of the pipeline, for those that have one: by `--label_map`, else by name."""
    named = {}
    for entry in config.label_map:
        theirs, _, ours = entry.partition("=")
        if theirs not in names or ours not in pipe.class_names:
            unknown = theirs if theirs not in names else ours
            known = names if theirs not in names else pipe.class_names
            raise InputError(f'--label_map {entry}: there is no class "{unknown}" among {", ".join(known)}')
        named[theirs] = ours
    return {name: named.get(name, name) for name in names if named.get(name, name) in pipe.class_names}


def chosen_rows(config: ClassifyConfig, pipe: "MedSDPipeline", split: str, limit: int | None) -> "tuple[Any, np.ndarray]":
    """Rows of a split by key, and what each shows, in the pipeline's order: class indices `(N,)`, -1 where that is not known, or
    findings `(N, K)` of 0 and 1, -1 for a finding that the data set does not know."""
    import numpy as np

    from medsd.data.dataset import load_dataset, load_info
    from medsd.data.transforms import column, row_labels, stratified

    rows, names = load_dataset(config.dataset_name, split), load_info(config.dataset_name).class_names
    if config.keys and split == config.split:
        rows = rows_of_keys(rows, config.keys)
    rows = rows.select(stratified(row_labels(rows), column(rows, "key").to_pylist(), limit, config.seed))
    labels, known = row_labels(rows), class_map(config, pipe, names)
    if labels.ndim == 2 or pipe.data.multi_label:
        findings = labels if labels.ndim == 2 else np.eye(len(names), dtype=int)[labels]
        of_ours = np.full((len(rows), len(pipe.class_names)), -1)
        for theirs, ours in known.items():
            of_ours[:, pipe.class_names.index(ours)] = findings[:, names.index(theirs)]
        return rows, of_ours if pipe.data.multi_label else np.where((of_ours == 1).sum(1) == 1, of_ours.argmax(1), -1)
    order = np.array([pipe.class_names.index(known[name]) if name in known else -1 for name in names] + [-1])
    return rows, order[labels]


def rows_of_keys(rows: Any, keys: tuple[str, ...]) -> Any:
    """The rows of these keys; raises InputError for one that is not there."""
    from medsd.data.transforms import column

    place = {key: index for index, key in enumerate(column(rows, "key").to_pylist())}
    if missing := [key for key in keys if key not in place]:
        raise InputError(f"--keys {missing[0]}: no image of this split has that key")
    return rows.select([place[key] for key in keys])


def calibrate(config: ClassifyConfig, pipe: "MedSDPipeline", accelerator: "Accelerator") -> None:
    """Fit the calibration on the validation split, by the main process for all; a local pipeline trained on this very data keeps it."""
    from accelerate.utils import broadcast_object_list

    from medsd.inference.calibration import Calibration

    if config.calibrate == "validation" and accelerator.is_main_process:
        fit_calibration(config, pipe)
    found = [asdict(pipe.info.calibration) if pipe.info.calibration else None]
    made = broadcast_object_list(found)[0]
    pipe.info = replace(pipe.info, calibration=Calibration.from_dict(made) if made else None)


def fit_calibration(config: ClassifyConfig, pipe: "MedSDPipeline") -> None:
    """By `MedSDPipeline.calibrate`, unless the pipeline has been calibrated on the very same before."""
    from medsd.data.dataset import load_info
    from medsd.data.transforms import column, recorded_ranges
    from medsd.inference.folder import write_info

    rows, labels = chosen_rows(config, pipe, "validation", min(config.max_samples or config.max_calibration, config.max_calibration))
    known = [index for index, label in enumerate(labels) if label.min() >= 0]
    rows, fingerprint = rows.select(known), load_info(config.dataset_name).fingerprint
    source = f"{len(rows)} validation images of {fingerprint[:12]}, {config.weighting}, {config.max_pairs} pairs, seed {config.seed}"
    if pipe.info.calibration and pipe.info.calibration.source == source:
        print("calibrated before, on the same images and pairs")
        return
    with row_bar("scoring validation") as bar:
        calibration = pipe.calibrate(
            list(rows["image"]),
            labels[known],
            weighting=config.weighting,
            max_pairs=config.max_pairs,
            seed=config.seed,
            groups=column(rows, "patient_id").to_pylist(),
            batch_size=config.batch_size,
            progress=bar.update,
            ranges=recorded_ranges(rows),
        )
    pipe.info = replace(pipe.info, calibration=replace(calibration, source=source))
    print(described(calibration))
    if config.max_samples is None and Path(config.pipeline).is_dir() and fingerprint == pipe.data.fingerprint:
        write_info(Path(config.pipeline), pipe.info)
        print(f"kept in {config.pipeline}/medsd.json")


def described(calibration: Any) -> str:
    """One line about what was fitted."""
    report = calibration.report
    twice = sum(calibration.proposal.antithetic) / len(calibration.proposal.antithetic)
    chosen = report["candidates"][report["weighting"]]
    return (
        f"calibrated on {report['images']} images: temperature {calibration.temperature:.3g}, weights {report['weighting']} "
        f"(cross-validated NLL {chosen['nll']:.3f}), opposite noises in {twice:.0%} of the timesteps, {calibration.precision}"
    )


def class_prior(config: ClassifyConfig, pipe: "MedSDPipeline") -> "np.ndarray | None":
    """Probability of each class before the image is seen; None for the default: uniform, for findings their sets' frequency."""
    import numpy as np

    if config.prior == "uniform":
        return None
    if config.prior == "train":
        return training_hypotheses(config, pipe).prior()
    if pipe.data.multi_label:
        raise InputError(f"--prior {config.prior}: sets of findings have the prior of their frequency in training; leave it away")
    given = read_prior(Path(config.prior))
    if unknown := [name for name in given.keys() ^ set(pipe.class_names)]:
        raise InputError(f'--prior {config.prior}: "{unknown[0]}" is not in both file and pipeline, whose classes are {pipe.class_names}')
    weights = np.array([given[name] for name in pipe.class_names])
    return weights / weights.sum()


def read_prior(file: Path) -> dict[str, float]:
    """YAML or JSON of class -> number above 0."""
    import yaml

    try:
        given = {str(name): float(value) for name, value in yaml.safe_load(file.read_text()).items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"--prior {file} cannot be read: uniform, train, or a YAML file of CLASS: PROBABILITY is expected") from error
    if min(given.values()) <= 0:
        raise InputError(f"--prior {file}: probabilities must be above 0; they are brought to a sum of 1")
    return given


def training_hypotheses(config: ClassifyConfig, pipe: "MedSDPipeline") -> Any:
    """As the pipeline recorded them, or counted in the data set's training split."""
    from medsd.data.hypotheses import count_hypotheses

    if pipe.info.hypotheses is not None:
        return pipe.info.hypotheses
    _, labels = chosen_rows(config, pipe, "train", None)
    return count_hypotheses(labels[labels >= 0], len(pipe.class_names))


def settings(config: ClassifyConfig, pipe: "MedSDPipeline", prior: "np.ndarray | None") -> dict[str, Any]:
    """All that determines an image's score; the batch size is rounded to one that does not."""
    from medsd.data.dataset import load_info

    names = ("mode", "weighting", "max_pairs", "delta", "seed", "compile")
    fixed = {name: getattr(config, name) for name in names} | {"prior": None if prior is None else prior.tolist()}
    fixed |= {"data": load_info(config.dataset_name).fingerprint, "label_map": list(config.label_map)}
    calibration = pipe.info.calibration
    return fixed | {"calibration": asdict(calibration) if calibration else None, "pipeline": pipe.fingerprint()}


def score(
    config: ClassifyConfig,
    pipe: "MedSDPipeline",
    accelerator: "Accelerator",
    rows: Any,
    labels: "np.ndarray",
    prior: "np.ndarray | None",
    parts: "Parts",
) -> None:
    """Score this process's share of the rows that are not scored yet; the bar counts UNet rows, and its end is estimated."""
    from medsd.data.transforms import column

    done, keys = parts.keys(), column(rows, "key").to_pylist()
    accelerator.wait_for_everyone()
    todo = [index for index, key in enumerate(keys) if key not in done][accelerator.process_index :: accelerator.num_processes]
    with row_bar(f"scoring {config.split}", silent=not accelerator.is_main_process) as bar:
        for start in range(0, len(todo), IMAGES_AT_ONCE):
            wanted, before, failed = todo[start : start + IMAGES_AT_ONCE], time.perf_counter(), []
            good = list(readable(pipe, rows, wanted, failed))
            columns = {"key": []}
            if good:
                output = classify(config, pipe, rows, good, prior, bar.update)
                columns = columns_of(pipe, output, rows.select(good), labels[good])
            name = hashlib.sha256("\n".join(keys[index] for index in wanted).encode()).hexdigest()[:16]
            parts.add(name, columns, failed, time.perf_counter() - before)
            bar.total = bar.n * len(todo) // (start + len(wanted))
            bar.refresh()


def readable(pipe: "MedSDPipeline", rows: Any, wanted: list[int], failed: list[dict[str, str]]) -> Iterator[int]:
    """The rows whose images the pipeline takes; of the others, key and reason go to `failed`."""
    for index in wanted:
        try:
            pipe.fit_image(rows[index]["image"])
        except (InputError, ValueError, TypeError, OSError) as error:
            failed.append({"key": rows.select_columns(["key"])[index]["key"], "reason": " ".join(str(error).split())})
        else:
            yield index


def classify(
    config: ClassifyConfig, pipe: "MedSDPipeline", rows: Any, chosen: list[int], prior: "np.ndarray | None", progress: Any
) -> "ClassifyOutput":
    """Class likelihoods of some rows' images."""
    from medsd.data.transforms import recorded_ranges

    part = rows.select(chosen)
    return pipe.classify(
        list(part["image"]),
        mode=config.mode,
        weighting=config.weighting,
        max_pairs=config.max_pairs,
        delta=config.delta,
        prior=prior,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=progress,
        ranges=recorded_ranges(part),
    )


def row_bar(title: str, silent: bool = False) -> Any:
    """A bar that counts UNet rows."""
    from tqdm import tqdm

    return tqdm(desc=title, unit="row", smoothing=0.05, disable=silent)


def columns_of(pipe: "MedSDPipeline", output: "ClassifyOutput", rows: Any, labels: "np.ndarray") -> dict[str, Any]:
    """Columns of `likelihoods.parquet`."""
    from medsd.data.transforms import column

    columns = {
        "key": column(rows, "key").to_pylist(),
        "patient_id": column(rows, "patient_id").to_pylist(),
        "label": label_names(pipe, labels),
        "prediction": output.predictions,
        "pairs": output.pairs.max(1),
        "rows": output.rows,
    }
    hypotheses = [name or "no finding" for name in output.hypotheses]
    named = {
        "loglik": (hypotheses, output.log_likelihoods),
        "se": (hypotheses, output.standard_errors),
        "prob": (pipe.class_names, output.probabilities),
    }
    for prefix, (names, values) in named.items():
        columns |= {f"{prefix}/{name}": values[:, index] for index, name in enumerate(names)}
    return columns | {"p_flip": output.p_flip, "entropy": output.entropy}


def label_names(pipe: "MedSDPipeline", labels: "np.ndarray") -> list[str | None]:
    """Class names; of findings those that hold, joined by `|`; None where that is not known."""
    if labels.ndim == 1:
        return [pipe.class_names[label] if label >= 0 else None for label in labels]
    shown = ["|".join(name for name, holds in zip(pipe.class_names, row, strict=True) if holds == 1) for row in labels]
    return [names if (row >= 0).any() else None for names, row in zip(shown, labels, strict=True)]


def finish(config: ClassifyConfig, pipe: "MedSDPipeline", rows: Any, labels: "np.ndarray", parts: "Parts") -> None:
    """Merge the parts, measure, and write the folder of scores."""
    import numpy as np
    import pyarrow.parquet

    from medsd.data.transforms import column
    from medsd.evaluation.tables import class_metrics, group_table
    from medsd.output import replacing

    failed = parts.failed()
    if len(failed) == len(rows):
        raise InputError(f"none of {len(failed)} images could be scored; {failed[0]['key']}: {failed[0]['reason']}")
    place = {key: index for index, key in enumerate(column(rows, "key").to_pylist())}
    table = parts.table()
    table = table.filter(np.isin(table["key"].to_numpy(), list(place)))
    order = [place[key] for key in table["key"].to_pylist()]
    labels, kept = labels[order], rows.select(order)
    probabilities = np.stack([table[f"prob/{name}"].to_numpy() for name in pipe.class_names], 1)
    metrics = class_metrics(probabilities, labels, pipe.class_names, table["patient_id"].to_pylist())
    groups = None
    if config.group_by:
        ids = column(kept, f"{config.group_by}_id").to_pylist()
        groups, of_groups = group_table(config.group_by, ids, probabilities, labels, pipe.class_names, **grouping(config, pipe))
        metrics |= of_groups
    metrics |= {
        "calibrated": pipe.info.calibration is not None,
        "calibration": dict(pipe.info.calibration.report) if pipe.info.calibration else None,
        "failed": len(failed),
        "rows_per_image": float(np.mean(table["rows"].to_numpy())),
        "seconds_per_image": parts.seconds() / len(table),
        "p_flip": float(np.mean(table["p_flip"].to_numpy())),
        "batch_size": pipe.batch_rows(config.batch_size),
    }
    output_dir = Path(config.output_dir)
    with replacing(output_dir) as made:
        pyarrow.parquet.write_table(table, made / "likelihoods.parquet")
        if groups is not None:
            pyarrow.parquet.write_table(groups, made / "groups.parquet")
        if failed:
            (made / "failed.jsonl").write_text("".join(json.dumps(failure) + "\n" for failure in failed))
        if config.evidence:
            write_evidence(config, pipe, kept, table, made / "evidence")
        (made / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    parts.remove()
    say(metrics, output_dir, training_patients(config, pipe) & set(table["patient_id"].to_pylist()))


def grouping(config: ClassifyConfig, pipe: "MedSDPipeline") -> dict[str, Any]:
    """How images of a group are joined: as was fitted, else as if they were copies of one."""
    import numpy as np

    calibration, prior = pipe.info.calibration, class_prior(config, pipe)
    uniform = np.full(len(pipe.class_names), 1 / len(pipe.class_names))
    return {
        "temperature": calibration.group_temperature if calibration else None,
        "rule": calibration.group_rule if calibration else "mean",
        "prior": uniform if prior is None or pipe.data.multi_label else prior,
    }


def training_patients(config: ClassifyConfig, pipe: "MedSDPipeline") -> set[str]:
    """Patients that the pipeline was trained on, as far as its training data is still where it was; of its own data, none in question."""
    import yaml

    from medsd.data.dataset import load_dataset, load_info
    from medsd.data.transforms import column

    recorded = Path(config.pipeline) / "config.yaml"
    if not recorded.is_file() or load_info(config.dataset_name).fingerprint == pipe.data.fingerprint:
        return set()
    data = yaml.safe_load(recorded.read_text()).get("finetune_unet", {}).get("dataset_name")
    return set(column(load_dataset(data, "train"), "patient_id").to_pylist()) if data and Path(data).is_dir() else set()


def write_evidence(config: ClassifyConfig, pipe: "MedSDPipeline", rows: Any, table: Any, folder: Path) -> None:
    """For each image of `--keys` (else the first ones): where it speaks for its class and not for the next, as array and overlay."""
    import numpy as np

    from medsd.data.transforms import recorded_ranges
    from medsd.inference.pictures import overlay

    shown = range(len(rows) if config.keys else min(len(rows), EVIDENCE_IMAGES))
    rows = rows.select(shown)
    folder.mkdir()
    for index, row in enumerate(rows):
        ranges = recorded_ranges(rows.select([index]))
        evidence = pipe.evidence(row["image"], max_pairs=config.max_pairs, seed=config.seed, ranges=ranges)
        name = row["key"].replace("/", "_")
        np.save(folder / f"{name}.npy", evidence.map)
        overlay(evidence.image, evidence.map).save(folder / f"{name}.png")


def say(metrics: dict[str, Any], output_dir: Path, seen: set[str]) -> None:
    """The figures that matter, with their intervals."""
    spent = f"{metrics['rows_per_image']:.0f} UNet rows and {metrics['seconds_per_image']:.2f} s an image"
    print(f"{metrics['n']} images with a label, {spent}" + (f"; {metrics['failed']} could not be scored" if metrics["failed"] else ""))
    names = ["auroc", "balanced_accuracy", "accuracy", "ece", "nll"]
    for name in [*names, *(name for name in metrics if name.endswith(("patient_auroc", "patient_accuracy")))]:
        interval = metrics[f"{name}_ci"]
        shown = "" if interval is None else f"  [{interval[0]:.3f}, {interval[1]:.3f}]"
        beside = f"  (a perfectly calibrated model: {metrics['ece_floor']:.3f})" if name == "ece" and metrics["n"] else ""
        value = metrics[name]
        print(f"{name:<18} " + (f"{value:.3f}{shown}{beside}" if value is not None else f"none: {metrics['reasons'][name]}"))
    if seen:
        print(f"warning: {len(seen)} patients are among those that the pipeline was trained on, so the figures are too good")
    print(
        f"scores in {output_dir}"
        + ("" if metrics["calibrated"] else " (not calibrated: the order of classes counts, not their probabilities)")
    )


if __name__ == "__main__":
    run(main, ClassifyConfig)
