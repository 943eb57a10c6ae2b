"""Medical images -> a Parquet data set with class-token prompts, split by patient.

python recipes/prepare_data.py
python recipes/prepare_data.py --source images --data_dir scans --output_dir runs/scans/data
"""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medsd.commandline import run
from medsd.config import PrepareDataConfig

if TYPE_CHECKING:
    from medsd.data.plan import PrepareOptions
    from medsd.data.rows import Collection
    from medsd.data.survey import Survey

SHOWN = 5
PADDED = 0.75
"""Share of the side below which an image is mostly padding."""


def main(config: PrepareDataConfig) -> None:
    """Read the source's rows, prepare them, and say what came out."""
    from medsd.data.intensity import parse_windows
    from medsd.data.metadata import PROMPT_METADATA
    from medsd.data.prepare import PHANTOM_RESOLUTION, PrepareOptions, load_salt, prepare, prepare_phantom
    from medsd.data.survey import survey
    from medsd.errors import InputError
    from medsd.hub.dataset import check_public, push_dataset
    from medsd.output import check_output

    output_dir = Path(config.output_dir)
    if config.push_to_hub:
        check_public(config.hub_private_repo, config.confirm_public_data)
    if not config.dry_run:
        check_output(output_dir, config.overwrite, recipe="prepare_data.py")
        inside = config.data_dir and output_dir.resolve().is_relative_to(Path(config.data_dir).resolve())
        if inside and config.source == "images" and config.labels is None:
            raise InputError(f"--output_dir {output_dir} lies in --data_dir, where it would be taken for a class: choose another")
    options = PrepareOptions(
        resolution=config.resolution or (PHANTOM_RESOLUTION if config.source == "phantom" else 256),
        resize=config.resize,
        axis=config.axis,
        slices=config.slices,
        intensity=parse_windows(config.windows) if config.windows else None,
        prompt_template=config.prompt_template,
        prompt_metadata=PROMPT_METADATA if config.prompt_metadata == () else config.prompt_metadata or (),
        class_names=config.class_names,
        split_fractions=config.split_fractions,
        duplicates=config.duplicates,
        max_quarantine=config.max_quarantine,
        num_workers=config.num_workers,
        seed=config.seed,
        mask_channel=config.stacks_mask,
        multi_label=config.multi_label,
    )
    if config.source == "phantom":
        summary = prepare_phantom(output_dir, options, Path(config.data_dir) if config.data_dir else None, overwrite=config.overwrite)
    else:
        collection = read_collection(config)
        for note in collection.notes:
            print(note)
        options = replace(
            options,
            mask_channel=options.mask_channel or collection.mask_channel,
            mask_classes=collection.mask_classes,
            multi_label=collection.multi_label,
            class_names=options.class_names or collection.class_names,
            prompt_template=options.prompt_template or collection.prompt_template,
        )
        if config.dry_run:
            say_survey(survey(collection.rows, options), options)
            return
        salt, salt_name = load_salt(Path(config.salt_file) if config.salt_file else None)
        try:
            summary = prepare(collection.rows, output_dir, options, salt, salt_name, overwrite=config.overwrite)
        except KeyboardInterrupt:
            print("the same command goes on from here")
            raise
    report(summary, output_dir, options.resolution)
    if config.push_to_hub:
        print(f"pushed to {push_dataset(output_dir, config.hub_dataset_id, config.hub_private_repo, config.confirm_public_data)}")


def read_collection(config: PrepareDataConfig) -> "Collection":
    """Rows of the configured source, and what it fixes for all of them."""
    from medsd.data import collections, sources
    from medsd.data.files import is_dicom, is_nifti, is_raster
    from medsd.data.rows import Collection

    folder, labels = Path(config.data_dir), Path(config.labels) if config.labels else None
    columns = {"image_column": config.image_column, "patient_column": config.patient_column, "split_column": config.split_column}
    accepts = {"dicom": is_dicom, "nifti": is_nifti, "csv": lambda path: is_raster(path) or is_nifti(path)}.get(config.source, is_raster)
    if config.source in collections.COLLECTIONS:
        return collections.read_collection(config.source, folder, labels, config.label_column[0], config.channels)
    if config.source == "npz":
        return collections.medmnist(folder, config.class_names)
    if config.source == "nifti" and not config.multi_label:
        return sources.nifti_tree(folder, config.channels, labels, config.label_column[0], **columns)
    if labels is None:
        return Collection(sources.image_folder(folder, accepts))
    columns["mask_column"] = config.mask_column
    if config.multi_label:
        return sources.findings_table(folder, labels, config.label_column, config.uncertain, accepts=accepts, **columns)
    return sources.table(folder, labels, config.label_column[0], accepts=accepts, **columns)


