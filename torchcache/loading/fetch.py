"""Where samples are loaded: in a worker, or in the process that trains; what is known of others stands beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from torchcache.errors import Bypass
from torchcache.lazy.rows import Row, Source
from torchcache.lazy.tensor import LazyTensor
from torchcache.lazy.use import one_row, reduced, stack_rows
from torchcache.loading.samples import Sample, build, same_values, take_sample

__all__ = ["Arrived", "Fetcher", "Learnt", "Task", "assemble", "load_rows", "pinned"]

# Samples that each of the first tasks loads twice.
TWICE = 4


class Task(NamedTuple):
    """One batch to be made.

    Parameters
    ----------
    number : int
        Which batch of the pass it is.
    indices : list
        Of its samples.
    known : list of Sample or None
        Those samples that need not be loaded, by what is remembered of them; ``None`` where nothing is.
    source : int
        The number of the data set's source.
    learn : bool
        Whether what is loaded is to be remembered.
    twice : bool
        Whether some samples are loaded twice, with other random numbers, to see whether they differ.
    forgotten : int
        How often what was remembered had been dropped by then: what is known is true as long as it is not again.
    """

    number: int
    indices: list[Any]
    known: list[Sample | None] | None
    source: int
    learn: bool
    twice: bool
    forgotten: int


@dataclasses.dataclass
class Learnt:
    """What came out of loading for the first time.

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
    """One batch."""

    number: int
    batch: Any
    learnt: Learnt | None

    def pin_memory(self, device: Any = None) -> Arrived:
        """The batch in pinned memory, as PyTorch's loader asks for it."""
        return dataclasses.replace(self, batch=pinned(self.batch, device))


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
        self.collated = collate is default_collate

    def __getitem__(self, task: Task) -> Arrived:
        if task.known == []:  # made where all that it needs is
            return Arrived(task.number, None, None)
        known = task.known or [None] * len(task.indices)
        wanted = [index for index, sample in zip(task.indices, known, strict=True) if sample is None]
        before = _states() if task.learn else None
        start = time.perf_counter()
        samples = self.load(wanted) if wanted else []
        seconds = time.perf_counter() - start
        drew = before is not None and before != _states()
        learnt = None
        taken: list[tuple[Sample, list[torch.Tensor]]] | None = None
        if task.learn or (task.known is not None and samples):
            taken, refused = self._take(samples)
            if drew:
                refused = "loading them draws random numbers, as augmentation does"
            elif not refused and task.twice and taken is not None:
                refused = self._differs(wanted[:TWICE], taken)
            if task.learn:
                found = [] if refused or taken is None else list(zip(wanted, [one for one, _ in taken], strict=True))
                learnt = Learnt(found, refused, seconds)
        if task.known is not None and taken is not None:
            source = _Here(task.source, self)
            parts = iter(zip(wanted, taken, strict=True))
            samples = []
            for index, sample in zip(task.indices, known, strict=True):
                if sample is None:
                    index, (described, large) = next(parts)
                    samples.append(_row_sample(source, index, described, large, self.collated))
                else:
                    samples.append(_row_sample(source, index, sample, None, self.collated))
        elif task.known is not None:  # a loaded sample is not understood: nothing is left out
            samples = self.load(task.indices)
        return Arrived(task.number, self.collate(samples), learnt)

    def load(self, indices: Sequence[Any]) -> list[Any]:
        """The samples, from the data set, as PyTorch's loader takes them."""
        together = getattr(self.dataset, "__getitems__", None)
        return list(together([*indices])) if together else [self.dataset[index] for index in indices]

    def _take(self, samples: Sequence[Any]) -> tuple[list[tuple[Sample, list[torch.Tensor]]] | None, str]:
        try:
            return [take_sample(sample, self.digest, self.collated) for sample in samples], ""
        except Bypass as bypass:
            return None, bypass.reason

    def _differs(self, indices: Sequence[Any], taken: Sequence[tuple[Sample, Any]]) -> str:
        with _other_chance():
            again, refused = self._take(self.load(indices))
        if again is None or any(
            one != other._replace(values=one.values) or not same_values(one.values, other.values)
            for (one, _), (other, _) in zip(taken, again, strict=False)
        ):
            return refused or "a sample that was loaded twice differed, as it does under augmentation"
        return ""


