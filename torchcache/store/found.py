"""What a region's store holds of one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from torchcache.store.slab import ABSENT


@dataclasses.dataclass
class Found:
    """What the tiers hold of one batch.

    Parameters
    ----------
    fingerprint : bytes
        Of the call.
    slots : list of int
        For each row of the batch ``ABSENT`` where it was not in memory, any other number where it was.
    rows : list of torch.Tensor
        Copies of the rows that were in memory, in the batch's order, one tensor a leaf.
    extra : dict of bytes to int
        Rows from beneath that memory had no room for: digest to row of ``extra_rows``.
    extra_rows : list of torch.Tensor
        Those rows, one tensor a leaf.
    from_disk, from_others : frozenset of bytes
        Digests that the disk tier answered, and tiers beneath it.
    """

    fingerprint: bytes
    slots: list[int]
    rows: list[torch.Tensor] = dataclasses.field(default_factory=list)
    extra: dict[bytes, int] = dataclasses.field(default_factory=dict)
    extra_rows: list[torch.Tensor] = dataclasses.field(default_factory=list)
    from_disk: frozenset[bytes] = frozenset()
    from_others: frozenset[bytes] = frozenset()

    @property
    def from_beneath(self) -> frozenset[bytes]:
        """Digests that memory did not hold, and another tier did."""
        return self.from_disk | self.from_others

    def missing(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        """Digest to its first row in the batch, for each that was found nowhere."""
        missing: dict[bytes, int] = {}
        if ABSENT in self.slots:
            for row, (digest, slot) in enumerate(zip(digests, self.slots, strict=True)):
                if slot == ABSENT and digest not in self.extra:
                    missing.setdefault(digest, row)
        return missing

    def present(self, digests: Sequence[bytes]) -> frozenset[bytes]:
        """Those digests of the batch that were found."""
        pairs = zip(digests, self.slots, strict=True)
        return frozenset(digest for digest, slot in pairs if slot != ABSENT or digest in self.extra)
