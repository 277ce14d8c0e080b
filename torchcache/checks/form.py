"""What was learnt of calls of one form, whatever the shapes of their rows."""

from __future__ import annotations

import dataclasses

import torch

from torchcache.batch import Batch
from torchcache.checks.probe import Learnt, Roles
from torchcache.errors import Bypass

__all__ = ["Form"]


@dataclasses.dataclass
class Form:
    """What was learnt of calls whose arguments have one structure.

    Parameters
    ----------
    roles : tuple of (int or None) or None
        For each tensor argument the dimension of its rows.
    learnt : Learnt or None
        What the last probe learnt.
    refused : tuple of (bytes, Bypass or str) or None
        Why such calls are computed, or the text of a ``RowwiseError``, and the identity that this was learnt of.
    spare : list of torch.Tensor or None
        The arguments of a call with one row, to probe others with.
    unsettled : int
        Calls in a row that changed what computes them.
    """

    roles: Roles | None = None
    learnt: Learnt | None = None
    refused: tuple[bytes, Bypass | str] | None = None
    spare: list[torch.Tensor] | None = None
    unsettled: int = 0

    def refuse(self, batch: Batch, bypass: Bypass) -> None:
        """Refuse such calls as long as the same computes them, where the reason lasts."""
        if bypass.lasting:
            self.refused = (batch.who, bypass)

    def keep_spare(self, batch: Batch) -> None:
        """Keep the arguments of a call with one row."""
        first = batch.taken.tensors[0]
        if first.ndim and first.shape[0] == 1:
            self.spare = [tensor.detach().clone() for tensor in batch.taken.tensors]
