"""Commands that move rows: export, import, merge."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torchcache.cli.command import Command, place
from torchcache.cli.quantity import size
from torchcache.cli.screen import Screen
from torchcache.errors import StoreError
from torchcache.options import absolute
from torchcache.quantity import size_text
from torchcache.reports.table import Cell
from torchcache.store.catalogue import Region
from torchcache.store.deposit import Deposit, DirectoryDeposit, merge, rows_of
from torchcache.store.records import Records
from torchcache.store.server import Server, ServerDeposit
from torchcache.store.survey import find_region, survey
from torchcache.store.transfer import export_region, import_region


def _export(arguments: argparse.Namespace, screen: Screen) -> int:
    with Records(absolute(arguments.directory)) as records:
        found = [held for held in _wanted(records, arguments.region) if held[1]]
        if len(found) != 1:
            tags = ", ".join(region.tag for region, _ in found)
            raise StoreError(
                f"--region must name one region with rows; choose by fingerprint: {tags or 'there is none'}"
            )
        region, rows = found[0]
        with screen.progress("exporting", 2 * rows) as progress:
            done = export_region(records, region, absolute(arguments.out), call=arguments.call, progress=progress)
    screen.result(done)
    screen.say(f"{done.rows:,} rows of {region.name or region.tag} written to {done.path}")
    lines: list[Sequence[Cell]] = []
    for call in done.calls:
        prefix, leaves = str(call["prefix"]), call["leaves"]
        assert isinstance(leaves, list)
        names = [f"{prefix}leaf{index}  {leaf}" for index, leaf in enumerate(leaves)]
        lines.append(([*names, f"{prefix}digests  uint8 (16,)"], str(call["call"]), f"{call['rows']:,}"))
    screen.table(("tensors, a row each", "call", ">rows"), lines)
    if done.damaged:
        screen.say(f"{done.damaged:,} damaged rows were left out; torchcache verify drops them", "red")
    return 1 if done.damaged else 0


def _wanted(records: Records, wanted: str | None) -> list[tuple[Region, int]]:
    info = survey(records)
    held = info.regions if wanted is None else find_region(info, wanted)
    return [(one.region or Region(one.tag, ""), one.rows) for one in held]


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, help="the cache directory")
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="the file to write")
    parser.add_argument(
        "--region", metavar="R", help="the start of its fingerprint, or its module path; needed where there are several"
    )
    parser.add_argument(
        "--call", metavar="C", default="", help="only rows of this kind of call: the start of its fingerprint"
    )


def _import(arguments: argparse.Namespace, screen: Screen) -> int:
    with DirectoryDeposit(absolute(arguments.directory), arguments.max_size) as deposit:
        region = import_region(absolute(arguments.file), deposit)
    return _stored(deposit, 0, screen, {"region": dataclasses.asdict(region)})


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="IN.safetensors", type=Path, help="a file that export wrote")
    parser.add_argument("directory", metavar="DIR", type=Path, help="the cache directory, made where there is none")
    _add_max_size(parser)


def _merge(arguments: argparse.Namespace, screen: Screen) -> int:
    sources = [Server(source) if isinstance(source, str) else absolute(source) for source in arguments.sources]
    target = Server(arguments.target) if isinstance(arguments.target, str) else absolute(arguments.target)
    names = [source.name if isinstance(source, Server) else str(source) for source in sources]
    place = target.name if isinstance(target, Server) else str(target.resolve())
    if place in [source.name if isinstance(source, Server) else str(source.resolve()) for source in sources]:
        raise StoreError(f"{arguments.target} is a source and the target at once")
    damaged = 0
    opened = [source if isinstance(source, Server) else Records(source) for source in sources]
    into = ServerDeposit(target) if isinstance(target, Server) else DirectoryDeposit(target, arguments.max_size)
    with into as deposit:
        for source, name in zip(opened, names, strict=True):
            if isinstance(source, Server):
                with screen.progress(f"merging {name}", None) as progress:
                    damaged += merge(source.regions().values(), source.sound_rows(progress), deposit)
                continue
            with source:
                found = source.sql("SELECT count(*) FROM Cache")
                with screen.progress(f"merging {name}", found[0][0] if found else 0) as progress:
                    damaged += merge(source.catalogue.read().values(), rows_of(source, progress), deposit)
    return _stored(deposit, damaged, screen, {"sources": names})


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources", metavar="SRC", nargs="+", type=place, help="cache directories, or redis://host; they are not changed"
    )
    parser.add_argument(
        "target", metavar="DST", type=place, help="the directory to fill, made where there is none, or redis://host"
    )
    _add_max_size(parser)


def _add_max_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-size",
        metavar="SIZE",
        type=size,
        default=10_000_000_000,
        help="store no more once the directory is this large (default: 10GB, as max_persistent_cache_size)",
    )


def _stored(deposit: Deposit, damaged: int, screen: Screen, more: dict[str, object]) -> int:
    counts = {
        "stored": deposit.stored,
        "bytes": deposit.bytes,
        "present": deposit.present,
        "damaged": damaged,
        "left_out": deposit.left_out,
    }
    screen.result({"directory": deposit.name, **more, **counts})
    screen.say(f"{deposit.stored:,} rows ({size_text(deposit.bytes)}) stored in {deposit.name}")
    if deposit.present:
        screen.say(f"{deposit.present:,} were there already")
    if damaged:
        screen.say(f"{damaged:,} damaged rows were left out", "red")
    if deposit.left_out:
        screen.say(f"{deposit.left_out:,} rows did not fit in; --max-size allows more", "red")
    return 1 if damaged or deposit.left_out else 0


COMMANDS = (
    Command(
        "export",
        "write a region's features to a safetensors file",
        _export_arguments,
        _export,
        "Writes one tensor a leaf (leaf0, leaf1, ...), a row a sample, and digests: 16 bytes a row, the hash of the "
        "sample's inputs or its sample id. Rows are in the order of their digests. Outputs that cache_dtype stores as "
        "int8 or float8 come with their scales, which are the last leaves: leaf0 * leaf1 are the values of a single "
        "output. Where inputs came in several "
        "shapes or numeric modes, each kind of call has its own tensors, call0.leaf0 and so on.",
        ("torchcache export ~/cache features.safetensors --region backbone",),
    ),
    Command(
        "import",
        "store the rows of an exported file",
        _import_arguments,
        _import,
        "The inverse of export. Rows that are there already stay as they are.",
        ("torchcache import features.safetensors ~/cache",),
    ),
    Command(
        "merge",
        "join caches that were filled on several machines",
        _merge_arguments,
        _merge,
        "Copies the rows of all sources. Each is checked on the way; a damaged row is left out (exit code 1), and a "
        "sound row that is in the target already stays.",
        ("torchcache merge node1/cache node2/cache all/cache --max-size 100GB",),
    ),
)
