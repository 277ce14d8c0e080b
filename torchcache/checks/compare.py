"""How far two computations of the same row are apart, and what of that is rounding."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchcache.dynamo import Observer
from torchcache.store.precision import EXACT, Loss
from torchcache.store.select import element_bytes

# The largest difference between batch sizes that counts as rounding, as a share of the row's largest magnitude.
LARGEST_ROUNDING = {8: 1e-6, 4: 2e-3, 2: 5e-2, 1: 0.3}
# Differences up to here are never an alarm: another processor, another number of threads.
FLOOR = {8: 1e-10, 4: 1e-4, 2: 2e-2, 1: 0.15}
# Rounding that was seen is allowed this many times over, since few rows were looked at.
MARGIN = 8.0
# Share of the elements of an integer output that rounding upstream (an argmax, a threshold) may flip.
FLIPPED = 0.1
# Rows that tell how large rows are: of one batch, and in all.
MOST_ROWS, LATEST = 64, 256
# So many rows are hardly all small by chance.
SOME_ROWS = 8
# In batches of one size the same kernels run: what neighbours change beyond this many units in the last place is no
# rounding; of two bytes, of which so many would be half of everything, a few.
ULPS = {8: 64, 4: 64, 2: 4, 1: 1}


class Rounding:
    """What differences between two computations of a row are rounding, for each output; learnt in the probe.

    Parameters
    ----------
    leaves : sequence of torch.Tensor
        The outputs.
    width : int
        Bytes of the narrowest floating-point numbers that they are computed in, which may be narrower than they are.

    Attributes
    ----------
    scales : list of float
        For each output the magnitude that its rows usually have, of those seen of late: three of four have no larger
        one; in a batch of some rows not many times what these have. A row that happens to be near zero is not expected
        to be more exact than others: a score, of which a row has one, comes out of terms that cancel.
    """

    def __init__(self, leaves: Sequence[torch.Tensor], width: int) -> None:
        self.width = width
        widths = [min(_width(leaf.dtype), width) for leaf in leaves]
        self._caps = [LARGEST_ROUNDING[width] for width in widths]
        self.allowed = [FLOOR[width] for width in widths]
        self.scales = [0.0] * len(leaves)
        self._seen = [collections.deque[float](maxlen=LATEST) for _ in leaves]

    def see(self, leaves: Sequence[torch.Tensor], dims: Sequence[int]) -> None:
        """Take note of how large rows are, which lie along ``dims``."""
        batch = [_magnitudes(leaf, dim) for leaf, dim in zip(leaves, dims, strict=True)]
        for seen, sizes in zip(self._seen, batch, strict=True):
            seen.extend(sizes)
        self.scales = [
            min(_usual(seen), MARGIN * _usual(sizes)) if len(sizes) >= SOME_ROWS else _usual(seen)
            for seen, sizes in zip(self._seen, batch, strict=True)
        ]

    def allow(self, shares: Sequence[float]) -> None:
        """Take over what another process learnt to be rounding."""
        self.allowed = [
            min(cap, max(allowed, share)) for allowed, share, cap in zip(self.allowed, shares, self._caps, strict=True)
        ]

    def learn(self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
        """Take the difference of two computations of the same rows for rounding; ``False`` where it is too large."""
        found = [relative(one, other, scale) for one, other, scale in zip(a, b, self.scales, strict=True)]
        if any(share > cap for share, cap in zip(found, self._caps, strict=True)):
            return False
        self.allowed = [
            min(cap, max(allowed, MARGIN * share))
            for allowed, share, cap in zip(self.allowed, found, self._caps, strict=True)
        ]
        return True

    def agree(self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], losses: Sequence[Loss] | None = None) -> bool:
        """Whether two computations of the same rows differ by rounding, and what storing one changed, at most."""
        return self.disagreement(a, b, losses) is None

    def disagreement(
        self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], losses: Sequence[Loss] | None = None
    ) -> tuple[int, float] | None:
        """The first output that differs by more than that, and by how much of its largest magnitude."""
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            if not self.agrees(index, one, other, EXACT if losses is None else losses[index]):
                return index, relative(one, other, 0.0)
        return None

    def agrees(self, index: int, a: torch.Tensor, b: torch.Tensor, loss: Loss = EXACT) -> bool:
        """Whether two computations of output ``index`` differ by rounding, and what storing one changed, at most."""
        found = relative(a, b, self.scales[index], loss.absolute)
        return found <= max(self.allowed[index], FLOOR[_width(a.dtype)]) + loss.relative


# Operators that say how many of all rows are of a kind, or which these are; and those that do where they go along rows.
_COUNT = frozenset({"nonzero", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc", "masked_select"})
_COUNT_ALONG = frozenset({"sort", "argsort", "topk", "cumsum", "kthvalue"})


class Observed(Observer):  # type: ignore[no-untyped-call]
    """Notes which operators a run consists of.

    Attributes
    ----------
    width : int
        Bytes of the narrowest floating-point numbers that they compute, which round off what shows in wider ones, too;
        8 where there are none. Those of one byte count as two: few elements of a row pass through them.
    counts : bool
        Whether one asks how many of all rows are of a kind, as a mixture of experts with a capacity does.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.width, self.counts = 8, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.counts = self.counts or _counts(func, args, kwargs or {})
        # What is made of no numbers, such as zeros to add to, is not rounded.
        if any(map(_rounds, pytree.arg_tree_leaves(*args))):
            for leaf in filter(_rounds, pytree.tree_leaves(made)):
                self.width = min(self.width, max(_width(leaf.dtype), 2))
        return made