def say_survey(found: "Survey", options: "PrepareOptions") -> None:
    """What would come out, and at what cost."""
    classes = ", ".join(f"{name} {count}" for name, count in found.classes.items()) or "by the masks"
    print(f"{found.files} files, {len(found.refused)} of them not readable")
    for name, reason in found.refused[:SHOWN]:
        print(f"  {name}: {reason.split(': ', 1)[-1]}")
    print(f"about {found.images} images of {found.patients} patients: {classes}")
    print(f"about {_duration(found.seconds)} with --num_workers {options.num_workers}, estimated from a few decoded files")
    stored, staged = _size(found.stored), _size(found.staged)
    print(f"about {stored}, and {staged} more until it is finished, as later in the cache of datasets for training")
    print("nothing was written")


def _duration(seconds: float) -> str:
    """`"3.2 hours"`, `"12 minutes"`, `"1 minute"`."""
    minutes = max(1, round(seconds / 60))
    return f"{seconds / 3600:.1f} hours" if minutes >= 100 else f"{minutes} minute{'s' * (minutes > 1)}"


def _size(count: float) -> str:
    """Bytes as GB (MB below one)."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


def report(summary: dict, output_dir: Path, resolution: int) -> None:
    """Counts per split and class, what to look at, and what to type next."""
    from medsd.data.ranges import XRAY

    for split, count in summary["images"].items():
        classes = ", ".join(f"{name} {number}" for name, number in summary["classes"][split].items())
        print(f"{split:<10} {count:>6} images of {summary['patients'][split]} patients: {classes}")
    rules = ", ".join(f"{rule} ({count} images)" for rule, count in summary["patient_rule"].items())
    print(f"patient from: {rules}")
    if {"patient column", "file"} <= summary["patient_rule"].keys():
        print(f"{summary['patient_rule']['file']} images have no patient beside others that have one: each counts as a patient of its own")
    if set(summary["patient_rule"]) == {"file"}:
        print(
            "no patient is known, so every file counts as one: where patients have several images, lay them out as CLASS/p01/ ..., or"
            " name a --patient_column of --labels"
        )
    if summary["quarantined"]:
        print(f"{summary['quarantined']} files in quarantine; their names and reasons: {output_dir}.private/quarantine.jsonl")
    if any(summary["duplicates"].values()):
        kinds = ", ".join(f"{count} {kind}" for kind, count in summary["duplicates"].items() if count)
        print(
            f"pairs of images that show the same in two splits: {kinds}; {summary['duplicates_dropped']} images dropped (duplicates.jsonl)"
        )
    if summary["burned_in_text_possible"]:
        print(
            f"{summary['burned_in_text_possible']} images may have text burned in, perhaps a name: look at {output_dir}/contact_sheet.png"
        )
    if summary["longest_side"] < PADDED * resolution:
        print(
            f"no image is larger than {summary['longest_side']} px, the rest of {resolution} px is padding: consider a lower --resolution"
        )
    mixed = {name: count for name, count in summary["modalities"].items() if name != "other"}
    if len(mixed) > 1 and not XRAY.issuperset(mixed):
        print(
            f"several modalities in one data set ({', '.join(f'{name} {count}' for name, count in mixed.items())}): prepare each on its own"
        )
    report_splits(summary)
    data, unet = shlex.quote(str(output_dir)), shlex.quote(str(output_dir.with_name("unet")))
    print(f"data set in {output_dir}; look at contact_sheet.png there")
    if summary["images"]["train"]:
        print(f"next: accelerate launch recipes/finetune_unet.py --dataset_name {data} --output_dir {unet}")


def report_splits(summary: dict) -> None:
    """What splits without any images, or without images of a class, will not do."""
    empty = [split for split, count in summary["images"].items() if not count]
    uses = {
        "train": "training needs some",
        "validation": "classify.py will want --calibrate none",
        "test": "classify.py will want another --split",
    }
    for split in empty:
        print(f"nothing in {split}: {uses[split]}")
    for split, counts in summary["classes"].items():
        lacking = [name for name, count in counts.items() if not count]
        if lacking and split not in empty:
            print(f"no image of {', '.join(lacking)} in {split}")


if __name__ == "__main__":
    run(main, PrepareDataConfig)
