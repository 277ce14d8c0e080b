"""What a value consists of: text and bytes that identify it, and the values within it.

A describer yields parts: ``str`` and ``bytes`` are identity, a pair of a name and a value is a value within, to be
described in its turn. On the way it tells the watch what was read.
"""

from __future__ import annotations

import array
import collections
import enum
import functools
import os
import struct
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from torchcache.lookup.code import installed, is_installed_class, is_machinery
from torchcache.lookup.watch import Watch

__all__ = [
    "ATOMS",
    "Child",
    "Describing",
    "NoIdentityError",
    "Part",
    "Parts",
    "atom",
    "package",
    "parts_of_tensor",
    "parts_of_value",
]

Child = tuple[str, Any]
Part = str | bytes | Child
Parts = Iterator[Part]

ATOMS = (type(None), bool, int, float, complex, str, bytes)

# What tools of the ecosystem note on objects of their own, without a say in what is computed.
NOTES = frozenset({"_commit_hash", "_name_or_path", "name_or_path", "warnings_issued", "_is_hf_initialized"})
NOTE_PREFIXES = ("torchcache_", "_torchcache", "_torchdynamo", "_dynamo")


class NoIdentityError(Exception):
    """For a value whose content cannot be read."""


class Describing(Protocol):
    """What describers may ask of the encoder that runs them."""

    watch: Watch

    @staticmethod
    def alone(value: Any) -> bytes:
        """Everything about ``value`` by itself, contents of tensors included, as bytes."""


def atom(value: Any) -> tuple[str, str | bytes]:
    """Identity of a number, a string, bytes or ``None``."""
    if isinstance(value, float):
        return "float", np.float64(value).tobytes()
    if isinstance(value, complex):
        return "complex", np.complex128(value).tobytes()
    if isinstance(value, bytes):
        return "bytes", value
    return type(value).__name__, str(value)


def parts_of_value(value: Any, encoder: Describing) -> Parts:
    """Parts of anything that is neither code nor an ``nn.Module``."""
    for kind, describer in _DESCRIBERS:
        if isinstance(value, kind):
            return describer(value, encoder)
    if is_machinery(value):
        return iter(("machinery", type(value).__qualname__))
    return _object(value, encoder)


def package(module: str) -> Parts:
    """The version of an installed package, which names its code."""
    version = getattr(sys.modules.get(module.partition(".")[0]), "__version__", None)
    if isinstance(version, str):
        yield "version"
        yield version.partition("+")[0]  # a local build tag ("+cpu", "+cu130") names the same source


def parts_of_tensor(value: torch.Tensor, encoder: Describing) -> Parts:
    """Attributes that were set on a tensor; its contents are not part of a program."""
    members = vars(value)
    encoder.watch.namespace(members)
    yield from _members({name: held for name, held in members.items() if name not in NOTES})


def ignored(name: str) -> bool:
    """Whether an attribute is a note of ours or of torch's compiler."""
    return name.startswith(NOTE_PREFIXES)


def _enum(value: enum.Enum, encoder: Describing) -> Parts:
    yield "enum"
    yield "", type(value)
    yield str(value.name)
    yield "value", value.value
    own = {name: held for name, held in vars(value).items() if not (name.startswith("_") and name.endswith("_"))}
    if own and not is_installed_class(type(value)):
        encoder.watch.namespace(vars(value))
        yield from _members(own)


def _number(value: Any, encoder: Describing) -> Parts:
    """A number or text of a class of its own."""
    yield "", type(value)
    yield from atom(next(plain(value) for base, plain in _PLAIN.items() if isinstance(value, base)))
    yield from _state(value, encoder)


def _mapping(value: Mapping[Any, Any], encoder: Describing) -> Parts:
    yield "", type(value)
    yield f"mapping {len(value)}"
    encoder.watch.ordered(value)
    for key, item in value.items():
        yield "", key
        yield str(key), item
    if isinstance(value, collections.defaultdict):
        encoder.watch.attribute(value, "default_factory")
        yield "default_factory", value.default_factory
    yield from _state(value, encoder)


def _sequence(value: Any, encoder: Describing) -> Parts:
    yield "", type(value)
    yield f"sequence {len(value)}"
    if not isinstance(value, tuple):
        encoder.watch.collection(value)
    if isinstance(value, collections.deque):
        yield str(value.maxlen)
    for index, item in enumerate(value):
        yield str(index), item
    yield from _state(value, encoder)


def _set(value: Any, encoder: Describing) -> Parts:
    yield "", type(value)
    yield f"set {len(value)}"
    if isinstance(value, set):
        encoder.watch.collection(value)
    for item in sorted(value, key=encoder.alone):
        yield "", item
    yield from _state(value, encoder)


def _array(value: np.ndarray[Any, Any], encoder: Describing) -> Parts:
    yield "array"
    yield value.dtype.str
    yield str(value.shape)
    read = functools.partial(_objects, encoder.alone) if value.dtype.hasobject else np.ndarray.tobytes
    encoder.watch.content(value, read)
    yield read(value)
    yield from _state(value, encoder)


def _objects(alone: Callable[[Any], bytes], value: np.ndarray[Any, Any]) -> bytes:
    return alone(value.tolist())


def _scalar(value: np.generic, encoder: Describing) -> Parts:
    return iter(("scalar", value.dtype.str, value.tobytes()))


