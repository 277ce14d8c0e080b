"""Random programs against uncached twins: the harness of ``tests/differential``.

As a program of its own, it is the fresh process in which a run is resumed.
"""

from __future__ import annotations

import collections
import json
import pickle
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HARNESS = Path(__file__).resolve().parents[2] / "tests" / "differential"
sys.path.insert(0, str(HARNESS))

import bugs  # noqa: E402, F401
import nets  # noqa: E402
import unbuilt  # noqa: E402
from harness import Run, WrongAnswerError, clean, execute, follow  # noqa: E402
from pair import Pair  # noqa: E402
from program import DOORS, Program, shorten  # noqa: E402

import torchcache  # noqa: E402

# Of so many programs the first goes on in a fresh process, which takes seconds to start.
PROGRAMS = 20
SHORTEN_SECONDS = 120


class ResumedError(AssertionError):
    """A wrong answer in a fresh process."""


def round_of(directory: Path, seed: int) -> collections.Counter[str]:
    """Run some random programs; what was counted. Raises for a wrong answer, with the program that gives it."""
    counts: collections.Counter[str] = collections.Counter()
    for number in range(PROGRAMS):
        program = Program.random(random.Random(seed * PROGRAMS + number), DOORS)
        after = in_a_fresh_process if program.persistent and number == 0 else None
        try:
            execute(program, counts, after)
        except (WrongAnswerError, ResumedError) as error:
            raise AssertionError(told(error, program)) from error
        counts["programs"] += 1
    return counts


def unbuilt_round_of(directory: Path, seed: int) -> collections.Counter[str]:
    """Run some random programs on deferred backbones, each twice over one directory; what was counted."""
    counts: collections.Counter[str] = collections.Counter()
    for number in range(PROGRAMS):
        names = unbuilt.STEPS if number % 2 else unbuilt.CALLS  # those that need not compute
        program = unbuilt.drawn(seed * PROGRAMS + number, names)
        found, built = unbuilt.again(program, directory / str(number))
        counts += found
        counts["second runs that built nothing"] += not built[1]
    return counts


def told(error: Exception, program: Program) -> str:
    """What is needed to see a wrong answer again."""
    if isinstance(error, ResumedError):
        return str(error)
    until = time.monotonic() + SHORTEN_SECONDS

    def fails(shorter: Program) -> bool:
        if time.monotonic() > until:
            return False
        try:
            execute(shorter)
        except WrongAnswerError as found:
            return type(found) is type(error)
        return False

    return f"{error}\n\nshorter, for harness.execute:\n{shorten(program, fails)}"


def in_a_fresh_process(run: Run) -> None:
    """Save a run's models, and run its steps once more where nothing is in memory."""
    torchcache.flush()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "run"
        pair = run.pair
        kept = (run.program, run.directory, run.autocast, pair.model, pair.twin, pair.parts, nets.world())
        path.write_bytes(pickle.dumps(kept))
        command = [sys.executable, str(Path(__file__).resolve()), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ResumedError(f"in a fresh process after {run.program!r}:\n{done.stderr}")
    for name, count in json.loads(done.stdout.splitlines()[-1]).items():
        run.counts[f"in fresh processes: {name}"] += count


def resume(path: Path) -> int:
    """The fresh process: run the steps on what was saved, and print the counts."""
    program, directory, autocast, model, twin, parts, world = pickle.loads(path.read_bytes())
    counts: collections.Counter[str] = collections.Counter()
    with clean():
        nets.set_world(world)
        follow(Run(program, directory, counts, Pair.of(model, twin, parts, program), autocast))
    names = ("rows compared", "rows hit on disk", "rows missed")
    print(json.dumps({name: counts[name] for name in names}))
    return 0


if __name__ == "__main__":
    sys.exit(resume(Path(sys.argv[1])))
