"""What a database from anybody must look like before diskcache opens it.

diskcache takes any setting it finds for an attribute of its own, and SQLite runs whatever triggers and views a file
brings: a setting named ``_directory`` leads to another folder, a view named ``Cache`` can compute for ever.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import stat
from pathlib import Path

from diskcache.core import DEFAULT_SETTINGS, METADATA

__all__ = ["DATABASE", "ForeignDatabaseError", "vet_database", "vet_files", "vet_schema"]

DATABASE = "cache.db"
_SETTINGS = sorted({*DEFAULT_SETTINGS, *METADATA})
# All that diskcache creates. No brackets within a table: no generated columns, checks or computed defaults.
_SCHEMA = re.compile(
    r"""
    CREATE\ TABLE\ (Cache|Settings)\ \([\w\s,]*\)
    | CREATE\ (UNIQUE\ )?INDEX\ Cache_\w+\ ON\ Cache\ ?\([\w\s,]*\)
    | CREATE\ TRIGGER\ Settings_\w+\ AFTER\ (INSERT|UPDATE|DELETE)\ ON\ Cache\ FOR\ EACH\ ROW\ BEGIN
      \ UPDATE\ Settings\ SET\ value\ =\ value(\ [+-]\ (1|NEW\.size|OLD\.size))+\ WHERE\ key\ =\ "(count|size)";\ END
    """,
    re.VERBOSE,
)
_LONGEST = 1000


class ForeignDatabaseError(ValueError):
    """A database that diskcache did not make as it is, or files that are none."""


def vet_files(rows: Path) -> None:
    """Raise ``ForeignDatabaseError`` where ``rows`` or a database file in it is a link, or not what its name says."""
    wanted = {rows: stat.S_ISDIR} | {rows / f"{DATABASE}{suffix}": stat.S_ISREG for suffix in ("", "-wal", "-shm")}
    for path, is_right in wanted.items():
        with contextlib.suppress(FileNotFoundError):
            if not is_right(os.lstat(path).st_mode):
                raise ForeignDatabaseError(f"{path.name} is a link or of another kind")


def vet_database(rows: Path, lock_seconds: float) -> None:
    """Raise ``ForeignDatabaseError`` for a database in ``rows`` that holds more than diskcache puts there.

    Raises
    ------
    sqlite3.Error
        It cannot be read, or stays locked for ``lock_seconds``.
    """
    connection = sqlite3.connect(rows / DATABASE, timeout=lock_seconds, isolation_level=None)
    with contextlib.closing(connection):
        connection.execute("BEGIN IMMEDIATE")  # diskcache would wait a minute for a lock while it opens
        try:
            vet_schema(connection)
        finally:
            connection.execute("ROLLBACK")


def vet_schema(connection: sqlite3.Connection) -> None:
    """Raise ``ForeignDatabaseError`` where an open database holds more than diskcache puts there."""
    query = "SELECT substr(sql, 1, ?) FROM sqlite_master WHERE sql IS NOT NULL LIMIT 100"
    schema = [text for (text,) in connection.execute(query, (_LONGEST,))]
    for text in schema:
        if not isinstance(text, str) or not _SCHEMA.fullmatch(" ".join(text.split())):
            raise ForeignDatabaseError("its schema is not the store's")
    if any("TABLE Settings" in text for text in schema):
        marks = ",".join("?" * len(_SETTINGS))
        query = f"SELECT count(*) FROM Settings WHERE typeof(key) != 'text' OR key NOT IN ({marks})"
        if connection.execute(query, _SETTINGS).fetchone() != (0,):
            raise ForeignDatabaseError("its settings are not the store's")