def _buffer(value: bytearray | array.array[Any], encoder: Describing) -> Parts:
    yield "", type(value)
    yield getattr(value, "typecode", "")
    encoder.watch.content(value, bytes)
    yield bytes(value)
    yield from _state(value, encoder)


def _weak(value: Any, encoder: Describing) -> Parts:
    yield "weak reference"
    try:
        target = value() if isinstance(value, weakref.ref) else value.__repr__.__self__
    except ReferenceError:
        target = None
    if target is not None:
        encoder.watch.alive(value if isinstance(value, weakref.ref) else weakref.ref(target))
    yield "target", target


def _python_module(value: types.ModuleType, encoder: Describing) -> Parts:
    """A module as a value: of the user's own, everything in it."""
    yield "module"
    yield value.__name__
    if installed(value.__name__):
        yield from package(value.__name__)
        return
    encoder.watch.namespace(vars(value))
    for name, held in sorted(vars(value).items()):
        if not (name.startswith("__") and name.endswith("__")):
            yield name
            yield name, held


def _partial(value: functools.partial[Any], encoder: Describing) -> Parts:
    yield "partial"
    for name in ("func", "args", "keywords"):
        encoder.watch.attribute(value, name)
        yield name, getattr(value, name)
    yield from _state(value, encoder)


def _operator(value: Any, encoder: Describing) -> Parts:
    """An operator of torch or of a library: by its name, and its Python code where that is known."""
    yield "operator"
    yield str(value)
    name = str(getattr(value, "_qualified_op_name", getattr(value, "_name", "")))
    yield "definition", torch._library.custom_ops.OPDEFS.get(name.partition(".")[0])


def _object(value: Any, encoder: Describing) -> Parts:
    """Any other object: its class, its attributes, and what of it lives in C, as ``copy`` sees that."""
    yield "", type(value)
    if isinstance(value, os.PathLike):
        yield os.fspath(value)
        return
    kind: Any = type(value)
    yield from _state(value, encoder)
    if not _hidden(kind):
        return
    try:
        content = _reduced(encoder.alone, value)
    except Exception:
        raise NoIdentityError from None
    encoder.watch.content(value, functools.partial(_reduced, encoder.alone))
    yield content


def _reduced(alone: Callable[[Any], bytes], value: Any) -> bytes:
    reduced = value.__reduce_ex__(4)
    if isinstance(reduced, str):
        return reduced.encode()
    return alone([list(part) if hasattr(part, "__next__") else part for part in reduced[1:]])


def _state(value: Any, encoder: Describing) -> Parts:
    """Attributes of an object, in its ``__dict__`` and in its slots."""
    kind: Any = type(value)
    encoder.watch.kind(value)
    slots = _slots(kind)
    for name in slots:
        encoder.watch.attribute(value, name)
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    members = getattr(value, "__dict__", None)
    if isinstance(members, dict):
        encoder.watch.namespace(members)
        held.update(members)
    if is_installed_class(kind):
        held = {name: item for name, item in held.items() if name not in NOTES}
    yield from _members(held)


def _members(members: Mapping[str, Any]) -> Parts:
    for name in sorted(members, key=str):
        if not ignored(str(name)):
            yield f"attribute {name}"
            yield str(name), members[name]


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[str, ...]:
    """Names of what an object of this class has beside its ``__dict__``, in slots or in a struct."""
    bases = [base for base in kind.__mro__ if base is not object]
    return tuple(
        name
        for base in bases
        for name, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType) and not name.endswith("__")
    )


@functools.lru_cache(maxsize=4096)
def _hidden(kind: type) -> bool:
    """Whether objects of this class hold something in C that no attribute shows."""
    pointer = struct.calcsize("P")
    while kind is not object:
        base = kind.__base__ or object
        members = vars(kind)
        shown = sum(isinstance(member, types.MemberDescriptorType) for member in members.values())
        shown += ("__dict__" in members) + ("__weakref__" in members)
        if kind.__basicsize__ - base.__basicsize__ > shown * pointer or kind.__itemsize__ > base.__itemsize__:
            return True
        kind = base
    return False


def _described(*parts: Callable[[Any], str]) -> Callable[[Any, Describing], Parts]:
    return lambda value, encoder: iter([part(value) for part in parts])


# Subclasses may say otherwise of themselves than what they are.
_PLAIN: dict[type, Callable[[Any], Any]] = {
    int: int.__pos__,
    float: float.__pos__,
    complex: complex.__pos__,
    str: str.__str__,
    bytes: bytes,
}

_DESCRIBERS: tuple[tuple[Any, Callable[[Any, Describing], Parts]], ...] = (
    (enum.Enum, _enum),
    (np.generic, _scalar),
    (tuple(_PLAIN), _number),
    ((torch.dtype, torch.layout, torch.memory_format), _described(lambda value: "torch", str)),
    (torch.device, _described(lambda value: "device", lambda value: value.type)),
    (range, _described(repr)),
    (Mapping, _mapping),
    ((list, tuple, collections.deque), _sequence),
    ((set, frozenset), _set),
    (np.ndarray, _array),
    ((bytearray, array.array), _buffer),
    ((weakref.ref, weakref.ProxyType, weakref.CallableProxyType), _weak),
    (types.ModuleType, _python_module),
    (functools.partial, _partial),
    ((torch._ops.OpOverload, torch._ops.OpOverloadPacket), _operator),
    ((types.GenericAlias, types.UnionType), _described(lambda value: "type", repr)),
)
