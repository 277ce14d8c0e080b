"""What a graph returns of a call: whether it can, whether that looks as it was traced, and what of it are views."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchcache import dynamo
from torchcache.errors import Bypass
from torchcache.lazy.tensor import LazyTensor
from torchcache.store.select import element_bytes
from torchcache.values.containers import KEEP_NO_CACHE, is_model_cache
from torchcache.values.layout import is_dense, share_memory

_ORDINARY = (torch.Tensor, nn.Parameter)
_VARYING = (torch.SymInt, torch.SymFloat, torch.SymBool)
_PASSED = (torch.Tensor, type(None), bool, int, float, *_VARYING)
# What a graph can return of what varies with nothing.
_CONSTANT = (str, bytes, complex, torch.dtype, torch.device, torch.layout, torch.memory_format)


def check_passed(outputs: Any, given: Sequence[Any] | None) -> None:
    """Refuse ``outputs`` that a graph cannot return.

    Parameters
    ----------
    outputs : object
        What the original returned.
    given : sequence or None
        The leaves of its arguments, where sizes are traced as some that vary. What is said beside tensors and numbers
        may depend on them then, unless it was given.

    Raises
    ------
    Bypass
        With the reason.
    """
    inner = outputs if type(outputs) in (tuple, list) else [outputs]
    if not (all(isinstance(leaf, torch.Tensor) for leaf in inner) or dynamo.passes_structures()):
        raise Bypass(f"torch {torch.__version__} passes no more than tensors and tuples of them through a graph")
    for leaf in pytree.tree_leaves(outputs, is_leaf=lambda value: type(value) is torch.Size):
        if isinstance(leaf, nn.Parameter):
            raise Bypass("its output holds a Parameter, and what an operator returns is none")
        if isinstance(leaf, torch.Tensor) and (leaf.layout is not torch.strided or leaf.is_quantized):
            raise Bypass("its output is not laid out as an operator's is")
        if isinstance(leaf, _VARYING) and not leaf.node.has_hint():
            raise Bypass("its output holds a number that follows from contents of tensors")
        if isinstance(leaf, _PASSED):
            continue
        if not isinstance(leaf, (*_CONSTANT, torch.Size)):
            advice = KEEP_NO_CACHE if is_model_cache(type(leaf)) else ""
            raise Bypass(f"its output holds a {type(leaf).__qualname__}, which a graph cannot return", advice)
        known = given is None or any(type(one) is type(leaf) and one == leaf for one in given)
        if type(leaf) is torch.Size or not known:
            raise Bypass("its output says more than numbers, which may depend on sizes")
    containers = _containers(outputs)
    written = [id(value) for value in containers if isinstance(value, (list, dict))]
    if len(set(written)) < len(written):  # their structures tell nothing of that
        raise Bypass("a list or dict stands in two places of its output")
    if dynamo.is_whole() and any(hasattr(value, "_fields") for value in containers):
        raise Bypass("its output holds a named tuple, which is not rebuilt within one graph")


def _containers(outputs: Any) -> list[Any]:
    """All containers within an output, and its leaves."""
    met: list[Any] = []

    def note(value: Any) -> bool:
        met.append(value)
        return False

    pytree.tree_leaves(outputs, is_leaf=note)
    return met


def looks_so(leaf: torch.Tensor, traced: tuple[torch.dtype, list[int | None]]) -> bool:
    """Whether an output has the dtype and, where they are fixed, the sizes that it was traced with."""
    dtype, sizes = traced
    if leaf.dtype != dtype or leaf.ndim != len(sizes):
        return False
    return all(known is None or size == known for size, known in zip(leaf.shape, sizes, strict=True))


class _OfBase(NamedTuple):
    """A number that varies: one of the base's sizes or strides, and a number that does not vary."""

    place: int
    more: int


