"""What a command shows: tables and sentences for people, or one JSON object for programs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["Screen", "clean"]

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class Screen:
    """Standard output, as ``--json`` or its absence asks for.

    Parameters
    ----------
    json : bool
        Say nothing but the one object that ``result`` is given.
    """

    def __init__(self, json: bool) -> None:
        self.json = json
        self._console = Console(highlight=False)

    def result(self, record: Any) -> None:
        """The result for programs: a dataclass or a dict."""
        if self.json:
            fields = dataclasses.asdict(record) if dataclasses.is_dataclass(record) else record  # type: ignore[arg-type]
            print(json.dumps(fields, indent=2))

    def say(self, text: str, style: str = "") -> None:
        """One line for people."""
        if not self.json:
            self._console.print(escape(clean(text)), style=style, soft_wrap=True)

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Names and values for people, one a line."""
        width = max(len(name) for name, _ in facts) + 2
        for name, value in facts:
            if not self.json:
                self._console.print(f"[bold]{name:<{width}}[/bold]{escape(clean(value))}", soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table for people; a column whose name begins with ``>`` is set to the right."""
        if self.json or not rows:
            return
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for name in columns:
            right = name.startswith(">")
            # Figures stay whole; what is left of the line is for names.
            table.add_column(
                name.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold"
            )
        for row in rows:
            table.add_row(*(escape(clean(cell)) for cell in row))
        self._console.print()
        self._console.print(table)

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], object]]:
        """A bar on a terminal's standard error; gives the function that advances it."""
        if self.json or not sys.stderr.isatty():
            yield lambda done: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(what, total=total)
            yield lambda done: bars.advance(task, done)


def clean(text: str) -> str:
    """``text`` without what a terminal could take for a command: names in a cache directory are not trusted."""
    return _CONTROL.sub("?", text)
