"""Hostile cache directories by the grammar of ``tests/faults``: training and every command on each of them.

An error is a step that takes 2 s of processor time or 500 MB more than on an honest directory, a traceback, a hang, a
wrong answer, or a change outside the directory.
"""

from __future__ import annotations

import collections
import shutil
from pathlib import Path

import endurance

__all__ = ["round_of"]

DIRECTORIES = 50


def round_of(directory: Path, seed: int) -> collections.Counter[str]:
    """Make and endure some directories; how many. Raises ``BrokenPromiseError`` with the seed of the one that harms."""
    source = directory / "honest"
    endurance.honest(source)
    limits = endurance.endure(source, directory / "limits", None)
    for number in range(DIRECTORIES):
        place = directory / str(number)
        endurance.endure(source, place, seed * DIRECTORIES + number, limits)
        shutil.rmtree(place, ignore_errors=True)
    return collections.Counter({"directories endured": DIRECTORIES})
