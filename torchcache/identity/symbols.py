"""What a value on the stack of running code may come from, as far as it is followed."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from torchcache.identity.bytecode import Instruction, instructions
from torchcache.identity.reads import Chain, closed_over

# A local variable, one of a function around, an attribute of anything, a global chain, a constant: what a value on
# the stack may come from. A lookup is a method of the environment. Behind what is watched is the number of its load.
Symbol = tuple[Any, ...]
Value = frozenset[Symbol]

UNKNOWN: Value = frozenset({("unknown",)})
NOTHING: Value = frozenset()

# How an object may be turned into text.
DISPLAYED = frozenset({"__str__", "__repr__", "__format__"})

_LENGTHS = {"global": 3, "attr": 2, "lookup": 1}


def use_of(value: Value) -> int:
    """The number of the load that a value comes from, if it is one and watched; else -1."""
    if len(value) == 1:
        (symbol,) = value
        length = _LENGTHS.get(symbol[0], len(symbol))
        if len(symbol) > length:
            return int(symbol[length])
    return -1


def bare(value: Value) -> Value:
    """A value without the numbers of loads."""
    return frozenset(symbol[: _LENGTHS.get(symbol[0])] for symbol in value)


def rebound(code: types.CodeType) -> set[str]:
    """Variables that code within ``code`` assigns to."""
    found = set()
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            stored = {one.value for one in instructions(inner) if one.name == "STORE_DEREF"}
            found |= (stored | rebound(inner)) & {*inner.co_freevars}
    return found


def is_modulo(at: Instruction) -> bool:
    """Whether this may put an object into a text by ``%``: numbers of the operators as CPython counts them."""
    return at.name == "BINARY_OP" and at.arg in (6, 19)


def items_of(group: Value) -> Value:
    """What the items of a group may come from; those of text and numbers are not followed."""
    return frozenset(symbol for symbol in group if symbol[0] != "const") or UNKNOWN


def joined(one: list[Value], other: list[Value]) -> list[Value]:
    """Stacks of two ways to the same place."""
    if len(one) != len(other):
        return one
    return [mine | its for mine, its in zip(one, other, strict=True)]


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
