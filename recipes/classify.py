"""Score the class likelihoods of a data set with a diffusion model, calibrate them on the validation split, and measure them.

python recipes/classify.py
python recipes/classify.py --pipeline runs/pneumoniamnist/unet --dataset_name runs/pneumoniamnist/data
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsd.commandline import run
from medsd.config import ClassifyConfig
from medsd.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from medsd.inference.pipeline import MedSDPipeline
    from medsd.inference.scoring import ClassifyOutput


def main(config: ClassifyConfig) -> None:
    """Calibrate, score, measure, write."""
    from accelerate import Accelerator

    from medsd.inference.pipeline import MedSDPipeline
    from medsd.output import check_output
    from medsd.runtime import quiet_libraries, use_all_cores

    quiet_libraries()
    output_dir = Path(config.output_dir)
    check_output(output_dir, config.overwrite, [config.pipeline, config.dataset_name])
    accelerator = Accelerator()
    use_all_cores(accelerator)
    pipe = MedSDPipeline.from_pretrained(config.pipeline).to(accelerator.device)
    check_fit(config, pipe)
    if config.calibrate == "validation" and config.weighting == "uniform":
        calibrate(config, pipe)
    rows, labels = labelled_rows(config, pipe, config.split, config.max_samples)
    started = time.perf_counter()
    output = score(config, pipe, rows, class_prior(config, pipe))
    seconds = (time.perf_counter() - started) / len(rows)
    metrics = measure(pipe, output, labels, rows["patient_id"]) | {
        "rows_per_image": float(output.rows.mean()),
        "seconds_per_image": seconds,
    }
    write(output_dir, config, pipe, output, rows, labels, metrics)
    say(metrics, output, output_dir)


def check_fit(config: ClassifyConfig, pipe: "MedSDPipeline") -> None:
    """Raise InputError where the data set cannot be scored by this pipeline."""
    from medsd.data.dataset import available_splits, load_info

    info, splits = load_info(config.dataset_name), available_splits(config.dataset_name)
    for name, data in {config.pipeline: pipe.data, config.dataset_name: info}.items():
        if data.multi_label:
            raise InputError(
                f"{name}: several findings can hold in one image, and such sets are not scored in this release; "
                "generate.py draws images by finding, and data prepared without --multi_label can be classified"
            )
    if len(pipe.class_names) < 2:
        raise InputError(f"{config.pipeline} knows {len(pipe.class_names)} classes: classification needs two or more")
    if not set(info.class_names) & set(pipe.class_names):
        raise InputError(f"{config.dataset_name} has {info.class_names}, the pipeline knows {pipe.class_names}: no class in common")
    if info.unit != pipe.data.unit:
        raise InputError(f"{config.dataset_name} is in {info.unit}, the pipeline in {pipe.data.unit}: prepare data of the same kind")
    if info.resolution < pipe.data.resolution:
        raise InputError(f"{config.dataset_name} has {info.resolution} px: prepare it at the model's --resolution {pipe.data.resolution}")
    for needed in {config.split, config.calibrate} - {"none"}:
        if needed not in splits:
            raise InputError(f"{config.dataset_name} has no {needed} split: change --split, or add --calibrate none")


def labelled_rows(config: ClassifyConfig, pipe: "MedSDPipeline", split: str, limit: int | None) -> "tuple[Any, np.ndarray]":
    """Rows of a split, and each one's class index in the pipeline's order (-1 for a class that it does not know, or no label)."""
    import numpy as np

    from medsd.data.dataset import load_dataset
    from medsd.data.transforms import sample_rows

    rows = sample_rows(load_dataset(config.dataset_name, split), limit, config.seed)
    names = rows.features["label"].names
    order = np.array([pipe.class_names.index(name) if name in pipe.class_names else -1 for name in names] + [-1])
    return rows, order[np.asarray(rows["label"])]


def score(config: ClassifyConfig, pipe: "MedSDPipeline", rows: Any, prior: "np.ndarray | None") -> "ClassifyOutput":
    """Class likelihoods of the rows' images, behind a progress bar that counts UNet rows."""
    from tqdm import tqdm

    from medsd.data.transforms import recorded_ranges

    most = len(rows) * len(pipe.class_names) * config.max_pairs
    with tqdm(total=most, desc=f"scoring {config.split}", unit="row", smoothing=0.05) as bar:
        return pipe.classify(
            list(rows["image"]),
            mode=config.mode,
            weighting=config.weighting,
            max_pairs=config.max_pairs,
            delta=config.delta,
            prior=prior,
            batch_size=config.batch_size,
            seed=config.seed,
            progress=bar.update,
            ranges=recorded_ranges(rows),
        )


