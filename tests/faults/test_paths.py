"""Where a directory may be: under any name, without a home that can be written to, in a place that moves."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from trained import Run

import torchcache
from torchcache import CacheOptions, cached
from torchcache.cli.main import main
from torchcache.options import default_cache_dir

posix = pytest.mark.skipif(os.name != "posix", reason="names that are bytes")

NAMES = [
    "run#3",
    "x?y=1",
    "50%2Fdone",
    "a b",
    "Größe-日本",
    "'\";",
    "new\nline",
    "$HOME",
    "\x1b[2J",
    os.fsdecode(b"caf\xe9"),
]


@pytest.mark.parametrize("name", NAMES if os.name == "posix" else NAMES[4:5])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_command_takes_any_name(tmp_path, name, encoding):
    cache, other = tmp_path / name / "cache", tmp_path / name / "other"
    Run(cache).steps(50, 2)
    run = Run(cache)
    run.steps(50, 2)
    assert run.count("disk_hits") == 52
    for command in (
        ["info"], ["stats"], ["doctor"], ["verify"],
        ["export", str(cache.with_name("out")), "--region", next((cache / "regions").iterdir()).stem],
        ["merge", str(other)], ["prune", "--max-size", "1KB", "--dry-run"], ["clear", "--yes"],
    ):  # fmt: skip
        for more in ([], ["--json"]):
            out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
            with contextlib.redirect_stdout(out):
                code = main([command[0], str(cache), *command[1:], *more])
                out.flush()
            said = out.buffer.getvalue().decode(encoding)
            assert code == 0, said
            if more:
                assert json.loads(said)
            else:
                assert all(sign.isprintable() for sign in said.replace("\n", ""))
    assert sorted(os.listdir(tmp_path)) == [name]


@posix
def test_a_name_of_any_bytes_comes_from_the_environment_too(tmp_path):
    place = os.path.join(os.fsencode(tmp_path), b"caf\xe9", b"cache")
    environment = {**os.environb, b"TORCHCACHE_DIR": place}
    for arguments in (["-c", PROGRAM], ["-m", "torchcache", "info", "--json"], ["-m", "torchcache", "info"]):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, env=environment, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, b"")
    assert b"caf?" in done.stdout
    assert os.path.isdir(os.path.join(place, b"rows-1"))


PROGRAM = """
import torch, torchcache
def hits(**options):
    net = torchcache.mark(torch.nn.Linear(2, 2), freeze=True, **options)
    x = torch.randn(3, 2)
    net(x), net(x)
    torchcache.flush()
    return torchcache.stats(net).hits
print(hits(), hits(persistent=True), hits(persistent=True))
"""


def without_home(code, tmp_path, **environment):
    """Run a program as a user whom the system does not know."""
    if os.name != "posix" or os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("only root can be another user, by setpriv")
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    kept.pop("TORCHCACHE_DIR", None)
    # Python itself may lie where this user cannot read.
    become = ["setpriv", "--reuid=54009", "--regid=54009", "--clear-groups"]
    become += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    done = subprocess.run(
        [*become, sys.executable, *code], capture_output=True, text=True, env={**kept, **environment}, cwd=tmp_path
    )
    if "setpriv:" in done.stderr:
        pytest.skip("other users are not allowed here")
    return done


@pytest.mark.parametrize("home", ["none", "empty", "missing", "read-only"])
def test_without_a_home_rows_stay_in_memory_which_is_said_once(tmp_path, home):
    (tmp_path / "home").mkdir(mode=0o555)
    homes = {"none": {}, "empty": {"HOME": ""}, "missing": {"HOME": "/nonexistent/me"}}
    environment = homes.get(home, {"HOME": str(tmp_path / "home")})
    done = without_home(["-c", PROGRAM], tmp_path, **environment)
    assert done.stdout == "3 3 3\n", done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "memory alone" in done.stderr or "training goes on" in done.stderr
    done = without_home(["-m", "torchcache", "info"], tmp_path, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "TORCHCACHE_DIR" in done.stderr


def test_without_a_home_the_directory_that_is_given_is_used(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    tmp_path.chmod(0o755)
    done = without_home(["-c", PROGRAM], tmp_path, TORCHCACHE_DIR="cache")
    assert (done.stdout, done.stderr) == ("3 3 3\n", "")
    assert (tmp_path / "cache" / "rows-1").exists()


def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    for place in (first, second):
        place.mkdir()
    monkeypatch.chdir(first)

    @cached(persistent=True, persistent_cache_dir="decorated")
    class Decorated(nn.Linear):
        pass

    @cached(persistent=True)
    class Own(nn.Linear):
        torchcache_persistent_cache_dir: str

    nets = [
        torchcache.mark(nn.Linear(2, 2), persistent=True, persistent_cache_dir="marked"),
        Decorated(2, 2),
        Own(2, 2),
    ]
    nets[2].torchcache_persistent_cache_dir = "own"
    x = torch.randn(3, 2)
    for net in nets:
        net.requires_grad_(False)
    nets[2](x)
    monkeypatch.chdir(second)
    for net in nets:
        net(x)
        net(x)
    torchcache.flush()
    assert sorted(os.listdir(first)) == ["decorated", "marked", "own"]
    assert os.listdir(second) == []
    assert torchcache.stats(nets[2]).hits == 6


def test_a_relative_directory_of_the_environment_starts_where_the_process_did(tmp_path):
    (tmp_path / "later").mkdir()
    program = "import torchcache, os; os.chdir('later')\n" + PROGRAM
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, cwd=tmp_path, env={**os.environ, "TORCHCACHE_DIR": "here"}
    )
    assert done.stderr == b""
    assert sorted(os.listdir(tmp_path)) == ["here", "later"]


@posix
def test_a_working_directory_that_is_gone_matters_to_relative_paths_alone(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert CacheOptions(persistent=True, persistent_cache_dir=tmp_path / "cache").directory == tmp_path / "cache"
    assert CacheOptions(persistent=True, persistent_cache_dir="~/x").directory == Path.home() / "x"
    with pytest.raises(ValueError, match="cache"):
        CacheOptions(persistent=True, persistent_cache_dir="cache")
    monkeypatch.chdir(tmp_path)


def test_home_is_replaced_and_names_of_variables_are_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCHCACHE_DIR", "~/env/$HOME")
    assert default_cache_dir() == tmp_path / "env" / "$HOME"
    options = CacheOptions(persistent=True, persistent_cache_dir="~/given/$HOME")
    assert options.directory == tmp_path / "given" / "$HOME"
