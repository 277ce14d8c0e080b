"""What has contents of its own, which no attribute shows: how these are compared and put back."""

from __future__ import annotations

import array
import contextvars
import functools
import inspect
import pickle
import random
import types
from typing import Any

import numpy as np
import torch

from torchcache.identity.homes import home_of, is_installed, is_named
from torchcache.identity.watch import same

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_PACKED = (np.ndarray, bytearray, array.array, memoryview)
_Cached = functools._lru_cache_wrapper
# None of it is a tensor.
FILLED = (*_PACKED, *GENERATORS, contextvars.ContextVar, _Cached)
# Bytes of others, about: the largest is the state of a generator.
_STATE_BYTES = 5056
_TAKES_MORE = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def is_writable(value: Any) -> bool:
    """Whether it may be written to in place, and all that it holds can be put back."""
    if isinstance(value, np.ndarray):
        return bool(value.flags.writeable) and (value.dtype.kind == "O" or not value.dtype.hasobject)
    if type(value) is contextvars.ContextVar:
        return held_by(value) != ()
    if isinstance(value, _Cached):
        return keeps_one(value) and not held_by(value)
    return type(value) in FILLED and not (type(value) is memoryview and (value.readonly or value.ndim != 1))


def keeps_one(cached: Any) -> bool:
    """Whether what a function behind ``functools.lru_cache`` keeps is one object, which code may write to."""
    function = cached.__wrapped__
    if type(function) is not types.FunctionType or is_installed(home_of(function)) or is_named(home_of(function)):
        return False
    code = function.__code__
    return not (code.co_argcount or code.co_kwonlyargcount or code.co_flags & _TAKES_MORE)


def _is_of_objects(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.hasobject


def size_of(value: Any) -> int:
    """How many bytes it holds."""
    if not isinstance(value, _PACKED):
        return _STATE_BYTES
    return int(value.nbytes if isinstance(value, np.ndarray) else memoryview(value).nbytes)


def held_by(value: Any) -> tuple[Any, ...]:
    """What it holds, to compare; of a cache, a variable of contexts and an array of objects these themselves."""
    if isinstance(value, np.ndarray):
        value = value.view(np.ndarray)  # a class of its own may show something else
    if isinstance(value, contextvars.ContextVar):
        try:
            return (value.get(),)  # a default of the call's own would stand before that of the variable
        except LookupError:
            return ()
    if isinstance(value, _Cached):
        return (value(),) if value.cache_info().currsize else ()
    if isinstance(value, torch.Generator):
        return (value.get_state().numpy().tobytes(),)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.RandomState):
        return (pickle.dumps(value.get_state()),)
    if isinstance(value, np.random.Generator):
        return (pickle.dumps(value.bit_generator.state),)
    if _is_of_objects(value):
        return tuple(value.ravel().tolist())
    content = bytes(value) if isinstance(value, bytearray) else value.tobytes()
    return getattr(value, "dtype", None), getattr(value, "shape", None), content


def holds(value: Any, held: tuple[Any, ...]) -> bool:
    """Whether it holds what it held."""
    if isinstance(value, (contextvars.ContextVar, _Cached)) or _is_of_objects(value):
        return same(held_by(value), held)  # their own ``==`` may be anything
    return held_by(value) == held


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
    elif type(value) is contextvars.ContextVar:
        value.set(held[0])
    elif type(value) is _Cached:
        value.cache_clear()
    elif isinstance(value, np.ndarray):
        flat = np.fromiter(held, object, len(held)) if _is_of_objects(value) else np.frombuffer(held[2], held[0])
        value.view(np.ndarray)[...] = flat.reshape(value.shape)
    elif type(value) is memoryview:
        value.cast("B")[:] = held[2]
    else:
        value[:] = array.array(value.typecode, held[2]) if type(value) is array.array else held[2]
