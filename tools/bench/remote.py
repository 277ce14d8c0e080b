"""Rows from a server beside the bare client's MGET, and a new process whose rows are all there beside one on disk.

    python tools/bench/remote.py [--rows N] [--repeats N]

Starts a ``redis-server`` or ``valkey-server`` of its own on a socket.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import redis
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import torchcache
from torchcache.store.catalogue import Region
from torchcache.store.remote import PREFIX, remote_tier

BATCH = 256
WIDTH = 768


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        print("redis-server or valkey-server is to be installed", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "s"
        command = [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", folder]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            compare(socket, Path(folder) / "cache", given.rows, given.repeats)
        finally:
            server.kill()
    return 0


def compare(socket: Path, directory: Path, rows: int, repeats: int) -> None:
    client = redis.Redis(unix_socket_path=str(socket))
    while not _answers(client):
        time.sleep(0.01)
    data = torch.randn(rows // BATCH, BATCH, 64)
    remote = {"remote": f"unix://{socket}?timeout=10"}
    disk = {"persistent": True, "persistent_cache_dir": directory}
    for options in (remote, disk):
        epoch(data, options)
        torchcache.flush()
    names = [name for name in client.scan_iter(count=1000) if len(name) > len(PREFIX) + 32]

    def bare() -> None:
        for start in range(0, len(names), BATCH):
            client.mget(names[start : start + BATCH])

    tier, region = remote_tier(remote["remote"]), Region(names[0][len(PREFIX) :][:32].decode(), "")
    keys = [name[-32:] for name in names]

    def reads() -> None:
        for start in range(0, len(keys), BATCH):
            part = keys[start : start + BATCH]
            assert len(tier.read(part, region, 4 * WIDTH + 1000)) == len(part)

    actions: dict[str, Callable[[], object]] = {
        "MGET of the bare client": bare,
        "the remote tier": reads,
        "a server, by a new process": lambda: epoch(data, remote),
        "disk, by a new process": lambda: epoch(data, disk),
    }
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)
    table = Table(title=f"{len(names):,} rows of {4 * WIDTH / 1000:g} KB, batches of {BATCH}, memory empty")
    for column in ("rows from", "rows/s", "beside MGET"):
        table.add_column(column, justify="left" if column == "rows from" else "right")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        table.add_row(name, f"{len(names) / median:,.0f}", f"{first / median:.0%}")
    Console(width=120).print(table)


def epoch(data: torch.Tensor, options: dict[str, object]) -> None:
    """One epoch of a model as a new process has it: nothing in memory."""
    torch.manual_seed(0)
    model = torchcache.mark(nn.Linear(64, WIDTH), freeze=True, audit=0, **options)
    for batch in data:
        model(batch)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


if __name__ == "__main__":
    raise SystemExit(main())
