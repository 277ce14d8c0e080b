"""Random numbers that loading draws: from the generators of the process, and from those that a data set holds."""

from __future__ import annotations

import contextlib
import gc
import pickle
import random
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["Chance", "other_chance"]

# Objects of a data set that are looked through for generators, at most.
MOST = 100_000
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_ENDS = (types.ModuleType, type, torch.Tensor, np.ndarray, str, bytes, int, float)


class Chance:
    """The state of all generators that loading a sample may draw from.

    Parameters
    ----------
    dataset : Dataset
        Generators among its attributes, at any depth, are looked for once.
    """

    def __init__(self, dataset: Any) -> None:
        self._own = _generators(dataset)

    def states(self) -> list[Any]:
        """What differs as soon as one was drawn from."""
        held = [torch.get_rng_state().numpy().tobytes(), random.getstate(), pickle.dumps(np.random.get_state())]
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            held.append(torch.cuda.get_rng_state().numpy().tobytes())
        return held + [_state(generator) for generator in self._own]


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    return generator.getstate() if isinstance(generator, random.Random) else pickle.dumps(generator)


def _generators(dataset: Any) -> list[Any]:
    seen: set[int] = set()
    found: list[Any] = []
    left = [dataset]
    while left and len(seen) < MOST:
        value = left.pop()
        if id(value) in seen or isinstance(value, _ENDS):
            continue
        seen.add(id(value))
        if isinstance(value, _GENERATORS):
            found.append(value)
        elif isinstance(value, types.FunctionType):  # its globals are the whole program
            left += [value.__closure__, value.__defaults__, value.__kwdefaults__]
        else:
            left += gc.get_referents(value)
    return found


@contextlib.contextmanager
def other_chance() -> Iterator[None]:
    """Other random numbers than those of training, whose generators are put back."""
    held = torch.get_rng_state(), random.getstate(), np.random.get_state()
    seed = random.Random().getrandbits(32)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(held[0])
        random.setstate(held[1])
        np.random.set_state(held[2])
