"""Judge what a pipeline generates beside real images, audit it for copies of training images, and write the report.

    python recipes/evaluate.py
    python recipes/evaluate.py --features runs/phantom/data --utility --output_dir runs/phantom/report_resnet
    python recipes/evaluate.py --config recipes/configs/brain_mri.yaml --num_samples 512

Started again after it was stopped, it goes on from the images that are drawn.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import medsd
from medsd.commandline import run
from medsd.config import EvaluateConfig

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

    from medsd.evaluation.features import Features
    from medsd.inference.extractors import Extractor
    from medsd.inference.generating import Sampling
    from medsd.inference.judging import Judged
    from medsd.inference.pipeline import MedSDPipeline
    from medsd.report.material import Material

BOUND_IMAGES, BOUND_PAIRS = 32, 64
"""Held-out images whose bits per dimension are bounded, and at how many pairs each."""
WITHOUT_INTERVAL = ("n", "rows_per_image", "seconds_per_image", "audit", "n_training_patients")
"""Of what `metrics.json` says."""


@dataclass
class Evaluation:
    """What one evaluation works on, and what it has found."""

    config: EvaluateConfig
    pipe: "MedSDPipeline"
    rows: Any
    """Real images with a class of the pipeline."""
    labels: "np.ndarray"
    """`(N,)` their classes."""
    extractor: "Extractor | None"
    """Of the main process."""
    generated: "Judged"
    material: "Material"
    metrics: dict[str, Any] = field(default_factory=lambda: {"reasons": {}})
    audit: dict[str, Any] | None = None

    def add(self, found: dict[str, Any]) -> None:
        """Numbers, and the reasons of those that are None."""
        reasons = self.metrics["reasons"] | found.get("reasons", {})
        self.metrics |= found | {"reasons": reasons}

    def leave_out(self, why: str, *names: str) -> None:
        """Numbers that have no meaning here."""
        both = [*names, *(f"{name}_ci" for name in names if name not in WITHOUT_INTERVAL)]
        self.add(dict.fromkeys(both) | {"reasons": dict.fromkeys(both, why)})


def main(config: EvaluateConfig) -> None:
    """Into a folder that no other run writes."""
    from medsd.output import alone_in, check_output
    from medsd.runtime import quiet_libraries, start_processes

    quiet_libraries()
    output_dir = Path(config.output_dir)
    check_output(output_dir, config.overwrite, [config.pipeline, config.dataset_name, config.scores, config.sweep])
    accelerator = start_processes()
    if accelerator.is_main_process and not Path(config.scores).is_dir():
        print(f"note: {config.scores} is not there, so the report has no classifier's part; recipes/classify.py makes it", flush=True)
    with alone_in(output_dir) if accelerator.is_main_process else nullcontext():
        try:
            evaluate(config, accelerator)
        except KeyboardInterrupt:
            if accelerator.is_main_process:
                print("the same command goes on from the images that are drawn")
            raise


def evaluate(config: EvaluateConfig, accelerator: "Accelerator") -> None:
    """Draw, measure, audit, write."""
    evaluation = begin(config, accelerator)
    draw(evaluation, accelerator)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    steps: tuple[tuple[str, Callable[[Evaluation], None]], ...] = (
        ("classifier", classifier),
        ("generated against real", distributions),
        ("intensities and diversity", intensities),
        ("codec", reconstructions),
        ("likelihood", likelihood),
        ("utility", utility),
        ("pictures", pictures),
    )
    for name, step in steps:
        print(f"{name} ...", flush=True)
        before = time.perf_counter()
        step(evaluation)
        print(f"{name}: {time.perf_counter() - before:.0f} s")
    finish(evaluation)


def begin(config: EvaluateConfig, accelerator: "Accelerator") -> Evaluation:
    """Pipeline, real images, and a gallery for as many generated ones as are wanted."""
    from medsd.data.dataset import load_dataset
    from medsd.data.transforms import column, stratified
    from medsd.inference.gallery import Gallery
    from medsd.inference.generating import describe_scheduler, use_scheduler
    from medsd.inference.judging import Judged, check_comparable, judged_rows, plan_samples
    from medsd.inference.pipeline import MedSDPipeline
    from medsd.report.material import Material
    from medsd.training.discriminative import chosen_extractor
    from medsd.training.usefulness import check_utility

    pipe = MedSDPipeline.from_pretrained(config.pipeline).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    use_scheduler(pipe, config.scheduler)
    check_comparable(pipe, config.dataset_name, config.label_map)
    if config.utility:
        check_utility(pipe, config.dataset_name)
    extractor = chosen_extractor(config.features, pipe, config.dataset_name) if accelerator.is_main_process else None
    rows, labels = judged_rows(pipe, config.dataset_name, config.split, config.label_map)
    whole = len(load_dataset(config.dataset_name, config.split))
    if len(rows) < whole and accelerator.is_main_process:
        print(f"{len(rows)} of {whole} {config.split} images are compared, those that show exactly one class of the pipeline")
    chosen = stratified(labels, column(rows, "key").to_pylist(), config.max_samples, config.seed)
    names = pipe.class_names or [None]
    plan = plan_samples(labels[chosen], names, config.num_samples, config.batch_size)
    settings = {name: getattr(config, name) for name in ("num_samples", "num_inference_steps", "guidance_scale", "batch_size", "seed")}
    settings |= {"pipeline": pipe.fingerprint(), "scheduler": describe_scheduler(pipe), "device": pipe.device.type}
    settings |= {"medsd": medsd.__version__, "plan": [[batch.class_name, len(batch.indices)] for batch in plan]}
    gallery = Gallery(Path(config.output_dir), settings)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            gallery.begin()
            if done := gallery.done():
                print(f"{len(done)} of {len(plan)} batches are drawn already: going on")
    title = f"A diffusion model of {len(pipe.class_names) or 'no'} classes, {pipe.data.resolution} px"
    material = Material(title=title, class_names=pipe.class_names or ["images"])
    return Evaluation(config, pipe, rows.select(chosen), labels[chosen], extractor, Judged(gallery, plan, names), material)


def draw(evaluation: Evaluation, accelerator: "Accelerator") -> None:
    """This process's share of the generated images."""
    from tqdm import tqdm

    judged = evaluation.generated
    accelerator.wait_for_everyone()
    with tqdm(
        total=len(judged.labels) // accelerator.num_processes, desc="generating", unit="image", disable=not accelerator.is_main_process
    ) as bar:
        judged.draw(evaluation.pipe, sampling_of(evaluation.config), accelerator.process_index, accelerator.num_processes, bar.update)


