"""``prefetch``: a data loader that lets the cache work one batch ahead of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch

from torchcache.digest.ahead import Ahead, Routes
from torchcache.errors import Bypass
from torchcache.lazy.tensor import LazyTensor
from torchcache.loading.owned import gives_new_memory, mapped, owned
from torchcache.logging import warn_once
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
        kept = gives_new_memory(self.loader)
        with Ahead(self._routes) as ahead:
            batch, arrive, stays = self._start(ahead, next(iterator, _END), kept)
            while batch is not _END:
                ahead.use()
                if not stays:  # the loader may write into it as soon as it is asked again
                    arrive()
                    yield batch
                    batch, arrive, stays = self._start(ahead, next(iterator, _END), kept)
                    continue
                failure, coming = None, _END
                try:
                    coming = next(iterator, _END)
                except Exception as error:  # it belongs after the batch at hand
                    failure = error
                arrive()
                following, arrive, stays = self._start(ahead, coming, kept)
                yield batch
                if failure is not None:
                    raise failure
                batch = following

    def _start(self, ahead: Ahead, batch: Any, stays: bool) -> tuple[Any, Callable[[], None], bool]:
        """Begin with a batch: itself where it belongs, what is to be called before it is used, whether it stays so.

        ``stays`` says whether the loader leaves alone what it gave. Where it may not, the batch is copied.
        """
        arrive: Callable[[], None] = _nothing
        if batch is not _END and not stays:
            try:
                batch, stays = owned(batch, self.device), True
            except Bypass as bypass:
                warn_once(
                    f"prefetch: no rows are read ahead, since {type(self.loader).__name__} may write into a batch that "
                    f"it has given, and a copy cannot be made of {bypass.reason}: give batches of tensors, tuples, "
                    "lists and dicts, or take torch.utils.data.DataLoader with workers"
                )
        if self.device is not None:
            batch, arrive = _moved(batch, self.device, beside=stays)
        ahead.start(_tensors(batch) if stays else [])
        return batch, arrive, stays

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # raises what the loader raises

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["loader"], name)


def prefetch(loader: Iterable[B], device: torch.device | str | None = None) -> Prefetcher[B]:
    """Read the coming batch's rows from disk, or from a server, while the current step runs.

    Works for tensors that go from the batch to the model as they are; rows of what is changed on the way are read in
    the step as ever. The loader is asked for one batch more than was used. Since it may write into a batch that it has
    given, batches are copied, but for those of a list and of PyTorch's and torchcache's ``DataLoader`` with workers or
    without a ``collate_fn`` of your own; of what cannot be copied nothing is read ahead.

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


def _moved(batch: Any, device: torch.device, *, beside: bool) -> tuple[Any, Callable[[], None]]:
    """A batch whose tensors are on a device, and what is to be called before they are used.

    ``beside`` says whether they may be copied there later than this, beside the step.
    """
    plain = [tensor for tensor in _tensors(batch) if beside and type(tensor) is not LazyTensor and tensor.is_cpu]
    sent, arrive = send_ahead(plain, device)
    there = dict(zip(map(id, plain), sent, strict=True))

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return there[id(value)] if id(value) in there else value.to(device)

    return mapped(batch, move), arrive


def _tensors(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return [tensor for item in batch for tensor in _tensors(item)]
    return []
