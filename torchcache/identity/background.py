"""A thread that hashes all state again, a little at a time: it finds in the end what no version and no sample tells."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref

from torchcache.forks import without_forks
from torchcache.identity.record import Record
from torchcache.threads import yield_to_training

# The thread's share of a core, and how long it sleeps between two checks and while there is nothing to check.
SHARE = 0.0045
NAP_SECONDS = 0.05
IDLE_SECONDS = 1.0

_records: dict[int, weakref.ref[Record]] = {}


def check_in_background(record: Record) -> None:
    """Hash the tensors of ``record`` now and then, as long as it lives; what differs becomes suspect."""
    key = id(record)
    _records[key] = weakref.ref(record)
    weakref.finalize(record, _records.pop, key, None).atexit = False
    keep_checking()


class _Checker:
    """The one thread of this process."""

    def __init__(self) -> None:
        self._started = threading.Lock()  # held for good by who starts it

    def start(self) -> None:
        """Start it, unless it runs."""
        if self._started.acquire(blocking=False):
            thread = threading.Thread(target=_check_forever, name="torchcache-state", daemon=True)
            with contextlib.suppress(RuntimeError):  # the interpreter is about to end, or there are too many threads
                thread.start()

    def forget(self) -> None:
        """Start anew in a forked child, which has no thread but the one that forked."""
        self._started = threading.Lock()


_checker = _Checker()
keep_checking = _checker.start
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_checker.forget)


def _check_forever() -> None:
    yield_to_training()
    start = time.thread_time()
    while True:
        references = list(_records.values())
        for reference in references:
            for portion in _portions(reference):
                _check(reference, portion)
                spent = time.thread_time() - start
                if spent >= NAP_SECONDS * SHARE:
                    time.sleep(spent / SHARE)
                    start = time.thread_time()
        time.sleep(NAP_SECONDS if references else IDLE_SECONDS)


def _portions(reference: weakref.ref[Record]) -> list[tuple[int, int, int]]:
    record = reference()
    return [] if record is None else record.portions()


@without_forks
def _check(reference: weakref.ref[Record], portion: tuple[int, int, int]) -> None:
    """Check a portion. No reference to a storage outlives the call."""
    record = reference()
    if record is not None:
        with contextlib.suppress(MemoryError):  # what is not contiguous is copied
            record.check(*portion)