def sampling_of(config: EvaluateConfig) -> "Sampling":
    """What of the flags says how images are drawn."""
    from medsd.inference.generating import Sampling

    return Sampling(config.num_inference_steps, config.guidance_scale, config.seed, config.batch_size)


def classifier(evaluation: Evaluation) -> None:
    """The metrics of classify.py, and by subgroup."""
    from medsd.evaluation.tables import NAMES
    from medsd.report.collect import no_scores, plotted, read_scores

    folder, pipe = Path(evaluation.config.scores), evaluation.pipe
    why = no_scores(folder, pipe, evaluation.config.dataset_name)
    if why:
        print(f"no classifier's part, {folder}: {why}")
        evaluation.leave_out(why, *NAMES, "n", "rows_per_image", "seconds_per_image")
        return
    scores = read_scores(folder, pipe, evaluation.config.dataset_name, evaluation.config.label_map)
    evaluation.add(scores.metrics)
    material = evaluation.material
    material.probabilities, material.labels, material.predictions = scores.probabilities, scores.labels, scores.predictions
    material.subgroups, material.evidence = [plotted(row) for row in scores.subgroups], scores.evidence
    evaluation.metrics["subgroups"] = scores.subgroups


def distributions(evaluation: Evaluation) -> None:
    """FID, KID and their kin, overall and by class, and the audit, which looks at the same features."""
    from tqdm import tqdm

    from medsd.data.transforms import column
    from medsd.evaluation.distribution import by_class, distribution_metrics
    from medsd.inference.auditing import unit_images
    from medsd.inference.extractors import extract
    from medsd.inference.judging import floor_rows

    config, pipe, judged, extractor = evaluation.config, evaluation.pipe, evaluation.generated, evaluation.extractor
    patients = column(evaluation.rows, "patient_id").to_pylist()
    rows, labels = floor_rows(pipe, config.dataset_name, floor_split(config), config.label_map, judged, config.seed)
    with tqdm(total=len(patients) + len(judged.labels) + len(rows or ()), desc="features", unit="image") as bar:
        see = partial(extract, extractor, progress=bar.update)
        real, generated = see(unit_images(pipe.data, evaluation.rows)()), see(judged.batches())
        other = see(unit_images(pipe.data, rows)()) if rows else None
    others = column(rows, "patient_id").to_pylist() if rows else None
    evaluation.add(distribution_metrics(generated, real, patients, other, others, seed=config.seed))
    if len(pipe.class_names) > 1:
        sides = (generated, judged.labels, real, evaluation.labels)
        evaluation.add(by_class(*sides, patients, pipe.class_names, other, labels, others, seed=config.seed))
    evaluation.material.features = {"real": (real.values, evaluation.labels), "generated": (generated.values, judged.labels)}
    audit(evaluation, generated)


