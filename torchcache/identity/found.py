"""What a code object was found to read, while it is read, and what of it is still to be understood."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torchcache.identity.reads import (
    ANY,
    DELETERS,
    DISPLAYS,
    ENVIRONMENT,
    SCOPES,
    SETTERS,
    WHOLES,
    Chain,
    Reads,
    modules_named,
    watched,
)
from torchcache.identity.symbols import DISPLAYED, UNKNOWN, Symbol, Value, chains


@dataclasses.dataclass
class Found:
    """The fields of ``Reads`` that grow; code nested in code adds to them.

    Attributes
    ----------
    first : str
        The first argument, whose object is that of the method.
    loads, typed : dict of Chain to int
        How often each is loaded, and how often only to be asked for as a type.
    anything, scope, environment, modules, scopes : bool
        See ``Reads``.
    dynamic : bool
        Whether it matters what variables hold: then all that is ever assigned to them counts.
    """

    first: str
    names: set[str] = dataclasses.field(default_factory=set)
    used: set[str] = dataclasses.field(default_factory=set)
    items: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    written: set[str] = dataclasses.field(default_factory=set)
    texts: set[str] = dataclasses.field(default_factory=set)
    loads: dict[Chain, int] = dataclasses.field(default_factory=dict)
    typed: dict[Chain, int] = dataclasses.field(default_factory=dict)
    whole: set[str] = dataclasses.field(default_factory=set)
    deep: set[str] = dataclasses.field(default_factory=set)
    whole_chains: set[Chain] = dataclasses.field(default_factory=set)
    handed: set[tuple[Chain, frozenset[str], bool]] = dataclasses.field(default_factory=set)
    variables: set[str] = dataclasses.field(default_factory=set)
    keys: set[Chain] = dataclasses.field(default_factory=set)
    used_first: bool = False
    whole_first: bool = False
    anything: bool = False
    scope: bool = False
    environment: bool = False
    modules: bool = False
    scopes: bool = False
    dynamic: bool = False
    searched: set[str] = dataclasses.field(default_factory=set)
    given: set[str] = dataclasses.field(default_factory=set)

    def add(self, inner: Found) -> None:
        """Add what nested code reads."""
        for mine, its in ((self.loads, inner.loads), (self.typed, inner.typed)):
            for chain, count in its.items():
                mine[chain] = mine.get(chain, 0) + count
        for (
            name
        ) in "names used items written texts whole deep whole_chains handed variables keys searched given".split():
            getattr(self, name).update(getattr(inner, name))
        for name in ("used_first", "whole_first", "anything", "scope", "environment", "modules", "scopes"):
            setattr(self, name, getattr(self, name) or getattr(inner, name))

    def reads(self, digest: bytes) -> Reads:
        """All of it, as it is known at the end."""
        return Reads(
            digest,
            frozenset(self.names),
            frozenset(self.used),
            self.used_first,
            frozenset(self.items),
            tuple(sorted(self.loads)),
            frozenset(chain for chain, count in self.typed.items() if self.loads.get(chain, 0) <= count),
            frozenset(self.whole),
            frozenset(self.deep),
            frozenset(self.whole_chains),
            self.whole_first,
            self.anything,
            self.scope,
            tuple(sorted(self.handed, key=lambda call: (call[0], sorted(call[1]), call[2]))),
            frozenset(self.written),
            frozenset(self.texts),
            frozenset(self.variables),
            frozenset(self.keys),
            self.environment,
            self.modules,
            self.scopes,
            frozenset(self.searched),
            frozenset(self.given),
        )

    def note_given(self, constants: Iterable[Any]) -> None:
        """Note texts among constants, in tuples as well: those of keywords are."""
        for constant in constants:
            if type(constant) is str and constant.isidentifier():
                self.given.add(constant)
            elif type(constant) in (tuple, frozenset):
                self.note_given(constant)

    def note(self, value: Value) -> None:
        """A global is loaded."""
        for chain in chains(value):
            self.loads[chain] = self.loads.get(chain, 0) + 1

    def use(self, value: Value) -> None:
        """A value is used for more than to take an attribute of it."""
        for symbol in value:
            if symbol[0] == "attr":
                self.used.add(symbol[1])
            elif symbol[0] == "global" and symbol[2]:
                self.used.add(symbol[2][-1])
            elif symbol[0] == "local" and symbol[1] == self.first:
                self.used_first = True

    def read_whole(self, value: Value, deep: bool = False, display: bool = False, text: bool = True) -> None:
        """Note an object that is read under names which are not known; for ``display``, which may make a ``text``."""
        for symbol in value or UNKNOWN:
            if symbol[0] == "attr" and (display or not symbol[1].startswith("__")):  # no namespace has __class__
                (self.deep if deep else self.whole).add(symbol[1])
                self.searched |= set() if display else {symbol[1]}
            elif symbol[0] == "global":
                self.whole_chains.add(Chain(symbol[1], symbol[2]))
            elif symbol[0] == "local" and symbol[1] == self.first:
                self.whole_first = self.dynamic = True
            elif symbol[0] != "const" and display:
                self.names |= DISPLAYED if text else frozenset()  # the methods of whatever class it is of
            elif symbol[0] != "const":
                self.anything = self.dynamic = True

    def read_variable(self, key: Value) -> None:
        """Note that an environment variable is read, under this name."""
        self.dynamic = True
        for symbol in key or UNKNOWN:
            if symbol[0] == "const" and type(symbol[1]) is str:
                self.variables.add(symbol[1])
            elif symbol[0] == "global" and len(symbol[2]) == 1:
                self.keys.add(Chain(symbol[1], symbol[2]))
            else:
                self.environment = True

    def misused(self, kinds: Iterable[str]) -> None:
        """What may read anything was loaded for something else than a call that is understood."""
        for kind in kinds:
            self.environment |= kind == "environment"
            self.modules |= kind == "module"
            self.scope |= kind == "scope"
            self.anything |= kind in ("getter", "scope")

    def read_attribute(self, name: str, key: str | None) -> None:
        """Note an attribute of any object; where only one of its items is taken, under which key."""
        if key is None or name.startswith(("_", "f_")) or watched(("attr", name)):
            self.names.add(name)
        else:
            self.items.add((name, key))

    def read_name(self, name: str, owner: Value) -> None:
        """Note an attribute by which much more is read than it names."""
        if name in WHOLES:
            self.note(owner)
            self.read_whole(owner)
        self.scopes |= name in SCOPES
        self.anything |= name in SCOPES

    def read_access(self, how: str, given: list[Value]) -> Value:
        """``getattr`` and the like: one name where that is a constant, else the whole object."""
        texts = {symbol[1] for symbol in given[1] if symbol[0] == "const"} if len(given) > 1 else set()
        constant = len(given) > 1 and bool(texts) and all(symbol[0] == "const" for symbol in given[1])
        if how in SETTERS:
            place = -1 if how in DELETERS else -2
            name = given[place] if len(given) >= -place else UNKNOWN
            self.written |= {str(symbol[1]) if symbol[0] == "const" else ANY for symbol in name} or {ANY}
            return UNKNOWN
        self.dynamic = True
        if not constant:
            self.read_whole(given[0])
            return UNKNOWN
        self.names.update(map(str, texts))
        found: set[Symbol] = {("attr", str(text)) for text in texts}
        for text in texts:
            self.read_name(str(text), given[0])
            found.update(("global", chain.module, (*chain.names, str(text))) for chain in chains(given[0]))
        self.note(frozenset(found))
        return frozenset(found)

    def read_paths(self, given: list[Value]) -> None:
        """``attrgetter`` and ``methodcaller``: what they read by constants, of objects that are not known."""
        texts = [symbol[1] for value in given for symbol in value if symbol[0] == "const"]
        for name in [part for text in texts for part in str(text).split(".")]:
            self.names.add(name)
            self.used.add(name)
            self.read_name(name, UNKNOWN)
            self.environment |= name in ENVIRONMENT
        if len(texts) < len(given):
            self.anything = self.dynamic = True

    def passed_on(self, callee: Value, given: list[Value]) -> None:
        """Functions that make texts, given to another that calls them with the other arguments."""
        if any(chain.names[-1:] in (("isinstance",), ("issubclass",)) for chain in chains(callee)):
            return
        for place, value in enumerate(given):
            if any(len(chain.names) == 1 and chain.names[0] in DISPLAYS for chain in chains(value)):
                for other in (*given[:place], *given[place + 1 :]):
                    self.read_whole(other, display=True)

    def read_module(self, name: Value, top: bool = False) -> Value:
        """A module that is taken by its name."""
        self.dynamic = True
        if name == frozenset({("global", "", ("__name__",))}):
            self.scope = True
        elif not name or any(symbol[0] != "const" for symbol in name):
            self.modules = True
        return modules_named(name, top) or UNKNOWN
