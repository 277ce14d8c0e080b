"""A batch from up to three sources: rows in memory, rows read from disk, rows that were just computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchcache.store.buffers import Buffers
from torchcache.store.found import Found
from torchcache.store.precision import Precision
from torchcache.store.select import place_rows, select_rows
from torchcache.store.slab import ABSENT
from torchcache.values.layout import Layout


def assemble(
    precision: Precision,
    digests: Sequence[bytes],
    missing: dict[bytes, int],
    found: Found,
    computed: Sequence[torch.Tensor],
    layouts: Sequence[Layout],
    near: torch.device,
    buffers: Buffers,
) -> Sequence[torch.Tensor]:
    """Fresh leaves of shape ``(len(digests), *)``, rows first, in the caller's order; some are still to be cast.

    Parameters
    ----------
    precision : Precision
        How rows are stored.
    digests : sequence of bytes
        One a row of the batch.
    missing : dict of bytes to int
        The digests that were computed, in the order of ``computed``.
    found : Found
        What the tiers hold.
    computed : sequence of torch.Tensor
        The rows that were computed, one tensor a leaf.
    layouts : sequence of Layout
        What each leaf looks like to its user.
    near : torch.device
        Where the arguments are.
    buffers : Buffers
        Where leaves on the CPU are made.
    """

    def given(stored: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return precision.unpack(stored, lambda index, count: layouts[index].empty(count, near, buffers))

    if found.rows and ABSENT not in found.slots:
        return given(found.rows)
    order = {digest: row for row, digest in enumerate(missing)}
    held: list[int] = []
    read: tuple[list[int], list[int]] = ([], [])
    fresh: tuple[list[int], list[int]] = ([], [])
    for row, (digest, slot) in enumerate(zip(digests, found.slots, strict=True)):
        if slot != ABSENT:
            held.append(row)
        elif digest in found.extra:
            read[0].append(row)
            read[1].append(found.extra[digest])
        else:
            fresh[0].append(row)
            fresh[1].append(order[digest])
    merged = [layout.empty(len(digests), near, buffers) for layout in layouts]
    parts = [(held, given(found.rows))] if held else []
    if read[0]:
        parts.append((read[0], given([select_rows(leaf, read[1]) for leaf in found.extra_rows])))
    if fresh[0]:
        parts.append((fresh[0], [select_rows(leaf, fresh[1]) for leaf in computed]))
    for rows, leaves in parts:
        for target, leaf in zip(merged, leaves, strict=True):
            place_rows(target, rows, leaf)
    return merged
