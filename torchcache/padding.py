"""Rows without their padding: one call becomes calls by the real lengths of its rows, and their outputs one again.

Each row is cut, or padded, to the next of a few lengths, in one way whatever its batch looked like. What is
looked up, computed and stored is that row. It is the user's promise that a model gives the same at real positions
then; it is compared with what the original gives for the caller's own batch, for each length of batches that comes.
"""

from __future__ import annotations

import collections
import dataclasses
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchcache.batch import Given, Subject
from torchcache.checks.chance import Generators, generators_kept
from torchcache.checks.compare import Rounding
from torchcache.context import computing, current_ids, normal_tensors, some_ids
from torchcache.errors import Bypass
from torchcache.identity.numeric import autocasts
from torchcache.logging import warn_once
from torchcache.options import CacheOptions
from torchcache.values.take import Taken, take_arguments, take_outputs

__all__ = ["Padding"]

# Rows are as long as the next multiple of this, or of a power of two near an eighth of what is real: of few lengths
# there are many rows each, which are looked up and computed together.
GRAIN = 8
# Proofs and refusals that are remembered.
MOST = 1024
# In so many kinds of calls real positions depended on the padding: all calls of that form are computed.
MOST_LEAKS = 3
Tensors = Sequence[torch.Tensor]
Ordinary = Callable[[Given], Any]
_requires_grad = operator.attrgetter("requires_grad")


