"""``DataLoader``: PyTorch's loader, that loads no sample which nothing but a cached model looks at."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import data

from torchcache.errors import ArgumentError
from torchcache.loading.by_index import Block
from torchcache.loading.fetch import Arrived, Fetcher, Task, is_default, pinned
from torchcache.loading.reader import Reader, Workers, as_it_is, initialised
from torchcache.loading.remembered import Remembered
from torchcache.options import CacheOptions
from torchcache.reports.stats import LoaderStats


class DataLoader(data.DataLoader[Any]):
    """PyTorch's ``DataLoader``, that loads a sample only where something other than a cached model looks at it.

    In the first epoch samples are loaded as always, and their digests are remembered. In later ones a batch holds lazy
    tensors in place of the large ones: they have shape, dtype and device, they can be moved, sliced and stacked, and a
    cached model finds its rows by their digests. Any other use loads the data, through the same data set. Small tensors
    (less than 1 KB), numbers and texts are remembered as they are. Rows that the cache lacks are loaded ahead, by the
    workers.

    Nothing is left out where loading draws random numbers, where a sample that is loaded twice differs, or where a
    sample holds what is not understood; that is said once. In every epoch some samples are loaded again and compared.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset
        A map-style data set.
    *args, **kwargs
        As PyTorch's loader takes them.
    dataset_id : str or None
        Your own name for the data set, with its version, transforms and files, in place of its code and attributes.
    check : float
        Share of the samples that is loaded again in each epoch and compared: at least 8 samples, within 2% of the time.
        0 turns it off.
    digest : {"xxh3_128", "blake3"}
        As the marks have it.
    persistent : bool
        Keep what is remembered in the cache directory, for later runs.
    persistent_cache_dir : str, Path or None
        The directory, as the marks have it.

    Raises
    ------
    ArgumentError
        For an iterable data set: its samples have no index by which they could be remembered. For a ``check`` that is
        no share.

    Examples
    --------
    >>> loader = torchcache.DataLoader(dataset, batch_size=256, shuffle=True, num_workers=8)
    >>> for images, labels in loader:
    ...     loss = criterion(model(images.to(device)), labels.to(device))
    """

    def __init__(
        self,
        dataset: Any,
        *args: Any,
        dataset_id: str | None = None,
        check: float = 0.005,
        digest: str = "xxh3_128",
        persistent: bool = False,
        persistent_cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(dataset, data.IterableDataset):
            raise ArgumentError(
                f"torchcache.DataLoader: {type(dataset).__name__} is iterable, so its samples have no index by which "
                "they could be remembered: make it a map-style data set, with __getitem__ and __len__"
            )
        if isinstance(check, bool) or not isinstance(check, (int, float)) or not 0 <= check <= 1:
            raise ArgumentError(f"torchcache.DataLoader: check={check!r} is no share of the samples; take 0 to 1")
        super().__init__(dataset, *args, **kwargs)
        # Trainers make a loader anew of the attributes that have the names of its arguments.
        self.dataset_id, self.check, self.digest = dataset_id, check, digest
        self.persistent, self.persistent_cache_dir = persistent, persistent_cache_dir
        self.options  # noqa: B018 - wrong values are told here
        self._iterator: Any = None
        self._remembered: Remembered | None = None

    @property
    def options(self) -> CacheOptions:
        """Where and how samples are remembered."""
        return CacheOptions(
            digest=self.digest, persistent=self.persistent, persistent_cache_dir=self.persistent_cache_dir
        )

    @property
    def remembered(self) -> Remembered:
        """What is known of the samples."""
        known = self._remembered
        if known is None or known.collate is not self.collate_fn or known.collated != is_default(self.collate_fn):
            fetcher = Fetcher(self.dataset, self.collate_fn, self.digest)
            kept = self.options if self.persistent else None
            known = Remembered(fetcher, Reader(fetcher), self.dataset_id, self.check, kept)
            self._remembered = known
            if self.batch_sampler is None:
                known.refuse("the loader makes no batches (batch_size=None)")
        return known

    def counted(self) -> LoaderStats:
        """What ``torchcache.stats`` shows."""
        known = self.remembered
        reason = known.reason
        if not reason and known.uses.ahead:
            reason = "batches are loaded ahead, since most of each is read: what reads them is not served from a cache"
        elif not (reason or known.loaded or known.skipped):
            reason = "no batch was taken from this loader; did a trainer make one of its own of it?"
        return LoaderStats(known.name, len(known), known.loaded, known.skipped, reason)

    def explained(self) -> tuple[str, list[tuple[str, str, str]]]:
        """What ``torchcache.explain`` shows."""
        return self.remembered.name, self.remembered.leaves()

    def __iter__(self) -> Any:
        self.remembered.reader.workers = Workers(
            self.num_workers, self.timeout, self.worker_init_fn, self.multiprocessing_context
        )
        self.remembered.begin()
        if self.batch_sampler is None:
            return super().__iter__()
        if not (self.persistent_workers and self.num_workers):
            return _Pass(self)
        self.remembered.copied = True
        if self._iterator is None:
            self._iterator = _Pass(self)
        else:
            self._iterator.begin(self)
        return self._iterator

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (type(self), {**self.__dict__, "_iterator": None, "_remembered": None})


class _Plan:
    """Asks the sampler for batches when PyTorch's loader asks it, and sees what of them is to be loaded."""

    def __init__(self, loader: DataLoader) -> None:
        self._remembered = loader.remembered
        # A collate_fn of the user's runs where PyTorch's loader runs it: it may draw, or use what workers have.
        self._here = not loader.num_workers or self._remembered.collated
        self._indices = iter(loader.batch_sampler)  # type: ignore[arg-type]
        self._number = 0
        self.planned: collections.deque[Task] = collections.deque()
        self.waiting: dict[int, Task] = {}

    def ask(self) -> bool:
        """One batch more; ``False`` at the end."""
        indices = next(self._indices, None)
        if indices is None:
            return False
        known = self._remembered
        if not known.at_once:
            indices = [*indices]
        found, rows = known.known(indices)
        lacking = not isinstance(found, Block) and None in found
        learn = lacking and not known.reason
        here = not lacking and self._here
        self.planned.append(Task(self._number, indices, found, rows, known.number, learn, known.forgotten, here))
        self._number += 1
        return True

    def tasks(self) -> Iterator[Task]:
        """What is planned, as it is sent to workers."""
        while self.planned or self.ask():
            task = self.planned.popleft()
            self.waiting[task.number] = task
            yield task._replace(indices=[], known=[]) if task.here else task


