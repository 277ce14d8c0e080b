"""info, stats and verify, on a cache that a real model filled."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time

import pytest
import torch
from filled import ROWS, Model, data, run

import torchcache
from torchcache.store.pack import rows_in


def database(cache):
    return sqlite3.connect(cache / "rows-1" / "cache.db", isolation_level=None)


def test_info_tells_what_the_regions_are_without_the_code_that_made_them(cache):
    environment = {**os.environ, "TORCHCACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "torchcache", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    info = json.loads(done.stdout)
    assert info["format"] == 1
    assert info["limit"] == 10_000_000_000
    assert info["volume"] > ROWS * 160_000
    regions = {held["region"]["name"]: held for held in info["regions"]}
    assert set(regions) == {"text (Sequential)", "vision (Linear)"}
    assert all(held["rows"] == ROWS for held in regions.values())
    assert regions["text (Sequential)"]["ratio"] > 1.2
    assert regions["vision (Linear)"]["ratio"] == pytest.approx(1, abs=0.01)
    about = regions["text (Sequential)"]["region"]
    assert about["torchcache"] == torchcache.__version__
    assert about["torch"] == torch.__version__
    assert about["options"]["digest"] == "xxh3_128"
    assert abs(time.time() - about["created"]) < 600


def test_a_region_that_only_hits_is_known_to_be_used(cache, torchcache_json):
    for file in (cache / "regions").iterdir():
        about = json.loads(file.read_text()) | {"created": 1000.0, "last_used": 2000.0}
        file.write_text(json.dumps(about))
    torchcache.store.disk._tiers.clear()  # as in a new process
    assert run(cache)[1:] == (0, 2 * ROWS)
    for held in torchcache_json("info", cache)["regions"]:
        assert held["region"]["created"] == 1000.0
        assert abs(time.time() - held["region"]["last_used"]) < 600


def test_rows_without_a_record_show_up_by_their_fingerprint(cache, torchcache_command, torchcache_json):
    before = {held["tag"] for held in torchcache_json("info", cache)["regions"]}
    records = sorted((cache / "regions").iterdir())
    records[0].unlink()
    records[1].write_text('{"name": "\\u001b[2J", "options": {}}')
    (cache / "regions" / "..json").write_text("{}")
    (cache / "regions" / f"{'0' * 32}.json").symlink_to("/dev/zero")
    held = torchcache_json("info", cache)["regions"]
    assert {region["tag"] for region in held} == before
    assert all(region["region"] is None for region in held)
    code, out, _ = torchcache_command("info", cache)
    assert code == 0
    assert "(not in the" in out
    assert "\x1b" not in out


def test_a_catalogue_that_cannot_be_written_costs_names_and_not_the_run(tmp_path, torchcache_json):
    cache = tmp_path / "cache"
    outside = tmp_path / "outside"
    outside.mkdir()
    cache.mkdir()
    (cache / "regions").symlink_to(outside)
    assert run(cache)[1] == 2 * ROWS
    assert not list(outside.iterdir())
    assert [held["region"] for held in torchcache_json("info", cache)["regions"]] == [None, None]


def test_stats_tell_calls_apart_and_where_the_bytes_are(cache, torchcache_json):
    with torch.autocast("cpu", torch.bfloat16):
        run(cache)
    stats = torchcache_json("stats", cache)
    assert stats["rows"] == 4 * ROWS
    assert stats["ages"]["hour"] == 4 * ROWS
    groups = {tuple(group["leaves"]): group for group in stats["groups"]}
    assert set(groups) == {
        ("float32 (800,)",), ("float32 (40000,)",), ("bfloat16 (800,)",), ("bfloat16 (40000,)",)
    }  # fmt: skip
    assert groups["float32 (40000,)",]["in_files"] == ROWS
    assert groups["bfloat16 (40000,)",]["in_files"] == 0
    assert stats["in_files"] == ROWS
    assert stats["files"] == groups["float32 (40000,)",]["bytes"]


def test_a_sound_cache_verifies_and_stays_as_it_is(cache, torchcache_json):
    found = torchcache_json("verify", cache)
    assert found["sound"]
    assert found["checked"] == 2 * ROWS
    assert run(cache)[1:] == (0, 2 * ROWS)


def damage(cache):
    """One of each: a bit, a length, a misfiled blob, a foreign mode, a name that leads out, a lost file, an orphan."""
    with database(cache) as connection:
        small = [row[0] for row in connection.execute("SELECT rowid FROM Cache WHERE filename IS NULL")]
        large = connection.execute("SELECT rowid, filename FROM Cache WHERE filename IS NOT NULL").fetchall()
        value = bytearray(connection.execute("SELECT value FROM Cache WHERE rowid = ?", (small[0],)).fetchone()[0])
        value[-20] ^= 1
        connection.execute("UPDATE Cache SET value = ? WHERE rowid = ?", (bytes(value), small[0]))
        connection.execute("UPDATE Cache SET value = substr(value, 1, 100) WHERE rowid = ?", (small[1],))
        other = "SELECT value FROM Cache WHERE rowid = ?"
        connection.execute(f"UPDATE Cache SET value = ({other}) WHERE rowid = ?", (small[3], small[2]))
        connection.execute("UPDATE Cache SET mode = 4, value = x'80054b2a2e' WHERE rowid = ?", (small[4],))
        connection.execute("UPDATE Cache SET filename = '../../outside.val' WHERE rowid = ?", (large[0][0],))
        broken = [small[0], small[1], small[2], small[4]]
        keys = [connection.execute("SELECT key FROM Cache WHERE rowid = ?", (place,)).fetchone()[0] for place in broken]
    (cache / "rows-1" / large[1][1]).unlink()
    with open(cache / "rows-1" / large[2][1], "r+b") as file:
        file.truncate(1000)
    orphans = [cache / "rows-1" / large[0][1], cache / "rows-1" / "ab" / "cd" / f"{'0' * 28}.val"]
    orphans[1].parent.mkdir(parents=True, exist_ok=True)
    orphans[1].write_bytes(b"lost")
    for orphan in orphans:
        os.utime(orphan, (1, 1))
    return sum(map(rows_in, keys)) + 3, orphans


def test_verify_finds_every_kind_of_damage_and_drops_it(cache, torchcache_json):
    run(cache, data(100, seed=2))
    rows = 2 * (ROWS + 100)
    outside = cache.parent / "outside.val"
    outside.write_bytes(b"not ours")
    count, orphans = damage(cache)
    looked = torchcache_json("verify", cache, "--no-repair", code=1)
    assert (sum(looked["damaged"].values()), looked["orphans"], looked["repaired"]) == (count, 2, 0)
    repaired = torchcache_json("verify", cache, code=1)
    assert repaired["damaged"] == looked["damaged"]
    assert repaired["repaired"] == count + 2
    assert not any(orphan.exists() for orphan in orphans)
    assert outside.read_bytes() == b"not ours"
    assert torchcache_json("verify", cache)["checked"] == rows - count
    misses, hits = zip(run(cache)[1:], run(cache, data(100, seed=2))[1:], strict=True)
    assert (sum(misses), sum(hits)) == (count, rows - count)


def test_a_file_that_is_just_being_stored_is_no_orphan(cache, torchcache_json):
    fresh = cache / "rows-1" / "ab" / "cd" / f"{'0' * 28}.val"
    fresh.parent.mkdir(parents=True, exist_ok=True)
    fresh.write_bytes(b"its row is not committed yet")
    assert torchcache_json("verify", cache)["orphans"] == 0
    assert fresh.exists()


def test_a_small_blob_that_expands_without_end_is_refused_in_little_memory(cache, torchcache_json):
    import tracemalloc

    import xxhash
    import zstandard

    size = 2**30
    frame = zstandard.ZstdCompressor().compress(bytes(size))
    head = b"TCB\x01\x01\x01\0\0" + size.to_bytes(8, "little") + b"\x08\x01" + (size + 1).to_bytes(8, "little")
    sound = b"TCB\x01\x01\x01\0\0" + size.to_bytes(8, "little") + b"\x08\x01" + size.to_bytes(8, "little")
    keys = [bytes(31) + bytes([index]) for index in range(2)]
    with database(cache) as connection:
        for key, start in zip(keys, (head, sound), strict=True):
            blob = start + frame + xxhash.xxh3_64(key + start + frame).digest()
            connection.execute(
                "INSERT INTO Cache (key, raw, store_time, tag, mode, value) VALUES (?, 1, 1.0, ?, 1, ?)",
                (key, "0" * 32, blob),
            )
    tracemalloc.start()
    found = torchcache_json("verify", cache, code=1)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()
    assert sum(found["damaged"].values()) == 1


def test_a_damaged_database_is_told_of_and_cleared(cache, torchcache_command, torchcache_json):
    path = cache / "rows-1" / "cache.db"
    with contextlib.closing(database(cache)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path.write_bytes(b"no database" * 1000)
    found = torchcache_json("verify", cache, code=1)
    assert not found["sound"]
    assert "torchcache clear" in found["database"][0]
    assert torchcache_command("clear", cache, "--yes")[0] == 0
    assert torchcache_json("info", cache)["regions"] == []
    torchcache.store.disk._tiers.clear()
    assert run(cache)[1] == 2 * ROWS
    assert run(cache)[1] == 0


@pytest.mark.parametrize("name", ["info", "stats", "verify", "clear", "prune"])
def test_a_directory_that_is_no_cache_is_left_alone(tmp_path, torchcache_command, name):
    (tmp_path / "thesis.txt").write_text("mine")
    more = {"clear": ["--yes"], "prune": ["--max-size", "0"]}.get(name, [])
    code, out, err = torchcache_command(name, tmp_path, *more)
    assert code == 2
    assert "holds no cache" in err
    assert not out
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_commands_work_while_a_model_fills_the_directory(cache, torchcache_json):
    model = Model(cache)
    run(cache, model=model)
    torchcache_json("clear", cache, "--yes")
    assert run(cache, data(seed=2), model)[1] == 2 * ROWS
    found = torchcache_json("info", cache)["regions"]
    assert sorted(held["region"]["name"] for held in found if held["rows"]) == ["text (Sequential)", "vision (Linear)"]


@pytest.mark.parametrize("moment", ["9e999", "-9e999", "-1e308", "1e308", "NULL", "'soon'", "x'00'"])
def test_times_that_are_none_are_unknown(cache, torchcache_command, moment):
    with contextlib.closing(database(cache)) as connection:
        connection.execute(f"UPDATE Cache SET store_time = {moment}")
    for record in (cache / "regions").iterdir():
        record.unlink()
    code, out, err = torchcache_command("info", cache)
    assert code == 0, err
    assert "unknown" in out or "in the future" in out
