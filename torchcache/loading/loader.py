"""``DataLoader``: PyTorch's loader, that loads no sample which nothing but a cached model looks at."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import data

from torchcache.errors import ArgumentError
from torchcache.loading.fetch import Arrived, Fetcher, Task, assemble, pinned
from torchcache.loading.remembered import Remembered
from torchcache.options import CacheOptions
from torchcache.reports.stats import LoaderStats

__all__ = ["DataLoader"]

# Tasks of a first pass that load some samples twice.
TWICE = 2


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
        For an iterable data set: its samples have no index by which they could be remembered.

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
        super().__init__(dataset, *args, **kwargs)
        self.dataset_id, self.check = dataset_id, check
        self.options = CacheOptions(digest=digest, persistent=persistent, persistent_cache_dir=persistent_cache_dir)
        self._remembered: Remembered | None = None
        self._tasks: _Tasks | None = None
        self._workers: data.DataLoader[Any] | None = None
        self._passes = 0

    @property
    def remembered(self) -> Remembered:
        """What is known of the samples."""
        if self._remembered is None:
            fetcher = Fetcher(self.dataset, self.collate_fn, self.options.digest)
            kept = self.options if self.options.persistent else None
            self._remembered = Remembered(fetcher, self.load_now, self.dataset_id, self.check, kept)
        return self._remembered

    def counted(self) -> LoaderStats:
        """What ``torchcache.stats`` shows."""
        known = self.remembered
        return LoaderStats(known.name, len(known), known.loaded, known.skipped, known.reason)

    def __iter__(self) -> Any:
        if self._remembered is not None and self._remembered.collate is not self.collate_fn:
            self._remembered = self._workers = None  # the user gave it another one
        if self.batch_sampler is None or self.remembered.reason:
            return super().__iter__()
        self.remembered.begin()
        if self.remembered.reason:
            return super().__iter__()
        self._passes += 1
        return _Pass(self, self._passes == 1)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {**self.__dict__, "_remembered": None, "_tasks": None, "_workers": None, "_passes": 0}
        return _unpickled, (type(self), state)

    def batches(self, tasks: Iterator[Task], generator: torch.Generator) -> Iterator[Arrived]:
        """What comes of ``tasks``, in the processes that the user asked for."""
        if self._workers is None:
            self._tasks = _Tasks()
            fetcher = Fetcher(self.dataset, self.collate_fn, self.options.digest)
            self._workers = data.DataLoader(
                fetcher,
                batch_size=None,
                sampler=self._tasks,
                num_workers=self.num_workers,
                collate_fn=_as_it_is,
                pin_memory=self.pin_memory,
                timeout=self.timeout,
                worker_init_fn=_initialised(self.worker_init_fn),
                multiprocessing_context=self.multiprocessing_context,
                prefetch_factor=self.prefetch_factor,
                persistent_workers=self.persistent_workers,
                pin_memory_device=self.pin_memory_device,
                in_order=self.in_order,
            )
        assert self._tasks is not None
        self._tasks.tasks = tasks
        self._workers.generator = generator
        return iter(self._workers)

    def load_now(self, indices: Sequence[Any]) -> list[Any]:
        """Samples at once; by workers where the user wants workers: what the data set opens may live there only."""
        fetcher = self.remembered._fetcher
        if not self.num_workers:
            return fetcher.load(indices)
        once = data.DataLoader(
            _Alone(fetcher),
            batch_size=None,
            sampler=[*indices],
            num_workers=min(self.num_workers, len(indices)),
            collate_fn=_as_it_is,
            worker_init_fn=_initialised(self.worker_init_fn),
            multiprocessing_context=self.multiprocessing_context,
            timeout=self.timeout,
            generator=torch.Generator(),
        )
        return list(once)


class _Pass:
    """One pass over the samples, batch by batch.

    The sampler is asked when PyTorch's loader asks it, and random numbers are drawn as there.
    """

    def __init__(self, loader: DataLoader, first: bool) -> None:
        self._loader = loader
        self._remembered = loader.remembered
        self._learns = not loader.remembered.reason
        self._indices = iter(loader.batch_sampler)  # type: ignore[arg-type]
        self._seeds = torch.Generator()
        drawn = loader.generator if loader.generator is not None else torch.default_generator
        if first or not (loader.persistent_workers and loader.num_workers):
            if drawn.device.type == "cpu":
                self._seeds.set_state(drawn.get_state())
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # PyTorch's loader draws it too
        self._planned: collections.deque[Task] = collections.deque()
        self._waiting: dict[int, Task] = {}
        self._arriving: Iterator[Arrived] | None = None
        self._number = self._given = 0
        self._twice = TWICE
        if loader.num_workers:
            for _ in range(loader.num_workers * (loader.prefetch_factor or 1)):
                if not self._plan():
                    break
            if any(None in (task.known or ()) for task in self._planned):
                self._start()

    def __iter__(self) -> _Pass:
        return self

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> Any:
        if self._given:
            self._remembered.passed()
        if self._arriving is None:
            if not self._planned and not self._plan():
                self._remembered.write()
                raise StopIteration
            task = self._planned[0]
            if None not in (task.known or ()):
                self._planned.popleft()
                if self._loader.num_workers:
                    self._plan()
                self._given += 1
                return self._assembled(task)
            self._start()
        assert self._arriving is not None
        arrived = next(self._arriving, None)
        if arrived is None:
            self._remembered.write()
            raise StopIteration
        self._given += 1
        task = self._waiting.pop(arrived.number)
        if arrived.learnt is not None:
            self._remembered.add(arrived.learnt)
        missing = sum(sample is None for sample in task.known or ())
        if not missing:
            return self._assembled(task)
        self._remembered.loaded += missing
        self._remembered.skipped += len(task.indices) - missing
        return arrived.batch

    def _plan(self) -> bool:
        """Ask the sampler for one batch more, and see what of it is to be loaded; ``False`` at the end."""
        indices = next(self._indices, None)
        if indices is None:
            return False
        indices = list(indices)
        known = self._remembered.known(indices)
        learn = self._learns and not self._remembered.reason and None in known
        twice = learn and self._twice > 0
        self._twice -= twice
        source, forgotten = self._remembered.number, self._remembered.forgotten
        self._planned.append(Task(self._number, indices, known, source, learn, twice, forgotten))
        self._number += 1
        return True

    def _start(self) -> None:
        """Begin to load, as PyTorch's loader does, in its processes."""
        self._arriving = self._loader.batches(self._tasks(), self._seeds)

    def _tasks(self) -> Iterator[Task]:
        while self._planned or self._plan():
            task = self._planned.popleft()
            self._waiting[task.number] = task
            known = task.known or []
            if None not in known:  # made here
                yield task._replace(indices=[], known=[])
            elif not any(map(self._remembered.get, task.indices)):  # a first time, as PyTorch's loader does it
                yield task._replace(known=None)
            else:
                yield task

    def _assembled(self, task: Task) -> Any:
        if task.forgotten == self._remembered.forgotten:
            self._remembered.skipped += len(task.indices)
            batch = assemble(task, self._remembered, self._loader.collate_fn)
        else:  # what it was planned with turned out to be out of date
            self._remembered.loaded += len(task.indices)
            batch = self._loader.collate_fn(self._loader.load_now(task.indices))
        if self._loader.pin_memory and torch.accelerator.is_available():
            batch = pinned(batch)
        return batch


