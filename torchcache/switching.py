"""What the options of PyPI's torchcache 0.6.0 that have no equal here stand for, so that its users' code runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchcache.logging import warn_once

# What has no effect here, and why none is needed.
_WITHOUT_EFFECT = {
    "subsample_count": "every byte of an input is hashed",
    "zstd_compression_threads": "rows are compressed by the store's own thread, while later steps run",
    "use_mmap_on_load": "rows are read straight into memory",
}

FORMER = ("zstd_compression", *_WITHOUT_EFFECT)


def translated(options: Mapping[str, Any], level: int | None, default: int | None) -> dict[str, Any]:
    """``options`` with the former ones in today's terms; says once for each what it means.

    Parameters
    ----------
    options : mapping
        Names and values as a user gave them.
    level : int or None
        The ``zstd_compression_level`` that holds where ``options`` say nothing.
    default : int or None
        The level for rows that are to be compressed where ``level`` is ``None``.

    Raises
    ------
    TypeError
        For a ``zstd_compression`` that is neither true nor false.
    """
    found = {name: value for name, value in options.items() if name not in FORMER}
    for name, reason in _WITHOUT_EFFECT.items():
        if name in options:
            warn_once(f"the option {name} of torchcache 0.6.0 has no effect here, since {reason}: leave it out")
    if "zstd_compression" in options:
        chosen = options["zstd_compression"]
        if not isinstance(chosen, bool):
            raise TypeError(f"torchcache: zstd_compression must be True or False, not {chosen!r}")
        if chosen:
            level = found.get("zstd_compression_level", level)
            found["zstd_compression_level"] = default if level is None else level
        else:
            found["zstd_compression_level"] = None
        warn_once(
            f"zstd_compression={chosen} of torchcache 0.6.0 is zstd_compression_level="
            f"{found['zstd_compression_level']!r} here: write that"
        )
    return found
