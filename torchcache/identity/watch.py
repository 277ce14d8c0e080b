"""The quick check that nothing a program was read from has changed since."""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, cycle, repeat
from typing import Any, NamedTuple

from torchcache.dynamo import Stamps
from torchcache.identity.objects import ABSENT

_BY_VALUE = (type(None), bool, int, float, complex, str, bytes)

# A dict that is written to in so many looks, while nothing that is read in it changes, is looked into each time.
_ALARMS = 4

# Of attributes that hardly ever change so many are compared in a look.
_A_TURN = 128


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same object, or immutable and equal in type and value."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if type(one) is tuple:
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) in _BY_VALUE and ((one == other and repr(one) == repr(other)) or (one != one and other != other))


@dataclasses.dataclass(slots=True, eq=False)
class Namespace:
    """A dict, and the entries of it that were read.

    Attributes
    ----------
    live : dict or None
        The dict itself; ``None`` for that of the watch's owner.
    read : dict
        The entries that were read; ``ABSENT`` for one that was looked for.
    differs : callable
        Names of what differs in the dict, found at leisure.
    closed : bool
        Whether a new name in it may matter.
    alarms : int
        How often it was written to while nothing that was read of it changed.
    keys : list
        All names in it, where new ones may matter.
    """

    live: dict[Any, Any] | None
    read: dict[Any, Any]
    differs: Callable[[dict[Any, Any]], list[str]]
    closed: bool = True
    alarms: int = 0
    keys: list[Any] = dataclasses.field(default_factory=list)

    def intact(self, live: dict[Any, Any]) -> bool:
        """Whether the entries are the very same, in the same order where a new one may matter."""
        if self.closed and list(live) != self.keys:
            return False
        return all(live.get(name, ABSENT) is value for name, value in self.read.items())


class _Laid(NamedTuple):
    """Dicts and entries side by side, as the passes take them; another thread may lay them out anew meanwhile.

    The owner's dict comes first, as often as ``own_open`` and ``own_scopes`` say, and is not kept.
    """

    dicts: list[dict[Any, Any]]
    own_open: int
    open: list[dict[Any, Any]]
    keys: list[list[Any]]
    own_scopes: int
    scopes: list[dict[Any, Any]]
    names: list[Any]
    values: list[Any]


