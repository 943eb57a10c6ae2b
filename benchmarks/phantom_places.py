"""Does a generated bleed lie where its class has it? A rule on the phantom's geometry, tried on real slices first.

    python recipes/prepare_data.py --source phantom --seed 1 --output_dir runs/phantom_1/data
    python benchmarks/phantom_generation.py --pipeline runs/phantom/unet --save /tmp/generated.npz
    python benchmarks/phantom_places.py --judge runs/phantom_1/data --generated /tmp/generated.npz

A U-Net that was trained on the `--judge` phantom's masks (other heads) finds the bleed. Its *place* is told by six numbers: how deep below
the inner skull its pixels lie (10th, 50th and 90th percentile), how far from the middle of the head its centre is, how much of the circle
around the middle it spans, and how scattered it is. A class's rule is the box that the `--judge` slices of that class fill, a margin wider
on either side; `normal` is no bleed. What a rule accepts of the real test slices of its class, and of other classes, says whether it is
one: 99 % or more, and 25 % or less.
"""

import argparse
import json

import numpy as np
import torch
from scipy.ndimage import binary_closing, binary_fill_holes, distance_transform_edt, label

from medsd import load_dataset, load_info
from medsd.data.transforms import TrainingRows, row_labels, to_unit
from medsd.training.segmentation import Pairs, fit_unet, segmented

BONE, GAP = 80.0, 2
"""HU above that of blood, and pixels of a gap in the skull that is closed: a generated one is speckled."""
PIXEL = 3.45
"""mm, about that of all slices at 64 px."""
EPOCHS, MARGIN = 15, 0.25
"""Of the U-Net, and of a box on either side, as a share of its width."""
SMALLEST, SPECK = 100.0, 4
"""mm2 of a bleed, less is none; and pixels of a part of it, fewer are left out."""
FEATURES = ("depth_10", "depth_50", "depth_90", "radius", "arc", "scatter")


def read(dataset_name: str, split: str) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """Images in `[-1, 1]`, masks, HU `(N, H, W)` as the window shows them, labels."""
    rows, info = load_dataset(dataset_name, split), load_info(dataset_name)
    batch = TrainingRows(rows, with_masks=True)[list(range(len(rows)))]
    unit = to_unit(batch["images"], info.intensity_map)
    return unit, batch["masks"][:, 0].long(), info.intensity_map.from_unit(unit)[:, 0].numpy(), row_labels(rows)


def place(hounsfield: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`FEATURES` of one slice, mm and degrees; NaN where there is no bleed inside the skull. A disc's scatter is 0.7."""
    inside = cavity(hounsfield)
    parts, _ = label(mask & inside, structure=np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())
    found = (parts > 0) & (sizes >= SPECK)[parts]
    area = found.sum() * PIXEL**2
    if area < SMALLEST:
        return np.full(len(FEATURES), np.nan)
    depths = distance_transform_edt(inside)[found] * PIXEL
    rows, columns = np.nonzero(found)
    middle = np.array(np.nonzero(inside)).mean(1)
    offsets = np.stack([rows - middle[0], columns - middle[1]]) * PIXEL
    radius, scatter = np.hypot(*offsets.mean(1)), np.sqrt(offsets.var(1).sum() * np.pi / area)
    return np.array([*np.percentile(depths, [10, 50, 90]), radius, arc(np.arctan2(*offsets)), scatter])


def cavity(hounsfield: np.ndarray) -> np.ndarray:
    """What bone encloses: the largest part."""
    bone = binary_closing(np.pad(hounsfield > BONE, 2 * GAP), iterations=GAP)[2 * GAP : -2 * GAP, 2 * GAP : -2 * GAP]
    parts, count = label(binary_fill_holes(bone) & ~bone)
    return parts == 1 + np.bincount(parts.ravel())[1:].argmax() if count else parts > 0


def arc(angles: np.ndarray) -> float:
    """Degrees of the circle without its widest gap."""
    ordered = np.sort(angles)
    return float(360 - np.degrees(np.diff(np.append(ordered, ordered[0] + 2 * np.pi)).max()))


def places(hounsfield: np.ndarray, masks: np.ndarray) -> np.ndarray:
    return np.stack([place(image, mask) for image, mask in zip(hounsfield, masks, strict=True)])


def boxes(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`(K, 2, F)` lowest and highest of each class, a margin wider; of `normal`, the first, NaN."""
    found = [np.full((2, features.shape[1]), np.nan)]
    for number in range(1, labels.max() + 1):
        low, high = np.nanpercentile(features[labels == number], [0.5, 99.5], axis=0)
        found.append(np.stack([low - MARGIN * (high - low), high + MARGIN * (high - low)]))
    return np.array(found)


def accepted(features: np.ndarray, box: np.ndarray) -> np.ndarray:
    if np.isnan(box).all():
        return np.isnan(features).all(1)
    return ((features >= box[0]) & (features <= box[1])).all(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="runs/phantom/data")
    parser.add_argument("--judge", default="runs/phantom_1/data")
    parser.add_argument("--generated", required=True)
    options = parser.parse_args()
    unit, masks, hounsfield, labels = read(options.judge, "train")
    held_unit, held_masks, _, _ = read(options.judge, "validation")
    model = fit_unet(Pairs(unit, masks), Pairs(held_unit, held_masks), 2, seed=0, epochs=EPOCHS)
    rules = boxes(places(hounsfield, segmented(model, unit) > 0), labels)
    names = load_info(options.dataset_name).class_names
    real_unit, _, real_hounsfield, real_labels = read(options.dataset_name, "test")
    real = places(real_hounsfield, segmented(model, real_unit) > 0)
    intensity = load_info(options.dataset_name).intensity_map
    drawn = np.load(options.generated)
    shares = []
    for number, name in enumerate(names):
        images = torch.from_numpy(drawn[name]).float()
        own = places(images[:, 0].numpy(), segmented(model, intensity.to_unit(images)) > 0)
        rule = rules[number]
        shares.append(accepted(own, rule).mean())
        told = {
            "real": accepted(real[real_labels == number], rule).mean(),
            "real_others": accepted(real[real_labels != number], rule).mean(),
        }
        told |= {"generated": shares[-1], "no_bleed_generated": np.isnan(own[:, 0]).mean()}
        print(json.dumps({"class": name} | {key: round(float(value), 3) for key, value in told.items()}), flush=True)
    print(json.dumps({"generated, all classes": round(float(np.mean(shares)), 3)}))


if __name__ == "__main__":
    main()
