"""The arguments or outputs of a call as flat tensors, a key of all the rest, and back."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from torchcache.errors import Bypass
from torchcache.lazy.tensor import LazyTensor
from torchcache.values.constants import (
    ATOMS,
    DEEPEST,
    MADE_BY_CODE,
    classes_within,
    constant_bytes,
    is_constant,
    not_understood,
    too_deep,
    type_name,
)
from torchcache.values.containers import CONTEXT, KEEP_NO_CACHE, REGISTERED, open_container
from torchcache.values.objects import Opened
from torchcache.values.pieces import Again, Constant, Container, Leaf, Piece, Stack
from torchcache.values.tensors import TENSORS, check_tensor

# Values in one call: above, they are data and belong into tensors.
MOST_VALUES = 100_000


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """A nested value taken apart.

    Attributes
    ----------
    tensors : list of torch.Tensor
        Its tensors, each once, in the order of their first places.
    key : bytes
        128-bit digest of all the rest: structure, classes, plain values. Of the tensors it has the places alone, and
        which of them hold one tensor: code may ask whether ``a is b``.
    classes : tuple of type
        Those of its values that Python code made: the key has their names, and nothing of their code.
    """

    tensors: list[torch.Tensor]
    key: bytes
    _whole: Piece
    classes: tuple[type, ...] = ()
    _parameters: tuple[int, ...] = ()

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The same value around other tensors, in containers that nobody else holds.

        Parameters
        ----------
        tensors : sequence of torch.Tensor
            One for each of ``self.tensors``.
        """
        if self._parameters:
            tensors = [*tensors]
            for place in self._parameters:
                if type(tensors[place]) is torch.Tensor:
                    tensors[place] = nn.Parameter(tensors[place], tensors[place].requires_grad)
        return self._whole.build(tensors, {})

    def path(self, index: int) -> str:
        """Where a tensor stands, for people: ``" 'mask'[0]"``; empty where it is all there is."""
        return _path_text(next(path for place, path in self._whole.paths() if place == index))

    def name(self, index: int) -> str:
        """The name of a tensor, for people: ``last_hidden_state``, ``[0]``; ``output`` where it is all there is."""
        path = self.path(index)
        return (path.strip().replace("'", "", 2) if path.startswith(" ") else path) or "output"

    def place(self, name: str) -> int | None:
        """Which tensor is the argument ``name``, or has that name in one; ``None`` where there is no such one."""
        return next((place for place, path in self._whole.paths() if name in path[:1] or name in path[-1:]), None)

    def constants(self) -> Iterator[Any]:
        """What stands in it beside tensors, names of entries that are no text included."""
        return self._whole.constants()


def take_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], *, stack_lists: bool = False
) -> Taken:
    """The arguments of a call, taken apart.

    ``f(x)`` and ``f(x=x)`` have the same key and the same order of tensors. What ``rebuild`` returns is in the
    caller's own form: ``(args, kwargs)``.

    Parameters
    ----------
    args, kwargs
        What the caller passed.
    names : sequence of str
        The parameters that take positional arguments, in order, without ``self``. One that is positional-only goes by
        a name that is no keyword, such as ``"x/"``.
    stack_lists : bool, default: False
        Whether a list or tuple of tensors of equal shape, dtype and device is one tensor, their stack ``(N, *)``. Its
        length is then no part of the key.

    Raises
    ------
    Bypass
        For anything that is not understood completely, with the argument's name.
    """
    form = _form(len(args), tuple(kwargs), tuple(names))
    given = (*args, *kwargs.values()) if kwargs else args
    values = [given[place] for place in form.order]
    if _all_plain(values) and len(set(map(id, values))) == len(values):
        return Taken(values, form.plain_key, form.plain_piece)
    return _Walk("argument", stack_lists).arguments(values, form)


def take_outputs(outputs: Any) -> Taken:
    """What a call returned, taken apart.

    Parameters
    ----------
    outputs : object
        The outputs.

    Raises
    ------
    Bypass
        For anything that is not understood completely, with its place.
    """
    if _all_plain((outputs,)):
        return Taken([outputs], _ONE_KEY, _ONE_LEAF)
    return _Walk("output").outputs(outputs)


