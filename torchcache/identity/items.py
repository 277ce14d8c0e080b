"""A dict of which code takes single items by constant keys: those are a part of the program, and the others are not."""

from __future__ import annotations

from typing import Any

from torchcache.identity.homes import module_of
from torchcache.identity.node import Node, Space
from torchcache.identity.objects import ignored

__all__ = ["describe_items", "has_items"]

# Larger ones are tables of words and the like, which are read as a whole at once.
MOST_ITEMS = 1024


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
