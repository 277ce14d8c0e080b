"""What would be cached in a model and what not, and why."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from rich.console import Console, Group
from rich.table import Table as RichTable
from torch import nn
from torch.utils.data import DataLoader

from torchcache.batch import Batch, Given
from torchcache.call import Region
from torchcache.checks.plan import Plan
from torchcache.context import explaining
from torchcache.errors import Bypass, TorchcacheError, Trains
from torchcache.mark import Mark, original_of
from torchcache.marked_class import marks_of
from torchcache.modes import differs_in_training
from torchcache.quantity import share_text
from torchcache.regions import Called, name_module
from torchcache.reports.table import Table, Tabular, shown

__all__ = ["Explanation", "LeftOut", "LoaderExplanation", "RegionPlanned", "explain"]

# Bytes a row from which it is worth saying how fewer are stored.
LARGE = 16_384
SMALLER = (
    "A head often reads little of a large row: mark the model that holds both, and only what is read is stored; or name"
    " it, as in mark(module, output=lambda o: o[:, 0])."
)


@dataclasses.dataclass(frozen=True)
class RegionPlanned:
    """A region that would be looked up.

    Parameters
    ----------
    name : str
        Path and class of the marked module, and the method unless it is ``forward``.
    inputs : list of str
        Name, dtype and shape of each tensor argument: of one row, or whole where all rows share it.
    outputs : list of str
        Name, dtype and row shape of each tensor that is stored, and the dtype that it is stored in if that is another.
    row_bytes : int
        Bytes stored a row.
    state_bytes : int
        Bytes of the parameters, buffers and other tensors that the original reads.
    mode : str
        Whether the module is kept in eval mode, and what may act otherwise in train mode.
    largest_error : float or None
        Where ``cache_dtype`` rounds, the largest error of rows that were served so far, as ``torchcache.stats`` has it.
    """

    name: str
    inputs: list[str]
    outputs: list[str]
    row_bytes: int
    state_bytes: int
    mode: str
    largest_error: float | None = None


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A mark, or one of its calls, that would not be looked up.

    Parameters
    ----------
    name : str
        Path and class of the marked module, and the method unless it is ``forward``.
    kind : str
        "bypass", "trainable", "refused", "not called", "nested" or "disabled".
    reason : str
        What stands in the way, and what to do about it.
    """

    name: str
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What ``explain`` found; prints as tables.

    Parameters
    ----------
    regions : list of RegionPlanned
        What would be looked up, in the order of the calls.
    left_out : list of LeftOut
        What would not, and why.
    """

    regions: list[RegionPlanned]
    left_out: list[LeftOut]

    def __rich__(self) -> Group:
        cached = RichTable("region", "reads", "stores", title="cached")
        for name in ("bytes a row", "state bytes"):
            cached.add_column(name, justify="right")
        seen = any(region.largest_error is not None for region in self.regions)
        if seen:
            cached.add_column("largest error", justify="right")
        cached.add_column("mode")
        for region in self.regions:
            error = (share_text(region.largest_error),) if seen else ()
            sizes = (f"{region.row_bytes:,}", f"{region.state_bytes:,}", *error)
            cached.add_row(*map(shown, (region.name, region.inputs, region.outputs, *sizes, region.mode)))
        trains = {part.name for part in self.left_out if part.kind == "trainable"}
        if any(region.row_bytes >= LARGE and region.name not in trains for region in self.regions):
            cached.caption, cached.caption_justify = SMALLER, "left"
        left = RichTable("mark", "kind", "reason", title="not cached")
        for part in self.left_out:
            left.add_row(*map(shown, (part.name, part.kind, part.reason)))
        return Group(cached, left)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=160).print(self.__rich__())
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


@dataclasses.dataclass(frozen=True)
class LoaderExplanation(Tabular):
    """What becomes of each leaf of a data set's samples in a ``torchcache.DataLoader``.

    Parameters
    ----------
    name : str
        The data set's class.
    leaves : list of (str, str, str)
        Where it stands in a sample, what it is, and whether it is loaded in later epochs, with the reason.
    """

    name: str
    leaves: list[tuple[str, str, str]]

    def table(self) -> Table:
        """One row a leaf."""
        notes = [] if self.leaves else ["no sample was loaded yet"]
        return Table(f"samples of {self.name}", ("leaf", "what it is", "in later epochs"), self.leaves, notes)


@overload
def explain(model: DataLoader[Any]) -> LoaderExplanation: ...
@overload
def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation: ...
def explain(model: Callable[..., Any] | DataLoader[Any], *args: Any, **kwargs: Any) -> Explanation | LoaderExplanation:
    """Run ``model`` once on example inputs and say what would be cached; nothing is stored or counted.

    Everything is computed, compiled models eagerly. Frozen parts of marks are put in eval mode, as a first call does.
    Of a ``torchcache.DataLoader`` it says which leaves of its samples are loaded, and why, as far as training went.

    Parameters
    ----------
    model : nn.Module, function or DataLoader
        A model with marks in it, transformed or compiled or neither, or a decorated function; or a loader of ours.
    *args, **kwargs
        Example inputs; two rows or more that differ tell most.

    Returns
    -------
    Explanation or LoaderExplanation
        With ``regions`` and ``left_out``, or with ``leaves``; prints as tables.
    """
    if isinstance(model, DataLoader):
        return LoaderExplanation(*model.explained())  # type: ignore[attr-defined]
    model = getattr(model, "_orig_mod", model)
    marks = _Marks(model if isinstance(model, nn.Module) else None)
    explainer = _Explainer(marks)
    with torch.compiler.set_stance("force_eager"), explaining(explainer), marks.watching():
        model(*args, **kwargs)
    explainer.left_out.extend(marks.left_out())
    return Explanation(explainer.regions, explainer.left_out)


class _Explainer:
    """Answers marked calls with what the original computes, and notes what would have been looked up."""

    def __init__(self, marks: _Marks) -> None:
        self.regions: list[RegionPlanned] = []
        self.left_out: list[LeftOut] = []
        self._marks = marks
        self._twins: dict[Region, Region] = {}

    def __call__(self, region: Region, given: Given) -> Any:
        name = self._marks.note_call(region)
        twin = self._twins.get(region)
        if twin is None:
            options = dataclasses.replace(region.options, persistent=False)
            twin = self._twins[region] = Region(region.subject, options)
        try:
            planned = _planned(name, region, *twin.examine(given))
            if planned not in self.regions:
                self.regions.append(planned)
        except Trains as bypass:
            return self._explain_parts(name, region, given, bypass)
        except Bypass as bypass:
            self._leave_out(name, "bypass", str(bypass))
        except TorchcacheError as error:
            self._leave_out(name, "refused", str(error))
        return given.run()

    def _explain_parts(self, name: str, region: Region, given: Given, bypass: Trains) -> Any:
        """A mark that is partly trainable: the frozen parts of its graph are regions, which tell of themselves."""
        if region.partly is None:
            self._leave_out(name, "trainable", str(bypass))
            return given.run()
        before, known = len(self.regions), dict(region.reasons)
        with torch.compiler.set_stance("default"):  # it is traced to be divided
            outputs = region.partly(given, bypass)
        noted = {reason for reason, rows in region.reasons.items() if known.get(reason) != rows} - {bypass.reason}
        if len(self.regions) > before:
            self._leave_out(name, "trainable", f"{bypass.reason}: only its frozen part is cached")
        else:
            why = "; ".join(sorted(noted)) or f"{bypass}; no part of it that is frozen was found"
            self._leave_out(name, "trainable", why)
        return outputs

    def _leave_out(self, name: str, kind: str, reason: str) -> None:
        part = LeftOut(name, kind, reason)
        if part not in self.left_out:
            self.left_out.append(part)


def _planned(name: str, region: Region, batch: Batch, plan: Plan) -> RegionPlanned:
    roles, arguments, outputs = plan.learnt.rows, batch.taken, plan.output
    inputs = [_shown(arguments.name(index), tensor, roles[index]) for index, tensor in enumerate(arguments.tensors)]
    stored = plan.precision.stored
    stores = [
        _shown(outputs.name(index), leaf, plan.learnt.output_dims[index], stored.leaves[index][0])
        for index, leaf in enumerate(outputs.tensors)
    ]
    held = {id(tensor): tensor for tensor in region.subject.identity.look().tensors}.values()
    module = region.subject.module
    kinds = differs_in_training(module) if module is not None else []
    mode = (
        "" if module is None else "kept in eval" + (f"; {', '.join(kinds)} may act otherwise in train" if kinds else "")
    )
    state, error = sum(tensor.nbytes for tensor in held), region.counters.largest_error
    return RegionPlanned(name, inputs, stores, stored.size, state, mode, error)


def _shown(name: str, tensor: torch.Tensor, dim: int | None, stored: torch.dtype | None = None) -> str:
    """A tensor for people: its name, its dtype, the shape of one row; the whole shape where rows share it."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if dim is None:
        return f"{name}: {dtype} {shape}, shared"
    row = (*shape[:dim], *shape[dim + 1 :])
    kept = "" if stored in (None, tensor.dtype) else f" as {str(stored).removeprefix('torch.')}"
    return f"{name}: {dtype} {row}{kept}" + (f", rows along {dim}" if dim else "")


