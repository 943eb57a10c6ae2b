"""A preparation that is killed goes on where it was, and never mixes what was with what is now."""

import csv
import fcntl
import os
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from PIL import Image

from benchmarks.kill_prepare import digests, hidden, kill_once, measure_memory, start, write_source
from medsd.data import folder, staging
from medsd.data.dataset import load_dataset
from medsd.data.decode import decode_row
from medsd.data.phantom import write_phantom
from medsd.data.plan import PrepareOptions
from medsd.data.prepare import prepare
from medsd.data.sources import findings_table, image_folder, table
from medsd.data.staging import Staging, write_block
from medsd.errors import InputError

OPTIONS = PrepareOptions(resolution=16, num_workers=0)
SALT = b"a salt for tests only"


@pytest.fixture
def decoded(monkeypatch):
    """Names of the rows that are decoded, in order."""
    names = []

    def decode(row, options):
        names.append(row.name)
        return decode_row(row, options)

    monkeypatch.setattr(staging, "decode_row", decode)
    return names


@pytest.fixture
def scans(tmp_path):
    """`scans/train|test/benign/N.png`, 70 each, two blocks in all; the first of each are the same."""
    for split, seed in {"train": 0, "test": 1}.items():
        (tmp_path / "scans" / split / "benign").mkdir(parents=True)
        for number in range(70):
            pixels = np.random.default_rng((seed if number else 0, number)).integers(0, 256, (20, 24), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "scans" / split / "benign" / f"{number:02d}.png")
    return tmp_path / "scans"


def refused(scans, output):
    with pytest.raises(InputError, match="what has been read is not read again"):
        prepare(image_folder(scans), output, OPTIONS, SALT, "test")


def spoil(path):
    """Other content that looks untouched: the same size and time."""
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_killed_preparations_end_with_the_same_bytes(tmp_path):
    source = write_source(tmp_path / "source", patients=40)
    words = start(source, tmp_path / "whole").communicate()[0]
    reference = digests(tmp_path / "whole")
    assert len(reference) == 11, words
    signs = {"reading": ("staging", "block-*.arrow"), "writing": ("partial", "data/*")}
    for phase, (place, pattern) in signs.items():
        output = tmp_path / phase
        kill = kill_once(source, output, phase, lambda _, output=output: any(hidden(output, place).glob(pattern)), reference)  # noqa: B023
        assert not kill.wrong and kill.kept >= 64, kill
        assert digests(output) == reference


def test_drop_after_a_refusal_decodes_nothing_again(tmp_path, scans, decoded):
    refused(scans, tmp_path / "data")
    assert len(decoded) == 140 and (hidden(tmp_path / "data", "staging").stat().st_mode & 0o777) == 0o700
    for path in scans.rglob("*.png"):
        spoil(path)
    summary = prepare(image_folder(scans), tmp_path / "data", replace(OPTIONS, duplicates="drop"), SALT, "test")
    assert len(decoded) == 140 and summary["images"] == {"train": 69, "validation": 0, "test": 70}
    assert not list(tmp_path.glob(".data*"))


def test_a_changed_source_or_size_is_read_anew(tmp_path, scans, decoded):
    refused(scans, tmp_path / "data")
    os.utime(scans / "test" / "benign" / "05.png", ns=(1, 1))
    refused(scans, tmp_path / "data")
    assert len(decoded) == 280
    (scans / "test" / "benign" / "00.png").unlink()
    prepare(image_folder(scans), tmp_path / "data", replace(OPTIONS, resolution=8), SALT, "test")
    assert len(decoded) == 280 + 139


def test_missing_blocks_alone_are_read(tmp_path, scans, decoded):
    refused(scans, tmp_path / "data")
    prepare(image_folder(scans), tmp_path / "whole", replace(OPTIONS, duplicates="drop"), SALT, "test")
    hidden(tmp_path / "data", "staging").joinpath("block-000001.arrow").unlink()
    del decoded[:]
    prepare(image_folder(scans), tmp_path / "data", replace(OPTIONS, duplicates="drop"), SALT, "test")
    assert len(decoded) == 64 and digests(tmp_path / "data") == digests(tmp_path / "whole")


