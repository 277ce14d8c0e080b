"""Scale: time of a lookup a row, of opening a directory, and overhead an entry, from 1e3 to 1e6 entries."""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from torchcache.store.blob import Codec, RowSpec
from torchcache.store.disk import DiskTier
from torchcache.store.slab import MemoryTier

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
        slab, _ = tier.admit(b"region", copies, rows, spec, CPU)
    overhead = tracemalloc.get_traced_memory()[0] / count
    tracemalloc.stop()
    assert slab is not None
    return per_row(lambda batch: slab.gather(slab.find(batch)), known, repeats), overhead


def disk(count: int, known: list[bytes], spec: RowSpec, repeats: int, folder: Path) -> tuple[float, float, float]:
    """Microseconds a row, seconds to open, and the share of the directory that is not blobs."""
    codec = Codec(spec)
    tier = DiskTier(folder)
    size = 0
    for start in range(0, count, 1000):
        keys = [bytes(16) + digest for digest in known[start : start + 1000]]
        blobs = codec.encode(keys, [torch.randn(len(keys), *shape).to(dtype) for dtype, shape in spec.leaves])
        size += sum(map(len, blobs))
        tier.write(list(zip(keys, blobs, strict=True)), "region", 10**12)
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
    return spent, opened, used / size - 1


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--up-to", type=int, default=1_000_000, help="the largest number of entries")
    parser.add_argument("--width", type=int, default=768, help="floats a row (768 are 3 KB)")
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    spec = RowSpec(((torch.float32, (arguments.width,)),))
    columns = ("entries", "memory us/row", "memory overhead B", "disk us/row", "open s", "disk overhead")
    table = Table(*columns, title=f"scale, rows of {spec.size} bytes")
    count = 1000
    while count <= arguments.up_to:
        known = digests(range(count))
        in_memory, overhead = memory(count, known, spec, arguments.repeats)
        with tempfile.TemporaryDirectory() as folder:
            on_disk, opened, share = disk(count, known, spec, arguments.repeats, Path(folder))
        figures = (f"{in_memory:.2f}", f"{overhead:.0f}", f"{on_disk:.2f}", f"{opened:.3f}", f"{share:.1%}")
        table.add_row(f"{count:,}", *figures)
        count *= 10
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
