"""What special methods read is a part of a program where an object is used by more than its attributes."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import torchcache


@dataclasses.dataclass
class Settings:
    """Its generated methods read all of it."""

    lr: float = 0.1
    width: int = 4


@dataclasses.dataclass(frozen=True)
class Key:
    lr: float = 0.1
    width: int = 4


@dataclasses.dataclass(order=True)
class Ordered:
    lr: float = 0.1
    width: int = 4


@dataclasses.dataclass
class Outer:
    inner: Settings = dataclasses.field(default_factory=Settings)


class Own:
    """Its operators read what no other code does."""

    def __init__(self) -> None:
        self.hidden, self.width = 2.0, 4

    def __bool__(self) -> bool:
        return self.hidden > 2.5

    def __len__(self) -> int:
        return int(self.hidden)

    def __iter__(self) -> Any:
        return iter([self.hidden])

    def __enter__(self) -> float:
        return self.hidden

    def __exit__(self, *error: object) -> None:
        pass

    def __contains__(self, key: object) -> bool:
        return self.hidden > 2.5

    def __getitem__(self, key: object) -> float:
        return self.hidden

    def __eq__(self, other: object) -> bool:
        return self.hidden > 2.5

    def __add__(self, other: object) -> float:
        return self.hidden

    __radd__ = __add__

    def __index__(self) -> int:
        return int(self.hidden)

    def same(self, other: object) -> bool:
        return self == other

    def by_another(self, other: object) -> bool:
        return equal(self, other)


class Mixin:
    def __eq__(self, other: object) -> bool:
        return self.hidden > 2.5


class WithMixin:
    def same(self, other: object) -> bool:
        return self == other


class Mixed(WithMixin, Mixin):
    hidden = 2.0


class Mapped(Mapping):
    """``get``, ``values`` and the like are the standard library's, and call its own methods."""

    def __init__(self) -> None:
        self.hidden = 2.0

    def __getitem__(self, key: object) -> float:
        return self.hidden

    def __iter__(self) -> Any:
        return iter("ab")

    def __len__(self) -> int:
        return 2

    @property
    def first(self) -> float:
        return self.get("a", 0.0)


def equal(one: object, other: object) -> bool:
    return one == other


GLOBAL, OTHER = Settings(), Settings()


class Body(nn.Module):
    """``one`` and ``other`` are what its forward may use."""

    def __init__(self, factor: Callable[[Any], float], one: Any, other: Any) -> None:
        super().__init__()
        self.linear, self.factor, self.one, self.other = nn.Linear(4, 4), factor, one, other

    @property
    def held(self) -> Any:
        return self.one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factor(self)


def alias(body: Any) -> float:
    one, other = body.one, body.other
    return 2.0 if one == other else 1.0


def closure(body: Any) -> float:
    def compare() -> bool:
        return one == body.other

    one = body.one
    return 2.0 if compare() else 1.0


def loop(body: Any) -> float:
    factor, last = 1.0, None
    for _ in range(2):
        if last == body.other:
            factor = 2.0
        last = body.one
    return factor


def loop_without_a_start(body: Any) -> float:
    factor = 1.0
    for round in range(2):
        if round and last == body.other:  # noqa: F821
            factor = 2.0
        last = body.one  # noqa: F841
    return factor


def pattern(body: Any) -> float:
    match body:
        case Body(one=one, other=other):
            return 2.0 if one == other else 1.0
    return 3.0


def table(body: Any) -> float:
    found = {}
    found[body.other] = 2.0
    return found[body.one] if body.one in found else 1.0  # noqa: SIM401


def block(body: Any) -> float:
    with body.one as factor:
        return factor


def unpacked(body: Any) -> float:
    (factor,) = body.one
    return factor


def global_alias(body: Any) -> float:
    mine = GLOBAL
    return (2.0 if mine == OTHER else 1.0) * mine.width


