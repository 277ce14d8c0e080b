"""The threads of torch's OpenMP: after an operator they keep their cores busy for a while, waiting for the next one."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["call_in_team"]

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Team:
    """The OpenMP threads of the main thread, which is the one that trains.

    They are known by their clocks, which advance while they wait for work and stand still once they sleep. A sleeping
    team is left alone: on virtual machines it may take milliseconds to wake.
    """

    def __init__(self) -> None:
        self._size = 0
        self._clock: int | None = None
        self._usable = hasattr(time, "pthread_getcpuclockid")

    def call(self, body: Callable[[], None], size: int) -> bool:
        """Have each of ``size`` threads call ``body``; ``False``, and nothing is called, unless they are awake."""
        if not self._usable or threading.get_ident() != threading.main_thread().ident:
            return False
        if size == self._size and self._clock is not None and not self._is_awake(self._clock):
            return False
        enter = _parallel_region()
        if enter is None:
            self._usable = False
            return False
        self._enter(enter, body, size)
        return True

    def leave_alone(self) -> None:
        """Never call it again: a forked child has the main thread alone, and OpenMP waits for the others forever."""
        self._usable = False

    def _is_awake(self, clock: int) -> bool:
        try:
            before = time.clock_gettime_ns(clock)
            return time.clock_gettime_ns(clock) > before
        except OSError:  # the thread is gone; whoever enters next learns of its successor
            self._clock = None
            return False

    def _enter(self, enter: Callable[..., None], body: Callable[[], None], size: int) -> None:
        caller = threading.get_ident()
        clocks: list[int] = []
        done: list[int] = []
        raised: list[BaseException] = []

        def inside(_: Any) -> None:
            try:
                body()
                me = threading.get_ident()
                if me != caller:
                    clocks.append(time.pthread_getcpuclockid(me))
                done.append(me)
            except BaseException as error:
                raised.append(error)

        enter(_BODY(inside), None, size, 0)
        self._size, self._clock = size, clocks[-1] if clocks else None
        if raised:
            raise raised[0]
        if caller not in done:  # ctypes prints what comes between its own steps and goes on: an interrupt
            raise KeyboardInterrupt


@functools.cache
def _parallel_region() -> Callable[..., None] | None:
    """What GCC compiles ``#pragma omp parallel`` to, of the OpenMP that torch is linked with (libgomp's ABI)."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        enter = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    enter.argtypes, enter.restype = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return enter


_team = _Team()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_team.leave_alone)


def call_in_team(body: Callable[[], None], size: int) -> bool:
    """Have each thread of OpenMP call ``body`` where that is faster than threads of our own.

    Parameters
    ----------
    body : callable
        Lets go of the interpreter for most of its time. What it raises in any thread is raised here.
    size : int
        How many threads torch uses.

    Returns
    -------
    bool
        ``False``, and nothing is called, where torch has no such threads or they are asleep, and in threads other than
        the main one.
    """
    return _team.call(body, size)
