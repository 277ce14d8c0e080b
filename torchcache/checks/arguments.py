"""Whether the original writes to what it is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchcache.errors import Bypass
from torchcache.identity.content import contents_of, versions


class ArgumentWritten(Bypass):
    """The original writes to its arguments, whichever of these have rows."""

    def __init__(self) -> None:
        super().__init__("it writes to its arguments", "return what it would write, or mark a part that does not write")


class Arguments:
    """Tensors as they are before a run of the original; their contents, too, since not every write moves a version.

    Parameters
    ----------
    tensors : sequence of torch.Tensor
        What the original is given.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._before = self._look()

    def check(self, *, same: bool = True) -> None:
        """Raise ``ArgumentWritten`` where one was written to, or they are not the ``same`` any more."""
        if not same or self._look() != self._before:
            raise ArgumentWritten

    def _look(self) -> tuple[object, ...]:
        needed = [tensor.requires_grad for tensor in self._tensors]
        return versions(self._tensors), needed, contents_of(self._tensors)
