"""Sizes, ages and dates that people type, and how long ago something was."""

from __future__ import annotations

import argparse
import datetime
import math
import re
import time

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_NAMES = {"s": "second", "m": "minute", "h": "hour", "d": "day"}


def size(text: str) -> int:
    """Bytes from ``20GB``, ``1.5 GiB``, ``300M`` or ``4096``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 20GB, 1.5GiB, 300M or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def age(text: str) -> float:
    """Seconds from ``30d``, ``12h``, ``90m``, ``2w``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no age: write 30d, 12h, 90m or 2w")
    return float(match[1]) * _SPANS[match[2]]


def date(text: str) -> float:
    """Seconds since the epoch from ``2026-11-01``, ``2026-11-01T08:00``, local time where no zone is given."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError(f"{text!r} is no date: write 2026-11-01 or 2026-11-01T08:00") from None


def ago(moment: float) -> str:
    """How long ago something was; what a damaged or forged database has for a time may be none."""
    if not (math.isfinite(moment) and moment > 0):
        return "unknown"
    passed = time.time() - moment
    for unit in ("d", "h", "m"):
        count = int(passed // _SPANS[unit])
        if count >= 1:
            return f"{count} {_NAMES[unit]}{'s' if count > 1 else ''} ago"
    return "just now" if passed > -60 else "in the future"
