"""A write-ahead log is read whole before any budget applies: a long one is refused, and none of ours becomes long."""

import contextlib
import gc
import os
import shutil
import sqlite3

import endurance
import grammar
import pytest
from trained import Run

from torchcache.cli.main import main
from torchcache.store import database as opened
from torchcache.store import gate, pause, room

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="tries in a child that is ended where it hangs")

COMMANDS = {
    "info": [],
    "stats": [],
    "doctor": [],
    "verify": [],
    "prune": ["--max-size", "1"],
    "clear": ["--yes", "--region", "Stretch"],
}


@contextlib.contextmanager
def connected(cache):
    with contextlib.closing(sqlite3.connect(cache / "rows-1" / "cache.db", isolation_level=None)) as connection:
        yield connection


def copy_with_log(tmp_path, harm=""):
    """A directory whose log has most of its rows, as after a crash."""
    run = Run(tmp_path / "open")
    run.steps(300, 1)
    with connected(tmp_path / "open") as connection:
        connection.execute(harm)
    shutil.copytree(tmp_path / "open", tmp_path / "cache")
    del run
    gc.collect()
    return tmp_path / "cache"


def database(cache):
    return {name: (cache / "rows-1" / name).read_bytes() for name in ("cache.db", "cache.db-wal")}


def found(cache):
    run = Run(cache)
    run.steps(300, 1)
    return run.count("disk_hits")


def leave_alone(cache):
    """Train and run every command but the one that begins anew; nothing is read, and the database stays as it is."""
    before = database(cache)

    def attempt(tell):
        assert found(cache) == 0
        for command, more in COMMANDS.items():
            assert main([command, str(cache), *more]) in (0, 1, 2)

    endurance.in_a_child(attempt)
    assert database(cache) == before


def test_a_long_log_is_not_read(tmp_path, monkeypatch, warnings, capsys):
    cache = copy_with_log(tmp_path)
    monkeypatch.setattr(gate, "LONGEST_LOG", 100_000)
    leave_alone(cache)
    found(cache)
    assert len(warnings) == 1
    assert "torchcache verify --long-log" in warnings[0]
    assert main(["merge", str(cache), str(tmp_path / "other")]) == 2
    assert main(["clear", str(cache), "--yes"]) == 0
    assert "torchcache clear" in capsys.readouterr().err
    assert found(cache) == 0
    assert found(cache) == 301


def test_a_long_log_is_not_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    cache = copy_with_log(tmp_path)
    monkeypatch.setattr(opened, "connect", refuse)
    assert found(cache) == 301
    monkeypatch.setattr(gate, "LONGEST_LOG", 100_000)
    before = database(cache)
    assert found(cache) == 0
    assert database(cache) == before


def test_a_log_of_gigabytes_is_long(tmp_path):
    cache = copy_with_log(tmp_path)
    with open(cache / "rows-1" / "cache.db-wal", "r+b") as file:
        file.truncate(2_000_000_000)
    assert main(["info", str(cache)]) == 2


def test_a_log_with_a_copy_of_its_database_is_read(tmp_path, monkeypatch):
    Run(tmp_path / "open").steps(300, 1)
    with grammar.opened(tmp_path / "open"):
        pass
    with connected(tmp_path / "open") as connection:
        connection.execute("VACUUM")
        shutil.copytree(tmp_path / "open", tmp_path / "cache")
    cache = tmp_path / "cache"
    monkeypatch.setattr(gate, "LONGEST_LOG", 30_000)
    assert (cache / "rows-1" / "cache.db-wal").stat().st_size > 100_000
    assert found(cache) == 301


def test_a_long_log_of_ones_own_is_put_into_the_database_on_request(tmp_path, monkeypatch):
    cache = copy_with_log(tmp_path)
    monkeypatch.setattr(gate, "LONGEST_LOG", 100_000)
    assert main(["verify", str(cache), "--long-log"]) == 0
    assert not (cache / "rows-1" / "cache.db-wal").exists()
    assert found(cache) == 301


def test_a_run_goes_on_with_a_directory_whose_long_log_is_gone(tmp_path, monkeypatch):
    cache = copy_with_log(tmp_path)
    monkeypatch.setattr(gate, "LONGEST_LOG", 100_000)
    monkeypatch.setattr(pause, "FIRST_SECONDS", 0.0)
    run = Run(cache)
    run.steps(10, 1)
    assert run.count("disk_hits") == 0
    assert main(["verify", str(cache), "--long-log"]) == 0
    run.steps(300, 1)
    assert run.count("disk_hits") > 0


def test_the_log_of_a_database_that_is_refused_stays_a_log(tmp_path):
    cache = copy_with_log(tmp_path, "CREATE TRIGGER t AFTER INSERT ON Cache BEGIN SELECT 1; END")
    leave_alone(cache)


def test_no_log_of_ours_becomes_long_while_somebody_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "LONGEST_LOG", 1_000_000)
    monkeypatch.setattr(room, "PORTION_BYTES", 200_000)
    cache = tmp_path / "cache"
    Run(cache).steps(1, 0)
    log = cache / "rows-1" / "cache.db-wal"
    with connected(cache) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM Cache").fetchone()
        run = Run(cache)
        run.steps(1000, 0)
        assert run.count("disk_errors") > 0
        assert 500_000 < log.stat().st_size < 1_000_000
        reader.execute("COMMIT")
        again = Run(cache)
        again.steps(1000, 0)
        assert 0 < again.count("disk_hits") < 1000
        assert log.stat().st_size < 1_000_000
    assert found(cache) == 300
