"""Rows that are unlike all before, in other company: what depends on neighbours for some contents shows in these."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchcache.batch import Batch
from torchcache.checks.chance import generators_kept
from torchcache.checks.compare import Rounding
from torchcache.checks.culprit import Run, find_culprit, mixing
from torchcache.checks.plan import OTHERWISE, Plan
from torchcache.checks.probe import not_rows
from torchcache.checks.roles import select
from torchcache.checks.undone import undone
from torchcache.context import normal_tensors
from torchcache.errors import Bypass
from torchcache.options import CacheOptions
from torchcache.store.select import concatenate, select_rows
from torchcache.values.take import Taken, take_outputs

Tensors = Sequence[torch.Tensor]


def check_company(
    where: str, batch: Batch, plan: Plan, places: Sequence[int], computed: Tensors, options: CacheOptions
) -> None:
    """Compare computed rows that are unlike all before with what they are by themselves, and beside the last such.

    Parameters
    ----------
    where : str
        The region, for errors.
    batch : Batch
        The call.
    plan : Plan
        What is known of such calls.
    places : sequence of int
        Which rows were computed.
    computed : sequence of torch.Tensor
        What they are, rows first.
    options : CacheOptions
        The region's options.

    Raises
    ------
    RowwiseError
        When one comes out otherwise.
    Bypass
        When the size or the structure of the output is another, or a run wrote.
    """
    if batch.count == 1:
        return
    with normal_tensors(), torch.no_grad():
        given = batch.rows if len(places) == batch.count else [select_rows(leaf, places) for leaf in batch.rows]
        beyond = plan.extremes.beyond([*given, *computed])
    if not beyond:
        return
    check = _Check(where, batch, plan)
    with undone(batch.given.subject, options), generators_kept(), normal_tensors(), torch.no_grad():
        before: list[tuple[Tensors, Tensors]] = []
        for index in beyond:
            row, mine = ([select_rows(leaf, [index]) for leaf in leaves] for leaves in (given, computed))
            # One that was computed by itself, or twice, is compared with what it is beside another.
            neighbour = [(places[0] + 1) % batch.count]
            beside = row if len(places) > 1 else [select_rows(leaf, neighbour) for leaf in batch.rows]
            check([row, beside], [mine], Run([*given], index))
            before = before or [(one, check.by_itself(one)) for one in plan.extremes.samples]
            if before:
                check([row, *(one for one, _ in before)], [mine, *(outputs for _, outputs in before)])
            plan.extremes.keep(row)
            before = [*before[-1:], (row, mine)]


class _Check:
    """Computes single rows together, and compares them with what is known of them."""

    def __init__(self, where: str, batch: Batch, plan: Plan) -> None:
        self._where, self._batch, self._plan = where, batch, plan

    def __call__(self, rows: Sequence[Tensors], known: Sequence[Tensors], run: Run | None = None) -> None:
        """Compare the first of ``rows`` with ``known``; the first of all was computed in ``run``, or by itself."""
        together = [concatenate(parts) for parts in zip(*rows, strict=True)]
        found = self._compute(together)
        for place, outputs in enumerate(known):
            now = [leaf.narrow(0, place, 1) for leaf in found]
            if not self._plan.learnt.rounding.learn(outputs, now):
                before = run if run is not None else Run(_twice(rows[place]), 0)
                raise mixing(self._where, find_culprit(self._original, before, Run(together, place), self._same))

    def by_itself(self, row: Tensors) -> Tensors:
        """What a row comes out as without others."""
        return [leaf.narrow(0, 0, 1) for leaf in self._compute(_twice(row))]

    def _compute(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        output, count = self._original(rows), rows[0].shape[0]
        if not self._plan.fits(output, count):
            raise _otherwise(self._plan, output, count)
        return self._plan.rows_first(output)

    def _original(self, rows: Tensors) -> Taken:
        batch = self._batch
        return take_outputs(batch.original(select(batch.taken.tensors, self._plan.learnt.rows, rows)))

    def _same(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        return Rounding([one], self._plan.learnt.rounding.width).learn([one], [other])


def _twice(row: Tensors) -> list[torch.Tensor]:
    return [concatenate([leaf, leaf]) for leaf in row]


def _otherwise(plan: Plan, output: Taken, count: int) -> Bypass:
    """Why an output does not fit."""
    pairs = zip(output.tensors, plan.output.tensors, plan.learnt.output_dims, strict=False)
    for index, (leaf, known, dim) in enumerate(pairs):
        if leaf.ndim == known.ndim > dim and leaf.select(dim, 0).shape != known.select(dim, 0).shape:
            return not_rows(output, index, (count,), count)
    return Bypass(*OTHERWISE)
