"""Read-ahead: where a run finds rows of a call on disk, the other rows of that call follow while its steps run."""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

from torchcache.logging import logger
from torchcache.threads import yield_to_training

# Rows read ahead for each row that is asked for: a run on a small part of a large cache reads little for nothing.
AHEAD = 4
CHUNK_ROWS = 512
CHUNK_BYTES = 8 * 1024 * 1024
# In order, shorter rows are read two to three times as fast as by key: steps wait for those that they allow.
IN_DATABASE = 64 * 1024

_Places = npt.NDArray[np.int64]


class Scan:
    """Reads the rows of one call into memory, some at a time, in the order in which they lie on disk.

    Parameters
    ----------
    row_bytes : int
        Bytes of a row.
    locate : callable
        Where all of them are; asked once.
    read : callable
        Puts the rows at such places into memory; ``False`` where there is no more room.
    together : int
        Rows that a place has, where rows are packed.
    """

    def __init__(
        self, row_bytes: int, locate: Callable[[], _Places], read: Callable[[_Places], bool], together: int = 1
    ) -> None:
        self._together = together
        self._chunk = max(min(CHUNK_ROWS, CHUNK_BYTES // max(row_bytes, 1)) // together, 1) * together
        self._locate = locate
        self._read = read
        self._places: _Places | None = None
        self._allowed = 0
        self._quicker = row_bytes < IN_DATABASE
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()
        self._asked = -math.inf
        self._seconds = 0.0
        self._finished = False
        self._unseen: set[bytes] = set()

    def expect(self, digests: Sequence[bytes]) -> None:
        """Note rows that come into memory before anyone asked for them."""
        self._unseen.update(digests)

    def forget(self, digests: Collection[bytes]) -> None:
        """Those of the expected rows were asked for, or in memory before."""
        self._unseen.difference_update(digests)

    def ask(self, digests: Sequence[bytes]) -> frozenset[bytes]:
        """Allow more to be read, since these rows are asked for; those of them that were read ahead, the first time."""
        if not self._finished:
            self._advance(AHEAD * len(digests))
        if not self._unseen:
            return frozenset()
        seen = self._unseen.intersection(digests)
        self._unseen.difference_update(seen)
        return frozenset(seen)

    def _advance(self, rows: int) -> None:
        """Read so many more rows, beside the coming step where that takes longer than reading them."""
        step = time.perf_counter() - self._asked
        if self._quicker and self._thread is not None:
            self._thread.join()
        self._allowed = min(self._allowed, max(rows, self._chunk)) + rows
        if self._allowed >= self._chunk and (self._thread is None or not self._thread.is_alive()):
            if self._quicker and step < self._seconds:
                self._read_allowed()
            else:
                thread = threading.Thread(target=self._run, name="torchcache-scan", daemon=True)
                _threads.add(thread)
                thread.start()
                self._thread = thread
        self._asked = time.perf_counter()

    def _run(self) -> None:
        yield_to_training()
        self._read_allowed()

    def _read_allowed(self) -> None:
        if not self._turn.acquire(blocking=False):
            return  # another thread is at it, and reads what this one allowed
        start = time.perf_counter()
        try:
            while self._allowed >= self._chunk and not (self._finished or _exiting.is_set()):
                self._allowed -= self._chunk
                if self._places is None:
                    self._places = self._locate()
                part, self._places = np.split(self._places, [self._chunk // self._together])
                self._finished = not (len(part) and self._read(part))
        except Exception:  # the rows are read when they are asked for, which says what is wrong
            logger.debug("read-ahead failed", exc_info=True)
            self._finished = True
        finally:
            self._seconds = time.perf_counter() - start
            self._turn.release()


_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_exiting = threading.Event()


def _stop() -> None:
    # Python ends such threads where they stand when it exits, which aborts the process if that is within PyTorch.
    _exiting.set()
    for thread in list(_threads):
        if thread.is_alive():
            thread.join()


atexit.register(_stop)