def pinned(batch: Any, device: Any = None) -> Any:
    """A batch with its tensors in pinned memory, as PyTorch's loader pins them."""
    return torch.utils.data._utils.pin_memory.pin_memory(batch, device)  # type: ignore[no-untyped-call]


class _Here:
    """Where rows are loaded in the process that makes a batch; elsewhere the source of the same number does it."""

    def __init__(self, number: int, fetcher: Fetcher) -> None:
        self.number, self.digest, self._fetcher = number, fetcher.digest, fetcher

    def load(self, rows: Sequence[Row], *, foreign: bool) -> None:
        load_rows(rows, self._fetcher)

    def learn(self, owner: Any, leaf: int, foresee: Any) -> None:
        """Nothing is planned here."""


def load_rows(rows: Sequence[Row], fetcher: Fetcher, load: Callable[[Sequence[Any]], list[Any]] | None = None) -> bool:
    """Load the samples of ``rows``. Whether they are what is remembered of them.

    Raises
    ------
    RuntimeError
        Where a sample has another shape or dtype by now.
    """
    indices = list(dict.fromkeys(row.index for row in rows))
    samples = (load or fetcher.load)(indices)
    taken = dict(zip(indices, [take_sample(one, fetcher.digest, fetcher.collated) for one in samples], strict=True))
    same = True
    for row in rows:
        sample, large = taken[row.index]
        if row.leaf >= len(large) or sample.kinds[row.leaf] != row.kind:
            raise RuntimeError(
                f"torchcache.DataLoader: sample {row.index!r} was {row.kind.dtype} of shape {row.kind.shape} when it "
                "was loaded first, and it has changed: make a new loader"
            )
        row.data = large[row.leaf]
        digest = sample.digests[16 * row.leaf : 16 * row.leaf + 16]
        same = same and digest == row.digest
        row.digest = digest
    return same


def assemble(task: Task, source: Source, collate: Callable[[list[Any]], Any]) -> Any:
    """A batch of which no sample is loaded."""
    assert task.known is not None
    collated = collate is default_collate
    pairs = zip(task.indices, task.known, strict=True)
    return collate(
        [_row_sample(source, index, sample, None, collated) for index, sample in pairs if sample is not None]
    )


def _row_sample(source: Any, index: Any, sample: Sample, large: list[torch.Tensor] | None, collated: bool) -> Any:
    kinds, digests = sample.kinds, sample.digests
    rows = [
        Row(source, index, leaf, kind, digests[16 * leaf : 16 * leaf + 16], None if large is None else large[leaf])
        for leaf, kind in enumerate(kinds)
    ]
    return build(sample.structure, sample.values, rows if collated else [*map(one_row, rows)])


# ``default_collate`` makes one lazy tensor of rows, without one for each sample on the way.
torch.utils.data._utils.collate.default_collate_fn_map[Row] = lambda batch, *, collate_fn_map=None: stack_rows(batch)


def _reduce(tensor: LazyTensor) -> Any:
    """How a lazy tensor goes from a worker to the process that trains: without data; from anywhere else, loaded."""
    return reduced(tensor, _Here)


ForkingPickler.register(LazyTensor, _reduce)


def _states() -> list[Any]:
    name, key, *rest = np.random.get_state()
    return [torch.get_rng_state().numpy().tobytes(), random.getstate(), name, bytes(key), rest]  # type: ignore[arg-type]


@contextlib.contextmanager
def _other_chance() -> Iterator[None]:
    """Other random numbers than those of training, whose generators are put back."""
    held = torch.get_rng_state(), random.getstate(), np.random.get_state()
    seed = random.Random().getrandbits(32)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(held[0])
        random.setstate(held[1])
        np.random.set_state(held[2])
