"""How the sizes that a part of a graph is given follow the number of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchcache.dynamo import expression_of, hint, origin_of
from torchcache.store.select import select_rows


class Unfit(Exception):  # noqa: N818 - an outcome of the pass, which no user sees raised
    """A part of a graph cannot be cached; its text says why."""


class Rows:
    """The rows that a part of a graph was traced with.

    Traced with a symbol for them, or with what is computed from one (half a batch), it runs any number; traced with a
    fixed number it runs that many, unless it is found to be one for any.

    Parameters
    ----------
    tensors : sequence of torch.Tensor
        Its data inputs, as traced.
    sizes : sequence of (int or SymInt)
        Its size inputs, as traced.
    batch : sympy expression
        The number of rows, as traced.

    Attributes
    ----------
    first : int
        The first data input that has rows.
    fixed : int or None
        The number of rows, where it does not vary.
    least : int
        The fewest that can be run: no graph with a symbol is traced for one row.
    counts : list of (int or None)
        For each size, the data input of which it is the number of rows, or of entries where those have none.

    Raises
    ------
    Unfit
        When no number of rows but that of each call can be run.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], sizes: Sequence[Any], batch: Any) -> None:
        firsts = [expression_of(tensor.shape[0]) if tensor.ndim else None for tensor in tensors]
        if batch not in firsts:
            raise Unfit("none of its inputs has the rows that its outputs have")
        self.first = firsts.index(batch)
        # Of symbols that are as large, a graph need not say that they are the same.
        count = hint(tensors[self.first].shape[0])
        self._long = [tensor.ndim > 0 and hint(tensor.shape[0]) == count for tensor in tensors]
        self.fixed = int(batch) if batch.is_Integer else None
        self.least = 2
        # Sizes that happened to be equal get one symbol: where other dimensions have it too, it does not mean rows.
        others = {
            symbol for tensor in tensors for size in tensor.shape[1:] for symbol in expression_of(size).free_symbols
        }
        # What numbers are computed from must mean nothing else here.
        beside = [first for first in firsts if first not in (None, batch)] if not batch.is_Symbol else []
        if self.fixed is None and batch.free_symbols & others.union(*(first.free_symbols for first in beside)):
            raise Unfit("its number of rows cannot be told from other sizes")
        expressions = [*map(expression_of, sizes)]
        places = {
            first: place
            for place, first in reversed([*enumerate(firsts)])
            if first is not None and first.free_symbols and not first.free_symbols & others and self._long[place]
        }
        self.counts = [places.get(expression) if self.fixed is None else None for expression in expressions]
        if self.fixed is None and any(e != batch and batch.free_symbols & e.free_symbols for e in expressions):
            raise Unfit("a number in it is computed from the number of rows")

    def free(self) -> None:
        """Have any number be run."""
        self.least, self.fixed = min(self.fixed or 2, 2), None

    def portions(self, tensors: Sequence[torch.Tensor]) -> list[tuple[list[torch.Tensor], int | None]]:
        """``tensors`` in portions of rows that can be run, each with how many of its rows count: ``None`` for all.

        A portion is filled up with copies of its last row where there are too few.
        """
        count = tensors[self.first].shape[0]
        run = max(count, self.least) if self.fixed is None else self.fixed
        if count == run:
            return [(list(tensors), None)]
        portions: list[tuple[list[torch.Tensor], int | None]] = []
        for start in range(0, count, run):
            places = [min(row, count - 1) for row in range(start, start + run)]
            filled = [
                select_rows(tensor, places) if long and tensor.shape[0] == count else tensor
                for tensor, long in zip(tensors, self._long, strict=True)
            ]
            portions.append((filled, min(run, count - start)))
        return portions


def same_shape(given: torch.Tensor, traced: torch.Tensor) -> bool:
    """Whether shapes are the very same, as expressions: nothing here may add a guard."""
    return [*map(origin_of, given.shape)] == [*map(origin_of, traced.shape)]
