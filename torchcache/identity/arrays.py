"""Arrays and buffers of a program as nodes, and how it is seen that their contents changed."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import xxhash

from torchcache.identity.node import Check, Node
from torchcache.identity.objects import own_state, state_of

__all__ = ["describe_array", "describe_buffer", "describe_view"]

# Arrays up to this many bytes are compared whole each time; larger ones by where they are and some of their elements.
WHOLE_ARRAY = 64 * 1024
SAMPLES = 512


def describe_array(value: Any) -> Node:
    """A NumPy array: by its content, or by its objects."""
    node = Node(value, ("array", value.dtype.str, str(value.shape)), kind="object")
    if value.dtype.hasobject:
        node.parts.append(("[...]", value.tolist()))
        node.checks.append(Check("content", value, read=_objects))
    else:
        node.head += (
            str(np.dtype(value.dtype).descr),
            xxhash.xxh3_128_digest(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data),
        )
        node.checks.append(Check("content", value, read=_samples))
    return node if type(value) is np.ndarray else state_of(node, value)


def _objects(value: Any) -> tuple[Any, ...]:
    return tuple(value.ravel().tolist())


def _samples(value: Any) -> tuple[Any, ...]:
    """All of a small array; of a large one where it is, and elements from all over it."""
    if value.nbytes <= WHOLE_ARRAY:
        return value.dtype, value.shape, value.tobytes()
    place = value.__array_interface__["data"][0], value.strides, value.dtype, value.shape
    step = max(1, value.size // SAMPLES)
    if value.flags.c_contiguous:
        return (*place, value.reshape(-1)[::step].tobytes())
    return (*place, value.flat[::step].tobytes())


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