@dataclasses.dataclass
class _Marked:
    """A mark on a module of the model, and what was called of it."""

    path: str
    module: nn.Module
    mark: Mark
    looked_up: bool = False

    @property
    def name(self) -> str:
        kind = type(self.module).__name__
        name = f"{self.path} ({kind})" if self.path else kind
        return name if self.mark.name == "forward" else f"{name}.{self.mark.name}"


class _Marks:
    """All marks in a model, and which methods of their modules ran.

    Parameters
    ----------
    model : nn.Module or None
        The model.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._marks: list[_Marked] = []
        self._ran: dict[int, list[str]] = {}
        for path, module in model.named_modules() if model is not None else ():
            for mark in marks_of(module):
                self._marks.append(_Marked(path, module, mark))
                if path:
                    name_module(module, path)

    def note_call(self, region: Region) -> str:
        """Take note that ``region`` was called; its name."""
        subject = region.subject
        if isinstance(subject, Called):
            for marked in self._marks:
                if marked.module is subject.marked and marked.mark is subject.mark:
                    marked.looked_up = True
        return region.name

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note which methods of the marked modules run; nothing is noted where a profiler is at work."""
        modules = {id(marked.module): marked.module for marked in self._marks}
        names = {code: name for module in modules.values() for code, name in _methods(module)}

        def note(frame: Any, event: str, _: Any) -> None:
            name = names.get(frame.f_code) if event == "call" else None
            if name is None:
                return
            owner = id(frame.f_locals.get(frame.f_code.co_varnames[0]))
            ran = self._ran.setdefault(owner, [])
            if owner in modules and name not in ran:
                ran.append(name)

        if sys.getprofile() is not None:
            yield
            return
        sys.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(None)

    def left_out(self) -> Iterator[LeftOut]:
        """The marks that were not called, and why."""
        for marked in self._marks:
            if not marked.looked_up:
                yield LeftOut(marked.name, *self._why(marked))

    def _why(self, marked: _Marked) -> tuple[str, str]:
        if not marked.mark.options_for(marked.module).enabled:
            return "disabled", "enabled=False, or it was unmarked"
        ran = self._ran.get(id(marked.module), [])
        outer = next((other for other in self._marks if other.looked_up and _is_inside(marked.path, other.path)), None)
        if marked.mark.name in ran or (outer is not None and not ran):
            inside = outer.name if outer is not None else "another mark"
            return "nested", f"it lies inside {inside}, to which its calls belong"
        if ran:
            return "not called", (
                f"{ran[0]} was called, which is not marked: torchcache.mark(module, method={ran[0]!r}) marks it"
            )
        return "not called", f"nothing called its {marked.mark.name} for these inputs"


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))


def _methods(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """The code of each method that the classes of ``module`` add to ``nn.Module``, and of ``forward``."""
    for kind in type(module).__mro__:
        if kind is nn.Module:
            return
        for name, member in vars(kind).items():
            function = inspect.unwrap(original_of(member)) if inspect.isfunction(member) else None
            code = getattr(function, "__code__", None)
            if code is not None and code.co_varnames and (name == "forward" or not hasattr(nn.Module, name)):
                yield code, name
