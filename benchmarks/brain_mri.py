"""Brain tumour MRI (T1 with contrast, 406 slices), every image scored once: the diffusion classifier and a ResNet on the same five folds.

    python benchmarks/brain_mri.py --data_dir ../shared/data/brain_mri_t1ce_3class --work /tmp/brain_mri

Folds are by `pseudo_group` (nearly: patients), three to train on, one to stop, calibrate and choose on, one to test. *plain* is a model
trained as usual, *discriminative* the same trained on with `--discriminative_weight`. Prints balanced accuracy, AUROC and NLL of all 406
images with intervals, and how often, among the rightly classified, the peak lies in the tumour's box: of the second model's `maps` and of
the one pixel that lies in most boxes of the training folds, and of the ResNet's Grad-CAM among those that the ResNet classifies rightly.
Writes brain_mri.json; models and scores that are there are not computed again. The weight was chosen on the validation images, whose
cross-validated NLL is printed for each fold:

    python benchmarks/brain_mri.py ... --work /tmp/brain_mri_small --folds 0 1 2 3 --discriminative_weight 0.003
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from PIL import Image
from scipy.ndimage import gaussian_filter

from benchmarks.resnet import fold_of, grad_cam
from medsd import MedSDPipeline, load_dataset
from medsd.data.transforms import recorded_ranges
from medsd.evaluation.classification import classification_metrics
from medsd.inference.evidence import BLUR
from medsd.training.discriminative import Labelled, fit_resnet, logits, read_labelled, scaled

FOLDS = 5
RECIPES = Path(__file__).parents[1] / "recipes"
AUGMENTATION = ["--random_shift", "4", "--random_rotation", "10", "--random_scale", "0.1", "--random_intensity", "0.1"]
PLAIN = ["--max_train_steps", "2500"]
FURTHER = ["--max_train_steps", "600", "--learning_rate", "3e-4"]
"""With the term, from the plain model."""
COUNTERFACTUAL_SEEDS = 4


def write_folds(data_dir: Path, work: Path) -> None:
    """A copy of the images, a mask for each box, and a table for each fold."""
    shutil.copytree(data_dir / "images", work / "images", dirs_exist_ok=True)
    with (data_dir / "labels.csv").open() as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        write_box(line, work)
    labels = np.unique([line["label"] for line in lines], return_inverse=True)[1]
    fold = fold_of(labels, np.array([line["pseudo_group"] for line in lines]), FOLDS)
    for test in range(FOLDS):
        names = {test: "test", (test + 1) % FOLDS: "validation"}
        with (work / f"fold-{test}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", "label", "group", "split", "mask"])
            for line, number in zip(lines, fold, strict=True):
                table.writerow([line["path"], line["label"], line["pseudo_group"], names.get(int(number), "train"), mask_name(line)])


def mask_name(line: dict[str, str]) -> str:
    return f"masks/{line['label']}-{Path(line['path']).stem}.png"


def write_box(line: dict[str, str], work: Path) -> None:
    """`box_xc`, `box_yc`, `box_w`, `box_h` are shares of the image's sides."""
    width, height = Image.open(work / line["path"]).size
    x, y, w, h = (float(line[f"box_{name}"]) for name in ("xc", "yc", "w", "h"))
    box = np.zeros((height, width), np.uint8)
    box[
        max(0, round((y - h / 2) * height)) : round((y + h / 2) * height), max(0, round((x - w / 2) * width)) : round((x + w / 2) * width)
    ] = 255
    target = work / mask_name(line)
    target.parent.mkdir(exist_ok=True)
    Image.fromarray(box).save(target)


def recipe(name: str, *flags: str) -> None:
    subprocess.run([sys.executable, str(RECIPES / f"{name}.py"), *flags], check=True)


def prepare_fold(work: Path, fold: int, resolution: int) -> Path:
    """Its folder, with data in it."""
    folder = work / f"fold-{fold}"
    data = str(folder / "data")
    if not Path(data).is_dir():
        columns = ["--image_column", "path", "--patient_column", "group", "--split_column", "split"]
        table = ["--labels", str(work / f"fold-{fold}.csv"), *columns]
        shape = ["--mask_column", "mask", "--resolution", str(resolution), "--duplicates", "keep"]
        prompt = ["--prompt_template", "a contrast-enhanced brain MRI with {label}"]
        recipe("prepare_data", "--source", "csv", "--data_dir", str(work), "--output_dir", data, *table, *shape, *prompt)
    return folder


def train_and_score(folder: Path, name: str, flags: list[str]) -> float:
    """A model of a fold, in NAME, and its scores of the test images, in NAME-scores; returns the NLL of the validation images, nats."""
    data, model = str(folder / "data"), str(folder / name)
    common = ["--dataset_name", data, "--output_dir", model, "--class_sampling", "balanced", "--resume_from_checkpoint", "latest"]
    if not (folder / name / "model_index.json").is_file():
        recipe("finetune_unet", *common, *AUGMENTATION, *flags)
    scores = f"{model}-scores"
    if not Path(scores).is_dir():
        recipe("classify", "--pipeline", model, "--dataset_name", data, "--output_dir", scores, "--mode", "full")
    report = json.loads(Path(scores, "metrics.json").read_text())["calibration"]
    return report["candidates"][report["weighting"]]["nll"]


def metrics_of(probabilities: np.ndarray, labels: np.ndarray, groups: list[str], names: list[str]) -> dict:
    found = classification_metrics(probabilities, labels, names, groups)
    wanted = ("auroc", "accuracy", "balanced_accuracy", "nll", "ece", "ece_floor")
    return {name: found[name] for name in wanted} | {f"{name}_ci": found[f"{name}_ci"] for name in wanted[:4]}


