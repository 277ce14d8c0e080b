"""Whether what computes stayed as it was while it computed: a look afterwards alone misses what was put back."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from torchcache.dynamo import Stamps
from torchcache.identity.content import versions


class Steady:
    """Tensors as they are before something computes with them, and the dicts in which modules keep them.

    Parameters
    ----------
    tensors : sequence of torch.Tensor
        What is read. A snapshot keeps it alive, so it is to live for one call.
    named : bool
        Whether the user's own name counts instead of the tensors: they may then be held elsewhere between calls.
    stamps : Stamps or None
        Of the dicts, where they can be had: a parameter or a module that was replaced and put back shows in nothing
        else.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], named: bool, stamps: Stamps | None) -> None:
        self._named = named
        self._tensors = list(tensors)
        self._facts = self._look(tensors)
        self._stamps = None if named else stamps

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether ``tensors``, what is read now, are the same objects, in the same memory, and nobody wrote to them."""
        same = self._named or (len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors)))
        return same and self._look(tensors) == self._facts and (self._stamps is None or self._stamps.hold())

    def _look(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        return versions(tensors) if self._named else [*versions(tensors), *map(_address, tensors)]


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper around others
        return 0
