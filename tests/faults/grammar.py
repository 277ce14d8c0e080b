"""Cache directories made to harm, by a grammar: schemas, journals, logs, page trees, markers, modes, files.

``make`` turns an honest directory into a hostile one by some rules, each chosen by a seed. What lies beside it, in
``outside``, is what the rules lead to; nobody may change it.
"""

import contextlib
import json
import os
import random
import shutil
import sqlite3
import struct
from pathlib import Path

import hostile
import loaded
import xxhash
from sqlite_bytes import interior, log_of, long_rows

MAGIC = bytes.fromhex("d9d505f920a163d7")
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c WHERE x < 0"
HUGE = "length(hex(zeroblob(400000000)))"
NAMES = ["more", "a\nall sound", "\x1b[2Jred", "‮gnp.exe", "[/]", "'; --", "x" * 3000]
EVENTS = ["INSERT ON Cache", "UPDATE ON Cache", "DELETE ON Cache", "INSERT ON Settings", "UPDATE ON Settings"]


def make(directory, outside, seed, tell=lambda name: None):
    """Harm the honest ``directory`` by one to three rules; their names, each told before it is applied."""
    chance = random.Random(seed)
    applied = []
    for _ in range(chance.choice([1, 1, 2, 3])):
        rule = chance.choice(RULES)
        tell(rule.__name__)
        with contextlib.suppress(OSError, ValueError, LookupError, StopIteration, sqlite3.Error, struct.error):
            rule(Path(directory), Path(outside), chance)
            applied.append(rule.__name__)
    return applied


def victims(outside):
    """What lies outside: a text, folders like the store's with a file, empty ones, a pipe."""
    outside = Path(outside)
    (outside / "ab" / "cd").mkdir(parents=True)
    (outside / "ab" / "cd" / ("e" * 28 + ".val")).write_bytes(b"the user's own")
    (outside / "empty" / "empty").mkdir(parents=True)
    (outside / "precious.txt").write_text("the user's own\n")
    os.mkfifo(outside / "pipe")


@contextlib.contextmanager
def opened(directory, fold=True):
    connection = sqlite3.connect(directory / "rows-1" / "cache.db", isolation_level=None)
    try:
        yield connection
        if fold:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.close()


def put_strange(path, outside, chance):
    """A strange thing in place of ``path``: a link, hard or not, a pipe, a folder, nothing, a file of another size."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = chance.choice(
        ["link", "dangling", "hard link", "pipe", "link to a pipe", "folder", "empty", "sparse", "noise"]
    )
    if kind == "link":
        path.symlink_to(chance.choice([outside / "precious.txt", outside, outside / "empty", "/dev/zero", "/dev/full"]))
    elif kind == "dangling":
        path.symlink_to(outside / "made by whoever writes here")
    elif kind == "hard link":
        os.link(outside / "precious.txt", path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        path.symlink_to(outside / "pipe")
    elif kind == "folder":
        (path / "ab" / "cd").mkdir(parents=True)
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(chance.choice([10**6, 2**31, 2**40]))
    else:
        path.write_bytes(chance.randbytes(20_000) if kind == "noise" else b"")


# schemas


def schema_object(directory, outside, chance):
    """Objects beyond the store's, up to hundreds before the one that harms."""
    name = chance.choice(NAMES).replace('"', "")
    harm = chance.choice([ENDLESS, f"SELECT {HUGE}"])
    with opened(directory) as connection:
        for number in range(chance.choice([0, 0, 3, 110])):
            connection.execute(f"CREATE INDEX Cache_more{number} ON Cache (tag)")
        connection.execute(
            chance.choice(
                [
                    f'CREATE TRIGGER "{name}" AFTER {chance.choice(EVENTS)} BEGIN {harm}; END',
                    f'CREATE TRIGGER "{name}" BEFORE {chance.choice(EVENTS)} BEGIN SELECT RAISE(IGNORE); END',
                    f'CREATE INDEX "{name}" ON Cache (tag) WHERE tag != 0' + " " * 1200,
                    f'CREATE INDEX "{name}" ON Cache (abs(size))',
                    f'CREATE VIEW "{name}" AS {harm}',
                    f'CREATE TABLE "{name}" (x DEFAULT (1 + 1), y AS (x * 2), CHECK (x < 7))',
                ]
            )
        )