def exam_rows(folder: Path) -> Any:
    """The fold's test images, by key."""
    rows = load_dataset(str(folder / "data"), "test")
    return rows.select(np.argsort(rows["key"]))


def ours(folder: Path, name: str, classes: list[str]) -> np.ndarray:
    """A model's probabilities `(N, K)` of the test images, by key."""
    scores = pyarrow.parquet.read_table(folder / f"{name}-scores" / "likelihoods.parquet")
    return np.stack([scores[f"prob/{label}"].to_numpy() for label in classes], 1)


def resnet(folder: Path, rows: Any) -> tuple[np.ndarray, list[bool]]:
    """The ResNet's probabilities of the test images, and where Grad-CAM peaks for those that it classifies rightly."""
    data = str(folder / "data")
    train_part, validation, test = (read_labelled(data, split) for split in ("train", "validation", "test"))
    model = fit_resnet(train_part, validation, len(rows.features["label"].names), seed=0)
    order = np.argsort(test.keys)
    test = Labelled(test.images[order], test.labels[order], test.patients[order], test.keys[order])
    right = np.flatnonzero(logits(model, test.images).argmax(1) == test.labels)
    cams = grad_cam(model, test.images[right], test.labels[right])
    hits = [lies_in_box(cam, rows[int(index)]) for index, cam in zip(right, cams, strict=True)]
    return scaled(model, validation, test.images), hits


def lies_in_box(values: np.ndarray, row: dict[str, Any]) -> bool:
    """Whether the peak of a map `(R, R)` lies in the tumour's box."""
    return bool(row["mask"][0][np.unravel_index(values.argmax(), values.shape)])


def our_maps(folder: Path, name: str, rows: Any, probabilities: np.ndarray) -> dict[str, list[bool]]:
    """For each rightly classified image, whether the peak of each kind of map lies in its box."""
    pipe = MedSDPipeline.from_pretrained(folder / name)
    pipe.set_progress_bar_config(disable=True)
    inside: dict[str, list[bool]] = {}
    for index in np.flatnonzero(probabilities.argmax(1) == np.array(rows["label"])):
        row, ranges = rows[int(index)], recorded_ranges(rows.select([index]))
        own, rival = (pipe.class_names[number] for number in probabilities[index].argsort()[:-3:-1])
        for kind, drawn in maps(pipe, row["image"], own, rival, ranges).items():
            inside.setdefault(kind, []).append(lies_in_box(drawn, row))
    return inside


def maps(pipe: MedSDPipeline, image: np.ndarray, own: str, rival: str, ranges: np.ndarray | None) -> dict[str, np.ndarray]:
    """Where the image shows its class `own`, `(R, R)` each: by the errors under the next class or under the empty prompt, and by what
    differs between its counterfactuals as either class."""
    found = {
        "against the next class": pipe.evidence(image, own, rival, ranges=ranges).map,
        "against the empty prompt": pipe.evidence(image, own, "", ranges=ranges).map,
    }
    drawn = {name: redrawn(pipe, image, name, ranges) for name in (own, rival)}
    found["counterfactuals' difference"] = np.abs(drawn[own] - drawn[rival])
    return found


def redrawn(pipe: MedSDPipeline, image: np.ndarray, name: str, ranges: np.ndarray | None) -> np.ndarray:
    """Mean of some counterfactuals as a class, `(R, R)` in [0, 1], blurred as evidence is."""
    drawn = [pipe.counterfactual(image, name, 0.5, 20, 2.0, seed, ranges, "pt")[0].mean(0).numpy() for seed in range(COUNTERFACTUAL_SEEDS)]
    return gaussian_filter(np.mean(drawn, axis=0), BLUR * drawn[0].shape[-1], mode="reflect")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    parser.add_argument("--discriminative_weight", type=float, default=0.1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    write_folds(options.data_dir, options.work)
    weight = str(options.discriminative_weight)
    with_term = f"discriminative-{weight}"
    folders = [prepare_fold(options.work, fold, options.resolution) for fold in options.folds]
    for folder in folders:
        start = ["--pretrained_model_name_or_path", str(folder / "plain"), "--discriminative_weight", weight]
        nll = {name: train_and_score(folder, name, flags) for name, flags in (("plain", PLAIN), (with_term, [*FURTHER, *start]))}
        print(folder.name, "validation NLL", nll, flush=True)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("plain", with_term, "resnet")}
    inside: dict[str, list[bool]] = {"grad-cam": [], "fixed pixel": []}
    labels, groups = [], []
    for folder in folders:
        rows = exam_rows(folder)
        classes = rows.features["label"].names
        for name in ("plain", with_term):
            found[name].append(ours(folder, name, classes))
        for kind, hits in our_maps(folder, with_term, rows, found[with_term][-1]).items():
            inside.setdefault(kind, []).extend(hits)
        probabilities, hits = resnet(folder, rows)
        found["resnet"].append(probabilities)
        inside["grad-cam"] += hits
        place = np.sum([mask[0] > 0 for mask in load_dataset(str(folder / "data"), "train")["mask"]], axis=0)
        right = np.flatnonzero(found[with_term][-1].argmax(1) == np.array(rows["label"]))
        inside["fixed pixel"] += [lies_in_box(place, rows[int(index)]) for index in right]
        labels += rows["label"]
        groups += rows["patient_id"]
        print(folder.name, "scored", flush=True)
    result = {name: metrics_of(np.concatenate(parts), np.array(labels), groups, classes) for name, parts in found.items()}
    result |= {"images": len(labels), "peak inside": {kind: float(np.mean(hits)) for kind, hits in inside.items()}}
    (options.work / "brain_mri.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
