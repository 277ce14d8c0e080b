"""The memory tier: slabs under one budget, and which rows of a full one give way to others."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence

import torch

from torchcache.forks import without_forks
from torchcache.store.blob import RowSpec
from torchcache.store.buffers import Buffers
from torchcache.store.reuse import Reuse
from torchcache.store.select import select_rows
from torchcache.store.slab import Lease, Slab

Tensors = Sequence[torch.Tensor]

# Rows give way a share of a slab at a time, and after a look in vain that share is refused before the next.
PORTION = 32


class MemoryTier:
    """Slabs under one budget: one for each call fingerprint, that is for each shape and dtype of row.

    A full tier admits a row when it is asked for again, and where others were idle for longer than rows usually take to
    return: those give way, longest idle first. Rows that never return replace nothing, and scans over a data set
    larger than the budget hit a stable share of it in every epoch. Rows of weights that are no longer in use make
    room for any other.

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
        self._reuse = Reuse(budget)
        self._refused = 0
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
        state: bytes = b"",
    ) -> tuple[Lease | None, Sequence[int]]:
        """Store as many of ``rows`` as there is room for, first ones first, then those that were asked for before.

        Returns
        -------
        lease : Lease or None
            Their slots; they are not written over while it is held.
        places : sequence of int
            Which of ``rows`` they are, in order.
        """
        with self._lock:
            self._make_room(len(digests), spec, state)
            places: Sequence[int] = range(min(self._room(spec), len(digests)))
            if len(places) < len(digests):
                places = self._choose(fingerprint, digests, len(places), spec)
            lease = self._lease(fingerprint, len(places), spec, state)
            if lease is None:
                return None, []
            places = places[: len(lease)]
            first = isinstance(places, range)
            chosen = rows if first else [select_rows(leaf, places) for leaf in rows]
            lease.slab.write(lease, [digests[place] for place in places], [leaf[: len(places)] for leaf in chosen])
        return lease, places

    @without_forks
    def admit_by(
        self,
        fingerprint: bytes,
        digests: Sequence[bytes],
        fill: Callable[[int, Tensors], list[int]],
        spec: RowSpec,
        state: bytes = b"",
    ) -> tuple[list[int], int]:
        """Store rows that ``fill`` writes where they are kept; no row gives way.

        ``fill`` is given how many of the first rows are wanted and the tensors for them; it writes the good ones
        among these, one after the other, and returns their indices.

        Returns
        -------
        good : list of int
            Indices of the rows that are stored now.
        tried : int
            How many of the first rows there was room for.
        """
        with self._lock:
            self._make_room(len(digests), spec, state)
            count = min(self._room(spec), len(digests))
            lease = self._lease(fingerprint, count, spec, state)
            if lease is None:
                return [], 0
            if not lease.slab.lazy:  # the slots may move when they grow
                return self._fill(lease, digests, fill), len(lease)
        return self._fill(lease, digests, fill), len(lease)

    def _fill(self, lease: Lease, digests: Sequence[bytes], fill: Callable[[int, Tensors], list[int]]) -> list[int]:
        good = fill(len(lease), lease.rows())
        lease.slab.publish(lease, [digests[index] for index in good])
        return good

    def _room(self, spec: RowSpec) -> int:
        return max(self.budget - self.used, 0) // max(spec.size, 1)

    def _make_room(self, wanted: int, spec: RowSpec, state: bytes) -> None:
        if self._room(spec) < wanted:
            for fingerprint, slab in list(self._slabs.items()):
                if slab.state != state:
                    self._drop(fingerprint)

    def _choose(self, fingerprint: bytes, digests: Sequence[bytes], first: int, spec: RowSpec) -> Sequence[int]:
        """Places of the rows to admit to a full tier."""
        self._reuse.full = True
        again = [first + place for place in self._reuse.returning(fingerprint, digests[first:])]
        if not again:
            return range(first)
        self._give_way(fingerprint, first + len(again), spec)
        return [*range(first), *again][: self._room(spec)]

    def _give_way(self, fingerprint: bytes, wanted: int, spec: RowSpec) -> None:
        """Drop rows that are of no more use until ``wanted`` others fit, from their own slab first."""
        deadline = self._reuse.deadline()
        self._refused -= wanted
        if deadline is None or self._refused > 0:
            return
        slabs = sorted(self._slabs.items(), key=lambda item: item[0] != fingerprint)
        for name, slab in slabs:
            lacking = (wanted - self._room(spec)) * max(spec.size, 1)
            if lacking <= 0:
                return
            gone = slab.give_way(deadline, max(-(-lacking // slab.size), slab.used // PORTION))
            self.used -= gone * slab.size
            if gone and name != fingerprint:
                slab.give_back()
                if not slab.used:
                    self._drop(name)
        if self._room(spec) < wanted:
            self._refused = sum(slab.used for _, slab in slabs) // PORTION

    def _lease(self, fingerprint: bytes, count: int, spec: RowSpec, state: bytes) -> Lease | None:
        if count <= 0:
            return None
        slab = self._slabs.get(fingerprint)
        try:
            if slab is None:
                slab = self._new_slab(spec, state)
            lease = slab.lease(min(count, slab.capacity - slab.used))
        except (MemoryError, RuntimeError):  # the tier is as full as it gets
            return None
        self._slabs[fingerprint] = slab
        self.used += len(lease) * slab.size
        return lease

    def _new_slab(self, spec: RowSpec, state: bytes) -> Slab:
        capacity = self.budget // max(spec.size, 1)
        self.buffers.kept = 3 * len(spec.leaves)  # two batches, and rows that are cast to another dtype
        if os.name == "posix":
            # Any slab may come to have the whole budget, when others are dropped.
            with contextlib.suppress(OSError, RuntimeError):  # a system that promises no more memory than it has
                return Slab(spec, capacity, True, state, self.buffers, self._reuse)
        return Slab(spec, capacity, False, state, self.buffers, self._reuse)

    @without_forks
    def drop_state(self, state: bytes) -> None:
        """Forget the rows of one identity."""
        with self._lock:
            for fingerprint, slab in list(self._slabs.items()):
                if slab.state == state:
                    self._drop(fingerprint)

    def _drop(self, fingerprint: bytes) -> None:
        slab = self._slabs.pop(fingerprint)
        self.used -= slab.used * slab.size