def schema_replaced(directory, outside, chance):
    """A table that is a view, has other columns, computed ones or checks."""
    table = chance.choice(["Cache", "Settings"])
    with opened(directory) as connection:
        connection.execute(f"ALTER TABLE {table} RENAME TO Old")
        connection.execute(
            chance.choice(
                [
                    f"CREATE VIEW {table} AS SELECT * FROM Old, ({ENDLESS})",
                    f"CREATE VIEW {table} AS SELECT * FROM Old",
                    f"CREATE TABLE {table} AS SELECT * FROM Old",
                    f"CREATE TABLE {table} (key, value, CHECK ({HUGE} > 0))",
                    f"CREATE TABLE {table} (key, value AS ({HUGE}))",
                ]
            )
        )


def schema_text(directory, outside, chance):
    """Texts and root pages of the schema, changed where SQLite keeps them."""
    with opened(directory) as connection:
        connection.execute("PRAGMA writable_schema = 1")
        column, value = chance.choice(
            [
                ("sql", "CREATE TABLE Cache (" + "x" * chance.choice([10, 10**6])),
                ("sql", None),
                ("rootpage", chance.choice([0, 1, 2, 3, 4, 10**6, -1])),
                ("name", chance.choice(NAMES)),
                ("tbl_name", "Settings"),
                ("type", "view"),
            ]
        )
        where = "rowid = (SELECT rowid FROM sqlite_master ORDER BY random() LIMIT 1)"
        connection.execute(f"UPDATE sqlite_master SET {column} = ? WHERE {where}", (value,))
        if chance.random() < 0.3:
            connection.execute("INSERT INTO sqlite_master SELECT * FROM sqlite_master")


# rows and settings


def planted(directory, outside, chance):
    """Values of any type and size in any column."""
    hostile.plant(directory / "rows-1" / "cache.db", chance, outside / "marker", 40)


def claims(directory, outside, chance):
    """Sizes and times that are not so."""
    value = chance.choice([-(10**15), 10**15, 2**63 - 1, "text", "x" * 10**4, float("inf"), None, b"blob"])
    with opened(directory) as connection:
        connection.execute(
            chance.choice(
                [
                    "UPDATE Settings SET value = ? WHERE key = 'size'",
                    "UPDATE Cache SET size = ?",
                    "UPDATE Cache SET store_time = ?",
                    "UPDATE Cache SET tag = ?",
                    "UPDATE Cache SET filename = ?",
                ]
            ),
            (value,),
        )


def many_regions(directory, outside, chance):
    """A region a row."""
    with opened(directory) as connection:
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO Cache (key, raw, store_time, tag, mode, value) VALUES (?, 1, 1.0, ?, 1, x'00')",
            [(chance.randbytes(32), chance.randbytes(16).hex()) for _ in range(2000)],
        )
        connection.execute("COMMIT")


def large_texts(directory, outside, chance):
    """Texts and blobs of some megabytes in many rows."""
    column = chance.choice(["key", "tag", "filename", "value", "store_time"])
    value = chance.choice(["x" * 3_000_000, bytes(3_000_000)])
    with opened(directory) as connection, contextlib.suppress(sqlite3.IntegrityError):
        connection.execute(f"UPDATE OR IGNORE Cache SET {column} = ? WHERE rowid % 7 = 1", (value,))


# journals and logs


