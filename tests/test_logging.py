"""Logging is set up by the environment, on the torchcache logger alone."""

import os
import re
import subprocess
import sys

import pytest

SCRIPT = """
import logging
root = logging.getLogger()
before = (root.level, list(root.handlers))
import torchcache
log = logging.getLogger("torchcache")
log.debug("a debug line"); log.info("an info line"); log.warning("a warning line")
assert (root.level, list(root.handlers)) == before
assert not log.propagate
"""


def run(**environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TORCHCACHE_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env={**clean, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_warnings_show_by_default_in_the_documented_format():
    (line,) = run()
    assert re.fullmatch(
        r"\[torchcache\] - \d{4}-\d\d-\d\d \d\d:\d\d:\d\d - torchcache - WARNING - a warning line", line
    )


@pytest.mark.parametrize(("level", "lines"), [("DEBUG", 3), ("info", 2), ("ERROR", 0), ("20", 2)])
def test_levels(level, lines):
    assert len(run(TORCHCACHE_LOG_LEVEL=level)) == lines


def test_formats():
    lines = run(TORCHCACHE_LOG_FMT="%(asctime)s|%(message)s", TORCHCACHE_LOG_DATEFMT="%Y")
    assert re.fullmatch(r"\d{4}\|a warning line", lines[0])


def test_a_file_is_appended_to(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("before\n")
    run(TORCHCACHE_LOG_FILE=str(path))
    run(TORCHCACHE_LOG_FILE=str(path))
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.count("a warning line") == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TORCHCACHE_LOG_LEVEL", "LOUD"),
        ("TORCHCACHE_LOG_FMT", "%(nonsense)q"),
        ("TORCHCACHE_LOG_FILE", os.path.join("no", "such", "directory", "log")),
    ],
)
def test_invalid_values_are_warned_of_and_the_default_is_used(name, value):
    first, last = run(**{name: value})
    assert name in first
    assert last.endswith("WARNING - a warning line")
