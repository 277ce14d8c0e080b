"""Who computes a call: one owner of the program and the state, and of whether either changed."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from torchcache.digest.cpu import digest_bytes
from torchcache.dynamo import layout_check
from torchcache.errors import Bypass, Unreadable
from torchcache.identity.exchange import ADVICE
from torchcache.identity.outside import READ, Outside
from torchcache.identity.program import Program, reads
from torchcache.identity.state import State
from torchcache.identity.steady import Steady
from torchcache.identity.written import tensor_names
from torchcache.logging import warn_once
from torchcache.quantity import names_text
from torchcache.trainable import part_with_weights, which_train

# Seconds of reading again that are told of.
LONG = 20.0
# Combinations of classes of arguments that are known at a time.
MOST_GIVEN = 64


class Seen(NamedTuple):
    """What computes, as it was at one look.

    Parameters
    ----------
    tensors : list of torch.Tensor
        The state.
    program : Program or None
        The program; ``None`` for a part of a graph, which has several.
    who : bytes
        What ``Identity.current`` said of it; empty where it was not asked.
    """

    tensors: list[torch.Tensor]
    program: Program | None = None
    who: bytes = b""


class Identity:
    """The identity of a marked call.

    Parameters
    ----------
    subject : callable
        Gives what computes as it is at that time: a function, or a module and a function that takes it.
    where : str
        Its path, for messages.
    name : str or None
        The user's own name for program and state, which then counts instead of both.
    pure : bool
        Whether what the original itself writes is no part of it, as the user promises.
    function : callable or None
        Gives the function that is marked, where a class may be given another one.
    hooked : bool
        Whether hooks of the module itself run within a call, or around it.

    Attributes
    ----------
    changed : list of str
        Names of what differed when it last became another, as far as they are known.
    rewritten : set of int
        The ``id`` of tensors that the original was seen to write with what they held.
    """

    def __init__(
        self,
        subject: Callable[[], Any],
        where: str,
        name: str | None,
        pure: bool,
        function: Callable[[], Any] | None = None,
        hooked: bool = True,
    ) -> None:
        self._subject, self._function = subject, function
        self._hooked = hooked
        self._where = where
        self._name = name
        self._pure = pure
        self.changed: list[str] = []
        self.rewritten: set[int] = set()
        self._seconds = 0.0
        self._program: Program | None = None
        self._other: Program | None = None
        self._digested: Program | None = None
        self._state = State()
        self._given: dict[tuple[type, ...], tuple[Program, State]] = {}

    def program(self) -> Program:
        """The program as it is now."""
        program, other = self._program, self._other
        if program is not None and program.unchanged():
            return program
        if other is None or not other.again():
            if program is not None:
                self.changed = program.changes()
            began = time.perf_counter()
            other = self._read()
            if program is not None:
                self._note_reading(time.perf_counter() - began)
        # Reading takes long, and what a flag switches in every step is two programs by turns: of the same tensors.
        kept = program is not None and list(map(id, program.tensors)) == list(map(id, other.tensors))
        self._program, self._other = other, program if kept else None
        return other

    def _note_reading(self, seconds: float) -> None:
        """Take note of a program that was read again, and tell where that takes long."""
        before, self._seconds = self._seconds, self._seconds + seconds
        if before <= LONG < self._seconds:
            warn_once(
                f"{self._where}: what computes it was read again and again, {self._seconds:.0f} s so far, as "
                f"{names_text(self.changed) or 'a part'} is replaced or written to: mark a part that does not read it"
            )

    def _read(self, given: tuple[type, ...] = ()) -> Program:
        program = Program(self._subject(), self._where, self._pure, given, self._hooked)
        if self._function is not None:
            program.follow(self._function)
        return program

    def enters_itself(self) -> None:
        """Take note that the original calls its module again: hooks of this run within a call from here on."""
        if not self._hooked:
            self._hooked, self._program, self._other, self._given = True, None, None, {}

    def look(self) -> Seen:
        """The program and the tensors that it can reach, as they are now.

        Raises
        ------
        Bypass
            When other processes must run it at the same time, by whatever name.
        """
        program = self.program()
        if program.exchange:
            raise Unreadable(program.exchange, ADVICE)
        return Seen(program.tensors, program)

    def of_classes(self, given: tuple[type, ...]) -> bytes:
        """16 bytes that name what the program takes from classes of arguments; raises as ``current``."""
        if self._name is not None:
            return b""
        program, state = self._given.get(given, (None, None))
        if program is None or state is None or not program.unchanged():
            program, state = self._read(given), State()
            if len(self._given) >= MOST_GIVEN:
                self._given.clear()
            self._given[given] = program, state
        return self._digest(program, state)

    def exchanges(self) -> Unreadable | None:
        """Why other processes must run it at the same time; ``None`` where they need not."""
        found = self.program().exchange
        return Unreadable(found, ADVICE) if found else None

    def unreadable(self) -> Unreadable | None:
        """Why it has no identity, whatever its state; ``None`` where it may have one."""
        try:
            self.current()
        except Unreadable as found:
            return found
        except Bypass:
            return None
        return None

    def trains(self) -> bool:
        """Whether the program reads anything that is trainable, or may, where it cannot be read."""
        return any(tensor.requires_grad for tensor in self._reachable(self.program()))

    def _reachable(self, program: Program) -> list[torch.Tensor]:
        """The tensors that a program reads, and where it cannot be read all that its module trains."""
        subject = self._subject() if program.problem is not None else None
        return [*program.tensors, *subject[0].parameters()] if isinstance(subject, tuple) else program.tensors

    def form(self) -> Callable[[], bool]:
        """Tells later whether what decides how a call is traced and its outputs look is as it is now.

        That is the program, how its state is laid out, and what of it is trainable.
        """
        program = self.program()
        digest, tensors = program.digest, self._reachable(program)
        alike, described, trainable = layout_check(tensors), _described(tensors), which_train(tensors)
        held = weakref.ref(self)  # compiled code keeps what it asks, and must not keep the weights

        def still() -> bool:
            identity = held()
            if identity is None:
                return False
            program = identity.program()
            tensors = identity._reachable(program)
            if program.digest != digest or which_train(tensors) != trainable:
                return False
            return (alike is not None and alike(*tensors)) or _described(tensors) == described

        return still

    @property
    def asks_for_gradients(self) -> bool:
        """Whether the program, as it was looked at last, asks whether gradients are recorded."""
        return any(program.asks_for_gradients for program in self._programs())

    @property
    def asks_for_inference(self) -> bool:
        """Whether it asks whether inference mode is on."""
        return any(program.asks_for_inference for program in self._programs())

    def _programs(self) -> list[Program]:
        latest = [] if self._program is None else [self._program]
        return latest + [program for program, _ in self._given.values()]

    def current(self, seen: Seen | None = None) -> bytes:
        """16 bytes that name program and state as they are now.

        Parameters
        ----------
        seen : Seen or None
            What ``look`` returned just now, on this thread: another may see another program. ``None`` looks.

        Raises
        ------
        Bypass
            When the original reads something that has no identity.
        """
        program = (seen or self.look()).program
        assert program is not None
        if self._name is not None:
            return digest_bytes(b"name:" + self._name.encode("utf-8", "surrogatepass"))
        return self._digest(program, self._state)

    def _digest(self, program: Program, state: State) -> bytes:
        if program.problem is not None:
            subject = self._subject()
            part = part_with_weights(subject[0]) if isinstance(subject, tuple) else ""
            within = program.problem.startswith(f"{part.partition(' ')[0]}.")
            advice = "name program and weights yourself with persistent_module_hash"
            raise Unreadable(
                program.problem, advice if within or not part else f"mark its part {part} alone, or {advice}"
            )
        before = state.digest
        now = state.current(program.tensors)
        if before and now != before and state.changed:
            earlier = self.changed if program is not self._digested else []
            self.changed = [*earlier, *self._names([program.tensors[index] for index in state.changed])]
        if state is self._state:
            self._digested = program
        return digest_bytes(b"who" + program.digest + now)

    def _names(self, tensors: Sequence[torch.Tensor]) -> list[str]:
        subject = self._subject()
        names = tensor_names(subject[0] if isinstance(subject, tuple) else None)
        return [
            names.get(id(tensor), "a parameter" if isinstance(tensor, nn.Parameter) else READ) for tensor in tensors
        ]

    def steady(self) -> Steady:
        """What computes as it is now, to find later whether it stayed so; it must be ``current`` after this, too."""
        program = self.program()
        return Steady(program.tensors, self._name is not None, program.stamps(), self.rewritten)

    def outside(self) -> Outside | None:
        """What the original may write outside of its module, as it is at this time."""
        return self.program().outside()

    def reads(self, objects: set[int], names: set[str]) -> bool:
        """Whether the program reads any of the objects with these ``id``, or a global of one of these names."""
        return bool(objects or names) and reads(self._subject(), objects, names)

    def changes(self) -> list[str]:
        """Names of what is not as it was when ``current`` was last asked."""
        program = self._program
        if program is None:
            return []
        found = program.changes()
        if not found and self._state.digest and not self._state.unchanged(program.tensors):
            found.append("a parameter or buffer")
        return found


def _described(tensors: Sequence[torch.Tensor]) -> list[tuple[Any, ...]]:
    return [(tensor.dtype, tensor.shape, tensor.device) for tensor in tensors]
