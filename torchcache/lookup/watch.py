"""The cheap check that nothing a program consists of has changed since it was looked at."""

from __future__ import annotations

import collections
import gc
import operator
import types
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, repeat
from typing import Any

from torch import nn

from torchcache.lookup.stamps import Stamps

__all__ = ["Watch"]

_ABSENT = object()

# Every module has these: a flag, and containers that are watched for themselves where they matter.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

_COMPARED_BY_VALUE = (type(None), bool, int, float, complex, str, bytes)

# After so many looks in a row that found dicts written to and nothing changed, they are compared every time.
FALSE_ALARMS = 16


class Watch:
    """Remembers what was read, and says whether it still is what it was.

    Values count as unchanged when they are the very same objects, or immutable and equal in type and value. Plain
    dicts that were not written to are not looked into.
    """

    def __init__(self) -> None:
        self._dicts: list[dict[Any, Any]] = []
        self._stamped = _Ledger()
        self._other = _Ledger()
        self._stamps: Stamps | None = None
        self._alarms = 0

    def namespace(self, mapping: Mapping[str, Any]) -> None:
        """Watch the names in ``mapping`` and their values; their order does not matter."""
        ledger, mapping = self._place(mapping)
        if type(mapping) in _COMPARABLE:
            ledger.mapping(mapping)
            ledger.confusable(mapping)
        else:
            ledger.ordered(mapping)

    def functions(self, mapping: Mapping[str, Any]) -> None:
        """Watch the names in ``mapping``, and those of their values that compare by identity, as functions do."""
        ledger, mapping = self._place(mapping)
        if type(mapping) in _COMPARABLE:
            ledger.mapping(mapping)
        else:
            ledger.ordered(mapping)

    def ordered(self, mapping: Mapping[Any, Any]) -> None:
        """Watch the keys, the values and the order of ``mapping``."""
        ledger, mapping = self._place(mapping)
        ledger.ordered(mapping)

    def collection(self, group: Any) -> None:
        """Watch the items of a list, a set or a view, in order."""
        self._other.collection(group)

    def attribute(self, owner: Any, name: str) -> None:
        """Watch one attribute, present or not."""
        self._other.attribute(owner, name)

    def binding(self, scope: Mapping[str, Any], name: str) -> None:
        """Watch one global name, bound or not."""
        self._other.binding(scope, name)

    def kind(self, value: Any) -> None:
        """Watch the class of an object."""
        self._stamped.kind(value)

    def alive(self, reference: Callable[[], Any]) -> None:
        """Watch that a weak reference keeps its object."""
        self._other.references.append(reference)

    def content(self, value: Any, read: Callable[[Any], bytes]) -> None:
        """Watch what ``read`` returns for ``value``."""
        self._other.contents.append((value, read, read(value)))

    def reads_global(self, name: str) -> bool:
        """Whether a global of this name is watched, of whichever module."""
        return name in self._other.globals

    def unchanged(self) -> bool:
        """Whether everything watched is what it was."""
        try:
            if self._stamps is not None and self._stamps.hold():
                self._alarms = 0
                return self._other.unchanged()
            stamps = None
            if self._alarms < FALSE_ALARMS:  # taken first: what changes from here on shows the next time
                stamps = Stamps.take(self._dicts, self._stamped.objects)
            if not (self._stamped.unchanged() and self._other.unchanged()):
                return False
        except Exception:  # an exotic __eq__, a name deleted, a cell emptied: look again rather than trust it
            return False
        self._alarms += self._stamps is not None
        self._stamps = stamps
        return True

    def _place(self, mapping: Mapping[Any, Any]) -> tuple[_Ledger, Mapping[Any, Any]]:
        """Where a mapping is noted; for the namespace of a class, the dict beneath it."""
        if type(mapping) is types.MappingProxyType:
            beneath = gc.get_referents(mapping)
            mapping = beneath[0] if len(beneath) == 1 and type(beneath[0]) is dict else mapping
        if type(mapping) is not dict:
            return self._other, mapping
        if not mapping:
            return self._other, mapping  # most are empty, and whether they are is asked faster
        self._dicts.append(mapping)
        return self._stamped, mapping


_COMPARABLE = (dict, collections.OrderedDict, types.MappingProxyType)