def floor_split(config: EvaluateConfig) -> str:
    """The other real images are training images, but for a ResNet that has learnt these, whose features set them apart."""
    from medsd.data.dataset import load_info
    from medsd.training.discriminative import names_data

    judge, data = config.features, config.dataset_name
    learnt = names_data(judge, data) and load_info(judge).fingerprint == load_info(data).fingerprint
    return ("test" if config.split == "validation" else "validation") if learnt else "train"


def audit(evaluation: Evaluation, generated: "Features") -> None:
    """Copies of training images among the generated ones, where the data is what the pipeline was trained on."""
    from medsd.inference.auditing import Seen, membership_signal, no_audit
    from medsd.inference.auditor import compare
    from medsd.report.images import suspects

    config, pipe, judged, extractor = evaluation.config, evaluation.pipe, evaluation.generated, evaluation.extractor
    why = no_audit(pipe.data, config.dataset_name)
    if why:
        print(f"no audit: {why}")
        evaluation.leave_out(f"{why[0].upper()}{why[1:]}.", "audit")
        return
    samples, told, drawn = Seen.of(judged.batches, generated.values), judged.told(config.seed), told_sampling(evaluation)
    about = (Path(config.pipeline), config.dataset_name, pipe.data, pipe.fingerprint())
    made = compare(*about, extractor, samples, told, drawn, config.false_positive_rate)
    evaluation.audit = made.record | membership_signal(pipe, *made.rows, config.seed)
    material, found = evaluation.material, made.found
    material.audit, material.audit_scores = evaluation.audit, (found.scores, found.held_out_scores, found.threshold)
    material.audit_pairs = suspects(pipe, judged, found, made.rows[0])


def told_sampling(evaluation: Evaluation) -> dict[str, Any]:
    """How the images were drawn."""
    return sampling_of(evaluation.config).told(type(evaluation.pipe.scheduler).__name__, evaluation.generated.class_names[0])


def reconstructions(evaluation: Evaluation) -> None:
    """What the codec makes of real images."""
    from medsd.inference.judging import codec_metrics
    from medsd.models.codec import PixelCodec

    if isinstance(evaluation.pipe.codec, PixelCodec):
        evaluation.leave_out("Pixels go through no autoencoder: nothing is lost.", "psnr", "ssim", "ms_ssim")
    else:
        evaluation.add(codec_metrics(evaluation.pipe, evaluation.rows))


