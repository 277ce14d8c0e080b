"""Plain values as canonical bytes: equal bytes mean the same value."""

from __future__ import annotations

import datetime
import decimal
import enum
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from torchcache.errors import Bypass

# An array is read in every call.
LARGEST_ARRAY = 1 << 20
# How deep values may be nested.
DEEPEST = 64
# Flag of a class that is not built in.
MADE_BY_CODE = 1 << 9
ADVICE = (
    "use tensors, numbers, strings, and lists, dicts and dataclasses of them, "
    "register its class with torch.utils._pytree.register_pytree_node, or mark a part that takes and returns none"
)


def constant_bytes(value: Any) -> bytes:
    """Canonical bytes of a plain value; no value's bytes are the beginning of another's.

    Parameters
    ----------
    value : object
        A value of exactly one of these types: ``None``, ``bool``, ``int``, ``float``, ``complex``, ``str``, ``bytes``,
        ``Ellipsis``, ``NotImplemented``, ``slice``, ``range``, ``torch.dtype``, ``device`` (its index does not count),
        ``layout``, ``memory_format``, ``Size``, NumPy scalars and arrays, ``date``, ``datetime`` without a time zone,
        ``timedelta``, ``Decimal``; an enum's member; or tuples, lists, dicts, ``OrderedDict``, sets and frozensets
        of them.

    Raises
    ------
    Bypass
        For anything else. The reason is a noun phrase, such as "a Config, which torchcache cannot take apart".
    """
    try:
        return _encoded(value, DEEPEST)
    except RecursionError:
        raise too_deep() from None


def too_deep() -> Bypass:
    """The bypass for values within values within values, or within themselves."""
    return Bypass("nested too deeply for torchcache to take apart", "pass a flat list or a tensor")


def not_understood(value: Any) -> Bypass:
    """The bypass for a value of a type that is not understood."""
    what = f"{type_name(value)}, which torchcache cannot take apart"
    if isinstance(value, torch.Tensor):
        return Bypass(what, "pass it as_subclass(torch.Tensor), where nothing but its elements counts")
    return Bypass(what, ADVICE)


def type_name(value: Any) -> str:
    """The name of a value's type with its article, for people."""
    name = type(value).__qualname__.rpartition("<locals>.")[2]
    return f"{'an' if name[:1].lower() in tuple('aeio') else 'a'} {name}"


def is_constant(kind: type) -> bool:
    """Whether values of this type, where they are understood, can never change."""
    return kind is frozenset or enum.Enum in kind.__mro__ or np.generic in kind.__mro__


def part_bytes(value: Any, whole: str) -> bytes:
    """``constant_bytes`` of a part of something, which the reason of a bypass begins with."""
    try:
        return constant_bytes(value)
    except Bypass as bypass:
        raise Bypass(f"{whole} {bypass.reason}", bypass.advice) from None


def framed(tag: bytes, data: bytes) -> bytes:
    """``data`` behind its tag and its length."""
    return tag + len(data).to_bytes(8, "little") + data


def class_bytes(kind: type) -> bytes:
    """Canonical bytes of a class, which goes by its name."""
    return _text(kind.__module__) + _text(kind.__qualname__)


def classes_within(value: Any) -> Iterator[type]:
    """The classes of a plain value and of its parts that Python code made; only of what has ``constant_bytes``."""
    kind: Any = type(value)
    if kind.__flags__ & MADE_BY_CODE:
        yield kind
    if enum.Enum in kind.__mro__:
        parts: Iterable[Any] = (value._value_, *_state_of(value).values())
    else:
        parts = _PARTS[kind][1](value) if kind in _PARTS else ()
    for part in parts:
        yield from classes_within(part)


def array_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """Canonical bytes of a NumPy array: dtype, shape, memory order and content.

    Raises
    ------
    Bypass
        For an array of objects or records, a large one, and one with gaps in memory.
    """
    dtype = array.dtype
    if dtype.kind not in "biufcSUmM" or dtype.metadata or dtype in _PADDED:
        raise Bypass(f"a NumPy array of {dtype}, which torchcache cannot take apart", "pass torch.from_numpy(array)")
    if array.nbytes > LARGEST_ARRAY:
        raise Bypass(f"a NumPy array of more than {LARGEST_ARRAY >> 20} MB", "pass torch.from_numpy(array)")
    flags = array.flags
    if not (flags.c_contiguous or flags.f_contiguous):
        raise Bypass("a NumPy array with gaps in memory", "pass numpy.ascontiguousarray(array)")
    order = bytes((flags.c_contiguous, flags.f_contiguous, flags.writeable))
    head = _text(dtype.str) + _counted(b"a", map(_integer, array.shape)) + order
    return b"A" + head + framed(b"b", array.tobytes(order="C"))


# Types whose values have bytes without content between them.
_PADDED = [dtype for dtype in map(np.dtype, "gG") if dtype not in map(np.dtype, "dD")]