def journal(directory, outside, chance):
    """A rollback journal that names a file outside, or is something else."""
    path = directory / "rows-1" / "cache.db-journal"
    data = path.with_name("cache.db").read_bytes()
    page = struct.unpack(">H", data[16:18])[0] or 65536
    head = MAGIC + struct.pack(">IIIII", 0, chance.randrange(2**32), len(data) // page, 512, page)
    name = os.fsencode(chance.choice([outside / "precious.txt", outside / "pipe", outside / "empty"]))
    tail = struct.pack(">I", 2**30 // page + 1) + name + struct.pack(">II", len(name), sum(name)) + MAGIC
    if chance.random() < 0.5:
        with opened(directory) as connection:
            connection.execute("PRAGMA journal_mode = delete")
    if chance.random() < 0.7:
        path.write_bytes(head.ljust(512, b"\0") + tail)
    else:
        put_strange(path, outside, chance)


def log_frames(directory, outside, chance):
    """A log that is whole, with pages that harm: another rule's work that was not folded into the database."""
    path = directory / "rows-1" / "cache.db"
    with opened(directory):
        before = path.read_bytes()
    chance.choice([schema_object, schema_text, pages, claims])(directory, outside, chance)
    after = path.read_bytes()
    size = struct.unpack(">H", before[16:18])[0] or 65536
    changed = [at for at in range(0, len(after), size) if before[at : at + size] != after[at : at + size]]
    path.write_bytes(before)
    frames = [(at // size + 1, after[at : at + size]) for at in changed]
    path.with_name("cache.db-wal").write_bytes(log_of(frames, size, len(after) // size, chance))


def long_log(directory, outside, chance):
    """A log that is whole, of tens or hundreds of megabytes, most of them the same few pages again and again."""
    path = directory / "rows-1" / "cache.db"
    log, kept = path.with_name("cache.db-wal"), directory / "kept"
    small = chance.random() < 0.3
    wanted = chance.choice([30_000_000, 100_000_000 if small else 300_000_000])
    with opened(directory) as connection:
        if small:
            for statement in ("PRAGMA journal_mode = delete", "PRAGMA page_size = 512", "VACUUM"):
                connection.execute(statement)
            connection.execute("PRAGMA journal_mode = wal")
    before = path.read_bytes()
    with opened(directory, fold=False) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("UPDATE Settings SET value = value")
        while log.stat().st_size < wanted:
            if small:
                connection.executemany("UPDATE Settings SET value = ? WHERE key = 'hits'", ((n,) for n in range(5000)))
            else:
                connection.execute("UPDATE Cache SET value = randomblob(1000000) WHERE rowid = 1")
        os.link(log, kept)  # whoever closes it last puts it into the database and removes it
    path.write_bytes(before)
    os.replace(kept, log)


def sides(directory, outside, chance):
    """Something strange for a log, its index or the database."""
    put_strange(directory / "rows-1" / chance.choice(["cache.db", "cache.db-wal", "cache.db-shm"]), outside, chance)


# page trees


def pages(directory, outside, chance):
    """Pages that name each other, cells that claim other lengths, numbers that are wrong, under an honest schema."""
    path = directory / "rows-1" / "cache.db"
    with opened(directory) as connection:
        roots = [page for (page,) in connection.execute("SELECT rootpage FROM sqlite_master WHERE rootpage > 0")]
    data = bytearray(path.read_bytes())
    size = struct.unpack(">H", data[16:18])[0] or 65536
    count = len(data) // size
    kind = chance.choice(["cycle", "dag", "overflow", "cells", "header", "swap"])
    if kind in ("cycle", "dag"):
        root = chance.choice(roots)
        children = [root] if kind == "cycle" else [chance.randint(1, count)]
        index = data[(root - 1) * size] in (2, 10)
        data[(root - 1) * size : root * size] = interior(size, root, chance.choice(children), index, chance)
    elif kind == "overflow":
        data[(roots[-1] - 1) * size : roots[-1] * size] = long_rows(size, count + 1, chance)
        data += struct.pack(">I", count + 1).ljust(size, b"\0")
        struct.pack_into(">I", data, 28, count + 1)
    elif kind == "cells":
        for _ in range(chance.choice([1, 10, 100])):
            at = chance.randrange(len(data) - 8)
            data[at : at + 5] = chance.choice([b"\x8f\xff\xff\xff\x7f", b"\xff" * 5, bytes(5)])
    elif kind == "header":
        at = chance.choice([16, 18, 19, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 92])
        struct.pack_into(">I", data, at, chance.choice(hostile.EXTREMES) % 2**32)
    else:
        one, two = (size * chance.randrange(1, count) for _ in range(2))
        data[one : one + size], data[two : two + size] = data[two : two + size], data[one : one + size]
    path.write_bytes(data)


# markers, modes, files, the catalogue


def marker(directory, outside, chance):
    """Another marker: newer, damaged, deep, or something strange."""
    path = directory / "torchcache.json"
    newer = {"format": 7, "check": xxhash.xxh3_64_hexdigest(b"torchcache 7")}
    texts = [json.dumps(newer).encode(), b"[" * 4000, b"{}", b'{"format": 1e400}', bytes(10_000)]
    if chance.random() < 0.5:
        path.write_bytes(chance.choice(texts))
    else:
        put_strange(path, outside, chance)


def modes(directory, outside, chance):
    """Permissions for everybody, or for nobody."""
    chosen = [path for path in [directory, *directory.rglob("*")] if chance.random() < 0.5 and not path.is_symlink()]
    for path in chosen:
        path.chmod(chance.choice([0o777, 0o666, 0o444, 0o000]))


def folders(directory, outside, chance):
    """A folder of the store that is a link to one outside, with a database or without."""
    path = directory / chance.choice(["rows-1", "rows-1/ab", "regions", "in-use"])
    if path.name == "rows-1" and chance.random() < 0.3:
        target = outside / "rows"
        shutil.copytree(path, target)
    else:
        target = outside
    if path.exists():
        shutil.rmtree(path)
    path.symlink_to(target)


def value_files(directory, outside, chance):
    """Something strange for a file of a value."""
    put_strange(chance.choice(sorted(directory.rglob("*.val"))), outside, chance)


def sample_pages(directory, outside, chance):
    """What the loader remembers of samples, forged."""
    page = chance.choice([None, *loaded.FORGED.values()])
    with opened(directory) as connection:
        if page is not None and chance.random() < 0.3:
            loaded.multiply(directory, connection, page, chance.choice([10, 1000]))
            return
        loaded.forge(directory, connection, lambda old: loaded.change(old, chance) if page is None else page)


def catalogue(directory, outside, chance):
    """Records with names for terminals, without end, or something strange."""
    for path in sorted((directory / "regions").iterdir()):
        record = json.loads(path.read_text())
        how = chance.choice(["name", "options", "time", "strange"])
        if how == "strange":
            put_strange(path, outside, chance)
            continue
        if how == "name":
            record["name"] = chance.choice(NAMES)
        elif how == "options":
            record["options"] = chance.choice([{"max_persistent_cache_size": -1}, {"digest": "[/]"}, {"x": 1}, []])
        else:
            record["last_used"] = chance.choice([-1, 1e300, "soon", None, 10**400])
        path.write_text(json.dumps(record))


def in_use(directory, outside, chance):
    """Something strange among the files that say what is in use, or a file that says that all is."""
    folder = directory / "in-use"
    kind = chance.choice(["strange", "strange", "all", "many", "folder"])
    if kind == "folder":
        put_strange(folder, outside, chance)
        return
    folder.mkdir(exist_ok=True)
    tags = [path.stem for path in (directory / "regions").iterdir()]
    if kind == "all":
        (folder / f"{7:016x}.txt").write_text("\n".join(tags))
    else:
        for number in range(1 if kind == "strange" else 30):
            put_strange(folder / f"{number:016x}.txt", outside, chance)


RULES = [
    schema_object, schema_replaced, schema_text, planted, claims, many_regions, large_texts, journal, log_frames,
    log_frames, long_log, sides, pages, pages, pages, marker, modes, folders, value_files, sample_pages, catalogue,
    in_use, in_use,
]  # fmt: skip
