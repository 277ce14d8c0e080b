"""Reads a code object: follows the values on its stack as far as it must to tell what it reads from outside itself."""

from __future__ import annotations

import dis
import functools
import hashlib
import types
from collections.abc import Mapping

from torchcache.identity.bytecode import (
    ENDS,
    Instruction,
    argument_bytes,
    before_raise,
    constant_bytes,
    instructions,
    key_of,
)
from torchcache.identity.found import Found
from torchcache.identity.reads import (
    DISPLAYS,
    FORMATS,
    GETTERS,
    LOOKUPS,
    MUTATORS,
    READERS,
    READERS_OF_GLOBALS,
    SETTERS,
    Chain,
    Reads,
    closed_over,
    watched,
)
from torchcache.identity.symbols import (
    NOTHING,
    UNKNOWN,
    Value,
    bare,
    chains,
    is_modulo,
    items_of,
    joined,
    mutated,
    rebound,
    use_of,
)

# By these, variables are found under names that only the running code knows.
_SHOWS = frozenset({"locals", "vars", "dir"})

# So often code is read again where variables hold what is assigned further down; loops that go on are not understood.
MOST_ROUNDS = 5


@functools.lru_cache(maxsize=32768)
def reads_of(code: types.CodeType) -> Reads:
    """What ``code`` reads from outside itself."""
    first = code.co_varnames[0] if code.co_argcount and code.co_varnames else ""
    reader = _read(code, {}, first)
    return reader.found.reads(reader.hash.digest())


