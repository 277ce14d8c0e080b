"""A blob in a file of its own, read without trusting what lies there."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import BinaryIO

from torchcache.store.gate import open_regular

SCATTERS = hasattr(os, "preadv")
# What claims to be longer than this may be so many times as long as what is there of it.
CLAIMED_BYTES = 256 * 1024
CLAIMED_RATIO = 100


class BlobFileError(ValueError):
    """What lies there is no file that could hold the blob."""


class BlobFile:
    """A file that holds one blob; neither a link nor a pipe nor a device is followed, waited for or read.

    Parameters
    ----------
    path : str
        Where it is.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """Bytes of the file; raises ``OSError`` where there is none."""
        return os.lstat(self.path).st_size

    def open(self) -> BinaryIO:
        """The file, open for reading."""
        return open(open_regular(self.path), "rb")

    def read(self, limit: int) -> bytes:
        """The whole file, if it is no longer than ``limit`` bytes."""
        with self.open() as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise BlobFileError("longer than any blob of this row")
            return file.read(size)

    def scatter(self, buffers: Sequence[bytearray | memoryview]) -> int:
        """Fill ``buffers`` one after the other from the start of the file; the number of bytes read.

        Only where ``SCATTERS``.
        """
        descriptor = open_regular(self.path)
        try:
            return os.preadv(descriptor, buffers, 0)
        finally:
            os.close(descriptor)


def is_plausible(claimed: int, there: int, most: int = CLAIMED_BYTES) -> bool:
    """Whether ``there`` bytes are enough for what claims to be ``claimed`` bytes long; ``most`` need no proof."""
    return claimed <= max(most, CLAIMED_RATIO * there)


def check_whole(descriptor: int) -> None:
    """Raise ``BlobFileError`` for a file most of which is a hole: reading it takes as long as if it were there."""
    size = os.fstat(descriptor).st_size
    if not is_plausible(size, _bytes_there(descriptor, size)):
        raise BlobFileError("most of the file is not there")


def _bytes_there(descriptor: int, size: int) -> int:
    there = at = 0
    try:
        while at < size:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
            there += at - start
    except OSError as error:
        return there if error.errno == errno.ENXIO else size
    except AttributeError:  # a system that does not tell
        return size
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return there
