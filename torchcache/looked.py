"""What one lookup found and did, for those who watch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from torchcache.checks.compare import Rounding
from torchcache.store.found import Found
from torchcache.store.precision import Loss


@dataclasses.dataclass
class Looked:
    """What one call found and did, for those who watch.

    Parameters
    ----------
    digests : list of bytes
        One a row.
    missing : dict of bytes to int
        Digest to its first row in the batch, for each that was found nowhere.
    found : Found
        What the tiers had.
    outputs : list of torch.Tensor
        What was served, rows first.
    compute : callable
        From places of rows to what the original computes for them, rows first.
    rounding : Rounding
        What differences between computations of a row are rounding.
    losses : sequence of Loss
        What storing a row may change, for each output.
    """

    digests: list[bytes]
    missing: dict[bytes, int]
    found: Found
    outputs: list[torch.Tensor]
    compute: Callable[[Sequence[int]], list[torch.Tensor]]
    rounding: Rounding
    losses: Sequence[Loss]