@dataclasses.dataclass(frozen=True)
class _Batch:
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
    """

    taken: Taken
    mask: int
    left: bool
    lengths: list[int]

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.lengths)

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


class Padding:
    """The calls of a region whose rows are padded.

    Parameters
    ----------
    subject : Subject
        What the region stands for.
    options : CacheOptions
        Its options; ``padding`` names the argument.
    """

    def __init__(self, subject: Subject, options: CacheOptions) -> None:
        self._subject = subject
        self._name, value = str(options.padding), options.padding_value
        self._blank = 0 if value is None else value
        # For calls of one kind: which outputs have positions, or why such calls are computed.
        self._known: dict[tuple[Any, ...], tuple[bool, ...] | Bypass] = {}
        self._blanks: dict[tuple[bytes, int], Any] = {}
        self._left = False
        self._leaks: collections.Counter[tuple[Any, ...]] = collections.Counter()
        self._share, self._began, self._spent = options.audit, time.perf_counter(), 0.0

    def __call__(self, given: Given, ordinary: Ordinary) -> Any:
        """What the original returns, but zeros where there is padding.

        Parameters
        ----------
        given : Given
            The call.
        ordinary : callable
            Makes a call in which all of a row counts.

        Raises
        ------
        Bypass
            When it is to be computed as a whole.
        """
        batch = self._take(given)
        seen = self._subject.identity.look()
        trains = torch.is_grad_enabled() and any(map(_requires_grad, seen.tensors))
        if batch is None or trains or (torch.is_grad_enabled() and any(map(_requires_grad, batch.taken.tensors))):
            return ordinary(given)
        current_ids(batch.count, self._subject.name)  # as many as there are rows, or an error
        shapes = tuple([(tensor.dtype, tensor.shape[2:]) for tensor in batch.taken.tensors])
        how = (batch.along, batch.rows, batch.left, shapes, _length(batch.width), autocasts())
        form = (self._subject.identity.current(seen), batch.taken.key)
        known = self._known.get(form) or self._known.get((*form, how))
        if isinstance(known, Bypass):
            raise known
        try:
            if known is None:
                known, outputs = self._learn(given, batch, ordinary)
                self._remember((*form, how), known)
                return outputs
            outputs = self._merged(batch, *self._pieces(given, batch, ordinary), known)
            if self._spent <= self._share * (time.perf_counter() - self._began):
                self._look_again(given, batch, outputs, known)
            return outputs
        except Bypass as bypass:
            if bypass.lasting:
                self._remember((*form, how), bypass)
            if isinstance(bypass, _Leak):
                self._leaks[form] += 1
                if known is not None or self._leaks[form] >= MOST_LEAKS:
                    self._remember(form, bypass)
                bypass.quiet = self._leaks[form] > 1
            raise

    def _remember(self, kind: tuple[Any, ...], known: tuple[bool, ...] | Bypass) -> None:
        if len(self._known) >= MOST:
            self._known.clear()
            self._leaks.clear()
        self._known[kind] = known

    def _look_again(self, given: Given, batch: _Batch, outputs: Any, along: tuple[bool, ...]) -> None:
        """Compare a call that was served with what the original gives for the caller's own batch."""
        start = time.perf_counter()
        with generators_kept():
            whole = take_outputs(given.run())
        self._agree(batch, range(batch.count), whole, take_outputs(outputs), along, batch.width)
        self._spent += time.perf_counter() - start

    def _take(self, given: Given) -> _Batch | None:
        """The call with the lengths of its rows; ``None`` where the argument was not given."""
        with computing():  # it is for the original that its arguments are loaded
            given.load()
        taken = take_arguments(given.args, given.kwargs, self._subject.names)
        place = taken.place(self._name)
        if place is None:
            warn_once(
                f"{self._subject.name} is called without {self._name!r}, which padding= names: all positions count"
            )
            return None
        mask = taken.tensors[place]
        if mask.ndim != 2:
            shape = tuple(mask.shape)
            raise Bypass(f"padding={self._name!r} has shape {shape}", "name an argument of shape (rows, positions)")
        if not mask.numel():
            raise Bypass("the batch is empty", lasting=False, quiet=True)
        real, width = mask != self._blank, mask.shape[1]
        places = torch.arange(width, device=mask.device)
        starts, ends = width - (real * (width - places)).amax(1), (real * (places + 1)).amax(1)
        first, last = torch.stack([starts, ends]).tolist()
        spans = [(start, end) for start, end in zip(first, last, strict=True) if end]
        right, left = all(start == 0 for start, _ in spans), all(end == width for _, end in spans)
        if not (right or left):
            raise Bypass("its rows begin and end at different places", "pad all rows on one side", lasting=False)
        self._left = self._left if right and left else left
        return _Batch(taken, place, self._left, [max(0, end - start) for start, end in zip(first, last, strict=True)])

    def _pieces(self, given: Given, batch: _Batch, ordinary: Ordinary) -> tuple[list[list[int]], list[Taken]]:
        """The rows of each length, and what the region returns for them."""
        groups: dict[int, list[int]] = collections.defaultdict(list)
        for row, length in enumerate(batch.lengths):
            groups[_length(length)].append(row)
        made = []
        for width, rows in groups.items():
            args, kwargs = batch.taken.rebuild(self._cut(batch, rows, width))
            with some_ids(rows):
                made.append(take_outputs(ordinary(Given(self._subject, args, kwargs, given.number))))
        return list(groups.values()), made

    def _cut(self, batch: _Batch, rows: Sequence[int], width: int, others: Tensors | None = None) -> list[torch.Tensor]:
        """The arguments of some rows at their length; where there is padding, ``others``, or what is usual there."""
        pads, cut = batch.pads(rows, width), []
        for place, (tensor, has_rows, along) in enumerate(
            zip(batch.taken.tensors, batch.rows, batch.along, strict=True)
        ):
            mine = tensor
            if has_rows and len(rows) != batch.count:
                mine = mine.index_select(0, torch.tensor(rows, device=mine.device))
            if along:
                mine = batch.fitted(mine, width)
            if along and has_rows:
                where = _spread(pads, mine)
                if others is None or place == batch.mask:
                    mine = mine.masked_fill(where, self._blank_of(batch, place))
                else:
                    mine = torch.where(where, others[place], mine)
            cut.append(mine)
        return cut

    def _blank_of(self, batch: _Batch, place: int) -> Any:
        """What callers put where there is padding, if it is always the same; else zero."""
        if place == batch.mask:
            return self._blank
        key = batch.taken.key, place
        if key not in self._blanks:
            tensor = batch.taken.tensors[place]
            found = tensor[batch.pads(range(batch.count), batch.width).to(tensor.device)].flatten()
            if not found.numel():
                return 0
            self._blanks[key] = found[0].item() if bool((found == found[0]).all()) else 0
        return self._blanks[key]

    def _merged(self, batch: _Batch, groups: list[list[int]], made: list[Taken], along: Sequence[bool]) -> Any:
        """One output of those of the groups, padded with zeros."""
        if len({taken.key for taken in made}) > 1:
            raise Bypass("a number or the structure of its output depends on the length", lasting=False)
        leaves = []
        for place, has_positions in enumerate(along):
            parts = [taken.tensors[place] for taken in made]
            if has_positions:
                parts = [
                    batch.fitted(part.masked_fill(_spread(batch.pads(rows, part.shape[1]), part), 0), batch.width)
                    for rows, part in zip(groups, parts, strict=True)
                ]
            whole = parts[0]
            if len(parts) > 1:
                whole = whole.new_empty((batch.count, *whole.shape[1:]))
                for rows, part in zip(groups, parts, strict=True):
                    whole.index_copy_(0, torch.tensor(rows, device=part.device), part)
            leaves.append(whole)
        return made[0].rebuild(leaves)

    def _learn(self, given: Given, batch: _Batch, ordinary: Ordinary) -> tuple[tuple[bool, ...], Any]:
        """Which outputs have positions, and the outputs, where real positions are the same at every length."""
        generators = Generators()
        whole = take_outputs(given.run())
        if generators.moved():
            raise Bypass("it draws random numbers", "call .eval() on it, or mark a part that draws none")
        with generators_kept(), normal_tensors(), torch.no_grad():
            along = self._compare(batch, whole)
        outputs = self._merged(batch, *self._pieces(given, batch, ordinary), along)
        self._agree(batch, range(batch.count), whole, take_outputs(outputs), along, batch.width)
        return along, outputs

    def _compare(self, batch: _Batch, whole: Taken) -> tuple[bool, ...]:
        """Compute two rows at two lengths, with other things where there is padding."""
        rows = sorted(range(batch.count), key=batch.lengths.__getitem__)[:2]
        width = _length(batch.lengths[rows[-1]])
        short = self._original(batch, self._cut(batch, rows, width))
        others = [_others(batch, place, rows, width + GRAIN) for place in range(len(batch.rows))]
        longer = self._original(batch, self._cut(batch, rows, width + GRAIN, others))
        if not short.key == longer.key == whole.key:
            raise Bypass("a number or the structure of its output depends on the length")
        along = []
        for place, leaves in enumerate(zip(short.tensors, longer.tensors, whole.tensors, strict=True)):
            two, three, given = (tuple(leaf.shape) for leaf in leaves)
            if (two[:1], three[:1], given[:1]) != ((len(rows),), (len(rows),), (batch.count,)):
                raise Bypass(f"output{whole.path(place)} has not its rows first", "mark a part that has")
            along.append((two[1:2], three[1:2], given[1:2]) == ((width,), (width + GRAIN,), (batch.width,)))
            rest = 1 + along[-1]
            if not two[rest:] == three[rest:] == given[rest:]:
                raise Bypass(
                    f"output{whole.path(place)} follows the length otherwise than by its second dimension",
                    "mark a part that returns one value for each position, or one for each row",
                )
        self._agree(batch, rows, short, longer, along, width)
        return tuple(along)

    def _original(self, batch: _Batch, tensors: Tensors) -> Taken:
        args, kwargs = batch.taken.rebuild(tensors)
        try:
            with computing():
                return take_outputs(self._subject.run(args, kwargs))
        except Bypass:
            raise
        except Exception as error:
            said = (str(error).splitlines() or [""])[0][:200]
            raise Bypass(
                f"it does not run on rows of another length than it was given ({type(error).__name__}: {said})",
                "leave padding= out, or mark a part that takes any length",
            ) from None

    def _agree(
        self, batch: _Batch, rows: Sequence[int], one: Taken, other: Taken, along: Sequence[bool], width: int
    ) -> None:
        """Raise a ``_Leak`` where real positions of ``rows`` differ by more than rounding."""
        real = ~batch.pads(rows, width)
        for place, (a, b, has_positions) in enumerate(zip(one.tensors, other.tensors, along, strict=True)):
            rounding = Rounding([a], coarse=bool(autocasts()))
            if has_positions:
                a, b = batch.fitted(a, width), batch.fitted(b, width)
            for row in range(len(rows)):
                mine, its = (leaf[row][real[row].to(leaf.device)] if has_positions else leaf[row] for leaf in (a, b))
                if rounding.learn([mine], [its]):
                    continue
                found = rounding.disagreement([mine], [its])
                share = f" by {found[1]:.1%} of its largest magnitude" if found is not None else ""
                raise _Leak(
                    f"output{one.path(place)} depends on the padding{share}",
                    "leave padding= out, or mark a part in which padding is masked",
                )


class _Leak(Bypass):
    """Real positions depend on the padding."""


def _length(positions: int) -> int:
    """How long a row with so many real positions is made."""
    grain = max(GRAIN, 1 << max(0, (positions - 1) // GRAIN).bit_length())
    return max(1, -(-positions // grain)) * grain


def _spread(pads: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
    """``(rows, positions)`` in a form that covers all of ``(rows, positions, ...)``."""
    return pads.to(over.device).reshape(*pads.shape, *[1] * (over.ndim - 2))


def _others(batch: _Batch, place: int, rows: Sequence[int], width: int) -> torch.Tensor:
    """What may stand where there is padding: a row's own values, from its end to its beginning."""
    tensor = batch.taken.tensors[place]
    if not (batch.along[place] and batch.rows[place]):
        return tensor
    mine = tensor[list(rows)].flip(1)
    return mine.repeat(1, -(-width // mine.shape[1]), *[1] * (mine.ndim - 2))[:, :width]
