"""Look-ahead: the coming batch's rows from beneath memory, while the current step runs.

What a batch's tensors are to a lookup is learnt from the calls seen: where all row inputs of a call were tensors of
the batch in use, the same places of the next batch will be the row inputs of its next call.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from torchcache.forks import without_forks
from torchcache.lazy.tensor import LazyTensor
from torchcache.logging import logger
from torchcache.store.found import Found
from torchcache.streams import beside, has_streams

Prepare = Callable[[Sequence[torch.Tensor]], Found | None]
Routes = weakref.WeakKeyDictionary[Any, tuple[list[int], Prepare]]


class Ahead:
    """Works one batch ahead of the step, on a thread of its own, for one pass over a loader.

    Parameters
    ----------
    routes : mapping
        What was learnt in earlier passes, to be added to: for each owner, which tensors of a batch are its rows.
    """

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._batch: list[torch.Tensor] = []
        self._coming: tuple[list[torch.Tensor], dict[int, Future[Found | None]]] = ([], {})
        self._work: dict[int, Future[Found | None]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="torchcache-ahead")

    def __enter__(self) -> Ahead:
        with _lock:
            _active.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        with _lock:
            _active.remove(self)
        self._batch, self._work, self._coming = [], {}, ([], {})
        self._pool.shutdown(wait=False, cancel_futures=True)

    def start(self, tensors: list[torch.Tensor]) -> None:
        """Begin with the work for the batch of these tensors, which comes next."""
        work = {}
        for owner, (places, prepare) in list(self._routes.items()):
            if max(places) < len(tensors):
                rows = [tensors[place] for place in places]
                work[id(owner)] = self._pool.submit(_prepare, rows, prepare)
        self._coming = (tensors, work)

    def use(self) -> None:
        """The batch that was started last is now the one in use."""
        self._batch, self._work = self._coming

    def prepared(self, owner: Any) -> Found | None:
        """What was found ahead for a call of ``owner``."""
        future = self._work.get(id(owner))
        if future is None:
            return None
        try:
            return future.result()
        except Exception:  # what fails ahead is done by the call itself, which says what is wrong
            logger.debug("look-ahead failed", exc_info=True)
            return None

    def learn(self, owner: Any, rows: Sequence[torch.Tensor], prepare: Prepare) -> None:
        """Note how to prepare calls of ``owner``, if ``rows`` are tensors of the batch in use."""
        places = []
        for row in rows:
            place = next((place for place, tensor in enumerate(self._batch) if _same_memory(row, tensor)), None)
            if place is None:
                self._routes.pop(owner, None)
                return
            places.append(place)
        if places:
            self._routes[owner] = (places, prepare)


_active: list[Ahead] = []
_lock = threading.Lock()


def prepared(owner: Any) -> Found | None:
    """What any look-ahead found for a call of ``owner``, under keys that may not be those that it asks for."""
    if not _active:
        return None
    return next((found for ahead in _active if (found := ahead.prepared(owner)) is not None), None)


def learn(owner: Any, rows: Sequence[torch.Tensor], prepare: Callable[[], Prepare]) -> None:
    """Tell every look-ahead of a call; ``prepare`` is asked only where there is one."""
    for ahead in list(_active):
        ahead.learn(owner, rows, prepare())


@without_forks
def _prepare(rows: list[torch.Tensor], prepare: Prepare) -> Found | None:
    with beside(rows[0].device) if has_streams(rows[0].device) else contextlib.nullcontext():
        return prepare(rows)


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other or LazyTensor in (type(one), type(other)):  # one that is not loaded has no address
        return one is other
    return (
        one.data_ptr() == other.data_ptr()
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.device == other.device
    )
