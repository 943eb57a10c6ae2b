"""The model card: what a pushed model is, what it was trained on and measured by, and how it is loaded.

Every number is taken from a record: `metrics.json` and `audit.json` of its evaluation, `summary.json` of its data, `config.yaml` of its
training. A record that is not there leaves its section out.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medsd.hub.facts import Facts
from medsd.hub.loading import loading
from medsd.hub.markdown import SPLITS, cell, counts, patient_rules, table

CLASSIFIER = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "average_precision": "average precision",
    "nll": "negative log-likelihood, nats",
    "brier": "Brier score",
    "aurc": "risk-coverage area",
    "patient_auroc": "AUROC by patient",
    "patient_accuracy": "accuracy by patient",
}
CALIBRATION = {"ece": "expected calibration error, 15 bins", "ece_floor": "the same of a perfectly calibrated model, as many images"}
DISTRIBUTION = {
    "fid": "FID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}
CODEC = {"psnr": "PSNR, decibels", "ssim": "SSIM", "ms_ssim": "MS-SSIM"}
HUB_METRICS = {"auroc": "roc_auc", "nll": "nll", "accuracy": "accuracy"}
"""A number's name on the Hub, where that is another or known one."""
INDEXED = {"image-classification": ("auroc", "balanced_accuracy", "ece", "nll"), "text-to-image": ("fid", "kid")}
SUBGROUP = ("auroc", "balanced_accuracy", "ece", "nll")
UNAUDITED = "**Not audited for copies of training images.** It may reproduce images of patients: do not make it public."
UNCALIBRATED = "**Not calibrated: the order of classes counts, not their probabilities.**"
HOLDS = {
    "pipeline": "a diffusion model that generates medical images",
    "lora": "LoRA adapters and class tokens for a diffusion model, which generates medical images",
    "autoencoder": "an autoencoder of medical images, for diffusion models in its latents",
}
SCORES = " by class, and scores how likely each class is for an image"


def model_card(facts: Facts) -> str:
    """`README.md` of the repository."""
    title = facts.name.split("/")[-1]
    sections = {
        "": _what(facts),
        "Intended use": _use(),
        "Data": _data(facts),
        "Training": _training(facts),
        "Samples": _pictures(facts, ("generated", "denoising")),
        "Classification": _classification(facts),
        "Calibration": _calibration(facts),
        "Generated against real images": _distribution(facts),
        "Reconstruction": _numbers(facts.metrics, CODEC),
        "By class": _classes(facts),
        "By subgroup": _subgroups(facts.metrics),
        "Copies of training images": _audit(facts),
        "Loading": loading(facts),
        "Citation": _citation(facts),
    }
    body = "\n\n".join((f"## {heading}\n\n" if heading else f"# {title}\n\n") + text for heading, text in sections.items() if text)
    return f"---\n{_front_matter(facts)}---\n\n{body}\n"


def _front_matter(facts: Facts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=task,
            dataset_type=facts.data or "medsd",
            dataset_name=facts.data or "prepared by medsd",
            dataset_split=facts.metrics.get("split"),
            metric_type=HUB_METRICS.get(name, name),
            metric_name=name,
            metric_value=facts.metrics[name],
        )
        for task, names in INDEXED.items()
        for name in names
        if facts.metrics.get(name) is not None
    ]
    licence = {"license": facts.licence} if facts.licence else {"license": "other", "license_name": "not-stated"}
    tags = ["medical", "medsd", "diffusers", *(["lora"] if facts.kind == "lora" else [])]
    tags += ["diffusion-classifier"] if len(facts.classes) > 1 else []
    task = "text-to-image" if facts.classes or not facts.of_data else "unconditional-image-generation"
    content = ModelCardData(
        library_name="diffusers",
        pipeline_tag=None if facts.kind == "autoencoder" else task,
        tags=tags,
        base_model=facts.base and facts.base[0],
        base_model_relation=facts.base and ("adapter" if facts.kind == "lora" else "finetune"),
        datasets=[facts.data] if facts.data else None,
        **({"model_name": facts.name.split("/")[-1], "eval_results": results} if results else {}),
        **licence,
    )
    return content.to_yaml() + "\n"


