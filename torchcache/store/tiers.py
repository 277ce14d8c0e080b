"""Memory over disk: where a region's rows are looked up and kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from torchcache.forks import without_forks
from torchcache.options import CacheOptions
from torchcache.store.blob import Codec, RowSpec, storable
from torchcache.store.catalogue import Region
from torchcache.store.disk import DiskTier, Places, disk_tier
from torchcache.store.file import BlobFile
from torchcache.store.scan import Scan
from torchcache.store.slab import ABSENT, MemoryTier, Slab
from torchcache.store.writer import writer

__all__ = ["Found", "Tiers"]

DIGEST_SIZE = 16


@dataclasses.dataclass
class Found:
    """What the tiers hold of one batch.

    Parameters
    ----------
    fingerprint : bytes
        Of the call.
    slab : Slab or None
        The memory tier's rows.
    slots : list of int
        Slot of each row of the batch, ``ABSENT`` where it is not in memory.
    extra : dict of bytes to int
        Rows read from disk that memory had no room for: digest to row of ``extra_rows``.
    extra_rows : list of torch.Tensor
        Those rows, one tensor a leaf.
    from_disk : frozenset of bytes
        Digests that the disk tier answered.
    """

    fingerprint: bytes
    slab: Slab | None
    slots: list[int]
    extra: dict[bytes, int] = dataclasses.field(default_factory=dict)
    extra_rows: list[torch.Tensor] = dataclasses.field(default_factory=list)
    from_disk: frozenset[bytes] = frozenset()


class Tiers:
    """The store of one region.

    Parameters
    ----------
    options : CacheOptions
        Sizes, directory, devices.
    """

    def __init__(self, options: CacheOptions) -> None:
        self.options = options
        self.memory = MemoryTier(options.max_memory_cache_size)
        directory = options.directory
        self.disk: DiskTier | None = disk_tier(directory) if directory is not None else None
        self.disk_rows = 0
        self.disk_bytes = 0
        self._codecs: dict[RowSpec, Codec] = {}
        self._scans: dict[bytes, Scan] = {}

    def stored(self, spec: RowSpec) -> RowSpec:
        """``spec`` as the tiers keep it: floating leaves in ``cache_dtype``."""
        dtype = self.options.cache_dtype
        if dtype is None:
            return spec
        return RowSpec(tuple((dtype if old.is_floating_point else old, shape) for old, shape in spec.leaves))

    def find(
        self,
        fingerprint: bytes,
        digests: Sequence[bytes],
        expected: Callable[[], tuple[RowSpec, torch.device]],
        state: bytes,
        ahead: Found | None = None,
    ) -> Found:
        """Look ``digests`` up in memory, then the rest on disk; what disk has is promoted to memory.

        Parameters
        ----------
        fingerprint, digests
            The keys.
        expected : callable
            What a row holds and on which device its user is; asked only where disk has rows.
        state : bytes
            Digest of the weights that compute such rows now.
        ahead : Found or None
            What was found for the same keys before: rows that memory had no room for are not read again.
        """
        scan = self._scans.get(fingerprint)
        early = scan.ask(digests) if scan is not None else frozenset()
        slab = self.memory.slab(fingerprint)
        slots = slab.find(digests) if slab is not None else [ABSENT] * len(digests)
        found = Found(fingerprint, slab, slots)
        if early and slab is not None:
            found.from_disk = frozenset(digest for digest in early if digest in slab.slots)
        if self.disk is None or ABSENT not in slots:
            return found
        absent = list(dict.fromkeys(digest for digest, slot in zip(digests, slots, strict=True) if slot == ABSENT))
        if ahead is not None and ahead.fingerprint == fingerprint and ahead.extra.keys() >= set(absent):
            found.extra, found.extra_rows = ahead.extra, ahead.extra_rows
            found.from_disk |= frozenset(absent)
            return found
        self._read(found, fingerprint, absent, expected, state)
        if scan is not None:
            scan.forget(found.from_disk)  # rows that it is reading at this moment as well
        if found.from_disk and found.slab is not None:
            found.slots = found.slab.find(digests)
        return found

    def keep(
        self,
        fingerprint: bytes,
        tag: str,
        name: str,
        digests: Sequence[bytes],
        rows: Sequence[torch.Tensor],
        spec: RowSpec,
        state: bytes,
    ) -> tuple[Slab | None, range]:
        """Store computed ``rows``: in memory now, on disk behind the step.

        Returns
        -------
        slab : Slab or None
            The memory tier's rows.
        slots : range
            Slots of the first rows, as many as were admitted.
        """
        stored = self.stored(spec)
        slab, slots = self.memory.admit(fingerprint, digests, rows, stored, self._device(rows[0].device), state)
        if self.disk is not None and not self.disk.full and all(storable(dtype) for dtype, _ in stored.leaves):
            admitted = len(slots)
            region = (tag, name)
            if slab is not None and admitted:
                self._submit(fingerprint, region, digests[:admitted], slab.view(slots.start, slots.stop), stored)
            if admitted < len(digests):
                copies = [
                    _detached(leaf[admitted:], dtype) for leaf, (dtype, _) in zip(rows, stored.leaves, strict=True)
                ]
                self._submit(fingerprint, region, digests[admitted:], copies, stored)
        return slab, slots

    def tell(self, tag: str, name: str) -> None:
        """Have the catalogue know that region ``tag`` is used; done once a process, behind the step."""
        disk = self.disk
        if disk is not None and not disk.catalogue.noted(tag):
            writer().submit(0, lambda: disk.catalogue.note(Region.of(tag, name, self.options)))

    def knows(self, who: bytes) -> bool:
        """Whether the directory may hold rows of this identity."""
        return self.disk is not None and self.disk.catalogue.has(who.hex())

    def emptied(self, tag: str) -> Tiers:
        """Tiers for the same region without rows; those on disk that region ``tag`` has there are removed."""
        if self.disk is not None:
            writer().flush()
            self.disk.evict(tag)
        fresh = Tiers(self.options)
        fresh.disk_rows, fresh.disk_bytes = self.disk_rows, self.disk_bytes
        return fresh

    def _device(self, output: torch.device) -> torch.device:
        chosen = self.options.memory_cache_device
        return output if chosen is None else torch.device(chosen)

    def _read(
        self,
        found: Found,
        fingerprint: bytes,
        digests: list[bytes],
        expected: Callable[[], tuple[RowSpec, torch.device]],
        state: bytes,
    ) -> None:
        assert self.disk is not None
        keys = [fingerprint + digest for digest in digests]
        there = self.disk.read(keys)
        blobs = {key: there[key] for key in keys if key in there}
        if not blobs:
            return
        spec, device = expected()
        stored, target = self.stored(spec), self._device(device)
        tried = self._promote(found, blobs, stored, target, state)
        if found.from_disk and tried == len(blobs) and fingerprint not in self._scans:
            self._scans[fingerprint] = self._scan(fingerprint, stored, target, state)

    def _promote(
        self,
        found: Found,
        blobs: dict[bytes, bytes | BlobFile],
        stored: RowSpec,
        device: torch.device,
        state: bytes,
        extra: bool = True,
    ) -> int:
        """Put rows from disk into memory, and what it has no room for into ``found``; how many it had room for."""
        keys, read = list(blobs), list(blobs.values())
        digests = [key[len(found.fingerprint) :] for key in keys]
        codec = self._codec(stored)
        found.slab, sound, tried = self.memory.admit_by(
            found.fingerprint,
            digests,
            lambda count, rows: codec.decode_into(keys[:count], read[:count], rows),
            stored,
            device,
            state,
        )
        attempted = len(keys) if extra else tried
        if tried < attempted:
            rows = [self.memory.buffers.empty((attempted - tried, *shape), dtype) for dtype, shape in stored.leaves]
            more = codec.decode_into(keys[tried:], read[tried:], rows)
            found.extra_rows = [leaf[: len(more)] for leaf in rows]
            found.extra = {digests[tried + index]: row for row, index in enumerate(more)}
            sound += [tried + index for index in more]
        found.from_disk |= frozenset(digests[index] for index in sound)
        if len(sound) < attempted:
            whole = set(sound)
            assert self.disk is not None
            self.disk.drop({key: blobs[key] for index, key in enumerate(keys[:attempted]) if index not in whole})
        return tried

    def _scan(self, fingerprint: bytes, stored: RowSpec, device: torch.device, state: bytes) -> Scan:
        """What reads the other rows of a call ahead, until half of the memory is full."""
        disk, last = self.disk, fingerprint + b"\xff" * DIGEST_SIZE
        assert disk is not None

        def locate() -> Places:
            return disk.locate(fingerprint, last)

        @without_forks
        def read(places: Places) -> bool:
            if self.memory.used + len(places) * stored.size > self.memory.budget // 2:
                return False
            blobs = disk.read_at(places, fingerprint, last)
            digests = [key[len(fingerprint) :] for key in blobs]
            scan.expect(digests)
            slab = self.memory.slab(fingerprint)
            known = {digest for digest in digests if digest in slab.slots} if slab is not None else set()
            scan.forget(known)
            new = {key: blob for key, blob in blobs.items() if key[len(fingerprint) :] not in known}
            if new:
                self._promote(Found(fingerprint, slab, []), new, stored, device, state, extra=False)
            return True

        scan = Scan(stored.size, locate, read)
        return scan

    def _submit(
        self,
        fingerprint: bytes,
        region: tuple[str, str],
        digests: Sequence[bytes],
        rows: list[torch.Tensor],
        spec: RowSpec,
    ) -> None:
        disk = self.disk
        assert disk is not None
        tag, name = region
        keys = [fingerprint + digest for digest in digests]

        def job() -> None:
            if disk.full:
                return
            blobs = self._codec(spec).encode(keys, [leaf.cpu() for leaf in rows])
            stored, size = disk.write(list(zip(keys, blobs, strict=True)), tag, self.options.max_persistent_cache_size)
            self.disk_rows += stored
            self.disk_bytes += size
            if stored:
                disk.catalogue.note(Region.of(tag, name, self.options))

        writer().submit(spec.size * len(keys), job)

    def _codec(self, spec: RowSpec) -> Codec:
        codec = self._codecs.get(spec)
        if codec is None:
            codec = self._codecs[spec] = Codec(spec, self.options.zstd_compression_level)
        return codec


def _detached(leaf: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of ``leaf`` in ``dtype`` that shares nothing with it and is contiguous."""
    copy = torch.empty(leaf.shape, dtype=dtype, device=leaf.device)
    return copy.copy_(leaf)
