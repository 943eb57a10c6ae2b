"""Does the evidence lie in the lesion? Of rightly classified images with a bleed, how often the map against `normal` peaks in the mask.

    python benchmarks/evidence.py --pipeline runs/phantom/unet --dataset_name runs/exam/data --images 300

Beside it the share of the one pixel that lies in most masks of these very images, which is as good as any fixed place can be.
"""

import argparse

import numpy as np

from medsd import MedSDPipeline, load_dataset
from medsd.data.transforms import recorded_ranges, stratified


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="runs/phantom/unet")
    parser.add_argument("--dataset_name", default="runs/exam/data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--against", default="normal")
    parser.add_argument("--images", type=int, default=300)
    options = parser.parse_args()
    pipe, rows = MedSDPipeline.from_pretrained(options.pipeline), load_dataset(options.dataset_name, options.split)
    rows = rows.select(stratified(np.array(rows["label"]), rows["key"], options.images, 0))
    rows = rows.select(np.flatnonzero(np.array(rows["label"]) != pipe.class_names.index(options.against)))
    said = pipe.classify(list(rows["image"]), ranges=recorded_ranges(rows)).predictions
    right = [index for index, name in enumerate(said) if name == pipe.class_names[rows[index]["label"]]]
    inside: dict[str, list[bool]] = {name: [] for name in pipe.class_names}
    for index in right:
        row, name = rows[index], said[index]
        evidence = pipe.evidence(row["image"], name, options.against, ranges=recorded_ranges(rows.select([index])))
        inside[name].append(bool(row["mask"][0][evidence.peak]))
    every = [hit for hits in inside.values() for hit in hits]
    print(f"{len(right)} of {len(rows)} images with a bleed are classified rightly; the peak lies in it: {np.mean(every):.3f}")
    for name, hits in inside.items():
        if hits:
            print(f"  {name:<18} {np.mean(hits):.3f} of {len(hits)}")
    masks = np.stack([rows[index]["mask"][0] > 0 for index in right])
    print(f"the best fixed pixel: {masks.mean(0).max():.3f}")


if __name__ == "__main__":
    main()
