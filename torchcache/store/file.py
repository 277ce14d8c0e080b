"""A blob in a file of its own, read without trusting what lies there."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import BinaryIO

__all__ = ["BlobFile", "BlobFileError"]

SCATTERS = hasattr(os, "preadv")
_READ_FLAGS = os.O_RDONLY
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):
    _READ_FLAGS |= getattr(os, _name, 0)


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
        return open(self._descriptor(), "rb")

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
        descriptor = self._descriptor()
        try:
            return os.preadv(descriptor, buffers, 0)
        finally:
            os.close(descriptor)

    def _descriptor(self) -> int:
        descriptor = os.open(self.path, _READ_FLAGS)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise BlobFileError("no regular file")
        return descriptor
