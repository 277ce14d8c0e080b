"""Plain arguments as canonical bytes: equal bytes mean the same argument."""

from __future__ import annotations

import dataclasses
import enum
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["constant_bytes"]


def constant_bytes(value: Any) -> bytes:
    """Canonical bytes of a plain argument.

    Parameters
    ----------
    value : None, bool, int, float, complex, str, bytes, Enum, torch.dtype, device, layout or memory format, slice,
            or tuples, lists, sets and dicts of them
        The argument.

    Raises
    ------
    TypeError
        For anything else.
    """
    return b"".join(_constant(value))


def _constant(value: Any) -> Iterable[bytes]:
    if isinstance(value, enum.Enum):
        text = f"{type(value).__module__}.{type(value).__qualname__}.{value.name}"
    elif isinstance(value, float):
        text = "nan" if math.isnan(value) else value.hex()
    elif isinstance(value, (type(None), bool, int, complex, str, bytes)):
        text = repr(value)
    elif isinstance(value, torch.device):
        text = value.type
    elif isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        text = str(value)
    elif isinstance(value, slice):
        yield from _group("slice", (value.start, value.stop, value.step))
        return
    elif isinstance(value, Mapping):
        items = sorted((constant_bytes(key), constant_bytes(item)) for key, item in value.items())
        yield from _joined("dict", [part for item in items for part in item])
        return
    elif isinstance(value, (set, frozenset)):
        yield from _joined("set", sorted(constant_bytes(item) for item in value))
        return
    elif isinstance(value, (tuple, list)):
        yield from _group("sequence", value)
        return
    elif isinstance(value, np.generic):
        yield from _constant(value.item())
        return
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _group(type(value).__qualname__, [getattr(value, f.name) for f in dataclasses.fields(value)])
        return
    else:
        raise TypeError(f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins."))
    kind = "number" if isinstance(value, (bool, int)) and not isinstance(value, enum.Enum) else type(value).__name__
    kind = "bool" if isinstance(value, bool) else kind
    yield from _joined(kind, [text.encode("utf-8", "surrogatepass")])


def _group(kind: str, values: Iterable[Any]) -> Iterable[bytes]:
    return _joined(kind, [constant_bytes(value) for value in values])


def _joined(kind: str, parts: list[bytes]) -> Iterable[bytes]:
    yield struct.pack("<H", len(kind)) + kind.encode()
    yield struct.pack("<Q", len(parts))
    for part in parts:
        yield struct.pack("<Q", len(part))
        yield part
