"""Medical images -> a Parquet data set with class-token prompts, split by patient.

python recipes/prepare_data.py
python recipes/prepare_data.py --source images --data_dir scans --output_dir runs/scans/data
"""

import shlex
from pathlib import Path

from medsd.config import PrepareDataConfig, run


def main(config: PrepareDataConfig) -> None:
    """Read the source's rows, prepare them, and say what came out."""
    from medsd.data.intensity import parse_windows
    from medsd.data.prepare import PHANTOM_RESOLUTION, PrepareOptions, load_salt, prepare, prepare_phantom
    from medsd.runtime import check_output

    output_dir = Path(config.output_dir)
    check_output(output_dir, config.overwrite)
    options = PrepareOptions(
        resolution=config.resolution or (PHANTOM_RESOLUTION if config.source == "phantom" else 256),
        resize=config.resize,
        intensity=parse_windows(config.windows) if config.windows else None,
        prompt_template=config.prompt_template,
        class_names=config.class_names,
        split_fractions=config.split_fractions,
        duplicates=config.duplicates,
        max_quarantine=config.max_quarantine,
        num_workers=config.num_workers,
        seed=config.seed,
    )
    if config.source == "phantom":
        summary = prepare_phantom(output_dir, options, Path(config.data_dir) if config.data_dir else None, overwrite=config.overwrite)
    else:
        salt, salt_name = load_salt(Path(config.salt_file) if config.salt_file else None)
        summary = prepare(read_rows(config), output_dir, options, salt, salt_name, overwrite=config.overwrite)
    report(summary, output_dir)


def read_rows(config: PrepareDataConfig) -> list:
    """Rows of the configured source."""
    from medsd.data import sources
    from medsd.data.files import is_dicom, is_raster

    data_dir = Path(config.data_dir)
    if config.source == "npz":
        return sources.medmnist(data_dir, config.class_names)
    accepts = is_dicom if config.source == "dicom" else is_raster
    if config.labels is None:
        return sources.image_folder(data_dir, accepts)
    return sources.table(
        data_dir,
        Path(config.labels),
        config.label_column[0],
        config.image_column,
        config.patient_column,
        config.split_column,
        accepts=accepts,
    )


def report(summary: dict, output_dir: Path) -> None:
    """Counts per split and class, and what to type next."""
    for split, count in summary["images"].items():
        classes = ", ".join(f"{name} {number}" for name, number in summary["classes"][split].items())
        print(f"{split:<10} {count:>6} images of {summary['patients'][split]} patients: {classes}")
    rules = ", ".join(f"{rule} ({count} images)" for rule, count in summary["patient_rule"].items())
    print(f"patient from: {rules}; {summary['quarantined']} files in quarantine, {summary['duplicates_dropped']} duplicates dropped")
    if set(summary["patient_rule"]) == {"file"}:
        print("no patient is known, so every file counts as one: name a --patient_column where a patient has several images")
    data, unet = shlex.quote(str(output_dir)), shlex.quote(str(output_dir.with_name("unet")))
    print(f"data set in {output_dir}\nnext: accelerate launch recipes/finetune_unet.py --dataset_name {data} --output_dir {unet}")


if __name__ == "__main__":
    run(main, PrepareDataConfig)
