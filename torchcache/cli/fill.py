"""The command that fills a cache: warm."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torchcache.cli.command import Command
from torchcache.cli.screen import Screen
from torchcache.errors import ArgumentError
from torchcache.loading.warm import warm
from torchcache.marks import marked_modules
from torchcache.quantity import seconds_text, size_text
from torchcache.regions import regions_in
from torchcache.transform import transform


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="package.module:function that returns the model")
    parser.add_argument("loader", metavar="LOADER", help="package.module:function that returns the data loader")
    parser.add_argument("--transform", action="store_true", help="call torchcache.transform on the model first")
    parser.add_argument(
        "--device", metavar="DEVICE", help="move the model and its inputs there: cpu, cuda, cuda:1, ..."
    )


def _warm(arguments: argparse.Namespace, screen: Screen) -> int:
    with _processes() as rank, _importable_here():
        model = _made("MODEL", arguments.model)
        loader = _made("LOADER", arguments.loader)
        if arguments.transform:
            model = transform(model)
        device = _device(arguments.device)
        if device is not None and isinstance(model, nn.Module):
            model.to(device)
        _check_persistent(arguments.model, model)
        warmed = warm(model, loader, device=device, progress=not screen.json)
        disks = [region.tiers.beneath.disk for region in regions_in(model)]
        held = {str(disk.directory) for disk in disks if disk is not None}
        if rank:
            return 0
        screen.result({**dataclasses.asdict(warmed), "directories": sorted(held)})
        rate = warmed.rows / warmed.seconds if warmed.seconds else 0.0
        screen.say(
            f"{warmed.misses:,} rows computed and {warmed.hits:,} found, in {seconds_text(warmed.seconds)} ("
            f"{rate:,.0f} a second); {size_text(warmed.bytes)} stored in {', '.join(sorted(held)) or 'memory alone'}"
        )
        if not held:
            screen.say("problem: nothing is on disk, so all of it is gone now: mark with persistent=True", "red")
        return 0 if held else 1


def _made(name: str, path: str) -> Any:
    """What the function at ``package.module:function`` returns."""
    module_name, colon, function_name = path.partition(":")
    if not (module_name and colon and function_name):
        raise ArgumentError(f"{name} must be package.module:function, not {path!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ArgumentError(f"{name}: there is no module {module_name!r} here or in {sys.prefix}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ArgumentError(f"{name}: {module_name} has no function {function_name!r}")
    return function()


def _check_persistent(path: str, model: Any) -> None:
    if isinstance(model, nn.Module):
        marks = list(marked_modules(model))
        if marks and not any(mark.options_for(module).persistent for _, module, mark in marks):
            raise ArgumentError(
                f"{path}: no mark has persistent=True, so the rows would be gone at the end; set it on {marks[0][0]}"
            )


def _device(name: str | None) -> torch.device | None:
    try:
        return torch.device(name) if name else None
    except RuntimeError:
        raise ArgumentError(f"--device: {name!r} is no device; write cpu, cuda or cuda:1") from None


@contextlib.contextmanager
def _importable_here() -> Iterator[None]:
    """The working directory can be imported from, as with ``python -m``."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


@contextlib.contextmanager
def _processes() -> Iterator[int]:
    """Under ``torchrun``, join its processes; gives this one's rank."""
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


COMMANDS = (
    Command(
        "warm",
        "fill the cache of a model ahead of training",
        _arguments,
        _warm,
        "Both functions take no argument. The model must be what training calls, with the weights that it has there: "
        "what torchcache.transform or torch.compile returned, or a model with marks, which is then cached module by "
        "module; rows of that form are others than those of a transformed model, which --transform makes. Rows that "
        "are there are not computed again, so an interrupted run goes on where it was. Under torchrun each process "
        "takes its share.",
        (
            "torchcache warm training.models:make_model training.data:make_loader",
            "torchrun --nproc-per-node 2 -m torchcache warm training.models:make_model training.data:make_loader",
        ),
        runs_user_code=True,
    ),
)
