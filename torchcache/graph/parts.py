"""Which nodes of a graph were traced in a marked call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from torchcache.mark import Mark
from torchcache.op import subject_name, subject_of
from torchcache.options import CacheOptions

# Under this name an annotation says which marked call a node was traced in.
KEY = "torchcache"


class Part:
    """A marked function, or a marked method of one module, of which a graph has nodes.

    Parameters
    ----------
    mark : Mark
        The mark.
    module : nn.Module or None
        The marked module, which it does not keep alive.
    """

    def __init__(self, mark: Mark, module: nn.Module | None) -> None:
        self.mark = mark
        self.options: CacheOptions = mark.options_for(module)
        self.subject = subject_name(mark, module)

    @property
    def module(self) -> nn.Module | None:
        """The marked module, as long as it lives."""
        found = subject_of(self.subject)
        return found[1] if found is not None else None

    @property
    def owner(self) -> Any:
        """Whose part it is: the module, or else the mark."""
        module = self.module
        return self.mark if module is None else module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Part) and self.subject == other.subject

    def __hash__(self) -> int:
        return hash(self.subject)

    def __repr__(self) -> str:
        return f"Part({self.subject})"


def part_of(node: fx.Node) -> Part | None:
    """The part that ``node`` belongs to; of marks inside each other, the inner one's."""
    found = node.meta.get("custom")
    name = found.get(KEY) if isinstance(found, dict) else None
    subject = subject_of(name) if name is not None else None
    return Part(*subject) if subject is not None else None


def parts_of(nodes: Iterable[fx.Node]) -> list[Part]:
    """The parts that ``nodes`` belong to, in order."""
    return list(dict.fromkeys(part for node in nodes if (part := part_of(node)) is not None))
