"""One object of a program: what identifies it, what belongs to it always, and what does where its name is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torchcache.identity.homes import home_of, is_installed, is_named, module_of, named_class
from torchcache.identity.reads import Reads


@dataclasses.dataclass(slots=True)
class Space:
    """A namespace of an object, whose entries count where their names are read.

    Attributes
    ----------
    kind : str
        "attribute", "parameter", "buffer", "child", "member", "global", "variable" or "item".
    live : Mapping
        The namespace itself.
    held : dict
        What it held when it was read.
    ordered : bool
        Whether the order of its entries says something.
    fetch : callable, optional
        Gets the namespace anew, where every thread has its own.
    leave : frozenset of str
        Names that are no part of it.
    chosen : set of str
        Names that are read.
    """

    kind: str
    live: Mapping[str, Any]
    held: dict[str, Any]
    ordered: bool = False
    fetch: Callable[[], Mapping[str, Any]] | None = None
    leave: frozenset[str] = frozenset()
    chosen: set[str] = dataclasses.field(default_factory=set)

    def key(self, name: str) -> str:
        """The name under which code reads an entry: those of environment variables and of items are texts."""
        return {"variable": f"${name}", "item": f"[{name}]"}.get(self.kind, name)


@dataclasses.dataclass(slots=True)
class Check:
    """One thing to compare later, beside the spaces.

    Attributes
    ----------
    kind : str
        "kind", "members" (that its ``__dict__`` is the same), "attribute", "items", "mapping", "alive" or "content".
    owner : Any
        The object.
    name : str
        Of the attribute.
    read : callable, optional
        What gives the content of ``owner``.
    """

    kind: str
    owner: Any
    name: str = ""
    read: Callable[[Any], Any] | None = None


@dataclasses.dataclass(slots=True, eq=False)
class Node:
    """One object of a program.

    Attributes
    ----------
    value : Any
        The object.
    head : tuple of str or bytes
        What identifies it by itself.
    parts : list of (str, Any)
        What belongs to it whatever is read, each with the text that a path shows for it.
    spaces : list of Space
        What belongs to it where its name is read.
    checks : list of Check
        What else of it may change.
    names : frozenset of str
        Names that code reads on this object and on no other: that of its named class.
    adds : frozenset of str
        Names that code reads on any object because this one is there.
    texts : frozenset of str
        Texts that it holds, which may name environment variables.
    reads : Reads, optional
        What its code reads, for a function.
    types : list of type
        Classes among the globals that it only asks for as types.
    problem : str
        Why it cannot be identified.
    numbered : bool
        Whether it is one object, as opposed to one of many equal values.
    kind : str
        "class", "module", "object", "group", "items", "tensor", "function", "python module", "python modules" (all that
        are loaded), "environment" or "".
    unsorted : bool
        Whether the order of its parts says nothing.
    wraps : bool
        Whether its parts are called as it is called.
    """

    value: Any
    head: tuple[str | bytes, ...] = ()
    parts: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    spaces: list[Space] = dataclasses.field(default_factory=list)
    checks: list[Check] = dataclasses.field(default_factory=list)
    names: frozenset[str] = frozenset()
    adds: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()
    reads: Reads | None = None
    types: list[Any] = dataclasses.field(default_factory=list)
    problem: str = ""
    numbered: bool = True
    kind: str = ""
    unsorted: bool = False
    wraps: bool = False
    whole: bool = False
    # Where it was met first, and how much of it is read: 0 by name, 1 all of it, 2 all that is within it, too.
    parent: Node | None = None
    label: str = ""
    level: int = 0
    depth: int = 0
    visited: bool = False
    constructed: bool = False

    def path(self) -> str:
        """Where the object is, as the user would write it."""
        labels = []
        node: Node | None = self
        while node is not None:
            labels.append(node.label)
            if node.label.startswith("the "):
                break
            node = node.parent
        return "".join(reversed(labels)).lstrip(".")

    def release(self) -> None:
        """Keep the object and its ``__dict__`` alive no more: it is compared later by whoever has it."""
        for space in self.spaces:
            if space.live is vars(self.value):
                space.live = {}
        self.value, self.checks = None, []


def home_around(node: Node | None) -> str:
    """Where the code lies that something is a part of."""
    while node is not None:
        if node.kind == "function":
            return home_of(node.value)
        if node.kind == "class":
            return module_of(node.value)
        node = node.parent
    return ""


def owner_of(node: Node) -> type | None:
    """The class whose method a function is, itself or beneath what wraps it."""
    parent = node.parent
    while parent is not None and parent.wraps:
        if node.label.startswith("the global"):
            return None
        node, parent = parent, parent.parent
    if parent is not None and parent.kind == "class" and isinstance(parent.value, type):
        return parent.value
    return None


def names_owner(node: Node) -> bool:
    """Whether the first argument of a function has the name of what methods are called on."""
    return node.value.__code__.co_varnames[:1] in (("self",), ("cls",))


def sentence(node: Node) -> str:
    """Why a node has no identity, for people."""
    if node.kind == "tensor":
        return f"{node.path()} {node.problem}"
    kind = type(node.value)
    return f"{node.path() or 'the program'} is a {module_of(kind)}.{kind.__qualname__}, which {node.problem}"


def is_own(node: Node) -> bool:
    """Whether a node is code of the user's own, which is followed however far it is."""
    if node.kind == "function":
        return not is_installed(home_of(node.value)) and not is_named(home_of(node.value))
    return node.kind == "class" and not named_class(node.value) and not is_installed(module_of(node.value))
