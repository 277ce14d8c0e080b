"""Whether it matters to an original that gradients are recorded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchcache.batch import Batch, lacks
from torchcache.checks.arguments import Arguments
from torchcache.checks.chance import generators_kept
from torchcache.checks.plan import Form
from torchcache.checks.probe import Learnt
from torchcache.checks.roles import Roles, rows_of, select
from torchcache.context import normal_tensors
from torchcache.errors import Bypass
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


def check_outputs(form: Form, batch: Batch, output: Taken) -> None:
    """Raise ``Bypass`` where an output needs a gradient; take note where gradients were recorded and none does."""
    if any(leaf.requires_grad for leaf in output.tensors):
        raise Bypass(
            "its output needs a gradient",
            "freeze what it reads, turn off what makes frozen parts need one (gradient checkpointing of "
            "transformers does, by enable_input_require_grads), or call it under torch.no_grad()",
        )
    if batch.given.gradients:
        form.recorded = batch.who


def check_recorded(form: Form, batch: Batch, roles: Roles) -> None:
    """Raise ``Bypass`` where an output needs a gradient in this mode, though rows were stored in the other one."""
    if not batch.given.gradients or form.recorded == batch.who or lacks(batch.given.subject):
        return
    rows, _ = _two_rows(batch, roles)
    try:
        with generators_kept(), normal_tensors():
            check_outputs(form, batch, take_outputs(batch.original(rows)))
    except Bypass as bypass:
        form.refuse(batch, bypass)
        raise


def _two_rows(batch: Batch, roles: Roles) -> tuple[list[torch.Tensor], list[int]]:
    """The arguments of a call on two of the caller's rows, and which these are."""
    given = rows_of(batch.taken.tensors, roles)
    some = [0, min(1, given[0].shape[0] - 1)]
    return select(batch.taken.tensors, roles, [select_rows(leaf, some) for leaf in given]), some


def modes_agree(batch: Batch, learnt: Learnt, whole: Taken | None) -> bool:
    """Whether two rows come out the same in both grad modes."""
    rows, some = _two_rows(batch, learnt.rows)
    with generators_kept(), normal_tensors():
        here = take_outputs(batch.original(rows)) if whole is None or some == [0, 0] else whole
        there = take_outputs(batch.original(rows, gradients=not batch.given.gradients)).tensors
    dims = learnt.output_dims
    mine = [leaf.narrow(dim, 0, 2) for leaf, dim in zip(here.tensors, dims, strict=True)]
    return len(mine) == len(there) and learnt.rounding.agree(mine, there)
