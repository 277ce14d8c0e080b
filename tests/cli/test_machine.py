"""bench, doctor, and the parser itself."""

import os
import subprocess
import sys

import pytest

import torchcache.store.place
from torchcache.cli.main import COMMANDS
from torchcache.store.connect import marker

MOUNTS = """\
20 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
30 20 0:50 / {nfs} rw shared:2 - nfs4 server:/export rw
"""


def test_doctor_says_which_directory_and_why(tmp_path, torchcache_json, monkeypatch):
    given = torchcache_json("doctor", tmp_path)
    assert (given["directory"], given["source"]) == (str(tmp_path), "argument")
    assert (given["wal"], given["writable"], given["problems"]) == ("", True, [])
    assert given["free"] > 0
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("TORCHCACHE_DIR", str(tmp_path / "later"))
    chosen = torchcache_json("doctor")
    assert (chosen["directory"], chosen["source"], chosen["exists"]) == (
        str(tmp_path / "later"),
        "$TORCHCACHE_DIR",
        False,
    )
    monkeypatch.delenv("TORCHCACHE_DIR")
    assert torchcache_json("doctor")["source"].startswith("default")


def test_doctor_knows_a_network_file_system_and_explains(tmp_path, torchcache_json, torchcache_command, monkeypatch):
    shared = tmp_path / "shared disk"
    shared.mkdir()
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.format(nfs=str(shared).replace(" ", "\\040")))
    monkeypatch.setattr(torchcache.store.place, "MOUNTS", str(mounts))
    found = torchcache_json("doctor", shared)
    assert (found["filesystem"], found["mount"], found["network"]) == ("nfs4", str(shared), True)
    assert "torchcache merge" in found["advice"][0]
    assert torchcache_json("doctor", tmp_path)["filesystem"] == "ext4"
    assert "shared over a network" in torchcache_command("doctor", shared)[1]


def test_doctor_finds_what_keeps_a_cache_from_working(tmp_path, torchcache_json, monkeypatch):
    (tmp_path / "torchcache.json").write_bytes(marker(99))
    assert "99" in torchcache_json("doctor", tmp_path, code=1)["problems"][0]
    file = tmp_path / "file"
    file.write_text("")
    assert "not a directory" in torchcache_json("doctor", file, code=1)["problems"][0]
    monkeypatch.setattr(torchcache.store.place, "_READER", "raise OSError('locking protocol')")
    found = torchcache_json("doctor", tmp_path / "sub", code=1)
    assert "locking protocol" in found["problems"][0]


def test_bench_measures_and_leaves_nothing(tmp_path, torchcache_json):
    found = torchcache_json("bench", tmp_path)
    assert found["hash_bytes"] > 0
    assert [row["bytes"] for row in found["rows"]] == [3072, 605184]
    assert all(row[rate] > 0 for row in found["rows"] for rate in ("encode", "write", "read", "decode"))
    assert not list(tmp_path.iterdir())


def test_the_script_and_the_module_are_one_program():
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "torchcache", "--help"], capture_output=True, text=True, env=environment, check=True
    )
    assert all(f"\n    {command.name} " in done.stdout for command in COMMANDS)
    assert "exit codes" in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_explains_itself(command, torchcache_command, capsys):
    with pytest.raises(SystemExit) as stopped:
        torchcache_command(command.name, "--help")
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "--json" in said
    assert command.description.split()[0] in said


def test_a_screen_at_every_command(cache, tmp_path, torchcache_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out = tmp_path / "out"
    for arguments in (
        ["info", cache],
        ["stats", cache],
        ["verify", cache],
        ["export", cache, out, "--region", "text"],
        ["import", out, tmp_path / "new"],
        ["merge", cache, tmp_path / "new"],
        ["prune", cache, "--max-size", "1MB", "--dry-run"],
        ["doctor", cache],
        ["clear", cache, "--yes"],
    ):
        code, said, err = torchcache_command(*arguments)
        assert (code, err) == (0, ""), arguments
        assert str(tmp_path) in said or arguments[0] == "verify"