class _Tasks:
    """A sampler that hands tasks out."""

    tasks: Iterator[Task] = iter(())

    def __iter__(self) -> Iterator[Task]:
        return self.tasks

    def __len__(self) -> int:
        return 0


class _Alone(data.Dataset[Any]):
    """Samples by index, for those that are loaded at once."""

    def __init__(self, fetcher: Fetcher) -> None:
        self.fetcher = fetcher

    def __getitem__(self, index: Any) -> Any:
        return self.fetcher.load([index])[0]


class _Initialised:
    """The user's ``worker_init_fn``, which finds its own data set in ``get_worker_info``."""

    def __init__(self, function: Callable[[int], None] | None) -> None:
        self.function = function

    def __call__(self, number: int) -> None:
        info: Any = data.get_worker_info()
        inner = info.dataset
        # It lets nobody change it; the user's function is to find what the user made.
        object.__setattr__(info, "dataset", inner.fetcher.dataset if isinstance(inner, _Alone) else inner.dataset)
        if self.function is not None:
            self.function(number)


def _initialised(function: Callable[[int], None] | None) -> _Initialised:
    return _Initialised(function)


def _as_it_is(arrived: Any) -> Any:
    return arrived


def _unpickled(kind: type[DataLoader], state: dict[str, Any]) -> DataLoader:
    loader = kind.__new__(kind)
    loader.__dict__.update(state)
    return loader
