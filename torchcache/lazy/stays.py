"""Operators that do not use the data of a tensor that is not loaded; what comes of it is not loaded either."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchcache.lazy.rows import Held, Row
from torchcache.lazy.tensor import STAYS, LazyTensor

__all__: list[str] = []


def _is_lazy(tensor: Any) -> bool:
    return type(tensor) is LazyTensor and tensor.held is not None and tensor.held.data is None


def _view(tensor: LazyTensor, span: range, single: bool) -> LazyTensor:
    return LazyTensor(tensor.held, span, tensor.kind, tensor.device, single=single)


def _again(tensor: LazyTensor, device: torch.device | None = None, pinned: bool = False) -> LazyTensor | None:
    """The same rows in a memory of their own."""
    device = tensor.device if device is None else device
    held = tensor.held
    if held is None or held.data is not None:
        return None
    rows = held.rows if len(tensor.span) == len(held.rows) else [held.rows[place] for place in tensor.span]
    return LazyTensor(
        Held(rows, tensor.kind, device, pinned), range(len(rows)), tensor.kind, device, single=tensor.single
    )


def _alias(tensor: LazyTensor) -> LazyTensor | None:
    if tensor.held is None:  # where a graph is traced it shares what is loaded, and written, from then on
        token, box = tensor.token, tensor.box
        return LazyTensor(None, range(0), tensor.kind, tensor.device, single=tensor.single, token=token, box=box)
    return _view(tensor, tensor.span, tensor.single) if _is_lazy(tensor) else None


def _clone(tensor: LazyTensor, *, memory_format: Any = None) -> LazyTensor | None:
    return _again(tensor) if memory_format in _ORDERS else None


def _to_copy(
    tensor: LazyTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> LazyTensor | None:
    if dtype not in (None, tensor.dtype) or layout not in (None, torch.strided) or memory_format not in _ORDERS:
        return None
    return _again(tensor, device, bool(pin_memory))


def _pin_memory(tensor: LazyTensor, device: Any = None) -> LazyTensor | None:
    return _again(tensor, pinned=True)


def _is_pinned(tensor: LazyTensor, device: Any = None) -> bool | None:
    return tensor.held.pinned if _is_lazy(tensor) and tensor.held is not None else None


def _slice(tensor: LazyTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> LazyTensor | None:
    if not _is_lazy(tensor) or tensor.single or dim not in (0, -tensor.ndim) or step != 1:
        return None
    return _view(tensor, tensor.span[slice(start, end)], False)


def _select(tensor: LazyTensor, dim: int, index: int) -> LazyTensor | None:
    if not _is_lazy(tensor) or tensor.single or dim not in (0, -tensor.ndim):
        return None
    place = tensor.span[index]
    return _view(tensor, range(place, place + 1), True)


def _unbind(tensor: LazyTensor, dim: int = 0) -> list[LazyTensor] | None:
    if not _is_lazy(tensor) or tensor.single or dim not in (0, -tensor.ndim):
        return None
    return [_view(tensor, range(place, place + 1), True) for place in tensor.span]


def _split(tensor: LazyTensor, size: Any, dim: int = 0) -> list[LazyTensor] | None:
    if not _is_lazy(tensor) or tensor.single or dim not in (0, -tensor.ndim) or not len(tensor.span):
        return None
    sizes = size if isinstance(size, (list, tuple)) else [size] * -(-len(tensor.span) // size) if size else []
    ends = list(itertools.accumulate(sizes))
    if not ends or (isinstance(size, (list, tuple)) and ends[-1] != len(tensor.span)):
        return None
    return [_view(tensor, tensor.span[end - part : end], False) for part, end in zip(sizes, ends, strict=True)]


def _unsqueeze(tensor: LazyTensor, dim: int) -> LazyTensor | None:
    if not _is_lazy(tensor) or not tensor.single or dim not in (0, -tensor.ndim - 1):
        return None
    return _view(tensor, tensor.span, False)


def _index_select(tensor: LazyTensor, dim: int, index: torch.Tensor) -> LazyTensor | None:
    if not _is_lazy(tensor) or tensor.single or dim not in (0, -tensor.ndim) or index.ndim != 1:
        return None
    places = index.tolist()
    return _picked(tensor, places) if all(place >= 0 for place in places) else None


def _index(tensor: LazyTensor, indices: Sequence[torch.Tensor | None]) -> LazyTensor | None:
    if not _is_lazy(tensor) or tensor.single or len(indices) != 1 or indices[0] is None or indices[0].ndim != 1:
        return None
    index = indices[0]
    if index.dtype not in (torch.bool, torch.int64, torch.int32):
        return None
    if index.dtype == torch.bool and len(index) != len(tensor.span):
        return None
    return _picked(tensor, (index.nonzero().flatten() if index.dtype == torch.bool else index).tolist())


def _picked(tensor: LazyTensor, places: Sequence[int]) -> LazyTensor | None:
    rows = tensor.rows
    if rows is None or any(not -len(rows) <= place < len(rows) for place in places):
        return None
    return _joined([[rows[place] for place in places]], tensor, tensor.device)


def _cat(tensors: Sequence[Any], dim: int = 0) -> LazyTensor | None:
    if not all(_is_lazy(tensor) and not tensor.single for tensor in tensors):
        return None
    return _together(tensors) if dim in (0, -tensors[0].ndim) else None


def _stack(tensors: Sequence[Any], dim: int = 0) -> LazyTensor | None:
    if not all(_is_lazy(tensor) and tensor.single for tensor in tensors):
        return None
    return _together(tensors) if dim in (0, -tensors[0].ndim - 1) else None


def _together(tensors: Sequence[LazyTensor]) -> LazyTensor | None:
    first = tensors[0]
    if any(tensor.kind != first.kind or tensor.device != first.device for tensor in tensors):
        return None
    return _joined([tensor.rows or () for tensor in tensors], first, first.device)


def _joined(parts: Sequence[Sequence[Row]], like: LazyTensor, device: torch.device) -> LazyTensor:
    rows = [row for part in parts for row in part]
    return LazyTensor(Held(rows, like.kind, device), range(len(rows)), like.kind, device)


_ORDERS = (None, torch.preserve_format, torch.contiguous_format)
_aten = torch.ops.aten
_OPERATORS: dict[Any, Callable[..., Any]] = {
    _aten.alias.default: _alias,
    _aten.cat.default: _cat,
    _aten.clone.default: _clone,
    _aten.detach.default: _alias,
    _aten.index.Tensor: _index,
    _aten.index_select.default: _index_select,
    _aten.is_pinned.default: _is_pinned,
    _aten._pin_memory.default: _pin_memory,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.stack.default: _stack,
    _aten._to_copy.default: _to_copy,
    _aten.unbind.int: _unbind,
    _aten.unsqueeze.default: _unsqueeze,
}
STAYS.update(_OPERATORS)
