"""Score the class likelihoods of a data set with a diffusion model, calibrate them on the validation split, and measure them.

    python recipes/classify.py
    python recipes/classify.py --pipeline runs/pneumoniamnist/unet --dataset_name runs/pneumoniamnist/data
    accelerate launch --config_file recipes/configs/accelerate/ddp.yaml recipes/classify.py --mode decide --delta 0.01

Started again after it was stopped, it goes on: no image is scored twice.
"""

import hashlib
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import medsd
from medsd.commandline import run
from medsd.config import ClassifyConfig
from medsd.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

    from medsd.inference.calibration import Calibration
    from medsd.inference.parts import Parts
    from medsd.inference.pipeline import MedSDPipeline
    from medsd.inference.scoring import ClassifyOutput
    from medsd.inference.usable import UsableImages

IMAGES_AT_ONCE = 128
"""Scored and kept together, so that the last calls of a look are not half empty."""
EVIDENCE_IMAGES = 16


def main(config: ClassifyConfig) -> None:
    """Into a folder that no other run writes."""
    from medsd.output import alone_in, check_output
    from medsd.runtime import quiet_libraries, start_processes

    quiet_libraries()
    output_dir = Path(config.output_dir)
    check_output(output_dir, config.overwrite, [config.pipeline, config.dataset_name])
    accelerator = start_processes()
    with alone_in(output_dir) if accelerator.is_main_process else nullcontext():
        try:
            write_scores(config, accelerator)
        except KeyboardInterrupt:
            if accelerator.is_main_process:
                print("the same command goes on from what is scored")
            raise


def write_scores(config: ClassifyConfig, accelerator: "Accelerator") -> None:
    """Calibrate, score, measure, write."""
    from medsd.inference.parts import Parts
    from medsd.inference.pipeline import MedSDPipeline

    pipe = MedSDPipeline.from_pretrained(config.pipeline).to(accelerator.device)
    check_fit(config, pipe)
    if config.compile:
        pipe.compile_scoring()
    rows, labels = chosen_rows(config, pipe, config.split, config.max_samples)
    prior = class_prior(config, pipe)
    parts = Parts(Path(config.output_dir), settings(config, pipe, prior))
    with accelerator.main_process_first():
        if accelerator.is_main_process and (done := parts.begin()):
            print(f"{done} images are scored already: going on")
    if config.calibrate == "validation":
        calibrate(config, pipe, accelerator, parts)
    if accelerator.is_main_process:
        warn_of(config, pipe)
    score(config, pipe, accelerator, rows, labels, prior, parts)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(config, pipe, rows, labels, prior, parts)


def check_fit(config: ClassifyConfig, pipe: "MedSDPipeline") -> None:
    """Raise InputError where the data set cannot be scored by this pipeline."""
    from medsd.data.dataset import available_splits, load_info
    from medsd.data.intensity import label_channels
    from medsd.data.matching import match_classes

    info, splits = load_info(config.dataset_name), available_splits(config.dataset_name)
    if len(pipe.class_names) < 2 and not pipe.data.multi_label:
        raise InputError(f"{config.pipeline} knows {len(pipe.class_names)} classes: classification needs two or more")
    if label_channels(pipe.data.intensity_map, pipe.data.image_channels):
        raise InputError(f"{config.pipeline} was trained on images with their masks, which tell the class: train one on the images alone")
    if info.unit != pipe.data.unit:
        raise InputError(f"{config.dataset_name} is in {info.unit}, the pipeline in {pipe.data.unit}: prepare data of the same kind")
    if info.resolution < pipe.data.resolution:
        raise InputError(f"{config.dataset_name} has {info.resolution} px: prepare it at the model's --resolution {pipe.data.resolution}")
    match_classes(info.class_names, pipe.class_names, config.label_map)
    for needed in {config.split, config.calibrate} - {"none"}:
        if needed not in splits:
            raise InputError(f"{config.dataset_name} has no {needed} split: change --split, or add --calibrate none")


def chosen_rows(config: ClassifyConfig, pipe: "MedSDPipeline", split: str, limit: int | None) -> "tuple[Any, np.ndarray]":
    """Rows of a split by key, and their labels in the pipeline's classes; see `medsd.data.matching`."""
    from medsd.data.dataset import load_dataset, load_info
    from medsd.data.matching import choose_rows, labels_in

    names = load_info(config.dataset_name).class_names
    rows = choose_rows(load_dataset(config.dataset_name, split), limit, config.seed, config.keys if split == config.split else ())
    return rows, labels_in(pipe.data, rows, names, config.label_map)


