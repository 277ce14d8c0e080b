"""What diskcache may store and fetch here: plain bytes, small ones in the database and large ones in files of ours."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diskcache

from torchcache.store.access import Access
from torchcache.store.file import BlobFile

_FILENAME = re.compile(r"[0-9a-f]{2}[/\\][0-9a-f]{2}[/\\][0-9a-f]{28}\.val")
# How diskcache says that a value is bytes in the database, or in a file.
RAW, BINARY = 1, 2
# A folder takes as long to make as a file, and a block of the disk.
FILES_PER_FOLDER = 256
FOLDERS_TRIED = 8


class BlobDisk(diskcache.Disk):  # type: ignore[misc]
    """Bytes in, bytes out: the pickled, text and number modes of diskcache are refused both ways.

    Parameters
    ----------
    directory : str
        Where the files are.
    access : Access or None
        The permissions of what is made; ``None`` is what the cache directory above asks for.
    **settings
        Of ``diskcache.Disk``.
    """

    def __init__(self, directory: str, access: Access | None = None, **settings: Any) -> None:
        super().__init__(directory, **settings)
        self._access = access or Access(Path(directory).parent)
        self.uncommitted: list[str] = []
        self._folder = ""
        self._room = 0

    def filename(self, key: object = None, value: object = None) -> tuple[str, str]:
        """A name for a new file, within the directory and as a path; some hundred in a row share a folder."""
        if self._room <= 0:
            self._folder, self._room = os.path.join(os.urandom(1).hex(), os.urandom(1).hex()), FILES_PER_FOLDER
        self._room -= 1
        name = os.path.join(self._folder, f"{os.urandom(14).hex()}.val")
        return name, os.path.join(self._directory, name)

    def put(self, key: object) -> tuple[memoryview, bool]:
        """The database form of ``key``, which must be bytes."""
        if type(key) is not bytes:
            raise TypeError(f"keys of the store are bytes, not {type(key).__name__}")
        return sqlite3.Binary(key), True

    def get(self, key: object, raw: bool) -> bytes:
        """The key of a database row; a pickled key is refused."""
        if not raw or type(key) is not bytes:
            raise ValueError("refused a key that is not plain bytes")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, str | None, Any]:
        """The database form of ``value``, which must be bytes; large ones become files."""
        if type(value) is not bytes or read:
            raise TypeError(f"values of the store are bytes, not {type(value).__name__}")
        if len(value) < self.min_file_size:
            return 0, RAW, None, sqlite3.Binary(value)
        for tries in range(FOLDERS_TRIED, 0, -1):
            filename, path = self.filename(key, value)
            try:
                self._write(filename, path, value)
                break
            except (PermissionError, FileExistsError, FileNotFoundError):
                # A folder that another made for himself alone, that is a link, or that was removed when it was empty.
                self._room = 0
                if tries == 1:
                    raise
        return len(value), BINARY, filename, None

    def _write(self, filename: str, path: str, value: bytes) -> None:
        folder = os.path.dirname(path)
        for made in (os.path.dirname(folder), folder):
            self._access.make_folder(made)
        self.path_of(filename)
        self.uncommitted.append(filename)
        with open(path, "xb", opener=self._access.open_new) as file:
            file.write(value)

    def fetch(self, mode: int, filename: str | None, value: object, read: bool = False) -> bytes:
        """The bytes of a database row; any mode but plain bytes and files of ours is refused."""
        found = self.find(mode, filename, value)
        return found if isinstance(found, bytes) else found.read(sys.maxsize)

    def find(self, mode: int, filename: str | None, value: object) -> bytes | BlobFile:
        """What a database row holds: bytes, or a file to read them from."""
        if mode == RAW and type(value) is bytes:
            return value
        if mode != BINARY:
            raise ValueError("refused a value that is not plain bytes")
        return BlobFile(self.path_of(filename))

    def remove(self, file_path: str) -> None:
        """Delete the file of a database row, if it is one of ours, and its two folders where they are empty then."""
        with contextlib.suppress(OSError, ValueError):
            path = self.path_of(file_path)
            os.remove(path)
            for folder in (os.path.dirname(path), os.path.dirname(os.path.dirname(path))):
                os.rmdir(folder)

    def files(self) -> Iterator[str]:
        """Names of all files that could be values, relative to the directory, folder by folder."""
        for outer in _folders(self._directory):
            for inner in _folders(os.path.join(self._directory, outer)):
                folder = os.path.join(outer, inner)
                for name in _names(os.path.join(self._directory, folder), _is_file):
                    name = os.path.join(folder, name)
                    if _FILENAME.fullmatch(name):
                        yield name

    def volume(self) -> int:
        """Bytes of all files that could be values, as the file system has them."""
        size = 0
        for name in self.files():
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(self._directory, name)).st_size
        return size

    def bytes_of(self, filename: object) -> int:
        """Bytes of a value's file, as the file system has them; 0 where there is none of ours."""
        try:
            return os.lstat(self.path_of(filename)).st_size
        except (OSError, ValueError):
            return 0

    def path_of(self, filename: object) -> str:
        """The path of a value's file; no name in a database and no link leads out of the directory."""
        if not isinstance(filename, str) or not _FILENAME.fullmatch(filename):
            raise ValueError("refused a file name that is not of the store")
        path = os.path.join(self._directory, filename)
        parent = os.path.dirname(path)
        if os.path.islink(parent) or os.path.islink(os.path.dirname(parent)):
            raise ValueError("refused a file that is not in the store's directory")
        return path


def _folders(folder: str) -> list[str]:
    return [name for name in _names(folder, _is_folder) if len(name) == 2]


def _names(folder: str, chosen: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    with contextlib.suppress(OSError), os.scandir(folder) as files:
        return sorted(file.name for file in files if chosen(file))
    return []


def _is_file(file: os.DirEntry[str]) -> bool:
    return file.is_file(follow_symlinks=False)


def _is_folder(file: os.DirEntry[str]) -> bool:
    return file.is_dir(follow_symlinks=False)
