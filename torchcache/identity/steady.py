"""Whether what computes stayed as it was while it computed: a look afterwards alone misses what was put back."""

from __future__ import annotations

import operator
from collections.abc import Sequence, Set

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
    rewritten : set of int
        The ``id`` of tensors that the original itself writes with what they hold: what they hold is all that is told.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], named: bool, stamps: Stamps | None, rewritten: Set[int] = frozenset()
    ) -> None:
        self._named = named
        self._tensors = list(tensors)
        self._versions, self._addresses = versions(tensors), self._places(tensors)
        self._stamps = None if named else stamps
        self._rewritten = rewritten

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether ``tensors``, what is read now, are the same objects, in the same memory, and nobody wrote to them."""
        same = self._named or (len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors)))
        return (
            same
            and (versions(tensors) == self._versions or self._is_rewritten(tensors))
            and self._places(tensors) == self._addresses
            and (self._stamps is None or self._stamps.hold())
        )

    def _is_rewritten(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether only such tensors have other versions as the original writes itself."""
        if len(tensors) != len(self._tensors):
            return False
        looks = zip(tensors, versions(tensors), self._versions, strict=True)
        return all(id(tensor) in self._rewritten for tensor, now, was in looks if now != was)

    def _places(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        return [] if self._named else [*map(_address, tensors)]


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper around others
        return 0
