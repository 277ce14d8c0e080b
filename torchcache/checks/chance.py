"""Random numbers: whether an original draws any, and the generators given back after what runs in addition.

The generators are of the process: another thread may draw from them meanwhile, as heads with dropout do in sweeps. Its
draws are not the original's, and must not be taken back.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from torchcache.dynamo import OPERATORS, Observer
from torchcache.errors import Bypass
from torchcache.threads import is_alone

_PROBABILITIES = ("dropout_p", "p", "dropout")
# Arguments that tell an operator to act as in training.
TRAINING = ("training", "train", "use_input_stats")
_ADVICE = "call .eval() on it; where it draws in eval mode, too, mark a part that draws none"


class Generators:
    """The state of every generator that an original could draw from: Python's, NumPy's, torch's on each device."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state(legacy=False)
        self._torch = _torch_states()

    def moved(self) -> bool:
        """Whether anything was drawn since."""
        return self.moved_outside_torch() or not _alike(self._torch, _torch_states())

    def moved_outside_torch(self) -> bool:
        """Whether anything was drawn since from the generators of Python and NumPy."""
        now = np.random.get_state(legacy=False)
        return self._python != random.getstate() or _numpy_bytes(self._numpy) != _numpy_bytes(now)

    def restore(self) -> None:
        """Give the generators back as they were."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        self.restore_torch()

    def restore_torch(self) -> None:
        """Give those of torch back as they were."""
        torch.set_rng_state(self._torch[0])
        if self._torch[1:]:
            torch.cuda.set_rng_state_all(self._torch[1:])


class Draws:
    """Whether this thread draws random numbers from here on, as opposed to other threads that do meanwhile."""

    def __init__(self) -> None:
        self._alone = is_alone()
        self._before = Generators()

    def unclear(self) -> bool:
        """Whether numbers were drawn, and perhaps by another thread."""
        return not self._alone and self._before.moved()

    def check(self) -> None:
        """Raise a ``Bypass`` where this thread drew."""
        if self._alone and self._before.moved():
            raise Bypass("it draws random numbers", _ADVICE)


def check_again(run: Callable[[], object] | None, *, quiet: bool) -> None:
    """Raise a ``Bypass`` where it is this thread that draws; where it may be, one for this call alone.

    The operators of this thread tell of torch's generators. While functions of torch run, other threads do, and these
    functions draw from no other generator: one of Python or NumPy that moves between them this thread may have moved.

    Parameters
    ----------
    run : callable or None
        Runs the original once more: operators that are watched may be others, so that it is not the caller's run.
    quiet : bool
        Whether what is over soon is counted only.
    """
    unclear = run is None
    if run is not None:
        before, functions, operators = Generators(), _Functions(), _Operators()
        with torch.compiler.set_stance("force_eager"), functions, operators:  # what is compiled shows nothing
            run()
        functions.look()
        if operators.drawn:
            before.restore_torch()
            raise Bypass("it draws random numbers", _ADVICE)
        unclear = functions.moved or operators.unclear
    if unclear:
        why = "random numbers were drawn while it ran, by it or by another thread"
        raise Bypass(why, _ADVICE, lasting=False, quiet=quiet)


class _Operators(Observer):  # type: ignore[no-untyped-call]
    """Notes whether operators of this thread draw; one of another library, which may be any code, is unclear."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn = self.unclear = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known, own = draws(func, arguments_of(func, args, kwargs)), getattr(func, "namespace", "") in ("aten", "prims")
        before = _torch_states() if known or not own else []
        made = func(*args, **kwargs)
        if before and not _alike(before, _torch_states()):
            self.drawn |= known
            self.unclear |= not known
        return made


class _Functions(TorchFunctionMode):
    """Notes whether generators of Python or NumPy move while no function of torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = False
        self._last = Generators()

    def look(self) -> None:
        """Look for draws since the last function."""
        self.moved = self.moved or self._last.moved_outside_torch()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.look()
        made = func(*args, **(kwargs or {}))
        # Of another library an operator may be any code.
        if not (self.moved or isinstance(func, OPERATORS)):
            self._last = Generators()
        return made


def arguments_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What an operator is called with, by name, as far as names are known."""
    schema = getattr(func, "_schema", None)
    named = zip(schema.arguments, args, strict=False) if schema is not None else ()
    return {argument.name: value for argument, value in named} | dict(kwargs)


def draws(func: Any, given: Mapping[str, Any]) -> bool:
    """Whether an operator that is ``given`` this draws random numbers: not with probability zero, or not training."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    probabilities = [given[name] for name in _PROBABILITIES if isinstance(given.get(name), float)]
    if probabilities:
        return any(probabilities)
    if any(name in given for name in TRAINING):
        return any(given.get(name) for name in TRAINING)
    # Attention kernels leave dropout_p at its default of zero out of the call.
    return "query" not in given


class Chance:
    """The generators as they are, to take back what this thread draws from here on.

    Where another thread may draw meanwhile it would draw the same numbers again: then torch's alone are taken back, and
    only where it is known that this thread drew.

    Attributes
    ----------
    alone : bool
        Whether no other thread may draw meanwhile.
    """

    def __init__(self) -> None:
        self.alone = is_alone()
        self._before = Generators()
        self._after = self._before
        self._draws = False

    def take_back(self, *, draws: bool) -> None:
        """Give the generators back.

        Parameters
        ----------
        draws : bool
            Whether this thread is known to have drawn.
        """
        self._after, self._draws = Generators(), draws
        self._become(self._before)

    def take_again(self) -> None:
        """Give the generators back as they were before they were given back."""
        self._become(self._after)

    def _become(self, states: Generators) -> None:
        if self.alone and states.moved():
            states.restore()
        elif self._draws and states.moved():
            states.restore_torch()

    def back(self) -> bool:
        """Whether all generators are as they were at first."""
        return not self._before.moved()

    def repeated(self) -> bool:
        """Whether the same was drawn once more since, for certain."""
        return not self._after.moved()


@contextlib.contextmanager
def generators_kept(*, draws: bool = False) -> Iterator[None]:
    """Leave every generator as it was before this block; with ``draws`` also where other threads may draw."""
    chance = Chance()
    try:
        yield
    finally:
        chance.take_back(draws=draws)


def _torch_states() -> list[torch.Tensor]:
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else ())]


def _alike(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _numpy_bytes(state: Any) -> tuple[bytes, int, int]:
    return state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"]
