"""Where samples are loaded: in a worker, or in the process that trains; what is known of others stands beside them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from torchcache.errors import Bypass
from torchcache.lazy.rows import Kind, Row, Source
from torchcache.lazy.tensor import LazyTensor
from torchcache.lazy.use import one_row, reduced, stack_rows
from torchcache.loading.by_index import Block
from torchcache.loading.chance import Chance
from torchcache.loading.samples import Sample, alike, build, kept_index, name_of, take_sample
from torchcache.loading.together import together

# A sample taken apart, and its large tensors.
Taken = tuple["Sample | None", "list[torch.Tensor]"]


class Task(NamedTuple):
    """One batch to be made.

    Parameters
    ----------
    number : int
        Which batch of the pass it is.
    indices : object
        Of its samples, as the sampler gave them where the data set loads a batch at once; else a list.
    known : list of Sample or None, or Block
        Those samples that need not be loaded, by what is remembered of them; ``None`` where one is loaded. A block is
        a batch of which none is.
    rows : bool
        Whether the batch consists of rows that may be loaded; else it is what PyTorch's loader makes.
    source : int
        The number of the data set's source.
    learn : bool
        Whether what is loaded is to be remembered, or compared with what is.
    forgotten : int
        How often what was remembered had been dropped by then: what is known is true as long as it is not again.
    here : bool
        Whether the process that trains makes it: nothing is loaded, and no code of the user's runs.
    """

    number: int
    indices: Any
    known: list[Sample | None] | Block
    rows: bool
    source: int
    learn: bool
    forgotten: int
    here: bool


@dataclasses.dataclass
class Learnt:
    """What came out of loading.

    Parameters
    ----------
    samples : list of (object, Sample)
        Indices, and what is to be remembered of them.
    refused : str
        Why samples are not to be remembered; empty where they are.
    seconds : float
        What loading took.
    """

    samples: list[tuple[Any, Sample]]
    refused: str
    seconds: float


@dataclasses.dataclass
class Arrived:
    """One batch.

    Parameters
    ----------
    number : int
        Of its task.
    batch : object
        As the user gets it; ``None`` where it is made elsewhere.
    learnt : Learnt or None
        What the task was to learn.
    read : set of int
        Which leaves ``collate_fn`` read of samples that had not been loaded.
    changed : list
        Indices of samples that turned out to be others than those remembered: the batch is not to be used.
    """

    number: int
    batch: Any
    learnt: Learnt | None = None
    read: set[int] = dataclasses.field(default_factory=set)
    changed: list[Any] = dataclasses.field(default_factory=list)

    def pin_memory(self, device: Any = None) -> Arrived:
        """The batch in pinned memory, as PyTorch's loader asks for it."""
        return dataclasses.replace(self, batch=pinned(self.batch, device))


class ChangedError(RuntimeError):
    """A sample is not what it was, and what stands for it cannot become what it is.

    Parameters
    ----------
    index : object
        Of the sample.
    kind : Kind
        What it was.
    """

    def __init__(self, index: Any, kind: Kind) -> None:
        super().__init__(
            f"torchcache.DataLoader: sample {index!r} was {kind.dtype} of shape {kind.shape} when it was loaded first, "
            "and it has changed: begin another pass over the loader"
        )
        self.index = index


class Fetcher(Dataset[Any]):
    """Makes batches of tasks, as a data set that a loader of PyTorch indexes.

    Parameters
    ----------
    dataset : Dataset
        The user's.
    collate : callable
        Makes a batch of a list of samples.
    digest : str
        The algorithm of digests.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], digest: str) -> None:
        self.dataset, self.collate, self.digest = dataset, collate, digest
        self.collated = is_default(collate)
        self._chance: Chance | None = None

    def __getitem__(self, task: Task) -> Arrived:
        """What a worker makes."""
        if task.here:
            return Arrived(task.number, None)
        source = _Away(task.source, self)
        arrived = self.make(task, source)
        arrived.read = source.read
        arrived.changed += source.changed
        return arrived

    def make(self, task: Task, source: Source) -> Arrived:
        """The batch of ``task``, in which rows of ``source`` stand for what is not loaded."""
        wanted = task.indices
        if isinstance(task.known, Block):
            return Arrived(task.number, together(task.known, source))
        if task.rows:
            wanted = [index for index, sample in zip(task.indices, task.known, strict=True) if sample is None]
        samples, learnt, taken = self._learn(wanted, task) if len(wanted) else ([], None, [])
        described: list[tuple[Sample, list[torch.Tensor] | None]] = []
        if task.rows and taken is not None:
            parts = iter(taken)
            described = [(sample, None) if sample is not None else next(parts) for sample in task.known]
        # A loaded sample may not be understood; and PyTorch mixes dtypes, or refuses to.
        if not described or (self.collated and not alike([sample for sample, _ in described])):
            whole = samples if len(wanted) == len(task.indices) else self.load(task.indices)
            return Arrived(task.number, self.collate(whole), learnt)
        mixed = [
            _row_sample(source, index, sample, large, self.collated)
            for index, (sample, large) in zip(task.indices, described, strict=True)
        ]
        try:
            return Arrived(task.number, self.collate(mixed), learnt)
        except ChangedError as error:
            return Arrived(task.number, None, learnt, changed=[error.index])

    def load(self, indices: Sequence[Any]) -> Any:
        """The samples, from the data set, as PyTorch's loader takes them."""
        together = getattr(self.dataset, "__getitems__", None)
        return together(indices) if together else [self.dataset[index] for index in indices]

    def take_each(self, indices: Sequence[Any]) -> list[Taken]:
        """The samples, each loaded alone, and taken apart; ``None`` for one that is not understood."""
        return [self._take_one(self.load([index])) for index in indices]

    def _take_one(self, samples: Any) -> Taken:
        taken, _ = self._take(samples, 1)
        return (None, []) if taken is None else taken[0]

    def _learn(
        self, wanted: Any, task: Task
    ) -> tuple[Any, Learnt | None, list[tuple[Sample, list[torch.Tensor]]] | None]:
        """Samples, what is to be remembered of them, and how they are taken apart; ``None`` where they cannot be."""
        if not task.learn:
            return self.load(wanted), None, None
        if self._chance is None:
            self._chance = Chance(self.dataset)
        before = self._chance.states()
        start = time.perf_counter()
        samples = self.load(wanted)
        seconds = time.perf_counter() - start
        drew = before != self._chance.states()
        taken, refused = self._take(samples, len(wanted))
        if drew:
            refused = "loading them draws random numbers, as augmentation does"
        found = (
            []
            if refused or taken is None
            else list(zip(map(kept_index, wanted), [one for one, _ in taken], strict=True))
        )
        return samples, Learnt(found, refused, seconds), taken

    def _take(self, samples: Any, count: int) -> tuple[list[tuple[Sample, list[torch.Tensor]]] | None, str]:
        try:
            return [take_sample(sample, self.digest, self.collated) for sample in _listed(samples, count)], ""
        except Bypass as bypass:
            return None, bypass.reason


