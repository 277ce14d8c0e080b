"""Nested arguments and outputs to flat lists of tensors and back, and how outputs lie in memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchcache.errors import ArgumentError, OutputError
from torchcache.lookup.constants import constant_bytes
from torchcache.store.buffers import Buffers

__all__ = ["Layout", "Tree", "batch_size", "flatten_arguments", "flatten_outputs"]


@dataclasses.dataclass(frozen=True)
class Tree:
    """A nested structure without its tensors.

    Parameters
    ----------
    rebuild : callable
        From the list of tensors to the structure.
    constants : bytes
        Canonical bytes of everything but the tensors: containers, keys, plain values.
    """

    rebuild: Callable[[Sequence[torch.Tensor]], Any]
    constants: bytes


class _Slot:
    """Stands where a tensor was."""

    def __init__(self, index: int) -> None:
        self.index = index


def flatten_arguments(arguments: dict[str, Any], where: str) -> tuple[list[torch.Tensor], Tree]:
    """The tensors in ``arguments``, by parameter name, and the rest.

    Raises
    ------
    ArgumentError
        For a value that is neither a tensor nor a plain constant, naming its argument.
    """

    def refuse(path: str, kind: str) -> Exception:
        return ArgumentError(
            f"{where}: argument{path} is a {kind}, which cannot be part of a key: pass tensors, None, bool, int, "
            "float, str, dtype, enum, or tuples and dicts of them"
        )

    taken = _Flattening(refuse)
    parts = {name: taken.take(value, _join("", name)) for name, value in arguments.items()}
    templates = {name: template for name, (template, _) in parts.items()}
    text = _text("arguments", (name.encode() + b"=" + text for name, (_, text) in parts.items()))
    return taken.tensors, Tree(lambda leaves: _put(templates, leaves), text)


def flatten_outputs(outputs: Any, where: str) -> tuple[list[torch.Tensor], Tree, list[str]]:
    """The tensors in ``outputs``, how to rebuild the structure around others, and each tensor's path.

    Raises
    ------
    OutputError
        For an output that is neither a tensor nor a plain constant, naming it.
    """

    def refuse(path: str, kind: str) -> Exception:
        return OutputError(
            f"{where}: output{path} is a {kind}: only tensors, plain constants and containers of them can be cached"
        )

    taken = _Flattening(refuse)
    template, text = taken.take(outputs, "")
    return taken.tensors, Tree(lambda leaves: _put(template, leaves), text), taken.paths


class _Flattening:
    """Takes nested values apart, noting each tensor and its path.

    Parameters
    ----------
    refuse : callable
        From the path and type name of a value that is neither tensor nor constant to the error to raise.
    """

    def __init__(self, refuse: Callable[[str, str], Exception]) -> None:
        self.tensors: list[torch.Tensor] = []
        self.paths: list[str] = []
        self._refuse = refuse

    def take(self, value: Any, path: str) -> tuple[Any, bytes]:
        """``value`` with slots for its tensors, and canonical bytes of its structure."""
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
            self.paths.append(path)
            return _Slot(len(self.tensors) - 1), b"T"
        if type(value) is dict:
            parts = {
                key: (self._constant(key, path), *self.take(item, _join(path, key))) for key, item in _ordered(value)
            }
            text = b"".join(name + b"=" + text + b";" for name, _, text in parts.values())
            return {key: parts[key][1] for key in value}, b"{" + text + b"}"
        if type(value) in (tuple, list):
            items = [self.take(item, f"{path}[{index}]") for index, item in enumerate(value)]
            return type(value)(template for template, _ in items), _text("", (text for _, text in items))
        name = type(value).__qualname__
        if type(value) in pytree.SUPPORTED_NODES or pytree.is_namedtuple_instance(value):
            leaves, spec = pytree.tree_flatten(value, is_leaf=lambda node: node is not value)
            items = [
                self.take(leaf, _join(path, key)) for key, leaf in zip(_keys(value, len(leaves)), leaves, strict=True)
            ]
            return _Node([template for template, _ in items], spec), _text(name, (text for _, text in items))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value)]
            items = [self.take(getattr(value, field), _join(path, field)) for field in names]
            fields = dict(zip(names, (template for template, _ in items), strict=True))
            return _Record(value, fields), _text(name, (text for _, text in items))
        return value, self._constant(value, path)

    def _constant(self, value: Any, path: str) -> bytes:
        try:
            return constant_bytes(value)
        except TypeError as error:
            raise self._refuse(path, str(error)) from None


def _text(name: str, parts: Iterable[bytes]) -> bytes:
    return name.encode() + b"(" + b"".join(part + b";" for part in parts) + b")"


def _ordered(value: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Items in an order that does not depend on how the dict was filled."""
    return sorted(value.items(), key=lambda item: (type(item[0]).__name__, str(item[0])))


