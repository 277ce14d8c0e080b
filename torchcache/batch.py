"""One call of a region: as it was made, and taken apart."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchcache.context import computing, number_of_call, was_there
from torchcache.digest.cpu import digest_bytes
from torchcache.digest.rows import Started
from torchcache.errors import Bypass
from torchcache.identity.containers import Difference
from torchcache.identity.content import versions
from torchcache.identity.identity import Identity, Seen
from torchcache.identity.numeric import NumericMode
from torchcache.lazy.tensor import LazyTensor
from torchcache.lazy.use import loaded
from torchcache.values.layout import Lie
from torchcache.values.take import Taken, take_arguments

# Items of a group of arguments that are looked at to count rows.
MOST_ARGUMENTS = 16


class Later(Protocol):
    """What is built when it is needed first."""

    @property
    def built(self) -> bool:
        """Whether it is there."""

    def build(self) -> None:
        """Have it be there."""

    def note(self, computed: bool) -> None:
        """Take note of a call, in which something was computed or not; it may be gone then."""


class Subject(Protocol):
    """What a region stands for: a marked function or method, or a part of one that was cut out of a graph.

    Attributes
    ----------
    name : str
        Module path and class, for people.
    identity : Identity
        Who computes.
    """

    name: str
    identity: Identity

    @property
    def names(self) -> Sequence[str]:
        """Names of its positional parameters."""

    @property
    def module(self) -> nn.Module | None:
        """The module that it may write to."""

    @property
    def deferred(self) -> Later | None:
        """What computes, where that is built when it is needed first."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original, on any arguments."""


def lacks(subject: Subject) -> bool:
    """Whether what computes is still to be built."""
    deferred = subject.deferred
    return deferred is not None and not deferred.built


class Given:
    """A call as it was made. The original runs on the caller's own arguments at most once.

    Parameters
    ----------
    subject : Subject
        What is called.
    args, kwargs
        The caller's arguments.
    number : int
        Which call within a block of ``sample_keys`` it is; 0 outside, and where ids do not name its input.
    seen : Seen or None
        What computes, where that was looked at for this call.

    Attributes
    ----------
    gradients : bool
        The caller's grad mode, in which the original runs, whoever has it run.
    """

    def __init__(
        self,
        subject: Subject,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        number: int = 0,
        seen: Seen | None = None,
    ) -> None:
        self.subject = subject
        self.number, self.seen = number, seen
        self.args, self.kwargs = args, kwargs
        self.gradients = torch.is_grad_enabled()
        self.error: BaseException | None = None
        self._outputs: tuple[Any] | None = None

    def run(self) -> Any:
        """What the original returns, or raises, in the caller's own grad mode."""
        if self.error is not None:
            raise self.error
        if self._outputs is None:
            try:
                with computing(), torch.set_grad_enabled(self.gradients):
                    self.load()
                    self._outputs = (self.subject.run(self.args, self.kwargs),)
            except BaseException as error:
                self.error = error
                raise
        return self._outputs[0]

    def release(self) -> None:
        """Forget the error: its traceback leads back here, and would keep the batch until garbage is collected."""
        self.error = None

    def build(self) -> None:
        """Have what computes be there, before anybody looks at what it writes."""
        deferred = self.subject.deferred
        if deferred is not None and lacks(self.subject):
            try:
                deferred.build()
            except BaseException as error:
                self.error = error
                raise

    def load(self) -> None:
        """Load what was not loaded of its arguments: the original is given ordinary tensors."""
        self.args, self.kwargs = loaded((self.args, self.kwargs))

    def named(self) -> Iterator[tuple[str, Any]]:
        """Its arguments, those by position by the names of their parameters."""
        names = itertools.chain(self.subject.names, itertools.repeat("*args"))
        return itertools.chain(zip(names, self.args, strict=False), self.kwargs.items())

    @property
    def ran(self) -> bool:
        """Whether the original returned already."""
        return self._outputs is not None

    @property
    def rows(self) -> int:
        """About how many rows it has, for counting: the first dimension of the first tensor that has one, else 1."""
        try:
            return _rows_of([*self.args, *self.kwargs.values()])
        except Exception:  # tensors that have no sizes, containers that cannot be walked
            return 1


