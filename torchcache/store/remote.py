"""The remote tier: rows on a Redis or Valkey server, for all machines that use it.

A row is the value of ``torchcache:<format>:<tag>:<key>``, the blob as it lies on disk: ``tag`` in hexadecimal, ``key``
as its 32 bytes. ``torchcache:<format>:<tag>`` is the region's record, as in a directory's catalogue. What the server
keeps, and for how long, is the server's to say.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from torchcache.address import Address
from torchcache.store.blob import FORMAT_VERSION
from torchcache.store.catalogue import Region
from torchcache.store.tier import Blob, Guarded, Tier

if TYPE_CHECKING:
    from redis import Redis, RedisCluster

    from torchcache.store.bounded import Limits

    Client: TypeAlias = "Redis | RedisCluster"


# One command asks for so many bytes and so many rows at the most: what a server does for others waits no longer.
PIECE_BYTES = 8 * 1024 * 1024
PIECE_ROWS = 1024
# What the protocol adds to a value.
FRAME_BYTES = 64
# Emptying a region walks over the server's keys, some at a time; all of it may take so many time limits.
PATIENCE = 30
SCAN_ROWS, SCAN_BYTES = 1000, 1024 * 1024
# What a cluster tells of its servers.
TOPOLOGY_BYTES = 16 * 1024 * 1024

PREFIX = f"torchcache:{FORMAT_VERSION}:".encode()

T = TypeVar("T")


class RemoteTier(Tier):
    """Rows on a server. It raises what the client raises; ``remote_tier`` gives it guarded.

    Nothing that the server sends is believed, neither in kind nor in length, and no answer is waited for longer than
    the address says.

    Parameters
    ----------
    address : Address
        Where the server is.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._noted: set[str] = set()
        self._lock = threading.Lock()
        self._connected: tuple[Client, Limits] | None = None

    def read(self, keys: Sequence[bytes], region: Region, most: int) -> Mapping[bytes, Blob]:
        """The values of those keys that are there and no longer than ``most`` bytes."""
        prefix, found = row_name(region.tag, b""), dict[bytes, Blob]()
        with self._asking() as (client, limits):
            for part in pieces(keys, lambda key: most):
                names = [prefix + key for key in part]
                for key, value in zip(part, _values(client, limits, names, most), strict=True):
                    if isinstance(value, bytes) and len(value) <= most:
                        found[key] = value
        return found

    def write(self, entries: Sequence[tuple[bytes, bytes]], region: Region) -> tuple[int, int]:
        """Set the values, some megabytes at a time."""
        if self.address.read_only:
            return 0, 0
        prefix = row_name(region.tag, b"")
        for part in pieces(entries, lambda entry: len(entry[1])):
            with self._asking() as (client, limits), limits.bytes(len(part) * FRAME_BYTES):
                pipeline = client.pipeline(transaction=False)
                for key, blob in part:
                    pipeline.set(prefix + key, blob, ex=self.address.ttl)
                pipeline.execute()
        return len(entries), sum(len(blob) for _, blob in entries)

    def remove(self, region: Region, found: Mapping[bytes, Blob] | None = None) -> bool:
        """Delete those keys, or all of the region."""
        if self.address.read_only:
            return False
        if found is not None:
            with self._asking() as (client, limits), limits.bytes(0):
                client.unlink(*(row_name(region.tag, key) for key in found))
            return True
        with self._asking(PATIENCE) as (client, limits):
            for names in scan(client, limits, record_name(region.tag).decode() + "*"):
                with limits.bytes(0):
                    client.unlink(*names)
        self._noted.discard(region.tag)
        return True

    def knows(self, region: Region) -> bool:
        """Whether the region has a record."""
        with self._asking() as (client, limits), limits.bytes(0):
            return bool(client.exists(record_name(region.tag)))

    def note(self, region: Region) -> None:
        """Put the region's record there, once a process."""
        if self.address.read_only or region.tag in self._noted:
            return
        with self._asking() as (client, limits), limits.bytes(0):
            client.set(record_name(region.tag), region.dump(), ex=self.address.ttl)
        self._noted.add(region.tag)

    @contextlib.contextmanager
    def _asking(self, times: float = 1) -> Iterator[tuple[Client, Limits]]:
        """The client, for as long as the address grants."""
        if self._connected is None:
            made = connect(self.address)
            with self._lock:
                self._connected = self._connected or made
        client, limits = self._connected
        with limits.seconds(times * self.address.timeout):
            yield client, limits


