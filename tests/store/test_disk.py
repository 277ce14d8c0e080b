"""The disk tier: what it refuses, and what it survives."""

import concurrent.futures
import contextlib
import json
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from torchcache.store import connect
from torchcache.store.blob_disk import BlobDisk
from torchcache.store.catalogue import Region
from torchcache.store.connect import MIN_FILE_SIZE
from torchcache.store.disk import DiskTier

LIMIT = 10**9


def record(limit):
    return Region("tag", "", options={"max_persistent_cache_size": limit})


def key(number):
    return number.to_bytes(32, "big")


def entries(numbers, size=100):
    return [(key(number), number.to_bytes(4, "big") * (size // 4)) for number in numbers]


def contents(found):
    """What a reader would get of what was found: bytes, and files that can be read."""
    values = {}
    for name, value in found.items():
        with contextlib.suppress(OSError, ValueError):
            values[name] = value if isinstance(value, bytes) else value.read(4 * MIN_FILE_SIZE)
    return values


def database(directory):
    return sqlite3.connect(next(directory.rglob("cache.db")))


def test_batches_of_any_size_come_back(tmp_path):
    tier = DiskTier(tmp_path)
    stored = entries(range(1700))
    assert tier.write(stored, record(LIMIT)) == (1700, 170_000)
    assert tier.read([key(number) for number in range(-0, 1700)]) == dict(stored)
    assert tier.read([key(5), key(9999)]) == dict(stored[5:6])
    assert DiskTier(tmp_path).read([key(3)]) == dict(stored[3:4])


def test_large_values_are_files_and_private(tmp_path):
    tier = DiskTier(tmp_path / "new")
    stored = entries(range(30), size=2 * MIN_FILE_SIZE)
    tier.write(stored, record(LIMIT))
    files = list(tmp_path.rglob("*.val"))
    assert len(files) == 30
    assert len({path.parent for path in files}) == 1  # a folder for each would double the time
    assert contents(tier.read([key(1)])) == dict(stored[1:2])
    if os.name == "posix":
        assert all(path.stat().st_mode & 0o077 == 0 for path in [*files, tmp_path / "new"])


def test_the_limit_counts_files_and_stops_storing(tmp_path, warnings):
    tier = DiskTier(tmp_path)
    stored, _ = tier.write(entries(range(40), size=2 * MIN_FILE_SIZE), record(20 * MIN_FILE_SIZE))
    assert 0 < stored < 11
    assert tier.full
    assert tier.volume() <= 20 * MIN_FILE_SIZE
    assert DiskTier(tmp_path).write(entries(range(50, 60), 2 * MIN_FILE_SIZE), record(20 * MIN_FILE_SIZE))[0] <= 1
    assert len([text for text in warnings if "full" in text]) == 1


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "columns",
    [
        {"mode": 4, "value": "bomb"},
        {"mode": 4, "value": None, "filename": "bomb.val"},
        {"mode": 3, "value": None, "filename": "bomb.val"},
        {"mode": 2, "value": None, "filename": "{outside}"},
        {"mode": 2, "value": None, "filename": "../../secret"},
        {"mode": 2, "value": None, "filename": "ab/cd/" + "e" * 28 + ".val"},
        {"mode": 1, "value": "text"},
        {"mode": None, "value": None},
    ],
)
@pytest.mark.parametrize("remedy", ["write", "drop"])
def test_planted_rows_execute_nothing_and_touch_nothing(tmp_path, columns, remedy, warnings):
    directory = tmp_path / "cache"
    tier = DiskTier(directory)
    tier.write(entries(range(3)), record(LIMIT))
    bomb = pickle.dumps(Bomb(str(tmp_path / "exploded")))
    (tmp_path / "secret").write_bytes(b"secret")
    rows = next(directory.rglob("cache.db")).parent
    (rows / "bomb.val").write_bytes(bomb)
    link = rows / "ab" / "cd" / ("e" * 28 + ".val")
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "secret")
    planted = {"filename": None, **columns}
    planted = {name: bomb if value == "bomb" else value for name, value in planted.items()}
    if planted["filename"]:
        planted["filename"] = planted["filename"].format(outside=tmp_path / "secret")
    with database(directory) as connection:
        assignments = ", ".join(f"{name} = ?" for name in planted)
        connection.execute(f"UPDATE Cache SET {assignments} WHERE key = ?", (*planted.values(), key(1)))
    found = contents(DiskTier(directory).read([key(0), key(1), key(2)]))
    assert set(found) == {key(0), key(2)}
    assert not (tmp_path / "exploded").exists()
    if remedy == "write":
        DiskTier(directory).write(entries([1]), record(LIMIT))
        assert set(DiskTier(directory).read([key(1)])) == {key(1)}
    else:
        DiskTier(directory).remove(record(LIMIT), {key(1): b""})
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert not (tmp_path / "exploded").exists()


def plant_file(directory):
    """Give row 1 a file name of the store; returns that name."""
    name = "ab/cd/" + "e" * 28 + ".val"
    with database(directory) as connection:
        connection.execute("UPDATE Cache SET mode = 2, value = NULL, filename = ? WHERE key = ?", (name, key(1)))
    return next(directory.rglob("cache.db")).parent / name


def test_a_folder_that_leads_elsewhere_is_neither_read_nor_emptied(tmp_path, warnings):
    directory, outside = tmp_path / "cache", tmp_path / "outside"
    DiskTier(directory).write(entries(range(3)), record(LIMIT))
    path = plant_file(directory)
    secret = outside / "cd" / path.name
    secret.parent.mkdir(parents=True)
    secret.write_bytes(b"secret")
    path.parents[1].symlink_to(outside)
    assert contents(DiskTier(directory).read([key(1)])) == {}
    DiskTier(directory).remove(record(LIMIT), {key(1): b""})
    assert secret.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this file system")
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, warnings):
    DiskTier(tmp_path).write(entries(range(3)), record(LIMIT))
    path = plant_file(tmp_path)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    found = []
    thread = threading.Thread(target=lambda: found.append(contents(DiskTier(tmp_path).read([key(1)]))), daemon=True)
    thread.start()
    thread.join(20)
    assert found == [{}]