def phantom_rows(source):
    return table(
        source, source / "labels.csv", "label", "file", "patient_id", mask_column="mask", accepts=lambda path: path.suffix == ".dcm"
    ).rows


def change_spacing(source):
    path = next(source.glob("dicom/*/00.dcm"))
    scan = pydicom.dcmread(path)
    scan.PixelSpacing = [9, 9]
    scan.save_as(path)


def change_mask(source):
    path = next(source.glob("masks/*/00.png"))
    Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)


def change_sex(source):
    lines = list(csv.reader((source / "labels.csv").open()))
    with (source / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([[*line, "F" if number else "sex"] for number, line in enumerate(lines)])


@pytest.mark.parametrize("change", [change_spacing, change_mask, change_sex])
def test_finished_shards_of_other_facts_are_written_anew(tmp_path, monkeypatch, change):
    """Pixels, labels and patients stay the same, so keys, prompts and the data's fingerprint do too."""
    source = tmp_path / "source"
    write_phantom(source, patients=20, slices=6, size=32)
    keep = replace(OPTIONS, duplicates="keep")
    with monkeypatch.context() as killed:
        killed.setattr(folder, "contact_sheet", lambda rows: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(phantom_rows(source), tmp_path / "data", keep, SALT, "test")
    assert list(hidden(tmp_path / "data", "partial").glob("data/*.parquet"))
    change(source)
    for name in ("data", "whole"):
        prepare(phantom_rows(source), tmp_path / name, keep, SALT, "test")
    assert digests(tmp_path / "data") == digests(tmp_path / "whole")


def test_a_second_run_at_the_same_time_is_refused(tmp_path, scans, decoded):
    hidden(tmp_path / "data", "lock").touch()
    with hidden(tmp_path / "data", "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing data"):
            prepare(image_folder(scans), tmp_path / "data", OPTIONS, SALT, "test")
    refused(scans, tmp_path / "data")
    assert len(decoded) == 140


@pytest.mark.slow
def test_memory_does_not_grow_with_the_collection(tmp_path):
    few, many = (measure_memory(tmp_path, count) for count in (500, 5000))
    assert many[0] - few[0] < 4500 * 12 / 1024, "12 KiB a file in the parent, of 140 in the files"
    assert many[1] - few[1] < 128, "MiB: a full shard and its compressed copy, which only the larger set has, of 600 in the files"


def test_a_corrected_table_counts_after_a_refusal(scans, tmp_path, decoded):
    def rows(effusion):
        table = tmp_path / "t.csv"
        names = [path.relative_to(scans).as_posix() for path in sorted(scans.rglob("*.png"))]
        lines = [f"{name},{int(number % 2 or effusion)},{number % 3 // 2}" for number, name in enumerate(names)]
        table.write_text("\n".join(["file,effusion,nodule", *lines]))
        return findings_table(scans, table, ("effusion", "nodule")).rows

    options = replace(OPTIONS, multi_label=True, class_names=("effusion", "nodule"))
    with pytest.raises(InputError, match="what has been read is not read again"):
        prepare(split(rows(effusion=True)), tmp_path / "data", options, SALT, "test")
    prepare(split(rows(effusion=False)), tmp_path / "data", replace(options, duplicates="keep"), SALT, "test")
    assert len(decoded) == 140
    found = [label[0] for name in ("train", "test") for label in load_dataset(tmp_path / "data", name)["labels"]]
    assert sum(found) == 70


def split(rows):
    return [replace(row, split=row.name.split("/")[0]) for row in rows]


def test_what_failed_for_lack_of_time_is_tried_again(scans, tmp_path, monkeypatch):
    rows = image_folder(scans)
    slow = Staging(tmp_path / "staging", rows, OPTIONS.decode, 64)
    reasons = {0: "00.png: took longer than 60 s", 70: "00.png: cannot be decoded (SyntaxError: broken)"}
    for block in slow.blocks():
        write_block(slow.path(block), slow.rows_of(block), reasons, OPTIONS.decode, lambda step: None)
    again = Staging(tmp_path / "staging", rows, OPTIONS.decode, 64)
    assert [again.finished(block) for block in again.blocks()] == [False, True, True]
    assert [row.name for row, _ in again.refused()] == [rows[70].name]
