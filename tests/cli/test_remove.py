"""clear and prune, on a cache that a real model filled."""

import io
import sqlite3
import sys
import time

import pytest
from filled import ROWS, run


def names_and_rows(info):
    return {held["region"]["name"].partition(" ")[0]: held["rows"] for held in info["regions"]}


def files_of(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*.val"))


def last_used(cache, when):
    """Set when regions were last used, and rows stored."""
    import json

    for file in (cache / "regions").iterdir():
        about = json.loads(file.read_text())
        moment = when[about["name"].partition(" ")[0]]
        file.write_text(json.dumps(about | {"last_used": moment}))
        with sqlite3.connect(cache / "rows-1" / "cache.db") as connection:
            connection.execute("UPDATE Cache SET store_time = ? WHERE tag = ?", (float(moment), file.stem))


def test_clear_removes_what_the_store_wrote_and_nothing_else(cache, torchcache_json):
    (cache / "notes.txt").write_text("mine")
    (cache / "rows-1" / "ab").mkdir(exist_ok=True)
    (cache / "rows-1" / "ab" / "photo.val").write_text("mine")
    removal = torchcache_json("clear", cache, "--yes")
    assert removal["rows"] == 2 * ROWS
    assert removal["after"] < 300_000 < removal["before"]
    assert files_of(cache) == ["rows-1/ab/photo.val"]
    assert (cache / "notes.txt").read_text() == "mine"
    assert torchcache_json("info", cache)["regions"] == []
    assert run(cache)[1] == 2 * ROWS


@pytest.mark.parametrize("by", ["name", "path", "fingerprint"])
def test_clear_of_one_region_leaves_the_others(cache, torchcache_json, by):
    held = {one["region"]["name"]: one["tag"] for one in torchcache_json("info", cache)["regions"]}
    wanted = {"name": "vision (Linear)", "path": "vision", "fingerprint": held["vision (Linear)"][:8]}[by]
    assert torchcache_json("clear", cache, "--region", wanted, "--yes")["rows"] == ROWS
    assert names_and_rows(torchcache_json("info", cache)) == {"text": ROWS}
    assert not files_of(cache)


def test_clear_asks_and_takes_no_answer_for_no(cache, torchcache_command, torchcache_json, monkeypatch):
    code, _, err = torchcache_command("clear", cache)
    assert (code, "--yes" in err) == (2, True)
    for answer in ("n\n", "\n", ""):
        terminal = io.StringIO(answer)
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", terminal)
        code, _, err = torchcache_command("clear", cache)
        assert (code, "Remove 80 rows" in err) == (2, True)
    assert names_and_rows(torchcache_json("info", cache)) == {"text": ROWS, "vision": ROWS}
    terminal = io.StringIO("yes\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    assert torchcache_command("clear", cache)[0] == 0
    assert torchcache_json("info", cache)["regions"] == []


def test_an_unknown_region_is_no_reason_to_remove_anything(cache, torchcache_command, torchcache_json):
    code, _, err = torchcache_command("clear", cache, "--region", "backbone", "--yes")
    assert code == 2
    assert "text (Sequential)" in err
    assert names_and_rows(torchcache_json("info", cache)) == {"text": ROWS, "vision": ROWS}


def test_pruning_to_a_size_takes_the_least_recently_used_region_first(cache, torchcache_json):
    last_used(cache, {"vision": 1e9, "text": 2e9})
    limit = 4_000_000
    planned = torchcache_json("prune", cache, "--max-size", "4MB", "--dry-run")
    assert names_and_rows(torchcache_json("info", cache)) == {"text": ROWS, "vision": ROWS}
    removal = torchcache_json("prune", cache, "--max-size", "4MB")
    assert removal["after"] <= limit < removal["before"]
    assert abs(planned["rows"] - removal["rows"]) <= 1
    left = names_and_rows(torchcache_json("info", cache))
    assert left["text"] == ROWS
    assert 20 <= left["vision"] < ROWS
    assert len(files_of(cache)) == left["vision"]
    # The rows that stay are those stored last, and they still hit.
    assert run(cache)[1:] == (ROWS - left["vision"], ROWS + left["vision"])


def test_small_rows_give_their_space_back(cache, torchcache_json):
    last_used(cache, {"text": 1e9, "vision": 2e9})
    removal = torchcache_json("prune", cache, "--unused-since", "2020-01-01")
    stats = torchcache_json("stats", cache)
    assert stats["rows"] == stats["in_files"] == ROWS
    assert removal["before"] - removal["after"] > 0.8 * removal["bytes"] > 0
    assert stats["free"] == 0


def test_ages_and_dates_combine(cache, torchcache_json):
    last_used(cache, {"text": time.time() - 40 * 86400, "vision": time.time() - 86400})
    assert torchcache_json("prune", cache, "--older-than", "50d")["rows"] == 0
    assert torchcache_json("prune", cache, "--unused-since", "2001-01-01", "--older-than", "30d")["rows"] == ROWS
    assert torchcache_json("stats", cache)["in_files"] == ROWS
    assert torchcache_json("prune", cache, "--max-size", "0", "--older-than", "1w")["rows"] == ROWS


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--max-size"),
        (["--max-size", "20 apples"], "no size"),
        (["--older-than", "30"], "no age"),
        (["--unused-since", "yesterday"], "no date"),
    ],
)
def test_what_cannot_be_understood_removes_nothing(cache, torchcache_command, capsys, arguments, word):
    try:
        code, _, err = torchcache_command("prune", cache, *arguments)
    except SystemExit as stopped:
        code, err = stopped.code, capsys.readouterr().err
    assert code == 2
    assert word in err
    assert len(files_of(cache)) == ROWS