def scan(client: Client, limits: Limits, pattern: str) -> Iterator[list[bytes]]:
    """The names of the server's keys that match, some hundreds at a time, some of them twice maybe."""
    for node in servers_of(client):
        cursor = 0
        while True:
            with limits.bytes(SCAN_BYTES):
                answer: Any = node.scan(cursor, match=pattern, count=SCAN_ROWS)
            cursor, names = answer
            names = [name for name in names if isinstance(name, bytes)]
            if names:
                yield names
            if not cursor:
                break


def servers_of(client: Client) -> list[Redis]:
    """Clients of the servers that hold keys: those of a cluster, or the one."""
    from redis import Redis

    if isinstance(client, Redis):
        return [client]
    return [node.redis_connection for node in cast(Any, client).get_primaries()]


def values_of(client: Client, names: Sequence[bytes]) -> list[Any]:
    """The values of these keys, asked for in one go; in a cluster of each server that has any."""
    from redis import Redis

    found: Any = client.mget(names) if isinstance(client, Redis) else client.mget_nonatomic(names)
    return list(found)


def lengths_of(client: Client, names: Sequence[bytes]) -> list[object]:
    """The lengths of the values of these keys, asked for in one go; an error in place of one that has none."""
    pipeline = client.pipeline(transaction=False)
    for name in names:
        pipeline.strlen(name)
    return list(pipeline.execute(raise_on_error=False))


def connect(address: Address) -> tuple[Client, Limits]:
    """A client, and what the calling thread grants its server. That of a cluster asks it at once who has what."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from torchcache.store.bounded import CONNECTIONS, Limits

    limits = Limits()
    own = {"connection_class": CONNECTIONS[address.scheme], "limits": limits}
    settings: dict[str, Any] = {
        **address.secrets,
        "socket_connect_timeout": address.timeout,
        # One more try where a server closed a connection that was not used for long.
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        "protocol": 2,
    }
    if not address.cluster:
        return redis.Redis(connection_pool=redis.ConnectionPool.from_url(address.url, **settings, **own)), limits

    def pool(**given: Any) -> redis.ConnectionPool:
        return redis.ConnectionPool(**{**given, **own})

    with limits.seconds(address.timeout), limits.bytes(TOPOLOGY_BYTES):
        return redis.RedisCluster.from_url(address.url, **settings, connection_pool_class=pool), limits


def _values(client: Client, limits: Limits, names: Sequence[bytes], most: int) -> Sequence[object]:
    """The values of these keys; ``None`` for one that is not there, is of another kind, or is longer than ``most``."""
    granted = len(names) * (most + FRAME_BYTES)
    try:
        with limits.bytes(granted):
            return values_of(client, names)
    except Exception:
        if not limits.overrun:
            raise
    with limits.bytes(len(names) * FRAME_BYTES):  # one of them is too long: leave it out
        lengths = lengths_of(client, names)
    short = [name for name, length in zip(names, lengths, strict=True) if isinstance(length, int) and length <= most]
    with limits.bytes(granted):
        values = values_of(client, short) if short else []
    found = dict(zip(short, values, strict=True))
    return [found.get(name) for name in names]


def pieces(items: Sequence[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """``items`` in order, in parts of some megabytes."""
    part: list[T] = []
    room = PIECE_BYTES
    for item in items:
        room -= size(item)
        if part and (room < 0 or len(part) == PIECE_ROWS):
            yield part
            part, room = [], PIECE_BYTES - size(item)
        part.append(item)
    if part:
        yield part


def record_name(tag: str) -> bytes:
    """Under which name a region's record is."""
    return PREFIX + tag.encode()


def row_name(tag: str, key: bytes) -> bytes:
    """Under which name a row is."""
    return record_name(tag) + b":" + key


# Weak: a process that makes one model after another holds the connections of those that are in use.
_tiers: weakref.WeakValueDictionary[str, Guarded] = weakref.WeakValueDictionary()
_tiers_lock = threading.Lock()


def remote_tier(url: str) -> Guarded:
    """The tier of a server, the same for all who use it at a time."""
    with _tiers_lock:
        address = Address(url)
        return _tiers.setdefault(url, Guarded(RemoteTier(address), address.name))
