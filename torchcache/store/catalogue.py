"""What the regions of a cache directory are: ``regions/<tag>.json``, one small file a region, for people and tools.

Rows are found without it; a missing or damaged file costs a name in a table and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import torch

from torchcache.logging import logger
from torchcache.options import CacheOptions, cache_dtype_text
from torchcache.printable import printable
from torchcache.store.access import Access
from torchcache.store.gate import read_file
from torchcache.version import __version__

FOLDER = "regions"
LARGEST = 64 * 1024
MOST = 100_000
LATEST = 1e11
LARGEST_NUMBER = 2**63
LONGEST_NAME = 1000
# A process in full use tells of it so often.
NOTED_SECONDS = 900.0
_TAG = re.compile(r"[0-9a-f]{32}")
# What a region's rows, or the room for them, depend on.
_OPTIONS = ("persistent_module_hash", "max_persistent_cache_size", "cache_dtype", "zstd_compression_level", "digest")

Scalar = str | int | float | bool | None


def is_tag(text: object) -> bool:
    """Whether ``text`` is the fingerprint of a region in hexadecimal."""
    return isinstance(text, str) and _TAG.fullmatch(text) is not None


@dataclasses.dataclass(frozen=True)
class Region:
    """What is known of one region.

    Parameters
    ----------
    tag : str
        Its fingerprint in hexadecimal, 32 digits.
    name : str
        Module path and class.
    torchcache, torch : str
        The versions that first stored its rows.
    options : dict
        The options of its mark that concern the directory.
    created, last_used : float
        Seconds since the epoch; a process tells of its use when that begins, while it reads or stores rows, and when
        it ends.
    """

    tag: str
    name: str
    torchcache: str = ""
    torch: str = ""
    options: dict[str, Scalar] = dataclasses.field(default_factory=dict)
    created: float = 0.0
    last_used: float = 0.0

    @classmethod
    def of(cls, tag: str, name: str, options: CacheOptions) -> Region:
        """The record of a region that is used now."""
        chosen = {key: _plain(getattr(options, key)) for key in _OPTIONS}
        now = time.time()
        return cls(tag, printable(name[:LONGEST_NAME]), __version__, str(torch.__version__), chosen, now, now)

    @property
    def limit(self) -> int:
        """Bytes that the directory may hold; all that there is room for where the record does not say."""
        limit = self.options.get("max_persistent_cache_size")
        return limit if isinstance(limit, int) else LARGEST_NUMBER

    def spanning(self, other: Region) -> Region:
        """The record with the time of another one of the same region as well."""
        created, last_used = min(self.created, other.created), max(self.last_used, other.last_used)
        return dataclasses.replace(self, created=created, last_used=last_used)

    def dump(self) -> bytes:
        """The record as the bytes of a file, without the tag, which names it."""
        fields = dataclasses.asdict(self)
        del fields["tag"]
        return json.dumps(fields, indent=1).encode()

    @classmethod
    def parse(cls, tag: str, data: bytes) -> Region:
        """The record in the bytes of a file, every field checked; ``ValueError`` where one is wrong."""
        try:
            fields = json.loads(data)
        except RecursionError:
            raise ValueError("nested too deep") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("options"), dict):
            raise ValueError("not a record")
        name, ours, theirs = (_text(fields.get(key)) for key in ("name", "torchcache", "torch"))
        created, last_used = (_time(fields.get(key)) for key in ("created", "last_used"))
        options = fields["options"]
        if not all(key in _OPTIONS and isinstance(value, Scalar) for key, value in options.items()):
            raise ValueError("an unknown option")
        for value in options.values():
            _text(str(value))
            if isinstance(value, (int, float)) and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
                raise ValueError("a number is out of range")
        return cls(tag, name, ours, theirs, options, created, last_used)


def last_used(region: Region | None, newest: float) -> float:
    """When a region was last used, as far as is known; no time that is still to come.

    Parameters
    ----------
    region : Region or None
        Its record.
    newest : float
        When its last row was stored, in seconds since the epoch.
    """
    return min(time.time(), max(newest, region.last_used if region else 0.0))


class Catalogue:
    """The records of a cache directory.

    Writing never raises; the reader is told nothing of files that are no records.

    Parameters
    ----------
    directory : Path
        The cache directory.
    access : Access or None
        The permissions of what is made; ``None`` is what the directory asks for.
    """

    def __init__(self, directory: Path, access: Access | None = None) -> None:
        self.folder = directory / FOLDER
        self._access = access or Access(directory)
        self._noted: dict[str, float] = {}

    def noted(self, tag: str) -> bool:
        """Whether this process told of the region's use, not long ago."""
        return time.monotonic() - self._noted.get(tag, -math.inf) < NOTED_SECONDS

    def has(self, tag: str) -> bool:
        """Whether any process told of region ``tag``."""
        return tag in self._noted or os.path.lexists(self.folder / f"{tag}.json")

    def note(self, region: Region) -> None:
        """Record that ``region`` is used, now and then, and at once if its file was removed meanwhile."""
        path = self.folder / f"{region.tag}.json"
        if not is_tag(region.tag) or (self.noted(region.tag) and path.exists()):
            return
        self._noted[region.tag] = time.monotonic()
        try:
            known = self._read(path)
            if known is not None:
                region = dataclasses.replace(region, created=min(known.created, region.created))
            self.write(region)
        except OSError as error:
            logger.info("%s could not be written: %s", path, error)

    def touch(self, tag: str) -> None:
        """Record that region ``tag`` was used until now, if there is a record of it."""
        with contextlib.suppress(OSError):
            known = self.get(tag)
            if known is not None:
                self.write(dataclasses.replace(known, last_used=time.time()))

    def get(self, tag: str) -> Region | None:
        """The record of region ``tag``, if there is a sound one."""
        with contextlib.suppress(OSError):
            self._check()
            return self._read(self.folder / f"{tag}.json") if is_tag(tag) else None
        return None

    def write(self, region: Region) -> None:
        """Put the file of ``region`` in place at once, whole; raises ``OSError``."""
        self._check()
        self._access.make_folder(self.folder)
        self._access.put(self.folder / f"{region.tag}.json", region.dump())

    def read(self) -> dict[str, Region]:
        """The records by tag; what is not one of ours, or damaged, is left out."""
        found = {}
        with contextlib.suppress(OSError):
            self._check()
            files = sorted(os.scandir(self.folder), key=lambda file: file.name)[:MOST]
            for file in files:
                tag, suffix = os.path.splitext(file.name)
                if suffix == ".json" and is_tag(tag) and (region := self._read(Path(file.path))) is not None:
                    found[tag] = region
        return found

    def remove(self, tag: str) -> None:
        """Delete the record of a region."""
        with contextlib.suppress(OSError):
            self._check()
            if is_tag(tag):
                os.remove(self.folder / f"{tag}.json")

    def _check(self) -> None:
        if self.folder.is_symlink():
            raise OSError(f"{self.folder} is a link, which is not followed")

    def _read(self, path: Path) -> Region | None:
        try:
            return Region.parse(path.stem, read_file(path, LARGEST))
        except (OSError, ValueError):
            return None


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_NAME or not value.isprintable():
        raise ValueError("a text is missing, too long or not printable")
    return value


def _time(value: object) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value < LATEST:
        raise ValueError("a time is missing or out of range")
    return float(value)


def _plain(value: Any) -> Scalar:
    return value if isinstance(value, Scalar) else cache_dtype_text(value)[:LONGEST_NAME]
