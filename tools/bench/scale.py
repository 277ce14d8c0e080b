"""Scale, from 1e3 to 1e6 entries: time of a lookup a row, of opening a directory, of an epoch in a new process, and
overhead an entry.

Beside each lookup stands what it cannot do without: a dict and an ``index_select``, or the same query on a connection
of its own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import random
import sqlite3
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import torchcache
from torchcache.store.blob import Codec, RowSpec
from torchcache.store.catalogue import Region
from torchcache.store.disk import DiskTier
from torchcache.store.memory import MemoryTier
from torchcache.store.pack import most_rows

BATCH = 256
CPU = torch.device("cpu")


def digests(numbers: range) -> list[bytes]:
    """Digests that look as hashes do."""
    return [random.Random(number).randbytes(16) for number in numbers]


def per_row(action: Callable[[list[bytes]], object], known: list[bytes], repeats: int) -> float:
    """Median microseconds a row of looking up random batches."""
    seconds = []
    for _ in range(repeats):
        batch = random.sample(known, BATCH)
        start = time.perf_counter()
        action(batch)
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds) / BATCH


def memory(count: int, known: list[bytes], spec: RowSpec, repeats: int) -> tuple[float, float]:
    """Microseconds a row, and bytes an entry beside its row."""
    tier = MemoryTier(2 * count * spec.size)
    rows = [torch.zeros(1000, *shape, dtype=dtype) for dtype, shape in spec.leaves]
    tracemalloc.start()
    for start in range(0, count, 1000):
        copies = [bytes(bytearray(digest)) for digest in known[start : start + 1000]]
        tier.admit(b"region", copies, rows, spec, CPU)
    overhead = tracemalloc.get_traced_memory()[0] / count
    tracemalloc.stop()
    slab = tier.slab(b"region")
    assert slab is not None
    return per_row(lambda batch: slab.take(batch), known, repeats), overhead


def bare_memory(count: int, known: list[bytes], spec: RowSpec, repeats: int) -> float:
    """Microseconds a row of a dict and an ``index_select``, as if nothing else were needed."""
    slots = {bytes(bytearray(digest)): slot for slot, digest in enumerate(known)}
    leaves = [torch.ones(count, *shape, dtype=dtype) for dtype, shape in spec.leaves]

    def look_up(batch: list[bytes]) -> None:
        index = torch.tensor([slots[digest] for digest in batch])
        for leaf in leaves:
            leaf.index_select(0, index)

    return per_row(look_up, known, repeats)


def bare_disk(known: list[bytes], repeats: int, folder: Path) -> float:
    """Microseconds a row of asking SQLite for the blobs and doing nothing with them."""
    query = f"SELECT value FROM Cache WHERE raw = 1 AND key IN ({','.join('?' * BATCH)})"
    database = next(folder.rglob("cache.db"))
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 8192")
        return per_row(
            lambda batch: connection.execute(query, [bytes(16) + digest for digest in batch]).fetchall(), known, repeats
        )


def model(folder: str, width: int) -> torch.nn.Module:
    """A backbone that is nothing, so that an epoch is lookups alone."""
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.Tanh())
    options = {"persistent": True, "persistent_cache_dir": folder, "max_memory_cache_size": 10**10}
    return torchcache.mark(backbone, freeze=True, **options)


def epochs(folder: str, count: int, width: int, number: int) -> list[float]:
    """Seconds of ``number`` shuffled epochs."""
    cached, seconds = model(folder, width), []
    inputs = torch.randn(count, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(number):
        order = torch.randperm(count)
        start = time.perf_counter()
        for rows in order.split(BATCH):
            cached(inputs[rows])
        seconds.append(time.perf_counter() - start)
    torchcache.flush()
    return seconds


def new_process(count: int, width: int, folder: str) -> list[float]:
    """Rows a second in the first two epochs of a process that finds all of them on disk."""
    for number in (1, 2):
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds = pool.submit(epochs, folder, count, width, number).result()
    return [count / spent for spent in seconds]


def disk(count: int, known: list[bytes], spec: RowSpec, repeats: int, folder: Path) -> tuple[float, float, float]:
    """Microseconds a row, seconds to open, and by how much the directory is larger than what the rows hold."""
    codec = Codec(spec)
    tier = DiskTier(folder)
    for start in range(0, count, 1000):
        keys = [bytes(16) + digest for digest in known[start : start + 1000]]
        blobs = codec.encode(keys, [torch.randn(len(keys), *shape).to(dtype) for dtype, shape in spec.leaves])
        tier.write(list(zip(keys, blobs, strict=True)), Region("region", ""))
    tier.close()
    started = time.perf_counter()
    tier = DiskTier(folder)
    tier.read([bytes(32)])
    opened = time.perf_counter() - started
    rows = spec.empty(BATCH)

    def look_up(batch: list[bytes]) -> None:
        keys = [bytes(16) + digest for digest in batch]
        found = tier.read(keys)
        assert len(codec.decode_into(keys, [found[key] for key in keys], rows)) == BATCH

    spent = per_row(look_up, known, repeats)
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return spent, opened, used / (count * spec.size) - 1


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--up-to", type=int, default=1_000_000, help="the largest number of entries")
    parser.add_argument("--width", type=int, default=768, help="floats a row (768 are 3 KB)")
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    spec = RowSpec(((torch.float32, (arguments.width,)),))
    columns = ("entries", "memory us/row", "bare", "overhead B", "disk us/row", "bare", "open s", "overhead")
    table = Table(*columns, "new process rows/s", "2nd epoch", title=f"scale, rows of {spec.size} bytes")
    count = 1000
    while count <= arguments.up_to:
        known = digests(range(count))
        in_memory, overhead = memory(count, known, spec, arguments.repeats)
        bare = bare_memory(count, known, spec, arguments.repeats)
        figures = [f"{in_memory:.2f}", f"{bare:.2f}", f"{overhead:.0f}"]
        with tempfile.TemporaryDirectory() as folder:
            on_disk, opened, share = disk(count, known, spec, arguments.repeats, Path(folder))
            alone = most_rows(Codec(spec).plain) == 1  # SQLite finds no rows that are packed
            bare_text = f"{bare_disk(known, arguments.repeats, Path(folder)):.2f}" if alone else "-"
        figures += [f"{on_disk:.2f}", bare_text, f"{opened:.3f}", f"{share:.1%}"]
        with tempfile.TemporaryDirectory() as folder:
            figures += [f"{rate:,.0f}" for rate in new_process(count, arguments.width, folder)]
        table.add_row(f"{count:,}", *figures)
        count *= 10
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
