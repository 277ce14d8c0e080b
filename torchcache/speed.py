"""How fast this machine hashes, writes, reads and decodes rows."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from torchcache.digest.rows import digest_rows
from torchcache.errors import StoreError
from torchcache.store.blob import Codec, RowSpec
from torchcache.store.catalogue import Region
from torchcache.store.disk import DiskTier

ROWS = {"feature vector, 3 KB": (768,), "token features, 605 KB": (197, 768)}
BATCH = 64
BUDGET_BYTES = 40 * 1024 * 1024
REPEATS = 5

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RowSpeed:
    """Rows of one size, float32.

    Parameters
    ----------
    name : str
        What such rows are.
    bytes : int
        Bytes of one row.
    encode, write, read, decode : float
        Rows per second: to blobs; blobs to the directory; blobs from it; blobs to tensors.
    """

    name: str
    bytes: int
    encode: float
    write: float
    read: float
    decode: float

    @property
    def served(self) -> float:
        """Rows per second from the directory to tensors."""
        return 1 / (1 / self.read + 1 / self.decode)


@dataclasses.dataclass(frozen=True)
class Speed:
    """What one measurement found.

    Parameters
    ----------
    directory : str
        Where rows were written and read.
    threads : int
        Threads of torch.
    hash_bytes : float
        Bytes per second hashed, in a batch of images.
    image_seconds : float
        To hash one image of shape ``(3, 224, 224)``, float32, in a batch of 64.
    rows : list of RowSpeed
        One a size.
    """

    directory: str
    threads: int
    hash_bytes: float
    image_seconds: float
    rows: list[RowSpeed]


def measure(folder: Path) -> Speed:
    """Measure, in a few seconds, in a temporary directory within ``folder``; reads come from the system's page cache.

    Raises
    ------
    StoreError
        Where nothing can be written there.
    """
    images = torch.randn(BATCH, 3, 224, 224, device="cpu")
    seconds, _ = _best(lambda: digest_rows([images], "xxh3_128"))
    size = images.numel() * images.element_size()
    try:
        with tempfile.TemporaryDirectory(prefix=".torchcache-bench-", dir=folder) as temporary:
            rows = [_measure_rows(Path(temporary) / str(len(shape)), name, shape) for name, shape in ROWS.items()]
    except OSError as error:
        raise StoreError(f"nothing can be written in {folder}: {error.strerror}") from None
    return Speed(str(folder), torch.get_num_threads(), size / seconds, seconds / BATCH, rows)


def _measure_rows(directory: Path, name: str, shape: tuple[int, ...]) -> RowSpeed:
    spec = RowSpec(((torch.float32, shape),))
    count = max(BATCH, min(4096, BUDGET_BYTES // spec.size))
    codec, rows = Codec(spec, 1), torch.randn(count, *shape, device="cpu")
    keys = [index.to_bytes(32, "little") for index in range(count)]
    encode, blobs = _best(lambda: codec.encode(keys, [rows]), repeats=1)
    tier = DiskTier(directory)
    tier.open()

    def write() -> int:
        return sum(
            tier.write(list(zip(keys[at : at + BATCH], blobs[at : at + BATCH], strict=True)), Region("", ""))[0]
            for at in range(0, count, BATCH)
        )

    seconds, stored = _best(write, repeats=1)
    if stored != count:
        raise StoreError(f"rows could not be written in {directory.parent.parent}: TORCHCACHE_LOG_LEVEL=INFO says why")
    read, found = _best(lambda: tier.read(keys))
    held = [found[key] for key in keys]
    # Files are read when they are decoded.
    decode, _ = _best(lambda: codec.decode(keys, held))
    tier.close()
    return RowSpeed(name, spec.size, count / encode, count / seconds, count / read, count / decode)


def _best(action: Callable[[], T], repeats: int = REPEATS) -> tuple[float, T]:
    """The shortest time of a few runs in seconds, and what the last gave."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = action()
        best = min(best, time.perf_counter() - start)
    return best, result
