"""Memory for batches that are served: a large one is used again when nobody holds the batch in it any more.

Allocators give the memory of large tensors back to the system, which hands it out anew page by page, all zero: that
takes several times as long as copying the rows.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import torch

# Allocators keep shorter ones themselves.
SHORTEST = 1024 * 1024
# A buffer serves tensors down to this share of its length.
LEAST_USE = 0.5


class Buffers:
    """CPU memory that is lent to tensors, and lent again once they are gone.

    There is no lock: a buffer that one thread looks at is in no other's reach.

    Attributes
    ----------
    kept : int
        How many are remembered, the latest ones: a batch is made while the one before is still in use.
    """

    def __init__(self) -> None:
        self.kept = 2
        # Each with a reference to what its latest tensor's storage holds, and nothing else does.
        self._lent: deque[tuple[torch.Tensor, Callable[[], memoryview | None]]] = deque()

    def __len__(self) -> int:
        return len(self._lent)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the CPU, its contents undefined; where it is long, in memory that was used before if there is."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size < SHORTEST:
            return torch.empty(shape, dtype=dtype, device="cpu")
        buffer = self._unused(size)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        self._lent.append((buffer, weakref.ref(view)))
        return torch.frombuffer(view, dtype=dtype, count=count).view(shape).detach()

    def _unused(self, size: int) -> torch.Tensor:
        with contextlib.suppress(IndexError):  # another thread has the last one
            for _ in range(len(self._lent)):
                buffer, user = self._lent.popleft()
                if user() is None and LEAST_USE * len(buffer) <= size <= len(buffer):
                    return buffer
                self._lent.append((buffer, user))
            while len(self._lent) >= self.kept:
                self._lent.popleft()
        return torch.empty(size, dtype=torch.uint8, device="cpu")
