"""Threads of one process on one directory, one model, one memory tier."""

import random
import threading

import processes
import pytest
from trained import Run

import torchcache

THREADS = 8


def together(work):
    """Call ``work`` with the numbers of as many threads; raises what one of them raised."""
    raised = []

    def run(number):
        try:
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(processes.HUNG_SECONDS)
        assert not thread.is_alive(), "a thread hangs"
    if raised:
        raise raised[0]


@pytest.mark.parametrize("shared", [True, False], ids=["one model", "a model a thread"])
def test_threads_read_and_write_right_rows_and_lose_none(tmp_path, shared):
    first = Run(tmp_path / "cache")
    seen = [(set(), set()) for _ in range(THREADS)]

    def work(number):
        chance = random.Random(number)
        run = first if shared else Run(tmp_path / "cache")
        _, *stored = processes.operate(tmp_path / "cache", 40, chance, removals=False, run=run)
        for mine, rows in zip(seen[number], stored, strict=True):
            mine.update(rows)

    together(work)
    again = Run(tmp_path / "cache")
    again.step(sorted(set().union(*(small for small, _ in seen))))
    again.step(sorted(set().union(*(large for _, large in seen))), "large")
    assert again.count("misses") == 0
    assert processes.damaged(tmp_path / "cache") == 0


def test_threads_on_a_directory_that_is_cleared_meanwhile_get_right_rows(tmp_path):
    run = Run(tmp_path / "cache")
    run.steps(20, 2)
    together(lambda number: processes.operate(tmp_path / "cache", 30, random.Random(number), removals=True, run=run))
    assert processes.damaged(tmp_path / "cache") == 0


def test_counters_add_up_over_threads(tmp_path):
    run = Run(tmp_path / "cache")

    def work(number):
        for start in range(0, 200, 20):
            run.step(range(start, start + 20))

    together(work)
    torchcache.flush()
    assert run.count("hits") + run.count("misses") == THREADS * 200
    assert run.count("rows_stored") == 200
