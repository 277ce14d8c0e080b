"""Objects opened by all of their state: dataclasses, model outputs, namedtuples, and what else Python code defines."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torchcache.errors import Bypass
from torchcache.values.constants import MADE_BY_CODE, class_bytes, part_bytes, type_name

# Types written in C whose content is known.
ROOTS: tuple[Any, ...] = (OrderedDict, dict, tuple, object)
POINTER = tuple.__itemsize__


class Opened(NamedTuple):
    """A container without its parts.

    Parameters
    ----------
    head : bytes
        Canonical bytes of all that it is beside its parts, their number included.
    names : sequence
        Where each part stands in it, for people.
    parts : sequence
        Its parts.
    build : callable
        From other parts to a new container.
    mutable : bool, default: True
        Whether it can be written to, so that it matters where else it stands.
    """

    head: bytes
    names: Sequence[Any]
    parts: Sequence[Any]
    build: Callable[[list[Any]], Any]
    mutable: bool = True


def open_object(value: Any) -> Opened:
    """An object, opened to its attributes, slots, and items or elements.

    Raises
    ------
    Bypass
        For an object with content that Python code cannot list.
    """
    kind: Any = type(value)
    root, slots = _anatomy(kind)
    attributes = object.__getattribute__(value, "__dict__") if kind.__dictoffset__ else {}
    if type(attributes) is not dict:
        raise Bypass(f"{type_name(value)} whose __dict__ is {type_name(attributes)}", "pass what it holds")
    parts = [*attributes.values()]
    filled = []
    for slot in slots:
        with contextlib.suppress(AttributeError):  # an empty one
            parts.append(slot.__get__(value))
            filled.append(slot)
    elements = tuple.__len__(value) if root is tuple else 0
    if elements:
        parts += tuple.__iter__(value)
    items: list[tuple[Any, int]] = []
    for key in root.__iter__(value) if issubclass(root, dict) else ():
        item = dict.__getitem__(value, key)
        # A model output holds each of its values twice: as an attribute and as an item.
        twice = attributes.get(key, items) is item
        items.append((key, [*attributes].index(key) if twice else len(parts)))
        if not twice:
            parts.append(item)
    # Only among strings are equal ones the same.
    words = all(type(name) is str for name in (*attributes, *(key for key, _ in items)))
    outline = _outline if words else _outline.__wrapped__
    head, names, make = outline(kind, root, (*attributes,), (*filled,), elements, (*items,))
    return Opened(head, names, parts, make, mutable=root is not tuple or bool(kind.__dictoffset__))


@functools.lru_cache(maxsize=256)
def _outline(
    kind: Any,
    root: Any,
    attributes: tuple[str, ...],
    slots: tuple[types.MemberDescriptorType, ...],
    elements: int,
    items: tuple[tuple[Any, int], ...],
) -> tuple[bytes, tuple[Any, ...], _Maker]:
    """The bytes of an object beside its parts, their names, and how to make another."""
    fields = getattr(kind, "_fields", ()) if root is tuple else ()
    own = (*attributes, *(slot.__name__ for slot in slots), *(fields if len(fields) == elements else range(elements)))
    names = (*own, *(key for key, place in items if place >= len(own)))
    whole = f"a {kind.__qualname__} with a name that is"
    held = [(slot.__objclass__.__qualname__, slot.__name__) for slot in slots]
    places = [[*attributes], held, elements, [*items], fields]
    head = b"C" + class_bytes(kind) + len(names).to_bytes(8, "little") + part_bytes(places, whole)
    return head, names, _Maker(kind, root, attributes, slots, elements, items)


@dataclasses.dataclass(frozen=True)
class _Maker:
    """Makes objects of one class from their parts, as ``open_object`` lists them."""

    kind: type
    root: Any
    attributes: tuple[str, ...]
    slots: tuple[types.MemberDescriptorType, ...]
    elements: int
    items: tuple[tuple[Any, int], ...]

    def __call__(self, parts: list[Any]) -> Any:
        first = len(self.attributes) + len(self.slots)
        elements = (parts[first : first + self.elements],) if self.root is tuple else ()
        made = self.root.__new__(self.kind, *elements)
        if self.attributes:
            object.__getattribute__(made, "__dict__").update(zip(self.attributes, parts, strict=False))
        for slot, part in zip(self.slots, parts[len(self.attributes) : first], strict=True):
            slot.__set__(made, part)
        for key, place in self.items:
            self.root.__setitem__(made, key, parts[place])
        return made


@functools.lru_cache(maxsize=256)
def _anatomy(kind: Any) -> tuple[Any, tuple[types.MemberDescriptorType, ...]]:
    """The built-in type that ``kind`` extends, and its slots.

    Raises
    ------
    Bypass
        When it extends another type that is written in C.
    """
    root = next(root for root in ROOTS if root in kind.__mro__)
    classes = [base for base in kind.__mro__ if base.__flags__ & MADE_BY_CODE]
    members = (held for base in classes for held in vars(base).values())
    slots = tuple(held for held in members if isinstance(held, types.MemberDescriptorType))
    foreign = [base for base in kind.__mro__ if base not in classes and base not in ROOTS]
    # Room for the slots, the __dict__ and the weak references.
    if foreign or kind.__basicsize__ > root.__basicsize__ + POINTER * (len(slots) + 2):
        raise Bypass(f"a {kind.__qualname__}, which extends a type written in C", "pass what it holds")
    return root, slots
