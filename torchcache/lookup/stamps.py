"""Whether any of many dicts was written to, or any of many objects given another class, in one call that runs in C.

CPython gives every dict a new version when it is written to, and Dynamo's guards compare versions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch._C._dynamo.guards import RootGuardManager

__all__ = ["Stamps"]


class Stamps:
    """The versions of dicts and the classes of objects at one time.

    Parameters
    ----------
    dicts : sequence of dict
        Plain dicts.
    objects : sequence of object
        Anything.
    """

    def __init__(self, dicts: Sequence[dict[Any, Any]], objects: Sequence[Any]) -> None:
        manager = sys.modules["torch._dynamo.guards"].GuardManagerType.GUARD_MANAGER
        self._watched = [*dicts, *objects]
        root: Any = RootGuardManager()
        for place, value in enumerate(self._watched):
            guards = root.list_getitem_manager(place, "", value, manager)
            if place < len(dicts):
                guards.add_dict_version_guard(value, [""], None)
            else:
                guards.add_type_match_guard(id(type(value)), [""], None)
        self._check = root.check

    @classmethod
    def take(cls, dicts: Sequence[dict[Any, Any]], objects: Sequence[Any]) -> Stamps | None:
        """Stamps, where they can be had: ``None`` until Dynamo is loaded, which takes the best part of a second."""
        if "torch._dynamo.guards" not in sys.modules:
            return None
        try:
            return cls(dicts, objects)
        except (AttributeError, TypeError):  # another release of torch
            return None

    def hold(self) -> bool:
        """Whether all versions and classes are what they were."""
        return bool(self._check(self._watched))
