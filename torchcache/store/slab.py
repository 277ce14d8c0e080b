"""The memory tier: rows in preallocated tensors, found by one dict pass and gathered by one ``index_select``."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import repeat

import torch

from torchcache.forks import without_forks
from torchcache.store.blob import RowSpec
from torchcache.store.buffers import Buffers
from torchcache.store.select import select_rows

__all__ = ["MemoryTier", "Slab"]

ABSENT = -1
# Python's mmap module has no name for it.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0

Tensors = Sequence[torch.Tensor]


class Slab:
    """Rows of one spec: a tensor of slots a leaf, and a dict from digest to slot.

    A slot is written once, before its digest is published, so readers need no lock. On the CPU the slots are
    reserved at once and committed by the operating system as they are written; on other devices they grow.

    Parameters
    ----------
    spec : RowSpec
        What a slot holds.
    device : torch.device
        Where the slots live.
    capacity : int
        Slots at the most.
    lazy : bool
        Whether unwritten memory of ``device`` costs nothing.
    state : bytes
        Digest of the weights that computed the rows.
    buffers : Buffers or None
        Where batches on the CPU are made.
    """

    FIRST_SLOTS = 1024

    def __init__(
        self,
        spec: RowSpec,
        device: torch.device,
        capacity: int,
        lazy: bool,
        state: bytes = b"",
        buffers: Buffers | None = None,
    ) -> None:
        self.spec = spec
        self._buffers = buffers if buffers is not None else Buffers()
        self.state = state
        self.lazy = lazy
        self.capacity = capacity
        self.slots: dict[bytes, int] = {}
        self.used = 0
        self._leaves = _reserve(spec, capacity) if lazy else spec.empty(min(capacity, self.FIRST_SLOTS), device)

    def __len__(self) -> int:
        return len(self.slots)

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The slot of each digest, ``ABSENT`` where it has none."""
        return list(map(self.slots.get, digests, repeat(ABSENT)))

    def gather(self, slots: Sequence[int]) -> list[torch.Tensor]:
        """Fresh tensors of shape ``(len(slots), *)``, one a leaf."""
        if self._leaves[0].device.type != "cpu":
            return [select_rows(leaf, slots) for leaf in self._leaves]
        empty, count = self._buffers.empty, len(slots)
        return [select_rows(leaf, slots, empty((count, *leaf.shape[1:]), leaf.dtype)) for leaf in self._leaves]

    def view(self, start: int, stop: int) -> list[torch.Tensor]:
        """The written slots from ``start`` to ``stop``, shared; slots never change once written."""
        return [leaf[start:stop] for leaf in self._leaves]

    def write(self, start: int, digests: Sequence[bytes], rows: Sequence[torch.Tensor]) -> None:
        """Fill the slots from ``start`` with ``rows`` (cast to the slab's dtype), then publish ``digests``."""
        stop = start + len(digests)
        for slots, leaf in zip(self._leaves, rows, strict=True):
            slots[start:stop].copy_(leaf[: len(digests)])
        self.slots.update(zip(digests, range(start, stop), strict=True))

    def grow(self, slots: int) -> None:
        """Make room for ``slots`` slots, at least doubling where there is not."""
        held = self._leaves[0].shape[0]
        if slots <= held:
            return
        larger = self.spec.empty(min(self.capacity, max(slots, 2 * held)), self._leaves[0].device)
        for new, old in zip(larger, self._leaves, strict=True):
            new[:held].copy_(old)
        self._leaves = larger


