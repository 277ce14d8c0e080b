"""Rows on the device of their user: copies of rows in memory, which need not be sent again, within a share of it.

What lies here lies in memory, too, or can be computed, so that all of it may go at any time: when the device's memory
is needed for something else it goes at once, and less is kept from then on.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from itertools import repeat

import torch

from torchcache.forks import without_forks
from torchcache.logging import logger
from torchcache.store.blob import RowSpec
from torchcache.store.select import place_rows, select_rows
from torchcache.store.slab import ABSENT
from torchcache.streams import follow, send

# Slots that the first rows of a kind are given.
FIRST_SLOTS = 1024
# How often a device is asked how much of its memory is free, in seconds.
LOOK_SECONDS = 0.1
# For how long nothing is kept where rows had to leave.
REST_SECONDS = 30.0

Rows = tuple[list[int], list[torch.Tensor]]


class _Device:
    """How much of a device's memory rows of this process take.

    Attributes
    ----------
    held : int
        Bytes of all rows there.
    users : WeakSet
        Who has rows there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held = 0
        self.users: weakref.WeakSet[Near] = weakref.WeakSet()
        self._part = 1.0
        self._looked, self._rests = -LOOK_SECONDS, 0.0
        self._retries = self._out_of_memory()
        if not self._free():
            logger.info("%s: no rows are kept there, since it does not tell how much of its memory is free", device)

    def allows(self, more: int, share: float) -> bool:
        """Whether rows may take so many bytes more: together no more than a share of what else would be free."""
        free = self._free()
        rests = more > 0 and time.monotonic() < self._rests
        return not rests and free > 0 and self.held + more <= self._part * share * (free + self.held)

    def check(self, share: float) -> None:
        """Let all rows go where something else needs the memory: less is free than is allowed for, or none was."""
        now = time.monotonic()
        if not self.held or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        before, self._retries = self._retries, self._out_of_memory()
        if self._retries == before and self.allows(0, share):
            return
        self._part /= 2
        self._rests = now + REST_SECONDS
        logger.info("%s: rows of the cache leave it, since its memory is needed for something else", self.device)
        for near in list(self.users):
            near.leave(self.device)

    def note_failures(self) -> None:
        """Let allocations that failed so far count for nothing."""
        self._retries = self._out_of_memory()

    def _free(self) -> int:
        module = torch.get_device_module(self.device)
        try:
            free = int(module.mem_get_info(self.device)[0])
            fraction = getattr(module, "get_per_process_memory_fraction", None)
            if fraction is not None and (part := fraction(self.device)) < 1:
                most = part * module.mem_get_info(self.device)[1]
                free = min(free, int(most) - module.memory_reserved(self.device))
        except Exception:  # a device that does not tell
            return 0
        return free

    def _out_of_memory(self) -> int:
        """How often an allocation failed at first, or for good, as far as the device tells."""
        try:
            stats = torch.get_device_module(self.device).memory_stats(self.device)
            return int(stats.get("num_alloc_retries", 0)) + int(stats.get("num_ooms", 0))
        except Exception:
            return 0