def _what(facts: Facts) -> str:
    data = facts.of_data
    lines = [f"This is {HOLDS[facts.kind]}{SCORES if len(facts.classes) > 1 else ''}, made with medsd."]
    if data:
        classes = ", ".join(map(cell, facts.classes))
        lines.append(
            f"Images: {data['resolution']} x {data['resolution']} px, {data['image_channels']} channel(s), {cell(data['unit'])}."
            + (f" Classes: {classes}." if classes else "")
        )
    name, revision = facts.base or ("", None)
    start = f"It started from [{name}](https://huggingface.co/{name})" + (f", revision {revision}." if revision else ".") if name else ""
    licence = (
        f"Licence: {facts.licence}."
        if facts.licence
        else f"No licence was stated: ask the owner; the data{' and the base have' if facts.base else ' has'} terms, too."
    )
    lines += [part for part in (start, licence) if part]
    if facts.checkpoint is not None:
        lines.append(f"**An intermediate checkpoint after {facts.checkpoint} updates.** {UNAUDITED}")
    return "\n\n".join(lines)


def _use() -> str:
    return (
        "Research on generative models and classifiers of medical images: augmentation, data size and shift, teaching.\n\n"
        "**Not for clinical use.** It is no medical device; no diagnosis and no treatment may rest on it. Do not identify people with it, "
        "nor pass generated images off as those of patients."
    )


def _data(facts: Facts) -> str:
    summary, data = facts.summary, facts.of_data
    if not data:
        return ""
    lines = [f"[{facts.data}](https://huggingface.co/datasets/{facts.data})" if facts.data else ""]
    if summary:
        lines.append(table(["", *SPLITS], [row for rows in counts(summary) for row in rows]))
        kinds = ", ".join(f"{cell(kind)} ({count})" for kind, count in (summary.get("modalities") or {}).items())
        lines.append(f"Split by patient, whom these tell: {patient_rules(summary)}." + (f" Modality: {kinds}." if kinds else ""))
        if "file" in summary["patient_rule"]:
            lines.append("Where it is the file, no patient was known, and one may be in two splits.")
    lines.append(f"Intensity map from {cell(data['unit'])} to [-1, 1]: `{json.dumps(data['intensity'])}`.")
    return "\n\n".join(line for line in lines if line)


def _training(facts: Facts) -> str:
    config = facts.config
    if not config:
        return ""
    names = (
        "train_fraction",
        "max_train_samples",
        "max_train_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "mixed_precision",
        "rank",
        "seed",
    )
    rows = [[f"`{name}`", str(config[name])] for name in names if config.get(name) is not None]
    return table(["flag", "value"], rows) + "\n\nAll flags are in `config.yaml`, versions in `environment.json`."


def _classification(facts: Facts) -> str:
    numbers = _numbers(facts.metrics, CLASSIFIER)
    if not numbers:
        return ""
    cost = facts.metrics.get("rows_per_image")
    spent = "" if cost is None else f" An image took {_number(cost)} passes through the UNet on average."
    images = f"{facts.metrics['n']} images{_split(facts)}; 95 % intervals by patient bootstrap.{spent}"
    return f"{images}\n\n{numbers}\n\n" + _pictures(facts, ("roc", "confusion"))


def _split(facts: Facts) -> str:
    """Of which images numbers are, and what speaks against them."""
    split, seen = facts.metrics.get("split"), facts.metrics.get("n_training_patients")
    other = facts.metrics.get("data") not in {None, facts.of_data.get("fingerprint")}
    said = (f" of the {split} split" if split else "") + (" of other data than it was trained on" if other else "")
    return said + (f" (**{seen} of its patients were trained on, so the numbers are too good**)" if seen else "")


def _calibration(facts: Facts) -> str:
    numbers = _numbers(facts.metrics, CALIBRATION)
    if not numbers:
        return ""
    said = "These numbers are of calibrated probabilities." if facts.metrics.get("calibrated") else UNCALIBRATED
    kept = facts.info.get("calibration")
    said += f" What is pushed is calibrated ({cell(kept['source'])})." if kept else " What is pushed holds none, and is far too sure."
    return f"{said}\n\n{numbers}\n\n" + _pictures(facts, ("reliability",))


