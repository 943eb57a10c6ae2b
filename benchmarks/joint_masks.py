"""Images generated together with their masks, against a geometric rule of the phantom.

python benchmarks/joint_masks.py --pipeline runs/phantom_joint/unet --dataset_name runs/phantom_joint/data --picture joint.png

Bone is what is above 100 HU; the skull's inside is what bone closes in. A bleed's mask has to lie inside, and to be brighter than its
rim of soft tissue. The same numbers of the real test split say how well the rule itself holds.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import binary_closing, binary_dilation, binary_fill_holes

from medsd import MedSDPipeline, load_dataset
from medsd.inference.pictures import grid

BONE = 100.0
"""HU."""
SAMPLES, STEPS, GUIDANCE = 64, 50, 2.0


def measure(images: np.ndarray) -> tuple[float, float, float]:
    """Of `(N, 2, H, W)`, HU and mask: share of mask pixels inside the skull, share of images brighter inside the mask than at its rim
    (an empty mask is not), share of images with a mask."""
    inside_pixels = mask_pixels = brighter = present = 0
    for hounsfield, mask in images:
        mask, bone = mask > 0, hounsfield > BONE
        skull = binary_fill_holes(binary_closing(bone, iterations=2))
        mask_pixels, inside_pixels = mask_pixels + mask.sum(), inside_pixels + (mask & skull).sum()
        rim = binary_dilation(mask, iterations=2) & skull & ~bone & ~mask
        present += mask.any()
        brighter += bool(mask.any() and rim.any() and hounsfield[mask].mean() > hounsfield[rim].mean())
    return float(inside_pixels / max(mask_pixels, 1)), brighter / len(images), float(present / len(images))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--pipeline", required=True)
    flags.add_argument("--dataset_name", required=True)
    flags.add_argument("--picture", type=Path)
    chosen = flags.parse_args()
    pipe = MedSDPipeline.from_pretrained(chosen.pipeline)
    bleeds = [name for name in pipe.class_names if name != "normal"]
    counts = [len(part) for part in np.array_split(np.arange(SAMPLES), len(bleeds))]
    units = [
        pipe(
            class_name=name,
            num_images_per_prompt=count,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
            output_type="pt",
        ).images
        * 2
        - 1
        for name, count in zip(bleeds, counts, strict=True)
    ]
    rows = load_dataset(chosen.dataset_name, "test")
    real = np.stack([row["image"] for row in rows if row["image"][1].any()]).astype(np.float32)
    generated = pipe.data.intensity_map.from_unit(torch.cat(units)).numpy()
    for name, images in (("generated", generated), ("real", np.stack([np.clip(real[:, 0], -15, 115), real[:, 1]], 1))):
        inside, brighter, present = measure(images)
        shares = f"{inside:.3f} of mask pixels inside the skull, brighter than the rim in {brighter:.3f}, a mask in {present:.3f}"
        print(f"RESULT {name}, {len(images)} images: {shares}")
    if chosen.picture:
        grid(torch.stack([images[:8] for images in units])).save(chosen.picture)


if __name__ == "__main__":
    main()