def _put(template: Any, leaves: Sequence[torch.Tensor]) -> Any:
    if isinstance(template, _Slot):
        return leaves[template.index]
    if type(template) is dict:
        return {key: _put(item, leaves) for key, item in template.items()}
    if type(template) in (tuple, list):
        return type(template)(_put(item, leaves) for item in template)
    if isinstance(template, _Node):
        return pytree.tree_unflatten([_put(item, leaves) for item in template.items], template.spec)
    if isinstance(template, _Record):
        return template.rebuild(leaves)
    return template


@dataclasses.dataclass
class _Node:
    """A container that torch's pytree registry knows."""

    items: list[Any]
    spec: pytree.TreeSpec


class _Record:
    """A dataclass instance: a shallow copy of it is filled anew each time."""

    def __init__(self, value: Any, fields: dict[str, Any]) -> None:
        self._value = copy.copy(value)
        for name in fields:
            object.__setattr__(self._value, name, None)
        self._fields = fields

    def rebuild(self, leaves: Sequence[torch.Tensor]) -> Any:
        record = copy.copy(self._value)
        for name, template in self._fields.items():
            object.__setattr__(record, name, _put(template, leaves))
        return record


def _keys(value: Any, count: int) -> Sequence[Any]:
    if isinstance(value, dict) and len(value) == count:
        return list(value)
    names = getattr(value, "_fields", None)
    return names if names is not None and len(names) == count else range(count)


def _join(path: str, key: Any) -> str:
    if not path and isinstance(key, str):
        return f"'{key}'" if not key.isidentifier() else f" {key!r}"
    return f"{path}[{key!r}]"


def batch_size(tensors: Sequence[torch.Tensor], where: str) -> int:
    """The number of rows: dim 0 of the first tensor that has one.

    Raises
    ------
    ArgumentError
        When no argument is a tensor with a dimension.
    """
    for tensor in tensors:
        if tensor.ndim:
            return tensor.shape[0]
    raise ArgumentError(f"{where}: no argument is a tensor with a batch dimension, so there are no rows to cache")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a leaf of the output looks like to its user.

    Parameters
    ----------
    dtype : torch.dtype
        Its dtype.
    shape : tuple of int
        Its row shape.
    order : tuple of int
        Its dimensions from the outermost to the innermost in memory; dim 0 is the batch.
    device : torch.device
        Where it lives.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, leaf: torch.Tensor) -> Layout:
        """The layout of a tensor of shape ``(B, *)``."""
        return cls(leaf.dtype, tuple(leaf.shape[1:]), memory_order(leaf.shape, leaf.stride()), leaf.device)

    def place(self, near: torch.device) -> torch.device:
        """Where a leaf goes whose inputs are on ``near``: keys are shared between the devices of one kind."""
        return near if near.type == self.device.type else self.device

    def empty(self, count: int, near: torch.device, buffers: Buffers) -> torch.Tensor:
        """A row-major tensor for ``count`` rows of a call with inputs on ``near``, its contents undefined."""
        return _empty((count, *self.shape), self.dtype, self.place(near), buffers)

    def apply(self, leaf: torch.Tensor, near: torch.device, buffers: Buffers) -> torch.Tensor:
        """``leaf``, row-major, for a call with inputs on ``near``, in this dtype and memory order."""
        place = self.place(near)
        if leaf.dtype == self.dtype and leaf.device == place and self.order == tuple(range(leaf.ndim)):
            return leaf
        turned = leaf.permute(*self.order)
        return _empty(turned.shape, self.dtype, place, buffers).copy_(turned).permute(*inverted(self.order))


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, buffers: Buffers) -> torch.Tensor:
    return buffers.empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


def dense(leaf: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """``leaf`` without gaps, its dimensions in this memory order; itself where it is so already."""
    if order == tuple(range(len(order))):
        return leaf.contiguous()
    return leaf.permute(*order).contiguous().permute(*inverted(order))


def inverted(order: Sequence[int]) -> list[int]:
    """The permutation that undoes ``order``."""
    return sorted(range(len(order)), key=order.__getitem__)


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Dimensions by falling stride; those of size one and broadcast ones keep their place where they can."""
    dims = list(range(len(shape)))
    if any(step == 0 and size > 1 for size, step in zip(shape, stride, strict=True)):
        return tuple(dims)
    real = [dim for dim in dims if shape[dim] != 1]
    ordered = sorted(real, key=lambda dim: -stride[dim])
    if ordered == real:
        return tuple(dims)
    places = iter(ordered)
    return tuple(next(places) if shape[dim] != 1 else dim for dim in dims)
