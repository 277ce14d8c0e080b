"""Rows without their padding: one call becomes calls by the real lengths of its rows, and their outputs one again.

Each row is cut, or padded, to the next of a few lengths, in one way whatever its batch looked like. What is
looked up, computed and stored is that row. It is the user's promise that a model gives the same at real positions
then; it is compared with what the original gives for the caller's own batch, for each length of batches and of rows.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from torchcache.batch import Given, Subject, take
from torchcache.checks.chance import Draws, check_again, generators_kept
from torchcache.checks.compare import Observed, Rounding, difference
from torchcache.checks.learning import SETUP_CALLS
from torchcache.checks.plan import precision_of
from torchcache.context import computing, current_ids, normal_tensors, some_ids
from torchcache.errors import Bypass, TorchcacheError, described
from torchcache.identity.numeric import autocasts
from torchcache.identity.written import Written, written_text
from torchcache.logging import warn_once
from torchcache.options import CacheOptions
from torchcache.padded import GRAIN, Blanks, PaddedBatch, counted, length_of, spread
from torchcache.store.precision import EXACT, Loss
from torchcache.values.take import Taken, take_outputs

# Proofs and refusals that are remembered.
MOST = 1024
# In so many kinds of calls real positions depended on the padding: all calls of that form are computed.
MOST_LEAKS = 3
Tensors = Sequence[torch.Tensor]
Ordinary = Callable[[Given], Any]
_requires_grad = operator.attrgetter("requires_grad")


@dataclasses.dataclass(frozen=True)
class _Proof:
    """What was learnt of calls of one kind, in which padding changed nothing.

    Parameters
    ----------
    key : bytes
        Structure and constants of the output.
    along : tuple of bool
        Which outputs have positions.
    rounding : Rounding
        What differences between computations of a row are rounding.
    losses : list of Loss
        What storing a row may change beside, for each output.
    alone : bool
        Whether a batch of one row comes out as that row does among others.
    """

    key: bytes
    along: tuple[bool, ...]
    rounding: Rounding
    losses: list[Loss]
    alone: bool = True


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
        # For calls of one kind: what was learnt, or why such calls are computed.
        self._known: dict[tuple[Any, ...], _Proof | Bypass] = {}
        # For calls of one form: to which lengths rows were cut so far.
        self._lengths: dict[tuple[Any, ...], set[int]] = {}
        self._blanks = Blanks(self._blank)
        self._left, self._widest = False, 0
        self._leaks: collections.Counter[tuple[Any, ...]] = collections.Counter()
        self._pure, self._writes = options.pure, 0
        self._options = options
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
        if given.number:
            current_ids(batch.count, self._subject.name)  # as many as there are rows, or an error
        full = min(batch.lengths) == batch.width
        if full and batch.widest == batch.width:  # nothing is padding, nor could it be
            return ordinary(given)
        self._blanks.check(batch, self._name)
        shapes = tuple([(tensor.dtype, tensor.shape[2:]) for tensor in batch.taken.tensors])
        how = (full, batch.along, batch.rows, batch.left, shapes, length_of(batch.width), autocasts())
        form = (self._subject.identity.current(seen), batch.taken.key)
        known = self._known.get(form) or self._known.get((*form, how))
        if isinstance(known, Bypass):
            raise known
        try:
            if known is None or not batch.groups.keys() <= self._lengths.get(form, set()):
                known, outputs = self._learn(given, batch, ordinary)
                self._remember((*form, how), known)
                self._lengths.setdefault(form, set()).update(batch.groups)
                return outputs
            given.seen = seen._replace(who=form[0])  # all lengths are answered for what computes as the call begins
            outputs = self._merged(batch, *self._pieces(given, batch, ordinary, known), known)
            if self._spent < self._share * (time.perf_counter() - self._began):
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
        except Exception as error:
            if error is given.error or isinstance(error, TorchcacheError):
                raise
            refused = _not_run(error)
            if refused.lasting:
                self._remember((*form, how), refused)
            raise refused from None

    def _remember(self, kind: tuple[Any, ...], known: _Proof | Bypass) -> None:
        if len(self._known) >= MOST:
            self._known.clear()
            self._lengths.clear()
            self._leaks.clear()
            self._blanks.clear()
        self._known[kind] = known

    def _look_again(self, given: Given, batch: PaddedBatch, outputs: Any, proof: _Proof) -> None:
        """Compare a call that was served with what the original gives for the caller's own batch."""
        start = time.perf_counter()
        with generators_kept():
            whole = take_outputs(given.run())
        self._agree(batch, range(batch.count), whole, take_outputs(outputs), proof, batch.width, proof.losses)
        self._spent += time.perf_counter() - start

    def _take(self, given: Given) -> PaddedBatch | None:
        """The call with the lengths of its rows; ``None`` where the argument was not given."""
        with computing():  # it is for the original that its arguments are loaded
            given.load()
        taken = take(given)
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
        self._widest = max(self._widest, width)
        lengths = [max(0, end - start) for start, end in zip(first, last, strict=True)]
        return PaddedBatch(taken, place, self._left, lengths, self._widest)

    def _pieces(
        self, given: Given, batch: PaddedBatch, ordinary: Ordinary, proof: _Proof
    ) -> tuple[list[list[int]], list[Taken]]:
        """The rows of each length, and what the region returns for them."""
        made = []
        for width, rows in batch.groups.items():
            twice = len(rows) == 1 < batch.count and not proof.alone
            rows = rows * 2 if twice else rows
            args, kwargs = batch.taken.rebuild(self._cut(batch, rows, width))
            with some_ids(rows):
                piece = take_outputs(ordinary(Given(self._subject, args, kwargs, given.number, given.seen)))
            made.append(dataclasses.replace(piece, tensors=[leaf[:1] for leaf in piece.tensors]) if twice else piece)
        return list(batch.groups.values()), made

    def _cut(self, batch: PaddedBatch, rows: Sequence[int], width: int) -> list[torch.Tensor]:
        """The arguments of some rows at their length, with what is usual where there is padding."""
        pads, cut = batch.pads(rows, width), []
        for place, (tensor, has_rows, along) in enumerate(
            zip(batch.taken.tensors, batch.rows, batch.along, strict=True)
        ):
            mine = tensor
            if has_rows and [*rows] != [*range(batch.count)]:
                mine = mine.index_select(0, torch.tensor(rows, device=mine.device))
            if along:
                mine = batch.fitted(mine, width)
            numbers = counted(tensor, width) if batch.counts[place] and not (has_rows or batch.left) else None
            mine = mine if numbers is None else numbers  # as they are in longer batches
            if along and has_rows:
                mine = torch.where(spread(pads, mine), self._blanks.of(batch, place), mine)
            cut.append(mine)
        return cut

    def _merged(self, batch: PaddedBatch, groups: list[list[int]], made: list[Taken], proof: _Proof) -> Any:
        """One output of those of the groups, padded with zeros."""
        if {taken.key for taken in made} != {proof.key}:
            raise Bypass("a number or the structure of its output depends on the length", lasting=False)
        leaves = []
        for place, has_positions in enumerate(proof.along):
            parts = [taken.tensors[place] for taken in made]
            if has_positions:
                parts = [
                    batch.fitted(part.masked_fill(spread(batch.pads(rows, part.shape[1]), part), 0), batch.width)
                    for rows, part in zip(groups, parts, strict=True)
                ]
            whole = parts[0]
            if len(parts) > 1:
                whole = whole.new_empty((batch.count, *whole.shape[1:]))
                for rows, part in zip(groups, parts, strict=True):
                    whole.index_copy_(0, torch.tensor(rows, device=part.device), part)
            leaves.append(whole)
        return made[0].rebuild(leaves)

    def _learn(self, given: Given, batch: PaddedBatch, ordinary: Ordinary) -> tuple[_Proof, Any]:
        """What is to be remembered, and the outputs, where real positions are the same at every length."""
        draws = Draws()
        with self._nothing_written():
            whole = take_outputs(given.run())
        draws.check()
        if draws.unclear():
            with self._nothing_written(restore=True):
                check_again(lambda: self._original(batch, batch.taken.tensors), quiet=False)
        with self._nothing_written(restore=True), generators_kept(), normal_tensors(), torch.no_grad():
            proof = self._compare(batch, whole)
        with self._nothing_written(restore=True):
            outputs = self._merged(batch, *self._pieces(given, batch, ordinary, proof), proof)
        self._agree(batch, range(batch.count), whole, take_outputs(outputs), proof, batch.width, proof.losses)
        return proof, outputs

    @contextlib.contextmanager
    def _nothing_written(self, *, restore: bool = False) -> Iterator[None]:
        """Raise a ``Bypass`` where the original writes to its module within the block, unless that may be left out."""
        if self._pure:
            yield
            return
        written = Written(self._subject.module, self._subject.identity.outside())
        error = None
        try:
            yield
        except Bypass as bypass:
            error = bypass
        names = written.changes()
        if names:
            if restore:
                written.restore()
            self._writes += 1
            error = Bypass(*written_text(names, self._subject.module), lasting=False, quiet=self._writes < SETUP_CALLS)
        if error is not None:
            raise error

    def _compare(self, batch: PaddedBatch, whole: Taken) -> _Proof:
        """Compute two rows at two lengths."""
        rows = (2 * sorted(range(batch.count), key=batch.lengths.__getitem__)[:2])[:2]
        if batch.lengths[rows[1]] == batch.width:  # of a row that is not padded no shorter one can be made
            rows = rows[:1] * 2
        width = max(1, batch.lengths[rows[1]])
        wider = batch.width if batch.width > width else min(width + GRAIN, batch.widest)
        short = self._original(batch, self._cut(batch, rows, width))
        with Observed() as observed:
            longer = self._original(batch, self._cut(batch, rows, wider))
        if not short.key == longer.key == whole.key:
            raise Bypass("a number or the structure of its output depends on the length")
        along = []
        for place, leaves in enumerate(zip(short.tensors, longer.tensors, whole.tensors, strict=True)):
            two, three, given = (tuple(leaf.shape) for leaf in leaves)
            if (two[:1], three[:1], given[:1]) != ((len(rows),), (len(rows),), (batch.count,)):
                raise Bypass(f"output{whole.path(place)} has not its rows first", "mark a part that has")
            along.append((two[1:2], three[1:2], given[1:2]) == ((width,), (wider,), (batch.width,)))
            rest = 1 + along[-1]
            if not two[rest:] == three[rest:] == given[rest:]:
                raise Bypass(
                    f"output{whole.path(place)} follows the length otherwise than by its second dimension",
                    "mark a part that returns one value for each position, or one for each row",
                )
        losses = precision_of(self._subject.name, short, [0] * len(along), self._options).losses
        proof = _Proof(whole.key, tuple(along), Rounding(short.tensors, observed.width), losses)
        alone = self._original(batch, self._cut(batch, rows[:1], width))
        alike = alone.key == short.key and [leaf.shape for leaf in alone.tensors] == [
            (1, *leaf.shape[1:]) for leaf in short.tensors
        ]
        if alike:  # of other shapes other kernels run: what that changes is rounding
            mine, its = ([*self._real(batch, rows[:1], taken, proof, width, 0)] for taken in (short, alone))
            alike = proof.rounding.learn(mine, its)
        proof = dataclasses.replace(proof, alone=alike)
        self._agree(batch, rows, short, longer, proof, width)
        return proof

    def _original(self, batch: PaddedBatch, tensors: Tensors) -> Taken:
        args, kwargs = batch.taken.rebuild(tensors)
        try:
            with computing():
                return take_outputs(self._subject.run(args, kwargs))
        except Bypass:
            raise
        except Exception as error:
            raise _not_run(error) from None

    def _real(
        self, batch: PaddedBatch, rows: Sequence[int], taken: Taken, proof: _Proof, width: int, row: int
    ) -> Iterator[torch.Tensor]:
        """The outputs of one of some rows, without its padding."""
        real = ~batch.pads(rows, width)[row]
        for leaf, has_positions in zip(taken.tensors, proof.along, strict=True):
            yield batch.fitted(leaf[row : row + 1], width)[0][real.to(leaf.device)] if has_positions else leaf[row]

    def _agree(
        self,
        batch: PaddedBatch,
        rows: Sequence[int],
        one: Taken,
        other: Taken,
        proof: _Proof,
        width: int,
        losses: Sequence[Loss] = (),
    ) -> None:
        """Raise a ``_Leak`` where real positions of ``rows`` differ by more than rounding, and what storing changed."""
        for row in range(len(rows)):
            pairs = zip(*(self._real(batch, rows, taken, proof, width, row) for taken in (one, other)), strict=True)
            for place, (mine, its) in enumerate(pairs):
                if not proof.rounding.agrees(place, mine, its, losses[place] if losses else EXACT):
                    share = (
                        f" by {difference(mine, its)[1]:.2g} of its largest magnitude"
                        if mine.is_floating_point()
                        else ""
                    )
                    raise _Leak(
                        f"output{one.path(place)} depends on the padding{share}",
                        "leave padding= out, or mark a part in which padding is masked",
                    )


def _not_run(error: Exception) -> Bypass:
    return Bypass(
        f"it does not run on rows of another length than it was given ({described(error)})",
        "leave padding= out, or mark a part that takes any length",
        lasting=not isinstance(error, (MemoryError, torch.OutOfMemoryError)),
    )


class _Leak(Bypass):
    """Real positions depend on the padding."""
