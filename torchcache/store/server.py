"""The rows on a server, walked, counted, checked and removed for tools, beside the processes that use it."""

from __future__ import annotations

import collections
import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torchcache.address import Address
from torchcache.errors import StoreError, described
from torchcache.store.blob import FORMAT_VERSION, BlobError
from torchcache.store.catalogue import LARGEST, Region, is_tag
from torchcache.store.deposit import Deposit
from torchcache.store.header import LARGEST_ROW, check_blob, read_header
from torchcache.store.prune import Removal
from torchcache.store.remote import (
    FRAME_BYTES,
    PIECE_BYTES,
    PREFIX,
    RemoteTier,
    connect,
    lengths_of,
    pieces,
    record_name,
    row_name,
    scan,
    servers_of,
    values_of,
)
from torchcache.store.survey import SAMPLE, Group, Holding, Info, Stats, leaf_texts
from torchcache.store.verify import Verdict

# Each question may take so many of the address's time limits: people wait longer than training does.
PATIENCE = 30
HEAD_BYTES = 4096
_ROW = len(PREFIX) + 32 + 1 + 32
_RECORD = len(PREFIX) + 32


class Server:
    """The rows on a server.

    Parameters
    ----------
    url : str
        Its address.

    Raises
    ------
    StoreError
        By each method, where the server cannot be used.
    """

    def __init__(self, url: str) -> None:
        try:
            self.address = Address(url)
        except ValueError as error:
            raise StoreError(f"a server must be {error}") from None
        self.name = self.address.name

    def regions(self) -> dict[str, Region]:
        """The records by tag; what is no record is left out."""
        tags: set[str] = set()
        with self.asking() as ask:
            for _ in self._rows(ask, tags):
                pass
            return ask.records(tags)

    def survey(self) -> Info:
        """The regions and their rows."""
        rows: dict[str, int] = collections.Counter()
        sizes: dict[str, int] = collections.Counter()
        samples: dict[str, list[bytes]] = collections.defaultdict(list)
        tags: set[str] = set()
        with self.asking() as ask:
            for names in self._rows(ask, tags):
                for name, length in zip(names, ask.lengths(names), strict=True):
                    tag = _tag(name)
                    rows[tag] += 1
                    sizes[tag] += length
                    if len(samples[tag]) < SAMPLE:
                        samples[tag].append(name)
            ratios = {tag: self._ratio(ask, names) for tag, names in samples.items()}
            regions, limit = ask.records(tags), ask.limit()
        held = [
            Holding(tag, regions.get(tag), rows[tag], sizes[tag], ratios.get(tag), 0.0, 0.0)
            for tag in {**rows, **regions}
        ]
        held.sort(key=lambda one: -one.last_used)
        return Info(self.name, FORMAT_VERSION, sum(one.bytes for one in held), limit, held)

    def survey_calls(self) -> Stats:
        """How the rows are made up."""
        sizes: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
        samples: dict[tuple[str, str], bytes] = {}
        with self.asking() as ask:
            for names in self._rows(ask):
                for name, length in zip(names, ask.lengths(names), strict=True):
                    call = _tag(name), name[-32:-16].hex()
                    sizes[call].append(length)
                    samples.setdefault(call, name)
            leaves = {call: _leaves(ask, name) for call, name in samples.items()}
        groups = [
            Group(tag, call, leaves[tag, call], len(found), 0, sum(found), min(found), max(found))
            for (tag, call), found in sizes.items()
        ]
        groups.sort(key=lambda group: -group.bytes)
        return Stats(self.name, sum(group.rows for group in groups), 0, groups)

    def verify(self, repair: bool, progress: Callable[[int], object] = lambda done: None) -> Verdict:
        """Check each row: header, lengths, checksum, frame."""
        verdict = Verdict(self.name)
        with self.asking() as ask:
            for names in self._rows(ask):
                bad = []
                for name, blob in self._values(ask, names):
                    verdict.checked += 1
                    verdict.bytes += len(blob)
                    if (problem := _problem(name, blob)) is not None:
                        verdict.damaged[problem] += 1
                        bad.append(name)
                    progress(1)
                if repair and bad:
                    verdict.repaired += ask.remove(bad)
        verdict.damaged = dict(verdict.damaged)
        return verdict

    def clear(self, tags: Sequence[str] | None = None) -> Removal:
        """Remove the rows and records of those regions, or of all."""
        removal, found = Removal(self.name), set[str]()
        with self.asking() as ask:
            for names in self._rows(ask, found):
                chosen = [name for name in names if tags is None or _tag(name) in tags]
                lengths = ask.lengths(chosen)
                ask.remove(chosen)
                for name, length in zip(chosen, lengths, strict=True):
                    removal.rows += 1
                    removal.bytes += length
                    removal.regions[_tag(name)] = removal.regions.get(_tag(name), 0) + 1
            ask.remove([record_name(tag) for tag in (found if tags is None else tags)])
        removal.before = removal.bytes
        return removal

    def sound_rows(self, progress: Callable[[int], object]) -> Iterator[tuple[str, bytes, bytes | None]]:
        """Tag, key and blob of each row; ``None`` for the blob of one that is damaged."""
        with self.asking() as ask:
            for names in self._rows(ask):
                for name, blob in self._values(ask, names):
                    yield _tag(name), name[-32:], blob if _problem(name, blob) is None else None
                    progress(1)

    @contextlib.contextmanager
    def asking(self) -> Iterator[_Ask]:
        """Ask the server, whose failures are a ``StoreError``."""
        try:
            yield _Ask(self.address)
        except StoreError:
            raise
        except ImportError:
            raise StoreError("the client of servers is missing: pip install redis") from None
        except Exception as error:  # whatever a server answers
            raise StoreError(f"{self.name} cannot be used: {described(error)}") from None

    def _rows(self, ask: _Ask, records: set[str] | None = None) -> Iterator[list[bytes]]:
        """Names of rows, each once; tags of regions that have a record are added to ``records``."""
        seen: set[bytes] = set()
        for names in ask.scan():
            names = [name for name in dict.fromkeys(names) if is_tag(_tag(name)) and name not in seen]
            if records is not None:
                records.update(_tag(name) for name in names if len(name) == _RECORD)
            rows = [name for name in names if len(name) == _ROW]
            seen.update(rows)
            if rows:
                yield rows

    def _values(self, ask: _Ask, names: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
        lengths = dict(zip(names, ask.lengths(names), strict=True))
        for part in pieces(names, lambda name: min(lengths[name], PIECE_BYTES)):
            yield from zip(part, ask.values(part, max(lengths[name] for name in part)), strict=True)

    def _ratio(self, ask: _Ask, names: list[bytes]) -> float | None:
        plain = stored = 0
        for name, length in zip(names, ask.lengths(names), strict=True):
            with contextlib.suppress(BlobError):
                header = read_header(io.BytesIO(ask.part(name, HEAD_BYTES)))
                plain += header.spec.size
                stored += header.stored_in(length)
        return plain / stored if stored > 0 else None


class ServerDeposit(Deposit):
    """A server that takes blobs in. A row that is there stays, sound or not: whoever reads it finds out.

    Parameters
    ----------
    server : Server
        Where they go.
    """

    def __init__(self, server: Server) -> None:
        super().__init__(server.name)
        self._server = server
        self._tier = RemoteTier(server.address)

    def note(self, region: Region) -> None:
        """Put a region's record there."""
        with self._server.asking() as ask:
            known = ask.record(region.tag)
            ask.set(record_name(region.tag), (region if known is None else known.spanning(region)).dump())

    def add(self, tag: str, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Store those pairs that have no row there."""
        with self._server.asking() as ask:
            lengths = ask.lengths([row_name(tag, key) for key, _ in entries])
            wanted = [entry for entry, length in zip(entries, lengths, strict=True) if not length]
            stored, size = self._tier.write(wanted, Region(tag, ""))
        self.present += len(entries) - len(wanted)
        self.stored += stored
        self.bytes += size
        self.left_out += len(wanted) - stored


class _Ask:
    """Questions to a server, each within limits of its own."""

    def __init__(self, address: Address) -> None:
        self._client, self._limits = connect(address)
        self._seconds = PATIENCE * address.timeout

    def scan(self) -> Iterator[list[bytes]]:
        with self._limits.seconds(100 * self._seconds):
            yield from scan(self._client, self._limits, PREFIX.decode() + "*")

    def lengths(self, names: Sequence[bytes]) -> list[int]:
        with self._within(len(names) * FRAME_BYTES):
            found = lengths_of(self._client, names)
        return [length if isinstance(length, int) and length >= 0 else 0 for length in found]

    def values(self, names: Sequence[bytes], longest: int) -> list[bytes]:
        with self._within(len(names) * (min(longest, LARGEST_ROW) + FRAME_BYTES)):
            found = values_of(self._client, names)
        return [value if isinstance(value, bytes) else b"" for value in found]

    def part(self, name: bytes, most: int) -> bytes:
        with self._within(most + FRAME_BYTES):
            found: Any = self._client.getrange(name, 0, most - 1)
        return found if isinstance(found, bytes) else b""

    def record(self, tag: str) -> Region | None:
        try:
            return Region.parse(tag, self.part(record_name(tag), LARGEST))
        except ValueError:
            return None

    def records(self, tags: Iterable[str]) -> dict[str, Region]:
        found = map(self.record, tags)
        return {region.tag: region for region in found if region is not None}

    def set(self, name: bytes, value: bytes) -> None:
        with self._within(0):
            self._client.set(name, value)

    def remove(self, names: Sequence[bytes]) -> int:
        if not names:
            return 0
        with self._within(0):
            return int(self._client.unlink(*names))

    def limit(self) -> int | None:
        with self._within(64 * 1024):
            found = [server.info("memory") for server in servers_of(self._client)]
        most = [said.get("maxmemory") if isinstance(said, dict) else None for said in found]
        limits = [limit for limit in most if isinstance(limit, int) and limit > 0]
        return sum(limits) if len(limits) == len(found) else None

    @contextlib.contextmanager
    def _within(self, count: int) -> Iterator[None]:
        with self._limits.seconds(self._seconds), self._limits.bytes(count):
            yield


def _leaves(ask: _Ask, name: bytes) -> list[str]:
    try:
        return leaf_texts(read_header(io.BytesIO(ask.part(name, HEAD_BYTES))).spec)
    except BlobError:
        return ["unreadable"]


def _tag(name: bytes) -> str:
    return name[len(PREFIX) : len(PREFIX) + 32].decode("ascii", "replace")


def _problem(name: bytes, blob: bytes) -> str | None:
    try:
        check_blob(name[-32:], io.BytesIO(blob), len(blob))
    except BlobError as error:
        return str(error)
    return None
