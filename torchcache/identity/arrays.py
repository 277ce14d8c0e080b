"""Arrays and buffers of a program as nodes, and how it is seen that their contents changed."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import torch
import xxhash

from torchcache.identity.filled import held_by
from torchcache.identity.memory import elements_at
from torchcache.identity.node import Check, Node
from torchcache.identity.objects import own_state, state_of

# Arrays up to this many bytes are compared whole each time; larger ones are part of the state, as weights are.
WHOLE_ARRAY = 64 * 1024


def describe_array(value: Any) -> Node:
    """A NumPy array: by its content, or by its objects."""
    node = Node(value, ("array", value.dtype.str, str(value.shape)), kind="object")
    if value.dtype.hasobject:
        node.parts.append(("[...]", value.tolist()))
        node.checks.append(Check("content", value, read=held_by))
    elif value.nbytes > WHOLE_ARRAY and (value.flags.c_contiguous or value.flags.f_contiguous):
        node.head += (str(np.dtype(value.dtype).descr), "rows" if value.flags.c_contiguous else "columns")
        node.parts.append(("", torch.from_numpy(elements_at(_address(value), (value.nbytes,), (1,), 1, value))))
        node.checks.append(Check("content", value, read=_place))
    else:
        node.head += (
            str(np.dtype(value.dtype).descr),
            xxhash.xxh3_128_digest(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data),
        )
        node.checks.append(Check("content", value, read=held_by))
    return node if type(value) is np.ndarray else state_of(node, value)


def _place(value: Any) -> tuple[Any, ...]:
    return _address(value), value.strides, value.dtype, value.shape


def _address(value: Any) -> int:
    return int(value.__array_interface__["data"][0])


def describe_buffer(value: Any) -> Node:
    """A ``bytearray`` or an ``array.array``."""
    node = Node(value, ("buffer", str(getattr(value, "typecode", "")), bytes(value)), kind="object")
    node.checks.append(Check("content", value, read=bytes))
    return own_state(node, value, (bytearray, array.array))


def describe_view(value: memoryview) -> Node:
    """A ``memoryview``: by what it shows."""
    node = Node(value, ("memoryview", value.format, str(value.shape), value.tobytes()))
    node.checks.append(Check("content", value, read=memoryview.tobytes))
    return node
