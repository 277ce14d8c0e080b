"""Nothing that was flushed is lost when a process is killed, and what was not is whole or absent."""

import os

import pytest
from kills import in_its_own_process

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill -9")


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_kills_while_filling_lose_nothing_that_was_flushed_and_break_nothing(tmp_path, kills):
    counts = in_its_own_process(tmp_path / "cache", kills, seed=kills)
    assert counts["kills survived"] == kills
    assert counts["flushed rows found again"] > 0
