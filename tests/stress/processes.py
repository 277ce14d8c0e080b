"""Eight processes at work on one directory: a process of its own, which starts them.

python tests/stress/processes.py DIRECTORY fork|spawn COUNT OPERATIONS SEED [--removals]
"""

import argparse
import collections
import faulthandler
import json
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "faults"))
SMALL, LARGE = 600, 24
# Longer than any lock is waited for: whoever is not done by then waits for another.
HUNG_SECONDS = 120


def in_its_own_process(directory, method="fork", count=8, operations=60, seed=0, removals=False):
    """Run ``work_together`` in a fresh process; its counts."""
    command = [sys.executable, str(Path(__file__).resolve()), str(directory), method, str(count), str(operations)]
    command += [str(seed), *(["--removals"] if removals else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise AssertionError(f"{method}, seed {seed}, removals {removals}:\n{done.stderr[-5000:]}")
    return collections.Counter(json.loads(done.stdout.splitlines()[-1]))


def work_together(directory, method, count, operations, seed, removals):
    """Start ``count`` processes of ``work``, and look for all rows that they stored; what was counted."""
    from trained import Run

    context = multiprocessing.get_context(method)
    first = Run(directory)
    first.steps(20, 2)
    inherited = first if method == "fork" else None  # forks go on with what their parent has open
    results = context.SimpleQueue()
    workers = [
        context.Process(target=work, args=(directory, operations, seed + number, removals, inherited, results))
        for number in range(count)
    ]
    for worker in workers:
        worker.start()
    counts, small, large = collections.Counter(), set(range(20)), set(range(2))
    for _ in workers:
        told, stored_small, stored_large = results.get()
        counts += told
        small.update(stored_small)
        large.update(stored_large)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    again = Run(directory)
    again.step(sorted(small))
    again.step(sorted(large), "large")
    if not removals:
        assert again.count("misses") == 0, f"{again.count('misses')} rows lost that were stored"
        assert again.count("disk_errors") == 0
        assert counts["store errors"] == 0, f"{counts['store errors']} store errors"
    assert damaged(directory) == 0
    counts["processes"] += count
    return counts


def work(directory, operations, seed, removals, run, results):
    """Random operations on the directory; tells what it counted and which rows it stored."""
    faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True)
    try:
        results.put(operate(directory, operations, random.Random(seed), removals, run))
    except BaseException:
        results.put((collections.Counter(), [], []))
        raise


def operate(directory, operations, chance, removals, run=None):
    """Random operations; the counts, and the rows of each model that were stored."""
    from trained import Run

    import torchcache

    run = run or Run(directory)
    counts, small, large, errors = collections.Counter(), set(), set(), -run.count("disk_errors")
    for _ in range(operations):
        name = chance.choices(["small", "large", "flush", "reopen", "remove"], [10, 4, 2, 1, 1 if removals else 0])[0]
        if name == "small":
            numbers = chance.choices(range(SMALL), k=chance.randrange(1, 60))
            run.step(numbers)
            small.update(numbers)
            counts["rows compared"] += len(numbers)
        elif name == "large":
            numbers = chance.choices(range(LARGE), k=chance.randrange(1, 5))
            run.step(numbers, "large")
            large.update(numbers)
            counts["rows compared"] += len(numbers)
        elif name == "flush":
            torchcache.flush()
        elif name == "reopen":
            torchcache.flush()
            errors += run.count("disk_errors")
            counts["rows hit on disk"] += run.count("disk_hits")
            run = Run(directory)
        else:
            name = remove(directory, chance)
        counts[f"operations: {name}"] += 1
    torchcache.flush()
    counts["rows hit on disk"] += run.count("disk_hits")
    counts["store errors"] += errors + run.count("disk_errors")
    return counts, sorted(small), sorted(large)


def remove(directory, chance):
    """Clear, prune or verify the directory as the command line does; what was done."""
    from torchcache.store.prune import clear, prune
    from torchcache.store.records import Records
    from torchcache.store.verify import verify

    actions = {
        "clear": clear,
        "prune": lambda records: prune(records, max_size=chance.randrange(300_000)),
        "verify": verify,
    }
    name = chance.choice([*actions])
    with Records(Path(directory)) as records:
        actions[name](records)
    return name


def damaged(directory):
    """Rows that ``verify`` finds damaged."""
    from torchcache.store.records import Records
    from torchcache.store.verify import verify

    with Records(Path(directory)) as records:
        return sum(verify(records, repair=False).damaged.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("directory", "method"):
        parser.add_argument(name)
    for name in ("count", "operations", "seed"):
        parser.add_argument(name, type=int)
    parser.add_argument("--removals", action="store_true")
    print(json.dumps(work_together(**vars(parser.parse_args()))))
