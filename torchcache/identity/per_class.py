"""What is worked out once for each class, and forgotten with the class."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def once_per_class(work_out: Callable[[Any], T]) -> Callable[[Any], T]:
    """A function of a class that remembers its results, which must not refer to the class: it is held weakly."""
    known: weakref.WeakKeyDictionary[type, T] = weakref.WeakKeyDictionary()

    @functools.wraps(work_out)
    def remembered(kind: type) -> T:
        if kind not in known:
            known[kind] = work_out(kind)
        return known[kind]

    return remembered