def calibrate(config: ClassifyConfig, pipe: "MedSDPipeline", accelerator: "Accelerator", parts: "Parts") -> None:
    """On the validation split, unless that was done on the very same before; a local pipeline of this very data keeps it."""
    from medsd.data.dataset import load_info
    from medsd.inference.fitting import VERSION
    from medsd.inference.folder import write_info
    from medsd.inference.sharing import from_main
    from medsd.inference.usable import UsableImages

    rows, labels = chosen_rows(config, pipe, "validation", min(config.max_samples or config.max_calibration, config.max_calibration))
    usable = UsableImages(pipe, rows, [index for index, label in enumerate(labels) if label.min() >= 0])
    fingerprint, unit = load_info(config.dataset_name).fingerprint, config.group_by or "patient"
    plan = f"{config.weighting}, {config.max_pairs} pairs, seed {config.seed}, fit {VERSION}"
    source = f"medsd {medsd.__version__}: {len(usable.places)} validation images of {fingerprint[:12]}, by {unit}, {plan}"
    before = next((found for found in (pipe.info.calibration, parts.calibration()) if found and found.source == source), None)
    # What one process reads and another does not must not part their ways.
    before, source, usable.places, usable.failed = from_main((before, source, usable.places, usable.failed))
    made = before or replace(fit_calibration(config, pipe, labels, usable, accelerator), source=source)
    pipe.info = replace(pipe.info, calibration=made)
    if not accelerator.is_main_process:
        return
    print("calibrated before, on the same images and pairs" if before else made.described())
    if usable.failed:
        key, reason = usable.failed[0].values()
        print(f"{len(usable.failed)} of the images to calibrate on could not be used, such as {key}: {reason}")
    parts.keep(made)
    if before is None and config.max_samples is None and Path(config.pipeline).is_dir() and fingerprint == pipe.data.fingerprint:
        write_info(Path(config.pipeline), pipe.info)
        print(f"kept in {config.pipeline}/medsd.json")
    elif before is None:
        print("used for these scores alone: a pipeline keeps what was fitted on the data it was trained on, without --max_samples")


def fit_calibration(
    config: ClassifyConfig, pipe: "MedSDPipeline", labels: "np.ndarray", usable: "UsableImages", accelerator: "Accelerator"
) -> "Calibration":
    """By `MedSDPipeline.calibrate`, on images of all processes together."""
    from medsd.data.transforms import column, recorded_ranges
    from medsd.inference.fitting import usual_rows
    from medsd.inference.scoring import fast_precision

    unit = config.group_by or "patient"
    with row_bar("scoring validation", silent=not accelerator.is_main_process) as bar:
        expected = usual_rows(len(usable.places), len(pipe.hypotheses.sets), config.max_pairs, fast_precision(pipe.device))
        bar.total = expected // accelerator.num_processes
        calibration = usable.apply(
            lambda rows, places: pipe.calibrate(
                list(rows["image"]),
                labels[places],
                weighting=config.weighting,
                max_pairs=config.max_pairs,
                seed=config.seed,
                groups=column(rows, f"{unit}_id").to_pylist(),
                group_unit=unit,
                batch_size=config.batch_size,
                progress=bar.update,
                ranges=recorded_ranges(rows),
                accelerator=accelerator,
            )
        )
    if calibration is None:
        raise InputError("no image of the validation split can be calibrated on: it needs labels and sound images, or --calibrate none")
    return calibration


def warn_of(config: ClassifyConfig, pipe: "MedSDPipeline") -> None:
    """What makes figures too good, findings impossible, or decisions dear."""
    from medsd.inference.calibration import Calibration
    from medsd.inference.race import promised_rule

    calibration = pipe.calibration_for(config.weighting) or Calibration.none(len(pipe.hypotheses.sets))
    if config.mode == "decide" and not promised_rule(calibration, config.delta, config.max_pairs).certified:
        print(f"note: the calibration does not vouch for --delta {config.delta}: it takes more rows (see docs/classifier.md)")
    if config.calibrate == config.split:
        print("warning: these images are those that are calibrated on, so the figures are too good")
    if never := [pipe.class_names[index] for index in pipe.hypotheses.missing(len(pipe.class_names))]:
        print(f"warning: {', '.join(never)}: in none of the sets of findings that are known from training, so its probability is always 0")


def class_prior(config: ClassifyConfig, pipe: "MedSDPipeline") -> "np.ndarray | None":
    """Probability of each class before the image is seen; None for the default: uniform, for findings their sets' frequency."""
    from medsd.data.hypotheses import count_hypotheses
    from medsd.data.matching import read_prior

    if config.prior == "uniform" or (config.prior == "train" and pipe.data.multi_label and pipe.info.hypotheses):
        return None
    if config.prior != "train" and pipe.data.multi_label:
        raise InputError(f"--prior {config.prior}: sets of findings have the prior of their frequency in training; leave it away")
    if config.prior != "train":
        return read_prior(Path(config.prior), pipe.class_names)
    if pipe.info.hypotheses is not None:
        return pipe.info.hypotheses.prior()
    _, labels = chosen_rows(config, pipe, "train", None)
    return count_hypotheses(labels, len(pipe.class_names)).prior()


