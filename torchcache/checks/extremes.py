"""What the rows of one kind of call were like, and which are unlike all before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

# How far beyond what was seen a row is to be, in widths of what was seen: so there are few, however many rows come.
MARGIN = 0.5
# Rows of one call that are named.
MOST = 2
# What no float32 holds counts as this: widths of what was seen are to be finite.
FAR = 1e300
# Dtypes whose elements torch compares.
_ORDERED = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
}  # fmt: skip


class Extremes:
    """The range of what rows were like: of each tensor how many elements are not zero, the smallest and the largest.

    Padding, masks that are empty and outputs that end early are zeros; values that are far from others show themselves.

    Attributes
    ----------
    samples : list of list of torch.Tensor
        The arguments of the latest two rows that were unlike all before them, of shape ``(1, *)`` each.
    """

    def __init__(self) -> None:
        self.samples: list[Sequence[torch.Tensor]] = []
        self._low: npt.NDArray[np.float64] | None = None
        self._high: npt.NDArray[np.float64] | None = None

    def beyond(self, rows: Sequence[torch.Tensor]) -> list[int]:
        """Which rows lie far beyond all that were seen; they are seen from here on. At first, the two ends.

        Parameters
        ----------
        rows : sequence of torch.Tensor
            Of shape ``(B, *)`` each, with any ``B`` above 0.
        """
        traits = _traits(rows)
        low, high = traits.min(0), traits.max(0)
        if self._low is None or self._high is None:
            self._low, self._high = low, high
            varies = high > low
            shares = (traits[:, varies] - low[varies]) / (high - low)[varies]
            return sorted({int(shares.sum(1).argmin()), int(shares.sum(1).argmax())}) if varies.any() else [0]
        least = MARGIN * (self._high - self._low)
        excess = np.maximum(self._low - traits, traits - self._high)
        far = (excess > least).any(0)
        self._low = np.where(far, np.minimum(self._low, low), self._low)
        self._high = np.where(far, np.maximum(self._high, high), self._high)
        return list(dict.fromkeys(excess[:, far].argmax(0).tolist()))[:MOST]

    def keep(self, row: Sequence[torch.Tensor]) -> None:
        """Keep the arguments of one more."""
        self.samples = [*self.samples[-1:], row]


def _traits(rows: Sequence[torch.Tensor]) -> npt.NDArray[np.float64]:
    """What each row is like, ``(B, 3 * number of tensors)``."""
    found = []
    for leaf in rows:
        numbers = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
        if numbers.dtype not in _ORDERED:
            numbers = numbers.to(torch.uint8 if numbers.dtype is torch.bool else torch.float32)
        numbers = numbers.reshape(leaf.shape[0], -1)
        if numbers.shape[1]:
            full = numbers.bool().view(torch.uint8).sum(1, dtype=torch.int32)  # ten times as fast as count_nonzero
            found += [full, numbers.amin(1), numbers.amax(1)]
    if not found:
        return np.zeros((rows[0].shape[0], 1))
    columns = torch.stack([column.to(rows[0].device, torch.float32) for column in found], 1)
    traits = columns.cpu().numpy().astype(np.float64)
    return np.nan_to_num(traits, nan=FAR, posinf=FAR, neginf=-FAR)
