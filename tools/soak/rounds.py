"""Rounds of what the suite does once: kills, damage, forged blobs and rows, concurrency, interrupts."""

from __future__ import annotations

import collections
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS / "faults"), str(TESTS / "stress"), str(TESTS / "loading")]

import changing  # noqa: E402
import damage  # noqa: E402
import directories  # noqa: E402
import hostile  # noqa: E402
import interrupts  # noqa: E402
import kills  # noqa: E402
import processes  # noqa: E402

__all__ = ["ROUNDS"]

Counts = collections.Counter[str]
Round = Callable[[Path, int], Counts]
BLOBS = 50_000
# On the stand-in device, which has to be built first.
PROGRAMS = 60


def _kills(directory: Path, seed: int) -> Counts:
    return Counts(kills.in_its_own_process(directory / "cache", 5, seed))


def _damage(directory: Path, seed: int) -> Counts:
    chance = random.Random(seed)
    source = directory / "source"
    filler = damage.filled(source)
    counts = Counts()
    for number in range(10):
        file, harm, moment = chance.choice(damage.FILES), chance.choice([*damage.HARMS]), chance.choice(damage.MOMENTS)
        if damage.possible(file, harm, moment):
            run = damage.endure(source, directory / str(number), file, harm, moment, seed + number)
            counts += Counts({"faults injected": 1, "rows compared": run.count("hits") + run.count("misses")})
    del filler  # its log was to be copied as it is
    return counts


def _blobs(directory: Path, seed: int) -> Counts:
    return Counts(hostile.fuzz_blobs(seed, BLOBS)) + Counts({"blobs fuzzed": BLOBS})


def _rows(directory: Path, seed: int) -> Counts:
    return Counts(hostile.endure_rows(directory / "cache", directory / "marker", seed))


def _processes(directory: Path, seed: int) -> Counts:
    chance = random.Random(seed)
    method = chance.choices(["fork", "spawn"], [4, 1])[0]
    return Counts(
        processes.in_its_own_process(directory / "cache", method, 8, 60, seed, removals=chance.random() < 0.5)
    )


def _interrupts(directory: Path, seed: int) -> Counts:
    return Counts(interrupts.survive(directory / "cache", 15, seed))


def _loading(directory: Path, seed: int) -> Counts:
    return Counts(changing.endure(directory / "files", seed))


def _device(directory: Path, seed: int) -> Counts:
    command = [sys.executable, str(TESTS / "device" / "endure.py"), str(seed), str(PROGRAMS)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-4000:]
    return Counts(json.loads(done.stdout.splitlines()[-1]))


ROUNDS: dict[str, Round] = {
    "kills": _kills,
    "damage": _damage,
    "blobs": _blobs,
    "rows": _rows,
    "directories": directories.round_of,
    "loading": _loading,
    "processes": _processes,
    "interrupts": _interrupts,
    "device": _device,
}
