"""What every recipe needs of its process: a launcher that it does not outlive, all cores, and quiet libraries."""

import ctypes
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

LONGEST_WAIT = timedelta(hours=12)
"""For another process, which may look at held-out images or encode a whole data set meanwhile."""
DIE_WITH_PARENT = 1
"""`PR_SET_PDEATHSIG` of prctl(2)."""
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Environment variables of which accelerate's or torch's launcher sets one."""
FOLLOWS = "MEDSD_FOLLOWS"
"""Environment variable of a recipe that another one starts: it ends with that one, however that ends."""


def cache_folder(kind: str) -> Path:
    """Where what can be computed again is kept between runs: below `HF_HOME`, beside the cache of data sets."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "medsd" / kind


def follow_launcher() -> None:
    """Let the launcher's death reach this process as SIGTERM: `accelerate launch` is killed without a word to its child.

    A process that was not launched stays alive when its shell goes. Exits where the launcher is dead already.
    """
    if not any(name in os.environ for name in (*LAUNCHED, FOLLOWS)):
        return
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return
    if not any(word in parent for word in (b"python", b"accelerate", b"torchrun")):
        print(f"error: the launcher that set {' or '.join((*LAUNCHED, FOLLOWS))} is gone; unset them to run without one", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


def to_device(value: Any, device: Any) -> Any:
    """A tensor of the CPU there, without waiting: a GPU takes what lies in pinned memory while it computes."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def start_processes() -> Any:
    """An Accelerator for work that is shared out among processes, without training."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    use_all_cores(accelerator)
    return accelerator


def use_all_cores(accelerator: Any) -> None:
    """On a CPU, share the cores among the processes, unless OMP_NUM_THREADS says otherwise.

    `accelerate launch` sets that to 1 by itself, so under it the variable does not count.
    """
    import torch

    chosen = "OMP_NUM_THREADS" in os.environ and not any(name in os.environ for name in LAUNCHED)
    if accelerator.device.type == "cpu" and not chosen:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))


def quiet_libraries() -> None:
    """Keep libraries' progress bars and notices from the user; medsd says what is going on."""
    import datasets
    import diffusers
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    datasets.disable_progress_bars()
    for library in (datasets, diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
