"""Whether any of many dicts, objects or tensors changed, in one call that runs in C.

CPython gives every dict a new version when it is written to; Dynamo's guards compare versions, and what tensors look
like. Contents of tensors are not looked at here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch._C._dynamo.guards import RootGuardManager, TensorGuards

__all__ = ["Looks", "Stamps"]


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


class Looks:
    """What tensors look like: type, dtype, device, shape, strides, and whether they require gradients.

    Parameters
    ----------
    tensors : sequence of torch.Tensor
        Any number.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._check = self._outside_inference_mode(_guards, tensors).check if tensors else None

    def hold(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether ``tensors``, as many as there were, look the same."""
        return self._check is None or bool(self._outside_inference_mode(self._check, tensors))

    @staticmethod
    def _outside_inference_mode(function: Any, tensors: Sequence[torch.Tensor]) -> Any:
        """Call ``function``: guards made in inference mode fail outside of it, and the other way."""
        if not torch.is_inference_mode_enabled():
            return function(*tensors)
        with torch.inference_mode(False):
            return function(*tensors)


def _guards(*tensors: torch.Tensor) -> TensorGuards:
    return TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],  # type: ignore[misc]
        dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],  # type: ignore[misc]
    )