def _counts(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    schema = getattr(func, "_schema", None)  # operators that take functions have none
    name = schema.name.removeprefix("aten::") if schema is not None else ""
    if name in ("index", "index_put", "index_put_"):
        return any(leaf is not None and leaf.dtype in (torch.bool, torch.uint8) for leaf in args[1])
    if schema is None or name not in _COUNT_ALONG:
        return name in _COUNT
    named = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | {**kwargs}
    dim = named.get("dim", -1)
    return not isinstance(dim, int) or dim % max(args[0].ndim, 1) == 0


def _rounds(leaf: Any) -> bool:
    """Whether a value is a tensor of numbers that are rounded."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _usual(seen: Iterable[float]) -> float:
    rows = sorted(seen)
    return rows[3 * (len(rows) - 1) // 4] if rows else 0.0


def _width(dtype: torch.dtype) -> int:
    """Bytes of the real numbers behind a dtype; integers count as the widest, since they do not round."""
    if dtype.is_complex:
        return dtype.itemsize // 2
    return min(dtype.itemsize, 8) if dtype.is_floating_point else 8


def _magnitudes(leaf: torch.Tensor, dim: int) -> list[float]:
    """The largest finite magnitude in each of the first rows, which lie along ``dim``; 0 for integers."""
    rows = leaf.movedim(dim, 0)[:MOST_ROWS]
    if not _rounds(leaf) or not leaf.numel():
        return [0.0] * rows.shape[0]
    rows = rows.reshape(rows.shape[0], -1).to(torch.complex128 if leaf.is_complex() else torch.float64).abs()
    found: list[float] = torch.nan_to_num(rows, posinf=0.0).amax(1).tolist()
    return found


def relative(a: torch.Tensor, b: torch.Tensor, scale: float, without: float = 0.0) -> float:
    """The largest difference as a share of the largest magnitude, ``without`` so much; for few flipped integers 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if not a.numel() or identical(a, b):
        return 0.0
    if not _rounds(a):
        return 0.0 if float((a != b).float().mean()) <= FLIPPED and a.numel() > 1 else math.inf
    absolute, share = difference(a, b)
    if math.isnan(share):
        return math.inf
    share *= max(0.0, 1.0 - without / absolute) if absolute else 1.0
    return min(share, max(0.0, absolute - without) / scale) if scale else share


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one dtype are the same bit for bit."""
    return a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(leaf: torch.Tensor) -> torch.Tensor:
    return element_bytes(leaf.resolve_conj().resolve_neg().contiguous())


def nearly(a: torch.Tensor, b: torch.Tensor, scale: float) -> bool:
    """Whether two rows of batches of one size differ by no more than rounding; ``scale`` is what rows usually have."""
    if not _rounds(a):
        return identical(a, b)
    allowed = ULPS[_width(a.dtype)] * torch.finfo(a.dtype).eps * max([scale, *_magnitudes(a, 0)])
    wide = torch.complex128 if a.is_complex() else torch.float64
    gaps = (a.to(wide) - b.to(wide)).abs()
    return bool(((gaps <= allowed) | (a == b) | (a.isnan() & b.isnan())).all())


def difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """The largest difference of two tensors of one shape, and its share of their largest magnitude.

    Both are not-a-number where one tensor has such an element, or an infinity, and the other has not.
    """
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide).flatten(), b.to(wide).flatten()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0, 0.0
    largest = (a[~same] - b[~same]).abs().max()
    finite = torch.cat((a, b)).abs()
    finite = finite[finite.isfinite()]
    scale = finite.max() if finite.numel() else torch.ones((), dtype=torch.float64, device=a.device)
    return float(largest), float(largest / scale) if scale else math.inf
