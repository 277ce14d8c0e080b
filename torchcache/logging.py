"""The ``torchcache`` logger, configured from the environment and from nothing else."""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from typing import Any

from torchcache.printable import printable

DEFAULT_LEVEL = "WARN"
DEFAULT_FORMAT = "[torchcache] - %(asctime)s - %(name)s - %(levelname)s - %(message)s"
DEFAULT_DATE_FORMAT = "%Y-%m-%d %H:%M:%S"

logger = logging.getLogger("torchcache")


def configure() -> None:
    """Set the ``torchcache`` logger up from ``TORCHCACHE_LOG_{LEVEL,FMT,DATEFMT,FILE}``.

    The root logger is never touched. An invalid value is warned of and its default used.
    """
    complaints: list[str] = []
    level = _level(complaints)
    formatter = _formatter(complaints)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    path = os.environ.get("TORCHCACHE_LOG_FILE")
    if path:
        try:
            handlers.append(logging.FileHandler(path, mode="a", encoding="utf-8"))
        except OSError as error:
            complaints.append(f"TORCHCACHE_LOG_FILE={path!r} cannot be opened ({error}); logging to stderr only")
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    for complaint in complaints:
        logger.warning(complaint)


class _Formatter(logging.Formatter):
    """One line a message, whatever the names in it hold; tracebacks have their own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join(map(printable, super().formatException(ei).splitlines()))


def _level(complaints: list[str]) -> int:
    name = os.environ.get("TORCHCACHE_LOG_LEVEL", DEFAULT_LEVEL)
    level = logging.getLevelName(name.strip().upper())
    if isinstance(level, int):
        return level
    if name.strip().isdecimal():
        return int(name)
    complaints.append(f"TORCHCACHE_LOG_LEVEL={name!r} is not a logging level; using {DEFAULT_LEVEL}")
    return logging.WARNING


def _formatter(complaints: list[str]) -> logging.Formatter:
    record = logging.LogRecord("torchcache", logging.INFO, __file__, 1, "message", None, None)
    date_format = os.environ.get("TORCHCACHE_LOG_DATEFMT", DEFAULT_DATE_FORMAT)
    try:
        time.strftime(date_format)
    except ValueError as error:
        complaints.append(f"TORCHCACHE_LOG_DATEFMT={date_format!r} is not a date format ({error}); using the default")
        date_format = DEFAULT_DATE_FORMAT
    text_format = os.environ.get("TORCHCACHE_LOG_FMT", DEFAULT_FORMAT)
    try:
        formatter: logging.Formatter = _Formatter(text_format, date_format)
        formatter.format(record)
    except Exception as error:  # whatever a format makes of Python's own formatting
        complaints.append(f"TORCHCACHE_LOG_FMT={text_format!r} is not a log format ({error!r}); using the default")
        formatter = _Formatter(DEFAULT_FORMAT, date_format)
    return formatter


@functools.lru_cache(maxsize=4096)
def warn_once(message: str) -> None:
    """Log ``message`` as a warning the first time it is seen in this process."""
    logger.warning(message)


@functools.lru_cache(maxsize=4096)
def inform_once(message: str) -> None:
    """Log ``message`` as information the first time it is seen in this process."""
    logger.info(message)


configure()


class Complaints:
    """What a store suffers: counted, and the first of it a warning, since what follows from it would say the same.

    The same of a store that is opened again, as for one model after another, is said once in a process.

    Parameters
    ----------
    store : str
        What suffers, for people.

    Attributes
    ----------
    errors : int
        Failures, and rows that were damaged.
    """

    def __init__(self, store: str) -> None:
        self.errors = 0
        self._suffers = store

    def complain(self, what: str, count: int = 1) -> None:
        """Count errors, and say what happened."""
        say = logger.info if self.errors else warn_once
        self.errors += count
        say(f"{self._suffers} {what}")