def settings(config: ClassifyConfig, pipe: "MedSDPipeline", prior: "np.ndarray | None") -> dict[str, Any]:
    """All that determines an image's score; the batch size is rounded to one that does not."""
    from medsd.data.dataset import load_info

    names = (
        "split",
        "mode",
        "weighting",
        "max_pairs",
        "delta",
        "seed",
        "compile",
        "calibrate",
        "max_calibration",
        "max_samples",
        "group_by",
    )
    fixed = {name: getattr(config, name) for name in names} | {"label_map": list(config.label_map), "device": pipe.device.type}
    fixed |= {"prior": None if prior is None else prior.tolist(), "pipeline": pipe.fingerprint()}
    fixed |= {"data": load_info(config.dataset_name).fingerprint}
    kept = config.calibrate == "none" and pipe.info.calibration
    return fixed | {"calibration": asdict(kept) if kept else None}


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
    from medsd.inference.parts import score_columns
    from medsd.inference.usable import UsableImages

    done, keys = parts.keys(), column(rows, "key").to_pylist()
    accelerator.wait_for_everyone()
    todo = [index for index, key in enumerate(keys) if key not in done][accelerator.process_index :: accelerator.num_processes]
    with row_bar(f"scoring {config.split}", silent=not accelerator.is_main_process) as bar:
        for start in range(0, len(todo), IMAGES_AT_ONCE):
            wanted, before = todo[start : start + IMAGES_AT_ONCE], time.perf_counter()
            usable = UsableImages(pipe, rows, wanted)
            output = usable.apply(lambda chosen, _: classify(config, pipe, chosen, prior, bar.update))
            columns: dict[str, Any] = {"key": []}
            if output:
                patients = column(rows.select(usable.places), "patient_id").to_pylist()
                columns = score_columns(output, pipe.class_names, [keys[index] for index in usable.places], patients, labels[usable.places])
            name = hashlib.sha256("\n".join(keys[index] for index in wanted).encode()).hexdigest()[:16]
            parts.add(name, columns, usable.failed, time.perf_counter() - before)
            bar.total = bar.n * len(todo) // (start + len(wanted))
            bar.refresh()


def classify(config: ClassifyConfig, pipe: "MedSDPipeline", rows: Any, prior: "np.ndarray | None", progress: Any) -> "ClassifyOutput":
    """Class likelihoods of some rows' images."""
    from medsd.data.transforms import recorded_ranges

    return pipe.classify(
        list(rows["image"]),
        mode=config.mode,
        weighting=config.weighting,
        max_pairs=config.max_pairs,
        delta=config.delta,
        prior=prior,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=progress,
        ranges=recorded_ranges(rows),
    )


def row_bar(title: str, silent: bool = False) -> Any:
    """A bar that counts UNet rows."""
    from tqdm import tqdm

    return tqdm(desc=title, unit="row", smoothing=0.05, disable=silent)


