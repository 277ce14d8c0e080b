"""Plain values of a program: numbers, containers, and objects of any class, as nodes."""

from __future__ import annotations

import array
import collections
import concurrent.futures
import contextvars
import datetime
import decimal
import enum
import functools
import itertools
import marshal
import operator
import os
import pathlib
import re
import sys
import threading
import types
import uuid
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import xxhash

from torchcache.identity.arrays import describe_array, describe_buffer, describe_view
from torchcache.identity.bytecode import constant_bytes
from torchcache.identity.filled import GENERATORS, held_by
from torchcache.identity.homes import module_of, named_class
from torchcache.identity.libraries import describe_configuration, describe_operator, describe_ufunc
from torchcache.identity.node import Check, Node, Space
from torchcache.identity.objects import NOTES, hidden, is_noted, member_space, members_of, own_state, state_of
from torchcache.identity.per_class import once_per_class

# Items of a container that may be names of environment variables.
MOST_TEXTS = 64
ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented)})

# Locks, loggers, pools and the like have no say in what is computed.
_MACHINERY = (
    "logging",
    "_thread",
    "threading",
    "typing",
    "concurrent",
    "torchcache",
    "multiprocessing.synchronize",
    "pybind11_builtins",
    "pydantic_core",
    "torch.library",
)

_COMPILED_MACHINERY = ("pybind11_builtins", "pydantic_core")

# Objects whose content is out of reach, or moves when it is read.
_CLOSED = (
    "queue",
    "_queue",
    "asyncio",
    "_asyncio",
    "socket",
    "_socket",
    "sqlite3",
    "_io",
    "io",
    "subprocess",
    "itertools",
)
# Their value is in another process, or their class makes up what is read of it.
_ELSEWHERE = ("multiprocessing.managers", "multiprocessing.connection", "multiprocessing.queues", "unittest.mock")

_COMPILED = ("cython_function", "cython_function_or_method", "fused_cython_function")


def describe_value(value: Any) -> Node:
    """The node of anything that is neither code nor a module nor a tensor."""
    kind: Any = type(value)
    return _describer(kind)(value)


@once_per_class
def _describer(kind: type) -> Callable[[Any], Node]:
    if enum.Enum in kind.__mro__:
        return _enum
    for base in kind.__mro__:
        if base in _DESCRIBERS:
            return _DESCRIBERS[base]
    if kind.__name__.endswith(_COMPILED):
        return _compiled
    module = module_of(kind)
    if module.startswith(_MACHINERY) and (named_class(kind) or module.startswith(_COMPILED_MACHINERY)):
        return _machinery
    if kind.__name__ == "PyCapsule" and named_class(kind):
        return _machinery
    if module.split(".")[0] == "omegaconf" and hasattr(kind, "_get_root"):
        return describe_configuration
    if module.split(".")[0] in _CLOSED and named_class(kind):
        return _closed
    return _closed if any(module_of(base) in _ELSEWHERE for base in kind.__mro__) else _object


def _object(value: Any) -> Node:
    """Any other object: its class, its attributes, and what of it lives in C where that is known to be plain."""
    # A context manager that decorates keeps a generator that has not begun, and makes another for each call.
    leave = frozenset({"gen"}) if module_of(type(value)) == "contextlib" else frozenset()
    node = state_of(Node(value, ("object",), kind="object"), value, leave)
    kind: Any = type(value)
    if hidden(kind):
        try:
            reduced = value.__reduce_ex__(4) if named_class(kind) else None
        except Exception:
            reduced = None
        if reduced is None:
            node.problem = "cannot be read"
        elif isinstance(reduced, str):
            node.head = ("object", reduced)
        else:
            node.parts.append(("", tuple(list(part) if hasattr(part, "__next__") else part for part in reduced[1:])))
            node.checks.append(Check("content", value, read=_reduced))
    return node


def _reduced(value: Any) -> str:
    return repr(value.__reduce_ex__(4)[1:])


def _machinery(value: Any) -> Node:
    return Node(value, ("machinery", type(value).__qualname__), checks=[Check("kind", value)])


def _compiled(value: Any) -> Node:
    """A function that Cython compiled: by name, as those of C are."""
    return Node(value, ("compiled", str(value.__module__), str(value.__qualname__)))


def _closed(value: Any) -> Node:
    if any(value is stream for stream in (sys.__stdin__, sys.__stdout__, sys.__stderr__)):
        return _machinery(value)
    return Node(value, problem="cannot be read")


def _enum(value: Any) -> Node:
    members = vars(value)
    own = {name: held for name, held in members.items() if not (name.startswith("_") and name.endswith("_"))}
    node = Node(value, ("enum", type(value).__qualname__, str(members.get("_name_"))), kind="object")
    node.parts = [("", type(value)), (".value", members.get("_value_"))]
    own.pop("__objclass__", None)
    if own:
        node.spaces.append(Space("attribute", members, own))
    return node


