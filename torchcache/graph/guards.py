"""Guards of our own, for Dynamo to evaluate beside its own.

Dynamo ends the process when an object that it guards by identity dies while guards are evaluated: whatever runs in
Python there runs with the collector at rest.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

__all__ = ["asked_last", "asked_of", "is_object"]

Create = Callable[[Any, Any], None]


def is_object(wanted: Any) -> Create:
    """That there is ``wanted``, or what came to lie in its place. Dynamo's own notes when it dies; this does not."""

    def create(builder: Any, guard: Any) -> None:
        said = [f"{guard.name} is what was traced"]
        builder.get_guard_manager(guard).add_id_match_guard(id(wanted), said, guard.user_stack)

    return create


def asked_of(check: Callable[[Any], bool], said: str) -> Create:
    """That ``check`` says yes to what there is."""

    def create(builder: Any, guard: Any) -> None:
        builder.get_guard_manager(guard).add_lambda_guard(_at_rest(check), [f"{guard.name}: {said}"], guard.user_stack)

    return create


def asked_last(check: Callable[[Any], bool], said: str) -> Create:
    """That ``check`` says yes, after all others: none of what these compare can be dead by then."""

    def create(builder: Any, guard: Any) -> None:
        builder.guard_manager.root.add_epilogue_lambda_guard(_at_rest(check), [said], guard.user_stack)

    return create


def _at_rest(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def call(value: Any) -> bool:
        collecting = gc.isenabled()
        gc.disable()
        try:
            return check(value)
        finally:
            if collecting:
                gc.enable()

    return call
