"""Whether code reads environment variables by names that cannot be told from its text."""

from __future__ import annotations

import functools
import os
import types
from typing import Any

from torchcache.identity.bytecode import Instruction, instructions

__all__ = ["is_environment", "reads_environment"]

_NAMES = frozenset({"environ", "environb", "getenv", "getenvb", "expandvars"})
_LOOKUPS = frozenset({"get", "pop", "setdefault", "__getitem__", "__contains__"})
_ITSELF = [os.environ, os.getenv, *(getattr(os, name) for name in ("environb", "getenvb") if hasattr(os, name))]


def is_environment(value: Any) -> bool:
    """Whether a value gives access to the environment."""
    return any(value is one for one in _ITSELF)


@functools.lru_cache(maxsize=32768)
def reads_environment(code: types.CodeType) -> bool:
    """Whether ``code``, or code nested in it, may read variables whose names are no constants and no globals.

    ``os.environ["A"]``, ``os.environ.get("A", "1")``, ``os.getenv("A")`` and ``"A" in os.environ`` name theirs.
    """
    if any(isinstance(value, types.CodeType) and reads_environment(value) for value in code.co_consts):
        return True
    if _NAMES.isdisjoint(code.co_names):
        return False
    listed = [one for one in instructions(code) if one.name not in ("CACHE", "NOP", "PUSH_NULL", "PRECALL", "KW_NAMES")]
    return any(
        one.value in _NAMES and one.name.startswith(("LOAD_", "IMPORT_FROM")) and not _names_one(listed, place)
        for place, one in enumerate(listed)
        if type(one.value) is str and one.name != "LOAD_CONST"
    )


def _names_one(listed: list[Instruction], place: int) -> bool:
    """Whether what is loaded at ``place`` is used at once to read a variable that the code names."""
    then = [*listed[place + 1 : place + 5], *[None] * 4][:4]
    if listed[place].value == "expandvars" or listed[place].name == "IMPORT_FROM":
        return False
    if listed[place].value in ("environ", "environb"):
        if _is(then[0], "CONTAINS_OP"):
            before = [one for one in listed[:place] if one.name not in ("LOAD_GLOBAL", "LOAD_NAME")]
            return bool(before) and before[-1].name == "LOAD_CONST"
        if _is_known(then[0]) and (_is(then[1], "BINARY_SUBSCR") or _is(then[1], "BINARY_OP")):
            return then[1].value in (None, "", 26) or _is(then[1], "BINARY_SUBSCR")  # type: ignore[union-attr]
        if (
            then[0] is None
            or not then[0].name.startswith(("LOAD_ATTR", "LOAD_METHOD"))
            or then[0].value not in _LOOKUPS
        ):
            return False
        then = then[1:]
    return _is_known(then[0]) and (_is(then[1], "CALL") or (_is(then[1], "LOAD_CONST") and _is(then[2], "CALL")))


def _is(one: Instruction | None, name: str) -> bool:
    return one is not None and one.name.startswith(name)


def _is_known(one: Instruction | None) -> bool:
    """Whether a name is a text that the code has, or one of its globals; names as bytes are not looked for."""
    return one is not None and one.name in ("LOAD_CONST", "LOAD_GLOBAL", "LOAD_NAME") and type(one.value) is str
