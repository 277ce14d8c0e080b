"""Rows of one spec in preallocated tensors, found by one dict pass and copied from their slots."""

from __future__ import annotations

import math
import mmap
import sys
import weakref
from collections.abc import Sequence
from itertools import repeat

import numpy as np
import numpy.typing as npt
import torch

from torchcache.store.blob import RowSpec
from torchcache.store.buffers import Buffers
from torchcache.store.reuse import Reuse
from torchcache.store.select import copy_rows, place_rows, row_bytes, select_rows
from torchcache.streams import pinned

ABSENT = -1
# Python's mmap module has no name for it.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0
# Rows are moved in pieces of so many bytes.
PIECE_BYTES = 8 * 1024 * 1024
# Lookups that meet rows which move are begun again so often.
TRIES = 3


class Lease:
    """Neighbouring slots that stay where they are and as they are while anybody holds this.

    Parameters
    ----------
    slab : Slab
        Whose slots.
    start, stop : int
        The first, and the one after the last.
    """

    def __init__(self, slab: Slab, start: int, stop: int) -> None:
        self.slab = slab
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def rows(self) -> list[torch.Tensor]:
        """The slots, shared, one tensor a leaf; not to be used after the lease is gone."""
        return [leaf[self.start : self.stop] for leaf in self.slab.leaves]


