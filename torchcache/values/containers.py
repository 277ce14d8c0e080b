"""How a container of each kind is opened: its parts, what it is beside them, and how to make another."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from torchcache.errors import Bypass
from torchcache.values.constants import (
    array_bytes,
    class_bytes,
    constant_bytes,
    not_understood,
    part_bytes,
    type_name,
)
from torchcache.values.objects import Opened, open_object

# What pytree keeps of a container beside its children, as a part of it.
CONTEXT = "context"
# Begins what is hashed of such a container.
REGISTERED = b"R"
KEEP_NO_CACHE = "call it with use_cache=False, or set config.use_cache = False"


def open_container(value: Any) -> Opened:
    """A container, opened by its exact type.

    Raises
    ------
    Bypass
        For a value of a type that is not understood, and a container whose other content is not.
    """
    kind = type(value)
    opener = _OPENERS.get(kind)
    if opener is not None:
        return opener(value)
    if is_model_cache(kind):
        raise Bypass(f"{type_name(value)}, which the model writes to", KEEP_NO_CACHE)
    if torch.nn.Module in kind.__mro__:
        raise not_understood(value)
    if dataclasses.is_dataclass(kind) or UserDict in kind.__mro__ or _is_namedtuple(kind):
        return open_object(value)
    if kind in pytree.SUPPORTED_NODES:
        return _open_registered(value)
    raise not_understood(value)


def _is_namedtuple(kind: type) -> bool:
    return tuple in kind.__mro__ and isinstance(getattr(kind, "_fields", None), tuple)


def is_model_cache(kind: type) -> bool:
    """Whether it is a ``transformers`` Cache: forward writes to it, even where it is registered with pytree."""
    return any(base.__name__.endswith("Cache") and base.__module__.startswith("transformers.") for base in kind.__mro__)


def _counted(tag: bytes, count: int, rest: bytes = b"") -> bytes:
    return tag + count.to_bytes(8, "little") + rest


def _open_tuple(value: tuple[Any, ...]) -> Opened:
    return Opened(_counted(b"(", len(value)), range(len(value)), value, tuple, mutable=False)


def _open_list(value: list[Any]) -> Opened:
    return Opened(_counted(b"[", len(value)), range(len(value)), value, list)


def _open_deque(value: deque[Any]) -> Opened:
    longest = value.maxlen
    head = _counted(b"Q", len(value), constant_bytes(longest))
    return Opened(head, range(len(value)), list(value), lambda parts: deque(parts, longest))


def _open_slice(value: slice) -> Opened:
    parts = (value.start, value.stop, value.step)
    return Opened(b":", ("start", "stop", "step"), parts, lambda made: slice(*made), mutable=False)


def _keys_bytes(keys: Sequence[Any], whole: str) -> bytes:
    return b"".join(part_bytes(key, f"{whole} with a key that is") for key in keys)


def _open_dict(value: dict[Any, Any]) -> Opened:
    keys = list(value)
    head = _counted(b"{", len(keys), _keys_bytes(keys, "a dict"))
    return Opened(head, keys, list(value.values()), lambda parts: dict(zip(keys, parts, strict=True)))


def _open_ordered_dict(value: OrderedDict[Any, Any]) -> Opened:
    if vars(value):
        raise Bypass("an OrderedDict with attributes of its own", "pass what they hold as an argument")
    keys = list(value)
    head = _counted(b"O", len(keys), _keys_bytes(keys, "an OrderedDict"))
    return Opened(head, keys, list(value.values()), lambda parts: OrderedDict(zip(keys, parts, strict=True)))


def _open_defaultdict(value: defaultdict[Any, Any]) -> Opened:
    factory = value.default_factory
    if not any(factory is known for known in _FACTORIES):
        raise Bypass("a defaultdict with a factory of its own", "pass a dict")
    keys = list(value)
    name = None if factory is None else factory.__name__
    head = _counted(b"D", len(keys), constant_bytes(name) + _keys_bytes(keys, "a defaultdict"))
    return Opened(head, keys, list(value.values()), lambda parts: defaultdict(factory, zip(keys, parts, strict=True)))


_FACTORIES: tuple[Any, ...] = (None, int, float, complex, bool, str, bytes, list, dict, set, frozenset, tuple)


def _open_set(value: set[Any]) -> Opened:
    members = list(value)
    held = sorted(part_bytes(member, "a set that holds") for member in members)  # their order does not count
    return Opened(_counted(b"S", len(members), b"".join(held)), (), (), lambda parts: set(members))


def _open_array(value: np.ndarray[Any, Any]) -> Opened:
    head = array_bytes(value)
    kept, writeable = value.copy(order="K"), value.flags.writeable

    def build(parts: list[Any]) -> np.ndarray[Any, Any]:
        made = kept.copy(order="K")
        made.flags.writeable = writeable
        return made

    return Opened(head, (), (), build)


_OPENERS: dict[type, Callable[[Any], Opened]] = {
    tuple: _open_tuple,
    list: _open_list,
    dict: _open_dict,
    OrderedDict: _open_ordered_dict,
    defaultdict: _open_defaultdict,
    deque: _open_deque,
    slice: _open_slice,
    set: _open_set,
    np.ndarray: _open_array,
}


def _open_registered(value: Any) -> Opened:
    """A container that torch's pytree knows: its children, and its context as one more part."""
    kind = type(value)
    node = pytree.SUPPORTED_NODES[kind]
    children, context = node.flatten_fn(value)
    parts = [*children, context]
    names = [*range(len(parts) - 1), CONTEXT]
    head = _counted(REGISTERED, len(parts), class_bytes(kind))
    return Opened(head, names, parts, lambda made: node.unflatten_fn(made[:-1], made[-1]))
