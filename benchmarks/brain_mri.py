"""Brain tumour MRI (T1 with contrast, 406 slices), every image scored once: the diffusion classifier and a ResNet on the same five folds.

    python benchmarks/brain_mri.py --data_dir ../shared/data/brain_mri_t1ce_3class --work /tmp/brain_mri -- --max_train_steps 6000

Folds are by `pseudo_group` (nearly: patients), three to train on, one to stop, calibrate and choose on, one to test. Flags after `--`
go to finetune_unet.py. Prints balanced accuracy, AUROC and NLL of all 406 images with intervals, and how often, among the rightly
classified, the peak lies in the tumour's box: of the evidence map, of the difference to a counterfactual, of the ResNet's Grad-CAM,
and of the one pixel that lies in most boxes of the training folds. Writes brain_mri.json; a fold that is there is not computed again.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
from PIL import Image

from benchmarks.resnet import Part, fold_of, grad_cam, logits, read, scaled, train
from medsd import MedSDPipeline, load_dataset
from medsd.data.transforms import recorded_ranges
from medsd.evaluation.classification import classification_metrics

FOLDS = 5
RECIPES = Path(__file__).parents[1] / "recipes"
AUGMENTATION = ["--random_shift", "4", "--random_rotation", "10", "--random_scale", "0.1", "--random_intensity", "0.1"]
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


def run_fold(work: Path, fold: int, resolution: int, flags: list[str]) -> Path:
    """Prepare, train and classify; returns the fold's folder."""
    folder = work / f"fold-{fold}"
    data, run, scores = (str(folder / name) for name in ("data", "unet", "scores"))
    if not Path(data).is_dir():
        table = [
            "--labels",
            str(work / f"fold-{fold}.csv"),
            "--image_column",
            "path",
            "--patient_column",
            "group",
            "--split_column",
            "split",
        ]
        shape = ["--mask_column", "mask", "--resolution", str(resolution), "--duplicates", "keep"]
        prompt = ["--prompt_template", "a contrast-enhanced brain MRI with {label}"]
        recipe("prepare_data", "--source", "csv", "--data_dir", str(work), "--output_dir", data, *table, *shape, *prompt)
    if not Path(scores).is_dir():
        common = ["--class_sampling", "balanced", "--mixed_precision", "bf16", "--resume_from_checkpoint", "latest", *AUGMENTATION]
        recipe("finetune_unet", "--dataset_name", data, "--output_dir", run, *common, *flags)
        recipe("classify", "--pipeline", run, "--dataset_name", data, "--output_dir", scores, "--mode", "full", "--max_pairs", "128")
    return folder


def metrics_of(probabilities: np.ndarray, labels: np.ndarray, groups: list[str], names: list[str]) -> dict:
    found = classification_metrics(probabilities, labels, names, groups)
    wanted = ("auroc", "accuracy", "balanced_accuracy", "nll", "ece", "ece_floor")
    return {name: found[name] for name in wanted} | {f"{name}_ci": found[f"{name}_ci"] for name in wanted[:4]}


def peaks(folder: Path, probabilities: np.ndarray, rows: object, names: list[str]) -> dict[str, list[bool]]:
    """For each rightly classified image, whether the peak of each kind of map lies in its box."""
    pipe = MedSDPipeline.from_pretrained(folder / "unet")
    pipe.set_progress_bar_config(disable=True)
    inside: dict[str, list[bool]] = {"evidence": [], "counterfactual": []}
    for index, label in enumerate(rows["label"]):
        if probabilities[index].argmax() != label:
            continue
        row, ranges = rows[index], recorded_ranges(rows.select([index]))
        box, rival = row["mask"][0] > 0, names[int(np.argsort(probabilities[index])[-2])]
        inside["evidence"].append(bool(box[pipe.evidence(row["image"], names[label], rival, ranges=ranges).peak]))
        inside["counterfactual"].append(bool(box[peak(counterfactual_difference(pipe, row["image"], names[label], rival, ranges))]))
    return inside


def counterfactual_difference(pipe: MedSDPipeline, image: np.ndarray, own: str, rival: str, ranges: np.ndarray | None) -> np.ndarray:
    """Mean absolute difference of the image redrawn as its own class and as the other, `(R, R)`."""
    differences = []
    for seed in range(COUNTERFACTUAL_SEEDS):
        drawn = [pipe.counterfactual(image, name, 0.5, 20, 3.0, seed, ranges, "pt")[0] for name in (own, rival)]
        differences.append((drawn[0] - drawn[1]).abs().mean(0).numpy())
    return np.mean(differences, axis=0)


def peak(values: np.ndarray) -> tuple[int, int]:
    row, column = np.unravel_index(values.argmax(), values.shape)
    return int(row), int(column)


def fixed_pixel(rows: object) -> tuple[int, int]:
    """The pixel that lies in most boxes."""
    return peak(np.sum([mask[0] > 0 for mask in rows["mask"]], axis=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    write_folds(options.data_dir, options.work)
    collected: dict[str, list] = {name: [] for name in ("ours", "resnet", "labels", "groups")}
    inside: dict[str, list[bool]] = {}
    for fold in options.folds:
        folder = run_fold(options.work, fold, options.resolution, options.flags)
        names, ours, cnn, rows, maps = score_fold(folder)
        labels = np.array(rows["label"])
        for name, values in zip(collected, (ours, cnn, labels, rows["patient_id"]), strict=True):
            collected[name] += list(values)
        for name, hits in maps.items():
            inside.setdefault(name, []).extend(hits)
        print(
            fold,
            {
                kind: metrics_of(part, labels, rows["patient_id"], names)["balanced_accuracy"]
                for kind, part in (("ours", ours), ("resnet", cnn))
            },
            flush=True,
        )
    labels = np.array(collected["labels"])
    result = {kind: metrics_of(np.array(collected[kind]), labels, collected["groups"], names) for kind in ("ours", "resnet")}
    result |= {"images": len(labels), "peak inside": {name: float(np.mean(hits)) for name, hits in inside.items()}}
    (options.work / "brain_mri.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def score_fold(folder: Path) -> tuple[list[str], np.ndarray, np.ndarray, object, dict[str, list[bool]]]:
    """Class names, both models' probabilities of the test images by key, these rows, and where the maps peak."""
    data = str(folder / "data")
    rows = load_dataset(data, "test")
    rows = rows.select(np.argsort(rows["key"]))
    names = rows.features["label"].names
    scores = pyarrow.parquet.read_table(folder / "scores" / "likelihoods.parquet")
    ours = np.stack([scores[f"prob/{name}"].to_numpy() for name in names], 1)
    train_part, validation, test = (read(data, split) for split in ("train", "validation", "test"))
    model = train(train_part, validation, len(names), seed=0)
    order = np.argsort(test.keys)
    test = Part(test.images[order], test.labels[order], test.patients[order], test.keys[order])
    cnn = scaled(model, validation, test)
    maps = peaks(folder, ours, rows, names)
    right = np.flatnonzero(logits(model, test.images).argmax(1) == test.labels)
    cams = grad_cam(model, test.images[right], test.labels[right])
    boxes = [rows[int(index)]["mask"][0] > 0 for index in right]
    maps["grad-cam"] = [bool(box[peak(cam)]) for box, cam in zip(boxes, cams, strict=True)]
    place = fixed_pixel(load_dataset(data, "train"))
    maps["fixed pixel"] = [bool(mask[0][place] > 0) for mask in rows["mask"]]
    return names, ours, cnn, rows, maps


if __name__ == "__main__":
    main()
