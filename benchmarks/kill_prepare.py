"""Does a preparation that is killed go on where it was, to the same bytes? And how much memory does it take?

    python benchmarks/kill_prepare.py --kills 25 --seed 0
    python benchmarks/kill_prepare.py --memory

The first prepares a phantom of 600 slices and a few broken files, which is the reference. Then, again and again, it starts the
same preparation in a folder of its own, kills it with SIGKILL and runs it again to the end. Three kills of five are uniform
over the duration of a whole run, one is while shards are written, one when folders get their names. Every file of DATA and
DATA.private must be the reference's, no worker may outlive its parent, and no hidden folder may be left. Exit code 1 otherwise.

The second prepares 500 and 5,000 DICOM files and prints the peak memory of the parent and of its largest worker.
"""

import argparse
import hashlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

from medsd.data.phantom import write_phantom

RECIPE = Path(__file__).parents[1] / "recipes" / "prepare_data.py"
BROKEN = 6
PHASES = ("anywhere", "anywhere", "anywhere", "writing", "naming")
WORKER = b"medsd.data.workers"


@dataclass(frozen=True)
class Kill:
    """What one kill met, and what came of the run after it."""

    phase: str
    seconds: float
    """From the start to the kill; the run ended by itself where there was nothing left to kill."""
    blocks: int
    shards: int
    """Finished when it was killed."""
    kept: int
    """Files that the second run did not read again."""
    kept_shards: int
    wrong: list[str]
    """Files that differ, and whatever else is not as it should be."""


