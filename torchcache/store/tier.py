"""A level of the store beneath memory: what each can do, and a guard that keeps its failures away from training."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torchcache.errors import described
from torchcache.forks import without_forks
from torchcache.logging import Complaints
from torchcache.store.catalogue import Region
from torchcache.store.file import BlobFile
from torchcache.store.pause import Pause

Blob = bytes | BlobFile

T = TypeVar("T")


class Tier(abc.ABC):
    """A level of the store beneath memory: rows as blobs, found by key.

    Subclass it for a store of your own, and pass it with ``mark(module, tiers=[...])``. Three verbs are all that it
    needs. Nothing that it returns is trusted: a blob holds its checksum, over its key as well, and the first rows that
    a process takes from it are computed and compared. What it raises costs rows, never the run: it is counted, told
    once, and the tier is left alone for a while. Rows are read on the thread that trains, or one batch ahead of it, and
    written behind the step, by another thread.

    Keys are 32 bytes; a blob is as long as its row, and some hundred bytes more at the most.
    """

    @abc.abstractmethod
    def read(self, keys: Sequence[bytes], region: Region, most: int) -> Mapping[bytes, Blob]:
        """The blobs of those keys that are here.

        Parameters
        ----------
        keys : sequence of bytes
            What is asked for.
        region : Region
            Whose rows they are: ``region.tag`` is 32 hexadecimal digits for program and weights.
        most : int
            No blob of such a row is longer than so many bytes: a longer one need not be read.
        """

    @abc.abstractmethod
    def write(self, entries: Sequence[tuple[bytes, bytes]], region: Region) -> tuple[int, int]:
        """Store pairs of key and blob, as many as there is room for.

        Returns
        -------
        stored : int
            How many of them are new here.
        size : int
            Their bytes.
        """

    @abc.abstractmethod
    def remove(self, region: Region, found: Mapping[bytes, Blob] | None = None) -> bool:
        """Remove what ``read`` found and what turned out to be damaged; ``None`` is all that the region has here.

        Returns
        -------
        bool
            Whether it is gone. Where a whole region is not, the run goes on without the tier: its rows are wrong.
        """

    def knows(self, region: Region) -> bool:
        """Whether there may be rows of the region: a few rows are then computed in a first call, not all of them."""
        return True

    def note(self, region: Region) -> None:
        """The region is used; called behind the step, once a process."""
        return


class Guarded(Tier, Complaints):
    """A tier whose failures read as absence. After one it is left alone for a while, longer with each in a row.

    Parameters
    ----------
    tier : Tier
        What may fail.
    name : str
        What people call it.
    """

    def __init__(self, tier: Tier, name: str) -> None:
        Complaints.__init__(self, f"the cache at {name}")
        self._tier = tier
        self._reading = Pause()
        self._writing = Pause()

    @without_forks
    def read(self, keys: Sequence[bytes], region: Region, most: int) -> Mapping[bytes, Blob]:
        """The blobs of those keys that are here; none where that cannot be told."""

        def read() -> dict[bytes, Blob]:
            found = self._tier.read(keys, region, most)
            return {key: found[key] for key in keys if type(found.get(key)) is bytes}

        return self._try("read", self._reading, read, {})

    @without_forks
    def write(self, entries: Sequence[tuple[bytes, bytes]], region: Region) -> tuple[int, int]:
        """Store pairs of key and blob; none where that fails."""
        return self._try("written to", self._writing, lambda: self._tier.write(entries, region), (0, 0))

    @without_forks
    def remove(self, region: Region, found: Mapping[bytes, Blob] | None = None) -> bool:
        """Remove what is damaged, or all of the region."""
        if found:
            self.complain("held damaged rows, which are computed again", len(found))
        return self._try("emptied", self._writing, lambda: bool(self._tier.remove(region, found)), False)

    @without_forks
    def knows(self, region: Region) -> bool:
        """Whether there may be rows of the region."""
        return self._try("read", self._reading, lambda: bool(self._tier.knows(region)), False)

    @without_forks
    def note(self, region: Region) -> None:
        """The region is used."""
        self._try("written to", self._writing, lambda: self._tier.note(region), None)

    def _try(self, done: str, pause: Pause, action: Callable[[], T], otherwise: T) -> T:
        if not pause.over:
            return otherwise
        try:
            result = action()
        except Exception as error:  # whatever a tier suffers
            pause.begin()
            self.complain(
                f"cannot be {done} ({described(error)}); training goes on without it, and it is tried again later"
            )
            return otherwise
        pause.end()
        return result
