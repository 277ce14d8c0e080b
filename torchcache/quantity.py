"""How sizes, shares, durations and lists of names are written for people, in every table and message."""

from __future__ import annotations

from collections.abc import Iterable

# Names of one list that are told.
MOST_NAMES = 3


def size_text(count: float) -> str:
    """Bytes in powers of ten: ``999 B``, ``1.5 MB``."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def share_text(share: float | None) -> str:
    """A share in two digits: ``0.39%``; a dash where unknown."""
    return "-" if share is None else f"{100 * share:.2g}%"


def seconds_text(seconds: float | None) -> str:
    """A duration: ``250 µs``, ``1.5 s``, ``2.5 h``; a dash where unknown."""
    if seconds is None:
        return "-"
    size = abs(seconds)
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (7200.0, 1 / 60, "min")):
        if size < limit:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds / 3600:.1f} h"


def names_text(names: Iterable[str]) -> str:
    """The first of some names: ``a, b, c and 4 more``; empty where there are none."""
    found = list(dict.fromkeys(filter(None, names)))
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    return ", ".join(found[:MOST_NAMES]) + more
