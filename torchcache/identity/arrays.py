"""Arrays, buffers and random generators: their contents, which no attribute holds, seen, compared and put back."""

from __future__ import annotations

import array
import pickle
import random
from typing import Any

import numpy as np
import torch
import xxhash

from torchcache.identity.memory import elements_at
from torchcache.identity.node import Check, Node
from torchcache.identity.objects import own_state, state_of

# Arrays up to this many bytes are compared whole each time; larger ones are part of the state, as weights are.
WHOLE_ARRAY = 64 * 1024
_BUFFERS = (np.ndarray, bytearray, array.array, memoryview)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
# What has contents of its own, and is no tensor.
FILLED = (*_BUFFERS, *_GENERATORS)
# Bytes of the largest state of a generator, about.
_STATE_BYTES = 5056


def describe_array(value: Any) -> Node:
    """A NumPy array: by its content, or by its objects."""
    node = Node(value, ("array", value.dtype.str, str(value.shape)), kind="object")
    if value.dtype.hasobject:
        node.parts.append(("[...]", value.tolist()))
        node.checks.append(Check("content", value, read=_objects))
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


def is_writable(value: Any) -> bool:
    """Whether it may be written to in place, and all that it holds can be put back."""
    if type(value) is np.ndarray:
        return bool(value.flags.writeable and not value.dtype.hasobject)
    return type(value) in FILLED and not (type(value) is memoryview and (value.readonly or value.ndim != 1))


def size_of(value: Any) -> int:
    """How many bytes it holds."""
    if isinstance(value, _GENERATORS):
        return _STATE_BYTES
    return int(value.nbytes if isinstance(value, np.ndarray) else memoryview(value).nbytes)


def held_by(value: Any) -> tuple[Any, ...]:
    """What it holds, to compare."""
    if isinstance(value, torch.Generator):
        return (value.get_state().numpy().tobytes(),)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, _GENERATORS):
        return (pickle.dumps(_state(value)),)
    content = bytes(value) if isinstance(value, bytearray) else value.tobytes()
    return getattr(value, "dtype", None), getattr(value, "shape", None), content


def fill(value: Any, held: tuple[Any, ...]) -> None:
    """Have it hold what it held."""
    if type(value) is torch.Generator:
        value.set_state(torch.frombuffer(bytearray(held[0]), dtype=torch.uint8))
    elif type(value) is random.Random:
        value.setstate(held)
    elif type(value) is np.random.RandomState:
        value.set_state(pickle.loads(held[0]))
    elif type(value) is np.random.Generator:
        value.bit_generator.state = pickle.loads(held[0])
    elif type(value) is np.ndarray:
        value[...] = np.frombuffer(held[2], held[0]).reshape(held[1])
    elif type(value) is memoryview:
        value.cast("B")[:] = held[2]
    else:
        value[:] = array.array(value.typecode, held[2]) if type(value) is array.array else held[2]


def _state(value: Any) -> Any:
    return value.get_state() if isinstance(value, np.random.RandomState) else value.bit_generator.state


def _objects(value: Any) -> tuple[Any, ...]:
    return tuple(value.ravel().tolist())


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