class _Pass:
    """One pass over the samples, batch by batch. Random numbers are drawn as PyTorch's loader draws them.

    Workers begin with the first batch that needs one. Where they persist they are those of the pass before.
    """

    def __init__(self, loader: DataLoader) -> None:
        self._seed: torch.Generator | None = None
        self._workers: data.DataLoader[Any] | None = None
        self._remembered = loader.remembered
        self.begin(loader)

    def begin(self, loader: DataLoader) -> None:
        """Start from the first batch. The loader is not held: where workers persist, it holds its pass."""
        self._remembered, self._sampler = loader.remembered, loader.batch_sampler
        self._ahead = loader.num_workers * (loader.prefetch_factor or 1)
        self._pins = loader.pin_memory and torch.accelerator.is_available()
        self._arriving: Iterator[Arrived] | None = None
        self._plan = _Plan(loader)
        if self._seed is None:
            drawn = loader.generator if loader.generator is not None else torch.default_generator
            self._seed = torch.Generator()
            self._seed.set_state(drawn.get_state())
            torch.empty((), dtype=torch.int64, device="cpu").random_(
                generator=loader.generator
            )  # PyTorch's loader draws it too
        if self._workers is None and self._ahead:
            self._workers = data.DataLoader(
                self._remembered.fetcher,
                batch_size=None,
                sampler=_Tasks(),
                num_workers=loader.num_workers,
                collate_fn=as_it_is,
                pin_memory=loader.pin_memory,
                timeout=loader.timeout,
                worker_init_fn=initialised(loader.worker_init_fn),
                multiprocessing_context=loader.multiprocessing_context,
                generator=self._seed,
                prefetch_factor=loader.prefetch_factor,
                persistent_workers=loader.persistent_workers,
                pin_memory_device=loader.pin_memory_device,
                in_order=loader.in_order,
            )
        if self._ahead and not self._remembered.leaves_out:
            self._start()  # before the sampler is asked, as PyTorch's loader does it
            return
        for _ in range(self._ahead):
            if not self._plan.ask():
                break
        if not all(task.here for task in self._plan.planned):
            self._start()

    def __iter__(self) -> _Pass:
        return self

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __del__(self) -> None:
        self._remembered.write()
        self._remembered.reader.close()

    def __next__(self) -> Any:
        self._remembered.passed()
        if self._arriving is None:
            if not self._plan.planned and not self._plan.ask():
                return self._end()
            if self._ahead and not self._plan.planned[0].here:
                self._start()
        if self._arriving is None:
            task = self._plan.planned.popleft()
            if self._ahead:
                self._plan.ask()
            return self._accepted(task, self._remembered.make(task), pin=True)
        arrived = next(self._arriving, None)
        if arrived is None:
            return self._end()
        task = self._plan.waiting.pop(arrived.number)
        if task.here:
            arrived = self._remembered.make(task)
        return self._accepted(task, arrived, pin=task.here)

    def _start(self) -> None:
        """Begin to load, as PyTorch's loader does, in its processes."""
        assert self._workers is not None
        sampler: Any = self._workers.sampler
        sampler.tasks = self._plan.tasks()
        self._arriving = iter(self._workers)

    def _accepted(self, task: Task, arrived: Arrived, pin: bool) -> Any:
        """The batch that arrived, or one made anew where what is remembered of its samples turned out to be wrong."""
        self._remembered.add(arrived)
        batch = arrived.batch
        if not self._remembered.holds(task):
            batch, pin = self._remembered.reader.batch(task.indices), True
        return pinned(batch) if pin and self._pins else batch

    def _end(self) -> Any:
        self._remembered.write()
        self._remembered.reader.close()
        raise StopIteration


class _Tasks(data.Sampler[Task]):
    """Hands out the tasks of a pass, which it is given as the pass begins."""

    tasks: Iterator[Task] = iter(())

    def __iter__(self) -> Iterator[Task]:
        return self.tasks


def _unpickled(kind: type[DataLoader], state: dict[str, Any]) -> DataLoader:
    loader = kind.__new__(kind)
    loader.__dict__.update(state)
    return loader
