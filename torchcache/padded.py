"""A call whose rows are padded: where its real positions are, its tensors at another length, and what padding holds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from torchcache.errors import Bypass
from torchcache.values.take import Taken

# Rows are as long as the next multiple of this, or of a power of two near an eighth of what is real: of few lengths
# there are many rows each, which are looked up and computed together.
GRAIN = 8
# Another sequence may hold the same thing by chance in fewer places than this.
MOST_CHANCE = 16
# What labels are in padding, for losses to leave them out.
IGNORED = -100


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

    @functools.cached_property
    def counts(self) -> tuple[bool, ...]:
        """Which of the arguments have positions, and hold their numbers."""
        pairs = zip(self.taken.tensors, self.along, strict=True)
        return tuple([along and counted(tensor, self.width) is not None for tensor, along in pairs])

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
            return (tensor[:, -lacking:] if self.left else tensor[:, :width]).contiguous()
        more = tensor.new_zeros((tensor.shape[0], lacking, *tensor.shape[2:]))
        return torch.cat([more, tensor] if self.left else [tensor, more], 1)


def length_of(positions: int) -> int:
    """The length of rows with about so many positions."""
    grain = max(GRAIN, 1 << max(0, (positions - 1) // GRAIN).bit_length())
    return max(1, -(-positions // grain)) * grain


def spread(pads: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
    """``(rows, positions)`` in a form that covers all of ``(rows, positions, ...)``."""
    return pads.to(over.device).reshape(*pads.shape, *[1] * (over.ndim - 2))


class Blanks:
    """What arguments hold where there is padding.

    An argument as long as the mask may be another sequence. One that is padded in the same places holds one thing in
    all padding of all calls, or the numbers of positions.

    Parameters
    ----------
    blank : bool, int or float
        What the mask holds there.
    """

    def __init__(self, blank: Any) -> None:
        self._blank = blank
        # For calls of one form and one of their arguments.
        self._known: dict[tuple[bytes, int], torch.Tensor] = {}

    def clear(self) -> None:
        """Forget what was seen."""
        self._known.clear()

    def of(self, batch: PaddedBatch, place: int) -> torch.Tensor:
        """What to put where there is padding in an argument."""
        tensor = batch.taken.tensors[place]
        if place == batch.mask:
            return tensor.new_tensor(self._blank)
        known = self._known.get((batch.taken.key, place))
        return tensor.new_zeros(()) if known is None or batch.counts[place] else known

    def check(self, batch: PaddedBatch, name: str) -> None:
        """Raise a ``Bypass`` where an argument as long as the mask, which has this name, may be another sequence."""
        pads, along, rows = batch.pads(range(batch.count), batch.width), batch.along, batch.rows
        for place, tensor in enumerate(batch.taken.tensors):
            if place == batch.mask or not along[place] or batch.counts[place]:
                continue
            found = tensor[pads.to(tensor.device)] if rows[place] else tensor[0]
            if not len(found):
                continue
            key = batch.taken.key, place
            blank = self._known.get(key)
            alike = rows[place] and bool((found == (found[0] if blank is None else blank)).all())
            if not alike or (blank is None and _says_real(tensor, found[0])):
                raise Bypass(
                    f"argument{batch.taken.path(place)} holds more than padding where {name!r} says padding",
                    "name what tells its padding, fill padding with one value, or leave padding= out",
                    lasting=False,
                )
            if blank is None:
                usual = (found[0] == 0) | (found[0] == self._blank) | (found[0] == IGNORED)
                if len(found) < MOST_CHANCE and not bool(usual.all()):
                    raise Bypass("too little padding was seen to tell what it holds", lasting=False, quiet=True)
                self._known[key] = found[0].clone()


def _says_real(tensor: torch.Tensor, blank: torch.Tensor) -> bool:
    """Whether a tensor looks like a mask, and what it holds in padding like what masks hold elsewhere."""
    return bool((blank == 1).all()) and bool(((tensor == 0) | (tensor == 1)).all())


def counted(tensor: torch.Tensor, width: int) -> torch.Tensor | None:
    """``(1, width)``: numbers of positions as all rows of a tensor ``(B, S)`` have them; ``None`` where they differ."""
    if tensor.ndim != 2 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        return None
    numbers = torch.arange(max(width, tensor.shape[1]), dtype=tensor.dtype, device=tensor.device) + tensor[:1, :1]
    return numbers[:, :width] if bool((tensor == numbers[:, : tensor.shape[1]]).all()) else None
