"""The parser, and the way from a command line to an exit code."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from torchcache.cli import fill, look, machine, move, remove
from torchcache.cli.command import Command
from torchcache.cli.screen import Screen
from torchcache.errors import TorchcacheError
from torchcache.logging import logger
from torchcache.printable import printable
from torchcache.version import __version__

COMMANDS: tuple[Command, ...] = (
    *look.COMMANDS,
    *remove.COMMANDS,
    *fill.COMMANDS,
    *move.COMMANDS,
    *machine.COMMANDS,
)

_EXIT_CODES = """exit codes:
  0  done
  1  done, and something was wrong: damaged rows, rows that did not fit, a place where no cache works
  2  not done: a wrong argument, no cache there, an answer other than yes
  130  interrupted; what was done stays done"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, without the program's name; the exit code."""
    parsed = _parser().parse_args(arguments)
    with _any_sign(sys.stdout):
        return _run(parsed)


def _run(parsed: argparse.Namespace) -> int:
    command: Command = parsed.command
    try:
        return command.run(parsed, Screen(parsed.json))
    except BrokenPipeError:
        # The reader left; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (TorchcacheError, OSError) as error:
        return _not_done(command, str(error))
    except Exception as error:  # whatever a directory or a file from anybody makes of the libraries that read it
        if command.runs_user_code:
            raise
        logger.debug("command failed", exc_info=True)
        return _not_done(command, f"{type(error).__name__}: {error}; TORCHCACHE_LOG_LEVEL=DEBUG tells more")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _any_sign(stream: Any) -> Iterator[None]:
    """Have signs that the encoding of ``stream`` lacks shown by their numbers."""
    if not isinstance(stream, io.TextIOWrapper) or stream.errors != "strict":
        yield
        return
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(errors="strict")


def _not_done(command: Command, why: str) -> int:
    print(f"torchcache {command.name}: {printable(why)}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="torchcache",
        description="Fill, inspect, check and clean up the directories in which torchcache stores rows.",
        epilog=_EXIT_CODES,
        formatter_class=form,
    )
    parser.add_argument("--version", action="version", version=f"torchcache {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        examples = "".join(f"\n  {example}" for example in command.examples)
        one = commands.add_parser(
            command.name,
            help=command.help,
            description=_wrapped(command.description or command.help),
            epilog=f"examples:{examples}" if examples else None,
            formatter_class=form,
        )
        command.arguments(one)
        one.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        one.set_defaults(command=command)
    return parser


def _wrapped(text: str) -> str:
    return textwrap.fill(text, width=90)
