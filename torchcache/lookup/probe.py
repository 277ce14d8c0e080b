"""The row-wise check: row i of the output must be a function of row i of the input alone.

Tried on real rows, in batches of two, where the same kernels run: the same row beside two different neighbours
must come out the same bit for bit, and in another place of a batch of three and in the whole batch the same within
rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from torchcache.errors import RowwiseError
from torchcache.lookup.culprit import Run, find_culprit
from torchcache.store.select import concatenate, element_bytes, select_rows

__all__ = ["close", "difference", "probe"]

Compute = Callable[[list[torch.Tensor]], list[torch.Tensor]]

# Rounding may differ between batch sizes by this much of a row's largest magnitude; a row that depends on
# its neighbours or on the batch size differs by far more.
ROUNDING = {8: 1e-4, 4: 1e-2, 2: 1e-1, 1: 0.5}
# Share of the elements of an integer output that rounding upstream (an argmax, a threshold) may flip.
FLIPPED = 0.1


def probe(
    where: str, rows: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], compute: Compute, coarse: bool
) -> None:
    """Run the original on pairs of ``rows`` and compare.

    Parameters
    ----------
    where : str
        The region, for the error.
    rows : sequence of torch.Tensor
        Batched inputs, shape ``(m, *)``.
    outputs : sequence of torch.Tensor
        What the original computed for them, shape ``(m, *)``.
    compute : callable
        The original, from rows to outputs.
    coarse : bool
        Whether it computes in a lower precision than the outputs' dtype (autocast).

    Raises
    ------
    RowwiseError
        When a row depends on another row or on chance, naming the likely culprit.
    """
    last = rows[0].shape[0] - 1
    one = [leaf[last:] for leaf in rows]
    other = [leaf[:1] for leaf in rows] if last else list(map(_altered, one))
    third = [leaf[1:2] for leaf in rows] if last > 1 else list(map(_altered, other))
    pair, beside, trio = _batch(one, other), _batch(one, third), _batch(other, one, third)

    def refusal(here: Run, there: Run, again: Sequence[torch.Tensor], exact: bool) -> RowwiseError:
        same = _identical if exact else functools.partial(close, coarse=coarse)
        if all(close(a, b, coarse) for a, b in zip(first, again, strict=True)):
            return _mixing(where, find_culprit(compute, here, there, same))
        return _unstable(where, find_culprit(compute, Run(pair, 0), Run(pair, 0), same))

    first, second, elsewhere = compute(pair), compute(beside), compute(trio)
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if _identical(a[:1], b[:1]):
            continue
        again = compute(pair)
        exact = _identical(a[:1], again[index][:1])
        if exact or not close(a[:1], b[:1], coarse):
            raise refusal(Run(pair, 0), Run(beside, 0), again, exact)
    runs: list[tuple[Run, Run, Sequence[torch.Tensor]]]
    runs = [(Run(pair, 0), Run(trio, 1), elsewhere), (Run(pair, 1), Run(trio, 0), elsewhere)]
    runs.append((Run(pair, 0), Run(list(rows), last), outputs))
    if last:
        runs.append((Run(pair, 1), Run(list(rows), 0), outputs))
    for here, there, others in runs:
        for a, b in zip(first, others, strict=True):
            if not close(a[here.row : here.row + 1], b[there.row : there.row + 1], coarse):
                raise refusal(here, there, compute(pair), False)


def _unstable(where: str, culprit: str | None) -> RowwiseError:
    likely = f"First seen at {culprit}." if culprit else "Likely: dropout in train mode, noise, a counter."
    return RowwiseError(
        f"{where} cannot be cached: the same rows give different outputs when computed again, so it is random or "
        f"keeps state between calls. {likely} Call .eval() on it, mark a smaller part, or unmark it"
    )


def _mixing(where: str, culprit: str | None) -> RowwiseError:
    likely = (
        f"First seen at {culprit}."
        if culprit
        else "Likely: BatchNorm in train mode, a mean, softmax or matmul over dim 0, or an input without a batch "
        "dimension whose first dimension equals the batch size."
    )
    return RowwiseError(
        f"{where} cannot be cached: a row's output changes with the other rows of the batch. {likely} Call .eval() if "
        "that is its train mode, mark a smaller part, or unmark it"
    )


def _batch(*rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [concatenate(leaves) for leaves in zip(*rows, strict=True)]


def _altered(leaf: torch.Tensor) -> torch.Tensor:
    """Another valid row of the same kind: the elements of ``leaf`` in reverse, or zeros where that is no change."""
    reverse = select_rows(leaf.flatten(), range(leaf.numel() - 1, -1, -1)).reshape(leaf.shape)
    return torch.zeros_like(leaf) if _identical(reverse, leaf) else reverse


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(leaf: torch.Tensor) -> torch.Tensor:
    return element_bytes(leaf.resolve_conj().resolve_neg().contiguous())


def close(a: torch.Tensor, b: torch.Tensor, coarse: bool) -> bool:
    """Whether two tensors of one shape differ by rounding at most; ``coarse`` where half precision computed them."""
    if not a.numel() or _identical(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return bool((a != b).float().mean() <= FLIPPED)
    size = a.dtype.itemsize // (2 if a.is_complex() else 1)
    return difference(a, b)[1] <= ROUNDING[min(size, 2) if coarse else size]


def difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """The largest difference of two tensors of one shape, and its share of their largest magnitude where they differ.

    Both are not-a-number where one tensor has such an element and the other has not.
    """
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide).flatten(), b.to(wide).flatten()
    same = (a == b) | (a.isnan() & b.isnan())
    a, b = a[~same], b[~same]
    if not a.numel():
        return 0.0, 0.0
    largest = (a - b).abs().max()
    return float(largest), float(largest / torch.maximum(a.abs().max(), b.abs().max()))
