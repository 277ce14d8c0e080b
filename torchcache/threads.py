"""Threads beside the one that trains: for work that lets go of the interpreter, and for work that can wait."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["THREADED_ROW", "in_parts", "yield_to_training"]

# Rows shorter than this are done faster by one thread than handed to several.
THREADED_ROW = 16 * 1024

T = TypeVar("T")

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def in_parts(count: int, row_bytes: int, work: Callable[[int, int], list[T]]) -> list[T]:
    """What ``work(start, stop)`` returns for all ``count`` rows, in order; by several threads where rows are large.

    Parameters
    ----------
    count : int
        Rows.
    row_bytes : int
        Bytes of each.
    work : callable
        Does the rows from ``start`` to ``stop``.
    """
    threads = min(torch.get_num_threads(), count)
    if row_bytes < THREADED_ROW or threads < 2:
        return work(0, count)
    bounds = [count * part // threads for part in range(threads + 1)]
    parts = _pool(threads).map(work, bounds[:-1], bounds[1:])
    return [item for part in parts for item in part]


def _pool(threads: int) -> ThreadPoolExecutor:
    # Keyed by process as well: a forked child inherits the dict but not the threads.
    key = (os.getpid(), threads)
    pool = _pools.get(key)
    if pool is None:
        pool = _pools[key] = ThreadPoolExecutor(threads, thread_name_prefix="torchcache")
    return pool


def yield_to_training() -> None:
    """Let this thread run when training does not need the core, where the system can say so."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)  # a thread's own priority, on Linux
