"""Four of the kills of benchmarks/kill_training.py."""

import pytest

from benchmarks.kill_training import VARIANTS, kill_often


@pytest.mark.slow
def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    """Full training with workers and accumulation; LoRA."""
    kills = kill_often(tmp_path, 4, 0, phases=("data", "backward", "EMA", "save"), variants=(VARIANTS[3], VARIANTS[4]))
    assert [kill.wrong for kill in kills] == [[]] * 4
