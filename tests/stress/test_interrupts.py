"""Ctrl-C in the middle of a step leaves model and store usable."""

import interrupts
import processes
import pytest


@pytest.mark.parametrize("count", [10, pytest.param(150, marks=pytest.mark.slow)])
def test_after_interrupts_training_goes_on_and_no_row_is_damaged(tmp_path, count):
    interrupts.survive(tmp_path / "cache", count, seed=0)
    assert processes.damaged(tmp_path / "cache") == 0
