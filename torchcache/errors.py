"""Every exception torchcache raises, each with its advice in the message."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "FingerprintError",
    "MarkError",
    "OutputError",
    "RowwiseError",
    "SampleKeyError",
    "StoreDamagedError",
    "StoreError",
    "StoreVersionError",
    "TorchcacheError",
    "brief",
]

_LONGEST = 200


class TorchcacheError(Exception):
    """Base class of everything torchcache raises on purpose."""


class MarkError(TorchcacheError):
    """A mark can never work: nothing is marked, or nothing in it is frozen."""


class ArgumentError(TorchcacheError, TypeError):
    """An argument of a marked call is of a kind that cannot be part of a key."""


class OutputError(TorchcacheError, TypeError):
    """An output of a marked call is not a tensor with one row a sample."""


class RowwiseError(TorchcacheError):
    """A region's rows are not functions of their own inputs alone, so they cannot be cached."""


class FingerprintError(TorchcacheError):
    """A module or function holds something whose identity cannot be computed."""


class SampleKeyError(TorchcacheError, ValueError):
    """The ids given to ``sample_keys`` do not fit the batch."""


class StoreError(TorchcacheError):
    """A command cannot do to a cache directory what it was asked to."""


class StoreDamagedError(StoreError):
    """The database of a cache directory is damaged as a whole."""


class StoreVersionError(TorchcacheError):
    """A cache directory was written by a newer torchcache than this one."""


def brief(error: BaseException) -> str:
    """The text of ``error`` in one short line: what SQLite says can hold as much of a damaged database as it likes."""
    text = str(error)
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return "".join(sign if sign.isprintable() else "?" for sign in short)
