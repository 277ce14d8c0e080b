"""Random numbers: whether an original draws any, and the generators given back after what runs in addition."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class Generators:
    """The state of every generator that an original could draw from: Python's, NumPy's, torch's on each device."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state(legacy=False)
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if _uses_cuda() else []

    def moved(self) -> bool:
        """Whether anything was drawn since."""
        now = Generators()
        return (
            self._python != now._python
            or _numpy_bytes(self._numpy) != _numpy_bytes(now._numpy)
            or not torch.equal(self._torch, now._torch)
            or len(self._cuda) != len(now._cuda)
            or not all(map(torch.equal, self._cuda, now._cuda))
        )

    def restore(self) -> None:
        """Give the generators back as they were."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Leave every generator as it was before this block."""
    before = Generators()
    try:
        yield
    finally:
        if before.moved():
            before.restore()


def _uses_cuda() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _numpy_bytes(state: Any) -> tuple[bytes, int, int]:
    return state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"]
