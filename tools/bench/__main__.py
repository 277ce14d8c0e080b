"""All-hit epochs beside precomputed features and beside other caches, and where one all-hit call spends its time."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bare import bare_hash
from peers import PEERS
from rich.console import Console
from rich.table import Table
from torch import nn
from workloads import Model, batches, epoch, workloads

import torchcache
from torchcache import stats


def timed(action: Callable[[], object]) -> Callable[[], float]:
    """``action`` as something that returns its seconds."""

    def run() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return run


def measure(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each run, interleaved in random order."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name in random.sample(list(runs), len(runs)):
            seconds[name].append(runs[name]())
    return {name: statistics.median(values) for name, values in seconds.items()}


class Peer:
    """A process that answers with the seconds of an epoch."""

    def __init__(self, python: Path, name: str, quick: bool) -> None:
        self.name = name
        self.wrong = 0
        script = Path(__file__).with_name("peers.py")
        self._process = subprocess.Popen(
            [str(python), str(script), name, *(["--quick"] if quick else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def epoch(self, workload: str) -> float:
        """Seconds of one epoch of ``workload``, as the peer measures them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(workload, file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline() or "{}")
        self.wrong = answer.get("wrong", self.wrong)
        return float(answer.get("seconds", "nan"))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def environment_of_peers(folder: Path) -> Path:
    """The Python of an environment with the peers in it, and this one's torch behind them."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    wanted = ["torchcache==0.6.0", "torch-module-cache==0.1.4", "joblib", "cloudpickle", "zstd"]
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *wanted], check=True)
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", show], capture_output=True, text=True, check=True).stdout.strip()
    (Path(own) / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def epochs(
    name: str, backbone: nn.Module, features: int, data: torch.Tensor, repeats: int, peers: Sequence[Peer]
) -> dict[str, float]:
    """Seconds of an epoch, by contender."""
    plain = Model(backbone.requires_grad_(False).eval(), features)
    with torch.no_grad():
        precomputed = torch.cat([backbone(part) for part in data.split(64)])
    marked = type(backbone)()
    marked.load_state_dict(backbone.state_dict())
    torchcache.mark(marked, freeze=True, max_memory_cache_size=4e9)
    cached = torchcache.transform(Model(marked, features))
    cached.head.load_state_dict(plain.head.state_dict())
    torch.testing.assert_close(cached(data[:64]), plain(data[:64]), rtol=1e-3, atol=1e-3)

    def from_features(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        found = precomputed[rows]
        return plain.head(found if found.ndim == 2 else found.mean(1))

    def by_id(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        with torchcache.sample_keys(rows):
            return cached(x)

    def eagerly(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        found = marked(x)
        return cached.head(found if found.ndim == 2 else found.mean(1))

    ahead = torchcache.prefetch(Batches(data))
    runs = {
        "precomputed": timed(lambda: epoch(from_features, plain.head, batches(data))),
        "no cache": timed(lambda: epoch(lambda x, rows: plain(x), plain.head, batches(data))),
        "transform": timed(lambda: epoch(lambda x, rows: cached(x), cached.head, batches(data))),
        "transform, prefetch": timed(lambda: epoch(lambda x, rows: cached(x), cached.head, ahead)),
        "sample_keys": timed(lambda: epoch(by_id, cached.head, batches(data))),
        "eager": timed(lambda: epoch(eagerly, cached.head, batches(data))),
        **{peer.name: lambda peer=peer: peer.epoch(name) for peer in peers},
    }
    for run in runs.values():  # fills the caches
        run()
    before = stats(cached).misses
    found = measure(runs, repeats)
    assert stats(cached).misses == before, "an epoch that should have been all hits computed rows"
    return found


class Batches:
    """The epochs of ``batches``, as a loader that can be iterated again."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return batches(self.data)


def call(backbone: nn.Module, data: torch.Tensor, repeats: int) -> dict[str, float]:
    """Milliseconds of one all-hit call of 256 rows, its parts, and the bare operations beside it."""
    marked = torchcache.mark(type(backbone)(), freeze=True, max_memory_cache_size=4e9)
    x = data[:256].contiguous()
    outputs = marked(x)
    slab, index = outputs.clone(), torch.arange(len(x))
    start = stats(marked).regions[0]
    calls = 0

    def lookup() -> None:
        nonlocal calls
        calls += 1
        marked(x)

    runs = {
        "all-hit call": timed(lookup),
        "bare hash": timed(bare_hash(x)),
        "bare index_select": timed(lambda: slab.index_select(0, index)),
    }
    found = {name: 1e3 * value for name, value in measure(runs, 5 * repeats).items()}
    end = stats(marked).regions[0]
    for part in ("hash", "lookup", "merge"):
        spent = getattr(end, f"{part}_seconds") - getattr(start, f"{part}_seconds")
        found[part] = 1e3 * spent / calls
    return found


def tables(report: dict[str, Any]) -> list[Table]:
    """The report, for a terminal."""
    first = Table(title="one epoch (ms, ratio to precomputed)")
    second = Table(title="one all-hit call of 256 rows (ms; parts are means)")
    for table, key in ((first, "epochs"), (second, "calls")):
        table.add_column("workload")
        for name in next(iter(report[key].values())):
            table.add_column(name, justify="right")
    for name, found in report["epochs"].items():
        base = found["precomputed"]
        first.add_row(name, *(f"{1e3 * value:.1f} ({value / base:.2f}x)" for value in found.values()))
    for name, found in report["calls"].items():
        second.add_row(name, *(f"{value:.2f}" for value in found.values()))
    return [first, second]


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    lines = [f"{report['date']}, {report['machine']}", ""]
    for title, key in (
        ("One epoch: ms and ratio to precomputed", "epochs"),
        ("One all-hit call of 256 rows: ms", "calls"),
    ):
        columns = list(next(iter(report[key].values())))
        lines += [f"**{title}**", "", "| workload | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, found in report[key].items():
            base = found.get("precomputed")
            cells = [f"{1e3 * value:.1f} ({value / base:.2f}x)" if base else f"{value:.2f}" for value in found.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    if report["wrong"]:
        lines += ["Rows that a peer got wrong in its second epoch: " + json.dumps(report["wrong"]), ""]
    return "\n".join(lines)


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep as many cores busy meanwhile, as workers of a loader do."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: sum(range(10**6))"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="beside so many processes, as those of a loader"
    )
    parser.add_argument("--quick", action="store_true", help="smaller data, fewer repeats: under 3 minutes")
    parser.add_argument("--peers", action="store_true", help="measure other caches too, installed in an environment")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="and as Markdown tables there")
    arguments = parser.parse_args()
    repeats = 5 if arguments.quick else 15
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "epochs": {},
        "calls": {},
        "wrong": {},
    }
    with tempfile.TemporaryDirectory() as folder, busy(arguments.busy):
        peers = []
        if arguments.peers:
            python = environment_of_peers(Path(folder) / "peers")
            peers = [Peer(python, name, arguments.quick) for name in PEERS]
        for name, (backbone, features, data) in workloads(arguments.quick).items():
            report["epochs"][name] = epochs(name, backbone, features, data, repeats, peers)
            report["calls"][name] = call(backbone, data, repeats)
            report["wrong"][name] = {peer.name: peer.wrong for peer in peers}
        for peer in peers:
            peer.close()
    console = Console(width=190 if arguments.peers else 150)
    console.print(machine)
    for table in tables(report):
        console.print(table)
    if arguments.peers:
        console.print(f"rows that a peer got wrong in its second epoch: {report['wrong']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(report))


if __name__ == "__main__":
    main()
