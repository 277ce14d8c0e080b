"""Commands that look: info, stats, verify."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from torchcache.cli.command import Command, add_place, directory_of, server_of
from torchcache.cli.quantity import ago
from torchcache.cli.screen import Screen
from torchcache.errors import StoreDamagedError
from torchcache.quantity import size_text
from torchcache.reports.table import Cell
from torchcache.store.catalogue import Region
from torchcache.store.records import Records
from torchcache.store.survey import Holding, Stats, survey, survey_calls
from torchcache.store.verify import Verdict, verify


def _info(arguments: argparse.Namespace, screen: Screen) -> int:
    server = server_of(arguments)
    if server is not None:
        info = server.survey()
    else:
        with Records(directory_of(arguments)) as records:
            info = survey(records)
    screen.result(info)
    used = size_text(info.volume)
    if info.limit is not None:
        used += f" of {size_text(info.limit)} ({info.volume / max(1, info.limit):.0%})"
    rows = sum(held.rows for held in info.regions)
    facts = [
        ("directory" if server is None else "server", info.directory),
        ("format", str(info.format)),
        ("size", used),
    ]
    screen.facts([*facts, ("regions", str(len(info.regions))), ("rows", f"{rows:,}")])
    columns = ("region", "fingerprint", ">rows", ">size", ">ratio", "created", "last used")
    screen.table(columns, [_line(held) for held in info.regions])
    about = ("fingerprint", "torchcache", "torch", "options")
    screen.table(about, [_about(held.region) for held in info.regions if held.region])
    return 0


def _line(held: Holding) -> tuple[str, ...]:
    name = held.region.name if held.region else "(not in the catalogue)"
    created = held.region.created if held.region else held.oldest
    ratio = f"{held.ratio:.2f}x" if held.ratio else "-"
    return name, held.tag[:12], f"{held.rows:,}", size_text(held.bytes), ratio, ago(created), ago(held.last_used)


def _about(region: Region) -> tuple[str, ...]:
    shown = {key: value for key, value in region.options.items() if key != "max_persistent_cache_size"}
    options = ", ".join(f"{key}={value}" for key, value in shown.items() if value is not None)
    return region.tag, region.torchcache, region.torch, options


def _stats(arguments: argparse.Namespace, screen: Screen) -> int:
    server = server_of(arguments)
    if server is not None:
        stats, regions = server.survey_calls(), server.regions()
    else:
        with Records(directory_of(arguments)) as records:
            stats, regions = survey_calls(records), records.catalogue.read()
    names = {tag: region.name for tag, region in regions.items()}
    screen.result(stats)
    screen.facts(_facts(stats))
    columns = ("outputs of a row", "region", "call", ">rows", ">in files", ">size", ">smallest", ">largest")
    lines: list[Sequence[Cell]] = []
    for group in stats.groups:
        sizes = (size_text(group.bytes), size_text(group.smallest), size_text(group.largest))
        name = names.get(group.tag, group.tag[:12])
        lines.append((group.leaves, name, group.call[:12], f"{group.rows:,}", f"{group.in_files:,}", *sizes))
    screen.table(columns, lines)
    return 0


def _facts(stats: Stats) -> list[tuple[str, str]]:
    if stats.database is None or stats.free is None or stats.log is None or stats.files is None:
        return [("server", stats.directory), ("rows", f"{stats.rows:,}")]
    in_database = stats.rows - stats.in_files
    return [
        ("directory", stats.directory),
        ("rows", f"{in_database:,} in the database, {stats.in_files:,} in files of their own"),
        ("database", f"{size_text(stats.database)}, {size_text(stats.free)} of it free; log {size_text(stats.log)}"),
        ("files", size_text(stats.files)),
        ("stored", _ages(stats.ages)),
    ]


def _ages(ages: dict[str, int]) -> str:
    said = [f"{rows:,} {'over 30 days ago' if age == 'older' else f'in the last {age}'}" for age, rows in ages.items()]
    return "; ".join(text for text, rows in zip(said, ages.values(), strict=True) if rows) or "nothing"


def _verify(arguments: argparse.Namespace, screen: Screen) -> int:
    server = server_of(arguments)
    if server is not None:
        with screen.progress("checking", None) as progress:
            return _report(server.verify(arguments.repair, progress), arguments, screen)
    try:
        with Records(directory_of(arguments), any_log=arguments.long_log) as records:
            found = records.sql("SELECT count(*) FROM Cache")
            with screen.progress("checking", found[0][0] if found else 0) as progress:
                verdict = verify(records, repair=arguments.repair, progress=progress)
    except StoreDamagedError as error:
        screen.result({"directory": str(directory_of(arguments)), "database": [str(error)], "sound": False})
        screen.say(str(error), "red")
        return 1
    return _report(verdict, arguments, screen)


def _report(verdict: Verdict, arguments: argparse.Namespace, screen: Screen) -> int:
    screen.result({**dataclasses.asdict(verdict), "sound": verdict.sound})
    screen.say(f"{verdict.checked:,} rows checked, {size_text(verdict.bytes)}")
    for problem, count in sorted(verdict.damaged.items()):
        screen.say(f"{count:,} damaged: {problem}", "red")
    if verdict.orphans:
        screen.say(f"{verdict.orphans:,} files that no row names", "red")
    for line in verdict.database:
        screen.say(f"database: {line}", "red")
    if verdict.sound:
        screen.say("all sound", "green")
        return 0
    if arguments.repair:
        screen.say(f"{verdict.repaired:,} dropped; dropped rows are computed again when they are needed")
    else:
        screen.say("nothing was changed; --repair drops what is damaged")
    if verdict.database:
        again = "its indices were rebuilt, which repaired it" if verdict.reindexed else "not repaired"
        screen.say(f"the database was damaged: {again if arguments.repair else 'see above'}")
        if not verdict.reindexed:
            screen.say("torchcache clear empties the directory, so that it can be filled again")
    return 1


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    add_place(parser)
    parser.add_argument(
        "--repair",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="drop damaged rows and files that no row names (default: --repair)",
    )
    parser.add_argument(
        "--long-log",
        action="store_true",
        help="take a write-ahead log of any length and put it into the database, however long that takes: for a "
        "directory that nobody else may write to",
    )


COMMANDS = (
    Command(
        "info",
        "what is cached: regions, rows, sizes, last use",
        add_place,
        _info,
        "Lists the regions of a cache directory, the most recently used first. The ratio is bytes of tensors by bytes "
        "stored, from up to 200 rows. Your code is not imported.",
        ("torchcache info", "torchcache info redis://cache.lab:6379/0"),
    ),
    Command(
        "stats",
        "how the rows are made up: shapes, files, database, ages",
        add_place,
        _stats,
        "Breaks a cache directory down by kind of call (input shapes, arguments, numeric mode), with the dtypes and "
        "shapes of a row's outputs, and tells where the bytes are.",
    ),
    Command(
        "verify",
        "check every row, drop what is damaged; exit code 1 if anything was",
        _verify_arguments,
        _verify,
        "Checks keys, file names, headers, lengths, checksums and compressed frames of all rows, files that no row "
        "names, and the database itself. Training may continue. Dropped rows are computed again when next asked "
        "for.",
        ("torchcache verify ~/cache --no-repair --json",),
    ),
)