COMPARED: dict[str, Callable[[Any], float]] = {
    "operator": lambda body: 2.0 if body.one == body.other else 1.0,
    "unequal": lambda body: 2.0 if body.one != body.other else 1.0,
    "in": lambda body: 2.0 if body.one in [body.other] else 1.0,
    "count": lambda body: 1.0 + [1, body.one].count(body.other),
    "tuples": lambda body: 2.0 if (body.one, 1) == (body.other, 1) else 1.0,
    "function": lambda body: 2.0 if operator.eq(body.one, body.other) else 1.0,
    "own function": lambda body: 2.0 if equal(body.one, body.other) else 1.0,
    "assignment": lambda body: 2.0 if (one := body.one) == body.other and one.width else 1.0,
    "comprehension": lambda body: 1.0 + sum(one == body.other for one in [body.one]),
    "getattr": lambda body: 2.0 if getattr(body, "one") == body.other else 1.0,  # noqa: B009
    "attrgetter": lambda body: 2.0 if operator.eq(*operator.attrgetter("one", "other")(body)) else 1.0,
    "either": lambda body: 2.0 if (body.one if body.training else body.held) == body.other else 1.0,
    "or": lambda body: 2.0 if (body.one or 1) == body.other else 1.0,
    "property": lambda body: 2.0 if body.held == body.other else 1.0,
    "alias": alias,
    "closure": closure,
    "loop": loop,
    "loop without a start": loop_without_a_start,
    "pattern": pattern,
}
OPERATORS: dict[str, Callable[[Any], float]] = {
    "true": lambda body: 2.0 if body.one else 1.0,
    "not": lambda body: 2.0 if not body.one else 1.0,
    "and": lambda body: 2.0 if (body.one and 1) else 1.0,
    "len": lambda body: len(body.one),
    "sum": lambda body: sum(body.one),
    "iteration": lambda body: [item for item in body.one][0],  # noqa: C416, RUF015
    "star": lambda body: sum([*body.one]),
    "contains": lambda body: 2.0 if 1 in body.one else 1.0,
    "item": lambda body: body.one[0],
    "equal": lambda body: 2.0 if body.one == 1 else 1.0,
    "add": lambda body: body.one + 1,
    "radd": lambda body: 1 + body.one,
    "index": lambda body: [1.0, 2.0, 3.0, 4.0][body.one],
    "method": lambda body: 2.0 if body.one.same(1) else 1.0,
    "method that hands itself on": lambda body: 2.0 if body.one.by_another(1) else 1.0,
    "with": block,
    "unpacked": unpacked,
}
CASES: dict[str, tuple[Callable[[Any], float], Callable[[], Any], str]] = {
    **{f"compared: {name}": (factor, Settings, "lr") for name, factor in COMPARED.items()},
    **{f"own operators: {name}": (factor, Own, "hidden") for name, factor in OPERATORS.items()},
    "hashed": (lambda body: 1.0 + len({body.one, body.other}), Key, "lr"),
    "looked up": (lambda body: {body.other: 2.0}.get(body.one, 1.0), Key, "lr"),
    "stored under": (table, Key, "lr"),
    "ordered": (lambda body: 2.0 if body.one < body.other else 1.0, Ordered, "lr"),
    "sorted": (lambda body: 2.0 if max(body.one, body.other) is body.one else 1.0, Ordered, "lr"),
    "within lists": (lambda body: 2.0 if body.one == body.other else 1.0, lambda: [Settings()], "lr"),
    "within dicts": (lambda body: 2.0 if body.one["a"] == body.other["a"] else 1.0, lambda: {"a": Settings()}, "lr"),
    "within another": (lambda body: 2.0 if body.one == body.other else 1.0, Outer, "lr"),
    "of another": (lambda body: 2.0 if body.one.inner == body.other.inner else 1.0, Outer, "lr"),
    "of a mixin": (lambda body: 2.0 if body.one.same(1) else 1.0, Mixed, "hidden"),
    "called by a library": (lambda body: body.one.get("a"), Mapped, "hidden"),
    "called by a library in a property": (lambda body: body.one.first, Mapped, "hidden"),
}


def holder(value: Any) -> Any:
    """The object whose field changes."""
    if isinstance(value, list):
        return value[0]
    if isinstance(value, dict):
        return value["a"]
    return getattr(value, "inner", value)


@pytest.mark.parametrize("case", CASES)
def test_what_a_special_method_reads_is_seen_where_it_may_run(case: str) -> None:
    factor, make, field = CASES[case]
    body = torchcache.mark(Body(factor, make(), make()).eval().requires_grad_(False), audit=0.0)
    x = torch.randn(6, 4)
    for _ in range(3):
        before = body(x)
    assert torchcache.stats(body).hits
    object.__setattr__(holder(body.one), field, 3.0 if field == "hidden" else -0.5)
    expected = body.linear(x) * factor(body)
    assert not torch.equal(before, expected)
    torch.testing.assert_close(body(x), expected)


def test_what_a_special_method_reads_of_a_global_is_seen() -> None:
    body = torchcache.mark(Body(global_alias, None, None).eval().requires_grad_(False), audit=0.0)
    x = torch.randn(6, 4)
    for _ in range(3):
        body(x)
    try:
        GLOBAL.lr = 0.5
        torch.testing.assert_close(body(x), body.linear(x) * global_alias(body))
    finally:
        GLOBAL.lr = 0.1


def width(body: Any) -> float:
    settings = body.one
    if settings is None or len(body.linear.weight) == 7:
        raise ValueError(f"bad width {settings.width}")
    return settings.width * body.other.inner.width * GLOBAL.width


@pytest.mark.parametrize("make", [Settings, Key, Ordered, Own])
def test_a_learning_rate_beside_what_is_read_is_no_part_of_a_program(make: Callable[[], Any]) -> None:
    body = torchcache.mark(Body(width, make(), Outer()).eval().requires_grad_(False), audit=0.0)
    x = torch.randn(6, 4)
    for _ in range(3):
        body(x)
    misses = torchcache.stats(body).misses
    try:
        for settings in (body.one, body.other.inner, GLOBAL):
            for field in ("lr", "hidden"):
                object.__setattr__(settings, field, 7.0)
            body(x)
    finally:
        GLOBAL.lr = 0.1
    assert torchcache.stats(body).misses == misses
