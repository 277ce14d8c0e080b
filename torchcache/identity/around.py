"""What a node of a program is a part of, for whoever must say or judge where it stands."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchcache.identity.homes import home_of, is_class, is_installed, is_named, module_of, named_class
from torchcache.identity.node import Node

__all__ = ["home_around", "is_module_class", "is_own", "owner_of", "sentence"]


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


def is_module_class(value: Any) -> bool:
    """Whether a value is a class of modules: those that are stored somewhere are to be compared with, not called."""
    return is_class(value) and nn.Module in value.__mro__
