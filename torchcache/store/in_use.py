"""Which identities living processes use of a cache directory: one small file a process, locked as long as it lives.

``in-use/<16 digits>.txt`` holds fingerprints, one a line. The system gives the lock back when the process ends, however
it ends; whoever finds a file without a lock removes it. A file comes into place whole and locked, by a rename.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from torchcache.forks import without_forks
from torchcache.logging import logger
from torchcache.store.access import Access
from torchcache.store.catalogue import Catalogue, is_tag
from torchcache.store.gate import open_regular

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


FOLDER = "in-use"
# Identities of one region that stay in use: the last ones, as where weights, adapters or settings are swapped.
KEPT = 16
# What is read of the folder, whoever filled it.
MOST_FILES = 4096
LARGEST = 256 * 1024
MOST_BYTES = 16 * 1024 * 1024
TRIES = 5
STALE_SECONDS = 3600.0
_NAME = re.compile(r"[0-9a-f]{16}\.txt")
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.txt\.[0-9a-f]{8}")


class InUse:
    """The identities of one cache directory that are in use, here and in other processes.

    Nothing here raises. What cannot be told or read costs exactness, which ``tags`` says.

    Parameters
    ----------
    catalogue : Catalogue
        Of the directory; it hears when an identity is used no more.
    access : Access
        The permissions of what is made.
    """

    def __init__(self, catalogue: Catalogue, access: Access) -> None:
        self.folder = access.directory / FOLDER
        self._access = access
        self._users: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._told = _Told(catalogue)
        weakref.finalize(self, self._told.leave)

    def has(self, user: object, tag: str) -> bool:
        """Whether the others know that ``user`` uses ``tag``, and used nothing else since."""
        return self._users.get(user, ("",))[-1] == tag and tag in self._told.tags

    @without_forks
    def add(self, user: object, tag: str) -> None:
        """Tell the others that ``user``, who is held weakly, uses ``tag``."""
        if self.has(user, tag):
            return
        with self._lock:
            first = not self._told.tags
            before = (other for other in self._users.get(user, ()) if other != tag)
            self._users[user] = (*before, tag)[-KEPT:]
            if tag not in self._told.tags:
                self._tell()
        if first:
            self.tags()  # removes what killed processes left

    def forget(self) -> None:
        """Tell all anew when next asked to: the directory is another one."""
        with self._lock:
            self._told.drop()

    @without_forks
    def tags(self) -> tuple[set[str], bool]:
        """All identities in use, and whether no living process can use others."""
        with self._lock:
            found, own, exact = self._own(), self._told.path, self._told.exact
        names, all_listed = self._names()
        exact = exact and all_listed
        left = MOST_BYTES
        for name in names:
            if own is not None and name == own.name:
                continue
            theirs = _read(self.folder / name) if left > 0 else None
            if theirs is None:
                exact = False
                continue
            found.update(theirs)
            left -= 33 * len(theirs)
        return found, exact

    def _own(self) -> set[str]:
        return {tag for used in list(self._users.values()) for tag in used}

    def _tell(self) -> None:
        """Put a file of what is in use in the place of the last one."""
        tags = self._own()
        path = self._told.path or self.folder / (f"{secrets.token_hex(8)}.txt")
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        descriptor = -1
        try:
            if fcntl is None:
                raise OSError("no locks here")
            if self.folder.is_symlink():
                raise OSError(f"{self.folder} is a link, which is not followed")
            self._access.make_folder(self.folder)
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
            descriptor = self._access.open_new(temporary, flags)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(descriptor, "".join(f"{tag}\n" for tag in sorted(tags) if is_tag(tag)).encode())
            os.replace(temporary, path)
        except OSError as error:
            logger.info("%s: other processes cannot be told which rows are in use: %s", self.folder.parent, error)
            with contextlib.suppress(OSError):
                os.remove(temporary)
            if descriptor >= 0:
                os.close(descriptor)
            self._told.change(tags, None, -1)
        else:
            self._told.change(tags, path, descriptor)

    def _names(self) -> tuple[list[str], bool]:
        """The files of processes, and whether these are all."""
        names: list[str] = []
        try:
            if self.folder.is_symlink():
                return [], False
            with os.scandir(self.folder) as files:
                for number, file in enumerate(files):
                    if number >= MOST_FILES:
                        return names, False
                    if _NAME.fullmatch(file.name):
                        names.append(file.name)
                    elif _TEMPORARY.fullmatch(file.name):
                        _remove_stale(file)
        except FileNotFoundError:
            pass
        except OSError:
            return names, False
        return names, True


class _Told:
    """What this process told the others of one directory."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.tags: set[str] = set()
        self.path: Path | None = None
        self.exact = True
        self._descriptor = -1
        self._catalogue = catalogue
        _all.add(self)

    def change(self, tags: set[str], path: Path | None, descriptor: int) -> None:
        """The file at ``path``, locked by ``descriptor``, tells ``tags``; there is none where it could not be made."""
        gone = self.tags - tags
        self.drop()
        self.tags, self.path, self._descriptor, self.exact = tags, path, descriptor, path is not None
        for tag in gone:
            self._catalogue.touch(tag)

    def drop(self) -> None:
        """Close the file; what it told is no longer told."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self.tags, self.path, self._descriptor = set(), None, -1

    def leave(self) -> None:
        """Nothing is in use any more."""
        path = self.path
        for tag in self.tags:
            self._catalogue.touch(tag)
        if path is not None:
            with contextlib.suppress(OSError):
                os.remove(path)
        self.drop()


def _read(path: Path) -> set[str] | None:
    """What the process of this file uses, nothing where it has ended; ``None`` where that cannot be told."""
    if fcntl is None:
        return None
    for _ in range(TRIES):
        try:
            with open(open_regular(path), "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return _parse(file.read(LARGEST + 1))
                if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
                    with contextlib.suppress(OSError):
                        os.remove(path)
                    return set()
                # Its process has just put another one in its place.
        except FileNotFoundError:
            return set()
        except OSError as error:
            logger.debug("%s: %s", path, error)
            return None
    return None


def _parse(data: bytes) -> set[str] | None:
    if len(data) > LARGEST:
        return None
    return set(filter(is_tag, data.decode("ascii", "replace").split()))


def _remove_stale(file: os.DirEntry[str]) -> None:
    """Remove what a process left that was killed before its file was in place."""
    with contextlib.suppress(OSError):
        old = time.time() - file.stat(follow_symlinks=False).st_mtime > STALE_SECONDS
        if old and file.is_file(follow_symlinks=False):
            os.remove(file.path)


_all: weakref.WeakSet[_Told] = weakref.WeakSet()


def _after_fork() -> None:
    # The lock is the parent's as long as any process has its file open.
    for told in list(_all):
        told.drop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
