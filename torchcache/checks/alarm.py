"""What it means that a row comes out otherwise when it is computed again: rounding, stale rows, or rows that mix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch

from torchcache.checks.compare import Rounding, difference
from torchcache.counters import Counters
from torchcache.store.precision import EXACT, Loss

# What an alarm means, for people.
_AGAIN = "; its rows are computed again, and kept in memory only"
STALE = "its program or its weights changed in a way that cannot be seen, or rows now depend on others" + _AGAIN
DEFERRED = "what was built is not what its rows came from, here and before it was built: name it otherwise" + _AGAIN
MIXED = "its rows depend on each other or on chance; it is computed from now on"

Tensors = list[torch.Tensor]

# Rows that differ of which it is found out why.
MOST_SUSPECTS = 2


class Otherwise(Exception):  # noqa: N818 - whoever has rows computed again makes of it what it means
    """Rows that are computed again come in another structure, or with another number."""


@dataclasses.dataclass(frozen=True)
class Alarm:
    """Rows were served that the original does not give.

    Parameters
    ----------
    stale : bool
        Whether they come from another program or other weights; else rows depend on their company, or on chance.
    found : str
        What differed and by how much, for people.
    """

    stale: bool
    found: str


ANOTHER = Alarm(True, "the structure, a shape or a number of its output is another")


@dataclasses.dataclass(frozen=True)
class Recomputation:
    """Rows that were served, and how to compute them again.

    Parameters
    ----------
    served : list of torch.Tensor
        The outputs of a call, rows first.
    count : int
        The number of rows.
    computed : frozenset of int
        Places of rows that were computed in this call.
    compute : callable
        From places of rows to what the original computes for them together, rows first.
    whole : callable
        What the original computes for the whole batch, rows first.
    rounding : Rounding
        What differences are rounding.
    losses : sequence of Loss
        What storing a row may change, for each output.
    counters : Counters
        Where the error of what was served is noted.
    """

    served: Tensors
    count: int
    computed: frozenset[int]
    compute: Callable[[Sequence[int]], Tensors]
    whole: Callable[[], Tensors]
    rounding: Rounding
    losses: Sequence[Loss]
    counters: Counters


def inspect(again: Recomputation, places: Sequence[int]) -> Alarm | None:
    """Compute the rows at ``places`` again, and confirm a difference in other company before it is an alarm."""
    try:
        return _inspect(again, places)
    except Otherwise:
        return ANOTHER


def _inspect(again: Recomputation, places: Sequence[int]) -> Alarm | None:
    again.rounding.see(again.served, [0] * len(again.served))
    served = _rows(again.served, places)
    first = _rows(again.compute(places), range(len(places)))
    losses = again.losses
    wrong = [index for index, row in enumerate(served) if not again.rounding.agree(row, first[index], losses)]
    if not wrong:
        _note_errors(again, [index for index, place in enumerate(places) if place not in again.computed], served, first)
        return None
    wrong = wrong[:MOST_SUSPECTS]
    # Fewer rows and another one, in another order: of all rows of a batch the mean would be the same once more.
    suspects = [places[index] for index in wrong]
    more = [place for place in places if place not in suspects]
    others = [place for place in range(again.count) if place not in places][:1]
    company = [*reversed(suspects), *more[: (len(more) + 1) // 2], *others]
    second = dict(zip(wrong, _rows(again.compute(company), map(company.index, suspects)), strict=True))
    whole = _rows(again.whole(), places)
    for index in wrong:
        apart = again.rounding.disagreement(served[index], first[index], losses)
        assert apart is not None
        output, share = apart
        found = f"output {output} of a row differs by {share:.2g} of its largest magnitude"
        if served[index][output].shape != first[index][output].shape:
            found = f"the shape of output {output} of a row depends on the other rows of the batch"
        alike = again.rounding.agree(first[index], second[index]) and again.rounding.agree(first[index], whole[index])
        if alike and places[index] not in again.computed:
            return Alarm(True, found)
        if not again.rounding.agree(served[index], second[index], losses) or not alike:
            return Alarm(False, found)
    return None


def _note_errors(again: Recomputation, hits: Sequence[int], served: list[Tensors], first: list[Tensors]) -> None:
    """Take note of how far rows that were served are from what they should be, where the store rounds."""
    for output, loss in enumerate(again.losses):
        if loss != EXACT:
            for index in hits:
                again.counters.note_error(difference(served[index][output], first[index][output])[1])


def _rows(leaves: Tensors, places: Iterable[int]) -> list[Tensors]:
    """Each of the rows at ``places``."""
    return [[leaf[place : place + 1] for leaf in leaves] for place in places]
