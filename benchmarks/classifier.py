"""The classifier against the two published rules, on the same model and images: rows, seconds, accuracy, NLL, agreement.

    python recipes/prepare_data.py --seed 1 --split_fractions 0 0 1 --output_dir runs/exam/data      # 3,000 images of other heads
    python recipes/classify.py                                             # calibrates runs/phantom/unet on its validation split
    python benchmarks/classifier.py --pipeline runs/phantom/unet --dataset_name runs/exam/data --work /tmp/classifier

*Staged elimination* (Li et al., ICCV 2023, algorithm 2 and the released settings): evenly spaced timesteps, one noise each, shared
by classes and images, equal weights; after n1 pairs the better half of the classes stays, after n2 the best one; (50, 500) as
published. *Random* (Favero et al., MIDL 2025): n random timesteps, the same for all classes; the mean or a majority vote; 501 as
published. They are timed as published: one image at a time, 32 rows a call, float32, one wait for the device a call. Their curves are
n1, n2 and n scaled down, from losses in the half precision of the device, where it has one. *Ours* is
`MedSDPipeline.classify`, as calibrated, with plans of up to 64 pairs.

Curves come from stored losses of every image, class and pair (an hour on two cores, goes on where it stopped); seconds from turns,
in which each way scores the same images one after the other. Writes classifier.json and classifier.png.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.training_speed import machine
from medsd import MedSDPipeline, load_dataset
from medsd.data.transforms import stratified
from medsd.evaluation.classification import calibration_error, calibration_floor
from medsd.inference.calibration import Belief, Calibration, log_softmax
from medsd.inference.fitting import CONFIDENCE, LEVELS
from medsd.inference.likelihood import Posterior, Scores, posterior, score_classes
from medsd.inference.plan import Plan, nats_per_error, pair_noise
from medsd.inference.race import Decide, Rule, replay
from medsd.inference.scoring import PRECISIONS, choose_rule, fast_precision
from medsd.objectives.diffusion import denoising_error, epsilon_error_factor

PUBLISHED = {"staged": (50, 500), "random": 501}
GRID = 500
CALL = 32
PAIRS = 64
AT_ONCE = 50
DELTAS = (0.05, 0.02, 0.01)
RESAMPLES = 1000


def even_plan(pipe: MedSDPipeline, latents: torch.Tensor) -> Plan:
    """`GRID` evenly spaced timesteps, one noise each."""
    shape, places = tuple(latents.shape[1:]), (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    timesteps = (places * 1000).long()
    noise = torch.stack([pair_noise(0, 10**6 + pair, shape) for pair in range(GRID)])
    return Plan(timesteps, noise, nats_per_error(pipe.noise_schedule, "uniform", shape)[timesteps].float(), places)


def even_losses(pipe: MedSDPipeline, images: list[np.ndarray], work: Path) -> np.ndarray:
    """`(N, K, GRID)` of the even plan; what is on disk is not computed again."""

    def even(part: list[np.ndarray]) -> Scores:
        latents, conditions = pipe.encode_images(part), pipe.encode_prompts(pipe.data.prompts)
        half = PRECISIONS[fast_precision(latents.device)]
        with torch.autocast(latents.device.type, half, enabled=half is not None):
            return score_classes(pipe._predict, pipe.noise_schedule, latents, conditions, even_plan(pipe, latents))

    return stored(even, images, work, "even").losses


def own_scores(pipe: MedSDPipeline, images: list[np.ndarray], work: Path) -> Scores:
    """All pairs of all classes, by our plan; what is on disk is not computed again."""

    def own(part: list[np.ndarray]) -> Scores:
        return pipe.classify(part, mode="full", max_pairs=PAIRS).scores

    calibrated = hashlib.sha256(repr(pipe.info.calibration).encode()).hexdigest()[:8]
    return stored(own, images, work, f"own-{calibrated}")


def stored(way: Callable[[list[np.ndarray]], Scores], images: list[np.ndarray], work: Path, name: str) -> Scores:
    """Scores of all images, some at once, each of them kept in a file."""
    losses, places = [], np.empty(0)
    for start in range(0, len(images), AT_ONCE):
        file, part, before = work / f"{name}-{len(images)}-{start:05d}.npz", images[start : start + AT_ONCE], time.perf_counter()
        if not file.is_file():
            scores = way(part)
            np.savez(file.with_suffix(".partial.npz"), losses=scores.losses, places=scores.places)
            file.with_suffix(".partial.npz").rename(file)
            print(f"{name}: {start + len(part)} of {len(images)} images in {time.perf_counter() - before:.0f} s", flush=True)
        found = np.load(file)
        losses.append(found["losses"])
        places = found["places"]
    return Scores(np.concatenate(losses), places)


def spread(count: int) -> np.ndarray:
    """`count` evenly spaced places of the grid."""
    return ((np.arange(count) + 0.5) * GRID / count).astype(int)


def stages(first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of both stages: `second` evenly spaced ones of the grid, of which the first stage takes evenly spaced ones."""
    every = spread(second)
    return every[((np.arange(first) + 0.5) * second / first).astype(int)], every


