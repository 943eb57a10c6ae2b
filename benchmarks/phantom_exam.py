"""Is the phantom an honest exam? What simple features tell of the class, and what the UNet tells with its conditions shuffled.

    python benchmarks/phantom_exam.py --dataset_name runs/phantom/data --pipeline runs/phantom/unet

Prints the macro one-vs-rest AUROC on the test split of a logistic regression on the 64-bin intensity histogram and on the
8 x 8 thumbnail (of images in [-1, 1], standardised; the best of four regularisations, chosen on the test split, so that the
exam holds against the best), and of the pipeline when each image's class conditions are dealt out at random.
"""

import argparse

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medsd import MedSDPipeline, load_dataset, load_info
from medsd.inference.likelihood import Scores, posterior

PAIRS = 16


def images_and_labels(dataset_name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    rows = load_dataset(dataset_name, split)
    unit = load_info(dataset_name).intensity_map.to_unit(np.stack(rows[:]["image"]).astype(np.float32))
    return unit, np.asarray(rows["label"])


def histogram(unit: np.ndarray) -> np.ndarray:
    return np.stack([np.histogram(image, bins=64, range=(-1, 1))[0] for image in unit]).astype(float)


def thumbnail(unit: np.ndarray) -> np.ndarray:
    side = unit.shape[-1] // 8
    return unit.reshape(len(unit), -1, 8, side, 8, side).mean((3, 5)).reshape(len(unit), -1)


def best_regression(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, labels: np.ndarray) -> float:
    scores = []
    for inverse_penalty in (0.01, 0.1, 1.0, 10.0):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=500)).fit(train, train_labels)
        scores.append(roc_auc_score(labels, model.predict_proba(test), multi_class="ovr"))
    return max(scores)


def shuffled(pipeline: str, dataset_name: str, limit: int) -> float:
    pipe = MedSDPipeline.from_pretrained(pipeline)
    rows = load_dataset(dataset_name, "test")
    rows = rows.select(np.random.default_rng(0).permutation(len(rows))[:limit])
    output = pipe.classify(list(rows["image"]), mode="full", max_pairs=PAIRS)
    dealt = Scores(np.random.default_rng(1).permuted(output.scores.losses, axis=1), output.scores.places)
    return roc_auc_score(np.asarray(rows["label"]), posterior(dealt, pipe.info.calibration).probabilities, multi_class="ovr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="runs/phantom/data")
    parser.add_argument("--pipeline", default="runs/phantom/unet")
    parser.add_argument("--limit", type=int, default=600, help="test images for the shuffled UNet")
    options = parser.parse_args()
    train, train_labels = images_and_labels(options.dataset_name, "train")
    test, labels = images_and_labels(options.dataset_name, "test")
    for feature in (histogram, thumbnail):
        print(
            f"logistic regression on the {feature.__name__}: {best_regression(feature(train), train_labels, feature(test), labels):.3f}",
            flush=True,
        )
    print(f"UNet with shuffled conditions: {shuffled(options.pipeline, options.dataset_name, options.limit):.3f}")


if __name__ == "__main__":
    main()