def _all_plain(values: Sequence[Any]) -> bool:
    """Whether all are tensors that are understood, without saying why not."""
    for value in values:
        if type(value) is not torch.Tensor and type(value) is not LazyTensor:
            return False
    try:
        for value in values:
            check_tensor(value)
    except Bypass:
        return False
    return True


def _digest(data: Sequence[bytes]) -> bytes:
    # Inputs may be chosen by others, and constants are short: a digest that nobody can make collide.
    return hashlib.blake2b(b"".join(data), digest_size=16).digest()


_ONE_KEY = _digest([TENSORS[torch.Tensor]])
_ONE_LEAF = Leaf(0)


class _Form(NamedTuple):
    """How a call passes its arguments, whatever they are.

    Parameters
    ----------
    order : tuple of int
        For each place in the key, which of ``(*args, *kwargs.values())`` stands there.
    names : tuple of str
        The argument at each place.
    head : bytes
        Canonical bytes of the names.
    make : callable
        From the values in the key's order to ``(args, kwargs)``.
    plain_key, plain_piece
        Of a call in which all of them are tensors.
    """

    order: tuple[int, ...]
    names: tuple[str, ...]
    head: bytes
    make: Callable[[list[Any]], Any]
    plain_key: bytes
    plain_piece: Container


@functools.lru_cache(maxsize=1024)
def _form(positional: int, keywords: tuple[str, ...], parameters: tuple[str, ...]) -> _Form:
    named = parameters[:positional]
    # (rank, tag, name): by position, by name, beyond the parameters (*args), of other names (**kwargs).
    places = [(0, b"n", name) for name in named]
    places += [(2, b"*", f"*[{index}]") for index in range(positional - len(named))]
    rest = parameters[positional:]
    places += [(1, b"n", name) if name in rest else (3, b"k", name) for name in keywords]
    ranks = [(rank, rest.index(name) if rank == 1 else place) for place, (rank, _, name) in enumerate(places)]
    order = tuple(sorted(range(len(places)), key=ranks.__getitem__))
    names = tuple(places[place][2] for place in order)
    head = b"".join(places[place][1] + constant_bytes(places[place][2]) for place in order)
    head = len(order).to_bytes(8, "little") + head

    def make(parts: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(order, parts, strict=True))
        values = [given[place] for place in range(len(order))]
        return tuple(values[:positional]), dict(zip(keywords, values[positional:], strict=True))

    plain_piece = Container(tuple, make, names, [Leaf(index) for index in range(len(order))])
    return _Form(order, names, head, make, _digest([head, TENSORS[torch.Tensor] * len(order)]), plain_piece)


