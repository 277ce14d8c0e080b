"""``prefetch``: a data loader that lets the cache work one batch ahead of the step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from torchcache.digest.ahead import Ahead, Routes

__all__ = ["Prefetcher", "prefetch"]

B = TypeVar("B")
_END: Any = object()


class Prefetcher(Generic[B]):
    """What ``prefetch`` returns: iterates, has a length and answers for attributes as the loader does.

    Parameters
    ----------
    loader : iterable
        The data loader.
    """

    def __init__(self, loader: Iterable[B]) -> None:
        self.loader = loader
        self._routes = Routes()

    def __iter__(self) -> Iterator[B]:
        iterator = iter(self.loader)
        with Ahead(self._routes) as ahead:
            batch = next(iterator, _END)
            ahead.start(batch)
            while batch is not _END:
                ahead.use()
                failure, coming = None, _END
                try:
                    coming = next(iterator, _END)
                except Exception as error:  # it belongs after the batch at hand
                    failure = error
                ahead.start(coming)
                yield batch
                if failure is not None:
                    raise failure
                batch = coming

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # raises what the loader raises

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["loader"], name)


def prefetch(loader: Iterable[B]) -> Prefetcher[B]:
    """Read the coming batch's rows from disk, or from a server, while the current step runs.

    Works for tensors that go from the batch to the model as they are, on the CPU; rows of what is moved or changed on
    the way are read in the step as ever. The loader is asked for one batch more than was used, and must not write
    into a batch that it has given away.

    Parameters
    ----------
    loader : iterable
        A ``DataLoader``, or anything that yields batches: tensors, or tuples, lists and dicts of them.

    Returns
    -------
    Prefetcher
        The same batches in the same order, any number of times.

    Examples
    --------
    >>> for x, y in torchcache.prefetch(loader):
    ...     loss = criterion(model(x), y)
    """
    return Prefetcher(loader)
