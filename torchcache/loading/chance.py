"""Random numbers that loading draws: from the generators of the process, and from those that a data set reaches."""

from __future__ import annotations

import collections
import gc
import itertools
import pickle
import random
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from torchcache.identity.filled import GENERATORS, held_by

# Objects that are looked through for generators, at most, and entries of one container.
MOST = 20_000
ENTRIES = 64
_ENDS = (torch.Tensor, np.ndarray, str, bytes, int, float)


class Chance:
    """The state of all generators that loading a sample may draw from.

    Parameters
    ----------
    dataset : Dataset
        Generators that it holds, that its code names, or that are attributes of its classes, are looked for once. Not
        all can be found: samples that differ when they are loaded again show the others.
    """

    def __init__(self, dataset: Any) -> None:
        self._own = _generators(dataset)

    def states(self) -> list[Any]:
        """What differs as soon as one was drawn from."""
        held = [torch.get_rng_state().numpy().tobytes(), random.getstate(), pickle.dumps(np.random.get_state())]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            held.append(torch.cuda.get_rng_state().numpy().tobytes())
        return held + [held_by(generator) for generator in self._own]


def _generators(dataset: Any) -> list[Any]:
    """Generators near the data set first."""
    seen: set[int] = set()
    found: list[Any] = []
    left = collections.deque([dataset])
    while left and len(seen) < MOST:
        value = left.popleft()
        if id(value) in seen or issubclass(type(value), _ENDS):  # what an object says of its class is its own code
            continue
        seen.add(id(value))
        if issubclass(type(value), GENERATORS):
            found.append(value)
        else:
            left.extend(_within(value))
    return found


def _within(value: Any) -> Iterable[Any]:
    kind = type(value)
    if issubclass(kind, types.ModuleType):
        return ()
    if kind is types.FunctionType:
        closed = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        return [*closed, value.__defaults__, value.__kwdefaults__, *_named(value)]
    if issubclass(kind, type):
        return [] if value.__module__.partition(".")[0] in ("builtins", "torch", "numpy") else [*vars(value).values()]
    if kind is dict:
        return itertools.islice(value.values(), ENTRIES)
    if kind in (list, tuple, set, frozenset, collections.deque):
        return itertools.islice(value, ENTRIES)
    return gc.get_referents(value)


def _named(function: types.FunctionType) -> Iterator[Any]:
    """What a function's code names among its globals, and in modules that it names."""
    codes = [function.__code__]
    for code in codes:
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    names = dict.fromkeys(name for code in codes for name in code.co_names)
    for name in names:
        value = function.__globals__.get(name)
        if type(value) is types.ModuleType:
            members = (vars(value).get(inner) for inner in names)
            yield from (member for member in members if issubclass(type(member), GENERATORS))
        else:
            yield value
