"""Arrays, buffers and random generators: what they hold, which no attribute does, compared and put back."""

from __future__ import annotations

import array
import pickle
import random
from typing import Any

import numpy as np
import torch

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
# What has contents of its own, and is no tensor.
FILLED = (np.ndarray, bytearray, array.array, memoryview, *GENERATORS)
# Bytes of the largest state of a generator, about.
_STATE_BYTES = 5056


def is_writable(value: Any) -> bool:
    """Whether it may be written to in place, and all that it holds can be put back."""
    if type(value) is np.ndarray:
        return bool(value.flags.writeable and not value.dtype.hasobject)
    return type(value) in FILLED and not (type(value) is memoryview and (value.readonly or value.ndim != 1))


def size_of(value: Any) -> int:
    """How many bytes it holds."""
    if isinstance(value, GENERATORS):
        return _STATE_BYTES
    return int(value.nbytes if isinstance(value, np.ndarray) else memoryview(value).nbytes)


def held_by(value: Any) -> tuple[Any, ...]:
    """What it holds, to compare."""
    if isinstance(value, torch.Generator):
        return (value.get_state().numpy().tobytes(),)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.RandomState):
        return (pickle.dumps(value.get_state()),)
    if isinstance(value, np.random.Generator):
        return (pickle.dumps(value.bit_generator.state),)
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
