"""Random programs against uncached twins, for as long as you like: the harness of ``tests/differential``, without end.

    python tools/soak.py --minutes 5 [--seed S]

A wrong answer ends it: it prints the program's seed, what ``--minutes 0 --seed`` takes to run that program again, and
the operations that are left when those that do not matter are taken out.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import pickle
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HARNESS = Path(__file__).resolve().parents[1] / "tests" / "differential"
sys.path.insert(0, str(HARNESS))

import nets  # noqa: E402
import torch  # noqa: E402
from harness import Run, WrongAnswerError, clean, execute, follow  # noqa: E402
from pair import Pair  # noqa: E402
from program import DOORS, Program, shorten  # noqa: E402

import torchcache  # noqa: E402

# One program in so many goes on in a fresh process, which takes seconds to start.
RESUMED = 20
SHORTEN_SECONDS = 120


class ResumedError(AssertionError):
    """A wrong answer in a fresh process."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long; 0 runs one program")
    parser.add_argument("--seed", type=int, help="of the first program; each next one has the next seed")
    parser.add_argument("--doors", nargs="+", choices=DOORS, default=list(DOORS))
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch._logging.set_logs(dynamo=logging.CRITICAL)
    logging.getLogger("torchcache").setLevel(logging.ERROR)
    if given.resume is not None:
        return resume(given.resume)
    return soak(given.minutes, random.randrange(10**6) * 1000 if given.seed is None else given.seed, given.doors)


def soak(minutes: float, seed: int, doors: list[str]) -> int:
    """Run programs until the time is over or an answer is wrong; the exit code."""
    counts: collections.Counter[str] = collections.Counter({"wrong answers": 0})
    print(f"from seed {seed} on, for {minutes:g} minutes", flush=True)
    start = time.monotonic()
    try:
        while True:
            program = Program.random(random.Random(seed), doors)
            after = in_a_fresh_process if program.persistent and seed % RESUMED == 0 else None
            try:
                execute(program, counts, after)
            except (WrongAnswerError, ResumedError) as error:
                counts["wrong answers"] += 1
                tell(error, program, seed, doors)
                return 1
            seed += 1
            if time.monotonic() - start >= 60 * minutes:
                return 0
    except KeyboardInterrupt:
        return 130
    finally:
        print(f"\n{time.monotonic() - start:.0f} seconds, seeds up to {seed}")
        for name, count in sorted(counts.items()):
            print(f"{name:40} {count:>12,}")


def tell(error: Exception, program: Program, seed: int, doors: list[str]) -> None:
    """Print what is needed to see a wrong answer again."""
    print(f"\n{error}\n\nagain: python tools/soak.py --minutes 0 --seed {seed} --doors {' '.join(doors)}", flush=True)
    if isinstance(error, ResumedError):
        return
    until = time.monotonic() + SHORTEN_SECONDS

    def fails(shorter: Program) -> bool:
        if time.monotonic() > until:
            return False
        try:
            execute(shorter)
        except WrongAnswerError as found:
            return type(found) is type(error)
        return False

    print(f"\nshorter, for harness.execute:\n{shorten(program, fails)}")


def in_a_fresh_process(run: Run) -> None:
    """Save a run's models, and run its steps once more where nothing is in memory."""
    torchcache.flush()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "run"
        pair = run.pair
        kept = (run.program, run.directory, run.autocast, pair.model, pair.twin, pair.parts, nets.SETTINGS, nets.OFFSET)
        path.write_bytes(pickle.dumps(kept))
        command = [sys.executable, str(Path(__file__).resolve()), "--resume", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ResumedError(f"in a fresh process after {run.program!r}:\n{done.stderr}")
    for name, count in json.loads(done.stdout.splitlines()[-1]).items():
        run.counts[f"in fresh processes: {name}"] += count


def resume(path: Path) -> int:
    """The fresh process: run the steps on what was saved, and print the counts."""
    program, directory, autocast, model, twin, parts, settings, offset = pickle.loads(path.read_bytes())
    counts: collections.Counter[str] = collections.Counter()
    with clean():
        nets.SETTINGS.update(settings)
        nets.OFFSET = offset
        follow(Run(program, directory, counts, Pair.of(model, twin, parts, program), autocast))
    names = ("rows compared", "rows hit on disk", "rows missed")
    print(json.dumps({name: counts[name] for name in names}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