def _read(code: types.CodeType, variables: Mapping[str, Value], first: str) -> _Reader:
    for _ in range(MOST_ROUNDS):
        reader = _Reader(code, variables, first)
        reader.run()
        if not (reader.found.dynamic and reader.reassigned):
            return reader
        variables = reader.variables
    reader.found.misused(["scope", "environment", "module"])
    return reader


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
        for name in rebound(code):
            self.variables[name] = self.variables.get(name, NOTHING) | UNKNOWN
        self.found = Found(first)
        self.reassigned = False
        self.stack: list[Value] = []
        self.at: dict[int, list[Value]] = {}
        self.nested: list[types.CodeType] = []
        self.hash = hashlib.blake2b(digest_size=16)
        self.module = ""
        self.iterated: Value = NOTHING
        # What may read anything, by load, and which of the loads are still to be used in a way that is understood.
        self.kinds: list[set[str]] = []
        self.pending: set[int] = set()
        self.keywords = False
        self.ahead: list[Instruction] = []
        self.raises: set[int] = set()

    def run(self) -> None:
        code = self.code
        head = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & ~0x4000000)
        parts = [constant_bytes((head, code.co_varnames[: sum(head[:3])], code.co_freevars))]
        parts.append(getattr(code, "co_exceptiontable", b""))
        ended = False
        previous: Instruction | None = None
        listed = list(instructions(code))
        self.raises = before_raise(listed)
        for index, instruction in enumerate(listed):
            # A jump may lead to an instruction in front that computes nothing.
            for offset in range(listed[index - 1].offset + 2 if index else 0, instruction.offset + 1, 2):
                if offset in self.at:
                    self.stack, ended = list(self.at[offset]) if ended else joined(self.stack, self.at[offset]), False
            value = instruction.value
            if isinstance(value, types.CodeType):
                self.nested.append(value)
                parts.append(b"%d code" % instruction.opcode)
            else:
                parts.append(b"%d " % instruction.opcode + argument_bytes(instruction))
            self.ahead = listed[index + 1 : index + 5]
            following = listed[index + 1] if index + 1 < len(listed) else None
            kept = list(self.stack) if instruction.name.endswith("_OR_POP") else None
            self._step(instruction, following, previous)
            if instruction.target >= 0:
                stack = self.stack if kept is None else kept
                self.at[instruction.target] = joined(self.at.get(instruction.target, stack), stack)
            ended = instruction.name.startswith(ENDS)
            previous = instruction
        self.hash.update(b"\0".join(parts))
        self.found.misused(kind for number in self.pending for kind in self.kinds[number])
        self.found.texts.update(text for text in code.co_consts if type(text) is str and text.isidentifier())
        self.found.note_given(code.co_consts)
        for inner in self.nested:
            self._inside(inner)

    def _inside(self, code: types.CodeType) -> None:
        """Add what nested code reads: it sees this code's variables and its first argument."""
        shadowed = set(code.co_varnames) | set(code.co_cellvars)
        seen = {name: value for name, value in self.variables.items() if name not in shadowed}
        if code.co_varnames[:1] == (".0",):  # a comprehension gets what it runs over
            seen[".0"] = self.iterated
        inner = _read(code, seen, "" if self.first in shadowed else self.first)
        self.hash.update(inner.hash.digest())
        self.found.add(inner.found)

    # The stack machine: operations that move values are followed; any other makes what cannot be told.

    def _take(self, count: int = 1) -> list[Value]:
        """Take values for their attributes, to store them, or for nothing."""
        taken = [self.stack.pop() if self.stack else UNKNOWN for _ in range(count)]
        return taken[::-1]

    def _pop(self, count: int = 1) -> list[Value]:
        """Take values for any other use."""
        for value in (taken := self._take(count)):
            self.found.use(value)
        return taken

    def _step(self, at: Instruction, following: Instruction | None, previous: Instruction | None) -> None:
        name, value, stack = at.name, at.value, self.stack
        if name.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_CLASSDEREF")):
            for variable in value if isinstance(value, tuple) else (value,):
                held = self.variables.setdefault(variable, UNKNOWN if variable != self.first else NOTHING)
                held = held | {("local", variable)} if variable == self.first else held
                stack.append(held) if name == "LOAD_CLOSURE" else self._push(held)
        elif name == "STORE_FAST_LOAD_FAST":
            self._store(value[0], self._take()[0])
            self._push(self.variables.get(value[1], UNKNOWN))
        elif name.startswith("STORE_FAST") or name == "STORE_DEREF":
            for variable in value if isinstance(value, tuple) else (value,):
                self._store(variable, self._take()[0])
                if variable in self.code.co_freevars:
                    self.found.written.add(closed_over(variable))
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
            self.found.names.add(value)
            self._push(frozenset({("attr", value)}))
            if at.arg & 1:
                stack.append(NOTHING)
        elif name == "IMPORT_NAME":
            depth, items = self._pop(2)
            self._import(value, depth, items, following)
        elif name == "IMPORT_FROM":
            self._load(frozenset({("global", self.module, (value,))}), following)
        elif name in ("RETURN_VALUE", "RETURN_CONST"):
            self._pop(len(stack))
        elif name in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME"):
            self.found.written.add(value)
            self._pop({"STORE_ATTR": 2, "DELETE_GLOBAL": 0}.get(name, 1))
        elif name == "STORE_SUBSCR":
            _, container, _ = self._pop(3)
            self.found.written |= mutated(container)
        elif name.startswith("CALL") and "INTRINSIC" not in name:
            self._called(at)
        elif name == "BINARY_SUBSCR" or (name == "BINARY_OP" and value == 26):
            container, key = self._pop(2)
            if self._settle(container, "environment"):
                self.found.read_variable(key)
            listed = any(str(chain).endswith("sys.modules") for chain in chains(container))
            if listed:
                self._settle(container, "module")
            within = frozenset(symbol for symbol in container if symbol[0] == "attr")
            self._push(self.found.read_module(key) if listed else within or UNKNOWN)
        elif name in ("GET_ITER", "NOP", "PUSH_EXC_INFO", "LIST_TO_TUPLE", "COPY_FREE_VARS", "MAKE_CELL", "KW_NAMES"):
            if name == "PUSH_EXC_INFO":
                stack.append(UNKNOWN)
            self.keywords |= name == "KW_NAMES"
            if name == "GET_ITER" and stack:
                self.found.use(stack[-1])
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
            stack.append(frozenset().union(*parts) if parts else UNKNOWN)
        elif name in ("COPY", "DUP_TOP"):
            place = at.arg if name == "COPY" else 1
            self._push(stack[-place] if len(stack) >= place else UNKNOWN)
        elif name == "SWAP" and len(stack) >= at.arg:
            stack[-at.arg], stack[-1] = stack[-1], stack[-at.arg]
        elif name == "PUSH_NULL":
            stack.append(NOTHING)
        elif name in ("POP_TOP", "IS_OP") or name.endswith("_NONE"):
            self._take(1 + (name == "IS_OP"))
            stack.extend([UNKNOWN] * (name == "IS_OP"))
        elif name == "MATCH_CLASS":
            self._match(at)
        elif name == "CONTAINS_OP":
            key, container = self._pop(2)
            if self._settle(container, "environment"):
                self.found.read_variable(key)
            stack.append(UNKNOWN)
        else:
            modulo = name == "BINARY_MODULO" or is_modulo(at)
            if name.startswith("FORMAT") or name == "CONVERT_VALUE" or modulo:
                text = not (modulo or at.offset in self.raises)
                self.found.read_whole(stack[-1] if stack else UNKNOWN, display=True, text=text)
            self._other(at)

    def _match(self, at: Instruction) -> None:
        """A class pattern reads attributes by the names in it, and by those that the class lists."""
        *_, names = self._pop(3)
        for symbol in names:
            if symbol[0] == "const" and isinstance(symbol[1], tuple):
                self.found.names.update(map(str, symbol[1]))
                self.found.used.update(map(str, symbol[1]))
        if at.arg:
            self.found.names.add("__match_args__")
            self.found.anything = self.found.dynamic = True
        self.stack.extend([UNKNOWN] * max(0, 3 + dis.stack_effect(at.opcode, at.arg)))

    def _other(self, at: Instruction) -> None:
        """An operation that takes and makes what is not followed."""
        has_argument = at.opcode >= dis.HAVE_ARGUMENT
        try:
            effect = dis.stack_effect(at.opcode, at.arg if has_argument else None, jump=False)
        except ValueError:
            effect = 0
        self._pop(max(0, -effect))
        if self.stack and not at.name.startswith(("POP_", "DELETE_", "JUMP")):
            self.found.use(self.stack[-1])
            self.stack[-1] = UNKNOWN
        self.stack.extend([UNKNOWN] * max(0, effect))

    def _push(self, value: Value) -> None:
        """Push what is loaded; what may read anything is to be used in a way that is understood."""
        kinds = {kind for kind in map(watched, value) if kind}
        if kinds:
            number = len(self.kinds)
            self.kinds.append(kinds)
            self.pending.add(number)
            value = frozenset((*symbol, number) if watched(symbol) else symbol for symbol in bare(value))
        self.stack.append(value)

    def _settle(self, value: Value, *kinds: str) -> bool:
        """Whether this is, surely, one thing of such a kind that was loaded to be used as it now is."""
        number = use_of(value)
        if number < 0 or not self.kinds[number].issubset(kinds):
            return False
        self.pending.discard(number)
        return True

    def _store(self, variable: str, value: Value) -> None:
        if _SHOWS.isdisjoint(self.code.co_names):
            self._settle(value, "getter", "scope", "environment", "module")
        known, value = self.variables.get(variable, NOTHING), bare(value)
        if known and not value <= known:
            self.reassigned = True
            self.found.use(value)  # where it was loaded before, what was done with it
        self.variables[variable] = known | value

    def _load(self, value: Value, following: Instruction | None) -> None:
        """Push a global; it is read as such unless an attribute of it is taken at once."""
        self._push(value)
        if following is None or following.name not in ("LOAD_ATTR", "LOAD_METHOD"):
            self.found.note(value)

    def _import(self, name: str, depth: Value, items: Value, following: Instruction | None) -> None:
        level = next((symbol[1] for symbol in depth if symbol[0] == "const"), 0)
        dotted = "." * int(level) + name
        listed = next((symbol[1] for symbol in items if symbol[0] == "const"), None)
        self.module = dotted
        whole = listed is not None or not name
        self.stack.append(frozenset({("global", dotted if whole else name.partition(".")[0], ())}))
        self.found.loads.setdefault(Chain(dotted, ()), 0)
        if following is None or not following.name.startswith("IMPORT_FROM"):
            self.found.note(self.stack[-1])

    def _attribute(self, name: str, at: Instruction, following: Instruction | None) -> None:
        (owner,) = self._take()
        globals_ = {symbol for symbol in owner if symbol[0] == "global"}
        if globals_ != owner or not owner:
            self.found.read_attribute(name, key_of(self.ahead))
        self.found.read_name(name, owner)
        if name == "__dict__":
            self.stack.append(owner or UNKNOWN)
            return
        found = {(*symbol[:2], (*symbol[2], name)) for symbol in globals_}
        if globals_ != owner or not owner:
            found.add(("attr", name))
        if name == "get":
            self._settle(owner, "module")
        if name in LOOKUPS and self._settle(owner, "environment"):
            self.found.note(frozenset(found))
            found = {("lookup",)}
        method = at.name == "LOAD_METHOD" or (at.name == "LOAD_ATTR" and dis.stack_effect(at.opcode, at.arg) == 1)
        self._load(frozenset(found), following)
        if method:
            self.stack.append(owner)

    def _called(self, at: Instruction) -> None:
        """A call of any kind: its callee is the last but one or two values below the arguments."""
        name = at.name
        callees = 2 if name in ("CALL", "CALL_KW", "CALL_METHOD") else 1
        if name in ("CALL_KW", "CALL_FUNCTION_KW"):
            self._pop()
        if name == "CALL_FUNCTION_EX":
            effect = -dis.stack_effect(at.opcode, at.arg, jump=False)
            given = self._pop(1 + (at.arg & 1)) if effect < 4 else self._pop(2)
            callees = max(1, effect + 1 - len(given))
            callees = 2 if dis.opmap.get("PUSH_NULL") else callees
        else:
            given = self._pop(at.arg)
        below = self._pop(callees)
        callee = next((value for value in below if value), UNKNOWN)
        receiver = below[-1] if len(below) == 2 and below[0] and below[-1] and below[0] != below[-1] else NOTHING
        keywords, self.keywords = self.keywords or name in ("CALL_KW", "CALL_FUNCTION_KW"), False
        if not keywords and name != "CALL_FUNCTION_EX" and self._settle(callee, "environment"):
            self.found.read_variable(given[0] if given else UNKNOWN)
        self._push(self._result(callee, receiver, given))

    def _result(self, callee: Value, receiver: Value, given: list[Value]) -> Value:
        self.found.passed_on(callee, given)
        self._settle(callee, "getter", "scope", "module")
        for symbol in callee:
            if symbol[0] == "attr" and symbol[1] in GETTERS and self.code.co_name not in GETTERS:
                return self.found.read_access(symbol[1], [receiver or UNKNOWN, *given])
            if symbol[0] == "attr" and symbol[1] in SETTERS:
                self.found.read_access(symbol[1], given)
            if symbol[0] == "attr" and symbol[1] in MUTATORS:
                self.found.written |= mutated(receiver)
            if symbol[0] == "attr" and symbol[1] in FORMATS:
                for value in given:
                    self.found.read_whole(value, display=True)
        for chain in chains(callee):
            last = chain.names[-1] if chain.names else chain.module
            if last in MUTATORS and len(chain.names) > 1:
                self.found.written.add(chain.names[-2])
            first = given[0] if given else None
            if last in (*GETTERS, *SETTERS, "hasattr") and first is not None:
                return self.found.read_access(last, given)
            if last in ("import_module", "__import__") or str(chain).endswith("sys.modules.get"):
                return self.found.read_module(first or NOTHING, top=last == "__import__")
            if last == "resolve_name" or (*chain.module.split("."), *chain.names)[-2:] == ("pydoc", "locate"):
                return self.found.read_module(UNKNOWN)
            if last in ("attrgetter", "methodcaller"):
                self.found.read_paths(given)
            elif last in FORMATS and len(chain.names) > 1:
                for value in given:
                    self.found.read_whole(value, display=True)
            elif last in ("globals", "locals", "eval", "exec", "_getframe", "currentframe"):
                self.found.scope = self.found.scope or last != "locals"
                self.found.anything = self.found.dynamic = self.found.anything or last in ("eval", "exec")
            elif (
                last in READERS
                and first is not None
                and (len(chain.names) > 1 or last in READERS_OF_GLOBALS or chain.module or READERS[last])
            ):
                for value in given if last == "print" else (first,):
                    self.found.read_whole(value, deep=READERS[last], display=last in DISPLAYS)
                if last == "vars":
                    return first
            elif last in ("isinstance", "issubclass", "super"):
                for value in given[1:] if last != "super" else given[:1]:
                    for named in chains(value):
                        self.found.typed[named] = self.found.typed.get(named, 0) + 1
            elif len(chain.names) > 1 or chain.module or given:
                attributes = frozenset(symbol[1] for value in given for symbol in value if symbol[0] == "attr")
                whole_first = any(("local", self.first) in value for value in given) and bool(self.first)
                if attributes or whole_first:
                    self.found.handed.add((chain, attributes, whole_first))
        return UNKNOWN
