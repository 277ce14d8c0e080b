"""``prefetch``: a data loader that lets the cache work one batch ahead of the step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, Generic, TypeVar

import torch

from torchcache.digest.ahead import Ahead, Routes
from torchcache.lazy.tensor import LazyTensor
from torchcache.streams import send_ahead

__all__ = ["Prefetcher", "prefetch"]

B = TypeVar("B")
_END: Any = object()


class Prefetcher(Generic[B]):
    """What ``prefetch`` returns: iterates, has a length and answers for attributes as the loader does.

    Parameters
    ----------
    loader : iterable
        The data loader.
    device : torch.device or None
        Where its tensors go.
    """

    def __init__(self, loader: Iterable[B], device: torch.device | None = None) -> None:
        self.loader = loader
        self.device = device
        self._routes = Routes()

    def __iter__(self) -> Iterator[B]:
        iterator = iter(self.loader)
        with Ahead(self._routes) as ahead:
            batch, arrive = self._start(ahead, next(iterator, _END))
            while batch is not _END:
                ahead.use()
                failure, coming = None, _END
                try:
                    coming = next(iterator, _END)
                except Exception as error:  # it belongs after the batch at hand
                    failure = error
                arrive()
                following, arrive = self._start(ahead, coming)
                yield batch
                if failure is not None:
                    raise failure
                batch = following

    def _start(self, ahead: Ahead, batch: Any) -> tuple[Any, Callable[[], None]]:
        """Begin with a batch; itself where it belongs, and what is to be called before it is used."""
        arrive: Callable[[], None] = _nothing
        if self.device is not None:
            batch, arrive = _moved(batch, self.device)
        ahead.start(_tensors(batch))
        return batch, arrive

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # raises what the loader raises

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["loader"], name)


def prefetch(loader: Iterable[B], device: torch.device | str | None = None) -> Prefetcher[B]:
    """Read the coming batch's rows from disk, or from a server, while the current step runs.

    Works for tensors that go from the batch to the model as they are; rows of what is changed on the way are read in
    the step as ever. The loader is asked for one batch more than was used, and must not write into a batch that it has
    given away.

    Parameters
    ----------
    loader : iterable
        A ``DataLoader``, or anything that yields batches: tensors, or tuples, lists and dicts of them.
    device : torch.device, str or None
        Where the tensors are to be: they are copied there beside the current step, from pinned memory. ``None``
        leaves them where they are; what the loop then moves to a device counts as changed.

    Returns
    -------
    Prefetcher
        The same batches in the same order, any number of times.

    Examples
    --------
    >>> for x, y in torchcache.prefetch(loader, "cuda"):
    ...     loss = criterion(model(x), y)
    """
    # With its number: streams are kept by device.
    return Prefetcher(loader, torch.empty(0, device=device).device if device is not None else None)


def _nothing() -> None:
    pass


def _moved(batch: Any, device: torch.device) -> tuple[Any, Callable[[], None]]:
    """A batch whose tensors are on a device, and what is to be called before they are used."""
    plain = [tensor for tensor in _tensors(batch) if type(tensor) is not LazyTensor and tensor.is_cpu]
    sent, arrive = send_ahead(plain, device)
    there = dict(zip(map(id, plain), sent, strict=True))

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return there[id(value)] if id(value) in there else value.to(device)
        if isinstance(value, MutableMapping) and type(value) is not dict:
            moved = copy.copy(value)
            moved.update({name: move(item) for name, item in value.items()})
            return moved
        if isinstance(value, Mapping):
            return {name: move(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [move(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    return move(batch), arrive


def _tensors(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return [tensor for item in batch for tensor in _tensors(item)]
    return []
