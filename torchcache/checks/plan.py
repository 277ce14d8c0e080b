"""What was learnt of calls, once: of all of one form, and of one kind enough to rebuild a batch of its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from torchcache.batch import Batch
from torchcache.checks.alarm import Otherwise
from torchcache.checks.chance import generators_kept
from torchcache.checks.extremes import Extremes
from torchcache.checks.probe import Learnt
from torchcache.checks.roles import Roles, rows_of
from torchcache.digest.cpu import digest_bytes
from torchcache.errors import Bypass
from torchcache.logging import warn_once
from torchcache.options import CacheOptions
from torchcache.store.blob import RowSpec
from torchcache.store.buffers import Buffers
from torchcache.store.precision import Precision
from torchcache.values.layout import Layout, View, is_alone, place_of
from torchcache.values.take import Taken, take_outputs

OTHERWISE = (
    "the structure of its output, or a number in it, differs between calls",
    "mark a part that returns the same structure for all rows",
)
ALONE = (
    "a batch of one row comes out otherwise than that row among others",
    "have its forward treat it as any other: squeeze(-1), not squeeze()",
)
CHANGED = "what computes it changed during the call"
# Names of outputs in a message.
MOST_NAMES = 20


@dataclasses.dataclass
class Form:
    """What was learnt of calls whose arguments have one structure.

    Parameters
    ----------
    roles : tuple of (int or None) or None
        For each tensor argument the dimension of its rows.
    learnt : Learnt or None
        What the last probe learnt.
    refused : tuple of (bytes, Bypass or str) or None
        Why such calls are computed, or the text of a ``RowwiseError``, and the identity that this was learnt of.
    spare : list of torch.Tensor or None
        The arguments of a call with one row, to probe others with.
    unsettled : int
        Calls in a row that changed what computes them.
    recorded : bytes
        The identity of which no output needs a gradient where gradients are recorded.
    """

    roles: Roles | None = None
    learnt: Learnt | None = None
    refused: tuple[bytes, Bypass | str] | None = None
    spare: list[torch.Tensor] | None = None
    unsettled: int = 0
    recorded: bytes = b""

    def refuse(self, batch: Batch, bypass: Bypass) -> None:
        """Refuse such calls as long as the same computes them, where the reason lasts."""
        if bypass.lasting:
            self.refused = (batch.who, bypass)

    def keep_spare(self, batch: Batch) -> None:
        """Keep the arguments of a call with one row."""
        first = batch.taken.tensors[0]
        if first.ndim and first.shape[0] == 1:
            self.spare = [tensor.detach().clone() for tensor in batch.taken.tensors]


@dataclasses.dataclass
class Plan:
    """What was learnt of calls of one identity, form, numeric mode and row shape, whose arguments lie alike in memory.

    Parameters
    ----------
    form : bytes
        Which calls these are.
    learnt : Learnt
        Roles, dimensions and rounding.
    output : Taken
        An output without data, for its structure and constants.
    layout : bytes
        Digest of structure, constants, row shapes and dtypes of the output.
    precision : Precision
        How its rows are stored.
    proven : bool
        Whether rows of this shape were probed in this process.
    alone : bool or None
        Whether a batch of one row comes out as that row does among others; ``None`` until one is seen.
    believed : bool
        Whether rows from disk were computed and compared.
    taken_over : bool
        Whether another process learnt it, so that rows were served before any could be computed.
    kept : set
        Under which keys it is kept for other processes, or cannot be.
    extremes : Extremes
        What the rows that were computed were like.
    known_layouts : tuple of Layout or None
        How outputs lie in memory, as far as that was seen.
    views : tuple of (View or None)
        Which leaves of an output are views of others; empty where none is.
    """

    form: bytes
    learnt: Learnt
    output: Taken
    layout: bytes
    precision: Precision
    proven: bool = True
    alone: bool | None = None
    believed: bool = False
    taken_over: bool = False
    kept: set[bytes] = dataclasses.field(default_factory=set)
    extremes: Extremes = dataclasses.field(default_factory=Extremes)
    known_layouts: tuple[Layout, ...] | None = None
    views: tuple[View | None, ...] = ()

    @classmethod
    def of(cls, form: bytes, learnt: Learnt, output: Taken, where: str, options: CacheOptions, *, proven: bool) -> Plan:
        """The plan for calls that return what ``output`` looks like; ``where`` names the region in messages."""
        # There may be one for every length of rows: each leaf takes the memory of one element.
        leaves = [torch.empty(1, dtype=leaf.dtype, device=leaf.device).expand(leaf.shape) for leaf in output.tensors]
        outline, dims = dataclasses.replace(output, tensors=leaves), learnt.output_dims
        precision = precision_of(where, output, dims, options)
        return cls(form, learnt, outline, _layout_digest(output, dims), precision, proven, learnt.alone)

    def rows_first(self, output: Taken) -> list[torch.Tensor]:
        """The leaves of ``output`` with their rows first."""
        return self.rows_first_of(output.tensors)

    def rows_first_of(self, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Leaves of an output with their rows first."""
        return rows_of(leaves, self.learnt.output_dims)

    def rows_again(self, output: Taken, count: int) -> list[torch.Tensor]:
        """The leaves of ``count`` rows that were computed again, rows first; raises ``Otherwise`` for other outputs."""
        if not self.fits(output, count):
            raise Otherwise
        return self.rows_first(output)

    def first_of_two(self, output: Taken) -> Taken:
        """The first row of an output of two, where it has two."""
        if not self.fits(output, 2):
            return output
        pairs = zip(output.tensors, self.learnt.output_dims, strict=True)
        return dataclasses.replace(output, tensors=[leaf.narrow(dim, 0, 1) for leaf, dim in pairs])

    def check_alone(self, row: Callable[[], Taken], batch: Batch) -> None:
        """Refuse a batch of one row, unless such are known to come out as rows among others do.

        The first is computed, and compared with what ``row`` gives: in both grad modes where that may matter.
        """
        if self.alone is None:
            with generators_kept(), torch.no_grad():
                among = row()
            alone = [take_outputs(batch.given.run())]
            if batch.given.subject.identity.asks_for_gradients and batch.mode.gradients is None:
                other = batch.original(batch.taken.tensors, gradients=not batch.given.gradients)
                alone.append(take_outputs(other))
            rounding = self.learnt.rounding
            self.alone = all(self.fits(single, 1) for single in (among, *alone)) and all(
                rounding.learn(among.tensors, single.tensors) for single in alone
            )
            self.kept.clear()
        if not self.alone:
            raise Bypass(*ALONE, lasting=False)

    def place(self, near: torch.device) -> torch.device:
        """Where outputs lie whose inputs are on ``near``."""
        return place_of(self.output.tensors[0].device, near)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as its user gets it."""
        pairs = zip(self.output.tensors, self.learnt.output_dims, strict=True)
        return sum(leaf.nbytes // max(1, leaf.shape[dim]) for leaf, dim in pairs)

    def fits(self, output: Taken, count: int) -> bool:
        """Whether ``output`` has the structure, constants, row shapes and dtypes of this plan, and so many rows."""
        dims = self.learnt.output_dims
        return (
            len(output.tensors) == len(dims)
            and all(
                leaf.ndim > dim and leaf.shape[dim] == count for leaf, dim in zip(output.tensors, dims, strict=True)
            )
            and _layout_digest(output, dims) == self.layout
        )

    def layouts(self, batch: Batch, compute: Callable[[Sequence[int]], Taken]) -> tuple[Layout, ...]:
        """How outputs lie in memory; two rows are computed to see, or one where such arguments have no more."""
        if self.known_layouts is None:
            places = [0] if any(is_alone(lie) for lie in batch.lies) else [0, batch.count - 1]
            return self.note(compute(places))
        return self.known_layouts

    def laid(
        self, layouts: Sequence[Layout], leaves: Sequence[torch.Tensor], near: torch.device, buffers: Buffers
    ) -> list[torch.Tensor]:
        """``leaves``, row-major and rows first, as a call with inputs on ``near`` returns them."""
        found = [layout.apply(leaf, near, buffers) for layout, leaf in zip(layouts, leaves, strict=True)]
        for place, view in enumerate(self.views):
            if view is not None:
                found[place] = view.apply(found[view.base])
        return found

    def note(self, output: Taken) -> tuple[Layout, ...]:
        """Remember how ``output`` lies in memory."""
        leaves, dims = output.tensors, self.learnt.output_dims
        self.known_layouts = tuple(map(Layout.of, leaves, dims))
        self.views = View.among(leaves, dims, self.precision.alike)
        return self.known_layouts


def precision_of(where: str, output: Taken, dims: Sequence[int], options: CacheOptions) -> Precision:
    """How the rows of ``output`` are stored; names in ``options`` that it has not are told, with those that it has.

    Nothing is raised: a call with other arguments may return what this one does not.
    """
    names = [output.name(index) for index in range(len(output.tensors))]
    unknown = [name for name in options.named_outputs if name not in names]
    if unknown:
        shown = ", ".join(map(repr, names[:MOST_NAMES])) + (", ..." if len(names) > MOST_NAMES else "")
        warn_once(f"{where}: cache_dtype names {', '.join(map(repr, unknown))}, but the outputs are {shown}")
    return Precision(names, RowSpec.of(rows_of(output.tensors, dims)), options)


def _layout_digest(output: Taken, dims: Sequence[int]) -> bytes:
    """Digest of structure, constants, row shapes and dtypes of an output."""
    shapes = [
        (str(leaf.dtype), dim, (*leaf.shape[:dim], *leaf.shape[dim + 1 :]))
        for leaf, dim in zip(output.tensors, dims, strict=True)
    ]
    return digest_bytes(output.key + repr(shapes).encode())
