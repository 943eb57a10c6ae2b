"""Shared fixtures: a small phantom prepared once, and the folder of real images where there is one."""

import os
import signal
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
pytest.register_assert_rewrite("tests.card_numbers")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # As many workers as cores: a thread each.


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Each test may choose its own precision, as each process of a user does."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
        sys.modules["accelerate.state"].GradientState._reset_state()


@pytest.fixture(scope="session", autouse=True)
def signals_of_a_terminal():
    """Also under nohup and in the background, where SIGHUP and SIGINT are ignored, and would be by every process that a test starts."""
    before = {
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def short_looks():
    """Pictures in two steps instead of twenty, a ranking by two pairs instead of eight, and no count of FLOPs.

    Runs look at the end, tests start many, and few of them look at what is seen there.
    """
    from medsd.training import preview, setup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "FlopCounter", lambda network: None)
        patch.setattr(preview, "PREVIEW_STEPS", 2)
        patch.setattr(preview, "QUICK_PAIRS", 2)
        yield


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory):
    """A prepared phantom: 30 patients, 32 px."""
    from medsd.data.phantom import write_phantom
    from medsd.data.prepare import PrepareOptions, prepare_phantom

    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder / "phantom_dicom_0", patients=30, slices=6, size=64)
    prepare_phantom(folder / "data", PrepareOptions(resolution=32, num_workers=0))
    return folder / "data"


@pytest.fixture(scope="session")
def real_data():
    """Folder of real images, named by MEDSD_TEST_DATA."""
    folder = os.environ.get("MEDSD_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MEDSD_TEST_DATA names no folder of real images")
    return Path(folder)