def write_source(folder: Path, patients: int = 100) -> Path:
    """A phantom of six slices a patient, and in its table `BROKEN` files that cannot be read."""
    labels = write_phantom(folder, patients=patients, slices=6, size=64)
    lines = labels.read_text().splitlines()
    step = len(lines) // BROKEN
    for number in range(BROKEN):
        whole = folder / lines[1 + number * step].split(",")[0]
        broken = whole.with_name(f"broken{number}.dcm")
        content = whole.read_bytes()
        broken.write_bytes([content[: len(content) // 2], b"", b"not an image", content[:200]][number % 4])
        lines.insert(2 + number * (step + 1), f"{broken.relative_to(folder)},normal,{whole.parent.name},")
    labels.write_text("\n".join([*lines, ""]))
    return folder


def start(source: Path, output: Path, *flags: str) -> subprocess.Popen:
    """The recipe, as a user runs it."""
    command = [sys.executable, str(RECIPE), "--source", "phantom", "--data_dir", str(source), "--output_dir", str(output)]
    return subprocess.Popen([*command, "--resolution", "64", *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def digests(output: Path) -> dict[str, str]:
    """sha256 of every file of DATA and DATA.private, by its path."""
    folders = (output, output.with_name(output.name + ".private"))
    files = [(folder, file) for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    return {
        f"{'private/' if folder.suffix else ''}{file.relative_to(folder)}": hashlib.sha256(file.read_bytes()).hexdigest()
        for folder, file in files
    }


def hidden(output: Path, what: str) -> Path:
    return output.with_name(f".{output.name}.{what}")


def children(pid: int) -> list[int]:
    """Processes that `pid` started and that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:  # It ended while we looked.
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def workers_alive(pids: list[int]) -> list[int]:
    """Those that still are workers; an id may belong to another process by now."""
    alive = []
    for pid in pids:
        try:
            place = Path(f"/proc/{pid}")
            if WORKER in (place / "cmdline").read_bytes() and (place / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                alive.append(pid)
        except OSError:
            continue
    return alive


def survivors(pids: list[int], seconds: float = 2.0) -> list[int]:
    """Workers that are alive some time after their parent's end."""
    until = time.monotonic() + seconds
    while (left := workers_alive(pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return left


def moment(phase: str, output: Path, duration: float, draw: Callable[[float, float], float]) -> Callable[[float], bool]:
    """Whether it is time to kill, told the seconds since the start. A phase begins when its folder is there."""
    private = output.with_name(output.name + ".private")
    signs = {"writing": [hidden(output, "partial") / "data"], "naming": [private, output]}
    if phase == "anywhere":
        when = draw(0, duration)
        return lambda seconds: seconds >= when
    sign, wait, seen = signs[phase][int(draw(0, len(signs[phase])))], draw(0, {"writing": 0.5, "naming": 0.01}[phase]), []

    def is_time(seconds: float) -> bool:
        if not seen and sign.is_dir():
            seen.append(seconds)
        return bool(seen) and seconds >= seen[0] + wait

    return is_time


def kill_once(source: Path, output: Path, phase: str, is_time: Callable[[float], bool], reference: dict[str, str]) -> Kill:
    """Start, kill at a moment, run again, compare."""
    begin = time.monotonic()
    process = start(source, output)
    while process.poll() is None and not is_time(time.monotonic() - begin):
        time.sleep(0.0005)
    workers, seconds = children(process.pid), time.monotonic() - begin
    process.kill()
    process.communicate()
    alive = survivors(workers)
    blocks = len(list(hidden(output, "staging").glob("block-*.arrow")))
    shards = {file.stat().st_ino for file in hidden(output, "partial").glob("data/*.parquet")}
    complete = output.is_dir()
    again = start(source, output)
    words = again.communicate()[0]
    wrong = [f"worker {pid} lives on" for pid in alive] + differences(output, reference)
    if again.returncode != (1 if complete else 0) or complete != ("is not empty" in words):
        wrong.append(f"the second run ended with {again.returncode}: {words.strip().splitlines()[-1]}")
    wrong += [f"{left.name} is left" for left in (hidden(output, "staging"), hidden(output, "partial")) if left.exists()]
    first = re.search(r"reading:.*?(\d+)/(\d+)", words)
    kept_shards = len(shards & {file.stat().st_ino for file in output.glob("data/*.parquet")})
    return Kill(phase, seconds, blocks, len(shards), int(first[1]) if first else 0, kept_shards, wrong)


def differences(output: Path, reference: dict[str, str]) -> list[str]:
    found = digests(output)
    return [f"{name} differs" for name in sorted(reference.keys() | found.keys()) if reference.get(name) != found.get(name)]


def kill_often(folder: Path, kills: int, seed: int, patients: int = 100) -> list[Kill]:
    """The reference, then so many kills; prints a line for each."""
    source, whole = write_source(folder / "source", patients), folder / "reference"
    begin = time.monotonic()
    process = start(source, whole)
    words = process.communicate()[0]
    if process.returncode:
        raise SystemExit(words)
    duration, reference, rng = time.monotonic() - begin, digests(whole), random.Random(seed)
    print(f"a whole run: {duration:.1f} s, {len(reference)} files; every kill: SIGKILL to the parent alone")
    print(f"{'kill':>4}  {'phase':<9}{'at s':>6}{'blocks':>8}{'shards':>8}{'kept files':>12}{'kept shards':>13}  result")
    done = []
    for number in range(kills):
        output, phase = folder / f"killed{number}", PHASES[number % len(PHASES)]
        done.append(kill_once(source, output, phase, moment(phase, output, duration, rng.uniform), reference))
        kill = done[-1]
        figures = f"{kill.seconds:>6.2f}{kill.blocks:>8}{kill.shards:>8}{kill.kept:>12}{kill.kept_shards:>13}"
        print(f"{number:>4}  {phase:<9}{figures}  {'; '.join(kill.wrong) or 'identical'}", flush=True)
        shutil.rmtree(output, ignore_errors=True)
    return done


def write_scans(folder: Path, count: int) -> Path:
    """`folder/a|b/N.dcm` of 64 px, ten to a patient, all different."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    scan = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    scan.SOPClassUID, scan.Modality, scan.SamplesPerPixel, scan.PhotometricInterpretation = CTImageStorage, "CT", 1, "MONOCHROME2"
    scan.Rows = scan.Columns = 64
    scan.BitsAllocated, scan.BitsStored, scan.HighBit, scan.PixelRepresentation = 16, 16, 15, 1
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "ab"[number // 10 % 2] / f"{number:05d}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        scan.PatientID, scan.SOPInstanceUID = f"patient{number // 10:05d}", f"2.25.{number + 1}"
        meta.MediaStorageSOPInstanceUID = scan.SOPInstanceUID
        scan.PixelData = np.kron(rng.integers(-1000, 1000, (16, 16)), np.ones((4, 4))).astype("<i2").tobytes()
        pydicom.dcmwrite(path, scan, enforce_file_format=True)
    return folder


def peak(pid: int) -> float:
    """Largest resident size so far in MiB."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def measure_memory(folder: Path, count: int) -> tuple[float, float, float]:
    """Peak MiB of the parent and of its largest worker, and seconds."""
    source, begin = write_scans(folder / f"scans{count}", count), time.monotonic()
    command = [sys.executable, str(RECIPE), "--source", "dicom", "--data_dir", str(source), "--output_dir", str(folder / f"data{count}")]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    parent = worker = 0.0
    while process.poll() is None:
        parent, worker = max(parent, peak(process.pid)), max([worker, *map(peak, children(process.pid))])
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{count} files: exit code {process.returncode}")
    return parent, worker, time.monotonic() - begin


def compare_memory(folder: Path, counts: tuple[int, int] = (500, 5000)) -> None:
    few, many = (measure_memory(folder, count) for count in counts)
    for count, (parent, worker, seconds) in zip(counts, (few, many), strict=True):
        print(f"{count:>6} files: parent {parent:.0f} MiB, largest worker {worker:.0f} MiB, {seconds:.1f} s")
    slopes = [(after - before) * 1024 / (counts[1] - counts[0]) for before, after in zip(few[:2], many[:2], strict=True)]
    print(f"slope: parent {slopes[0]:.1f} KiB a file, worker {slopes[1]:.1f} KiB a file")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            compare_memory(Path(folder))
            return
        done = kill_often(Path(folder), args.kills, args.seed)
    kept, shards, wrong = (
        sum(map(bool, found)) for found in zip(*((kill.kept, kill.kept_shards, kill.wrong) for kill in done), strict=True)
    )
    print(f"{len(done)} kills: {wrong} not identical; finished blocks were used again {kept} times, finished shards {shards} times")
    sys.exit(1 if wrong or not kept else 0)


if __name__ == "__main__":
    main()
