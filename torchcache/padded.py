"""A call whose rows are padded: where their real positions are, and its tensors at another length."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from torchcache.values.take import Taken

__all__ = ["GRAIN", "PaddedBatch", "length_of", "spread"]

# Rows are as long as the next multiple of this, or of a power of two near an eighth of what is real: of few lengths
# there are many rows each, which are looked up and computed together.
GRAIN = 8


@dataclasses.dataclass
class PaddedBatch:
    """A call, and where the real positions of its rows are.

    Parameters
    ----------
    taken : Taken
        Its arguments.
    mask : int
        Which of them tells real positions.
    left : bool
        Whether rows are padded on the left.
    lengths : list of int
        The real positions of each row.
    widest : int
        The longest that any batch of the caller's was: the original may end the run on longer rows.
    """

    taken: Taken
    mask: int
    left: bool
    lengths: list[int]
    widest: int

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.lengths)

    @functools.cached_property
    def groups(self) -> dict[int, list[int]]:
        """The rows by the length to which they are cut."""
        groups: dict[int, list[int]] = {}
        for row, length in enumerate(self.lengths):
            groups.setdefault(self.cut_to(length), []).append(row)
        return groups

    def cut_to(self, length: int) -> int:
        """How long a row with so many real positions is made, whatever its batch is like: never longer than any was."""
        wanted = length_of(length)
        return wanted if wanted <= self.widest else max(1, length)

    @property
    def width(self) -> int:
        """The length to which they are padded."""
        return int(self.taken.tensors[self.mask].shape[1])

    @property
    def rows(self) -> tuple[bool, ...]:
        """Which of the arguments have rows."""
        return tuple([tensor.ndim > 0 and tensor.shape[0] == self.count for tensor in self.taken.tensors])

    @property
    def along(self) -> tuple[bool, ...]:
        """Which of the arguments have positions: ``(B, S, ...)``, or ``(1, S, ...)`` for all rows."""
        kinds = [tensor.ndim > 1 and tensor.shape[0] in (1, self.count) for tensor in self.taken.tensors]
        return tuple(
            [kind and tensor.shape[1] == self.width for kind, tensor in zip(kinds, self.taken.tensors, strict=True)]
        )

    def pads(self, rows: Sequence[int], width: int) -> torch.Tensor:
        """Where there is padding in ``rows`` that are as long as ``width``: ``(rows, width)``."""
        device = self.taken.tensors[self.mask].device
        places = torch.arange(width, device=device)
        lengths = torch.tensor([self.lengths[row] for row in rows], device=device)[:, None]
        return places < width - lengths if self.left else places >= lengths

    def fitted(self, tensor: torch.Tensor, width: int) -> torch.Tensor:
        """A tensor ``(B, S, ...)`` with ``width`` positions, cut or lengthened where the padding is."""
        lacking = width - tensor.shape[1]
        if lacking <= 0:
            return tensor[:, -lacking:] if self.left else tensor[:, :width]
        more = tensor.new_zeros((tensor.shape[0], lacking, *tensor.shape[2:]))
        return torch.cat([more, tensor] if self.left else [tensor, more], 1)


def length_of(positions: int) -> int:
    """The length of rows with about so many positions."""
    grain = max(GRAIN, 1 << max(0, (positions - 1) // GRAIN).bit_length())
    return max(1, -(-positions // grain)) * grain


def spread(pads: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
    """``(rows, positions)`` in a form that covers all of ``(rows, positions, ...)``."""
    return pads.to(over.device).reshape(*pads.shape, *[1] * (over.ndim - 2))
