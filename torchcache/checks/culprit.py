"""Names the operator at which a region stops being row-wise: the first one whose row differs between two runs."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from torchcache.errors import RowwiseError

Same = Callable[[torch.Tensor, torch.Tensor], bool]

_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep
# What these make holds anything.
_UNSET = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})


@dataclasses.dataclass(frozen=True)
class Run:
    """A batch of ``(B, *)`` inputs, and the row of it that must come out as in another run."""

    batch: list[torch.Tensor]
    row: int


def find_culprit(compute: Callable[[list[torch.Tensor]], Any], one: Run, other: Run, same: Same) -> str | None:
    """The first operator whose row is not the ``same`` in two runs of ``compute``, its module and source line.

    ``None`` where no single operator can be named: rows were moved away from dim 0 and mixed there.
    """
    try:
        with torch.compiler.set_stance("force_eager"):  # what is compiled runs no operators that have names
            runs = []
            for run in (one, other):
                with _Recorder(run) as recorder:
                    compute(run.batch)
                runs.append(recorder)
    except Exception:  # the error being explained must not give way to another
        return None
    lost: set[int] = set()
    for a, b in zip(runs[0].steps, runs[1].steps, strict=False):
        if a.name != b.name:
            return None  # the data decide which operators run
        if len(a.rows) == len(b.rows) and all(map(_agree, a.rows, b.rows, [same] * len(a.rows))):
            lost.difference_update(a.made)
        elif a.moves or (lost.intersection(a.read) and not (a.batched and set(a.read) - lost)):
            lost.update(a.made)  # the row is elsewhere than on dim 0; who mixes there cannot be seen
        else:
            return f"`{a.name}`{a.place}"
    return None


def unstable(where: str, culprit: str | None) -> RowwiseError:
    """That the same rows come out different when computed again."""
    likely = f"First seen at {culprit}." if culprit else "Likely: dropout in train mode, noise, a counter."
    return RowwiseError(
        f"{where} cannot be cached: the same rows give different outputs when computed again, so it is random or "
        f"keeps state between calls. {likely} Call .eval() on it, mark a smaller part, or unmark it"
    )


def mixing(where: str, culprit: str | None) -> RowwiseError:
    """That a row changes with the others of its batch."""
    likely = (
        f"First seen at {culprit}."
        if culprit
        else "Likely: BatchNorm in train mode, a mean, softmax or matmul over dim 0, or an input without a batch "
        "dimension whose first dimension equals the batch size."
    )
    return RowwiseError(
        f"{where} cannot be cached: a row's output changes with the other rows of the batch. {likely} Call .eval() if "
        "that is its train mode, mark a smaller part, or unmark it"
    )


def _agree(a: torch.Tensor, b: torch.Tensor, same: Same) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and same(a, b)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One operator of a run: numbers of the data it read and made, and the row of what it made."""

    name: str
    place: str
    read: list[int]
    made: list[int]
    rows: list[torch.Tensor]
    moves: bool
    batched: bool


class _Recorder(TorchFunctionMode):
    """Notes every operator of one run, under the name that its caller used."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self._run = run
        self._count = run.batch[0].shape[0]
        self._numbers = WeakIdKeyDictionary()
        self._made = len(run.batch)
        self._numbers.update(zip(run.batch, range(self._made), strict=True))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = _tensors((args, kwargs))
        versions = [leaf._version for leaf in given]
        result = func(*args, **(kwargs or {}))
        written = [leaf for leaf, version in zip(given, versions, strict=True) if leaf._version != version]
        made = _tensors(result) or written
        if made and _name(func) not in _UNSET:
            read = [self._numbers[leaf] for leaf in given if leaf in self._numbers]
            held = {leaf.untyped_storage().data_ptr() for leaf in given}
            moves = not written and all(leaf.untyped_storage().data_ptr() in held for leaf in made)
            numbers = range(self._made, self._made + len(made)) if read else range(0)
            self._made += len(numbers)
            self._numbers.update(zip(made, numbers, strict=False))
            batched = all(leaf.shape[:1] == (self._count,) for leaf in made)
            rows = [self._row(leaf) for leaf in made]
            self.steps.append(_Step(_name(func), _place_of(sys._getframe(1)), read, [*numbers], rows, moves, batched))
        return result

    def _row(self, leaf: torch.Tensor) -> torch.Tensor:
        """The row's share of dim 0; all of a tensor that has no rows."""
        if leaf.ndim and leaf.shape[0] and leaf.shape[0] % self._count == 0:
            each = leaf.shape[0] // self._count
            leaf = leaf[self._run.row * each : (self._run.row + 1) * each]
        return leaf.detach().clone()


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _name(func: Any) -> str:
    name = str(resolve_name(func) or getattr(func, "__name__", func))
    return name.removesuffix(".__get__").split(".")[-1].removeprefix("__").removesuffix("__")


def _place_of(frame: types.FrameType | None) -> str:
    """Source line and module of the operator called in ``frame``, for the end of a sentence."""
    line, owners = "", []
    for found in _frames(frame):
        names, file = found.f_code.co_varnames, found.f_code.co_filename
        owner = found.f_locals.get(names[0]) if names else None
        if isinstance(owner, fx.GraphModule) and file.startswith("<eval_with_key>"):
            return _traced_place(owner, found.f_lineno)
        if not line and not file.startswith(_TORCH):
            line = f"{file}:{found.f_lineno}"
        if isinstance(owner, nn.Module):
            owners.append(owner)
    path = next((name for name, part in owners[-1].named_modules() if part is owners[0]), "") if owners else ""
    return _said(line, path, type(owners[0]).__name__ if owners else "")


def _frames(frame: types.FrameType | None) -> Iterator[types.FrameType]:
    while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
        yield frame
        frame = frame.f_back


def _traced_place(module: fx.GraphModule, line: int) -> str:
    index = getattr(module, "_lineno_map", {}).get(line - getattr(module, "_prologue_start", 0))
    if index is None:
        return ""
    node = list(module.graph.nodes)[index]
    frames = [f"{file}:{at}" for file, at in re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")]
    own = [found for found in frames if not found.startswith((_TORCH, _OURS))]
    path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
    path = re.sub(r"^L\['\w+'\](\.__self__\.module)?\.?|\.forward\.module", "", path)
    return _said(own[-1] if own else "", path, getattr(kind, "__name__", str(kind)))


def _said(line: str, path: str, kind: str) -> str:
    module = f"{path}, a {kind}" if path and kind else path or kind
    return (f" in {module}" if module else "") + (f" ({line})" if line else "")