@dataclasses.dataclass(frozen=True)
class Link:
    """An output that is another one, or a view of it. A graph takes it from that: an operator returns no views.

    Parameters
    ----------
    base : int
        Which output it is taken from.
    numbers : tuple of (int or _OfBase)
        Its sizes, its strides, and how many elements after the first of the base its first is; empty where the two are
        one object.
    """

    base: int
    numbers: tuple[int | _OfBase, ...] = ()

    def take(self, base: torch.Tensor) -> torch.Tensor:
        """The output, of ``base`` as the call returned it."""
        if not self.numbers:
            return base
        given = (*base.shape, *base.stride())
        *lie, offset = [given[each.place] + each.more if isinstance(each, _OfBase) else each for each in self.numbers]
        ndim = len(lie) // 2
        return base.as_strided(lie[:ndim], lie[ndim:], base.storage_offset() + offset)

    def holds(self, base: torch.Tensor, leaf: torch.Tensor) -> bool:
        """Whether ``leaf`` has the shape and the elements of what is taken from ``base``."""
        taken = self.take(base)
        if taken.shape != leaf.shape:
            return False
        here = (taken.data_ptr(), taken.stride()) == (leaf.data_ptr(), leaf.stride())
        return here or torch.equal(element_bytes(taken.contiguous()), element_bytes(leaf.contiguous()))


def links_of(leaves: Sequence[torch.Tensor]) -> list[Link | None]:
    """Which outputs of a call on tensors without data are others, or views of others, where it is so for all sizes."""
    return [_link(place, leaves) for place in range(len(leaves))]


def linked(given: Sequence[torch.Tensor], links: Sequence[Link | None]) -> list[torch.Tensor]:
    """All outputs, where ``given`` are those that are taken from no other."""
    rest = iter(given)
    own = [next(rest) if link is None else None for link in links]

    def output(place: int) -> torch.Tensor:
        known, link = own[place], links[place]
        if known is None and link is not None:
            known = own[place] = link.take(output(link.base))
        assert known is not None
        return known

    return [output(place) for place in range(len(links))]


def _link(place: int, leaves: Sequence[torch.Tensor]) -> Link | None:
    """Of which output one is a view: of the largest that holds it, the first of several."""
    leaf = leaves[place]
    shape, stride = _hints(leaf)
    reach = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    elements = [dynamo.hint(each.numel()) for each in leaves]
    for index in sorted(range(len(leaves)), key=lambda index: -elements[index]):
        base = leaves[index]
        if base is leaf and index < place:
            return Link(index)
        if not (share_memory(base, leaf) and is_dense(*_hints(base))):
            continue
        if index == place:  # what holds it comes before it
            return None
        offset = leaf.storage_offset() - base.storage_offset()
        numbers = _known((*leaf.shape, *leaf.stride(), offset), (*base.shape, *base.stride()))
        if numbers and 0 <= dynamo.hint(offset) < elements[index] - reach:
            return Link(index, numbers)
    return None


def _hints(leaf: torch.Tensor) -> tuple[list[int], list[int]]:
    return [*map(dynamo.hint, leaf.shape)], [*map(dynamo.hint, leaf.stride())]


def _known(numbers: Sequence[Any], of_base: Sequence[Any]) -> tuple[int | _OfBase, ...]:
    """Sizes, strides and an offset, as they are said whatever the sizes of the base; empty where they cannot be."""
    found: list[int | _OfBase] = []
    for number in numbers:
        if isinstance(number, torch.SymInt):
            more = [dynamo.more(number, other) for other in of_base]
            alike = [_OfBase(place, by) for place, by in enumerate(more) if by is not None]
            if not alike:
                return ()
            found.append(alike[0])
        else:
            found.append(number)
    return tuple(found)


def unaliased(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs that share memory neither with an input nor with each other, as the operator promises."""
    starts = [*map(torch.Tensor.data_ptr, _parts(inputs))]
    fresh = []
    for leaf in outputs:
        parts = _parts([leaf])
        storages = [part.untyped_storage() for part in parts]
        spans = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
        # Those without any memory have one address.
        shared = any(first == after or first <= start < after for first, after in spans for start in starts)
        fresh.append(leaf.clone() if shared else leaf)
        starts += map(torch.Tensor.data_ptr, parts)
    return fresh


def _parts(leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors in whose memory ``leaves`` are: of a wrapper all that it holds, of rows that are not loaded none."""
    parts = [leaf for leaf in leaves if type(leaf) in _ORDINARY and leaf.layout is torch.strided]
    for leaf in leaves if len(parts) < len(leaves) else ():
        if isinstance(leaf, LazyTensor):
            parts += _parts([leaf.load()]) if leaf.rows is None else []
        elif dynamo.is_traceable_wrapper_subclass(leaf):
            parts += _parts([getattr(leaf, name) for name in leaf.__tensor_flatten__()[0]])
        elif type(leaf) not in _ORDINARY and leaf.layout is torch.strided:
            parts.append(leaf)
    return parts
