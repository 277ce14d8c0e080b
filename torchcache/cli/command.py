"""How a command is put together: its arguments, and what it does with them."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torchcache.address import is_address
from torchcache.cli.screen import Screen
from torchcache.options import absolute, default_cache_dir
from torchcache.store.server import Server

Run = Callable[[argparse.Namespace, Screen], int]


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand.

    Parameters
    ----------
    name, help : str
        As ``torchcache --help`` lists it.
    arguments : callable
        Adds its arguments to its parser.
    run : callable
        Does it; returns the exit code.
    description : str
        More for ``torchcache name --help``.
    examples : sequence of str
        Commands to show at its end.
    runs_user_code : bool
        Whether errors may be those of the user's own code, which keep their tracebacks.
    """

    name: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], object]
    run: Run
    description: str = ""
    examples: Sequence[str] = ()
    runs_user_code: bool = False


def place(text: str) -> Path | str:
    """A directory, or the URL of a server."""
    return text if is_address(text) else Path(text)


def add_directory(parser: argparse.ArgumentParser, *, servers: bool = False) -> None:
    """Add the optional ``DIR``, which may be a server where a command can do with one."""
    parser.add_argument(
        "directory",
        metavar="DIR",
        nargs="?",
        type=place if servers else Path,
        help="the cache directory (default: $TORCHCACHE_DIR, else the user's cache directory)"
        + (", or redis://host of a server" if servers else ""),
    )


def add_place(parser: argparse.ArgumentParser) -> None:
    """Add the optional ``DIR``, which may be a server."""
    add_directory(parser, servers=True)


def server_of(arguments: argparse.Namespace) -> Server | None:
    """The server that is meant, if it is one."""
    return Server(arguments.directory) if isinstance(arguments.directory, str) else None


def directory_of(arguments: argparse.Namespace) -> Path:
    """The directory that is meant, absolute."""
    return absolute(arguments.directory) if arguments.directory else default_cache_dir()


def why_directory(arguments: argparse.Namespace) -> str:
    """Why it is that one."""
    if arguments.directory:
        return "argument"
    return "$TORCHCACHE_DIR" if os.environ.get("TORCHCACHE_DIR") else "default: the user's cache directory"