def _encoded(value: Any, depth: int) -> bytes:
    kind = type(value)
    atom = ATOMS.get(kind)
    if atom is not None:
        return atom(value)
    if enum.Enum in kind.__mro__:
        return _member(value)
    if np.generic in kind.__mro__:
        return _numpy_scalar(value)
    if kind is np.ndarray:
        return array_bytes(value)
    if depth == 0:
        raise too_deep()
    parts = _PARTS.get(kind)
    if parts is None:
        raise not_understood(value)
    tag, opened, ordered = parts
    pieces = [_encoded(part, depth - 1) for part in opened(value)]
    return _counted(tag, pieces if ordered else sorted(pieces))


def _counted(tag: bytes, pieces: Iterable[bytes]) -> bytes:
    listed = list(pieces)
    return tag + len(listed).to_bytes(8, "little") + b"".join(listed)


def _integer(value: int) -> bytes:
    return framed(b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _text(value: str) -> bytes:
    return framed(b"s", value.encode("utf-8", "surrogatepass"))


def _real(value: float) -> bytes:
    return b"f" + struct.pack("<d", value)


def _range(value: range) -> bytes:
    return b"r" + b"".join(map(constant_bytes, (value.start, value.stop, value.step)))


def _size(value: torch.Size) -> bytes:
    return _counted(b"Z", map(constant_bytes, value))


def _moment(value: datetime.datetime) -> bytes:
    if value.tzinfo is not None:
        raise Bypass("a datetime with a time zone, which torchcache cannot take apart", "pass its timestamp()")
    return framed(b"t", f"{value.isoformat()} {value.fold}".encode())


def _decimal(value: decimal.Decimal) -> bytes:
    sign, digits, exponent = value.as_tuple()
    return framed(b"#", f"{sign} {exponent} {''.join(map(str, digits))}".encode())


# The plain value that a member of an enum with another base holds beside its value.
_PLAIN: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, int.__int__),
    (str, str.__str__),
    (float, float.__float__),
)
_ENUM_NAMES = frozenset(("_value_", "_name_", "__objclass__", "_sort_order_", "_inverted_"))


def _member(member: enum.Enum) -> bytes:
    """An enum's member: its class, its name (flags may have none), its value, and whatever else it holds."""
    kind = type(member)
    plain: Any = None
    bases = [base for base in kind.__mro__ if not issubclass(base, enum.Enum) and base is not object]
    for base in bases:
        convert = next((convert for plain_kind, convert in _PLAIN if base is plain_kind), None)
        if convert is not None:
            plain = convert(member)
        elif vars(base).get("__slots__") or not base.__flags__ & MADE_BY_CODE:
            raise not_understood(member)
    held = (member._name_, member._value_, plain, _state_of(member))
    return b"E" + class_bytes(kind) + part_bytes(held, f"{type_name(member)} that holds")


def _state_of(member: enum.Enum) -> dict[str, Any]:
    return {name: held for name, held in vars(member).items() if name not in _ENUM_NAMES}


def _numpy_scalar(value: np.generic) -> bytes:
    kind = type(value)
    if kind is np.str_:
        return b"u" + _text(str.__str__(value))
    if kind.__module__ != "numpy" or value.dtype.kind not in "biufcmM" or value.dtype in _PADDED:
        raise not_understood(value)
    return b"G" + _text(value.dtype.str) + framed(b"b", value.tobytes())


def _bytes_of(text: Any) -> bytes:
    return framed(b"o", str(text).encode())


# By exact type: how a value without parts is encoded. Each tag stands for one type.
ATOMS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"N",
    bool: lambda value: b"1" if value else b"0",
    int: _integer,
    float: _real,
    complex: lambda value: b"c" + struct.pack("<dd", value.real, value.imag),
    str: _text,
    bytes: lambda value: framed(b"y", value),
    type(...): lambda value: b".",
    type(NotImplemented): lambda value: b"!",
    range: _range,
    torch.dtype: _bytes_of,
    torch.layout: _bytes_of,
    torch.memory_format: _bytes_of,
    torch.device: lambda value: framed(b"v", value.type.encode()),
    torch.Size: _size,
    datetime.date: lambda value: framed(b"d", value.isoformat().encode()),
    datetime.datetime: _moment,
    datetime.timedelta: lambda value: framed(b"p", f"{value.days} {value.seconds} {value.microseconds}".encode()),
    decimal.Decimal: _decimal,
}


def _slice_parts(value: slice) -> Sequence[Any]:
    return (value.start, value.stop, value.step)


def _items(value: dict[Any, Any]) -> Sequence[Any]:
    return [part for item in value.items() for part in item]


# By exact type: tag, parts, and whether the parts' order counts.
_PARTS: dict[type, tuple[bytes, Callable[[Any], Iterable[Any]], bool]] = {
    slice: (b":", _slice_parts, True),
    tuple: (b"(", iter, True),
    list: (b"[", iter, True),
    dict: (b"{", _items, True),
    OrderedDict: (b"O", _items, True),
    set: (b"S", iter, False),
    frozenset: (b"F", iter, False),
}