class Watch:
    """Remembers what was read, and says whether it is still so.

    All passes run in C. Dicts that were not written to are not looked into; those that are written to in every call,
    beside what is read in them, are compared by the entries that are read.

    Parameters
    ----------
    owner : object or None
        One of the objects that are watched, which may own the watch: neither it nor its ``__dict__`` is kept alive, so
        that both go as soon as nobody else needs them.
    """

    def __init__(self, owner: Any = None) -> None:
        self._owner = weakref.ref(owner) if owner is not None else None
        self._owner_kind = type(owner)
        self._owner_label: Callable[[], str] = str
        self.namespaces: list[Namespace] = []
        self.contents: list[tuple[Any, Callable[[Any], Any], Any, Callable[[], str]]] = []
        self.holders: list[dict[Any, Any]] = []
        self._held: Stamps | None = None
        self._objects: list[Any] = []
        self._kinds: list[type] = []
        self._kind_labels: list[Callable[[], str]] = []
        self._owners: list[Any] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._labels: list[Callable[[], str]] = []
        self._slow: list[tuple[Any, str, Any, Callable[[], str]]] = []
        self._turns: Iterator[tuple[Any, ...]] = iter(())
        self._groups: list[Any] = []
        self._items: list[list[Any]] = []
        self._sizes: list[int] = []
        self._flat: list[Any] = []
        self._group_labels: list[Callable[[], str]] = []
        self._references: list[Callable[[], Any]] = []
        self._laid = _Laid([], 0, [], [], 0, [], [], [])
        self._stamped: tuple[_Laid, Stamps] | None = None
        self._quiet: list[Namespace] = []
        self._empty: list[Namespace] = []
        self._loud: list[Namespace] = []
        self._single: list[Stamps | None] = []
        self._rewritten = 0

    # What is watched.

    def kind(self, value: Any, label: Callable[[], str]) -> None:
        """Watch the class of an object."""
        if self.owns(value):
            self._owner_label = label
            return
        self._objects.append(value)
        self._kinds.append(type(value))
        self._kind_labels.append(label)

    def attribute(self, owner: Any, name: str, label: Callable[[], str], often: bool = True) -> None:
        """Watch one attribute; in turns where it is one of many that hardly ever change."""
        value = getattr(owner, name, ABSENT)
        if self.owns(owner):
            self.content(owner, lambda owner: getattr(owner, name, ABSENT), label)
            return
        if not often:
            self._slow.append((owner, name, value, label))
            return
        self._owners.append(owner)
        self._names.append(name)
        self._values.append(value)
        self._labels.append(label)

    def items(self, group: Any, label: Callable[[], str]) -> None:
        """Watch the items of a list or a set, in order."""
        self._groups.append(group)
        self._items.append(list(group))
        self._group_labels.append(label)

    def alive(self, reference: Callable[[], Any]) -> None:
        """Watch that a weak reference keeps its object."""
        self._references.append(reference)

    def content(self, owner: Any, read: Callable[[Any], Any], label: Callable[[], str]) -> None:
        """Watch what ``read`` returns for ``owner``."""
        known = read(owner)
        if self.owns(owner):
            self.contents.append((self._owner, lambda reference: read(reference()), known, label))
        else:
            self.contents.append((owner, read, known, label))

    def namespace(
        self,
        live: dict[Any, Any],
        read: dict[Any, Any],
        differs: Callable[[dict[Any, Any]], list[str]],
        closed: bool = True,
    ) -> None:
        """Watch entries of a dict; see ``Namespace``."""
        own = self._owner is not None and live is self._own
        self.namespaces.append(Namespace(None if own else live, read, differs, closed))

    def owns(self, value: Any) -> bool:
        """Whether this is the owner."""
        return self._owner is not None and value is self._owner()

    @property
    def _own(self) -> dict[Any, Any]:
        """The dict of the owner, who is there as long as anybody asks."""
        return vars(self._owner()) if self._owner is not None else {}

    def _live(self, space: Namespace) -> dict[Any, Any]:
        return self._own if space.live is None else space.live

    def _stamp(self, dicts: Sequence[dict[Any, Any]], objects: Sequence[Any] = ()) -> Stamps | None:
        return Stamps.take(dicts, objects, owner=self._owner() if self._owner is not None else None)

    def seal(self) -> None:
        """No more is to be watched."""
        for space in self.namespaces:
            (self._empty if space.closed and space.live == {} else self._quiet).append(space)
            space.keys = list(self._live(space)) if space.closed else []
        firsts = range(0, len(self._slow), _A_TURN)
        self._turns = cycle([tuple(zip(*self._slow[first : first + _A_TURN], strict=True))[:3] for first in firsts])
        self._sizes, self._flat = list(map(len, self._items)), list(chain.from_iterable(self._items))
        self._lay_out()

    def _lay_out(self) -> None:
        self._bare = [space.live for space in self._empty]
        self._quiet = sorted(self._quiet, key=lambda space: space.live is not None)
        closed = [space for space in self._quiet if space.closed]
        read = [(space.live, name, value) for space in self._quiet for name, value in space.read.items()]
        scopes = [live for live, _, _ in read if live is not None]
        opened = [space.live for space in closed if space.live is not None]
        self._laid = _Laid(
            [space.live for space in self._quiet if space.live is not None],
            len(closed) - len(opened),
            opened,
            [space.keys for space in closed],
            len(read) - len(scopes),
            scopes,
            [name for _, name, _ in read],
            [value for _, _, value in read],
        )

    def stamps(self) -> Stamps | None:
        """Stamps of ``holders``, dicts that code hardly ever writes to; ``None`` where others are compared without."""
        held = self._held
        if held is None or not held.hold():
            held = self._held = Stamps.take(self.holders, attributes=False)
        return held

    # Whether it is what it was.

    def again(self) -> bool:
        """Whether everything is what it was, after it was found to have changed: all of it is compared."""
        try:
            changed = any(True for _ in self.changes())  # some have no name
            return not changed and all(reference() is not None for reference in self._references)
        except Exception:  # what cannot be compared is not what it was
            return False

    def unchanged(self) -> bool:
        """Whether everything watched is what it was."""
        try:
            return self._others() and self._spaces()
        except Exception:  # an exotic __eq__, a name deleted, a cell emptied: look again rather than trust it
            return False

    def _others(self) -> bool:
        if self._loud and any(space.differs(self._live(space)) for space in self._loud):
            return False
        if any(self._bare) and not self._filled():
            return False
        return (
            (not self._owners or self._attributes())
            and (not self._groups or self._same_groups())
            and all(reference() is not None for reference in self._references)
            and all(_unchanged(read(owner), known) for owner, read, known, _ in self.contents)
            and self._next_turn()
        )

    def _filled(self) -> bool:
        """Whether what was put into empty dicts matters to nobody; Dynamo notes on each parameter that it saw it."""
        filled = [space for space in self._empty if space.live]
        keys = [list(self._live(space)) for space in filled]  # first: what changes from here on shows the next time
        if any(space.differs(self._live(space)) for space in filled):
            return False
        for space, names in zip(filled, keys, strict=True):
            space.keys = names
        self._empty = [space for space in self._empty if space not in filled]
        self._quiet = [*self._quiet, *filled]
        self._single = []
        self._lay_out()
        return True

    def _attributes(self) -> bool:
        now = list(map(getattr, self._owners, self._names, repeat(ABSENT)))
        if all(map(operator.is_, now, self._values)):
            return True
        if not all(map(same, now, self._values)):
            return False
        self._values = now
        return True

    def _next_turn(self) -> bool:
        if not self._slow:
            return True
        owners, names, values = next(self._turns)
        now = list(map(getattr, owners, names, repeat(ABSENT)))
        return all(map(operator.is_, now, values)) or all(map(same, now, values))

    def _same_groups(self) -> bool:
        if list(map(len, self._groups)) != self._sizes:
            return False
        return all(map(operator.is_, chain.from_iterable(self._groups), self._flat)) or all(
            map(_same_items, self._groups, self._items)
        )

    def _spaces(self) -> bool:
        laid, stamped = self._laid, self._stamped
        known = stamped[1] if stamped is not None and stamped[0] is laid else None
        owner = self._owner() if self._owner is not None else None
        if known is not None and known.hold(owner):
            self._rewritten = 0
            return True
        stamps = self._stamp(laid.dicts, self._objects)  # taken first: what changes from here on shows the next time
        if type(owner) is not self._owner_kind or not all(map(operator.is_, map(type, self._objects), self._kinds)):
            return False
        scopes, opened = [self._own] * laid.own_scopes + laid.scopes, [self._own] * laid.own_open + laid.open
        if not (
            all(map(operator.is_, map(dict.get, scopes, laid.names, repeat(ABSENT)), laid.values))
            and all(map(operator.eq, map(list, opened), laid.keys))
        ):
            if not self._look_closely():
                return False
            laid = self._laid
            stamps = self._stamp(laid.dicts, self._objects)
        elif known is not None:
            self._find_rewritten()
        self._stamped = (laid, stamps) if stamps is not None else None
        return True

    def _look_closely(self) -> bool:
        """Compare dict by dict; those that are written to beside what is read are set apart."""
        loud = []
        for space in self._quiet:
            live = self._live(space)
            keys = list(live) if space.closed else []
            if space.intact(live):
                continue
            if space.differs(live):
                return False
            if not all(same(live.get(name, ABSENT), value) for name, value in space.read.items()):
                loud.append(space)  # replaced by what is alike, and may be written to from here on
                continue
            space.keys = keys
            space.read = {name: live.get(name, ABSENT) for name in space.read}
            space.alarms += 1
            if space.alarms >= _ALARMS:
                loud.append(space)
        self._set_apart(loud)
        return True

    def _find_rewritten(self) -> None:
        """Find dicts that are written to in every call with what they held already."""
        self._rewritten += 1
        if self._rewritten >= _ALARMS:
            owner = self._owner() if self._owner is not None else None
            if self._single:
                loud = [
                    space
                    for space, stamp in zip(self._quiet, self._single, strict=True)
                    if stamp is not None and not stamp.hold(owner)
                ]
                self._single = []
                self._rewritten = 0
                self._set_apart(loud)
            else:
                self._single = [
                    self._stamp([]) if space.live is None else Stamps.take([space.live]) for space in self._quiet
                ]

    def _set_apart(self, loud: Sequence[Namespace]) -> None:
        if loud:
            self._loud.extend(loud)
            self._quiet = [space for space in self._quiet if space not in loud]
            self._single = []
        self._lay_out()

    def changes(self) -> Iterable[str]:
        """The user's names for what differs."""
        for value, kind, label in zip(self._objects, self._kinds, self._kind_labels, strict=True):
            if type(value) is not kind:
                yield label()
        if self._owner is not None and type(self._owner()) is not self._owner_kind:
            yield self._owner_label()
        for space in self.namespaces:
            yield from space.differs(self._live(space))
        everything = chain(zip(self._owners, self._names, self._values, self._labels, strict=True), self._slow)
        for owner, name, known, label in everything:
            if not same(getattr(owner, name, ABSENT), known):
                yield label()
        for group, items, label in zip(self._groups, self._items, self._group_labels, strict=True):
            if not _same_items(group, items):
                yield label()
        for owner, read, known, label in self.contents:
            if not _unchanged(read(owner), known):
                yield label()


def _unchanged(now: Any, known: Any) -> bool:
    if type(known) is tuple:
        if type(now) is not tuple or len(now) != len(known):
            return False
        return all(map(operator.is_, now, known)) or all(map(_unchanged, now, known))
    if type(known) is type(now) and type(known) in (str, bytes):
        return bool(now == known)
    return same(now, known) or (type(known).__module__.startswith("numpy") and bool(now == known))


def _same_items(group: Any, items: list[Any]) -> bool:
    if len(group) != len(items):
        return False
    return all(map(operator.is_, group, items)) or all(map(same, group, items))


def beneath_proxy(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """The dict beneath the namespace of a class."""
    import gc

    found = gc.get_referents(mapping)
    return found[0] if len(found) == 1 and type(found[0]) is dict else mapping
