"""The command line on a server."""

import json

import pytest
import torch
from torch import nn

import torchcache
from torchcache.cli.main import main

ROWS = 20


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 300)).eval().requires_grad_(False)


@pytest.fixture
def filled(server):
    """A server with the rows of two regions, and values of others."""
    server.client().set("others", b"value")
    for seed in (0, 1):
        module = torchcache.mark(net(seed), remote=server.url)
        module(torch.randn(ROWS, 6))
    torchcache.flush()
    return server


def run(capsys, *arguments):
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out or "null")


def rows(server):
    return [name for name in server.client().scan_iter(count=1000) if len(name) > 60]


def test_info_tells_of_regions_and_rows(filled, capsys):
    code, info = run(capsys, "info", filled.url)
    assert code == 0
    assert info["directory"] == filled.url
    assert [held["rows"] for held in info["regions"]] == [ROWS, ROWS]
    assert info["volume"] == sum(filled.client().strlen(name) for name in rows(filled))
    assert {held["region"]["name"] for held in info["regions"]} == {"Sequential"}
    assert main(["info", filled.url]) == 0
    assert "server" in capsys.readouterr().out


def test_stats_tells_how_rows_are_made_up(filled, capsys):
    code, stats = run(capsys, "stats", filled.url)
    assert (code, stats["rows"], stats["ages"]) == (0, 2 * ROWS, {})
    assert [group["rows"] for group in stats["groups"]] == [ROWS, ROWS]
    assert {tuple(group["leaves"]) for group in stats["groups"]} == {("float32 (300,)",)}
    assert sum(group["bytes"] for group in stats["groups"]) == sum(map(filled.client().strlen, rows(filled)))
    assert main(["stats", filled.url]) == 0
    assert "Sequential" in capsys.readouterr().out


def test_verify_drops_what_is_damaged(filled, capsys):
    assert run(capsys, "verify", filled.url)[1]["sound"]
    damaged = rows(filled)[:3]
    for name in damaged:
        filled.client().setrange(name, 100, b"damage")
    code, verdict = run(capsys, "verify", filled.url, "--no-repair")
    assert (code, verdict["damaged"]) == (1, {"wrong checksum": 3})
    assert len(rows(filled)) == 2 * ROWS
    code, verdict = run(capsys, "verify", filled.url)
    assert (code, verdict["checked"], verdict["repaired"]) == (1, 2 * ROWS, 3)
    assert len(rows(filled)) == 2 * ROWS - 3
    assert run(capsys, "verify", filled.url)[0] == 0


def test_clear_takes_one_region_or_all_and_nothing_else(filled, capsys):
    tag = run(capsys, "info", filled.url)[1]["regions"][0]["tag"]
    code, removal = run(capsys, "clear", filled.url, "--region", tag, "--yes")
    assert (code, removal["rows"], list(removal["regions"])) == (0, ROWS, [tag])
    assert len(rows(filled)) == ROWS
    run(capsys, "clear", filled.url, "--yes")
    assert filled.client().keys() == [b"others"]


def test_rows_are_merged_from_a_server_to_a_directory_and_back(filled, tmp_path, capsys):
    code, done = run(capsys, "merge", filled.url, str(tmp_path / "all"))
    assert (code, done["stored"]) == (0, 2 * ROWS)
    before = {name: filled.client().get(name) for name in rows(filled)}
    filled.client().flushall()
    code, done = run(capsys, "merge", str(tmp_path / "all"), filled.url)
    assert (code, done["stored"], done["present"]) == (0, 2 * ROWS, 0)
    assert {name: filled.client().get(name) for name in rows(filled)} == before
    assert len(run(capsys, "info", filled.url)[1]["regions"]) == 2
    code, done = run(capsys, "merge", str(tmp_path / "all"), filled.url)
    assert (code, done["stored"], done["present"]) == (0, 0, 2 * ROWS)
    assert run(capsys, "merge", filled.url, filled.url)[0] == 2


@pytest.mark.parametrize("command", ["info", "verify", "clear"])
def test_a_server_that_is_not_there_is_told_in_one_line(command, tmp_path, capsys):
    more = ["--yes"] if command == "clear" else []
    assert main([command, f"unix://{tmp_path}/none?timeout=0.1", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"unix://{tmp_path}/none cannot be used" in line


def test_what_takes_a_directory_takes_no_server(capsys):
    assert main(["stats", "redis://localhost"]) == 2
    assert "redis:" in capsys.readouterr().err
