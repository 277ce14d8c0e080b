"""The probe: which arguments have rows, where outputs have them, and whether row i is a function of row i alone.

Tried on real rows that differ, in small batches: a row must come out the same beside other neighbours, elsewhere,
in batches of other sizes and when repeated. What differs between batch sizes within rounding is learnt as rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import torch

from torchcache.checks.arguments import ArgumentWritten
from torchcache.checks.compare import Observed, Rounding, identical, nearly
from torchcache.checks.culprit import Run, find_culprit, mixing, unstable
from torchcache.checks.pointers import check_pointers
from torchcache.checks.roles import Roles, counts_of, guesses, rows_of, select
from torchcache.digest.rows import digest_rows
from torchcache.errors import Bypass
from torchcache.store.select import concatenate, select_rows
from torchcache.values.layout import lie_of
from torchcache.values.take import Taken

# Copies of a row that are computed together.
MOST_COPIES = 64

Tensors = Sequence[torch.Tensor]
Original = Callable[[Tensors], Taken]


class Unproven(Exception):  # noqa: N818
    """The rows at hand are too much alike to tell whether they depend on each other."""


@dataclasses.dataclass(frozen=True)
class Learnt:
    """What the probe learnt of calls of one form.

    Parameters
    ----------
    rows : tuple of (int or None)
        For each tensor argument the dimension of its rows; ``None`` where all rows share it.
    output_dims : tuple of int
        For each output the dimension of its rows.
    rounding : Rounding
        What differences between computations of a row are rounding.
    alone : bool or None
        Whether a batch of one row comes out as that row does among others; ``None`` where none was seen.
    """

    rows: Roles
    output_dims: tuple[int, ...]
    rounding: Rounding
    alone: bool | None = None


class _InconsistentError(Exception):
    """These roles do not explain what the original returns."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def learn(
    where: str,
    tensors: Tensors,
    whole: Taken | None,
    original: Original,
    *,
    batch_dim: int = 0,
    spare: Tensors | None = None,
    known: Roles | None = None,
    state: Tensors = (),
) -> tuple[Learnt, Taken]:
    """Find the roles of the arguments, and check that rows depend on nothing but themselves.

    Parameters
    ----------
    where : str
        The region, for errors.
    tensors : sequence of torch.Tensor
        The tensor arguments of a call.
    whole : Taken or None
        What the original returned for them; ``None`` where it was not run.
    original : callable
        From tensors in place of ``tensors`` to the outputs.
    batch_dim : int
        The dimension of rows that the user named.
    spare : sequence of torch.Tensor or None
        The arguments of an earlier call of the same form with one row, for neighbours where they are as long and wide.
    known : tuple or None
        The roles, where they were learnt before.
    state : sequence of torch.Tensor
        What the original reads beside its arguments.

    Returns
    -------
    learnt : Learnt
        Roles, dimensions and rounding.
    output : Taken
        An output of three rows.

    Raises
    ------
    RowwiseError
        When a row depends on another row or on chance; the message names the likely culprit.
    Unproven
        When the rows are too much alike to tell.
    Bypass
        When the original cannot run on fewer rows, or an output has no rows.
    """
    if spare is not None and not _as_large(spare, tensors, {0, batch_dim}):
        spare = None
    first: Exception | None = None
    for roles in [known] if known is not None else guesses(tensors, whole, batch_dim):
        trial = _Trial(where, tensors, whole, original, roles, state)
        try:
            return trial.learn(spare)
        except _InconsistentError as failed:
            first = first if first is not None else failed.error
        except Unproven:
            if not isinstance(first, Bypass):
                raise
            raise Bypass(first.reason, first.advice, lasting=False) from None  # rows that differ may tell
    if first is None and not all(tensor.numel() for tensor in tensors):
        raise Bypass("the batch is empty", lasting=False, quiet=True)
    try:
        raise first if first is not None else _without_rows(tensors, whole, batch_dim)
    finally:
        del first  # its traceback leads here, and would keep the batch until garbage is collected