class Slab:
    """Rows of one spec: a tensor of slots a leaf, and a dict from digest to slot.

    The slots in use lie one after the other, and new rows come behind them. ``give_way`` drops rows and puts the last
    ones in their places. Readers take no lock: ``version`` moves before a slot is written over that a reader may have
    found, and who finds it moved after reading begins again. Writers of new rows, and whoever reads slots over a
    longer time, hold a ``Lease``.

    Where the operating system commits memory as it is written, all slots are reserved at once; elsewhere they grow.

    Parameters
    ----------
    spec : RowSpec
        What a slot holds.
    capacity : int
        Slots at the most.
    lazy : bool
        Whether unwritten memory costs nothing.
    state : bytes
        Digest of the weights that computed the rows.
    buffers : Buffers or None
        Where batches on the CPU are made.
    reuse : Reuse or None
        What is told which rows are asked for.

    Attributes
    ----------
    version : int
        Moves whenever slots are about to be written over.
    """

    FIRST_SLOTS = 1024

    def __init__(
        self,
        spec: RowSpec,
        capacity: int,
        lazy: bool,
        state: bytes = b"",
        buffers: Buffers | None = None,
        reuse: Reuse | None = None,
    ) -> None:
        self.spec = spec
        self._buffers = buffers if buffers is not None else Buffers()
        self._reuse = reuse if reuse is not None else Reuse(0)
        self.state = state
        self.lazy = lazy
        self.capacity = capacity
        self.slots: dict[bytes, int] = {}
        self.version = 0
        # Of each slot in use: its row, once it is published, and when that was last asked for.
        self._digests: list[bytes | None] = []
        self._last = np.full(min(capacity, self.FIRST_SLOTS), -1, np.int64)
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._memories: list[tuple[mmap.mmap, int]] = []
        self._hold(self._reserved() if lazy else spec.empty(min(capacity, self.FIRST_SLOTS)))

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def used(self) -> int:
        """Slots in use."""
        return len(self._digests)

    @property
    def size(self) -> int:
        """Bytes of a slot, as budgets count them."""
        return max(self.spec.size, 1)

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The slot of each digest, ``ABSENT`` where it has none."""
        return list(map(self.slots.get, digests, repeat(ABSENT)))

    def take(self, digests: Sequence[bytes], to_send: bool = False) -> tuple[list[int], list[torch.Tensor]]:
        """The rows of ``digests``, where a device can take them from itself if they are to be sent to one.

        Returns
        -------
        slots : list of int
            Where each row was, ``ABSENT`` for those that are not here. Nothing else may be done with the numbers.
        rows : list of torch.Tensor
            Fresh tensors of those that are here, one a leaf; none where no row is.
        """
        self._reuse.clock += 1
        for _ in range(TRIES):
            version = self.version
            slots = self.find(digests)
            held = slots if ABSENT not in slots else [slot for slot in slots if slot != ABSENT]
            if digests and not held:
                return slots, []
            index = np.fromiter(held, np.int64, len(held))
            rows = self.gather(index, to_send)
            if self.version == version:
                if self._reuse.full and held:
                    self._reuse.note(int(self._last[held[0]]))
                    self._last[index] = self._reuse.clock
                return slots, rows
        return [ABSENT] * len(digests), []

    def gather(self, slots: Sequence[int] | npt.NDArray[np.int64], to_send: bool = False) -> list[torch.Tensor]:
        """Fresh tensors of shape ``(len(slots), *)``, one a leaf; right only where ``version`` did not move."""
        empty, places = pinned if to_send else self._buffers.empty, np.asarray(slots, np.int64)
        rows = [empty((len(places), *leaf.shape[1:]), leaf.dtype) for leaf in self.leaves]
        for source, target in zip(self._bytes, rows, strict=True):
            copy_rows(source, places, row_bytes(target))
        return rows

    def lease(self, count: int) -> Lease:
        """``count`` slots for new rows; called under the tier's lock, within the capacity."""
        start = self.used
        stop = start + count
        self._grow(stop)
        lease = Lease(self, start, stop)
        self._leases.add(lease)
        self._last[start:stop] = -1
        self._digests.extend([None] * count)
        return lease

    def publish(self, lease: Lease, digests: Sequence[bytes]) -> None:
        """Let readers find the first slots of ``lease``, which are written."""
        stop = lease.start + len(digests)
        self._digests[lease.start : stop] = digests
        self._last[lease.start : stop] = self._reuse.clock
        self.slots.update(zip(digests, range(lease.start, stop), strict=True))

    def write(self, lease: Lease, digests: Sequence[bytes], rows: Sequence[torch.Tensor]) -> None:
        """Fill the slots of ``lease`` with ``rows`` (cast to the slab's dtype), then publish ``digests``."""
        for slots, leaf in zip(lease.rows(), rows, strict=True):
            slots.copy_(leaf[: len(digests)])
        self.publish(lease, digests)

    def give_way(self, deadline: float, most: int) -> int:
        """Drop up to ``most`` rows that were last served before ``deadline``, longest ago first; returns how many.

        Called under the tier's lock.
        """
        used, last = self.used, self._last
        leases = list(self._leases)
        dead = np.flatnonzero(last[:used] < deadline)
        for lease in leases:
            dead = dead[(dead < lease.start) | (dead >= lease.stop)]
        kept = max([used - min(most, len(dead)), *(lease.stop for lease in leases)])
        if kept >= used:
            return 0
        dead = dead[np.argsort(last[dead], kind="stable")[: used - kept]]
        for slot in dead.tolist():
            self._unpublish(slot)
        self.version += 1  # before anything is written over
        stays = np.ones(used - kept, bool)
        stays[dead[dead >= kept] - kept] = False
        sources, targets = kept + np.flatnonzero(stays), dead[dead < kept]
        self._move(sources, targets)
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            digest = self._digests[target] = self._digests[source]
            if digest is not None and self.slots.get(digest) == source:
                self.slots[digest] = target
        last[targets] = last[sources]
        self.version += 1  # before the slots that rows were moved from are written over
        del self._digests[kept:]
        return used - kept

    def give_back(self) -> None:
        """Return the memory of slots that are not in use; called under the tier's lock after rows gave way."""
        for memory, size in self._memories:
            page = mmap.PAGESIZE
            start = -(-self.used * size // page) * page
            if start < len(memory):
                memory.madvise(mmap.MADV_DONTNEED, start, len(memory) - start)
        if not self.lazy:
            self._resize(max(self.used, min(self.capacity, self.FIRST_SLOTS)))

    def _unpublish(self, slot: int) -> None:
        digest, self._digests[slot] = self._digests[slot], None
        if digest is not None and self.slots.get(digest) == slot:
            del self.slots[digest]

    def _move(self, sources: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> None:
        piece = max(1, PIECE_BYTES // self.size)
        for start in range(0, len(sources), piece):
            part = slice(start, start + piece)
            for leaf in self.leaves:
                place_rows(leaf, targets[part], select_rows(leaf, sources[part]))

    def _grow(self, slots: int) -> None:
        """Make room for ``slots`` slots, at least doubling where there is not."""
        noted = len(self._last)
        if slots > noted:
            last = np.full(min(self.capacity, max(slots, 2 * noted)), -1, np.int64)
            last[:noted] = self._last
            self._last = last
        held = self.leaves[0].shape[0]
        if slots > held:
            self._resize(min(self.capacity, max(slots, 2 * held)))

    def _resize(self, slots: int) -> None:
        held = min(self.used, slots)
        leaves = self.spec.empty(slots)
        for new, old in zip(leaves, self.leaves, strict=True):
            new[:held].copy_(old[:held])
        self._hold(leaves)

    def _hold(self, leaves: list[torch.Tensor]) -> None:
        self.leaves, self._bytes = leaves, list(map(row_bytes, leaves))

    def _reserved(self) -> list[torch.Tensor]:
        """Tensors for all slots whose memory is committed as it is written.

        None of it is promised before: Linux refuses to fork a process that was promised more than there is, as the
        slabs of many shapes together easily are.
        """
        return [self._unpromised((self.capacity, *shape), dtype) for dtype, shape in self.spec.leaves]

    def _unpromised(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype, device="cpu")
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        self._memories.append((memory, size // shape[0]))
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