def test_what_is_larger_than_any_blob_is_not_read(tmp_path, warnings):
    DiskTier(tmp_path).write(entries(range(3)), record(LIMIT))
    path = plant_file(tmp_path)
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.truncate(2**40)
    with database(tmp_path) as connection:
        connection.execute("UPDATE Cache SET value = zeroblob(?) WHERE key = ?", (2 * MIN_FILE_SIZE, key(2)))
    assert set(contents(DiskTier(tmp_path).read([key(0), key(1), key(2)]))) == {key(0)}


@pytest.mark.parametrize(
    "marker",
    [
        b"\xff\xfe",
        b"[]",
        b"",
        b"null",
        b"[" * 100_000,
        b'{"format": 0}',
        b'{"format": "9"}',
        b'{"format": 1e400}',
        b'{"format": 9}',
    ],
)
def test_a_marker_that_says_nothing_is_replaced(tmp_path, marker):
    (tmp_path / "torchcache.json").write_bytes(marker)
    assert DiskTier(tmp_path).write(entries([1]), record(LIMIT)) == (1, 100)
    assert (tmp_path / "torchcache.json").read_bytes() == connect.marker(1)


@pytest.mark.parametrize(
    "harm",
    [
        "INSERT INTO Settings VALUES ('disk_fetch', 'x')",
        "UPDATE Settings SET value = NULL WHERE key = 'size'",
        "UPDATE Settings SET value = 'x' WHERE key = 'size'",
        "INSERT INTO Settings VALUES (X'ff', 5)",
        "INSERT INTO Settings VALUES ('sqlite_foo', '; drop')",
        "DROP TABLE Cache",
        "ALTER TABLE Cache RENAME COLUMN mode TO foo",
    ],
)
def test_a_database_with_other_settings_or_tables_costs_rows_and_raises_nothing(tmp_path, harm, warnings):
    tier = DiskTier(tmp_path)
    tier.write(entries(range(3)), record(LIMIT))
    tier.close()
    with database(tmp_path) as connection:
        connection.execute(harm)
    tier = DiskTier(tmp_path)
    assert set(tier.read([key(1)])) <= {key(1)}
    tier.write(entries([7]), record(LIMIT))
    tier.remove(record(LIMIT), {key(1): b""})
    assert tier.volume() >= 0
    assert len(set(warnings)) == len(warnings)


def test_no_flipped_bit_of_the_marker_stops_anything(tmp_path):
    for bit in range(8 * len(connect.marker(1))):
        data = bytearray(connect.marker(1))
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "torchcache.json").write_bytes(data)
        connect.check_version(tmp_path)


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "harm",
    [
        f"UPDATE Settings SET value = '{LONG}' WHERE key = 'sqlite_cache_size'",
        f"UPDATE Settings SET value = '{LONG}' WHERE key = 'size'",
        f"PRAGMA writable_schema = 1; UPDATE sqlite_master SET sql = 'CREATE {LONG}' WHERE name = 'Cache'",
        f"PRAGMA writable_schema = 1; UPDATE sqlite_master SET sql = 'CREATE TABLE {LONG}(' WHERE name = 'Settings'",
    ],
)
@pytest.mark.parametrize("opened", ["before", "after"])
def test_a_warning_is_a_line_or_two_whatever_the_database_says(tmp_path, harm, opened, warnings):
    tier = DiskTier(tmp_path)
    tier.write(entries(range(3)), record(LIMIT))
    with database(tmp_path) as connection:
        connection.executescript(harm)
    tier = tier if opened == "before" else DiskTier(tmp_path)
    tier.read([key(1)])
    tier.write(entries([7]), record(LIMIT))
    thread = threading.Thread(target=tier.read, args=([key(2)],))
    thread.start()
    thread.join()
    assert all(len(text) < 500 and text.isprintable() for text in warnings), max(map(len, warnings))
    assert len(warnings) <= 1


