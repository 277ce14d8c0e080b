"""Commands about this machine: bench, doctor."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import sqlite3
from pathlib import Path

import torch

from torchcache.cli.command import Command, add_directory, directory_of, why_directory
from torchcache.cli.screen import Screen
from torchcache.errors import TorchcacheError
from torchcache.quantity import seconds_text, size_text
from torchcache.speed import measure
from torchcache.store.blob import FORMAT_VERSION
from torchcache.store.connect import check_version
from torchcache.store.place import Place, examine
from torchcache.version import __version__

LITTLE_SPACE = 10_000_000_000
PACKAGES = ("diskcache", "zstandard", "xxhash", "numpy", "rich", "platformdirs")


def _bench(arguments: argparse.Namespace, screen: Screen) -> int:
    directory = directory_of(arguments)
    place = examine(directory)
    speed = measure(Path(place.tried))
    screen.result({**dataclasses.asdict(speed), "filesystem": place.filesystem})
    screen.facts(
        [
            ("directory", f"{speed.directory} ({place.filesystem})"),
            ("torch threads", str(speed.threads)),
            (
                "hashing",
                f"{size_text(speed.hash_bytes)}/s: a 3x224x224 float32 image takes {seconds_text(speed.image_seconds)}",
            ),
        ]
    )
    columns = ("row, float32", ">bytes", ">encode/s", ">write/s", ">read/s", ">decode/s", ">served/s")
    lines = [
        (
            row.name,
            size_text(row.bytes),
            *(f"{rate:,.0f}" for rate in (row.encode, row.write, row.read, row.decode, row.served)),
        )
        for row in speed.rows
    ]
    screen.table(columns, lines)
    screen.say("")
    for row in speed.rows:
        cost = speed.image_seconds + 1 / row.served
        screen.say(f"{row.name}: a hit from disk costs about {seconds_text(cost)} an image, hash included")
    screen.say("Caching pays where the backbone takes longer than that for an image.")
    screen.say(
        "Reads came from the system's page cache; the first epoch after a restart also waits for the disk.", "dim"
    )
    return 0


def _doctor(arguments: argparse.Namespace, screen: Screen) -> int:
    directory = directory_of(arguments)
    place = examine(directory)
    problems = _problems(directory, place)
    advice = _advice(place)
    versions = {
        "torchcache": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }
    source = why_directory(arguments)
    found = {"source": source, "format": FORMAT_VERSION, "versions": versions, "problems": problems, "advice": advice}
    screen.result({**dataclasses.asdict(place), **found})
    shared = " (shared over a network)" if place.network else ""
    there = "there" if place.exists else f"not there yet; {place.tried} was tried"
    whose = "for you alone" if place.private else "open to others"
    whose = f"shared with the group {place.group}" if place.group else whose
    mode = f"{place.mode}, {whose}" if place.mode else "0700 when made"
    screen.facts(
        [
            ("directory", f"{directory} ({there})"),
            ("chosen by", source),
            ("permissions", f"{mode}; {'writable' if place.writable else 'not writable'}"),
            ("file system", f"{place.filesystem}{shared}, mounted at {place.mount}"),
            ("free space", size_text(place.free)),
            ("SQLite WAL", "works" if not place.wal else place.wal),
            ("format", str(FORMAT_VERSION)),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ]
    )
    screen.say("")
    for problem in problems:
        screen.say(f"problem: {problem}", "red")
    for line in advice:
        screen.say(f"note: {line}", "yellow")
    if not problems:
        screen.say("a cache works here", "green")
    return 1 if problems else 0


def _problems(directory: Path, place: Place) -> list[str]:
    problems = []
    try:
        check_version(directory)
    except TorchcacheError as error:
        problems.append(str(error))
    if directory.exists() and not place.exists:
        problems.append(f"{directory} is not a directory")
    if not place.writable:
        problems.append("nothing can be written: no rows are stored, and reading works only where the files allow it")
    elif place.wal:
        problems.append(f"SQLite's write-ahead log does not work here ({place.wal}): use a local directory")
    return problems


def _advice(place: Place) -> list[str]:
    advice = []
    if place.network:
        advice.append(
            f"{place.filesystem} is shared over a network. SQLite needs file locks and shared memory that work between "
            "all machines at once, which such file systems do not give: let one machine at a time use the directory, "
            "or better give each a local one and join them with torchcache merge."
        )
    if place.filesystem in ("tmpfs", "ramfs"):
        advice.append(f"{place.filesystem} lies in memory: the cache is gone after a restart")
    if place.group:
        advice += _advice_of_group(place)
    elif not place.private:
        advice.append(
            f"other users can enter the directory: chmod 700 {place.directory}, or 2770 to share it with its group"
        )
    if place.free < LITTLE_SPACE:
        advice.append(
            f"{size_text(place.free)} are free, less than the default limit of 10 GB: set max_persistent_cache_size"
        )
    return advice


def _advice_of_group(place: Place) -> list[str]:
    advice = []
    umask = os.umask(0o077)
    os.umask(umask)
    if not place.setgid:
        advice.append(f"what is made there gets the group of whoever makes it: chmod g+s {place.directory}")
    if umask & 0o060:
        advice.append(f"your umask {umask:04o} keeps what you make from the group: umask 002, or mark with group=True")
    if place.kept:
        advice.append(
            f"the group cannot use {', '.join(place.kept)}: have the owner run chmod -R g+rwX {place.directory} and "
            f"chgrp -R {place.group} {place.directory}, or mark with group=True once"
        )
    if int(place.mode, 8) & 0o007:
        advice.append(f"users of other groups can enter the directory: chmod o-rwx {place.directory}")
    return advice


COMMANDS = (
    Command(
        "bench",
        "measure hashing, disk and decoding here, and what to expect",
        add_directory,
        _bench,
        "Takes a few seconds. Writes to a temporary directory where the cache is or would be, and removes it.",
    ),
    Command(
        "doctor",
        "where the cache lives, and whether it can work there; exit code 1 if not",
        add_directory,
        _doctor,
        "Tells why this directory is the one, its permissions, group, file system and free space, and tries SQLite's "
        "write-ahead log there with a second process. Nothing is left behind.",
    ),
)