def _without_rows(tensors: Tensors, whole: Taken | None, batch_dim: int) -> Bypass:
    """Why there are no roles to try: the output that has no rows where others have them, or that none has."""
    counts, outputs = counts_of(tensors, batch_dim), whole.tensors if whole is not None else []
    without = {count: [i for i, leaf in enumerate(outputs) if count not in leaf.shape] for count in counts if count}
    count = min(without, key=lambda count: len(without[count]), default=0)
    if whole is not None and count and len(without[count]) < len(outputs):
        return not_rows(whole, without[count][0], tuple(outputs[without[count][0]].shape), count)
    several = [count for count in counts if count > 1 and outputs and len(outputs) % count == 0]
    if several:
        return Bypass(
            f"its output holds {len(outputs)} tensors for {several[0]} rows, none of them with one row a sample",
            "stack them, padded where their lengths differ, or mark a part that returns one tensor for all samples",
        )
    small = "pass batches of two rows or more" if 1 in counts else "mark a part that returns one row a sample"
    return Bypass(
        "no argument has a first dimension that its outputs share, so there are no rows to cache",
        f"{small}, or name the dimension with mark(..., batch_dim=1)",
    )


def not_rows(taken: Taken, index: int, shape: tuple[int, ...], count: int) -> Bypass:
    """That an output has no rows, or that their size is not theirs alone."""
    if shape.count(count) == 1:
        return Bypass(
            f"the size of a row of output{taken.path(index)} depends on the other rows of the batch",
            "give all rows one length, as pad_packed_sequence does with total_length",
        )
    return Bypass(
        f"output{taken.path(index)} has shape {shape} for {count} rows, not one row a sample",
        "mark a part that returns one row a sample",
    )


def may_lie_elsewhere(tensors: Tensors, batch_dim: int) -> bool:
    """Whether one tensor has as many of something as another has rows, but not along a dimension that is tried."""
    tried = [{tensor.shape[dim] for dim in (batch_dim, 0) if tensor.ndim > dim} for tensor in tensors]
    counts = set().union(*tried) - {1}
    return any(
        size in tensor.shape and size not in mine
        for size in counts
        for tensor, mine in zip(tensors, tried, strict=True)
    )


