"""Numbers that may point at rows, as the edges of a graph do: tried before a batch of fewer rows is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from torchcache.checks.compare import Observed, Rounding
from torchcache.checks.roles import Roles, rows_of, select
from torchcache.errors import Bypass
from torchcache.store.select import select_rows
from torchcache.values.take import Taken

Tensors = Sequence[torch.Tensor]
# Numbers below this point at rows that the smallest batch of the probe has.
_SMALLEST = 2
# What operators take numbers of rows as; narrower ones are weights that were quantized.
_WIDE = (torch.int32, torch.int64)


def check_pointers(
    tensors: Tensors, roles: Roles, whole: Taken | None, original: Callable[[Tensors], Taken], state: Tensors
) -> None:
    """Refuse a call whose rows depend on others that numbers point at.

    An operator that is given the number of a row that is not there may read any memory, or stop a device for good. So
    half of the rows are replaced by others first, in a batch of the same size: these must change nothing.

    Parameters
    ----------
    tensors, roles
        The tensor arguments, and which of them have rows.
    whole : Taken or None
        What the original returned for them, where it was run.
    original : callable
        From tensors in place of ``tensors`` to the outputs.
    state : sequence of torch.Tensor
        What the original reads beside them.

    Raises
    ------
    Bypass
        When they change something, or the original cannot run.
    """
    given = rows_of(tensors, roles)
    count = given[0].shape[0]
    # One number of the state counts something, as batches.
    if not any(_may_point(leaf, count) for leaf in (*tensors, *(leaf for leaf in state if leaf.ndim))):
        return
    chance = np.random.default_rng(0)
    kept, replaced = np.array_split(chance.permutation(count), 2)
    places = np.arange(count)
    places[replaced] = chance.choice(kept, len(replaced))
    whole = whole if whole is not None else original(tensors)
    with Observed() as observed:
        beside = original(select(tensors, roles, [select_rows(leaf, places.tolist()) for leaf in given]))
    if beside.key != whole.key or not all(
        _agree(one, other, kept, count, observed.width)
        for one, other in zip(whole.tensors, beside.tensors, strict=True)
    ):
        raise Bypass(
            "its rows depend on others, which numbers that it is given point at",
            "mark a part that computes each row by itself, such as what comes before messages are passed in a graph",
        )


def _may_point(leaf: torch.Tensor, count: int) -> bool:
    """Whether a tensor holds numbers that could be those of rows, and others than the smallest batch has."""
    if leaf.dtype not in _WIDE or leaf.layout is not torch.strided or leaf.is_meta or not leaf.numel():
        return False
    return _SMALLEST <= int(leaf.max()) < count


def _agree(one: torch.Tensor, other: torch.Tensor, kept: np.ndarray, count: int, width: int) -> bool:
    """Whether two outputs are the same in the rows that were kept."""
    if one.shape != other.shape:
        return False
    if count not in one.shape:  # no rows: the probe will say so
        return True
    dim, chosen = one.shape.index(count), torch.from_numpy(kept).to(one.device)
    return Rounding([one], width).learn([one.index_select(dim, chosen)], [other.index_select(dim, chosen)])
