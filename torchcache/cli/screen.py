"""What a command shows: tables and sentences for people, or one JSON object for programs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from torchcache.printable import printable
from torchcache.reports.table import Cell, shown

# Of a table: nobody reads more, and thousands take seconds to lay out.
MOST_ROWS = 500


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
            self._console.print(shown(text), style=style, soft_wrap=True)

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Names and values for people, one a line."""
        width = max(len(name) for name, _ in facts) + 2
        for name, value in facts:
            if not self.json:
                self._console.print(Text(f"{name:<{width}}", "bold").append_text(shown(value)), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table for people; a column whose name begins with ``>`` is set to the right.

        A cell of several lines is a list: no newline within a text is one on the screen.
        """
        if self.json or not rows:
            return
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for name in columns:
            right = name.startswith(">")
            # Figures stay whole; what is left of the line is for names.
            table.add_column(
                name.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold"
            )
        for row in rows[:MOST_ROWS]:
            table.add_row(*map(shown, row))
        self._console.print()
        self._console.print(table)
        if len(rows) > MOST_ROWS:
            self.say(f"... and {len(rows) - MOST_ROWS:,} more: --json tells all")

    @contextlib.contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Callable[[int], object]]:
        """A bar on a terminal's standard error; gives the function that advances it."""
        if self.json or not sys.stderr.isatty():
            yield lambda done: None
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(printable(what), total=total)
            yield lambda done: bars.advance(task, done)
