"""What nobody's cache directory can do to whoever opens it, each by the attack that it was made for."""

import contextlib
import gc
import io
import itertools
import json
import os
import shutil
import sqlite3
import stat
import struct
import time
import tracemalloc

import endurance
import grammar
import pytest
import torch
import xxhash
import zstandard
from trained import Run

import torchcache
from torchcache.cli.main import main
from torchcache.store import gate
from torchcache.store.catalogue import Region
from torchcache.store.connect import marker
from torchcache.store.disk import DiskTier
from torchcache.store.pack import rows_in

pytestmark = pytest.mark.skipif(os.name != "posix", reason="attacks by links, pipes and modes")

LIMIT = 10**9


@pytest.fixture
def cache(tmp_path):
    directory = tmp_path / "cache"
    Run(directory).steps(60, 2)
    gc.collect()  # closes its connections
    return directory


@pytest.fixture
def outside(tmp_path):
    grammar.victims(tmp_path / "outside")
    return tmp_path / "outside"


def told(*arguments):
    """Exit code, output and errors of a command that does not end in a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def record(limit):
    return Region("0" * 32, "", options={"max_persistent_cache_size": limit})


def in_time(function):
    """Do it in a child that is ended where it hangs."""
    endurance.in_a_child(lambda tell: function() and None)


def attempt(cache, what):
    """Train, or run a command."""
    if what == "training":
        Run(cache).steps(70, 3)
    else:
        told(what, cache, *{"clear": ["--yes"], "prune": ["--max-size", "1"]}.get(what, []))


WHAT = ["training", "info", "stats", "verify", "prune", "clear"]


# files


@pytest.mark.parametrize("mode", ["wal", "delete"])
@pytest.mark.parametrize("what", WHAT)
def test_a_journal_deletes_no_file_outside(cache, outside, what, mode):
    with grammar.opened(cache) as connection:
        if mode == "delete":
            connection.execute("PRAGMA journal_mode = delete")
    data = (cache / "rows-1" / "cache.db").read_bytes()
    victim = os.fsencode(outside / "precious.txt")
    head = grammar.MAGIC + struct.pack(">IIIII", 0, 1, len(data) // 16384, 512, 16384)
    tail = struct.pack(">I", 2**30 // 16384 + 1) + victim + struct.pack(">II", len(victim), sum(victim))
    (cache / "rows-1" / "cache.db-journal").write_bytes(head.ljust(512, b"\0") + tail + grammar.MAGIC)
    in_time(lambda: attempt(cache, what))
    assert (outside / "precious.txt").exists()


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("database", ["with a database", "without one"])
def test_rows_that_are_a_link_are_not_followed(cache, outside, what, database):
    if database == "with a database":
        shutil.copy(cache / "rows-1" / "cache.db", outside)
    shutil.rmtree(cache / "rows-1")
    (cache / "rows-1").symlink_to(outside)
    os.utime(outside / "ab" / "cd" / ("e" * 28 + ".val"), (1, 1))
    before = endurance.fingerprint(outside)
    in_time(lambda: attempt(cache, what))
    assert endurance.fingerprint(outside) == before


def test_clear_removes_no_folder_above_its_own(tmp_path):
    directory = tmp_path / "above" / "cache"
    (directory / "rows-1" / "ab" / "cd").mkdir(parents=True)
    (directory / "rows-1" / "ab" / "cd" / ("e" * 28 + ".val")).write_bytes(b"")
    assert told("clear", directory, "--yes")[0] == 0
    assert [path.name for path in tmp_path.rglob("*")] == ["above", "cache", "rows-1"]


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
@pytest.mark.parametrize("name", ["cache.db", "cache.db-wal", "cache.db-shm"])
def test_what_sqlite_opens_is_a_file_of_one_name(cache, outside, name, kind):
    path = cache / "rows-1" / name
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(outside / "precious.txt")
    elif kind == "hard link":
        os.link(outside / "precious.txt", path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    before = endurance.fingerprint(outside)
    for what in WHAT:
        in_time(lambda what=what: attempt(cache, what))
    assert endurance.fingerprint(outside) == before


@pytest.mark.parametrize("what", ["training", "info", "doctor", "verify"])
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "endless"])
def test_the_marker_is_neither_waited_for_nor_read_without_end(cache, outside, what, kind):
    path = cache / "torchcache.json"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside / "pipe" if kind == "link to a pipe" else "/dev/zero")
    in_time(lambda: attempt(cache, what))


def test_a_newer_format_ends_no_training(cache, warnings):
    (cache / "torchcache.json").write_bytes(marker(99))
    before = endurance.fingerprint(cache)
    Run(cache).steps(60, 2)
    assert endurance.fingerprint(cache) == before
    assert len(warnings) == 1
    assert "99" in warnings[0]


@pytest.mark.parametrize("what", ["training", "info"])
def test_what_others_may_write_is_set_right(cache, what):
    rows = cache / "rows-1"
    with grammar.opened(cache):
        pass
    for path in (rows, rows / "cache.db"):
        path.chmod(0o777)
    connection = sqlite3.connect(rows / "cache.db")  # keeps the log there
    connection.execute("SELECT * FROM Cache").fetchone()
    (rows / "cache.db-shm").chmod(0o666)
    attempt(cache, what)
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in [rows, *rows.glob("cache.db*")]} == {0}
    connection.close()


def test_the_path_given_is_the_path_used(tmp_path, monkeypatch):
    monkeypatch.setenv("ELSEWHERE", str(tmp_path / "elsewhere"))
    directory = tmp_path / "$ELSEWHERE" / "~"
    Run(directory).steps(10, 1)
    assert (directory / "rows-1" / "cache.db").exists()
    assert not (tmp_path / "elsewhere").exists()
    assert told("info", directory)[0] == 0


# the database


def test_the_schema_is_diskcaches(tmp_path):
    import diskcache

    diskcache.Cache(str(tmp_path), eviction_policy="none").close()
    connection = gate.open_database(tmp_path, "rw", 1.0)
    assert gate.schema_of(connection) == {*gate.SCHEMA, None}
    connection.close()
    assert diskcache.Cache(str(tmp_path)).set(b"k", b"v")


def test_diskcache_opens_what_the_store_made(cache):
    import diskcache

    assert sum(map(rows_in, diskcache.Cache(str(cache / "rows-1")))) == 62


ENDLESS = grammar.ENDLESS
HARMS = {
    "a trigger behind a hundred indices": [
        *(f"CREATE INDEX Cache_more{n} ON Cache (tag)" for n in range(110)),
        f"CREATE TRIGGER t AFTER INSERT ON Cache BEGIN {ENDLESS}; END",
    ],
    "a trigger on settings": [f"CREATE TRIGGER t AFTER INSERT ON Settings BEGIN {ENDLESS}; END"],
    "an index behind a thousand blanks": [
        "CREATE INDEX Cache_x ON Cache (tag)" + " " * 1000 + " WHERE length(hex(zeroblob(450000000))) > tag"
    ],
    "a view": ["ALTER TABLE Cache RENAME TO Old", f"CREATE VIEW Cache AS SELECT Old.* FROM Old, ({ENDLESS})"],
    "an index on an expression": ["CREATE INDEX Cache_y ON Cache (abs(size))"],
    "one more column": ["ALTER TABLE Cache ADD COLUMN more"],
    "one trigger less": ["DROP TRIGGER Settings_size_insert"],
}


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("harm", HARMS)
def test_no_schema_but_the_stores_is_used(cache, harm, what):
    with grammar.opened(cache) as connection:
        for statement in HARMS[harm]:
            connection.execute(statement)
    in_time(lambda: attempt(cache, what))
    if what == "info":
        code, out, err = told("info", cache)
        assert (code, out) == (2, "")
        assert "another schema" in err
        assert "torchcache clear" in err
        assert told("clear", cache, "--yes")[0] == 0
        run = Run(cache)
        run.steps(60, 2)
        assert run.count("disk_errors") == 0


def circular(cache, table):
    """Make the root of a table or an index a page whose only child is itself."""
    with grammar.opened(cache) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        ((root,),) = connection.execute(query, (table,)).fetchall()
    path = cache / "rows-1" / "cache.db"
    data = bytearray(path.read_bytes())
    chance = grammar.random.Random(0)
    data[(root - 1) * 16384 : root * 16384] = grammar.interior(16384, root, root, table != "Cache", chance)
    path.write_bytes(data)


def doubled(cache):
    """Make the root of the rows the top of twenty pages, each with two links to the next: a million ways down."""
    with grammar.opened(cache) as connection:
        ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'Cache'").fetchall()
    path = cache / "rows-1" / "cache.db"
    data = bytearray(path.read_bytes())
    first = len(data) // 16384 + 1
    chance = grammar.random.Random(0)
    chain = [root, *range(first, first + 18)]
    data += bytes(16384 * 18)
    leaf = data[(root - 1) * 16384 : root * 16384]
    for page, child in itertools.pairwise(chain):
        data[(page - 1) * 16384 : page * 16384] = grammar.interior(16384, child, child, False, chance)
    data[(chain[-1] - 1) * 16384 : chain[-1] * 16384] = leaf
    struct.pack_into(">I", data, 28, len(data) // 16384)
    path.write_bytes(data)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("shape", ["circular rows", "circular keys", "doubled"])
def test_pages_that_name_each_other_end_in_time(cache, shape, what):
    if shape == "doubled":
        doubled(cache)
    else:
        circular(cache, "Cache" if shape == "circular rows" else "Cache_key_raw")
    in_time(lambda: attempt(cache, what))


def test_what_a_query_writes_itself_earns_it_no_time(cache, monkeypatch):
    with contextlib.closing(gate.open_database(cache / "rows-1", "rw", 1.0)) as connection:
        late = time.thread_time() + gate.BUDGET_SECONDS / 2  # by then it has grown
        monkeypatch.setattr(gate, "_bytes_on_disk", lambda path: 10**9 if time.thread_time() > late else 0)
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            connection.fetch(
                "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 20000000) SELECT sum(x) FROM c"
            )


def test_a_query_has_a_budget_of_processor_time_that_grows_with_the_database(cache, monkeypatch):
    connection = gate.open_database(cache / "rows-1", "rw", 1.0)
    with pytest.raises(sqlite3.OperationalError, match="interrupted") as caught:
        connection.fetch(ENDLESS)
    assert gate.is_over_budget(caught.value)
    assert sum(rows_in(key) for (key,) in connection.fetch("SELECT key FROM Cache")) == 62  # each has its own
    monkeypatch.setattr(gate, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(gate, "_bytes_on_disk", lambda path: 10**12)
    hundred_thousand = (
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 100000) SELECT sum(x) FROM c"
    )
    assert connection.fetch(hundred_thousand)
    connection.close()


@pytest.mark.skipif(not hasattr(sqlite3.Connection, "setlimit"), reason="needs Python 3.11")
@pytest.mark.parametrize("column", ["tag", "filename", "key", "value", "store_time", "raw", "mode"])
@pytest.mark.parametrize("kind", ["text", "blob"])
def test_texts_of_megabytes_reach_no_memory(cache, column, kind):
    size = 40_000_000
    with grammar.opened(cache) as connection:
        value = "x" * size if kind == "text" else bytes(size)
        where = "rowid = 3" if column == "key" else "rowid IN (3, 30)"
        connection.execute(f"UPDATE Cache SET {column} = ? WHERE {where}", (value,))
        del value
    for what in ["info", "stats", "verify", "training"]:
        tracemalloc.start()
        attempt(cache, what)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000, what
        tracemalloc.stop()


@pytest.mark.parametrize("claim", [-(10**15), 10**15, "text", "9e999", None, b"blob"])
def test_the_size_is_measured_and_not_believed(tmp_path, claim):
    limit = 3_000_000
    tier = DiskTier(tmp_path)
    blobs = [(bytes([n]) * 32, bytes(200_000)) for n in range(40)]
    tier.write(blobs[:1], record(limit))
    tier.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "rows-1" / "cache.db", isolation_level=None)) as connection:
        value = float(claim) if claim == "9e999" else claim
        connection.execute("UPDATE Settings SET value = ? WHERE key = 'size'", (value,))
    again = DiskTier(tmp_path)
    for blob in blobs[1:]:
        again.write([blob], record(limit))
    held = sum(path.stat().st_size for path in tmp_path.rglob("*.val"))
    assert 0.7 * limit < held < limit


def test_sizes_of_rows_that_are_not_so_lift_no_limit(tmp_path):
    limit = 3_000_000
    tier = DiskTier(tmp_path)
    blobs = [(bytes([n]) * 32, bytes(200_000)) for n in range(60)]
    tier.write(blobs[:5], record(limit))
    with contextlib.closing(sqlite3.connect(tmp_path / "rows-1" / "cache.db", isolation_level=None)) as connection:
        connection.execute("UPDATE Cache SET size = 1000000000")
    again = DiskTier(tmp_path)
    for number, (key, blob) in enumerate(blobs):
        if number < 5:
            again.remove(Region("", ""), {key: b""})
        else:
            again.write([(key, blob)], record(limit))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.val")) < limit


def test_info_takes_the_same_queries_for_any_number_of_regions(cache, monkeypatch):
    counted = []
    execute = gate.Connection.execute

    def count(self, query, parameters=()):
        counted.append(query)
        return execute(self, query, parameters)

    monkeypatch.setattr(gate.Connection, "execute", count)

    def queries(*command):
        counted.clear()
        assert told(*command)[0] == 0
        return len(counted)

    few = queries("info", cache)
    with grammar.opened(cache) as connection:
        connection.execute("BEGIN")
        for n in range(300):
            row = (n.to_bytes(32, "big"), f"{n:032x}")
            connection.execute(
                "INSERT INTO Cache (key, raw, store_time, tag, mode, value) VALUES (?, 1, 1.0, ?, 1, x'')", row
            )
        connection.execute("COMMIT")
    assert queries("info", cache) <= few + 5
    told("prune", cache, "--max-size", "1")
    scans = [query for query in counted if query.startswith("SELECT") or " AS SELECT" in query]
    assert len(scans) < 30


# blobs


def test_export_believes_no_blob_that_expands_a_thousandfold(cache, tmp_path):
    size = 2**30
    frame = zstandard.ZstdCompressor().compress(bytes(size))
    start = b"TCB\x01\x01\x01\0\0" + struct.pack("<Q", size) + b"\x08\x01" + struct.pack("<Q", size)
    key = b"k" * 32
    with grammar.opened(cache) as connection:
        ((tag,),) = connection.execute("SELECT tag FROM Cache WHERE filename IS NULL LIMIT 1").fetchall()
        connection.execute(
            "INSERT INTO Cache (key, raw, store_time, tag, mode, value) VALUES (?, 1, 1.0, ?, 1, ?)",
            (key, tag, start + frame + xxhash.xxh3_64(key + start + frame).digest()),
        )
    tracemalloc.start()
    code, out, err = told("export", cache, tmp_path / "out", "--region", tag, "--json")
    assert tracemalloc.get_traced_memory()[1] < 100_000_000
    tracemalloc.stop()
    assert code == 1, err
    assert json.loads(out)["damaged"] == 1


def test_verify_decodes_no_blob_that_expands_a_thousandfold(cache, monkeypatch):
    size = 2**30
    frame = zstandard.ZstdCompressor().compress(bytes(size))
    start = b"TCB\x01\x01\x01\0\0" + struct.pack("<Q", size) + b"\x08\x01" + struct.pack("<Q", size)
    with grammar.opened(cache) as connection:
        for key in (bytes([n]) * 32 for n in range(20)):
            connection.execute(
                "INSERT INTO Cache (key, raw, store_time, tag, mode, value) VALUES (?, 1, 1.0, ?, 1, ?)",
                (key, "0" * 32, start + frame + xxhash.xxh3_64(key + start + frame).digest()),
            )
    monkeypatch.setattr(
        zstandard, "ZstdDecompressor", lambda **_: pytest.fail("decoded what claims a thousand times its length")
    )
    assert told("verify", cache)[0] == 0


def test_a_file_most_of_which_is_not_there_is_not_read(cache, tmp_path):
    path = next(cache.rglob("*.val"))
    with open(path, "r+b") as file:
        file.truncate(2**31)
    tracemalloc.start()
    code, out, _ = told("verify", cache, "--no-repair")
    assert code == 1
    assert "most of the file is not there" in out
    told("merge", cache, tmp_path / "other")
    told("export", cache, tmp_path / "out", "--region", "Stretch")
    Run(cache).steps(60, 2)
    assert tracemalloc.get_traced_memory()[1] < 100_000_000
    tracemalloc.stop()


# screens


def test_no_name_forges_a_line_or_reaches_the_terminal(cache, outside):
    for path in (cache / "regions").iterdir():
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"options": {"digest": "[/] :bomb: \\"}}))
    with grammar.opened(cache) as connection:
        connection.execute('CREATE INDEX "x\nall sound\x1b[2J\u202e" ON Cache (tag)')
    for command in ("info", "verify", "stats"):
        code, out, err = told(command, cache)
        assert code in (1, 2)
        assert "all sound" not in (out + err).splitlines()
        assert all(sign.isprintable() for sign in (out + err).replace("\n", ""))


def test_tables_show_names_as_they_are(cache):
    for path in (cache / "regions").iterdir():
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"name": "[red]x[/] :bomb: \\"}))
    code, out, _ = told("info", cache)
    assert code == 0
    assert "[red]x[/] :bomb: \\" in out


def test_a_command_ends_without_a_traceback_whatever_happens(cache, monkeypatch):
    import torchcache.cli.look

    def fail(records):
        raise RuntimeError("a library\nfailed \x1b[2J")

    monkeypatch.setattr(torchcache.cli.look, "survey", fail)
    code, out, err = told("info", cache)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "a library?failed ?[2J" in err


class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x) + torch.rand(2)


def test_explain_shows_names_with_brackets_and_escapes():
    Odd.__name__ = "Odd[/]\x1b[2J\u202e"
    try:
        model = torch.nn.Sequential(torchcache.mark(Odd(), freeze=True))
        said = str(torchcache.explain(model, torch.randn(3, 2)))
    finally:
        Odd.__name__ = "Odd"
    assert "Odd[/]?[2J?" in said.replace("\n", "")
    assert all(sign.isprintable() for sign in said.replace("\n", ""))