def finish(
    config: ClassifyConfig, pipe: "MedSDPipeline", rows: Any, labels: "np.ndarray", prior: "np.ndarray | None", parts: "Parts"
) -> None:
    """Merge the parts, measure, and write the folder of scores."""
    import numpy as np
    import pyarrow.parquet

    from medsd.data.dataset import load_info
    from medsd.data.transforms import column
    from medsd.inference.folder import training_patients
    from medsd.output import replacing

    place = {key: index for index, key in enumerate(column(rows, "key").to_pylist())}
    failed = [failure for failure in parts.failed() if failure["key"] in place]
    if len(failed) == len(rows):
        raise InputError(f"none of {len(failed)} images could be scored; {failed[0]['key']}: {failed[0]['reason']}")
    table = parts.table()
    table = table.filter(np.isin(table["key"].to_numpy(zero_copy_only=False), list(place)))
    order = [place[key] for key in table["key"].to_pylist()]
    rows, labels = rows.select(order), labels[order]
    metrics, groups = measure(config, pipe, table, rows, labels, prior)
    metrics |= {"failed": len(failed), "seconds_per_image": parts.seconds() / len(table)}
    with replacing(Path(config.output_dir)) as made:
        pyarrow.parquet.write_table(table, made / "likelihoods.parquet")
        if groups is not None:
            pyarrow.parquet.write_table(pyarrow.table(groups), made / "groups.parquet")
        if failed:
            (made / "failed.jsonl").write_text("".join(json.dumps(failure) + "\n" for failure in failed))
        if config.evidence:
            write_evidence(config, pipe, rows, table, made / "evidence")
        (made / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    parts.remove()
    foreign = load_info(config.dataset_name).fingerprint != pipe.data.fingerprint
    say(metrics, config, (training_patients(Path(config.pipeline)) or set()) & set(table["patient_id"].to_pylist()) if foreign else set())


def measure(
    config: ClassifyConfig, pipe: "MedSDPipeline", table: Any, rows: Any, labels: "np.ndarray", prior: "np.ndarray | None"
) -> tuple[dict[str, Any], Any]:
    """`metrics.json`, and the columns of groups where images are to be joined."""
    import numpy as np

    from medsd.data.transforms import column
    from medsd.evaluation.tables import class_metrics, group_columns, with_groups
    from medsd.inference.parts import answers_in

    calibration, names, groups = pipe.calibration_for(config.weighting), pipe.class_names, None
    probabilities = np.stack([table[f"prob/{name}"].to_numpy() for name in names], 1)
    patients = table["patient_id"].to_pylist()
    answers = answers_in(table["prediction"].to_pylist(), names, labels.ndim == 2) if config.mode == "decide" else None
    metrics = class_metrics(probabilities, labels, names, patients, answers)
    if config.group_by:
        ids = column(rows, f"{config.group_by}_id").to_pylist()
        temperature, rule = calibration.joins(config.group_by) if calibration else (None, "mean")
        groups, joined = group_columns(config.group_by, ids, patients, probabilities, labels, names, temperature, rule, prior)
        metrics = with_groups(metrics, joined)
    return metrics | {
        "calibrated": calibration is not None and calibration.fits(config.max_pairs),
        "calibration": dict(calibration.report) if calibration else None,
        "rows_per_image": float(np.mean(table["rows"].to_numpy())),
        "p_flip": float(np.mean(table["p_flip"].to_numpy())),
        "batch_size": pipe.batch_rows(config.batch_size),
        "pipeline": pipe.fingerprint(),
    }, groups


def write_evidence(config: ClassifyConfig, pipe: "MedSDPipeline", rows: Any, table: Any, folder: Path) -> None:
    """For each image of `--keys` (else the first ones): where it speaks for its class and not for the next, as array and overlay."""
    import numpy as np

    from medsd.data.transforms import recorded_ranges
    from medsd.inference.pictures import captioned, overlay

    folder.mkdir()
    for index in range(len(rows) if config.keys else min(len(rows), EVIDENCE_IMAGES)):
        row, ranges = rows[index], recorded_ranges(rows.select([index]))
        likely = sorted(pipe.class_names, key=lambda name, index=index: -table[f"prob/{name}"][index].as_py())
        against = None if pipe.data.multi_label else likely[1]
        evidence = pipe.evidence(row["image"], likely[0], against, config.max_pairs, config.seed, ranges, config.weighting)
        name = row["key"].replace("/", "_")
        np.save(folder / f"{name}.npy", evidence.map)
        captioned(overlay(evidence.image, evidence.map), evidence.described()).save(folder / f"{name}.png")


def say(metrics: dict[str, Any], config: ClassifyConfig, seen: set[str]) -> None:
    """The figures that matter, and what to doubt of them."""
    spent = f"{metrics['rows_per_image']:.0f} UNet rows and {metrics['seconds_per_image']:.2f} s an image"
    print(f"{metrics['n']} images with a label, {spent}" + (f"; {metrics['failed']} could not be scored" if metrics["failed"] else ""))
    names = ["auroc", "balanced_accuracy", "accuracy", "ece", "nll"]
    for name in [*names, *(f"{config.group_by}_{name}" for name in ("auroc", "accuracy") if config.group_by)]:
        interval, value = metrics[f"{name}_ci"], metrics[name]
        shown = "" if interval is None else f"  [{interval[0]:.3f}, {interval[1]:.3f}]"
        beside = f"  (a perfectly calibrated model: {metrics['ece_floor']:.3f})" if name == "ece" and metrics["n"] else ""
        print(f"{name:<18} " + (f"{value:.3f}{shown}{beside}" if value is not None else f"none: {metrics['reasons'][name]}"))
    if seen:
        print(f"warning: {len(seen)} patients are among those that the pipeline was trained on, so the figures are too good")
    hint = "" if metrics["calibrated"] else " (not calibrated: the order of classes counts, not their probabilities)"
    print(f"scores in {config.output_dir}{hint}")


if __name__ == "__main__":
    run(main, ClassifyConfig)
