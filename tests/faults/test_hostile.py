"""A cache directory is untrusted input: nothing in it is run, leads outside, or claims memory."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import hostile
import pytest
from trained import Run

import torchcache
from torchcache.cli.main import main


@pytest.mark.parametrize("seed", range(4))
def test_forged_blobs_are_refused_or_rows_of_the_spec(seed):
    counts = hostile.fuzz_blobs(seed, 4000)
    assert counts["blobs refused"] > 2000
    assert counts["blobs taken"] > 100  # those that change nothing but the row


def test_forged_blobs_allocate_no_more_than_rows_do():
    hostile.fuzz_blobs(0, 200)
    tracemalloc.start()
    try:
        hostile.fuzz_blobs(1, 2000)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000  # the largest forged blob itself has 1 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("seed", [*range(6), *[pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 60)]])
def test_training_on_planted_rows_gives_right_answers_and_runs_nothing(tmp_path, seed):
    hostile.endure_rows(tmp_path / "cache", tmp_path / "marker", seed)


WATCHED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {place!r})
import hostile
directory, marker = Path({directory!r}), Path({marker!r})
hostile.endure_rows(directory / "first", marker, 0)  # imports all there is
own = os.path.realpath(directory)

def watch(event, arguments):
    if event.startswith("pickle."):
        print("pickle", arguments, flush=True)
    elif event in ("open", "os.remove", "os.rename", "os.rmdir", "os.listdir", "os.scandir", "sqlite3.connect"):
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(path).removeprefix("file:").partition("?")[0])
            # Python's own sources, read for tracebacks and for the identity of code.
            if not path.startswith((own, *{allowed!r})):
                print(event, path, flush=True)

sys.addaudithook(watch)
for seed in range(1, 12):
    hostile.endure_rows(directory / str(seed), marker, seed)
print("done")
"""


def test_nothing_outside_the_directory_is_touched_and_nothing_unpickled(tmp_path):
    allowed = tuple({os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, Path(__file__).parents[2])})
    program = WATCHED.format(
        place=str(Path(__file__).parent),
        directory=str(tmp_path / "cache"),
        marker=str(tmp_path / "marker"),
        allowed=allowed,
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "done\n", done.stdout[:3000]


@pytest.mark.parametrize("seed", range(3))
def test_commands_on_planted_rows_report_and_do_not_fail(tmp_path, seed, capsys):
    directory = tmp_path / "cache"
    Run(directory).steps(100, 4)
    hostile.plant(next(directory.rglob("cache.db")), hostile.random.Random(seed), tmp_path / "marker", 60)
    commands = [
        ["info", str(directory)],
        ["stats", str(directory)],
        ["verify", str(directory), "--no-repair"],
        ["export", str(directory), str(tmp_path / "out.safetensors"), "--region", "Stretch"],
        ["merge", str(directory), str(tmp_path / "other")],
        ["prune", str(directory), "--older-than", "1d", "--dry-run"],
        ["prune", str(directory), "--max-size", "50KB"],
        ["verify", str(directory)],
        ["clear", str(directory), "--yes"],
    ]
    for command in commands:
        assert main([*command, "--json"]) in (0, 1, 2), command
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        assert told.err or json.loads(told.out) is not None
    assert not (tmp_path / "marker").exists()
    Run(directory).steps(100, 4)
    torchcache.flush()


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
@pytest.mark.parametrize("mask", [0o022, 0o000])
def test_all_that_is_made_is_for_its_owner_alone(tmp_path, mask):
    old = os.umask(mask)
    try:
        source, copy = tmp_path / "a" / "cache", tmp_path / "b" / "cache"
        Run(source).steps(100, 4)
        assert main(["merge", str(source), str(copy)]) == 0
        for directory in (source, copy):
            found = [directory, *directory.rglob("*")]
            assert {path.stat().st_mode & 0o777 for path in found if path.is_dir()} == {0o700}
            files = [path for path in found if path.is_file()]
            assert {path.stat().st_mode & 0o777 for path in files} == {0o600}, files
            assert len(files) >= 6
    finally:
        os.umask(old)