def _distribution(facts: Facts) -> str:
    metrics = facts.metrics
    rows = []
    for name, label in DISTRIBUTION.items():
        if metrics.get(name) is not None:
            floor = metrics.get(f"{name}_floor")
            rows.append([label, _with_interval(metrics, name), "" if floor is None else _number(floor)])
    if not rows:
        return ""
    drawn, asked = "", metrics.get("sampling") or {}
    if {"num_inference_steps", "guidance_scale"} <= asked.keys():
        drawn = f" (in {asked['num_inference_steps']} steps, guidance {asked['guidance_scale']:g})"
    images = f"{metrics['n_generated']} generated{drawn} against {metrics['n_real']} real images{_split(facts)}"
    judged = f"{images}, in features of `{metrics['extractor']}`; numbers of other features do not compare."
    return f"{judged}\n\n" + table(["", "value", "other real images"], rows)


def _classes(facts: Facts) -> str:
    stems = [name for name in ("auroc", "fid", "fid_floor", "kid", "precision", "recall") if any(_of(facts, name))]
    rows = [[cell(name), *(_with_interval(facts.metrics, f"{stem}/{name}") for stem in stems)] for name in facts.classes]
    return table(["class", *stems], rows) if stems else ""


def _of(facts: Facts, stem: str) -> Iterator[bool]:
    return (facts.metrics.get(f"{stem}/{name}") is not None for name in facts.classes)


def _subgroups(metrics: Mapping[str, Any]) -> str:
    rows = [
        [cell(row["column"]), cell(row["value"]), str(row["n"]), str(row["patients"]), *(_with_interval(row, name) for name in SUBGROUP)]
        for row in metrics.get("subgroups") or ()
    ]
    return table(["", "", "images", "patients", *SUBGROUP], rows)


def _audit(facts: Facts) -> str:
    audit = facts.audit
    if audit is None:
        return UNAUDITED
    failed = "" if audit["verdict"] == "passed" else "**It may reproduce images of patients: do not make it public.** "
    steps = audit["sampling"]["num_inference_steps"]
    drawn = "" if steps is None else f", drawn in {steps} steps,"
    looked = "reconstructions of held-out images" if facts.kind == "autoencoder" else "generated images"
    expected = _number(audit["false_positive_rate"])
    return (
        f"{failed}Audit {audit['verdict']}, of exactly these weights. {audit['samples']} {looked}{drawn} were compared with "
        f"{audit['training_images']} training images and {audit['held_out']} others: {audit['flagged']} were flagged as suspiciously "
        f"near a training image (a share of {expected} is expected by chance), {audit['copies']} are copies. The error tells training "
        f"images from others with AUROC {_with_interval(audit, 'membership_auroc')}, where 0.5 is not at all."
    )


def _numbers(metrics: Mapping[str, Any], names: Mapping[str, str]) -> str:
    rows = [[label, _with_interval(metrics, name)] for name, label in names.items() if metrics.get(name) is not None]
    return table(["", "value [95 % interval]"], rows)


def _with_interval(values: Mapping[str, Any], name: str) -> str:
    if values.get(name) is None:
        return ""
    bounds = values.get(f"{name}_ci")
    return _number(values[name]) + (f" [{_number(bounds[0])}, {_number(bounds[1])}]" if bounds else "")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _pictures(facts: Facts, names: Sequence[str]) -> str:
    """Figures that are sent."""
    said = {
        "generated": "Generated images, a row per class",
        "denoising": "From noise to image",
        "roc": "ROC curves",
        "confusion": "Confusion matrix",
        "reliability": "Reliability diagram",
    }
    return "\n\n".join(f"![{said[name]}](figures/{name}.png)" for name in names if f"figures/{name}.png" in facts.figures)


def _citation(facts: Facts) -> str:
    paper = "[Your Diffusion Model is Secretly a Zero-Shot Classifier](https://arxiv.org/abs/2303.16203), ICCV 2023"
    return (f"Probabilities are those of the Diffusion Classifier (Li et al., {paper}).\n\n" if len(facts.classes) > 1 else "") + (
        "```bibtex\n@software{medsd,\n  title = {medsd: fine-tuned diffusion models of medical images that classify},\n"
        "  author = {{medsd developers}}\n}\n```"
    )