def calibrate(config: ClassifyConfig, pipe: "MedSDPipeline") -> None:
    """Fit temperature and class bias on the validation split; a local pipeline trained on this very data keeps them."""
    from tqdm import tqdm

    from medsd.data.dataset import load_info
    from medsd.data.transforms import recorded_ranges
    from medsd.inference.folder import write_info

    rows, labels = labelled_rows(config, pipe, "validation", config.max_samples)
    known = [index for index, label in enumerate(labels) if label >= 0]
    rows = rows.select(known)
    with tqdm(total=len(known) * len(pipe.class_names) * config.max_pairs, desc="scoring validation", unit="row", smoothing=0.05) as bar:
        pipe.calibrate(
            list(rows["image"]),
            labels[known],
            max_pairs=config.max_pairs,
            batch_size=config.batch_size,
            seed=config.seed,
            progress=bar.update,
            ranges=recorded_ranges(rows),
        )
    if (
        config.max_samples is None
        and Path(config.pipeline).is_dir()
        and load_info(config.dataset_name).fingerprint == pipe.data.fingerprint
    ):
        write_info(Path(config.pipeline), pipe.info)
        print(f"temperature and class bias from {len(known)} validation images, kept in {config.pipeline}/medsd.json")


def class_prior(config: ClassifyConfig, pipe: "MedSDPipeline") -> "np.ndarray | None":
    """Class frequencies of the training split, or None for a uniform prior."""
    import numpy as np

    if config.prior == "uniform":
        return None
    _, labels = labelled_rows(config, pipe, "train", limit=None)
    counts = np.bincount(labels[labels >= 0], minlength=len(pipe.class_names))
    return counts / counts.sum()


def measure(pipe: "MedSDPipeline", output: "ClassifyOutput", labels: "np.ndarray", patients: Any) -> dict[str, Any]:
    """`metrics.json` over the rows whose class the pipeline knows."""
    import numpy as np

    from medsd.evaluation.classification import classification_metrics

    known = np.flatnonzero(labels >= 0)
    metrics = classification_metrics(output.probabilities[known], labels[known], pipe.class_names, [patients[int(i)] for i in known])
    return metrics | {"calibrated": output.calibrated}


def write(
    output_dir: Path,
    config: ClassifyConfig,
    pipe: "MedSDPipeline",
    output: "ClassifyOutput",
    rows: Any,
    labels: "np.ndarray",
    metrics: dict[str, Any],
) -> None:
    """`likelihoods.parquet`, then `metrics.json`, which a finished folder has."""
    import pyarrow
    import pyarrow.parquet

    from medsd.output import write_text

    columns = {
        "key": rows["key"],
        "patient_id": rows["patient_id"],
        "label": [pipe.class_names[label] if label >= 0 else None for label in labels],
        "prediction": output.predictions,
        "pairs": output.pairs.max(1),
        "rows": output.rows,
    }
    for prefix, values in {"loglik": output.log_likelihoods, "se": output.standard_errors, "prob": output.probabilities}.items():
        columns |= {f"{prefix}/{name}": values[:, index] for index, name in enumerate(pipe.class_names)}
    output_dir.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({name: list(values) for name, values in columns.items()}), output_dir / "likelihoods.parquet")
    write_text(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def say(metrics: dict[str, Any], output: "ClassifyOutput", output_dir: Path) -> None:
    """The figures that matter, with their intervals."""
    print(f"{metrics['n']} images, {metrics['rows_per_image']:.0f} UNet rows and {metrics['seconds_per_image']:.2f} s an image")
    for name in ("auroc", "balanced_accuracy", "accuracy", "ece", "nll"):
        interval = metrics[f"{name}_ci"]
        shown = "" if interval is None else f"  [{interval[0]:.3f}, {interval[1]:.3f}]"
        beside = f"  (a perfectly calibrated model: {metrics['ece_floor']:.3f})" if name == "ece" else ""
        value = metrics[name]
        print(f"{name:<18} " + (f"{value:.3f}{shown}{beside}" if value is not None else f"none: {metrics['reasons'][name]}"))
    print(
        f"scores in {output_dir}" + ("" if output.calibrated else " (not calibrated: the order of classes counts, not their probabilities)")
    )


if __name__ == "__main__":
    run(main, ClassifyConfig)
