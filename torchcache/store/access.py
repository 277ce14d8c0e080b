"""Who may read and write what is made in a cache directory: its owner alone, or its group; never any other user."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

OWNER = 0o700
_GROUP = 0o770


def allowed(directory: Path) -> int:
    """The permissions that what lies in ``directory`` may have: ``0o770`` where its group shares it, else ``0o700``.

    A group shares what it may write to. What everybody may write to, as ``/tmp``, is no group's unless its setgid bit
    gives all that is made there to one.
    """
    try:
        mode = os.stat(directory).st_mode
    except OSError:
        return OWNER
    shared = mode & stat.S_IWGRP and (mode & stat.S_ISGID or not mode & stat.S_IWOTH)
    return _GROUP if shared and os.name == "posix" else OWNER


class Access:
    """The permissions of what is made in one cache directory.

    Parameters
    ----------
    directory : Path
        The cache directory.
    group : bool
        Make sure that its group may read and write all of it, whatever the umask of this process takes away.
    """

    def __init__(self, directory: Path, group: bool = False) -> None:
        self.directory = directory
        self.group = group

    def make(self, names: Iterable[str] = ()) -> None:
        """Make the cache directory where there is none; with ``group``, open it and what this user has in ``names``."""
        os.makedirs(self.directory, mode=_GROUP if self.group else OWNER, exist_ok=True)
        if self.group:
            self._open(self.directory, os.stat(self.directory), 0o777)
            for path in (os.path.join(self.directory, name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    if self._open(path, os.lstat(path)):
                        self._open_below(path)

    def make_folder(self, path: str | Path) -> None:
        """Make a folder in the directory, unless it is there; a link is none."""
        try:
            os.mkdir(path, _GROUP if self.group else allowed(self.directory))
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise
        else:
            if self.group:
                self._open(path, os.lstat(path))

    def open_new(self, path: str | Path, flags: int) -> int:
        """An opener of new files."""
        descriptor = os.open(path, flags, 0o666 & (_GROUP if self.group else allowed(self.directory)))
        if self.group:
            self._open(path, os.fstat(descriptor))
        return descriptor

    def put(self, path: Path, data: bytes) -> None:
        """Put a file in place at once, whole; raises ``OSError``."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with open(temporary, "xb", opener=self.open_new) as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise

    def _open_below(self, folder: str) -> None:
        """Open all that this user has in ``folder``; no link is followed."""
        for where, folders, files in os.walk(folder):
            for name in (*folders, *files):
                path = os.path.join(where, name)
                with contextlib.suppress(OSError):
                    self._open(path, os.lstat(path))

    def _open(self, path: str | Path, found: os.stat_result, kept: int = _GROUP) -> bool:
        """Open a file or folder to the directory's group; whether it had been closed to it.

        What is another user's is left alone, and so is what has another name, which may be elsewhere.
        """
        if os.name != "posix":
            return False
        folder = stat.S_ISDIR(found.st_mode)
        wanted = 0o2070 if folder else 0o060
        if found.st_uid != os.geteuid() or not (folder or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)):
            return False
        group = os.stat(self.directory).st_gid
        if found.st_gid != group:
            with contextlib.suppress(PermissionError):  # this user is not in the group
                os.chown(path, -1, group)
        if found.st_mode & wanted == wanted:
            return False
        os.chmod(path, stat.S_IMODE(found.st_mode) & (kept | 0o7000) | wanted)
        return True
