"""Work in parts: all of it, in order, whichever threads do it."""

import multiprocessing
import threading

import pytest
import torch

from torchcache.threads import PART_BYTES, in_parts

ROW = PART_BYTES // 4


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def rows_of(count):
    return in_parts(count, ROW, lambda start, stop: list(range(start, stop)))


@pytest.mark.parametrize("count", [0, 1, 7, 64, 1000])
def test_every_row_is_done_once_and_in_order(count):
    assert rows_of(count) == list(range(count))


def test_any_thread_may_ask():
    returned = []
    thread = threading.Thread(target=lambda: returned.extend(rows_of(64)))
    thread.start()
    thread.join()
    assert returned == list(range(64))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_is_raised_reaches_the_caller(error):
    def work(start, stop):
        raise error("on purpose")

    with pytest.raises(error, match="on purpose"):
        in_parts(64, ROW, work)
    assert rows_of(64) == list(range(64))


def test_a_forked_child_has_threads_of_its_own():
    rows_of(64)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(rows_of, (64,)).get(60) == list(range(64))