def staged(losses: np.ndarray, first: int, second: int) -> tuple[np.ndarray, float]:
    """Answers `(N,)`, and rows an image."""
    count, classes, _ = losses.shape
    kept, (some, every) = -(-classes // 2), stages(first, second)
    order = losses[:, :, some].mean(2).argsort(1)[:, :kept]
    better = np.take_along_axis(losses[:, :, every].mean(2), order, 1).argmin(1)
    return order[np.arange(count), better], first * classes + (second - first) * kept


def random_timesteps(losses: np.ndarray, pairs: int, vote: bool) -> tuple[np.ndarray, float]:
    """Answers `(N,)`, and rows an image; each image draws its own pairs of the grid."""
    generator, count = np.random.default_rng(0), len(losses)
    drawn = generator.random((count, GRID)).argsort(1)[:, : min(pairs, GRID)]
    seen = np.take_along_axis(losses, drawn[:, None], 2)
    if vote:
        votes = (seen.argmin(1)[:, None] == np.arange(losses.shape[1])[None, :, None]).sum(2)
        return (votes + 1e-3 * generator.random(votes.shape)).argmax(1), pairs * losses.shape[1]
    return seen.mean(2).argmin(1), pairs * losses.shape[1]


@dataclass(frozen=True)
class Point:
    """What a way of answering costs and says."""

    rows: np.ndarray
    """`(N,)` of each image."""
    answers: np.ndarray
    """`(N,)`."""
    full: np.ndarray
    """`(N,)`: the rule's answers on its whole budget."""

    def right(self, measure: str, labels: np.ndarray) -> np.ndarray:
        """`(N,)` bool, the mean of which is the `measure`: accuracy, or agreement with the whole budget."""
        return self.answers == {"accuracy": labels, "agreement": self.full}[measure]

    def record(self, labels: np.ndarray) -> dict[str, float]:
        """Means over images."""
        return {"rows": float(self.rows.mean())} | {name: float(self.right(name, labels).mean()) for name in ("accuracy", "agreement")}


def published_curves(losses: np.ndarray) -> dict[str, list[Point]]:
    """Of each rule, from few rows to as many as published."""
    shares = np.geomspace(0.004, 1, 25)
    pairs = sorted({(max(1, round(50 * share)), max(2, round(500 * share))) for share in shares})
    curves = {"staged": [staged(losses, *two) for two in pairs]}
    for vote in (False, True):
        counts = sorted({max(1, round(501 * share)) for share in shares})
        curves["random, vote" if vote else "random, mean"] = [random_timesteps(losses, count, vote) for count in counts]
    return {
        name: [Point(np.full(len(losses), float(rows)), answers, tries[-1][0]) for answers, rows in tries] for name, tries in curves.items()
    }


def our_curve(scores: Scores, calibration: Calibration) -> dict[str, Scores]:
    """What races at several levels spend, and each mode, `decide` as delta chooses its level."""
    rules: dict[str, Rule] = {
        f"decide at level {level}": Decide(level, spread=calibration.spread, together=calibration.vote) for level in reversed(LEVELS)
    }
    rules |= {f"decide {delta}": choose_rule("decide", delta, calibration, PAIRS) for delta in DELTAS}
    rules |= {mode: choose_rule(mode, 0.05, calibration, PAIRS) for mode in ("posterior", "full")}
    belief = Belief(calibration)
    return {name: Scores(replay(scores.losses, scores.places, rule, belief), scores.places) for name, rule in rules.items()}


def answers_of(name: str, said: Posterior) -> np.ndarray:
    """As `classify` answers: what a race of `decide` ended on, else the most probable class."""
    return said.leader if name.startswith("decide") else said.probabilities.argmax(1)


def described(name: str, said: Posterior, own: Point, labels: np.ndarray, full: np.ndarray, eta: float) -> dict:
    """A point of our curve; `disagreement` leaves out images whose two best logits on all pairs lie within eta."""
    probabilities = said.probabilities
    of_class = np.maximum(probabilities[np.arange(len(labels)), labels], 1e-12)
    two = np.sort(full, 1)[:, -2:]
    clear = two[:, 1] - two[:, 0] > eta
    wrong = int((own.answers != own.full)[clear].sum())
    ece = calibration_error(probabilities.max(1), probabilities.argmax(1) == labels, np.ones((1, len(labels))))[0]
    return {
        "mode": name,
        **own.record(labels),
        "nll": float(-np.log(of_class).mean()),
        "ece": float(ece),
        "ece_floor": calibration_floor(probabilities, np.random.default_rng(0)),
        "disagreement": wrong / int(clear.sum()),
        "disagreement_low": clopper_pearson_low(wrong, int(clear.sum())),
        "within_eta": int((~clear).sum()),
    }


def clopper_pearson_low(hits: int, count: int) -> float:
    """Lower bound of a rate, one-sided, with `CONFIDENCE`."""
    from scipy.stats import beta

    return float(beta.ppf(1 - CONFIDENCE, hits, count - hits + 1)) if hits else 0.0


def matched(curve: list[Point], modes: dict[str, Point], measure: str, labels: np.ndarray, patients: np.ndarray, tolerance: float) -> dict:
    """`matching` on all images, and the interval of its ratio over resamples of patients, in which both sides choose anew."""
    right = np.stack([entry.right(measure, labels) for entry in curve]), np.stack([own.right(measure, labels) for own in modes.values()])
    rows = np.stack([entry.rows for entry in curve]), np.stack([own.rows for own in modes.values()])
    theirs, ours, ratio = matching(right, rows, np.arange(len(labels)), tolerance)
    generator, members = np.random.default_rng(0), [np.flatnonzero(patients == patient) for patient in np.unique(patients)]
    ratios = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(0, len(members), len(members))
        ratios.append(matching(right, rows, np.concatenate([members[index] for index in drawn]), tolerance)[2])
    return {
        "theirs": curve[theirs].record(labels),
        "ours": None if ours is None else {"mode": list(modes)[ours], **list(modes.values())[ours].record(labels)},
        "ratio": ratio,
        "interval": [float(bound) for bound in np.percentile(ratios, [2.5, 97.5])],
    }


def matching(
    right: tuple[np.ndarray, np.ndarray], rows: tuple[np.ndarray, np.ndarray], chosen: np.ndarray, tolerance: float
) -> tuple[int, int | None, float]:
    """A rule's cheapest point within `tolerance` of its best, our cheapest mode that is as good as that point, and their ratio of rows, 0
    where no mode is; of `chosen` images. `right` and `rows` are theirs `(points, N)` and ours `(modes, N)`."""
    their_share, our_share = (of[:, chosen].mean(1) for of in right)
    their_rows, our_rows = (of[:, chosen].mean(1) for of in rows)
    theirs = int(np.where(their_share >= their_share.max() - tolerance, their_rows, np.inf).argmin())
    ours = int(np.where(our_share >= their_share[theirs], our_rows, np.inf).argmin())
    return (theirs, ours, float(their_rows[theirs] / our_rows[ours])) if our_share[ours] >= their_share[theirs] else (theirs, None, 0.0)


# Seconds


class PlainLoop:
    """As published: one image at a time, `CALL` rows a call, float32, a wait after each."""

    def __init__(self, pipe: MedSDPipeline, latents: torch.Tensor) -> None:
        self.pipe, self.schedule = pipe, pipe.noise_schedule
        self.conditions = pipe.encode_prompts(pipe.data.prompts)
        self.plan = even_plan(pipe, latents)

    @torch.no_grad()
    def errors(self, latent: torch.Tensor, classes: list[int], pairs: np.ndarray) -> np.ndarray:
        """`(classes, pairs)`."""
        rows = [(label, int(pair)) for label in classes for pair in pairs]
        found = []
        for start in range(0, len(rows), CALL):
            label, pair = (torch.tensor(column) for column in zip(*rows[start : start + CALL], strict=True))
            timesteps, device = self.plan.timesteps[pair], latent.device
            arguments = (latent.expand(len(pair), -1, -1, -1), self.plan.noise[pair].to(device), timesteps.to(device))
            errors = denoising_error(self.pipe._predict, self.schedule, *arguments, self.conditions[label.to(device)])
            found += (errors * epsilon_error_factor(self.schedule, timesteps).to(device)).tolist()
        return np.array(found).reshape(len(classes), len(pairs))

    def staged(self, image: np.ndarray) -> int:
        """The published schedule."""
        latent = self.pipe.encode_images([image])
        left, (some, every) = list(range(len(self.conditions))), stages(*PUBLISHED["staged"])
        sums = self.errors(latent, left, some).sum(1)
        left = [left[index] for index in sums.argsort()[: -(-len(left) // 2)]]
        rest = self.errors(latent, left, np.setdiff1d(every, some)).sum(1)
        return left[int((sums[left] + rest).argmin())]


def timed(pipe: MedSDPipeline, plain: MedSDPipeline, images: list[np.ndarray], turns: int) -> dict:
    """Seconds an image of each way, in turns; and rows/s of the engine against the plain loop on the same rows.

    `plain` is the pipeline as it is, for the published ways; `pipe` may be compiled, which happens before the first turn.
    """
    loop = PlainLoop(plain, pipe.encode_images(images[:1]))
    everything = list(range(len(loop.conditions)))
    ways: dict[str, Callable[[list[np.ndarray]], object]] = {
        "staged, published": lambda part: [loop.staged(image) for image in part],
        **{f"ours, decide {delta}": partial(pipe.classify, mode="decide", delta=delta, max_pairs=PAIRS) for delta in DELTAS},
        "ours, posterior": lambda part: pipe.classify(part, mode="posterior", max_pairs=PAIRS),
        "plain loop, same rows": lambda part: [loop.errors(plain.encode_images([one]), everything, spread(PAIRS)) for one in part],
        "engine fp32, same rows": lambda part: pipe.classify(part, mode="full", max_pairs=PAIRS, precision="fp32"),
        "engine, same rows": lambda part: pipe.classify(part, mode="full", max_pairs=PAIRS, precision=fast_precision(pipe.device)),
    }
    for way in ways.values():
        way(images[:1])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for part in shares(images, turns):
        for name, way in ways.items():
            before = time.perf_counter()
            way(part)
            seconds[name].append((time.perf_counter() - before) / len(part))
        print({name: round(values[-1], 3) for name, values in seconds.items()}, flush=True)
    ratios = {
        **{f"published against decide {delta}": ("staged, published", f"ours, decide {delta}") for delta in DELTAS},
        "published against posterior": ("staged, published", "ours, posterior"),
        "plain loop against engine": ("plain loop, same rows", "engine, same rows"),
        "plain loop against engine fp32": ("plain loop, same rows", "engine fp32, same rows"),
    }
    medians = {name: ratio(seconds[slow], seconds[fast]) for name, (slow, fast) in ratios.items()}
    return {"images": len(images), "seconds": seconds, "ratios": medians}


def shares(images: list[np.ndarray], turns: int) -> Iterator[list[np.ndarray]]:
    for turn in range(turns):
        yield images[turn::turns]


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Median of the turns' ratios, the smallest and the largest."""
    ratios = np.array(slow) / np.array(fast)
    return {"median": float(np.median(ratios)), "low": float(ratios.min()), "high": float(ratios.max())}


def figure(curves: dict[str, list[dict]], ours: list[dict], file: Path) -> None:
    """Accuracy, agreement and our NLL against rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(1, 3, figsize=(13, 4), sharex=True, layout="constrained")
    labels = {"accuracy": "accuracy", "agreement": "agreement with the rule's full budget", "nll": "NLL, nats"}
    for axis, (measure, label) in zip(axes, labels.items(), strict=True):
        for name, curve in curves.items() if measure != "nll" else ():
            axis.plot([entry["rows"] for entry in curve], [entry[measure] for entry in curve], label=name, marker=".")
        own = sorted(ours, key=lambda entry: entry["rows"])
        axis.plot([entry["rows"] for entry in own], [entry[measure] for entry in own], label="medsd", marker="o", color="black")
        axis.set(xscale="log", xlabel="UNet rows an image", ylabel=label)
    axes[0].legend()
    drawn.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="runs/phantom/unet")
    parser.add_argument("--dataset_name", default="runs/exam/data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--work", type=Path, required=True, help="folder of the stored losses and the results")
    parser.add_argument("--images", type=int, default=1000, help="of the curves; 0 for none")
    parser.add_argument("--ours_only", action="store_true", help="without the published rules' curves, nine tenths of the work")
    parser.add_argument("--timed_images", type=int, default=50)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="our UNet with torch.compile, as classify.py --compile")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe, plain = (MedSDPipeline.from_pretrained(options.pipeline).to(device) for _ in range(2))
    if options.compile:
        pipe.compile_scoring()
    rows = load_dataset(options.dataset_name, options.split)
    rows = rows.select(stratified(np.array(rows["label"]), rows["key"], options.images or options.timed_images, 0))
    labels, images = np.array(rows["label"]), list(rows["image"])
    result = machine() | {"device": str(pipe.device), "compiled": options.compile, "images": len(images)}
    if options.timed_images:
        result["timed"] = timed(pipe, plain, images[: options.timed_images], options.turns)
        print(json.dumps(result["timed"]["ratios"], indent=1), flush=True)
    if options.images:
        result |= compared(pipe, images, labels, np.array(rows["patient_id"]), options)
    (options.work / ("ours.json" if options.ours_only else "classifier.json")).write_text(json.dumps(result, indent=1) + "\n")


def compared(pipe: MedSDPipeline, images: list[np.ndarray], labels: np.ndarray, patients: np.ndarray, options: argparse.Namespace) -> dict:
    """Curves, and rows where they match (within one standard error of our accuracy); draws and prints them."""
    calibration, work = pipe.info.calibration, options.work
    raced = our_curve(own_scores(pipe, images, work), calibration)
    even = None if options.ours_only else even_losses(pipe, images, work)
    curves = {} if even is None else published_curves(even)
    said = {name: posterior(scores, calibration) for name, scores in raced.items()}
    full = said["full"].logits
    points = {name: Point(raced[name].rows, answers_of(name, of), full.argmax(1)) for name, of in said.items()}
    eta = {name: Decide.eta if name.startswith("decide") else 0.0 for name in said}
    ours = [described(name, said[name], points[name], labels, full, eta[name]) for name in said]
    counts = {} if even is None else {"mean of 64 even pairs": 64, "mean of 500": GRID}
    nll = {name: published_nll(even, labels, count) for name, count in counts.items()}
    error = float(np.sqrt(ours[-1]["accuracy"] * (1 - ours[-1]["accuracy"]) / len(labels)))
    drawn = {name: [entry.record(labels) for entry in curve] for name, curve in curves.items()}
    result = {"curves": drawn, "ours": ours, "nll of uncalibrated uniform scores": nll, "standard_error": error}
    modes = {name: own for name, own in points.items() if "level" not in name}
    for measure in ("accuracy", "agreement"):
        result[f"matched {measure}"] = {name: matched(curve, modes, measure, labels, patients, error) for name, curve in curves.items()}
    if curves:
        figure(drawn, ours, work / "classifier.png")
    report(result)
    return result


def published_nll(losses: np.ndarray, labels: np.ndarray, count: int) -> float:
    """Of the softmax of log-likelihoods as they are."""
    return float(-log_softmax(-losses[:, :, spread(count)].mean(2).astype(np.float64))[np.arange(len(labels)), labels].mean())


def report(result: dict) -> None:
    for entry in result["ours"]:
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in entry.items()})
    for measure in ("accuracy", "agreement"):
        for name, found in result[f"matched {measure}"].items():
            print(f"matched {measure}, {name}: {found}")


if __name__ == "__main__":
    main()
