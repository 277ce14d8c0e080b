"""Every exception torchcache raises, each with its advice in the message."""

from __future__ import annotations

from collections.abc import Callable

from torchcache.printable import printable

_LONGEST = 200


class TorchcacheError(Exception):
    """Base class of everything torchcache raises on purpose."""


class MarkError(TorchcacheError):
    """A mark can never work: nothing is marked, or nothing that can be."""


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


class NoDirectoryError(StoreError):
    """No cache directory was given, and this user has no home where the default one would be."""


class StoreDamagedError(StoreError):
    """The database of a cache directory is damaged as a whole."""


class StoreVersionError(TorchcacheError):
    """A cache directory was written by a newer torchcache than this one."""


class Bypass(Exception):  # noqa: N818 - an outcome, which no user sees raised
    """A call that is computed and not stored.

    Parameters
    ----------
    reason : str or callable
        Why, in words that a user knows; or what tells it, where that takes long.
    advice : str, default: ""
        What the user can do about it.
    lasting : bool, default: True
        Whether calls of this form will be computed as long as what computes them stays as it is.
    quiet : bool, default: False
        Whether it is counted only: the user asked for it, or it is over soon.
    """

    def __init__(
        self, reason: str | Callable[[], str], advice: str = "", *, lasting: bool = True, quiet: bool = False
    ) -> None:
        super().__init__(reason, advice)
        self._reason = reason
        self.advice = advice
        self.lasting = lasting
        self.quiet = quiet

    @property
    def reason(self) -> str:
        """Why, in words that a user knows."""
        if not isinstance(self._reason, str):
            self._reason = self._reason()
        return self._reason

    def __str__(self) -> str:
        return f"{self.reason}: {self.advice}" if self.advice else self.reason


class Restless(Bypass):
    """A bypass because what computes the call changes with every call: not looked at again for a while."""


class Unreadable(Bypass):
    """A bypass because what computes the call has no identity, which takes long to find where there is much to read."""


class Writes(Restless):
    """A bypass because the original writes more than its output, which hits would not."""


class Trains(Bypass):
    """A bypass because the call computes gradients for what it reads."""


# Why what is given a trained input is computed, and what to do.
NEEDED = ("an argument needs a gradient", "detach it where its gradient is not wanted")


def brief(error: BaseException) -> str:
    """The text of ``error`` in one short line: what SQLite says can hold as much of a damaged database as it likes."""
    text = str(error)
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return printable(short)


def described(error: BaseException) -> str:
    """The class of ``error``, and its text in one short line where it has one."""
    text = brief(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