class _Kept:
    """Rows of one spec on one device; slots are written once."""

    def __init__(self, spec: RowSpec, memory: _Device, state: bytes) -> None:
        self.spec, self.state = spec, state
        self.slots: dict[bytes, int] = {}
        self.leaves = spec.empty(0, memory.device)
        self.stream = torch.accelerator.current_stream(memory.device)
        self._memory, self._held = memory, 0

    def __del__(self) -> None:
        self._memory.held -= self._held

    @property
    def capacity(self) -> int:
        """Slots."""
        return int(self.leaves[0].shape[0])

    @property
    def left(self) -> int:
        """Slots that are not in use."""
        return self.capacity - len(self.slots)

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The slot of each digest, ``ABSENT`` where it has none."""
        return list(map(self.slots.get, digests, repeat(ABSENT)))

    def gather(self, slots: Sequence[int]) -> list[torch.Tensor]:
        """Fresh tensors of rows, one a leaf."""
        self._follow()
        return [select_rows(leaf, slots) for leaf in self.leaves]

    def add(self, digests: Sequence[bytes], rows: Sequence[torch.Tensor]) -> None:
        """Write rows to slots behind those in use, of which enough are left."""
        self._follow()
        start, stop = len(self.slots), len(self.slots) + len(digests)
        for leaf, new in zip(self.leaves, rows, strict=True):
            leaf[start:stop].copy_(new)
        self.slots.update(zip(digests, range(start, stop), strict=True))

    def grow(self, wanted: int, share: float) -> None:
        """Have ``wanted`` slots, or twice as many as there were, where there is room for them beside the old ones."""
        for slots in (max(wanted, 2 * self.capacity, FIRST_SLOTS), wanted):
            if not self._memory.allows(self._bytes(slots), share):
                continue
            self._follow()
            used = len(self.slots)
            try:
                leaves = self.spec.empty(slots, self._memory.device)
            except RuntimeError:  # somebody was faster
                return
            finally:
                self._memory.note_failures()
            for new, old in zip(leaves, self.leaves, strict=True):
                new[:used].copy_(old[:used])
            self.leaves = leaves
            self._memory.held += self._bytes(slots) - self._held
            self._held = self._bytes(slots)
            return

    def _bytes(self, slots: int) -> int:
        return slots * max(self.spec.size, 1)

    def _follow(self) -> None:
        self.stream = follow(self.leaves, self.stream)


class Near:
    """The rows of one region that its devices hold.

    Parameters
    ----------
    share : float
        How much of what is free of a device's memory rows of all regions may take together.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._kept: dict[tuple[bytes, torch.device], _Kept] = {}
        self._lock = threading.Lock()

    @without_forks
    def take(
        self,
        fingerprint: bytes,
        digests: Sequence[bytes],
        device: torch.device,
        below: Callable[[Sequence[bytes]], Rows],
        spec: RowSpec,
        state: bytes,
    ) -> Rows:
        """The rows of ``digests`` on ``device``; ``below`` gives those that are not here, on the host.

        Returns
        -------
        slots : list of int
            For each of the digests ``ABSENT`` where its row was nowhere.
        rows : list of torch.Tensor
            Fresh tensors of the others, one a leaf, in order.
        """
        memory = _device(device)
        memory.check(self._share)
        with self._lock:
            kept = self._kept.get((fingerprint, device))
            slots = kept.find(digests) if kept is not None else [ABSENT] * len(digests)
            here = [place for place, slot in enumerate(slots) if slot != ABSENT]
            held = kept.gather([slots[place] for place in here]) if kept is not None and here else []
        if len(here) == len(digests):
            return slots, held
        others = [place for place, slot in enumerate(slots) if slot == ABSENT]
        lower, rows = below([digests[place] for place in others])
        found = [place for place, slot in zip(others, lower, strict=True) if slot != ABSENT]
        if not found:
            return slots, held
        sent = [send(leaf, device) for leaf in rows]
        with self._lock:
            kept = self._kept.get((fingerprint, device)) or _Kept(spec, memory, state)
            if self._keep(kept, [digests[place] for place in found], sent):
                self._kept[fingerprint, device] = kept
                memory.users.add(self)
        for place, slot in zip(others, lower, strict=True):
            slots[place] = slot
        return slots, _joined(here, held, found, sent) if here else sent

    def _keep(self, kept: _Kept, digests: Sequence[bytes], rows: Sequence[torch.Tensor]) -> bool:
        """Keep as many of the rows as there is room for; whether any is kept."""
        new: dict[bytes, int] = {}
        for place, digest in enumerate(digests):
            if digest not in kept.slots:  # as another thread may have kept it meanwhile
                new.setdefault(digest, place)
        if len(new) > kept.left:
            kept.grow(len(kept.slots) + len(new), self._share)
        places = list(new.values())[: kept.left]
        if places:
            chosen = rows if len(places) == len(digests) else [select_rows(leaf, places) for leaf in rows]
            kept.add([digests[place] for place in places], chosen)
        return bool(places)

    def leave(self, device: torch.device) -> None:
        """Let the rows on a device go, whatever is being done with them."""
        for name in [name for name in list(self._kept) if name[1] == device]:
            self._kept.pop(name, None)

    def drop_state(self, state: bytes) -> None:
        """Let the rows of one identity go."""
        for name, kept in list(self._kept.items()):
            if kept.state == state:
                self._kept.pop(name, None)


def _joined(
    here: Sequence[int], held: Sequence[torch.Tensor], found: Sequence[int], sent: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Rows of two sources in the order of their places."""
    ranks = {place: rank for rank, place in enumerate(sorted([*here, *found]))}
    joined = []
    for one, other in zip(held, sent, strict=True):
        whole = torch.empty((len(ranks), *one.shape[1:]), dtype=one.dtype, device=one.device)
        place_rows(whole, [ranks[place] for place in here], one)
        place_rows(whole, [ranks[place] for place in found], other)
        joined.append(whole)
    return joined


_devices: dict[torch.device, _Device] = {}


def _device(device: torch.device) -> _Device:
    known = _devices.get(device)
    if known is None:
        known = _devices[device] = _Device(device)
    return known
