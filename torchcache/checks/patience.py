"""Checks that take long are told of while they run: a forward may go on until it met as many rows as it is told."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torchcache.logging import warn_once
from torchcache.quantity import seconds_text

# Seconds of checks of one call that are told of.
LONG = 30.0


@contextlib.contextmanager
def told_if_long(name: str) -> Iterator[None]:
    """Warn, if the block takes long, that the original of this name is tried on a few rows, while it still is."""
    text = (
        f"{name} is tried on a few of its rows, for {seconds_text(LONG)} so far. If that does not end, it waits for as "
        "many rows as another argument says: mark a part of it that computes each row by itself"
    )
    timer = threading.Timer(LONG, warn_once, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
