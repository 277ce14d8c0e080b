"""Everything that a cache can meet, for as long as you like: random programs, kills, damage, forged bytes, concurrency.

    python tools/soak --minutes 60 [--seed S] [--only ROUND ...] [--json FILE]
    python tools/soak --planted [--seed S]

Rounds of each kind take turns, each with a seed of its own. A wrong answer or an error ends it, and is told with what
runs that round again. The report counts what was done. ``--planted`` plants realistic bugs in the library instead, one
after the other, and fails where random programs do not find one within a minute.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import logging
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import programs
import rounds
from rich.console import Console
from rich.table import Table

MINUTE = 60.0
ROUNDS = {"programs": programs.round_of, "unbuilt": programs.unbuilt_round_of, **rounds.ROUNDS}


def main() -> int:
    """Parse, run, report; the exit code is 1 after a wrong answer or an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long; 0 is one round of each kind")
    parser.add_argument("--seed", type=int, help="of the first round; each next one has the next seed")
    parser.add_argument("--only", nargs="+", choices=ROUNDS, default=list(ROUNDS), help="kinds of rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there as well, after each round")
    parser.add_argument("--planted", action="store_true", help="how soon planted bugs are found")
    given = parser.parse_args()
    torch._logging.set_logs(dynamo=logging.CRITICAL)
    logging.getLogger("torchcache").setLevel(logging.CRITICAL)
    seed = random.randrange(10**6) * 1000 if given.seed is None else given.seed
    if given.planted:
        return hunt(given.seed or 0)
    print(f"from seed {seed} on, for {given.minutes:g} minutes: {', '.join(given.only)}", flush=True)
    counts: collections.Counter[str] = collections.Counter()
    start = time.monotonic()
    code = soak(given.minutes, seed, given.only, counts, given.json)
    report(counts, time.monotonic() - start)
    return code


def soak(minutes: float, seed: int, kinds: list[str], counts: collections.Counter[str], file: Path | None) -> int:
    """Run rounds in turn until the time is over or one goes wrong; the exit code."""
    counts["wrong answers"] = 0
    end = time.monotonic() + 60 * minutes
    spent = dict.fromkeys(kinds, 0.0)
    try:
        while True:
            kind = min(spent, key=lambda name: spent[name])  # the same time for each
            started = time.monotonic()
            try:
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
                    counts += ROUNDS[kind](Path(directory), seed)
            except Exception as error:
                counts["wrong answers" if isinstance(error, AssertionError) else "errors"] += 1
                told = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
                _write(counts, file)
                print(f"\n{told}\n\nagain: python tools/soak --minutes 0 --only {kind} --seed {seed}", flush=True)
                return 1
            spent[kind] += time.monotonic() - started
            counts["rounds"] += 1
            _write(counts, file)
            seed += 1
            if time.monotonic() >= end and all(spent.values()):
                return 0
    except KeyboardInterrupt:
        return 130


def _write(counts: collections.Counter[str], file: Path | None) -> None:
    if file is not None:
        file.write_text(json.dumps(counts, indent=1, sort_keys=True))


def hunt(seed: int) -> int:
    """Look for every planted bug, for a minute each; the exit code is 1 where one is not found."""
    missed = 0
    for bug in programs.bugs.BUGS:
        started = time.monotonic()
        found = programs.bugs.hunt(bug, itertools.count(seed), MINUTE)
        missed += found is None
        result = "not found" if found is None else f"found by program {found}"
        print(f"{bug.__name__:45} {result} after {time.monotonic() - started:.1f} s", flush=True)
    return int(missed > 0)


def report(counts: collections.Counter[str], seconds: float) -> None:
    """The table of counts."""
    table = Table("what", "count", title=f"{seconds:,.0f} seconds")
    table.columns[1].justify = "right"
    for name, count in sorted(counts.items()):
        table.add_row(name, f"{count:,}")
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
