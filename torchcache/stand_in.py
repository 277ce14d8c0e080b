"""A module that is built when it is needed, and let go when it is not."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import functools
import os
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from torchcache import dynamo
from torchcache.checks.chance import generators_kept
from torchcache.errors import Bypass, MarkError
from torchcache.identity.identity import Identity
from torchcache.identity.state import State
from torchcache.logging import logger, warn_once
from torchcache.mark import original_of

# It is let go after so many calls at least, and so many times as long as it takes to build.
FEWEST_CALLS, LONGER = 16, 10
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_PENDING = "_pending_"


class Built:
    """What was built, and whether it is what it was then.

    Parameters
    ----------
    made : nn.Module or method of one
        What was built.
    name : str
        For people.
    pure : bool
        As for ``Identity``.

    Attributes
    ----------
    module : nn.Module
        The module.
    subject : tuple
        The module, and the function that takes it first.
    ran : bool
        Whether it was called.
    """

    def __init__(self, made: Any, name: str, pure: bool) -> None:
        method = isinstance(made, types.MethodType)
        module = made.__self__ if method else made
        if not isinstance(module, nn.Module):
            raise MarkError(
                f"torchcache.deferred: what build returns is a {type(made).__name__}: let it return an nn.Module, or a "
                "method of one"
            )
        self.made, self.module, self._given = made, module, (name, pure)
        self.subject = module, original_of(made.__func__ if method else type(made).forward)
        self._identity = Identity(lambda: self.subject, name, None, pure)
        self._state = State()
        self._accepted: set[bytes] = set()
        self.ran = False

    def __getstate__(self) -> Any:
        return self.made, *self._given, self.ran, self._accepted

    def __setstate__(self, state: Any) -> None:
        made, name, pure, ran, accepted = state
        self.__init__(made, name, pure)  # type: ignore[misc]
        self.ran, self._accepted = ran, accepted

    def now(self) -> bytes:
        """What it is now: its program and its state; its tensors alone where the program cannot be read."""
        try:
            return self._identity.current()
        except Bypass:
            return self._state.current([*self.module.parameters(), *self.module.buffers()])

    def accept(self) -> None:
        """Take it as it is now for what was built."""
        self._accepted.add(self.now())

    def is_as_built(self) -> bool:
        """Whether it is what was built."""
        return self.now() in self._accepted


class Deferred(nn.Module):
    """Stands for a module that ``build`` makes. ``torchcache.deferred`` makes one, and marks it.

    What is built is no submodule: checkpoints are the same whether it was built or not, and optimizers see nothing of
    it. It is frozen and in eval mode. ``.to``, ``.half`` and the like have it go to that device and dtype; nothing else
    that is done to all parameters of a model reaches it.

    Parameters
    ----------
    make : callable
        Makes an ``nn.Module``, or a method of one.
    called : str
        The user's name for it.
    release : bool
        Whether it is let go after a stretch of calls in which nothing was computed: at least ``FEWEST_CALLS``, and as
        many as computed something so far, which is about an epoch; and some times as long as it takes to build. With
        each time that it is built again the stretch doubles.
    pure : bool
        As for ``Identity``.

    Attributes
    ----------
    there : Built or None
        What was built, while it is there.
    """

    # For marks around it, which do not see what is not there.
    torchcache_problem = "is deferred, and cached for itself: mark the modules beside it, not one around it"

    def __init__(self, make: Callable[[], Any], called: str, release: bool = True, pure: bool = False) -> None:
        super().__init__()
        self.called = called
        self.there: Built | None = None
        self._make, self._release, self._pure = make, release, pure
        self._home = str(torch.get_default_device())
        self._builds = self._computed = self._idle = 0
        self._seconds = self._last = 0.0
        # By casts: what was built first.
        self._firsts: dict[str, bytes] = {}
        # What was done to all tensors of the model around it: where they went, and through which dtypes each kind.
        self._device = torch.device("cpu")
        self._chains: list[tuple[torch.dtype, ...]] = [(dtype,) for dtype in _DTYPES]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith(_PENDING)}

    @property
    def built(self) -> bool:
        """Whether the module is there."""
        return self.there is not None

    @property
    def casts(self) -> str:
        """Which floating dtypes were cast to which others, one after another: a part of who computes."""
        return ", ".join(" to ".join(map(str, chain)) for chain in self._chains if len(chain) > 1)

    def build(self) -> Any:
        """What ``build`` made, which is called now if it was not before, or was let go.

        It is called on a thread of its own, where no mode, no tracer and no transform of the caller's is in force; on
        the caller's CUDA device, and where tensors were made by default as ``torchcache.deferred`` was called.

        Returns
        -------
        nn.Module or method
            Frozen, in eval mode, and where the model around it was moved to.

        Raises
        ------
        MarkError
            When it made neither a module nor a method of one.
        """
        return self.bring().made

    @dynamo.untraced
    def bring(self) -> Built:
        """What was built; raises as ``build``."""
        there = self.there
        if there is not None:
            return there
        mine, place = _Building(), f"{_PENDING}{os.getpid()}"  # a forked child has no thread of its parent's
        building: _Building = mine
        try:
            building = vars(self).setdefault(place, mine)  # one step: of several threads one builds
            if building is mine:
                work = contextvars.copy_context().run
                device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
                threading.Thread(target=work, args=(self._work, mine, place, device), daemon=True).start()
                mine.started = True
        finally:
            if building is mine and not mine.started:  # an interrupt, or no more threads
                vars(self).pop(place, None)
                mine.set_exception(RuntimeError(f"torchcache.deferred: building {self.called!r} was interrupted"))
        if building.thread == threading.get_ident():
            raise RuntimeError(f"torchcache.deferred: building {self.called!r} calls what is to be built")
        return building.result()

    def _work(self, building: _Building, place: str, device: int | None) -> None:
        building.thread = threading.get_ident()
        try:
            with contextlib.ExitStack() as stack:
                if device is not None:
                    stack.enter_context(torch.cuda.device(device))
                if torch.device(self._home).type not in ("cpu", "meta"):
                    stack.enter_context(torch.device(self._home))
                stack.enter_context(generators_kept(draws=True))  # weights are drawn
                built = self._build()
        except BaseException as error:
            vars(self).pop(place, None)
            building.set_exception(error)
        else:
            self.there = built
            vars(self).pop(place, None)
            building.set_result(built)

    def _build(self) -> Built:
        logger.info("%s is built now, since rows are missing or such a call is new", self.called)
        start = time.perf_counter()
        built = Built(self._make(), self.called, self._pure)
        device = self._device if self._device.type != "cpu" else None  # where it began
        _move(built.module.requires_grad_(False).eval(), device, {chain[0]: chain for chain in self._chains})
        first = self._firsts.setdefault(self.casts, built.now())
        built.accept()
        if not built.is_as_built() or first != built.now():
            built = Built(built.made, self.called, self._pure)  # which is never taken for what has that name
            warn_once(
                f"{self.called}: what is built is another one than before, so that its rows are not found again: have "
                "build return the same each time, or set release=False"
            )
        self._builds += 1
        self._last = time.perf_counter()
        self._seconds, self._idle = self._last - start, 0
        return built

    def idles(self, computed: bool) -> bool:
        """Take note of a call, in which something was computed or not; whether nobody needed it for long enough."""
        if computed:
            self._computed, self._idle, self._last = self._computed + 1, 0, time.perf_counter()
            return False
        self._idle += 1
        return (
            self._release
            and self.built
            and self._idle >= max(FEWEST_CALLS, self._computed) * 2 ** max(0, self._builds - 1)
            and time.perf_counter() - self._last >= LONGER * self._seconds
        )

    def let_go(self) -> None:
        """Have it be built again when it is needed next; its memory is free once nobody else holds it."""
        self.there = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.build()(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Deferred:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        held = {*_DTYPES, *(chain[-1] for chain in self._chains)}
        step = {dtype: fn(torch.empty(0, dtype=dtype, device=self._device)) for dtype in held}
        before, casts, there = self._device, self.casts, self.there
        self._device = step[torch.float32].device
        self._chains = [_longer(chain, step[chain[-1]].dtype) for chain in self._chains]
        if there is None or (self.casts != casts and there.is_as_built()):
            self.let_go()  # it is built, and cast, anew
        else:
            device = self._device if self._device != before else None
            _move(there.module, device, {dtype: (probe.dtype,) for dtype, probe in step.items()})
        return self

    def extra_repr(self) -> str:
        """Its name, and whether it is there."""
        return f"{self.called!r}, {'built' if self.built else 'not built'}"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            self._lacks(error)

    def _lacks(self, error: AttributeError) -> NoReturn:
        raise AttributeError(f"{error}; what it stands for may have it: .build() returns that") from None


class _Building(concurrent.futures.Future[Built]):
    """A module that is being built, and on which thread."""

    def __init__(self) -> None:
        super().__init__()
        self.started = False
        self.thread: int | None = None


def _longer(chain: tuple[torch.dtype, ...], dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """A chain of casts and one more, without those that change no number."""
    if len(chain) > 1 and set(chain[-2:]) <= set(_DTYPES) and torch.promote_types(*chain[-2:]) == chain[-1]:
        chain = chain[:-1]
    return chain if chain[-1] == dtype else (*chain, dtype)


def _move(module: nn.Module, device: torch.device | None, casts: Mapping[torch.dtype, Sequence[torch.dtype]]) -> None:
    """Have ``module`` go to a device that has data, and each of its tensors through dtypes."""
    if device is not None and device.type == "meta":
        device = None
    if device is None and all(dtype == cast for dtype, chain in casts.items() for cast in chain):
        return

    def there(tensor: torch.Tensor) -> torch.Tensor:
        chain = casts.get(tensor.dtype, ())
        tensor = tensor if device is None else tensor.to(device)
        return functools.reduce(torch.Tensor.to, chain, tensor)

    with torch.no_grad():
        module._apply(there)  # type: ignore[no-untyped-call]
