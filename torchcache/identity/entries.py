"""Dicts of which single entries are a part of a program, and the others are not."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from torchcache.identity.homes import beneath_class, module_of
from torchcache.identity.node import Node, Space
from torchcache.identity.objects import ignored

# Larger ones are tables of words and the like, which are read as a whole at once.
MOST_ITEMS = 1024

# Tables of packages with an entry for the class of every model that was made, by the texts of classes. A program reads
# its own entries alone.
_TABLES = (("transformers.utils.output_capturing", "_CAN_RECORD_REGISTRY"),)


def has_items(value: Any) -> bool:
    """Whether a value is a dict, of no class of its own, whose items can be told apart by their keys."""
    return (
        type(value) is dict
        and len(value) <= MOST_ITEMS
        and not any(
            type(key) is not str or ignored(key) or module_of(type(item)).startswith("torchcache")
            for key, item in value.items()
        )
    )


def describe_items(value: dict[str, Any]) -> Node:
    """The node of such a dict; each item counts where its key is read."""
    return Node(value, ("items",), spaces=[Space("item", value, dict(value))], kind="items")


class OwnEntries:
    """What code of a module finds in such tables, whichever other models the process made.

    Parameters
    ----------
    module : nn.Module
        The root of the tree.
    """

    def __init__(self, module: nn.Module) -> None:
        self._classes = {str(beneath_class(type(inner))) for inner in nn.Module.modules(module)}
        self._found: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        """A table of the same class with the module's own entries; anything else as it is."""
        if not any(_is_global(value, home, name) for home, name in _TABLES):
            return value
        own = self._found.get(id(value))
        if own is None:
            own = self._found[id(value)] = dict.__new__(type(value))
            dict.update(own, sorted((key, entry) for key, entry in dict.items(value) if key in self._classes))
        return own


def _is_global(value: Any, home: str, name: str) -> bool:
    module = sys.modules.get(home)
    return module is not None and isinstance(value, dict) and vars(module).get(name) is value