def number_named(owner: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Which call of ``owner`` within a block with ids this is, from 1; 0 outside, and where ids do not name its input.

    They name what was there when the block began. What was computed since may be another for the same sample, where
    layers have changed.

    Parameters
    ----------
    owner : object
        The region.
    args, kwargs
        The arguments.
    """
    number = number_of_call(owner)
    if not number:
        return 0
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    return number if all(type(leaf) is LazyTensor or was_there(leaf) for leaf in tensors) else 0


def take(given: Given, *, stack_lists: bool = False) -> Taken:
    """The arguments of a call, taken apart; what their classes compute is a part of the key."""
    subject = given.subject
    taken = take_arguments(given.args, given.kwargs, subject.names, stack_lists=stack_lists)
    if not taken.classes:
        return taken
    return dataclasses.replace(taken, key=digest_bytes(taken.key + subject.identity.of_classes(taken.classes)))


def _rows_of(values: list[Any]) -> int:
    pending = values[::-1]
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor) and value.ndim:
            return int(value.shape[0])
        if isinstance(value, (list, tuple)):
            if value and isinstance(value[0], torch.Tensor):
                return len(value)
            pending += reversed(value[:MOST_ARGUMENTS])
        elif isinstance(value, Mapping):
            pending += reversed([*itertools.islice(value.values(), MOST_ARGUMENTS)])
    return 1


@dataclasses.dataclass
class Batch:
    """A call taken apart.

    Parameters
    ----------
    given : Given
        The call.
    taken : Taken
        Its arguments.
    who : bytes
        The identity that computes it.
    mode : NumericMode
        The numeric mode.
    started : mapping
        Digests that devices are at work on.
    rows : list of torch.Tensor
        The arguments that have rows, rows first; known once the form of the call is.
    lies : tuple of Lie
        How its arguments lie in memory; known once the form of the call is.
    shared : list of bytes
        Content digests of the arguments that all rows share.
    wrote : list of Difference
        What the original wrote beside its output when it ran on the whole batch.
    moved : bool
        Whether tensors of its state were written to or replaced meanwhile, by anybody.
    """

    given: Given
    taken: Taken
    who: bytes
    mode: NumericMode
    started: Started
    rows: list[torch.Tensor] = dataclasses.field(default_factory=list)
    lies: tuple[Lie, ...] = ()
    shared: list[bytes] = dataclasses.field(default_factory=list)
    wrote: list[Difference] = dataclasses.field(default_factory=list)
    moved: bool = False

    def __post_init__(self) -> None:
        self._arguments = self.taken.tensors
        self._versions = versions(self._arguments)

    def overwritten(self) -> bool:
        """Whether anybody wrote to its arguments since it was taken apart: its digests are of what they were."""
        return versions(self._arguments) != self._versions

    @property
    def count(self) -> int:
        """The number of rows."""
        return int(self.rows[0].shape[0])

    def original(self, tensors: Sequence[torch.Tensor], *, gradients: bool | None = None) -> Any:
        """What the original returns with ``tensors`` in place of the caller's, in the caller's grad mode or another.

        Raises
        ------
        Bypass
            When it fails, where it might not have failed on the caller's own.
        """
        try:
            with computing(), torch.set_grad_enabled(self.given.gradients if gradients is None else gradients):
                args, kwargs = self.taken.rebuild([loaded(tensor) for tensor in tensors])
                return self.given.subject.run(args, kwargs)
        except Exception as error:
            said = (str(error).splitlines() or [""])[0][:200]
            lists = [name for name, value in self.given.named() if isinstance(value, (list, tuple)) and len(value) > 1]
            part = "mark a part that takes any number of rows"
            raise Bypass(
                f"it does not run on other rows than it was given ({type(error).__name__}: {said})",
                f"pass {lists[0]!r} as tensors with a row a sample, or {part}" if lists else part,
            ) from None
