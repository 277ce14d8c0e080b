"""Threads beside the one that trains: for work that lets go of the interpreter, and for work that can wait."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

# Rows shorter than this are done faster by one thread than handed to several.
THREADED_ROW = 16 * 1024
# What a thread takes at a time.
PART_BYTES = 2 * 1024 * 1024

T = TypeVar("T")

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def in_parts(count: int, row_bytes: int, work: Callable[[int, int], list[T]]) -> list[T]:
    """What ``work(start, stop)`` returns for all ``count`` rows, in order; by several threads where rows are large.

    The calling thread does its share, and what others do not come to.

    Parameters
    ----------
    count : int
        Rows.
    row_bytes : int
        Bytes of each.
    work : callable
        Does the rows from ``start`` to ``stop``.
    """
    rows = max(1, PART_BYTES // max(row_bytes, 1))
    parts = -(-count // rows)
    threads = torch.get_num_threads()
    if row_bytes < THREADED_ROW or min(threads, parts) < 2:
        return work(0, count)
    done: list[list[T]] = [[] for _ in range(parts)]
    turns = itertools.count()  # one step of it is never taken twice

    def take_turns() -> None:
        for part in turns:
            if part >= parts:
                return
            done[part] = work(part * rows, min(count, (part + 1) * rows))

    _with_helpers(take_turns, min(threads, parts) - 1)
    return list(itertools.chain.from_iterable(done))


def _with_helpers(take_turns: Callable[[], None], helpers: int) -> None:
    pool = _pool(helpers)
    helping = [pool.submit(take_turns) for _ in range(helpers)]
    try:
        take_turns()
    finally:
        late = [helper for helper in helping if not helper.cancel()]
        wait(late)
    for helper in late:
        helper.result()


def _pool(threads: int) -> ThreadPoolExecutor:
    # Keyed by process as well: a forked child inherits the dict but not the threads.
    key = (os.getpid(), threads)
    pool = _pools.get(key)
    if pool is None:
        pool = _pools[key] = ThreadPoolExecutor(threads, thread_name_prefix="torchcache")
    return pool


def is_alone() -> bool:
    """Whether no other thread runs code of the user's: there are none but threads of ours."""
    ours = {thread.ident for thread in threading.enumerate() if thread.name.startswith("torchcache")}
    return sys._current_frames().keys() <= {threading.get_ident(), *ours}


def yield_to_training() -> None:
    """Let this thread run when training does not need the core, where the system can say so."""
    if sys.platform == "linux":  # elsewhere a thread has no priority that is set like a process's
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
