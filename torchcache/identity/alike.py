"""Whether one object was replaced by another that holds the same: libraries copy their registries to write to them."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import nn

from torchcache.identity.containers import MOST_ITEMS
from torchcache.identity.objects import hidden, members_of, slots_of
from torchcache.identity.watch import same

# Objects in each other, as deep as they are compared.
DEEPEST = 5


def alike(one: Any, other: Any, deepest: int = DEEPEST) -> bool:
    """Whether two values are the same, or containers and plain objects of one class whose parts are alike, in order."""
    if same(one, other):
        return True
    kind = type(one)
    if kind is not type(other) or not deepest:
        return False
    if kind in (list, tuple, set, frozenset, dict, OrderedDict):
        if len(one) != len(other) or len(one) > MOST_ITEMS:
            return False
        if issubclass(kind, dict):
            return _each(one, other, 1) and _each(one.values(), other.values(), deepest)
        return _each(one, other, deepest)
    members, others = (members_of(value) for value in (one, other)) if _is_plain(kind) else (None, None)
    return members is not None and others is not None and alike(members, others, deepest)


def _each(ones: Iterable[Any], others: Iterable[Any], deepest: int) -> bool:
    ones, others = list(ones), list(others)
    return all(map(operator.is_, ones, others)) or all(
        alike(one, other, deepest - 1) for one, other in zip(ones, others, strict=True)
    )


def _is_plain(kind: type) -> bool:
    """Whether the objects of a class are what their ``__dict__`` holds, and no more."""
    bare = operator.is_(kind.__new__, object.__new__) and not issubclass(kind, nn.Module)
    return bare and not (hidden(kind) or slots_of(kind))