def _listed(samples: Any, count: int) -> list[Any]:
    if type(samples) is not list or len(samples) != count:
        raise Bypass("__getitems__ returns something other than a list of samples")
    return samples


def pinned(batch: Any, device: Any = None) -> Any:
    """A batch with its tensors in pinned memory, as PyTorch's loader pins them."""
    return torch.utils.data._utils.pin_memory.pin_memory(batch, device)  # type: ignore[no-untyped-call]


class _Away:
    """Where rows are loaded in a worker; in the process that trains, the source of the same number does it."""

    def __init__(self, number: int, fetcher: Fetcher) -> None:
        self.number, self.digest, self._fetcher = number, fetcher.digest, fetcher
        self.read: set[int] = set()
        self.changed: list[Any] = []

    def load(self, rows: Sequence[Row], *, foreign: bool) -> None:
        self.read.update(row.leaf for row in rows)
        self.changed += load_rows(rows, self._fetcher.take_each)

    def learn(self, owner: Any, leaf: int, foresee: Any) -> None:
        """Nothing is planned here."""


def load_rows(rows: Sequence[Row], load: Callable[[Sequence[Any]], Sequence[Taken]]) -> list[Any]:
    """Have ``load`` load the samples of ``rows``: indices of those that are not what is remembered of them.

    Raises
    ------
    ChangedError
        Where a sample has another shape or dtype by now, with its index.
    """
    by_name = {name_of(row.index): row.index for row in rows}
    taken = dict(zip(by_name, load([*by_name.values()]), strict=True))
    changed = []
    for row in rows:
        sample, large = taken[name_of(row.index)]
        if sample is None or row.leaf >= len(large) or sample.kinds[row.leaf] != row.kind:
            raise ChangedError(row.index, row.kind)
        row.data = large[row.leaf]
        digest = sample.digests[16 * row.leaf : 16 * row.leaf + 16]
        if digest != row.digest:
            changed.append(row.index)
        row.digest = digest
    return changed


def _row_sample(source: Any, index: Any, sample: Sample, large: list[torch.Tensor] | None, collated: bool) -> Any:
    digests = sample.digests
    index = kept_index(index)
    rows = [
        Row(source, index, leaf, kind, digests[16 * leaf : 16 * leaf + 16], None if large is None else large[leaf])
        for leaf, kind in enumerate(sample.kinds)
    ]
    return build(sample.structure, sample.values, rows if collated else [*map(one_row, rows)])


_by_class = torch.utils.data._utils.collate.default_collate_fn_map
_collate_tensors = _by_class[torch.Tensor]


def _collate_lazy(batch: Sequence[Any], *, collate_fn_map: Any = None) -> Any:
    """What a ``collate_fn`` of the user's has ``default_collate`` make of lazy tensors, unless it is told otherwise.

    PyTorch's own function has a worker write into shared memory, which loads them.
    """
    collate = (collate_fn_map or _by_class).get(torch.Tensor, _collate_tensors)
    if collate is _collate_tensors:
        return torch.stack([*batch])
    return collate(batch, collate_fn_map=collate_fn_map)


# ``default_collate`` makes one lazy tensor of rows, without one for each sample on the way.
_by_class[Row] = lambda batch, *, collate_fn_map=None: stack_rows(batch)
_by_class[LazyTensor] = _collate_lazy


def is_default(collate: Any) -> bool:
    """Whether batches of containers and tensors are made as PyTorch makes them."""
    made_by = _by_class
    module = default_collate.__module__
    containers: tuple[Any, ...] = ((), [], {})
    return (
        collate is default_collate
        and all(made_by[kind].__module__ == module for kind in (torch.Tensor, np.ndarray))
        and not any(isinstance(container, kind) for kind in made_by for container in containers)
    )


def _reduce(tensor: LazyTensor) -> Any:
    """How a lazy tensor goes from a worker to the process that trains: without data; from anywhere else, loaded."""
    return reduced(tensor, _Away)


ForkingPickler.register(LazyTensor, _reduce)