def likelihood(evaluation: Evaluation) -> None:
    """Bits per dimension of real images, where the model has a likelihood of pixels."""
    from medsd.data.dataset import load_info
    from medsd.data.matching import labels_in
    from medsd.inference.judging import bits_metrics

    pipe, config = evaluation.pipe, evaluation.config
    rows = evaluation.rows.select(range(0, len(evaluation.rows), -(-len(evaluation.rows) // BOUND_IMAGES)))
    names = load_info(config.dataset_name).class_names
    found = bits_metrics(pipe, rows, labels_in(pipe.data, rows, names, config.label_map), BOUND_PAIRS)
    if found is None:
        evaluation.leave_out("An autoencoder has no likelihood of pixels, and images of fractions none in bits.", "bits_per_dim")
    else:
        evaluation.add(found)


def intensities(evaluation: Evaluation) -> None:
    """Histograms in the source's unit, and how unlike each other the images of a class are."""
    from medsd.inference.judging import compare_pixels

    pipe, judged = evaluation.pipe, evaluation.generated
    found, histograms = compare_pixels(pipe, evaluation.rows, evaluation.labels, judged, evaluation.config.seed)
    evaluation.add(found)
    shares = (histograms[kind].shares for kind in ("real", "generated"))
    evaluation.material.histograms = (histograms["real"].centres, *shares, pipe.data.unit)


def utility(evaluation: Evaluation) -> None:
    """What classifiers, and a segmentation, learn from the generated images."""
    from tqdm import tqdm

    from medsd.training.usefulness import utility_of

    config = evaluation.config
    if not config.utility:
        evaluation.leave_out("Not asked for: add --utility.", "agreement", "utility/synthetic/auroc", "utility/real/auroc")
        return
    with tqdm(desc="learning from generated and real images", unit="epoch") as bar:
        evaluation.add(utility_of(evaluation.pipe, config.dataset_name, evaluation.generated, config.seed, bar.update))


def pictures(evaluation: Evaluation) -> None:
    """Images of each class, real, reconstructed and generated, and one on its way out of noise."""
    from medsd.report.images import class_grids, denoising_strips

    pipe, judged, material = evaluation.pipe, evaluation.generated, evaluation.material
    material.grids = class_grids(pipe, evaluation.rows, evaluation.labels, judged)
    material.denoising = denoising_strips(pipe, judged, sampling_of(evaluation.config))


def complete(evaluation: Evaluation) -> None:
    """What is known of the run, of how images were drawn and of a sweep, beside what was measured."""
    from medsd.data.dataset import load_info
    from medsd.data.transforms import column
    from medsd.hub.contents import known_sha256
    from medsd.inference.folder import training_patients
    from medsd.report.collect import read_curves, read_environment, read_sweep, run_facts

    config, pipe, material, run_folder = evaluation.config, evaluation.pipe, evaluation.material, Path(evaluation.config.pipeline)
    seen, shown = training_patients(run_folder), set(column(evaluation.rows, "patient_id").to_pylist())
    if seen is None:
        evaluation.leave_out("The data that the pipeline was trained on is not where it was.", "n_training_patients")
    else:
        evaluation.metrics["n_training_patients"] = len(seen & shown)
    drawn, data = told_sampling(evaluation), load_info(config.dataset_name).fingerprint
    evaluation.metrics |= {"sampling": drawn, "split": config.split, "data": data}
    evaluation.metrics["weights_sha256"] = known_sha256(run_folder)
    said = "{num_inference_steps} steps of {scheduler}, guidance {guidance_scale:g}, seed {seed}".format(**drawn)
    material.metrics = evaluation.metrics
    material.facts = run_facts(pipe, run_folder, config.dataset_name) | {"Generated with": said}
    material.curves, material.environment = read_curves(run_folder), read_environment(run_folder)
    material.sweep = read_sweep(Path(config.sweep), config.dataset_name)
    if not material.sweep and Path(config.sweep).is_dir():
        print(f"no data-size curve: {config.sweep} holds no sweep of this data")


def finish(evaluation: Evaluation) -> None:
    """Write the folder of the report, and the audit into the pipeline's folder too; say what matters."""
    import shutil

    from medsd.hub.contents import known_sha256
    from medsd.inference.auditing import replaces
    from medsd.output import replacing, write_text
    from medsd.report.page import write_report
    from medsd.training.pushing import write_card

    complete(evaluation)
    run_folder, audited = Path(evaluation.config.pipeline), json.dumps(evaluation.audit, indent=2) + "\n"
    with replacing(Path(evaluation.config.output_dir)) as made:
        write_report(made, evaluation.material)
        (made / "metrics.json").write_text(json.dumps(evaluation.metrics, indent=2) + "\n")
        if evaluation.audit is not None:
            (made / "audit.json").write_text(audited)
    if evaluation.audit is not None and run_folder.is_dir():
        if replaces(evaluation.audit, run_folder):
            write_text(run_folder / "audit.json", audited)
        else:
            print(f"{run_folder / 'audit.json'} stays: it is of more samples, or failed with as many; look again with more --num_samples")
    if known_sha256(run_folder) and evaluation.audit is not None:
        write_card(run_folder, evaluation.config.dataset_name, Path(evaluation.config.output_dir))
    shutil.rmtree(evaluation.generated.gallery.work, ignore_errors=True)
    say(evaluation)


def say(evaluation: Evaluation) -> None:
    """The figures that matter."""
    metrics, found = evaluation.metrics, evaluation.audit
    print(f"{metrics['n_generated']} generated against {metrics['n_real']} real images, in features of {metrics['extractor']}")
    for name in ("fid", "kid", "precision", "recall", "density", "coverage", "bits_per_dim"):
        value, interval = metrics.get(name), metrics.get(f"{name}_ci")
        floor = metrics.get(f"{name}_floor")
        shown = "" if interval is None else f"  [{interval[0]:.4f}, {interval[1]:.4f}]"
        beside = "" if floor is None else f"  (other real images {floor:.4f})"
        print(f"{name:<13} " + (f"{value:.4f}{shown}{beside}" if value is not None else f"none: {metrics['reasons'].get(name)}"))
    if found is not None:
        rate = f"{found['flagged']} of {found['samples']} flagged, {found['false_positive_rate']:.1%} expected of images that are no copies"
        low, high = found["membership_auroc_ci"]
        known = f"membership AUROC {found['membership_auroc']:.3f} [{low:.3f}, {high:.3f}]"
        print(f"audit {found['verdict']}: {rate}; {found['copies']} copies; {known}")
    if seen := metrics["n_training_patients"]:
        print(f"warning: {seen} patients of the real images are among those that the pipeline was trained on: name others with --split")
    print(f"report in {Path(evaluation.config.output_dir) / 'report.html'}")


if __name__ == "__main__":
    run(main, EvaluateConfig)
