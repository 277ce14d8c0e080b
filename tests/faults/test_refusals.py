"""A disk that refuses (locked, full, read-only), a clock that jumps, another format beside ours: training goes on."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trained import Run

import torchcache
from torchcache.store import connect, database, pause
from torchcache.store.blob import FORMAT_VERSION


@contextlib.contextmanager
def mounted(path, size):
    """A file system of ``size`` in memory."""
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@contextlib.contextmanager
def read_only(path):
    """Nothing can be written below ``path``."""
    for command in (["--bind", str(path), str(path)], ["-o", "remount,bind,ro", str(path)]):
        if subprocess.run(["mount", *command], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@contextlib.contextmanager
def locked(directory):
    connection = sqlite3.connect(next(directory.rglob("cache.db")), isolation_level=None)
    with contextlib.closing(connection):
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@pytest.fixture
def waits(monkeypatch):
    """Short waits for locks, and how often one ran out."""
    counted = []

    def is_locked(error):
        answer = original(error)
        counted.extend([error] if answer else [])
        return answer

    original = connect.is_locked
    monkeypatch.setattr(database, "LOCK_SECONDS", 0.05)
    for module in (connect, database):
        monkeypatch.setattr(module, "is_locked", is_locked)
    return counted


@pytest.mark.parametrize("moment", ["before it is opened", "in mid-run"])
def test_a_lock_is_waited_for_once_and_not_in_every_batch(tmp_path, waits, warnings, moment):
    directory = tmp_path / "cache"
    Run(directory).steps(100, 4)
    run = Run(directory)
    if moment == "in mid-run":
        run.steps(50, 0)
    with locked(directory):
        run.steps(400, 8)
        run.steps(400, 8)
    assert len(waits) <= 3
    assert run.count("disk_errors") <= 3
    assert len(warnings) == 1
    assert run.count("misses") > 0


def test_what_was_locked_is_used_again_when_the_pause_is_over(tmp_path, waits, monkeypatch):
    monkeypatch.setattr(pause, "FIRST_SECONDS", 0.0)
    directory = tmp_path / "cache"
    run = Run(directory)
    run.steps(50, 0)
    with locked(directory):
        run.steps(100, 0)
    run.steps(200, 4)
    again = Run(directory)
    again.steps(200, 4)
    assert 0 < again.count("misses") <= 50  # those of the locked time


def test_a_full_disk_stops_storing_and_nothing_else(tmp_path, warnings):
    with mounted(tmp_path / "small", "2m") as small:
        run = Run(small / "cache")
        run.steps(2000, 40)
        run.steps(2000, 40)
        assert run.count("disk_errors") > 0
        assert run.count("hits") >= 2000
        assert len(warnings) == 1
        again = Run(small / "cache")
        again.steps(2000, 0)
        assert again.count("disk_hits") > 100


def test_a_disk_that_has_room_again_is_written_to_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pause, "FIRST_SECONDS", 0.0)
    with mounted(tmp_path / "small", "2m") as small:
        ballast = small / "ballast"
        Run(small / "cache").steps(100, 0)
        with contextlib.suppress(OSError), open(ballast, "wb") as file:
            while True:
                file.write(bytes(4096))
        run = Run(small / "cache")
        run.steps(2000, 0)
        assert run.count("disk_errors") > 0
        assert run.count("disk_hits") == 100
        ballast.unlink()
        run.step(range(3000, 3050))
        torchcache.flush()
        again = Run(small / "cache")
        again.step(range(3000, 3050))
        assert again.count("disk_hits") == 50


LIMITED = """
import resource, signal, sys
sys.path.insert(0, {place!r})
from trained import Run
import torchcache
from torchcache.logging import logger
run = Run({directory!r})
run.steps(50, 0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
run.steps(3000, 12)
run.steps(3000, 12)
assert run.count("disk_errors") > 0, run.count("disk_errors")
assert run.count("memory_hits") >= 3000, run.count("memory_hits")
print("trained on")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits of file sizes")
def test_files_that_may_not_grow_stop_storing_and_nothing_else(tmp_path):
    program = LIMITED.format(place=str(Path(__file__).parent), directory=str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "trained on\n", done.stderr
    assert done.stderr.count("WARNING") <= 1, done.stderr
    run = Run(tmp_path / "cache")
    run.steps(200, 4)
    assert run.count("disk_errors") == 0


@pytest.mark.parametrize("log", ["kept", "gone"])
def test_a_read_only_directory_is_read_and_not_written(tmp_path, warnings, log):
    directory = tmp_path / "cache"
    first = Run(directory)
    first.steps(100, 4)
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    if log == "gone":
        with contextlib.closing(sqlite3.connect(next(copy.rglob("cache.db")))) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert not [*copy.rglob("cache.db-*")]
    with read_only(copy):
        run = Run(copy)
        run.steps(200, 8)
        run.steps(200, 8)
        assert run.count("disk_hits") == 104
        assert run.count("misses") == 104
        assert len(warnings) == 1


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, monkeypatch):
    run = Run(tmp_path / "cache")
    run.steps(100, 4)
    start = time.time()
    clock = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: start - 10 * next(clock))
    run.steps(200, 8)
    again = Run(tmp_path / "cache")
    again.steps(200, 8)
    assert again.count("misses") == 0
    assert again.count("disk_errors") == 0


def test_rows_of_another_format_beside_ours_stay_as_they_are(tmp_path):
    other = tmp_path / "cache" / f"rows-{FORMAT_VERSION - 1}" / "cache.db"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"written by somebody else")
    run = Run(tmp_path / "cache")
    run.steps(100, 4)
    again = Run(tmp_path / "cache")
    again.steps(100, 4)
    assert again.count("misses") == 0
    assert other.read_bytes() == b"written by somebody else"
    assert os.listdir(other.parent) == ["cache.db"]
    torchcache.flush()
