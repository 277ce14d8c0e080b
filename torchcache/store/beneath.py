"""The tiers beneath memory of one region: asked the nearest first, written to behind the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchcache.logging import logger
from torchcache.options import CacheOptions
from torchcache.store.catalogue import Region
from torchcache.store.disk import DiskTier, disk_tier
from torchcache.store.remote import remote_tier
from torchcache.store.tier import Blob, Guarded, Tier
from torchcache.store.writer import flush, sender, writer

# A tier, and what it had of what was asked for.
Source = tuple[Tier, dict[bytes, Blob]]
Entries = list[tuple[bytes, bytes]]


class Beneath:
    """Disk, the user's own tiers, a server: those that there are.

    Rows that one of them has go to all above it, computed ones to all.

    Parameters
    ----------
    options : CacheOptions
        Which tiers.
    name : str
        The region's, for people.

    Attributes
    ----------
    disk : DiskTier or None
        The disk among them.
    disk_rows, disk_bytes : int
        What this process wrote there.
    """

    def __init__(self, options: CacheOptions, name: str) -> None:
        self.name = name
        directory, remote = options.directory, options.server
        self.disk: DiskTier | None = disk_tier(directory, options.group) if directory is not None else None
        self._tiers: list[Tier] = [self.disk] if self.disk is not None else []
        self._tiers += [Guarded(tier, type(tier).__qualname__) for tier in options.tiers]
        self._tiers += [remote_tier(remote)] if remote is not None else []
        self.disk_rows = 0
        self.disk_bytes = 0
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self._tiers)

    @property
    def other_errors(self) -> int:
        """Failures of the tiers beside disk, and damaged rows that they had."""
        return sum(tier.errors for tier in self._tiers if isinstance(tier, Guarded))

    @property
    def takers(self) -> list[Tier]:
        """The tiers that take rows: all but a full disk."""
        return [tier for tier in self._tiers if tier is not self.disk or not self.disk.full]

    def read(self, keys: Sequence[bytes], region: Region, most: int) -> list[Source]:
        """What the tiers have of ``keys``; each is asked for what those above it lack."""
        wanted, sources = list(keys), list[Source]()
        for tier in self._tiers:
            if not wanted:
                break
            there = tier.read(wanted, region, most)
            if there:
                sources.append((tier, {key: there[key] for key in wanted if key in there}))
                wanted = [key for key in wanted if key not in there]
        return sources

    def settle(self, source: Source, sound: set[bytes], region: Region) -> set[bytes]:
        """Have sound rows written to the tiers above theirs, and damaged ones removed; the keys of the sound ones."""
        tier, found = source
        good = {key: blob for key, blob in found.items() if key in sound}
        above = self._tiers[: self._tiers.index(tier)]
        entries = [(key, blob) for key, blob in good.items() if isinstance(blob, bytes)]
        if above and entries:
            self.write(sum(len(blob) for _, blob in entries), lambda: entries, region, above)
        if len(good) < len(found):
            tier.remove(region, {key: blob for key, blob in found.items() if key not in sound})
        return set(good)

    def write(
        self, size: int, entries: Callable[[], Entries], region: Region, tiers: Sequence[Tier] | None = None
    ) -> None:
        """Have rows of ``size`` bytes written behind the step, to all tiers or to some; ``entries`` encodes them."""

        def job() -> None:
            takers = [tier for tier in self.takers if tiers is None or tier in tiers]
            made = entries() if takers else []
            for tier in takers:
                self._write(tier, made, region)

        writer().submit(size, job)

    def tell(self, region: Region) -> None:
        """Have the tiers know that the region is used; done now and then, behind the step."""
        disk = self.disk if self._tiers else None
        if region.tag in self._told and (disk is None or disk.in_use.has(self, region.tag)):
            return
        self._told.add(region.tag)

        def note() -> None:
            if disk is not None:
                disk.use(self, region.tag)
            for tier in self._tiers:
                tier.note(region)

        sender().submit(0, note)

    def knows(self, region: Region) -> bool:
        """Whether any tier may hold rows of the region."""
        return any(tier.knows(region) for tier in self._tiers)

    def leave(self, region: Region) -> None:
        """Remove the rows of the region, and use no tier any more: what others file under its keys may differ."""
        flush()
        for tier in self._tiers:
            tier.remove(region)
        self._tiers = []

    def _write(self, tier: Tier, entries: Entries, region: Region) -> None:
        """Write to a tier: to disk in this thread, the writer's; to others in one of their own, so that none waits."""
        if tier is self.disk:
            self.disk.use(self, region.tag)
            stored, size = tier.write(entries, region)
            self.disk_rows += stored
            self.disk_bytes += size
            if stored:
                tier.note(region)
            return

        def send() -> None:
            if tier.write(entries, region)[0]:
                tier.note(region)

        if not sender().submit(sum(len(blob) for _, blob in entries), send, wait=False):
            logger.info("%s: %d rows were not sent, since earlier ones still wait", self.name, len(entries))
