"""What a code object was found to read, while it is read, and what of it is still to be understood."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torchcache.identity.reads import Chain, Reads
from torchcache.identity.symbols import UNKNOWN, Value, chains

__all__ = ["Found"]


@dataclasses.dataclass
class Found:
    """The fields of ``Reads`` that grow; code nested in code adds to them.

    Attributes
    ----------
    first : str
        The first argument, whose object is that of the method.
    loads, typed : dict of Chain to int
        How often each is loaded, and how often only to be asked for as a type.
    anything, scope, environment : bool
        See ``Reads``.
    dynamic : bool
        Whether it matters what variables hold: then all that is ever assigned to them counts.
    """

    first: str
    names: set[str] = dataclasses.field(default_factory=set)
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
    whole_first: bool = False
    anything: bool = False
    scope: bool = False
    environment: bool = False
    dynamic: bool = False

    def add(self, inner: Found) -> None:
        """Add what nested code reads."""
        for mine, its in ((self.loads, inner.loads), (self.typed, inner.typed)):
            for chain, count in its.items():
                mine[chain] = mine.get(chain, 0) + count
        for name in ("names", "written", "texts", "whole", "deep", "whole_chains", "handed", "variables", "keys"):
            getattr(self, name).update(getattr(inner, name))
        for name in ("whole_first", "anything", "scope", "environment"):
            setattr(self, name, getattr(self, name) or getattr(inner, name))

    def reads(self, digest: bytes) -> Reads:
        """All of it, as it is known at the end."""
        return Reads(
            digest,
            frozenset(self.names),
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
        )

    def note(self, value: Value) -> None:
        """A global is loaded."""
        for chain in chains(value):
            self.loads[chain] = self.loads.get(chain, 0) + 1

    def read_whole(self, value: Value, deep: bool = False, display: bool = False) -> None:
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
            self.scope |= kind == "scope"
            self.anything |= kind != "environment"
