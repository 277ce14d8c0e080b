"""Rows that are unlike all before, in other company: what depends on neighbours for some contents shows in these."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from torchcache.batch import Batch, Subject, lacks
from torchcache.checks.chance import generators_kept
from torchcache.checks.compare import Rounding
from torchcache.checks.culprit import Run, find_culprit, mixing
from torchcache.checks.extremes import Sample
from torchcache.checks.plan import CHANGED, OTHERWISE, Plan
from torchcache.checks.probe import not_rows, select
from torchcache.context import normal_tensors
from torchcache.errors import Bypass
from torchcache.identity.written import Written
from torchcache.options import CacheOptions
from torchcache.store.select import concatenate, select_rows
from torchcache.values.take import Taken, take_outputs

Tensors = Sequence[torch.Tensor]


@contextlib.contextmanager
def undone(subject: Subject, options: CacheOptions) -> Iterator[None]:
    """Put back what a run on some rows of a call writes: the caller's run on all of them may write something else.

    Raises
    ------
    Bypass
        When it wrote.
    """
    if options.pure or lacks(subject):
        yield
        return
    written = Written(subject.module, subject.identity.outside())
    try:
        yield
    finally:
        changed = bool(written.differences())
        if changed:
            written.restore()
    if changed:
        raise Bypass(CHANGED, lasting=False, quiet=True)


def check_company(where: str, batch: Batch, plan: Plan, places: Sequence[int], computed: Tensors) -> None:
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

    Raises
    ------
    RowwiseError
        When one comes out otherwise.
    Bypass
        When the size or the structure of the output is another.
    """
    if batch.count == 1:
        return
    kept = [sample for sample in plan.extremes.samples if sample.shared == batch.shared]
    with generators_kept(), normal_tensors(), torch.no_grad():
        given = batch.rows if len(places) == batch.count else [select_rows(leaf, places) for leaf in batch.rows]
        for index in plan.extremes.beyond([*given, *computed]):
            row, mine = ([select_rows(leaf, [index]) for leaf in leaves] for leaves in (given, computed))
            # One that was computed by itself, or twice, is compared with what it is beside another.
            beside = (
                row if len(places) > 1 else [select_rows(leaf, [(places[0] + 1) % batch.count]) for leaf in batch.rows]
            )
            _compare(where, batch, plan, [row, beside], [mine], Run([*given], index))
            _compare(
                where, batch, plan, [row, *(one.rows for one in kept)], [mine, *(one.outputs for one in kept)], None
            )
            kept = plan.extremes.keep(Sample(row, mine, batch.shared))


def _compare(
    where: str, batch: Batch, plan: Plan, rows: Sequence[Tensors], known: Sequence[Tensors], run: Run | None
) -> None:
    """Compute single rows together, and compare the first ones with what is known of them."""
    if len(rows) < 2:
        return

    def original(leaves: Tensors) -> Taken:
        return take_outputs(batch.original(select(batch.taken.tensors, plan.learnt.rows, leaves)))

    def same(one: torch.Tensor, other: torch.Tensor) -> bool:
        return Rounding([one], plan.learnt.rounding.width).learn([one], [other])

    together = [concatenate(parts) for parts in zip(*rows, strict=True)]
    again = original(together)
    if not plan.fits(again, len(rows)):
        raise _otherwise(plan, again, len(rows))
    for place, outputs in enumerate(known):
        now = [leaf.narrow(0, place, 1) for leaf in plan.rows_first(again)]
        if not plan.learnt.rounding.learn(outputs, now):
            before = run if run is not None else Run([concatenate([leaf, leaf]) for leaf in rows[place]], 0)
            raise mixing(where, find_culprit(original, before, Run(together, place), same))


def _otherwise(plan: Plan, output: Taken, count: int) -> Bypass:
    """Why an output does not fit."""
    pairs = zip(output.tensors, plan.output.tensors, plan.learnt.output_dims, strict=False)
    for index, (leaf, known, dim) in enumerate(pairs):
        if leaf.ndim == known.ndim > dim and leaf.select(dim, 0).shape != known.select(dim, 0).shape:
            return not_rows(output, index, (count,), count)
    return Bypass(*OTHERWISE)