def _number(value: Any) -> Node:
    """A number or text of a class of its own."""
    base = next(base for base in _PLAIN if base in type(value).__mro__)
    return state_of(Node(value, ("number", constant_bytes(_PLAIN[base](value))), kind="object"), value)


def _mapping(value: Any) -> Node:
    if value is sys.modules:
        return Node(value, ("sys.modules",), kind="python modules")
    node = Node(value, ("mapping", str(dict.__len__(value))), kind="group")
    node.checks.append(Check("mapping", value))
    items = list(dict.items(value))
    if collections.OrderedDict in type(value).__mro__:
        items = [(key, dict.__getitem__(value, key)) for key in collections.OrderedDict.__iter__(value)]
    if is_noted(type(value)):
        items = [(key, item) for key, item in items if key not in NOTES]
    node.texts = _texts(dict.values(value))
    digest = _digest_of_plain([*itertools.chain.from_iterable(items)])
    if digest:
        node.head += (digest,)
        items, node.numbered = [], False
    for key, item in items:
        node.parts += [("", key), (f"[{key!r}]" if type(key) in ATOMS else "[...]", item)]
    if isinstance(value, collections.defaultdict):
        node.checks.append(Check("attribute", value, "default_factory"))
        node.parts.append((".default_factory", value.default_factory))
    return own_state(node, value, (dict, collections.OrderedDict, collections.defaultdict))


def _texts(items: Iterable[Any]) -> frozenset[str]:
    """Those that may be names; a long list is one of words."""
    first = list(itertools.islice(items, MOST_TEXTS))
    first += itertools.chain.from_iterable(item for item in first if type(item) is tuple)
    return frozenset(item for item in first if type(item) is str and item.isidentifier())


def _digest_of_plain(items: list[Any]) -> bytes:
    """16 bytes over atoms, and tuples of such at any depth, as lists of files and labels are; empty for others.

    It goes through millions in C. Version 2 of the format writes equal values alike, whoever else holds them.
    """
    left, kinds = items, set(map(type, items))
    while tuple in kinds:
        kinds.discard(tuple)
        left = [*itertools.chain.from_iterable(item for item in left if type(item) is tuple)]
        kinds.update(map(type, left))
    if not ATOMS.issuperset(kinds):
        return b""
    try:
        return xxhash.xxh3_128_digest(marshal.dumps(items, 2))
    except ValueError:  # NotImplemented, or too deep
        return b""


def _proxy(value: Any) -> Node:
    return Node(value, ("proxy",), [("", dict(value))], checks=[Check("content", value, read=_proxied)])


def _proxied(value: Any) -> Any:
    return tuple(dict(value).items())


def _sequence(value: Any) -> Node:
    base = next(base for base in (list, tuple, collections.deque) if base in type(value).__mro__)
    items = list(base.__iter__(value))
    node = Node(value, ("sequence", str(len(items))), kind="group")
    if type(value) in (list, collections.deque):
        node.checks.append(Check("items", value))
    elif base is not tuple:
        node.checks.append(Check("content", value, read=functools.partial(_items, base)))
    node.texts = _texts(items)
    if base is collections.deque:
        node.head += (str(value.maxlen),)
    digest = _digest_of_plain(items)
    if digest:
        node.head += (digest,)
        items, node.numbered = [], False
    node.parts = [(f"[{index}]", item) for index, item in enumerate(items)]
    if type(value) is tuple:
        node.numbered = False
        node.head = ("tuple", *node.head)
        return node
    return own_state(node, value, (list, collections.deque))


def _items(base: Any, value: Any) -> tuple[Any, ...]:
    """The items of a container whose class may say otherwise."""
    return tuple(base.__iter__(value))


def _set(value: Any) -> Node:
    base = set if set in type(value).__mro__ else frozenset
    items = list(base.__iter__(value))
    node = Node(value, ("set", str(len(items))), [("[...]", item) for item in items], kind="group", unsorted=True)
    if type(value) is set:
        node.checks.append(Check("items", value))
    elif base is set:
        node.checks.append(Check("content", value, read=functools.partial(_items, base)))
    node.numbered = base is set and not ATOMS.issuperset(map(type, items))
    return own_state(node, value, (set, frozenset))


def _weak(value: Any) -> Node:
    try:
        target = value() if weakref.ref in type(value).__mro__ else value.__repr__.__self__
    except ReferenceError:
        target = None
    node = Node(value, ("weak reference",), [("()", target)])
    if target is not None:
        reference = value if weakref.ref in type(value).__mro__ else weakref.ref(target)
        node.checks.append(Check("alive", reference))
    return node


def _partial(value: Any) -> Node:
    node = Node(value, ("partial",), wraps=True, kind="object")
    for name in ("func", "args", "keywords"):
        node.parts.append(("" if name == "func" else f".{name}", getattr(value, name)))
        node.checks.append(Check("attribute", value, name))
    members = members_of(value)
    if members:
        node.spaces.append(member_space("attribute", members))
    return node


