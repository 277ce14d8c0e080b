"""Instructions of a code object with their arguments resolved, the same for every Python that is supported."""

from __future__ import annotations

import dataclasses
import dis
import struct
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

_NAMES = frozenset(dis.hasname)
_CONSTANTS = frozenset(dis.hasconst)
_LOCALS = frozenset(dis.haslocal)
_CELLS = frozenset(dis.hasfree)
_JUMPS = frozenset(dis.hasjrel)
_JUMPS_ABSOLUTE = frozenset(dis.hasjabs)
_SILENT = frozenset(
    dis.opmap[name] for name in ("CACHE", "NOP", "EXTENDED_ARG", "RESUME", "PRECALL") if name in dis.opmap
)
_OPNAMES = dis.opname
_SINCE_311 = sys.version_info >= (3, 11)
# How far the index of a name is shifted to make room for flags.
_SHIFTS = {"LOAD_GLOBAL": 1} if _SINCE_311 else {}
if sys.version_info >= (3, 12):
    _SHIFTS |= {"LOAD_ATTR": 1, "LOAD_SUPER_ATTR": 2}


@dataclasses.dataclass(slots=True)
class Instruction:
    """One instruction.

    Attributes
    ----------
    offset : int
        Where it is, in bytes.
    opcode, arg : int
        As they are encoded.
    name : str
        Of the operation.
    value : Any
        The name, the constant, the variable or the pair of variables that ``arg`` stands for; else ``arg`` itself.
    target : int
        Offset that it may jump to, or -1.
    """

    offset: int
    opcode: int
    arg: int
    name: str
    value: Any
    target: int = -1


def varname(code: types.CodeType, index: int) -> str:
    """The local variable or cell that ``index`` stands for."""
    if _SINCE_311:
        return str(code._varname_from_oparg(index))  # type: ignore[attr-defined]
    return code.co_varnames[index]


def instructions(code: types.CodeType) -> Iterator[Instruction]:
    """The instructions of ``code`` in order, without those that compute nothing."""
    raw = code.co_code
    extended = 0
    for offset in range(0, len(raw), 2):
        opcode = raw[offset]
        arg = raw[offset + 1] | extended
        name = _OPNAMES[opcode]
        extended = arg << 8 if name == "EXTENDED_ARG" else 0
        if opcode in _SILENT:
            continue
        instruction = Instruction(offset, opcode, arg, name, arg)
        if opcode in _NAMES:
            instruction.value = code.co_names[arg >> _SHIFTS.get(name, 0)]
        elif opcode in _CONSTANTS:
            instruction.value = code.co_consts[arg] if name != "LOAD_SMALL_INT" else arg
        elif opcode in _LOCALS:
            pair = name.count("_FAST") > 1  # LOAD_FAST_LOAD_FAST and the like name two variables in four bits each
            instruction.value = (varname(code, arg >> 4), varname(code, arg & 15)) if pair else varname(code, arg)
        elif opcode in _CELLS:
            cells = code.co_cellvars + code.co_freevars
            instruction.value = varname(code, arg) if _SINCE_311 else cells[arg]
        elif opcode in _JUMPS:
            caches = 0
            while raw[offset + 2 + 2 * caches : offset + 3 + 2 * caches] == b"\0" and _SINCE_311:
                caches += 1
            step = -arg if "BACKWARD" in name else arg
            instruction.target = offset + 2 + 2 * (caches + step)
        elif opcode in _JUMPS_ABSOLUTE:
            instruction.target = 2 * arg
        yield instruction


def key_of(ahead: list[Instruction]) -> str | None:
    """The text by which one item is taken at once from what was just loaded, ``[key]`` or ``.get(key, constant)``.

    The instructions stand side by side, so that nothing else can be done with what was loaded.
    """
    names = [one.name for one in ahead]
    key: Any = None
    subscript = names[1:2] == ["BINARY_SUBSCR"] or (names[1:2] == ["BINARY_OP"] and ahead[1].arg == 26)
    if names[:1] == ["LOAD_CONST"] and subscript:
        key = ahead[0].value
    elif names[:1] in (["LOAD_ATTR"], ["LOAD_METHOD"]) and ahead[0].value == "get" and names[1:2] == ["LOAD_CONST"]:
        given = 2 if names[2:3] in (["LOAD_CONST"], ["LOAD_SMALL_INT"]) else 1
        if names[given + 1 : given + 2] in (["CALL"], ["CALL_METHOD"]) and ahead[given + 1].arg == given:
            key = ahead[1].value
    return key if type(key) is str else None


def constant_bytes(value: Any) -> bytes:
    """Canonical bytes of a number, a string, bytes, ``None``, an ellipsis, or a tuple or frozen set of such."""
    kind = type(value)
    data: bytes
    if kind is str:
        data = value.encode("utf-8", "surrogatepass")
    elif kind is bytes:
        data = value
    elif kind is float:
        data = struct.pack("<d", value)
    elif kind is complex:
        data = struct.pack("<dd", value.real, value.imag)
    elif kind is tuple:
        data = b"".join(map(constant_bytes, value))
    elif kind is frozenset:
        data = b"".join(sorted(map(constant_bytes, value)))
    elif kind is slice:
        data = constant_bytes((value.start, value.stop, value.step))
    else:  # whole numbers of any size, True, None, an ellipsis
        data = (hex(value) if kind is int else repr(value)).encode()
    return b"%s %d:" % (kind.__name__.encode(), len(data)) + data


def argument_bytes(instruction: Instruction) -> bytes:
    """Canonical bytes of what an instruction has beside its name."""
    value = instruction.value
    if instruction.name in ("LOAD_CONST", "LOAD_SMALL_INT", "RETURN_CONST", "KW_NAMES") or type(value) in (str, tuple):
        return constant_bytes(value)
    return b"%d" % instruction.arg


# How the names of instructions begin that the next one does not follow.
ENDS = ("RETURN", "RAISE", "RERAISE", "JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACK")


def before_raise(listed: Sequence[Instruction]) -> set[int]:
    """Offsets of instructions that nothing but an exception comes of: on the straight way to where it is raised."""
    found: set[int] = set()
    raises = False
    for one in reversed(listed):
        raises = one.name.startswith("RAISE") or (raises and one.target < 0 and not one.name.startswith(ENDS))
        if raises:
            found.add(one.offset)
    return found
