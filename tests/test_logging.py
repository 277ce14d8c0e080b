"""Logging is set up by the environment, on the torchcache logger alone."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torchcache

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


# Imports torchcache.logging without what the package imports beside it, which takes seconds.
LIGHT = """
import sys, types
package = types.ModuleType("torchcache")
package.__path__ = [sys.argv[1]]
sys.modules["torchcache"] = package
"""


def run(*, whole=False, **environment):
    script = SCRIPT if whole else LIGHT + SCRIPT.replace("import torchcache", "import torchcache.logging")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TORCHCACHE_")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(torchcache.__file__).parent)],
        capture_output=True,
        text=True,
        env={**clean, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_warnings_show_by_default_in_the_documented_format():
    (line,) = run(whole=True)
    assert re.fullmatch(
        r"\[torchcache\] - \d{4}-\d\d-\d\d \d\d:\d\d:\d\d - torchcache - WARNING - a warning line", line
    )


@pytest.mark.parametrize(("level", "lines"), [("DEBUG", 3), ("info", 2), (" WARNING ", 1), ("ERROR", 0), ("20", 2)])
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


def test_a_file_gets_the_lines_of_the_level_beside_stderr(tmp_path):
    path = tmp_path / "log.txt"
    shown = run(TORCHCACHE_LOG_FILE=str(path), TORCHCACHE_LOG_LEVEL="INFO", TORCHCACHE_LOG_FMT="%(levelname)s")
    assert shown == path.read_text().splitlines() == ["INFO", "WARNING"]


@pytest.mark.parametrize("name", ["FMT", "DATEFMT"])
def test_valid_formats_are_not_warned_of(name):
    assert len(run(**{f"TORCHCACHE_LOG_{name}": {"FMT": "%(message)s", "DATEFMT": "%H:%M"}[name]})) == 1


def test_a_warning_is_shown_once_each():
    shown = []
    handler = logging.Handler()
    handler.emit = shown.append
    torchcache.logging.logger.addHandler(handler)
    try:
        for text in ("first", "second", "first", "first"):
            torchcache.logging.warn_once(text)
    finally:
        torchcache.logging.logger.removeHandler(handler)
    assert [(record.levelname, record.getMessage()) for record in shown] == [
        ("WARNING", "first"),
        ("WARNING", "second"),
    ]
