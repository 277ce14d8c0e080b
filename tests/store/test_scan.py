"""Reading ahead: each place once, whoever asks."""

import threading
import time

import numpy as np
import pytest

from torchcache.store.scan import Scan

CHUNK = 512


class Places(np.ndarray):
    """Takes so long to be cut in parts that other threads come between."""

    def __getitem__(self, index):
        time.sleep(0.002)
        return super().__getitem__(index)


@pytest.mark.parametrize("row_bytes", [4, 100_000])
def test_threads_that_ask_at_once_have_no_row_read_twice(row_bytes):
    places, read = np.arange(64 * CHUNK).view(Places), []

    def slowly(part):
        read.extend(part.tolist())
        return True

    scan = Scan(row_bytes, lambda: places, slowly)
    askers = [threading.Thread(target=lambda: [scan.ask([b""] * CHUNK) for _ in range(6)]) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    for thread in threading.enumerate():
        if thread.name == "torchcache-scan":
            thread.join()
    assert read
    assert len(read) == len(set(read))
