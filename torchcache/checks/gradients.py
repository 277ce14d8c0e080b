"""Whether it matters to an original that gradients are recorded: asked only of programs that ask for it themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchcache.batch import Batch
from torchcache.checks.arguments import Arguments
from torchcache.checks.chance import generators_kept
from torchcache.checks.probe import Learnt, rows_of, select
from torchcache.context import normal_tensors
from torchcache.lazy.use import loaded
from torchcache.store.select import select_rows
from torchcache.values.take import Taken, take_outputs

# Of a probe's batches the one that is compared with most others of its size.
THIRD = 3


class Original:
    """What a probe runs: the original on other rows, one batch of them in the other grad mode.

    A probe that finds nothing has compared that batch, too.

    Parameters
    ----------
    batch : Batch
        The call.
    both : bool
        Whether the other mode is wanted.

    Attributes
    ----------
    crossed : bool
        Whether a batch ran in the other mode.
    """

    def __init__(self, batch: Batch, both: bool) -> None:
        self._batch = batch
        self._left = THIRD if both else 0
        self.crossed = False

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Taken:
        """The outputs for ``tensors`` in place of the caller's."""
        self._left -= 1
        other = self._left == 0
        self.crossed |= other
        given = list(map(loaded, tensors))
        arguments = Arguments(given)
        outputs = self._batch.original(given, gradients=self._batch.given.gradients != other)
        arguments.check()
        return take_outputs(outputs)


def modes_agree(batch: Batch, learnt: Learnt, whole: Taken | None) -> bool:
    """Whether two rows come out the same in both grad modes."""
    tensors = batch.taken.tensors
    given = rows_of(tensors, learnt.rows)
    some = [0, min(1, given[0].shape[0] - 1)]
    rows = select(tensors, learnt.rows, [select_rows(leaf, some) for leaf in given])
    with generators_kept(), normal_tensors():
        here = take_outputs(batch.original(rows)) if whole is None or some == [0, 0] else whole
        there = take_outputs(batch.original(rows, gradients=not batch.given.gradients)).tensors
    dims = learnt.output_dims
    mine = [leaf.narrow(dim, 0, 2) for leaf, dim in zip(here.tensors, dims, strict=True)]
    return len(mine) == len(there) and learnt.rounding.agree(mine, there)
