"""Memory over other tiers: where a region's rows are looked up and kept."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.utils.data import get_worker_info

from torchcache.forks import without_forks
from torchcache.logging import logger, warn_once
from torchcache.options import CacheOptions, cache_dtype_text
from torchcache.store.beneath import Beneath
from torchcache.store.blob import Codec, RowSpec, storable
from torchcache.store.catalogue import Region
from torchcache.store.disk import Places
from torchcache.store.found import Found
from torchcache.store.memory import MemoryTier
from torchcache.store.near import Near
from torchcache.store.note import note_bytes, note_entries
from torchcache.store.pack import most_rows
from torchcache.store.precision import Precision
from torchcache.store.scan import Scan
from torchcache.store.select import select_rows
from torchcache.store.slab import ABSENT, Lease
from torchcache.store.tier import Blob
from torchcache.store.writer import receiver
from torchcache.streams import bring_behind, has_streams, send

DIGEST_SIZE = 16


class Tiers:
    """The store of one region: memory, and the tiers beneath it.

    Parameters
    ----------
    options : CacheOptions
        Sizes, directory, devices.
    name : str
        The region's, for people.
    beneath : Beneath or None
        The tiers beneath memory; ``None`` is those of the options.

    Attributes
    ----------
    memory : MemoryTier
        Rows as tensors.
    beneath : Beneath
        The other tiers.
    """

    def __init__(self, options: CacheOptions, name: str, beneath: Beneath | None = None) -> None:
        self.options = options
        self.name = name
        self.memory = MemoryTier(options.max_memory_cache_size)
        chosen = options.memory_cache_device
        self._chosen = None if chosen in (None, "auto") else torch.device(chosen)
        on_host = self._chosen is not None and self._chosen.type == "cpu"
        self._near = None if on_host else Near(options.memory_device_share)
        self._arriving: set[bytes] = set()
        self.beneath = beneath if beneath is not None else Beneath(options, name)
        self._codecs: dict[RowSpec, Codec] = {}
        self._scans: dict[bytes, Scan] = {}

    @property
    def used(self) -> int:
        """Bytes of rows in memory, once those that are on their way are there."""
        if self._arriving:
            receiver().flush()
        return self.memory.used

    def find(
        self,
        fingerprint: bytes,
        digests: Sequence[bytes],
        spec: RowSpec,
        state: bytes,
        near: torch.device | None,
        ahead: Found | None = None,
    ) -> Found:
        """Look ``digests`` up in memory, then the rest beneath it; what is found there is promoted to memory.

        Parameters
        ----------
        fingerprint, digests
            The keys.
        spec : RowSpec
            What is stored of a row.
        state : bytes
            Digest of the weights that compute such rows now.
        near : torch.device or None
            Where rows are wanted; ``None`` only has those on disk brought into memory.
        ahead : Found or None
            What was found for the same keys before, on the host: rows that memory had no room for are not read again.
        """
        scan = self._scans.get(fingerprint)
        early = scan.ask(digests) if scan is not None else frozenset()
        found = Found(fingerprint, [])
        take = functools.partial(self._take, found, digests, spec, state, near)
        arriving = self._arriving
        # Asked before memory is: what arrives in between is found the second time.
        coming = {digest for digest in digests if fingerprint + digest in arriving} if arriving else None
        take()
        if coming and not coming <= found.present(digests):
            receiver().flush()
            take()
        if early:
            found.from_disk = early & found.present(digests)
        if not self.beneath or ABSENT not in found.slots:
            return found
        pairs = zip(digests, found.slots, strict=True)
        absent = list(dict.fromkeys(digest for digest, slot in pairs if slot == ABSENT))
        if (
            near is not None
            and ahead is not None
            and ahead.fingerprint == fingerprint
            and ahead.extra.keys() >= set(absent)
        ):
            found.extra, found.extra_rows = ahead.extra, [send(leaf, near) for leaf in ahead.extra_rows]
            taken = frozenset(absent)
            found.from_disk |= taken & ahead.from_disk
            found.from_others |= taken & ahead.from_others
            return found
        self._read(found, fingerprint, absent, spec, state)
        if near is not None:
            found.extra_rows = [send(leaf, near) for leaf in found.extra_rows]
        if scan is not None:
            scan.forget(found.from_disk)  # rows that it is reading at this moment as well
        if found.from_beneath:
            take()
            present = found.present(digests)
            found.from_disk &= present
            found.from_others &= present
        return found

    def _take(
        self, found: Found, digests: Sequence[bytes], spec: RowSpec, state: bytes, near: torch.device | None
    ) -> None:
        """Take rows from memory to ``near``; ``None`` only looks for them."""
        slab = self.memory.slab(found.fingerprint)
        if near is None or near.type == "cpu":
            if slab is None:
                found.slots = [ABSENT] * len(digests)
            elif near is not None:
                found.slots, found.rows = slab.take(digests)
            else:
                found.slots = slab.find(digests)
            return

        def below(wanted: Sequence[bytes]) -> tuple[list[int], list[torch.Tensor]]:
            return slab.take(wanted, to_send=True) if slab is not None else ([ABSENT] * len(wanted), [])

        place = self._place(near)
        if self._near is not None and has_streams(place):
            found.slots, rows = self._near.take(found.fingerprint, digests, place, below, spec, state)
            found.rows = [leaf.to(near) for leaf in rows]
        else:
            found.slots, rows = below(digests)
            found.rows = [send(leaf, near) for leaf in rows]

    def keep(
        self,
        fingerprint: bytes,
        digests: Sequence[bytes],
        rows: Sequence[torch.Tensor],
        precision: Precision,
        state: bytes,
    ) -> None:
        """Store computed ``rows``, as far as they can be: in memory, soon where they are on a device, then beneath."""
        rows, held = precision.pack(rows)
        if all(leaf.is_cpu for leaf in rows):
            self._keep(fingerprint, digests, rows, held, precision.stored, state)
            return
        keys = [fingerprint + digest for digest in digests]
        try:
            arrive = bring_behind(
                [leaf.to(dtype) for leaf, (dtype, _) in zip(rows, precision.stored.leaves, strict=True)]
            )
        except torch.OutOfMemoryError:
            logger.debug("%s: the device has no room for rows that are to be stored", self.name)
            return

        def job() -> None:
            try:
                self._keep(fingerprint, digests, arrive(), held, precision.stored, state)
            finally:
                self._arriving.difference_update(keys)

        self._arriving.update(keys)
        receiver().submit(precision.stored.size * len(keys), job)

    @without_forks
    def _keep(
        self,
        fingerprint: bytes,
        digests: Sequence[bytes],
        rows: Sequence[torch.Tensor],
        held: torch.Tensor | None,
        stored: RowSpec,
        state: bytes,
    ) -> None:
        """Store rows that are on the host."""
        if held is not None:
            kept = held.nonzero().flatten().tolist()
            warn_once(
                f"{self.name}: rows with values that cache_dtype={cache_dtype_text(self.options.cache_dtype)} cannot "
                "give back (inf, nan, too large or too small) are computed every time: name the outputs that it is "
                "for, as {name: dtype}"
            )
            digests, rows = [digests[place] for place in kept], [select_rows(leaf, kept) for leaf in rows]
            if not digests:
                return
        lease, places = self.memory.admit(fingerprint, digests, rows, stored, state)
        if not self.beneath and get_worker_info() is not None:
            warn_once(
                f"{self.name} is called in a worker of a DataLoader: its rows are in the worker's memory, which no "
                "other process sees and which is lost when the worker ends: set persistent=True to keep them"
            )
        if self.beneath.takers and storable(stored):
            region = self._region(state)
            if lease is not None:
                self._submit(fingerprint, region, [digests[place] for place in places], lease, stored)
            if len(places) < len(digests):
                others = sorted({*range(len(digests))} - {*places})
                pairs = zip(rows, stored.leaves, strict=True)
                copies = [select_rows(leaf, others).to(dtype).contiguous() for leaf, (dtype, _) in pairs]
                self._submit(fingerprint, region, [digests[place] for place in others], copies, stored)

    def keep_note(self, key: bytes, note: bytes, state: bytes) -> None:
        """Store a few bytes beneath memory, behind the step."""
        level = self.options.zstd_compression_level
        self.beneath.write(len(note), lambda: note_entries(key, note, level), self._region(state))

    def note(self, key: bytes, longest: int, state: bytes) -> bytes | None:
        """What ``keep_note`` stored, by whoever; ``None`` where there is nothing that could be it."""
        for _, blobs in self.beneath.read([key], self._region(state), longest):
            try:
                return note_bytes(key, blobs[key], longest)
            except Exception:  # whatever lies there
                logger.debug("a note among the rows of %s is damaged", self.name, exc_info=True)
        return None

    def tell(self, state: bytes) -> None:
        """Have the tiers beneath know that the region is used."""
        self.beneath.tell(self._region(state))

    def knows(self, who: bytes) -> bool:
        """Whether any tier beneath memory may hold rows of this identity."""
        return bool(self.beneath) and self.beneath.knows(self._region(who))

    def emptied(self, state: bytes) -> Tiers:
        """Tiers for the same region without rows: those beneath memory lose what they have, and are left.

        Others, since a thread that reads ahead may still put rows into the memory of these.
        """
        self.beneath.leave(self._region(state))
        return Tiers(self.options, self.name, self.beneath)

    def _region(self, state: bytes) -> Region:
        return Region.of(state.hex(), self.name, self.options)

    def drop_state(self, state: bytes) -> None:
        """Forget the rows of one identity in memory."""
        self.memory.drop_state(state)
        if self._near is not None:
            self._near.drop_state(state)

    def _place(self, near: torch.device) -> torch.device:
        """On which device rows are kept that are wanted on ``near``."""
        chosen = self._chosen
        if chosen is None or (chosen.index is None and chosen.type == near.type):
            return near
        return chosen if chosen.index is not None else torch.device(chosen.type, 0)

    def _read(
        self,
        found: Found,
        fingerprint: bytes,
        digests: list[bytes],
        stored: RowSpec,
        state: bytes,
    ) -> None:
        if not storable(stored):
            return
        region, most = self._region(state), self._codec(stored).longest
        sources = self.beneath.read([fingerprint + digest for digest in digests], region, most)
        blobs = {key: blob for _, part in sources for key, blob in part.items()}
        if not blobs:
            return
        sound, tried = self._promote(found, blobs, stored, state)
        for source in sources:
            good = self.beneath.settle(source, sound, region)
            taken = frozenset(key[len(fingerprint) :] for key in good)
            if source[0] is self.beneath.disk:
                found.from_disk |= taken
            else:
                found.from_others |= taken
        if found.from_disk and tried == len(blobs) and fingerprint not in self._scans:
            self._scans[fingerprint] = self._scan(fingerprint, stored, state, region)

    def _promote(
        self,
        found: Found,
        blobs: dict[bytes, Blob],
        stored: RowSpec,
        state: bytes,
        extra: bool = True,
    ) -> tuple[set[bytes], int]:
        """Put rows from beneath into memory, and what it has no room for into ``found``.

        Returns
        -------
        sound : set of bytes
            Keys of the rows that are there now.
        tried : int
            How many of the first ones memory had room for; without ``extra`` the others were not looked at.
        """
        keys, read = list(blobs), list(blobs.values())
        digests = [key[len(found.fingerprint) :] for key in keys]
        codec = self._codec(stored)
        sound, tried = self.memory.admit_by(
            found.fingerprint,
            digests,
            lambda count, rows: codec.decode_into(keys[:count], read[:count], rows),
            stored,
            state,
        )
        if extra and tried < len(keys):
            rows = [self.memory.buffers.empty((len(keys) - tried, *shape), dtype) for dtype, shape in stored.leaves]
            more = codec.decode_into(keys[tried:], read[tried:], rows)
            found.extra_rows = [leaf[: len(more)] for leaf in rows]
            found.extra = {digests[tried + index]: row for row, index in enumerate(more)}
            self.memory.admit(found.fingerprint, list(found.extra), found.extra_rows, stored, state)
            sound += [tried + index for index in more]
        return {keys[index] for index in sound}, tried

    def _scan(self, fingerprint: bytes, stored: RowSpec, state: bytes, region: Region) -> Scan:
        """What reads the other rows of a call ahead, until half of the memory is full."""
        disk, last = self.beneath.disk, fingerprint + b"\xff" * DIGEST_SIZE
        assert disk is not None

        def locate() -> Places:
            return disk.locate(fingerprint, last)

        @without_forks
        def read(places: Places) -> bool:
            blobs = disk.read_at(places, fingerprint, last)
            if self.memory.used + len(blobs) * stored.size > self.memory.budget // 2:
                return False
            digests = [key[len(fingerprint) :] for key in blobs]
            scan.expect(digests)
            slab = self.memory.slab(fingerprint)
            known = {digest for digest in digests if digest in slab.slots} if slab is not None else set()
            scan.forget(known)
            new = {key: blob for key, blob in blobs.items() if key[len(fingerprint) :] not in known}
            if new:
                sound, tried = self._promote(Found(fingerprint, []), new, stored, state, extra=False)
                if len(sound) < tried:
                    disk.remove(region, {key: new[key] for key in list(new)[:tried] if key not in sound})
            return True

        scan = Scan(stored.size, locate, read, most_rows(self._codec(stored).plain))
        return scan

    def _submit(
        self,
        fingerprint: bytes,
        region: Region,
        digests: Sequence[bytes],
        rows: Lease | list[torch.Tensor],
        spec: RowSpec,
    ) -> None:
        """Have rows written to all tiers beneath, encoded once."""
        keys = [fingerprint + digest for digest in digests]

        def entries() -> list[tuple[bytes, bytes]]:
            blobs = self._codec(spec).encode(keys, rows.rows() if isinstance(rows, Lease) else rows)
            return list(zip(keys, blobs, strict=True))

        self.beneath.write(spec.size * len(keys), entries, region)

    def _codec(self, spec: RowSpec) -> Codec:
        codec = self._codecs.get(spec)
        if codec is None:
            codec = self._codecs[spec] = Codec(spec, self.options.zstd_compression_level)
        return codec