class _Walk:
    """Takes one call's values apart, from the outside to the inside."""

    def __init__(self, what: str, stack_lists: bool = False) -> None:
        self._what = what
        self._stack_lists = stack_lists
        self._tensors: list[torch.Tensor] = []
        self._places: dict[int, int] = {}
        self._data: list[bytes] = []
        # By id: the container, held since a temporary's id would be given to another, its number, and its piece.
        self._mutable: dict[int, list[Any]] = {}
        self._failed: list[Any] = []
        self._classes: dict[type, None] = {}

    def arguments(self, values: Sequence[Any], form: _Form) -> Taken:
        """Arguments, in the key's order."""
        self._data.append(form.head)
        return self._taken(lambda: Container(tuple, form.make, form.names, self._parts(form.names, values, DEEPEST)))

    def outputs(self, outputs: Any) -> Taken:
        """Outputs."""
        return self._taken(lambda: self._take(outputs, DEEPEST))

    def _taken(self, walk: Callable[[], Piece]) -> Taken:
        try:
            piece = walk()
        except RecursionError:
            raise self._explained(too_deep()) from None
        except Bypass as bypass:
            raise self._explained(bypass) from None
        except Exception as error:  # a user's own flatten function, metaclass or descriptor
            failure = Bypass(f"something that cannot be looked at: {type(error).__name__}")
            raise self._explained(failure) from error
        parameters = [place for place, tensor in enumerate(self._tensors) if type(tensor) is nn.Parameter]
        return Taken(self._tensors, _digest(self._data), piece, (*self._classes,), (*parameters,))

    def _explained(self, bypass: Bypass) -> Bypass:
        path = self._failed[::-1]
        advice = KEEP_NO_CACHE if any(name in _MODEL_CACHES for name in path) else bypass.advice
        return Bypass(f"{self._what}{_path_text(path)} is {bypass.reason}", advice)

    def _parts(self, names: Sequence[Any], parts: Sequence[Any], depth: int) -> list[Piece]:
        pieces = []
        for name, part in zip(names, parts, strict=True):
            try:
                pieces.append(self._take(part, depth))
            except Exception:
                self._failed.append(name)
                raise
        return pieces

    def _take(self, value: Any, depth: int) -> Piece:
        kind = type(value)
        if kind in TENSORS:
            check_tensor(value)
            return self._leaf(value, TENSORS[kind])
        atom = ATOMS.get(kind)
        if atom is not None:
            self._data.append(atom(value))
            return Constant(value)
        if is_constant(kind):
            self._data.append(constant_bytes(value))
            self._classes.update(dict.fromkeys(classes_within(value)))
            return Constant(value)
        if depth == 0:
            raise too_deep()
        if len(self._data) > MOST_VALUES:
            raise Bypass(f"one of more than {MOST_VALUES:,} values", "pass them as tensors")
        opened = open_container(value)
        if not opened.mutable:
            return self._opened(value, opened, depth)
        if id(value) in self._mutable:
            return self._again(value)
        entry = self._mutable[id(value)] = [value, len(self._mutable), None]
        piece = entry[2] = self._opened(value, opened, depth)
        return piece

    def _again(self, value: Any) -> Again:
        """What stands for a container in all places but its first."""
        _, number, piece = self._mutable[id(value)]
        if piece is None:
            raise Bypass(f"{type_name(value)} that holds itself", "use one that does not")
        self._data.append(b"&%d;" % number)
        return Again(piece)

    def _opened(self, value: Any, opened: Opened, depth: int) -> Piece:
        kind = type(value)
        if self._stack_lists and kind in _STACKED and _is_stackable(value):
            return Stack(self._leaf(torch.stack(tuple(value)), _STACKED[kind]).place, kind)
        self._data.append(opened.head)
        if kind.__flags__ & MADE_BY_CODE:
            self._classes[kind] = None
        for plain in value if kind is set else opened.names:
            if type(plain) is not str and type(plain) is not int:
                self._classes.update(dict.fromkeys(classes_within(plain)))
        try:
            parts = self._parts(opened.names, opened.parts, depth - 1)
        except Bypass:
            if not (opened.head.startswith(REGISTERED) and self._failed[-1:] == [CONTEXT]):
                raise
            self._failed.clear()  # people know what they pass, and not what it is taken apart into
            raise Bypass(not_understood(value).reason, "mark what is inside, which takes tensors") from None
        return Container(kind, opened.build, opened.names, parts)

    def _leaf(self, tensor: torch.Tensor, mark: bytes) -> Leaf:
        place = self._places.setdefault(id(tensor), len(self._tensors))
        if place < len(self._tensors):
            self._data.append(b"=%d;" % place)
        else:
            self._tensors.append(tensor)
            self._data.append(mark)
        return Leaf(place)


# Tags of lists and tuples that stand for a stack.
_STACKED: dict[type, bytes] = {list: b"L", tuple: b"U"}
# What transformers calls the place of a cache that forward writes to.
_MODEL_CACHES = ("past_key_values", "cache_params")


def _is_stackable(values: Sequence[Any]) -> bool:
    if not values or not _all_plain(values):
        return False
    first = values[0]
    return all(
        value.shape == first.shape and value.dtype == first.dtype and value.device == first.device for value in values
    )


def _path_text(path: Sequence[Any]) -> str:
    """Where something stands: the first name as a word, the others as indices."""
    names = [_name_text(name) for name in path[:_DEEPEST]]
    if names and isinstance(path[0], str):
        names[0] = f" {names[0]}"
    else:
        names[:1] = [f"[{name}]" for name in names[:1]]
    return "".join([*names[:1], *(f"[{name}]" for name in names[1:]), "..." if len(path) > _DEEPEST else ""])


def _name_text(name: Any) -> str:
    try:
        text = repr(name)
    except Exception:  # a user's class, or an integer of too many digits
        text = f"<{type(name).__qualname__}>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


# Of a path for people: characters of a name, and names.
_LONGEST = 60
_DEEPEST = 8
