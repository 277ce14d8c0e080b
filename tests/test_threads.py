"""Work in parts: all of it, in order, whichever threads do it; and the threads of OpenMP."""

import multiprocessing
import os
import sys
import threading
import time

import pytest
import torch

from torchcache.openmp import call_in_team
from torchcache.threads import PART_BYTES, in_parts

ROW = PART_BYTES // 4
HUNG_SECONDS = 60.0
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="torch is linked with libgomp on Linux")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def wake():
    """Run an operator in the threads of OpenMP."""
    torch.rand(1 << 20).sin()


def team_of(size):
    """The threads that work right after an operator; the system may give one of them no core at first."""
    seen = set()
    end = time.monotonic() + HUNG_SECONDS
    while not seen:
        assert time.monotonic() < end, "the threads of OpenMP are not used"
        wake()
        call_in_team(lambda: seen.add(threading.get_ident()), size)
    return seen


def fall_asleep():
    """Wait until they are not awake any more."""
    end = time.monotonic() + HUNG_SECONDS
    while call_in_team(lambda: None, 2):
        assert time.monotonic() < end, "the threads of OpenMP never sleep"
        time.sleep(0.2)


def caller(count):
    """The rows of ``count`` and the threads that did them."""
    done = in_parts(count, ROW, lambda start, stop: [(row, threading.get_ident()) for row in range(start, stop)])
    return [row for row, _ in done], {thread for _, thread in done}


@pytest.mark.parametrize("prepare", [wake, fall_asleep])
@pytest.mark.parametrize("count", [0, 1, 7, 64, 1000])
def test_every_row_is_done_once_and_in_order(prepare, count):
    prepare()
    assert caller(count)[0] == list(range(count))


@on_linux
def test_after_an_operator_the_threads_of_openmp_do_the_work():
    fall_asleep()
    team = team_of(2)
    assert len(team) == 2
    assert threading.get_ident() in team


@on_linux
def test_another_number_of_threads_is_a_team_of_its_own():
    for size in (2, 3, 2):
        torch.set_num_threads(size)
        assert len(team_of(size)) == size


def test_other_threads_than_the_main_one_have_no_team():
    wake()
    returned = []
    thread = threading.Thread(target=lambda: returned.extend((call_in_team(lambda: None, 2), *caller(64)[0])))
    thread.start()
    thread.join()
    assert returned == [False, *range(64)]


@pytest.mark.parametrize("prepare", [wake, fall_asleep])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_the_work_raises_is_raised_and_the_next_call_is_as_before(prepare, error):
    def fail(start, stop):
        if start:
            raise error
        return list(range(start, stop))

    prepare()
    with pytest.raises(error):
        in_parts(64, ROW, fail)
    prepare()
    assert caller(64)[0] == list(range(64))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_of_a_process_with_a_team_does_not_wait_for_it():
    wake()
    call_in_team(lambda: None, 2)

    def work():
        sys.exit(caller(64)[0] != list(range(64)) or call_in_team(lambda: None, 2))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(HUNG_SECONDS)
    hung = child.is_alive()
    child.kill()
    assert not hung
    assert child.exitcode == 0