class MemoryTier:
    """Slabs under one budget: one for each call fingerprint, that is for each shape and dtype of row.

    A full tier admits no new rows and keeps those it has: scans over a data set larger than the budget then
    hit a stable share of it in every epoch, where an evicting cache would hit none. Only rows of weights that are
    no longer in use make room for others.

    Parameters
    ----------
    budget : int
        Bytes of rows over all slabs.

    Attributes
    ----------
    buffers : Buffers
        Where batches on the CPU are made.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self.buffers = Buffers()
        self._slabs: dict[bytes, Slab] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, list(self._slabs.values())))

    def slab(self, fingerprint: bytes) -> Slab | None:
        """The slab of ``fingerprint``, if it has rows."""
        return self._slabs.get(fingerprint)

    @without_forks
    def admit(
        self,
        fingerprint: bytes,
        digests: Sequence[bytes],
        rows: Sequence[torch.Tensor],
        spec: RowSpec,
        device: torch.device,
        state: bytes = b"",
    ) -> tuple[Slab | None, range]:
        """Store as many of ``rows`` as the budget allows, first ones first.

        Returns
        -------
        slab : Slab or None
            Where they went.
        slots : range
            Their slots, in order; shorter than ``digests`` when the tier is full.
        """
        with self._lock:
            slab, slots = self._reserve(fingerprint, len(digests), spec, device, state)
            if slab is not None and slots and not slab.lazy:
                slab.write(slots.start, digests[: len(slots)], rows)
        if slab is not None and slots and slab.lazy:
            slab.write(slots.start, digests[: len(slots)], rows)
        return slab, slots

    @without_forks
    def admit_by(
        self,
        fingerprint: bytes,
        digests: Sequence[bytes],
        fill: Callable[[int, Tensors], list[int]],
        spec: RowSpec,
        device: torch.device,
        state: bytes = b"",
    ) -> tuple[Slab | None, list[int], int]:
        """Store rows that ``fill`` writes where they are kept.

        ``fill`` is given how many of the first rows are wanted and the tensors for them; it writes the good ones
        among these, one after the other, and returns their indices.

        Returns
        -------
        slab : Slab or None
            Where they went.
        good : list of int
            Indices of the rows that are stored now.
        tried : int
            How many of the first rows the budget allowed.
        """
        if device.type != "cpu":
            rows = spec.empty(len(digests))
            good = fill(len(digests), rows)
            slab, slots = self.admit(fingerprint, [digests[index] for index in good], rows, spec, device, state)
            tried = len(digests) if len(slots) == len(good) else good[len(slots)]
            return slab, good[: len(slots)], tried
        with self._lock:
            slab, slots = self._reserve(fingerprint, len(digests), spec, device, state)
            if slab is None or not slots:
                return slab, [], 0
            if not slab.lazy:  # the slots may move when they grow
                good = self._fill(slab, slots, digests, fill)
        if slab.lazy:
            good = self._fill(slab, slots, digests, fill)
        return slab, good, len(slots)

    def _fill(
        self, slab: Slab, slots: range, digests: Sequence[bytes], fill: Callable[[int, Tensors], list[int]]
    ) -> list[int]:
        good = fill(len(slots), slab.view(slots.start, slots.stop))
        slab.slots.update(zip([digests[index] for index in good], slots, strict=False))
        return good

    def _reserve(
        self, fingerprint: bytes, wanted: int, spec: RowSpec, device: torch.device, state: bytes
    ) -> tuple[Slab | None, range]:
        size = max(spec.size, 1)
        slab = self._slabs.get(fingerprint)
        if (self.budget - self.used) // size < wanted:
            self._drop_other_states(state)
        count = min((self.budget - self.used) // size, wanted)
        if count <= 0:
            return slab, range(0)
        try:
            if slab is None:
                slab = self._new_slab(spec, device, state)
            slab.grow(slab.used + count)
        except RuntimeError:  # no memory: the tier is as full as it gets
            return slab, range(0)
        self._slabs[fingerprint] = slab
        slots = range(slab.used, slab.used + count)
        slab.used += count
        self.used += count * size
        return slab, slots

    def _new_slab(self, spec: RowSpec, device: torch.device, state: bytes) -> Slab:
        capacity = self.budget // max(spec.size, 1)
        self.buffers.kept = 2 * len(spec.leaves)
        if device.type == "cpu" and os.name == "posix":
            # Any slab may come to have the whole budget, when others are dropped.
            with contextlib.suppress(OSError, RuntimeError):  # a system that promises no more memory than it has
                return Slab(spec, device, capacity, True, state, self.buffers)
        return Slab(spec, device, capacity, False, state, self.buffers)

    @without_forks
    def drop_state(self, state: bytes) -> None:
        """Forget the rows of one identity."""
        with self._lock:
            for fingerprint, slab in list(self._slabs.items()):
                if slab.state == state:
                    self._drop(fingerprint)

    def _drop(self, fingerprint: bytes) -> None:
        slab = self._slabs.pop(fingerprint)
        self.used -= slab.used * max(slab.spec.size, 1)

    def _drop_other_states(self, state: bytes) -> None:
        for fingerprint, slab in list(self._slabs.items()):
            if slab.state != state:
                self._drop(fingerprint)

    @without_forks
    def clear(self) -> None:
        """Forget every row."""
        with self._lock:
            self._slabs = {}
            self.used = 0


def _reserve(spec: RowSpec, count: int) -> list[torch.Tensor]:
    """Tensors for ``count`` rows whose memory is committed as it is written.

    None of it is promised before: Linux refuses to fork a process that was promised more than there is, as the slabs of
    many shapes together easily are.
    """
    return [_unpromised((count, *shape), dtype) for dtype, shape in spec.leaves]


def _unpromised(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
