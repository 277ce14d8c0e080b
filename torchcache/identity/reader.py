"""Reads a code object: follows the values on its stack as far as it must to tell what it reads from outside itself."""

from __future__ import annotations

import dis
import functools
import hashlib
import types
from collections.abc import Mapping

from torchcache.identity.bytecode import Instruction, argument_bytes, constant_bytes, instructions
from torchcache.identity.reads import (
    DISPLAYS,
    GETTERS,
    MUTATORS,
    READERS,
    READERS_OF_GLOBALS,
    Chain,
    Reads,
    closed_over,
    modules_named,
)
from torchcache.identity.symbols import NOTHING, UNKNOWN, Symbol, Value, chains, is_modulo, items_of, mutated

__all__ = ["reads_of"]


@functools.lru_cache(maxsize=32768)
def reads_of(code: types.CodeType) -> Reads:
    """What ``code`` reads from outside itself."""
    reader = _Reader(code, {}, _first(code))
    reader.run()
    if reader.dynamic and reader.reassigned:  # a loop may read what is assigned further down
        again = _Reader(code, reader.variables, _first(code))
        again.run()
        reader = again
    return reader.result()


def _first(code: types.CodeType) -> str:
    return code.co_varnames[0] if code.co_argcount and code.co_varnames else ""


