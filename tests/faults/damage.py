"""Damage to every file that the store writes, between two runs and in the middle of one."""

import random
import shutil
import sqlite3
from contextlib import closing

from trained import Run

import torchcache

SMALL, LARGE = 300, 8
FILES = ("torchcache.json", "cache.db", "cache.db-wal", "cache.db-shm", "*.val")
MOMENTS = ("between runs", "in mid-run")


def truncate(path, chance):
    with open(path, "r+b") as file:
        file.truncate(chance.randrange(path.stat().st_size))


def flip_bits(path, chance):
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 8])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    overwrite(path, data)


def zero(path, chance):
    data = bytearray(path.read_bytes())
    start = chance.randrange(len(data))
    length = min(chance.choice([16, 512, 4096, 65536]), len(data) - start)
    data[start : start + length] = bytes(length)
    overwrite(path, data)


def overwrite(path, data):
    with open(path, "r+b") as file:  # the same file, not another of its name
        file.write(data)


def delete(path, chance):
    path.unlink()


def garbage(path, chance):
    path.unlink()
    path.write_bytes(chance.randbytes(50_000))


def empty(path, chance):
    path.unlink()
    path.touch()


def folder(path, chance):
    path.unlink()
    path.mkdir()


HARMS = {harm.__name__: harm for harm in (truncate, flip_bits, zero, delete, garbage, empty, folder)}


def filled(directory):
    """Fill a cache whose log still holds part of it, as after a kill: what a copy of it finds."""
    run = Run(directory)
    run.steps(SMALL // 2, LARGE)
    with closing(sqlite3.connect(next(directory.rglob("cache.db")))) as connection:
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    run.steps(SMALL, LARGE)
    return run  # its connections must not be closed


def possible(file, harm, moment):
    """A live log's index is shared memory: cutting it short under a process ends the process, whoever reads it."""
    return not (file.endswith("-shm") and harm in ("truncate",) and moment == "in mid-run")


def endure(source, directory, file, harm, moment, seed):
    """Harm one file of a copy of ``source``, and train on; the run afterwards. Raises for a wrong answer."""
    chance = random.Random(seed)
    shutil.copytree(source, directory)
    path = chance.choice(sorted(directory.rglob(file)))
    run = Run(directory)
    if moment == "in mid-run":
        run.step(range(0, SMALL, 7))
        run.step(range(2), "large")
        run.step(range(SMALL, SMALL + 20))  # into the log, which opening has emptied
        torchcache.flush()
    HARMS[harm](path, chance)
    run.steps(SMALL + 20, LARGE + 2)
    Run(directory).steps(SMALL + 20, LARGE + 2)
    return run