def _access(value: Any) -> Node:
    """``attrgetter``, ``itemgetter`` and ``methodcaller``: the names they hold are read."""
    arguments = value.__reduce__()[1:]
    texts = [text for text in _flat(arguments) if type(text) is str]
    return Node(
        value,
        ("access", type(value).__name__),
        [("", arguments)],
        adds=frozenset(part for text in texts for part in text.split(".")),
        numbered=False,
    )


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _local(value: Any) -> Node:
    """What a ``threading.local`` holds in this thread."""
    node = Node(value, ("local",), [("", type(value))], kind="object", checks=[Check("kind", value)])
    fetch = functools.partial(threading.local.__getattribute__, value, "__dict__")
    space = member_space("attribute", dict(fetch()))
    space.fetch = fetch
    node.spaces.append(space)
    return node


def _context(value: contextvars.ContextVar[Any]) -> Node:
    return Node(
        value,
        ("context",),  # libraries make its name of an address
        [(".get()", held) for held in held_by(value)],
        checks=[Check("content", value, read=held_by)],
    )


def _future(value: Any) -> Node:
    """What came of a task of a pool; of one that is at work that it is."""
    done = value.done() and not value.cancelled() and value.exception() is None
    parts = [(".result()", value.result())] if done else []
    return Node(value, ("future", str(done)), parts, checks=[Check("kind", value), Check("content", value, read=_done)])


def _done(value: Any) -> tuple[Any, ...]:
    return value.done(), value._result


def _environment(value: Any) -> Node:
    space = Space("variable", {}, dict(value), fetch=functools.partial(dict, value))
    return Node(value, ("environment",), spaces=[space], kind="environment")


def _state_reader(read: Callable[[Any], Any]) -> Callable[[Any], Node]:
    def describe(value: Any) -> Node:
        node = Node(value, ("state", type(value).__qualname__, repr(read(value))))
        node.checks = [Check("kind", value), Check("content", value, read=read)]
        return node

    return describe


def _text(*parts: Callable[[Any], Any]) -> Callable[[Any], Node]:
    return lambda value: Node(value, (type(value).__name__, *(str(part(value)) for part in parts)), numbered=False)


# What gives its content away only once.
_MOVING: tuple[type, ...] = (
    types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, types.FrameType, types.TracebackType,
    type(iter([])), type(iter(())), type(iter("")), type(iter({})), type(iter(set())), type(iter(range(0))),
    enumerate, zip, map, filter, reversed,
    itertools.count, itertools.cycle, itertools.repeat, itertools.chain, itertools.islice,
)  # fmt: skip

# Subclasses may say otherwise of themselves than what they are.
_PLAIN: dict[type, Callable[[Any], Any]] = {
    int: int.__pos__,
    float: float.__pos__,
    complex: complex.__pos__,
    str: str.__str__,
    bytes: lambda value: bytes.__add__(value, b""),
}

_DESCRIBERS: dict[type, Callable[[Any], Node]] = {
    np.generic: lambda value: Node(value, ("scalar", value.dtype.str, value.tobytes()), numbered=False),
    np.ndarray: describe_array,
    np.dtype: _text(lambda value: value.descr),
    np.ufunc: describe_ufunc,
    **dict.fromkeys(_PLAIN, _number),
    **dict.fromkeys((torch.dtype, torch.layout, torch.memory_format), _text(str)),
    torch.device: _text(lambda value: value.type),
    torch.Size: _sequence,
    range: _text(repr),
    slice: _text(repr),
    dict: _mapping,
    types.MappingProxyType: _proxy,
    **dict.fromkeys((list, tuple, collections.deque), _sequence),
    **dict.fromkeys((set, frozenset), _set),
    **dict.fromkeys((bytearray, array.array), describe_buffer),
    memoryview: describe_view,
    **dict.fromkeys((weakref.ref, weakref.ProxyType, weakref.CallableProxyType), _weak),
    functools.partial: _partial,
    **dict.fromkeys((operator.attrgetter, operator.itemgetter, operator.methodcaller), _access),
    threading.local: _local,
    threading.Event: _state_reader(lambda value: value.is_set()),
    concurrent.futures.Future: _future,
    contextvars.ContextVar: _context,
    type(os.environ): _environment,
    **dict.fromkeys((type(torch.ops.aten.add.default), type(torch.ops.aten.add)), describe_operator),
    **dict.fromkeys((types.GenericAlias, types.UnionType), _text(repr)),
    re.Pattern: _text(lambda value: repr(value.pattern), lambda value: value.flags),
    **dict.fromkeys((datetime.date, datetime.time, datetime.timedelta, datetime.timezone), _text(repr)),
    **dict.fromkeys((decimal.Decimal, uuid.UUID), _text(repr)),
    pathlib.PurePath: _text(lambda value: value.as_posix()),
    **dict.fromkeys(GENERATORS, _state_reader(held_by)),
    **dict.fromkeys(_MOVING, _closed),
}  # fmt: skip
try:
    import ctypes
except ImportError:  # a Python that was built without it
    pass
else:
    for _base in (ctypes._SimpleCData, ctypes.Structure, ctypes.Array):
        _DESCRIBERS[_base] = _closed
