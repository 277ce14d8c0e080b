"""Where a cache directory lies and whether SQLite works there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from torchcache.store.access import OWNER, allowed
from torchcache.store.catalogue import FOLDER as REGIONS
from torchcache.store.connect import MARKER, ROWS
from torchcache.store.gate import DATABASE
from torchcache.store.in_use import FOLDER as IN_USE

with contextlib.suppress(ImportError):  # Windows has no such groups
    import grp


MOUNTS = "/proc/self/mountinfo"
NETWORK = frozenset(
    "nfs nfs4 cifs smb3 smbfs afs ceph lustre gpfs beegfs glusterfs fuse.glusterfs fuse.sshfs fuse.s3fs fuse.gcsfuse "
    "fuse.rclone fuse.juicefs pvfs2 orangefs 9p ncpfs wekafs fuse.goofys fuse.mountpoint-s3".split()
)
_READER = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('SELECT x FROM t').fetchone()[0])"


@dataclasses.dataclass(frozen=True)
class Place:
    """What matters of a directory's place.

    Parameters
    ----------
    directory, tried : str
        The directory, and the nearest one that is there, where it was tried.
    exists, writable : bool
        Whether it is there, and whether this user may write to it, or make it.
    mode : str
        Its permissions, such as ``"0700"``; empty where it is not there.
    private : bool
        Whether no other user may enter it.
    group : str
        The group that shares it; empty where it is for its owner alone.
    setgid : bool
        Whether what is made there belongs to that group.
    kept : list of str
        What is there already and kept from that group.
    filesystem, mount : str
        Kind and mount point of its file system; ``"unknown"`` where the system does not say.
    network : bool
        Whether that kind is known to be shared over a network.
    free : int
        Bytes free to this user.
    wal : str
        Empty where SQLite's write-ahead log works between two processes there, else what went wrong.
    """

    directory: str
    tried: str
    exists: bool
    writable: bool
    mode: str
    private: bool
    group: str
    setgid: bool
    kept: list[str]
    filesystem: str
    mount: str
    network: bool
    free: int
    wal: str


def examine(directory: Path) -> Place:
    """Look at the place of ``directory``, which need not be there; it is not made, and what is tried is removed."""
    near = directory
    while not near.is_dir() and near != near.parent:
        near = near.parent
    exists = directory.is_dir()
    mode = stat.S_IMODE(os.stat(directory).st_mode) if exists else OWNER
    group = _group(os.stat(directory).st_gid) if exists and allowed(directory) != OWNER else ""
    kind, mount = _filesystem(near)
    writable = os.access(near, os.W_OK | os.X_OK) and (exists or not directory.exists())
    return Place(
        directory=str(directory),
        tried=str(near),
        exists=exists,
        writable=writable,
        mode=f"{mode:04o}" if exists else "",
        private=not mode & 0o077,
        group=group,
        setgid=bool(mode & stat.S_ISGID),
        kept=_kept(directory) if group else [],
        filesystem=kind,
        mount=mount,
        network=kind in NETWORK,
        free=shutil.disk_usage(near).free,
        wal=_try_wal(near) if writable else "not tried, since nothing can be written there",
    )


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except (KeyError, NameError):
        return str(number)


def _kept(directory: Path) -> list[str]:
    kept = []
    for name in (MARKER, REGIONS, IN_USE, ROWS, f"{ROWS}/{DATABASE}"):
        with contextlib.suppress(OSError):
            found = os.lstat(directory / name)
            wanted = 0o070 if stat.S_ISDIR(found.st_mode) else 0o060
            if found.st_mode & wanted != wanted or found.st_gid != os.stat(directory).st_gid:
                kept.append(name)
    return kept


def _filesystem(path: Path) -> tuple[str, str]:
    """Kind and mount point of the file system under ``path``."""
    best = ("unknown", "unknown")
    longest = -1
    real = os.path.realpath(path)
    try:
        with open(MOUNTS, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                left, _, right = line.partition(" - ")
                mount = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), left.split()[4])
                inside = real == mount or real.startswith(mount.rstrip("/") + "/")
                if inside and len(mount) >= longest:
                    longest, best = len(mount), (right.split()[0], mount)
    except (OSError, IndexError):
        pass
    return best


def _try_wal(folder: Path) -> str:
    try:
        with tempfile.TemporaryDirectory(prefix=".torchcache-doctor-", dir=folder) as temporary:
            database = os.path.join(temporary, "try.db")
            with contextlib.closing(sqlite3.connect(database, timeout=5, isolation_level=None)) as connection:
                mode = connection.execute("PRAGMA journal_mode = wal").fetchone()[0]
                if mode != "wal":
                    return f"SQLite stays in journal mode {mode!r}"
                connection.execute("CREATE TABLE t (x)")
                connection.execute("INSERT INTO t VALUES (42)")
                command = [sys.executable, "-I", "-c", _READER, database]
                seen = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
                return "" if seen.stdout.strip() == "42" else f"a second process does not see it: {_last(seen.stderr)}"
    except (OSError, sqlite3.Error, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["it read something else"])[-1]
