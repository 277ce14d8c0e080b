"""What a value on the stack of running code may come from, as far as it is followed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torchcache.identity.bytecode import Instruction
from torchcache.identity.reads import Chain, closed_over

__all__ = ["NOTHING", "UNKNOWN", "Symbol", "Value", "chains", "is_modulo", "items_of", "mutated"]

# A local variable, one of a function around, an attribute of anything, a global chain, a constant: what a value on
# the stack may come from.
Symbol = tuple[Any, ...]
Value = frozenset[Symbol]

UNKNOWN: Value = frozenset({("unknown",)})
NOTHING: Value = frozenset()


def is_modulo(at: Instruction) -> bool:
    """Whether this may put an object into a text by ``%``: numbers of the operators as CPython counts them."""
    return at.name == "BINARY_OP" and at.arg in (6, 19)


def items_of(group: Value) -> Value:
    """What the items of a group may come from; those of text and numbers are not followed."""
    return frozenset(symbol for symbol in group if symbol[0] != "const") or UNKNOWN


def chains(value: Iterable[Symbol]) -> list[Chain]:
    """The globals among them."""
    return [Chain(symbol[1], symbol[2]) for symbol in value if symbol[0] == "global"]


def mutated(container: Value) -> set[str]:
    """The names under which code that changes a container in place finds it."""
    found = set()
    for symbol in container:
        if symbol[0] == "attr":
            found.add(symbol[1])
        elif symbol[0] == "free":
            found.add(closed_over(symbol[1]))
        elif symbol[0] == "global" and symbol[2]:
            found.add(symbol[2][-1])
    return found
