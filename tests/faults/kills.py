"""Processes killed at random moments while they fill a cache; a process of its own, which forks them.

python tests/faults/kills.py DIRECTORY KILLS SEED
"""

import collections
import json
import os
import random
import select
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

LARGE = 4  # a batch of small rows is followed by one of so many large ones
BATCH = 16


def in_its_own_process(directory, kills, seed):
    """Run ``survive`` in a fresh process, whose forks inherit no threads; its counts."""
    command = [sys.executable, str(Path(__file__).resolve()), str(directory), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise AssertionError(f"after kills with seed {seed}:\n{done.stderr[-3000:]}")
    return collections.Counter(json.loads(done.stdout.splitlines()[-1]))


def survive(directory, kills, seed):
    """Kill a filling process ``kills`` times; what is found after each is asserted and counted."""
    chance, counts = random.Random(seed), collections.Counter()
    flushed = 0
    for _ in range(kills):
        flushed = kill_one(directory, flushed, chance)
        counts["kills survived"] += 1
        counts += in_a_child(lambda flushed=flushed: check(directory, flushed))
    counts["batches flushed before a kill"] = flushed
    return counts


def kill_one(directory, start, chance):
    """Fork a process that fills from batch ``start`` on, kill it; the number of batches that were flushed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            fill(directory, start, writing)
        finally:
            os._exit(1)
    os.close(writing)
    # Half of them die while the store is made or opened, the others in the middle of their batches.
    if chance.random() < 0.5:
        select.select([reading], [], [], 60)
        time.sleep(chance.uniform(0, 0.3))
    else:
        time.sleep(chance.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the filling process ended by itself"
    told = b""
    while more := os.read(reading, 65536):
        told += more
    os.close(reading)
    return struct.unpack("<q", told[-8:])[0] if told else start


def fill(directory, batch, pipe):
    """Store batches for ever, and tell of each that ``flush`` returned for."""
    from trained import Run

    import torchcache

    run = Run(directory)
    while True:
        run.step(range(batch * BATCH, (batch + 1) * BATCH))
        run.step(range(batch * LARGE, (batch + 1) * LARGE), "large")
        batch += 1
        if batch % 3 == 0:
            torchcache.flush()
            os.write(pipe, struct.pack("<q", batch))


def check(directory, flushed):
    """Every flushed row is there and right, and the database is whole."""
    from trained import Run

    import torchcache

    run = Run(directory)
    some = max(0, flushed - 20)  # of the large rows the last
    for batch in range(flushed):
        run.step(range(batch * BATCH, (batch + 1) * BATCH))
        if batch >= some:
            run.step(range(batch * LARGE, (batch + 1) * LARGE), "large")
    assert run.count("misses") == 0, f"{run.count('misses')} rows lost that were flushed"
    hits = run.count("disk_hits")
    # What was not flushed is either whole or absent, and filling goes on.
    run.step(range(flushed * BATCH, (flushed + 4) * BATCH))
    run.step(range(flushed * LARGE, (flushed + 4) * LARGE), "large")
    torchcache.flush()
    assert run.count("disk_errors") == 0, "store errors after a kill"
    assert run.count("rows_written") == run.count("misses")
    orphans = audit(directory)
    return {"rows compared": hits + 4 * (BATCH + LARGE), "flushed rows found again": hits, "orphaned files": orphans}


def audit(directory):
    """Assert that the database is sound, its sums are right and its files exist; the number of files without a row."""
    # Not that of a database which a kill left half made.
    database = next(Path(directory).rglob("rows-*/cache.db"))
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        count, size = connection.execute("SELECT COUNT(*), COALESCE(SUM(size), 0) FROM Cache").fetchone()
        settings = dict(connection.execute("SELECT key, value FROM Settings"))
        named = {name for (name,) in connection.execute("SELECT filename FROM Cache WHERE filename IS NOT NULL")}
    files = list(database.parent.rglob("*.val"))
    present = {str(path.relative_to(database.parent)) for path in files}
    assert settings["count"] == count
    # Files that a kill left without a row take room as well.
    assert size <= settings["size"] <= sum(path.stat().st_size for path in files)
    assert named <= present, "rows without their files"
    return len(present - named)


def in_a_child(function):
    """The counts that ``function`` returns, called in a fork."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, json.dumps(function()).encode())
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    told = os.read(reading, 65536)
    os.close(reading)
    assert os.waitpid(child, 0)[1] == 0, "a reader failed"
    return collections.Counter(json.loads(told))


if __name__ == "__main__":
    import trained  # noqa: F401  # once, for all forks

    print(json.dumps(survive(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