class _Trial:
    """One guess of the roles, tried on small batches."""

    def __init__(
        self,
        where: str,
        tensors: Tensors,
        whole: Taken | None,
        original: Original,
        roles: Roles,
        state: Tensors,
    ) -> None:
        self._where = where
        self._tensors = tensors
        self._original = original
        self._roles = roles
        self._given = rows_of(tensors, roles)
        self._count = self._given[0].shape[0]
        self._single = whole if self._count == 1 else None
        self._whole = whole if self._count > 1 else None
        self._state = state
        self._lie_alike = True

    def learn(self, spare: Tensors | None) -> tuple[Learnt, Taken]:
        """What these roles explain; with rows that were made from others where there are too few, if these run."""
        try:
            check_pointers(self._tensors, self._roles, self._whole, self._original, self._state)
        except ArgumentWritten:
            raise
        except Bypass as bypass:
            raise _InconsistentError(bypass) from None
        extra = rows_of(spare, self._roles) if spare is not None else None
        try:
            return self._learn(*self._choose(extra, made=True))
        except Unproven:
            return self._learn(*self._choose(extra, made=False))

    def _learn(self, first: int, second: int, third: int) -> tuple[Learnt, Taken]:
        pair = self._run((first, second))
        # The third batch lacks the first row: what looks for a largest row must meet a batch without it.
        others = (second, third, second) if third != second else (second, first, second)
        observed = Observed()
        trio = self._run(others, observed)
        self._width = observed.width
        dims = self._dims(pair, trio)
        self._outputs = dims
        rounding = Rounding(pair.tensors, self._width)
        for known in (pair, trio) if self._whole is None else (pair, trio, self._whole):
            rounding.see(known.tensors, dims)
        self._scales = rounding.scales
        self._neighbours(pair, first, second, third)
        runs = [(place, trio, others.index(row)) for place, row in enumerate((first, second)) if row in others]
        if self._whole is not None:
            runs += [(place, self._whole, row) for place, row in enumerate((first, second)) if row < self._count]
        batches = {id(trio): others, id(self._whole): tuple(range(self._count))}
        for place, other, row in runs:
            if not rounding.learn(self._row(pair, place), self._row(other, row)):
                raise self._refusal((first, second), place, batches[id(other)], row, exact=False)
        if observed.counts and self._count > len(others):
            self._among_its_like(pair, first, second, rounding)
        return Learnt(self._roles, dims, rounding, self._comes_alone(pair, rounding)), trio

    def _among_its_like(self, pair: Taken, first: int, second: int, rounding: Rounding) -> None:
        """Where rows of a kind are counted there may be room for some: a row must come out as it does among copies."""
        places = (first,) * min(self._count, MOST_COPIES)
        copies = self._run(places)
        if copies.key != pair.key:
            raise _InconsistentError(Bypass("the structure of its output depends on the rows", ""))
        for index, dim in enumerate(self._outputs):
            if copies.tensors[index].shape[dim] != len(places):
                raise _InconsistentError(not_rows(pair, index, tuple(copies.tensors[index].shape), len(places)))
        for place in range(len(places)):
            if not rounding.learn(self._row(pair, 0), self._row(copies, place)):
                raise self._refusal((first, second), 0, places, place, exact=False)

    def _comes_alone(self, pair: Taken, rounding: Rounding) -> bool | None:
        """Whether a batch of one row came out as that row does among others; ``None`` where there was none."""
        if self._single is None:
            return None
        row, alone = self._row(pair, 0), self._single.tensors
        return self._single.key == pair.key and all(map(_alike, row, alone)) and rounding.learn(row, alone)

    def _choose(self, spare: list[torch.Tensor] | None, *, made: bool) -> tuple[int, int, int]:
        """Places of three rows that differ, of two where no more can be had."""
        digests = digest_rows(self._given, "xxh3_128")
        places = list(dict(zip(reversed(digests), reversed(range(self._count)), strict=True)).values())
        chosen = sorted({min(places), max(places)})
        chosen += [place for place in places if place not in chosen][:1]
        extra = []
        if spare is not None and len(chosen) < 3 and digest_rows(spare, "xxh3_128")[0] not in digests:
            extra.append(spare)
        self._real = True
        if made and len(chosen) + len(extra) < 3:
            source = extra[-1] if extra else [select_rows(leaf, [chosen[-1]]) for leaf in self._given]
            altered = [_altered(leaf) for leaf in source]
            if not all(map(identical, altered, source)):
                extra.append(altered)
                self._real = False
        self._pool = self._given
        for rows in extra:
            chosen.append(self._pool[0].shape[0])
            self._pool = [concatenate((leaf, row)) for leaf, row in zip(self._pool, rows, strict=True)]
        if len(chosen) < 2:
            raise Unproven
        return chosen[0], chosen[1], chosen[2] if len(chosen) > 2 else chosen[1]

    def _batch(self, places: Sequence[int]) -> list[torch.Tensor]:
        batch = select(self._tensors, self._roles, [select_rows(leaf, places) for leaf in self._pool])
        lies = [list(map(lie_of, tensors, self._roles)) for tensors in (batch, self._tensors)]
        self._lie_alike = self._lie_alike and lies[0] == lies[1]
        return batch

    def _run(self, places: Sequence[int], seen: Observed | None = None) -> Taken:
        batch = self._batch(places)
        try:
            with seen or contextlib.nullcontext():
                return self._original(batch)
        except ArgumentWritten:
            raise
        except Bypass as bypass:
            if not self._real:
                raise Unproven from bypass
            raise _InconsistentError(bypass) from None

    def _dims(self, pair: Taken, trio: Taken) -> tuple[int, ...]:
        """The dimension of each output that follows the number of rows."""
        keys = {taken.key for taken in (pair, trio, self._whole) if taken is not None}
        if len(keys) > 1:
            raise _InconsistentError(
                Bypass(
                    "a number or the structure of its output depends on the batch",
                    "mark a part that returns tensors with one row a sample",
                )
            )
        dims = []
        for index, (two, three) in enumerate(zip(pair.tensors, trio.tensors, strict=True)):
            whole = self._whole.tensors[index] if self._whole is not None else None
            found = [dim for dim in range(two.ndim) if _follows(dim, two, three, whole, self._count)]
            if len(found) != 1:
                shown = tuple((three if whole is None else whole).shape)
                count = 3 if whole is None else self._count
                raise _InconsistentError(not_rows(pair, index, shown, count))
            dims.append(found[0])
        return tuple(dims)

    def _fresh(self, leaves: list[torch.Tensor]) -> Rounding:
        """What rounding is, of which nothing was learnt but how large rows are."""
        rounding = Rounding(leaves, self._width)
        rounding.scales = self._scales
        return rounding

    def _neighbours(self, pair: Taken, first: int, second: int, third: int) -> None:
        """In a batch of the same size, other neighbours must change nothing."""
        if third == second:
            return
        beside = self._run((first, third))
        if beside.key != pair.key:
            raise _InconsistentError(Bypass("the structure of its output depends on the rows", ""))
        mine, other = self._row(pair, 0), self._row(beside, 0)
        for index, (one, another) in enumerate(zip(mine, other, strict=True)):
            if one.shape != another.shape:
                raise _InconsistentError(not_rows(pair, index, tuple(pair.tensors[index].shape), 2))
        if all(map(identical, mine, other)):
            return
        again = self._row(self._run((first, second)), 0)
        exact = all(map(identical, mine, again))
        if not exact:
            rounding = self._fresh(mine)
            if not (rounding.learn(mine, again) and rounding.learn(mine, other)):
                raise self._refusal((first, second), 0, (first, third), 0, exact=False)
        elif not all(map(nearly, mine, other, self._scales)):
            raise self._refusal((first, second), 0, (first, third), 0, exact=True)

    def _row(self, taken: Taken, place: int) -> list[torch.Tensor]:
        return [leaf.narrow(dim, place, 1) for leaf, dim in zip(taken.tensors, self._outputs, strict=True)]

    def _refusal(
        self, places: tuple[int, ...], place: int, others: tuple[int, ...], other: int, *, exact: bool
    ) -> _InconsistentError:
        """Why these roles fail: rows mix, or come out different each time."""
        if not self._lie_alike:
            why = (
                "what it computes differs where more rows than these, which cannot lie in memory as they do, are added"
            )
            return _InconsistentError(Bypass(why, "pass contiguous() arguments", lasting=False))

        def compute(rows: list[torch.Tensor]) -> Taken:
            return self._original(select(self._tensors, self._roles, rows))

        def same(a: torch.Tensor, b: torch.Tensor) -> bool:
            return identical(a, b) if exact else Rounding([a], self._width).learn([a], [b])

        here = Run([select_rows(leaf, places) for leaf in self._pool], place)
        there = Run([select_rows(leaf, others) for leaf in self._pool], other)
        mine, again = (self._row(self._run(places), place) for _ in range(2))
        if self._fresh(mine).learn(mine, again):
            return _InconsistentError(mixing(self._where, find_culprit(compute, here, there, same)))
        return _InconsistentError(unstable(self._where, find_culprit(compute, here, here, same)))


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _follows(dim: int, two: torch.Tensor, three: torch.Tensor, whole: torch.Tensor | None, count: int) -> bool:
    """Whether ``dim`` of an output has as many entries as there are rows, and nothing else of its shape changes."""
    ranks = {leaf.ndim for leaf in (two, three, whole) if leaf is not None}
    if len(ranks) > 1 or (two.shape[dim], three.shape[dim]) != (2, 3):
        return False
    if whole is not None and whole.shape[dim] != count:
        return False
    rests = {(*leaf.shape[:dim], *leaf.shape[dim + 1 :]) for leaf in (two, three, whole) if leaf is not None}
    return len(rests) == 1


def _as_large(some: Tensors, others: Tensors, dims: set[int]) -> bool:
    """Whether tensors have the dtypes and sizes of others, but along some dimensions."""
    return all(
        one.dtype == other.dtype
        and one.ndim == other.ndim
        and all(dim in dims or one.shape[dim] == other.shape[dim] for dim in range(one.ndim))
        for one, other in zip(some, others, strict=True)
    )


def _altered(leaf: torch.Tensor) -> torch.Tensor:
    """Another row of the same kind: the elements of ``leaf`` in reverse, which keeps them valid."""
    return select_rows(leaf.flatten(), range(leaf.numel() - 1, -1, -1)).reshape(leaf.shape)
