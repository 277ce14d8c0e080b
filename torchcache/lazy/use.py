"""What the rest of torchcache does with tensors that are not loaded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils import _pytree as pytree

from torchcache.lazy import graph, stays
from torchcache.lazy.rows import Foresee, Held, Kind, Row, Rows, Source
from torchcache.lazy.tensor import LazyTensor
from torchcache.logging import warn_once

_MEANT = (graph, stays)  # their operators are registered when they are imported
_PLAIN = torch.empty(0, device="cpu")


def stack_rows(rows: Sequence[Row]) -> torch.Tensor:
    """A batch of ``rows``, not loaded where it can be."""
    if len({row.kind for row in rows}) == 1:
        return LazyTensor(
            Held(rows, rows[0].kind, torch.device("cpu")), range(len(rows)), rows[0].kind, torch.device("cpu")
        )
    return torch.stack([one_row(row).load() for row in rows])  # raises what torch raises


def lazy_rows(rows: Rows) -> torch.Tensor:
    """A batch of ``rows``, not loaded."""
    cpu = torch.device("cpu")
    return LazyTensor(Held(rows, rows.kind, cpu), range(len(rows)), rows.kind, cpu)


def one_row(row: Row) -> LazyTensor:
    """A sample's tensor."""
    cpu = torch.device("cpu")
    return LazyTensor(Held([row], row.kind, cpu), range(1), row.kind, cpu, single=True)


def digests_of(tensor: torch.Tensor, algorithm: str) -> list[bytes] | None:
    """The digest of each row, 16 bytes, where they are known without the data."""
    if type(tensor) is not LazyTensor or tensor.single:
        return None
    held = tensor.held
    if held is not None and held.data is None and type(held.rows) is Rows and held.rows.untouched:
        known = held.rows.digests
        if held.rows.source.digest == algorithm:
            span = tensor.span
            return known if len(span) == len(known) else known[span.start : span.stop]
    rows = tensor.rows
    if rows is None:
        return None
    others = {row.source.digest for row in rows} - {algorithm}
    if others:
        warn_once(
            f"samples are loaded for a mark with digest={algorithm!r}, since their loader has digest={others.pop()!r}: "
            f"torchcache.DataLoader(..., digest={algorithm!r})"
        )
        return None
    return [row.digest for row in rows]


def register(number: int, source: Source) -> None:
    """Have rows that come from workers find ``source`` by a number, as long as it lives."""
    _sources[number] = source


_sources: weakref.WeakValueDictionary[int, Source] = weakref.WeakValueDictionary()


def reduced(tensor: LazyTensor, away: type) -> Any:
    """How to pickle ``tensor`` for another process: as it is where all its rows are of a source of class ``away``.

    Rows that are loaded go with it. Of any other one the data goes.
    """
    rows = tensor.rows
    if not rows or not all(type(row.source) is away for row in rows):
        return reduce_tensor(tensor.load())  # type: ignore[no-untyped-call]
    source: Any = rows[0].source
    there = [place for place, row in enumerate(rows) if row.data is not None]
    data = torch.stack([rows[place].data for place in there]) if there else None  # type: ignore[misc]
    named = [(row.index, row.leaf, row.digest) for row in rows]
    return _rebuilt, (source.number, named, tensor.kind, tensor.single, there, data)


def _rebuilt(
    number: int, named: list[tuple[Any, int, bytes]], kind: Kind, single: bool, there: list[int], data: Any
) -> LazyTensor:
    source = _sources.get(number)
    if source is None:
        raise RuntimeError("torchcache.DataLoader: a batch came from workers of a loader that is gone")
    rows = [Row(source, index, leaf, kind, digest) for index, leaf, digest in named]
    for row, place in enumerate(there):
        rows[place].data = data[row]
    cpu = torch.device("cpu")
    return LazyTensor(Held(rows, kind, cpu), range(len(rows)), kind, cpu, single=single)


def tell(owner: Any, rows: Sequence[torch.Tensor], foresee: Callable[[], Foresee]) -> None:
    """Tell where ``rows`` come from that ``owner`` looks them up by what they are alone."""
    tensor = rows[0]
    if len(rows) > 1 or type(tensor) is not LazyTensor or tensor.held is None or tensor.held.data is not None:
        return
    held = tensor.held.rows
    if type(held) is Rows:
        held.source.learn(owner, held.leaf, foresee())
    elif tensor.span:
        first = held[tensor.span[0]]
        first.source.learn(owner, first.leaf, foresee())


def unloaded_rows(tensor: LazyTensor) -> int:
    """How many rows have no data up to now."""
    held = tensor.held
    if held is not None and held.data is None and type(held.rows) is Rows and held.rows.untouched:
        return len(tensor.span)
    rows = tensor.rows
    return 0 if rows is None else sum(row.data is None for row in rows)


def loaded(value: Any) -> Any:
    """``value`` with the tensors that its lazy ones stand for, in containers that pytrees know.

    Those that need a gradient stay, since it goes to them.
    """
    if not any(isinstance(leaf, LazyTensor) for leaf in pytree.tree_leaves(value)):
        return value
    return pytree.tree_map_only(LazyTensor, lambda lazy: lazy if lazy.requires_grad else lazy.load(), value)


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """What tells whether a call with ``tensor`` is traced: a lazy one is where its token is."""
    if type(tensor) is not LazyTensor:
        return tensor
    return _PLAIN if tensor.token is None else tensor.token