class _Reader:
    """Runs over the instructions once, with a stack of what each value may come from."""

    def __init__(self, code: types.CodeType, variables: Mapping[str, Value], first: str) -> None:
        self.code, self.first = code, first
        self.variables: dict[str, Value] = dict(variables)
        arguments = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        for name in code.co_varnames[:arguments]:
            self.variables.setdefault(name, frozenset({("local", name)}))
        for name in code.co_freevars:
            self.variables.setdefault(name, frozenset({("free", name)}))
        self.names: set[str] = set()
        self.written: set[str] = set()
        self.texts: set[str] = set()
        self.loads: dict[Chain, int] = {}
        self.typed: dict[Chain, int] = {}
        self.whole: set[str] = set()
        self.deep: set[str] = set()
        self.whole_chains: set[Chain] = set()
        self.handed: set[tuple[Chain, frozenset[str], bool]] = set()
        self.whole_first = self.anything = self.scope = self.reassigned = self.dynamic = False
        self.stack: list[Value] = []
        self.at: dict[int, list[Value]] = {}
        self.nested: list[types.CodeType] = []
        self.hash = hashlib.blake2b(digest_size=16)
        self.module = ""
        self.iterated: Value = NOTHING

    def run(self) -> None:
        code = self.code
        head = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & ~0x4000000)
        parts = [constant_bytes((head, code.co_varnames[: sum(head[:3])], code.co_freevars))]
        parts.append(getattr(code, "co_exceptiontable", b""))
        ended = False
        previous: Instruction | None = None
        listed = list(instructions(code))
        for index, instruction in enumerate(listed):
            if (saved := self.at.get(instruction.offset)) is not None:
                if ended:
                    self.stack = list(saved)
                elif len(saved) == len(self.stack):
                    self.stack = [one | other for one, other in zip(saved, self.stack, strict=True)]
            value = instruction.value
            if isinstance(value, types.CodeType):
                self.nested.append(value)
                parts.append(b"%d code" % instruction.opcode)
            else:
                parts.append(b"%d " % instruction.opcode + argument_bytes(instruction))
            following = listed[index + 1] if index + 1 < len(listed) else None
            self._step(instruction, following, previous)
            if instruction.target >= 0:
                self.at.setdefault(instruction.target, list(self.stack))
            ended = instruction.name.startswith(
                ("RETURN", "RAISE", "RERAISE", "JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACK")
            )
            previous = instruction
        self.hash.update(b"\0".join(parts))
        self.texts.update(text for text in code.co_consts if type(text) is str and text.isidentifier())
        for inner in self.nested:
            self._inside(inner)

    def result(self) -> Reads:
        types_only = {chain for chain, count in self.typed.items() if self.loads.get(chain, 0) <= count}
        return Reads(
            self.hash.digest(),
            frozenset(self.names),
            tuple(sorted(self.loads)),
            frozenset(types_only),
            frozenset(self.whole),
            frozenset(self.deep),
            frozenset(self.whole_chains),
            self.whole_first,
            self.anything,
            self.scope,
            tuple(sorted(self.handed, key=lambda call: (call[0], sorted(call[1]), call[2]))),
            frozenset(self.written),
            frozenset(self.texts),
        )

    def _inside(self, code: types.CodeType) -> None:
        """Add what nested code reads: it sees this code's variables and its first argument."""
        shadowed = set(code.co_varnames) | set(code.co_cellvars)
        seen = {name: value for name, value in self.variables.items() if name not in shadowed}
        if code.co_varnames[:1] == (".0",):  # a comprehension gets what it runs over
            seen[".0"] = self.iterated
        inner = _Reader(code, seen, "" if self.first in shadowed else self.first)
        inner.run()
        self.hash.update(inner.hash.digest())
        self.names |= inner.names
        self.written |= inner.written
        self.texts |= inner.texts
        for mine, found in ((self.loads, inner.loads), (self.typed, inner.typed)):
            for chain, count in found.items():
                mine[chain] = mine.get(chain, 0) + count
        self.whole |= inner.whole
        self.deep |= inner.deep
        self.whole_chains |= inner.whole_chains
        self.handed |= inner.handed
        self.whole_first |= inner.whole_first
        self.anything |= inner.anything
        self.scope |= inner.scope

    # The stack machine: operations that move values are followed; any other makes what cannot be told.

    def _pop(self, count: int = 1) -> list[Value]:
        taken = [self.stack.pop() if self.stack else UNKNOWN for _ in range(count)]
        return taken[::-1]

    def _step(self, at: Instruction, following: Instruction | None, previous: Instruction | None) -> None:
        name, value, stack = at.name, at.value, self.stack
        if name.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_CLASSDEREF")):
            for variable in value if isinstance(value, tuple) else (value,):
                stack.append(self.variables.get(variable, UNKNOWN if variable != self.first else NOTHING))
                if variable == self.first:
                    stack[-1] |= {("local", variable)}
        elif name == "STORE_FAST_LOAD_FAST":
            self._store(value[0], self._pop()[0])
            stack.append(self.variables.get(value[1], UNKNOWN))
        elif name.startswith("STORE_FAST") or name == "STORE_DEREF":
            for variable in value if isinstance(value, tuple) else (value,):
                self._store(variable, self._pop()[0])
                if variable in self.code.co_freevars:
                    self.written.add(closed_over(variable))
        elif name in ("LOAD_CONST", "LOAD_SMALL_INT"):
            stack.append(frozenset({("const", value)}) if type(value) in (str, int, tuple) else UNKNOWN)
        elif name in ("LOAD_GLOBAL", "LOAD_NAME"):
            if name == "LOAD_GLOBAL" and at.arg & 1 and dis.stack_effect(at.opcode, at.arg) == 2:
                stack.append(NOTHING)
            self._load(frozenset({("global", "", (value,))}), following)
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            self._attribute(value, at, following)
        elif name == "LOAD_SUPER_ATTR":
            self._pop(3)
            self.names.add(value)
            stack.append(frozenset({("attr", value)}))
            if at.arg & 1:
                stack.append(NOTHING)
        elif name == "IMPORT_NAME":
            depth, items = self._pop(2)
            self._import(value, depth, items, following)
        elif name == "IMPORT_FROM":
            self._load(frozenset({("global", self.module, (value,))}), following)
        elif name == "RETURN_VALUE":
            self._put_away(self._pop())
        elif name in ("STORE_ATTR", "DELETE_ATTR"):
            self.written.add(value)
            self._pop(2 if name == "STORE_ATTR" else 1)
        elif name in ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME"):
            self.written.add(value)
            self._pop(0 if name == "DELETE_GLOBAL" else 1)
        elif name == "STORE_SUBSCR":
            _, container, _ = self._pop(3)
            self.written |= mutated(container)
        elif name.startswith("CALL"):
            self._called(at)
        elif name == "BINARY_SUBSCR" or (name == "BINARY_OP" and value == 26):
            container, key = self._pop(2)
            listed = any(str(chain).endswith("sys.modules") for chain in chains(container))
            found = modules_named(key) if listed else {symbol for symbol in container if symbol[0] == "attr"}
            stack.append(frozenset(found) or UNKNOWN)
        elif name in ("GET_ITER", "NOP", "PUSH_EXC_INFO", "LIST_TO_TUPLE", "COPY_FREE_VARS", "MAKE_CELL", "KW_NAMES"):
            if name == "PUSH_EXC_INFO":
                stack.append(UNKNOWN)
            if name == "GET_ITER" and stack:
                self.iterated |= stack[-1]
        elif name == "FOR_ITER":
            stack.append(items_of(stack[-1]) if stack else UNKNOWN)
        elif name in ("LIST_EXTEND", "LIST_APPEND", "SET_UPDATE", "SET_ADD", "DICT_UPDATE", "DICT_MERGE"):
            (more,) = self._pop()
            if len(stack) >= at.arg:
                stack[-at.arg] = stack[-at.arg] | more
        elif name in ("UNPACK_SEQUENCE", "UNPACK_EX"):
            (group,) = self._pop()
            stack.extend([items_of(group)] * (1 + dis.stack_effect(at.opcode, at.arg, jump=False)))
        elif name in ("BUILD_TUPLE", "BUILD_LIST", "BUILD_SET", "BUILD_MAP"):
            parts = self._pop(at.arg * (2 if name == "BUILD_MAP" else 1))
            self._put_away(parts)
            stack.append(frozenset().union(*parts) if parts else UNKNOWN)
        elif name in ("COPY", "DUP_TOP"):
            place = at.arg if name == "COPY" else 1
            stack.append(stack[-place] if len(stack) >= place else UNKNOWN)
        elif name == "SWAP" and len(stack) >= at.arg:
            stack[-at.arg], stack[-1] = stack[-1], stack[-at.arg]
        elif name == "PUSH_NULL":
            stack.append(NOTHING)
        elif name == "MATCH_CLASS":
            self._match(at)
        else:
            if name.startswith("FORMAT") or name in ("CONVERT_VALUE", "BINARY_MODULO") or is_modulo(at):
                self._read_whole(stack[-1] if stack else UNKNOWN, deep=False, display=True)
            self._other(at)

    def _match(self, at: Instruction) -> None:
        """A class pattern reads attributes by the names in it, and by those that the class lists."""
        *_, names = self._pop(3)
        for symbol in names:
            if symbol[0] == "const" and isinstance(symbol[1], tuple):
                self.names.update(map(str, symbol[1]))
        if at.arg:
            self.names.add("__match_args__")
            self.anything = self.dynamic = True
        self.stack.extend([UNKNOWN] * max(0, 3 + dis.stack_effect(at.opcode, at.arg)))

    def _other(self, at: Instruction) -> None:
        """An operation that takes and makes what is not followed."""
        has_argument = at.opcode >= dis.HAVE_ARGUMENT
        try:
            effect = dis.stack_effect(at.opcode, at.arg if has_argument else None, jump=False)
        except ValueError:
            effect = 0
        self._pop(max(0, -effect))
        if self.stack and not at.name.startswith(("POP_", "DELETE_")):
            self.stack[-1] = UNKNOWN
        self.stack.extend([UNKNOWN] * max(0, effect))

    def _store(self, variable: str, value: Value) -> None:
        known = self.variables.get(variable, NOTHING)
        self.reassigned |= bool(known) and not value <= known
        self.variables[variable] = known | value

    def _load(self, value: Value, following: Instruction | None) -> None:
        """Push a global; it is read as such unless an attribute of it is taken at once."""
        self.stack.append(value)
        if following is None or following.name not in ("LOAD_ATTR", "LOAD_METHOD"):
            self._note(value)

    def _note(self, value: Value) -> None:
        for chain in chains(value):
            self.loads[chain] = self.loads.get(chain, 0) + 1

    def _import(self, name: str, depth: Value, items: Value, following: Instruction | None) -> None:
        level = next((symbol[1] for symbol in depth if symbol[0] == "const"), 0)
        dotted = "." * int(level) + name
        listed = next((symbol[1] for symbol in items if symbol[0] == "const"), None)
        self.module = dotted
        whole = listed is not None or not name
        self.stack.append(frozenset({("global", dotted if whole else name.partition(".")[0], ())}))
        self.loads.setdefault(Chain(dotted, ()), 0)
        if following is None or not following.name.startswith("IMPORT_FROM"):
            self._note(self.stack[-1])

    def _attribute(self, name: str, at: Instruction, following: Instruction | None) -> None:
        (owner,) = self._pop()
        globals_ = {symbol for symbol in owner if symbol[0] == "global"}
        if globals_ != owner or not owner:
            self.names.add(name)
        if name == "__dict__":
            self._read_whole(owner, deep=False)
            self.stack.append(owner or UNKNOWN)
            return
        found = {(*symbol[:2], (*symbol[2], name)) for symbol in globals_}
        if globals_ != owner or not owner:
            found.add(("attr", name))
        method = at.name == "LOAD_METHOD" or (at.name == "LOAD_ATTR" and dis.stack_effect(at.opcode, at.arg) == 1)
        self._load(frozenset(found), following)
        if method:
            self.stack.append(owner)

    def _called(self, at: Instruction) -> None:
        """A call of any kind: its callee is the last but one or two values below the arguments."""
        name, count = at.name, at.arg
        if name in ("CALL_INTRINSIC_1", "CALL_INTRINSIC_2"):
            self._pop(int(name[-1]))
            self.stack.append(UNKNOWN)
            return
        callees = 2 if name in ("CALL", "CALL_KW", "CALL_METHOD") else 1
        if name in ("CALL_KW", "CALL_FUNCTION_KW"):
            self._pop()
        if name == "CALL_FUNCTION_EX":
            effect = -dis.stack_effect(at.opcode, at.arg, jump=False)
            given = self._pop(1 + (at.arg & 1)) if effect < 4 else self._pop(2)
            callees = max(1, effect + 1 - len(given))
            callees = 2 if dis.opmap.get("PUSH_NULL") else callees
        else:
            given = self._pop(count)
        below = self._pop(callees)
        callee = next((value for value in below if value), UNKNOWN)
        receiver = below[-1] if len(below) == 2 and below[0] and below[-1] and below[0] != below[-1] else NOTHING
        self.stack.append(self._result(callee, receiver, given))

    def _result(self, callee: Value, receiver: Value, given: list[Value]) -> Value:
        self._passed_on(callee, given)
        for symbol in callee:
            if symbol[0] == "attr" and symbol[1] in GETTERS and self.code.co_name not in GETTERS:
                return self._named_access(symbol[1], [receiver or UNKNOWN, *given])
            if symbol[0] == "attr" and symbol[1] in MUTATORS:
                self.written |= mutated(receiver)
            if symbol[0] == "attr" and symbol[1] in ("format", "format_map"):
                for value in given:
                    self._read_whole(value, deep=False, display=True)
        for chain in chains(callee):
            last = chain.names[-1] if chain.names else chain.module
            if last in MUTATORS and len(chain.names) > 1:
                self.written.add(chain.names[-2])
            first = given[0] if given else None
            if last in (*GETTERS, "hasattr", "delattr", "setattr") and first is not None:
                return self._named_access(last, given)
            if last in ("import_module", "__import__") or str(chain).endswith("sys.modules.get"):
                return modules_named(first or NOTHING, top=last == "__import__") or UNKNOWN
            if last in ("attrgetter", "methodcaller"):
                texts = [symbol[1] for value in given for symbol in value if symbol[0] == "const"]
                self.names.update(part for text in texts for part in str(text).split("."))
                if len(texts) < len(given):
                    self.anything = self.dynamic = True
            elif last in ("globals", "locals", "eval", "exec", "_getframe", "currentframe"):
                self.scope = self.scope or last != "locals"
                self.anything = self.dynamic = self.anything or last in ("eval", "exec")
            elif (
                last in READERS
                and first is not None
                and (len(chain.names) > 1 or last in READERS_OF_GLOBALS or chain.module or READERS[last])
            ):
                for value in given if last == "print" else (first,):
                    self._read_whole(value, deep=READERS[last], display=last in DISPLAYS)
                if last == "vars":
                    return first
            elif last in ("isinstance", "issubclass", "super"):
                for value in given[1:] if last != "super" else given[:1]:
                    for named in chains(value):
                        self.typed[named] = self.typed.get(named, 0) + 1
            elif len(chain.names) > 1 or chain.module or given:
                attributes = frozenset(symbol[1] for value in given for symbol in value if symbol[0] == "attr")
                whole_first = any(("local", self.first) in value for value in given) and bool(self.first)
                if attributes or whole_first:
                    self.handed.add((chain, attributes, whole_first))
        return UNKNOWN

    def _put_away(self, values: list[Value]) -> None:
        """Functions that read by names only the running code knows, kept where they are found under other names."""
        lasts = {chain.names[-1] for value in values for chain in chains(value) if chain.names}
        if not lasts.isdisjoint(GETTERS | {"attrgetter", "methodcaller"}):
            self.anything = self.dynamic = True

    def _passed_on(self, callee: Value, given: list[Value]) -> None:
        """Functions that read by names only the running code knows, given to another that calls them."""
        if any(chain.names and chain.names[-1] in ("isinstance", "issubclass") for chain in chains(callee)):
            return
        for place, value in enumerate(given):
            for chain in chains(value):
                last = chain.names[-1] if chain.names else ""
                if last in GETTERS:
                    self.anything = self.dynamic = True
                elif last in DISPLAYS and len(chain.names) == 1:
                    for other in (*given[:place], *given[place + 1 :]):
                        self._read_whole(other, deep=False, display=True)

    def _named_access(self, how: str, given: list[Value]) -> Value:
        """``getattr`` and the like: one name where that is a constant, else the whole object."""
        texts = {symbol[1] for symbol in given[1] if symbol[0] == "const"} if len(given) > 1 else set()
        constant = len(given) > 1 and bool(texts) and all(symbol[0] == "const" for symbol in given[1])
        if how in ("setattr", "delattr"):
            self.written.update(map(str, texts))
            return UNKNOWN
        if not constant:
            self._read_whole(given[0], deep=False)
            return UNKNOWN
        self.names.update(map(str, texts))
        found: set[Symbol] = {("attr", str(text)) for text in texts}
        for chain in chains(given[0]):
            for text in texts:
                longer = Chain(chain.module, (*chain.names, str(text)))
                self.loads[longer] = self.loads.get(longer, 0) + 1
        return frozenset(found)

    def _read_whole(self, value: Value, deep: bool, display: bool = False) -> None:
        """Note an object that is read under names which are not known."""
        for symbol in value or UNKNOWN:
            if symbol[0] == "attr":
                (self.deep if deep else self.whole).add(symbol[1])
            elif symbol[0] == "global":
                self.whole_chains.add(Chain(symbol[1], symbol[2]))
            elif symbol[0] == "local" and symbol[1] == self.first:
                self.whole_first = self.dynamic = True
            elif symbol[0] != "const" and not display:
                self.anything = self.dynamic = True
