"""Samples at once: those that were left out, and are wanted all the same. Workers load them where there are workers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import data

from torchcache import dynamo
from torchcache.loading.fetch import Fetcher, Taken


class Workers(NamedTuple):
    """What a loader says of its workers: how many, how long to wait for one, and how they begin."""

    processes: int = 0
    timeout: float = 0
    begin: Callable[[int], None] | None = None
    context: Any = None


class Surroundings(NamedTuple):
    """What code in this process may compute by, wherever it is called from. Values do not depend on the last two."""

    default: torch.dtype
    autocast: bool
    lower: torch.dtype
    gradients: bool
    inference: bool

    @classmethod
    def now(cls) -> Surroundings:
        """Those of the caller."""
        default, gradients, inference = (
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        )  # fmt: skip
        autocast, lower = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return cls(default, autocast, lower, gradients, inference)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Compute as there, whatever called us."""
        with (
            dynamo.outside_dispatch(),
            torch.autocast("cpu", self.lower, self.autocast),
            torch.inference_mode(self.inference),
            torch.set_grad_enabled(self.gradients),
        ):
            yield


class Reader:
    """Loads in processes of its own, which it keeps until it is closed: what a data set opens may live in workers only.

    Parameters
    ----------
    fetcher : Fetcher
        Loads.

    Attributes
    ----------
    workers : Workers
        How many there are, and how they begin.
    surroundings : Surroundings
        Under what the loop takes its batches.
    """

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self.workers, self.surroundings = Workers(), Surroundings.now()
        # The collector may close it in the middle of a load, in the thread that loads.
        self._lock = threading.RLock()
        self._wanted: list[tuple[list[Any], bool]] = []
        self._running: data.DataLoader[Any] | None = None
        self._process = os.getpid()
        self._inherited: Any = None

    @property
    def apart(self) -> bool:
        """Whether it loads in processes of its own."""
        return self.workers.processes > 0 and not multiprocessing.current_process().daemon

    def samples(self, indices: Sequence[Any]) -> list[Taken]:
        """Samples, each loaded alone, and taken apart where that is done."""
        if not self.apart:
            with self.surroundings.entered():
                return self._fetcher.take_each(indices)
        return [one for some in self._loaded([([index], False) for index in indices]) for one in some]

    def batch(self, indices: Sequence[Any]) -> Any:
        """One batch, as PyTorch's loader makes it."""
        if not self.apart:
            return self._fetcher.collate(self._fetcher.load(indices))
        return self._loaded([([*indices], True)])[0]

    def close(self) -> None:
        """End its processes. They come back when something is wanted."""
        self._running = None

    def _loaded(self, wanted: list[tuple[list[Any], bool]]) -> list[Any]:
        if not wanted:
            return []
        if self._process != os.getpid():  # a fork of the process that made it, whose lock and workers are not ours
            self._process, self._lock = os.getpid(), threading.RLock()
            self._inherited, self._running = self._running, None
        with self._lock, self.surroundings.entered():
            running = self._running
            if running is None:
                workers = self.workers
                running = self._running = data.DataLoader(
                    _Alone(self._fetcher),
                    batch_size=None,
                    sampler=_Wanted(self._wanted),
                    num_workers=min(workers.processes, len(wanted)),
                    collate_fn=as_it_is,
                    timeout=workers.timeout,
                    worker_init_fn=initialised(workers.begin),
                    multiprocessing_context=workers.context,
                    generator=torch.Generator(),
                    persistent_workers=True,
                )
            self._wanted[:] = wanted
            try:
                return list(running)
            except BaseException:
                self._running = None
                raise


class _Wanted(data.Sampler[Any]):
    def __init__(self, wanted: list[Any]) -> None:
        self.wanted = wanted

    def __iter__(self) -> Iterator[Any]:
        return iter([*self.wanted])


class _Alone(data.Dataset[Any]):
    """Samples as lists, or made a batch of."""

    def __init__(self, fetcher: Fetcher) -> None:
        self.dataset, self._fetcher = fetcher.dataset, fetcher

    def __getitem__(self, wanted: tuple[list[Any], bool]) -> Any:
        indices, whole = wanted
        return self._fetcher.collate(self._fetcher.load(indices)) if whole else self._fetcher.take_each(indices)


class _Initialised:
    """The user's ``worker_init_fn``, which finds its own data set in ``get_worker_info``."""

    def __init__(self, function: Callable[[int], None] | None) -> None:
        self.function = function

    def __call__(self, number: int) -> None:
        info: Any = data.get_worker_info()
        # It lets nobody change it; the user's function is to find what the user made.
        object.__setattr__(info, "dataset", info.dataset.dataset)
        if self.function is not None:
            self.function(number)


def initialised(function: Callable[[int], None] | None) -> Callable[[int], None]:
    """What a worker begins with, where its data set is one of ours around the user's."""
    return _Initialised(function)


def as_it_is(made: Any) -> Any:
    """No collation: what is made is a batch already."""
    return made
