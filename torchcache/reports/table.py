"""One table, for terminals and for notebooks."""

from __future__ import annotations

import abc
import dataclasses
import html
import io
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions
from rich.table import Table as RichTable
from rich.text import Text

from torchcache.printable import printable

# A text, or the lines of one.
Cell = str | Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Text in columns; the first is to the left, the others to the right.

    Parameters
    ----------
    title : str
        Above the table.
    columns : sequence of str
        Names.
    rows : sequence of sequence of str
        One text a column.
    notes : sequence of str
        Lines below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def rich(self) -> RichTable:
        """For terminals."""
        notes = shown(self.notes) if self.notes else None
        table = RichTable(title=shown(self.title), caption=notes, caption_justify="left", box=SIMPLE_HEAD)
        for position, name in enumerate(self.columns):
            table.add_column(shown(name), justify="right" if position else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(shown, row))
        return table

    def turned(self) -> Table:
        """The same with rows as columns."""
        first, *names = self.columns
        cells = zip(*(row[1:] for row in self.rows), strict=True)
        rows = [(name, *values) for name, values in zip(names, cells, strict=True)]
        return Table(self.title, (first, *(row[0] for row in self.rows)), rows, self.notes)

    def html(self) -> str:
        """For notebooks: in the colours of the page, light or dark."""
        cell = "padding:.25em .75em;border-bottom:1px solid color-mix(in srgb,currentColor 25%,transparent)"
        sides = ["left", *["right"] * (len(self.columns) - 1)]

        def line(tag: str, texts: Sequence[str]) -> str:
            cells = (
                f'<{tag} style="text-align:{side};{cell}">{_escaped(text)}</{tag}>'
                for side, text in zip(sides, texts, strict=True)
            )
            return f"<tr>{''.join(cells)}</tr>"

        body = "".join(line("td", row) for row in self.rows)
        whole = "border-collapse:collapse;color:inherit;background:transparent;font-variant-numeric:tabular-nums"
        caption = "caption-side:top;text-align:left;font-weight:bold;color:inherit"
        return (
            f'<div style="overflow-x:auto"><table style="{whole}"><caption style="{caption}">{_escaped(self.title)}'
            f"</caption><thead>{line('th', self.columns)}</thead><tbody>{body}</tbody></table>"
            f"<div>{'<br>'.join(map(_escaped, self.notes))}</div></div>"
        )


class Tabular(abc.ABC):
    """What shows itself as a table."""

    @abc.abstractmethod
    def table(self) -> Table:
        """The table."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable]:
        table = self.table()
        wide = table.rich()
        needed = console.measure(wide, options=options.update(max_width=1000)).maximum
        yield wide if needed <= options.max_width or not table.rows else table.turned().rich()

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=160).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def _repr_html_(self) -> str:
        return self.table().html()


def shown(cell: Cell) -> Text:
    """``cell`` as it is for rich, which takes brackets in a plain string for markup and colons for emojis."""
    return Text("\n".join(map(printable, [cell] if isinstance(cell, str) else cell)))


def _escaped(text: str) -> str:
    return html.escape(printable(text))
