"""A trace beside the code that it is of: code may ask whether it is compiled, and then answers otherwise."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
import types
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchcache.batch import Given
from torchcache.checks.arguments import Arguments, ArgumentWritten
from torchcache.checks.chance import Chance
from torchcache.checks.compare import LARGEST_ROUNDING, relative
from torchcache.errors import Bypass, Unreadable
from torchcache.graph.saved import Saved
from torchcache.identity.identity import Identity
from torchcache.identity.numeric import autocasts
from torchcache.identity.state import State
from torchcache.identity.written import Written
from torchcache.options import CacheOptions
from torchcache.values.objects import open_object
from torchcache.values.take import take_arguments

# Objects in outputs that are looked into.
MOST_OBJECTS = 1024
# Values that are compared as they are, and others of which the type is all that is compared.
_BY_VALUE = frozenset({bool, int, str, bytes, type, torch.Size, torch.dtype})
_BY_TYPE = (type, nn.Module, types.FunctionType, types.MethodType, types.ModuleType, functools.partial)
ADVICE = "mark the frozen part alone, whose code is run as it is"


class Trial:
    """One run of a trace, from here on: nothing stays of it but what it returned, and its code runs for the caller.

    Where something of it cannot be undone the run is the caller's: code must not take from what it reads twice.

    Parameters
    ----------
    module : nn.Module
        The marked module.
    identity : Identity
        Its identity.
    given : Given
        The call.
    options : CacheOptions
        The options of the mark.

    Attributes
    ----------
    saved : Saved
        What the trace saves for backward, and what its code does.
    undone : bool
        Whether all that the trace changed was put back.

    Raises
    ------
    Bypass
        Where nothing could tell that all is back.
    """

    def __init__(self, module: nn.Module, identity: Identity, given: Given, options: CacheOptions) -> None:
        self._module, self._identity, self._given = module, identity, given
        self._who = self._look()
        self._written = self._snapshot()
        self._taken = take_arguments(given.args, given.kwargs, given.subject.names)
        self._arguments = Arguments(self._taken.tensors)
        self._widths = [4, *(dtype.itemsize for _, dtype in autocasts())]
        self._widths += [tensor.dtype.itemsize for tensor in module.parameters() if tensor.is_floating_point()]
        self._widths += [] if options.cache_dtype is None else [1]
        self._chance = Chance()
        self.saved = Saved()
        self.undone = True

    def take_back(self, *, draws: bool) -> None:
        """Undo what the trace wrote, and what it drew, if it ``draws``."""
        self._chance.take_back(draws=draws)
        self._written.restore()

    def outcome(self, returned: list[Any], *, draws: bool) -> tuple[Any, Bypass | None]:
        """What the caller gets, and why the trace is not to run again: it returned something else than its code.

        Parameters
        ----------
        returned : list
            What the trace returned, as its only item, which nobody else holds, and which is taken out.
        draws : bool
            Whether its operators draw random numbers.
        """
        outputs = returned.pop()
        self.undone = self._undo(draws=draws)
        if not self.undone:
            return outputs, None
        found = _leaves(outputs)
        del outputs
        with self.saved.show():
            true = self._given.run()
        gap = _gap(found, _leaves(true))
        if not self._chance.repeated():
            drawn = Bypass("it draws other random numbers where Dynamo traces it", ADVICE)
            return true, drawn if self._chance.alone else None
        if gap <= LARGEST_ROUNDING[min(self._widths)]:
            return true, None
        much = f"off by {gap:.0%} of the largest value" if math.isfinite(gap) else "of another structure"
        return true, Bypass(f"its code answers otherwise where Dynamo traces it ({much})", ADVICE)

    def _undo(self, *, draws: bool) -> bool:
        """Take back what the trace did; ``False`` where that cannot be done, and all is as it left it."""
        again = take_arguments(self._given.args, self._given.kwargs, self._given.subject.names)
        try:
            self._arguments.check(same=again.key == self._taken.key)
        except ArgumentWritten:
            return False
        after = self._snapshot()
        self.take_back(draws=draws)
        with contextlib.suppress(Bypass):
            # Code between graphs may draw, and another thread might have done it.
            if self._chance.back() and self._look() == self._who:
                return True
        after.restore()
        self._chance.take_again()
        return False

    def _look(self) -> tuple[bytes, bytes]:
        """Program and state, every byte of it."""
        program = self._identity.program()
        if program.problem is not None:
            raise Unreadable(program.problem)
        return program.digest, State().update(program.tensors)

    def _snapshot(self) -> Written:
        return Written(self._module, self._identity.outside())


def _leaves(outputs: Any) -> list[Any]:
    """Copies of the tensors in outputs and objects in them, without what they were computed from, and other values."""
    found: list[Any] = []
    met: set[int] = set()
    pending = pytree.tree_leaves(outputs)[::-1]
    while pending:
        leaf = pending.pop()
        if isinstance(leaf, torch.Tensor):
            found.append(leaf.detach().clone())
        elif type(leaf) is float:
            found.append(torch.tensor(leaf, dtype=torch.float64, device="cpu"))
        elif id(leaf) not in met and len(met) < MOST_OBJECTS and (parts := _parts(leaf)):
            met.add(id(leaf))
            found.append(type(leaf))
            pending += pytree.tree_leaves(parts)[::-1]
        else:
            found.append(leaf)
    return found


def _parts(value: Any) -> list[Any]:
    """What an object holds, each behind its name, in the order of these; nothing of what is looked at by its type."""
    if value is None or type(value) in _BY_VALUE or isinstance(value, _BY_TYPE):
        return []
    try:
        opened = open_object(value)
    except Bypass:
        return []
    pairs = sorted(zip(map(str, opened.names), opened.parts, strict=True), key=operator.itemgetter(0))
    return list(itertools.chain.from_iterable(pairs))


def _gap(found: list[Any], true: list[Any]) -> float:
    """The largest difference of two outputs, as a share of the largest magnitude of a tensor."""
    if [*map(type, found)] != [*map(type, true)]:
        return math.inf
    gaps = [0.0]
    for one, other in zip(found, true, strict=True):
        if isinstance(one, torch.Tensor):
            gaps.append(relative(one, other, 0.0))
        elif type(one) in _BY_VALUE and one != other:
            return math.inf
    return max(gaps)