@pytest.mark.parametrize("value", ["0; SELECT 1", "x", -7, 5.5, b"a"])
def test_settings_in_the_database_are_obeyed_on_no_thread(tmp_path, value):
    tier = DiskTier(tmp_path)
    tier.write(entries(range(3)), record(LIMIT))
    with database(tmp_path) as connection:
        connection.execute(
            "UPDATE Settings SET value = ? WHERE key IN ('sqlite_cache_size', 'sqlite_synchronous')", (value,)
        )

    def settings(used):
        assert used.read([key(1)]) == dict(entries([1]))
        return {name: used._cache._sql(f"PRAGMA {name}").fetchone() for name in ("cache_size", "synchronous")}

    for used in (tier, DiskTier(tmp_path)):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert pool.submit(settings, used).result() == {"cache_size": (8192,), "synchronous": (1,)}


def test_pickled_keys_and_values_are_refused(tmp_path):
    disk = BlobDisk(str(tmp_path))
    for value in ("text", 3, 2.5, ("tuple",), None):
        with pytest.raises(TypeError):
            disk.put(value)
        with pytest.raises(TypeError):
            disk.store(value, False)
    with pytest.raises(ValueError, match="refused"):
        disk.get(pickle.dumps(Bomb(str(tmp_path / "exploded"))), False)
    assert not (tmp_path / "exploded").exists()


def test_a_newer_format_is_left_alone_and_said_once(tmp_path, warnings):
    (tmp_path / "torchcache.json").write_text(json.dumps({**json.loads(connect.marker(2)), "more": 1}))
    tier = DiskTier(tmp_path)
    for _ in range(3):
        assert tier.read([key(1)]) == {}
        assert tier.write(entries([1]), record(LIMIT)) == (0, 0)
    assert os.listdir(tmp_path) == ["torchcache.json"]
    assert len(warnings) == 1
    assert "upgrade" in warnings[0]


@pytest.mark.parametrize("harm", ["garbage", "file", "directory"])
def test_a_broken_directory_reads_as_empty_and_is_warned_of_once(tmp_path, harm, warnings):
    directory = tmp_path / "cache"
    if harm == "file":
        directory.write_text("no directory")
    else:
        first = DiskTier(directory)
        first.write(entries(range(100)), record(LIMIT))
        first.close()
        path = next(directory.rglob("cache.db"))
        for side in path.parent.glob("cache.db-*"):
            side.unlink()
        if harm == "garbage":
            path.write_bytes(os.urandom(50_000))
        else:
            path.unlink()
            path.mkdir()
    tier = DiskTier(directory)
    for _ in range(3):
        assert tier.read([key(1)]) == {}
        assert tier.write(entries([1]), record(LIMIT)) == (0, 0)
    assert tier.errors > 0
    assert len(warnings) == 1


WRITER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[3])
    from test_disk import DiskTier, entries, record, LIMIT
    tier = DiskTier(Path(sys.argv[1]))
    start = int(sys.argv[2])
    tier.open()
    print("opened", flush=True)
    for batch in range(10_000 if start < 0 else 20):
        tier.write(entries(range(abs(start) + batch * 50, abs(start) + batch * 50 + 50), 4000), record(LIMIT))
        print("wrote", flush=True)
"""


def spawn(directory, start):
    arguments = [sys.executable, "-c", textwrap.dedent(WRITER), str(directory), str(start), os.path.dirname(__file__)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_processes_that_create_and_write_one_directory_at_once_lose_nothing(tmp_path):
    writers = [spawn(tmp_path / "cache", start) for start in (0, 1000, 2000, 3000)]
    for writer in writers:
        _, log = writer.communicate(timeout=120)
        assert writer.returncode == 0
        assert not log, log
    stored = dict(entries(range(4000), 4000))
    assert DiskTier(tmp_path / "cache").read(list(stored)) == stored


@pytest.mark.skipif(os.name != "posix", reason="needs kill -9")
def test_killed_writers_leave_whole_entries_only(tmp_path):
    directory = tmp_path / "cache"
    for attempt in range(4):
        writer = spawn(directory, -1 - 100_000 * attempt)
        # The first is killed between opening and writing, the others in the middle of writing.
        assert [writer.stdout.readline() for _ in range(1 + attempt)][-1] == (b"wrote\n" if attempt else b"opened\n")
        time.sleep(0.01 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        with database(directory) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            keys = [row[0] for row in connection.execute("SELECT key FROM Cache")]
        found = DiskTier(directory).read(keys)
        assert set(found) == set(keys)
        for name, blob in found.items():
            number = int.from_bytes(name, "big")
            assert blob == number.to_bytes(4, "big") * 1000
    assert keys
