"""Processes on one directory at once: right rows, none lost, no deadlock."""

import processes
import pytest


@pytest.mark.parametrize(
    ("method", "count", "operations"),
    [
        ("fork", 8, 40),
        pytest.param("spawn", 3, 40, marks=pytest.mark.slow),
        pytest.param("fork", 8, 400, marks=pytest.mark.slow),
        pytest.param("spawn", 8, 200, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("removals", [False, True], ids=["stored rows stay", "rows are removed meanwhile"])
def test_processes_read_and_write_right_rows(tmp_path, method, count, operations, removals):
    counts = processes.in_its_own_process(tmp_path / "cache", method, count, operations, 0, removals)
    assert counts["rows hit on disk"] > 0
    assert sum(number for name, number in counts.items() if name.startswith("operations")) == count * operations
    assert bool(counts["operations: clear"] + counts["operations: prune"]) is removals
