"""Commands that remove: clear, prune."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time

from torchcache.cli.command import Command, add_directory, add_place, directory_of, server_of
from torchcache.cli.quantity import age, date, size
from torchcache.cli.screen import Screen
from torchcache.errors import StoreDamagedError, StoreError
from torchcache.printable import printable
from torchcache.quantity import size_text
from torchcache.store.prune import Removal, clear, discard_database, prune
from torchcache.store.records import Records
from torchcache.store.server import Server
from torchcache.store.survey import Holding, find_region, survey


def _clear(arguments: argparse.Namespace, screen: Screen) -> int:
    server = server_of(arguments)
    if server is not None:
        return _clear_server(server, arguments, screen)
    directory = directory_of(arguments)
    try:
        return _clear_rows(arguments, screen)
    except StoreDamagedError:
        if arguments.region:
            raise
        _confirm(arguments, f"The database in {directory} is damaged. Remove it with all its rows?")
        discard_database(directory)
        return _clear_rows(arguments, screen)


def _clear_server(server: Server, arguments: argparse.Namespace, screen: Screen) -> int:
    info = server.survey()
    held = find_region(info, arguments.region) if arguments.region else info.regions
    _confirm_regions(arguments, held, info.directory)
    removal = server.clear([one.tag for one in held] if arguments.region else None)
    screen.result(removal)
    screen.say(f"{removal.rows:,} rows ({size_text(removal.bytes)}) removed from {removal.directory}")
    return 0


def _clear_rows(arguments: argparse.Namespace, screen: Screen) -> int:
    with Records(directory_of(arguments)) as records:
        info = survey(records)
        regions = find_region(info, arguments.region) if arguments.region else None
        _confirm_regions(arguments, info.regions if regions is None else regions, info.directory)
        names = _names(records)
        removal = clear(records, regions)
    _report(removal, names, "removed", screen)
    return 0


def _confirm_regions(arguments: argparse.Namespace, held: list[Holding], where: str) -> None:
    rows, taken = sum(one.rows for one in held), sum(one.bytes for one in held)
    what = "regions" if len(held) != 1 else "region"
    _confirm(arguments, f"Remove {rows:,} rows ({size_text(taken)}) of {len(held)} {what} from {where}?")


def _confirm(arguments: argparse.Namespace, question: str) -> None:
    if arguments.yes:
        return
    if not sys.stdin.isatty():
        raise StoreError("nothing was removed: give --yes where there is no terminal to ask on")
    answer = ""
    with contextlib.suppress(EOFError):
        print(f"{printable(question)} [y/N] ", end="", file=sys.stderr, flush=True)
        answer = input()
    if answer.strip().lower() not in ("y", "yes"):
        raise StoreError("nothing was removed")
    arguments.yes = True


def _clear_arguments(parser: argparse.ArgumentParser) -> None:
    add_place(parser)
    parser.add_argument("--region", metavar="R", help="only this one: the start of its fingerprint, or its module path")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask")


def _prune(arguments: argparse.Namespace, screen: Screen) -> int:
    if arguments.max_size is None and arguments.older_than is None and arguments.unused_since is None:
        raise StoreError("say what may go: --max-size, --older-than or --unused-since")
    with Records(directory_of(arguments)) as records:
        names = _names(records)
        removal = prune(
            records,
            max_size=arguments.max_size,
            stored_before=None if arguments.older_than is None else time.time() - arguments.older_than,
            unused_since=arguments.unused_since,
            dry_run=arguments.dry_run,
        )
    _report(removal, names, "would be removed" if arguments.dry_run else "removed", screen)
    return 0


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    add_directory(parser)
    parser.add_argument("--max-size", metavar="SIZE", type=size, help="make the directory this small, such as 20GB")
    parser.add_argument("--older-than", metavar="AGE", type=age, help="rows stored longer ago than this, such as 30d")
    parser.add_argument("--unused-since", metavar="DATE", type=date, help="regions not used since, such as 2026-11-01")
    parser.add_argument("--dry-run", "-n", action="store_true", help="remove nothing, tell what would go")


def _names(records: Records) -> dict[str, str]:
    return {tag: region.name for tag, region in records.catalogue.read().items()}


def _report(removal: Removal, names: dict[str, str], done: str, screen: Screen) -> None:
    screen.result(removal)
    screen.say(f"{removal.rows:,} rows ({size_text(removal.bytes)}) {done} from {removal.directory}")
    lines = [(names.get(tag, "(not in the catalogue)"), tag, f"{rows:,}") for tag, rows in removal.regions.items()]
    screen.table(("region", "fingerprint", ">rows"), lines)
    screen.say("")
    screen.say(f"size: {size_text(removal.before)} -> {size_text(removal.after)}")
    if not removal.compacted:
        screen.say("other processes are at work: the freed space stays in the database, where new rows fill it")


COMMANDS = (
    Command(
        "clear",
        "remove all rows, or those of one region",
        _clear_arguments,
        _clear,
        "Removes rows and what is known of their regions. Only what torchcache stored is touched: other files in the "
        "directory stay. Processes at work on the directory go on.",
        ("torchcache clear --yes", "torchcache clear ~/cache --region backbone.encoder"),
    ),
    Command(
        "prune",
        "remove what is old, unused or too much",
        _prune_arguments,
        _prune,
        "Removes rows by any of the conditions: first regions unused since a date, then rows older than an age, then, "
        "until the directory is small enough, rows of the least recently used region, those first stored going first.",
        ("torchcache prune --max-size 20GB", "torchcache prune ~/cache --older-than 30d --dry-run"),
    ),
)
