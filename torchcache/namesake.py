"""Warns at import where PyPI's package of the same name, which is by others, is installed too."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

from torchcache.logging import warn_once

# The one module that the other package has and this one has not.
_THEIRS = os.path.join("torchcache", "torchcache.py")


def warn_of_namesake() -> None:
    """Say where files of the other package lie: one of the two hides the other, or an uninstall takes both apart.

    Takes some tens of microseconds for the files on the path, and one listing of the folder that this package is in.
    Children of a process that has said so are silent.
    """
    if multiprocessing.current_process().name != "MainProcess":
        return
    try:
        found = _found(Path(__file__).parents[1])
    except OSError:  # a folder that cannot be listed
        return
    if found:
        warn_once(
            f"PyPI's package torchcache, another one by others, is in {found} too, and may hide or damage this one: "
            "run `pip uninstall torchcache` until none is left, delete what remains of it there, and install this again"
        )


def _found(home: Path) -> str:
    """The folder in which something of the other package lies; empty where nothing does."""
    for folder in dict.fromkeys([str(home), *sys.path]):
        if os.path.isfile(os.path.join(folder, _THEIRS)):
            return os.path.abspath(folder)
    for name in os.listdir(home) if home.is_dir() else ():
        if name.startswith("torchcache-") and name.endswith(".dist-info") and _lists_theirs(home / name / "RECORD"):
            return str(home / name)
    return ""


def _lists_theirs(record: Path) -> bool:
    """Whether an installer noted the other package's module there, and would remove this package's files with it."""
    try:
        return "torchcache/torchcache.py," in record.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