class _Ledger:
    """Things and what they were, compared in a few passes that run in C."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.references: list[Callable[[], Any]] = []
        self.contents: list[tuple[Any, Callable[[Any], bytes], bytes]] = []
        self._empty: list[Any] = []
        self._mappings: list[Any] = []
        self._copies: list[Any] = []
        self._picks: list[tuple[Callable[[Any], tuple[Any, ...]], Any]] = []
        self._picked: list[Any] = []
        self._groups: list[Any] = []
        self._lengths: list[int] = []
        self._items: list[Any] = []
        self._owners: list[Any] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._scopes: list[Mapping[str, Any]] = []
        self.globals: list[str] = []
        self._bound: list[Any] = []
        self._kinds: list[type] = []

    def mapping(self, mapping: Mapping[Any, Any]) -> None:
        """Names and values, as far as mappings compare them."""
        if mapping:
            self._mappings.append(mapping)
            self._copies.append(dict(mapping))
        else:
            self._empty.append(mapping)

    def confusable(self, mapping: Mapping[Any, Any]) -> None:
        """Values that comparing mappings could take for others, as it takes 1 for True: by identity."""
        names = [name for name, value in mapping.items() if _confusable(name, value)]
        if names:
            pick = operator.itemgetter(*names, names[0])  # one name alone would not make a tuple
            self._picks.append((pick, mapping))
            self._picked.extend(pick(mapping))

    def ordered(self, mapping: Mapping[Any, Any]) -> None:
        """Keys, values and order."""
        if mapping or not isinstance(mapping, dict):
            self.collection(mapping.keys())
            self.collection(mapping.values())
        else:
            self._empty.append(mapping)

    def collection(self, group: Any) -> None:
        """Items, in order."""
        items = list(group)
        self._groups.append(group)
        self._lengths.append(len(items))
        self._items.extend(items)

    def attribute(self, owner: Any, name: str) -> None:
        """One attribute."""
        self._owners.append(owner)
        self._names.append(name)
        self._values.append(getattr(owner, name, _ABSENT))

    def binding(self, scope: Mapping[str, Any], name: str) -> None:
        """One name."""
        self._scopes.append(scope)
        self.globals.append(name)
        self._bound.append(scope.get(name, _ABSENT))

    def kind(self, value: Any) -> None:
        """The class of an object."""
        self.objects.append(value)
        self._kinds.append(type(value))

    def unchanged(self) -> bool:
        """Whether everything is what it was."""
        return (
            not any(self._empty)
            and all(map(operator.eq, self._mappings, self._copies))
            and list(map(len, self._groups)) == self._lengths
            and all(map(operator.is_, map(type, self.objects), self._kinds))
            and (self._identical() or self._equal())
            and all(reference() is not None for reference in self.references)
            and all(read(value) == content for value, read, content in self.contents)
        )

    def _identical(self) -> bool:
        return all(all(map(operator.is_, live, known)) for live, known in self._singles())

    def _equal(self) -> bool:
        """Whether what is not identical is immutable and equal; it is remembered, so that this is asked only once."""
        for live, known in self._singles():
            now = list(live)
            if not all(map(_same, now, known)):
                return False
            known[:] = now
        return True

    def _singles(self) -> Iterable[tuple[Iterable[Any], list[Any]]]:
        """The values that are compared one by one: as they are, and as they were."""
        yield chain.from_iterable([pick(mapping) for pick, mapping in self._picks]), self._picked
        yield chain.from_iterable(self._groups), self._items
        yield map(getattr, self._owners, self._names, repeat(_ABSENT)), self._values
        yield [scope.get(name, _ABSENT) for scope, name in zip(self._scopes, self.globals, strict=True)], self._bound


def _confusable(name: str, value: Any) -> bool:
    """Whether another object could be called equal to ``value``."""
    compares: Any = type(value).__eq__
    return name not in _OF_EVERY_MODULE and compares is not object.__eq__


def _same(live: Any, known: Any) -> bool:
    if live is known:
        return True
    if type(live) is not type(known):
        return False
    if type(live) is tuple:
        return len(live) == len(known) and all(map(_same, live, known))
    return type(live) in _COMPARED_BY_VALUE and repr(live) == repr(known)
