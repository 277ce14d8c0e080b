"""Numbers that may point at rows, as the edges of a graph do: tried before a batch of fewer rows is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from torchcache.checks.compare import Narrowest, Rounding
from torchcache.checks.roles import Roles, rows_of, select
from torchcache.errors import Bypass
from torchcache.store.select import select_rows
from torchcache.values.take import Taken

Tensors = Sequence[torch.Tensor]
# Numbers below this point at rows that the smallest batch of the probe has.
_SMALLEST = 2


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
    if not any(_may_point(leaf, count) for leaf in (*tensors, *state)):
        return
    chance = torch.Generator().manual_seed(0)
    kept, replaced = torch.randperm(count, generator=chance).tensor_split(2)
    places = torch.arange(count)
    places[replaced] = kept[torch.randint(len(kept), replaced.shape, generator=chance)]
    whole = whole if whole is not None else original(tensors)
    with Narrowest() as narrowest:
        beside = original(select(tensors, roles, [select_rows(leaf, places.tolist()) for leaf in given]))
    same = beside.key == whole.key
    for one, other in zip(whole.tensors, beside.tensors, strict=True) if same else ():
        if same and count in one.shape:
            dim, chosen = one.shape.index(count), kept.to(one.device)
            pair = one.index_select(dim, chosen), other.index_select(dim, chosen) if one.shape == other.shape else one
            same = one.shape == other.shape and Rounding([one], narrowest.width).learn(pair[:1], pair[1:])
    if not same:
        raise Bypass(
            "its rows depend on others, which numbers that it is given point at",
            "mark a part that computes each row by itself, such as what comes before messages are passed in a graph",
        )


def _may_point(leaf: torch.Tensor, count: int) -> bool:
    """Whether a tensor holds numbers that could be those of rows, and others than the smallest batch has."""
    if leaf.is_floating_point() or leaf.is_complex() or leaf.dtype is torch.bool or not leaf.numel():
        return False
    return leaf.layout is torch.strided and not leaf.is_meta and _SMALLEST <= int(leaf.max()) < count
