"""The tensor that stands for rows which are not loaded, and what an operator makes of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchcache import dynamo
from torchcache.lazy.rows import Held, Kind, Row


class LazyTensor(torch.Tensor):
    """A tensor whose data is loaded when something uses it.

    Moving it to a device, detaching, cloning, pinning, stacking and concatenating whole rows, and indexing along the
    first dimension do not use it, and a lookup takes the digests of its rows. Any other operation loads the data and
    goes on with it. It behaves as the tensor that it stands for, but for its type.

    A compiler takes it apart into ``token``, which names its rows for the time of a call.

    Parameters
    ----------
    held : Held or None
        Its rows; ``None`` where a graph is traced.
    span : range
        Which of these.
    kind : Kind
        Dtype and shape of one.
    device : torch.device
        Where its data will be.
    single : bool
        Whether it is one row, without a dimension of rows.
    token : torch.Tensor or None
        ``(rows, 2)``: the number of ``held``, and a place in it.
    box : list of torch.Tensor or None
        Where a graph is traced, the data that was loaded for this tensor and its aliases: an empty list before.
    """

    held: Held | None
    span: range
    single: bool
    token: torch.Tensor | None
    box: list[torch.Tensor]

    @staticmethod
    def __new__(  # noqa: D102
        cls: type[LazyTensor],
        held: Held | None,
        span: range,
        kind: Kind,
        device: torch.device,
        *,
        single: bool = False,
        token: torch.Tensor | None = None,
        box: list[torch.Tensor] | None = None,
    ) -> LazyTensor:
        count: Any = len(span) if token is None else token.shape[0]
        shape = kind.shape if single else (count, *kind.shape)
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            made: LazyTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=kind.dtype, device=device)
        made.box = [] if box is None else box
        made.held, made.span, made.single, made.token = held, span, single, token
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    __torch_function__ = dynamo.no_torch_function  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _takes_whole:
            return _call_whole(func, args, kwargs)
        stays = STAYS.get(func)
        made = stays(*args, **kwargs) if stays is not None else None
        return made if made is not None else _call_loaded(func, args, kwargs)

    @property
    def kind(self) -> Kind:
        """Of one row."""
        return Kind(self.dtype, tuple(self.shape if self.single else self.shape[1:]))

    @property
    def rows(self) -> Sequence[Row] | None:
        """Its rows, as long as nobody can have written to them."""
        held = self.held
        return None if held is None or held.data is not None else [held.rows[place] for place in self.span]

    def load(self) -> torch.Tensor:
        """The tensor that it stands for: always the same memory."""
        if self.held is None:
            assert self.token is not None
            if not self.box:
                shape = [*self.kind.shape]
                self.box.append(torch.ops.torchcache.load(self.token, shape, self.dtype, self.device, self.single))
            return self.box[0]
        whole, span = self.held.load(), self.span
        if self.single:
            return whole[span.start]
        return whole if len(span) == len(whole) else whole[span.start : span.stop]

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        dynamo.keep_effects(torch.ops.torchcache.store.default)
        if self.token is None:
            assert self.held is not None
            number = self.held.handle()
            token = torch.tensor([[number, place] for place in self.span], dtype=torch.int64, device="cpu")
            self.token = token.reshape(-1, 2)
        return ["token"], (self.kind, str(self.device), self.single)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> LazyTensor:
        kind, device, single = context
        return LazyTensor(None, range(0), kind, torch.device(device), single=single, token=inner["token"])

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self.load())

    def __format__(self, spec: str) -> str:
        return format(self.load(), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.load().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        copied: torch.Tensor = self.load().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        return copied


def _through(name: str) -> Callable[..., Any]:
    def method(self: LazyTensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.load(), name)(*args, **kwargs)

    method.__name__ = name
    return method


# What reads memory without an operator.
for _name in ("numpy", "tolist", "data_ptr", "__array__", "__dlpack__", "share_memory_", "as_subclass"):
    setattr(LazyTensor, _name, _through(_name))


def _memory(name: str) -> Callable[..., Any]:
    def method(self: LazyTensor) -> Any:  # a tracer asks for it to tell what shares memory
        return getattr(torch.Tensor, name)(self) if self.held is None else getattr(self.load(), name)()

    method.__name__ = name
    return method


# What gives the memory itself.
for _name in ("untyped_storage", "storage", "_typed_storage"):
    setattr(LazyTensor, _name, _memory(_name))


def _storage_offset(self: LazyTensor) -> int:
    """Where it will begin in the memory that it shares with its views."""
    return self.span.start * math.prod(self.kind.shape)


LazyTensor.storage_offset = _storage_offset  # type: ignore[assignment]


def _written_by(name: str) -> Callable[..., Any]:
    def method(self: LazyTensor, *args: Any, **kwargs: Any) -> Any:
        others = [other.load() if isinstance(other, LazyTensor) else other for other in args]
        getattr(self.load(), name)(*others, **kwargs)
        return self

    method.__name__ = name
    return method


# What calls a function for each element, in memory.
for _name in ("apply_", "map_", "map2_"):
    setattr(LazyTensor, _name, _written_by(_name))


def _become(tensor: LazyTensor) -> torch.Tensor:
    """Make the caller's own object the tensor that it stands for, by whatever name it is held."""
    plain = tensor.load().detach()
    torch.utils.swap_tensors(tensor, plain)  # type: ignore[no-untyped-call]
    return tensor


def _reshaped(name: str) -> Callable[..., Any]:
    def method(self: LazyTensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(self if self.held is None else _become(self), name)(*args, **kwargs)

    method.__name__ = name
    return method


# What gives a tensor another shape or other memory in place.
for _name in (
    "unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "resize_", "resize_as_", "as_strided_",
    "set_",
):  # fmt: skip
    setattr(LazyTensor, _name, _reshaped(_name))


def _data(self: LazyTensor) -> torch.Tensor:
    return self.detach()


def _set_data(self: LazyTensor, value: torch.Tensor) -> None:
    _become(self).data = value.load() if isinstance(value, LazyTensor) else value


LazyTensor.data = property(_data, _set_data)  # type: ignore[assignment]


# By operator, what is made of lazy arguments without loading them; ``None`` where that cannot be.
STAYS: dict[Any, Callable[..., Any]] = {}
_takes_whole: dict[Any, Callable[..., Any]] = {}


def take_whole(operator: Any, function: Callable[..., Any]) -> None:
    """Have ``operator`` be given lazy tensors as they are; ``function`` is what it does where nothing is traced."""
    _takes_whole[operator] = function


def _call_whole(func: Any, args: Any, kwargs: Any) -> Any:
    leaves = pytree.tree_leaves((args, kwargs))
    if not any(isinstance(leaf, LazyTensor) and leaf.held is None for leaf in leaves):
        return _takes_whole[func](*args, **kwargs)
    named = pytree.tree_map_only(LazyTensor, _named, (args, kwargs))
    if any(isinstance(leaf, LazyTensor) for leaf in pytree.tree_leaves(named)):  # real tokens: the graph runs
        return _takes_whole[func](*named[0], **named[1])
    return func(*named[0], **named[1])


def _named(tensor: LazyTensor) -> torch.Tensor:
    if tensor.held is not None:
        return tensor
    if tensor.box:
        return tensor.box[0]
    return torch.ops.torchcache.unloaded(tensor.token, [*tensor.kind.shape], tensor.dtype, tensor.device, tensor.single)  # type: ignore[no-any-return]


def _call_loaded(func: Any, args: Any, kwargs: Any) -> Any:
    """The operator on what its arguments stand for. What it wrote into stays the tensor that the caller has."""
    given: dict[int, tuple[torch.Tensor, LazyTensor]] = {}

    def load(lazy: LazyTensor) -> torch.Tensor:
        real = lazy.load()
        given[id(real)] = (real, lazy)
        return real

    written = [tensor for tensor in dynamo.written(func, args, kwargs) if isinstance(tensor, LazyTensor)]
    args, kwargs = pytree.tree_map_only(LazyTensor, load, (args, kwargs))
    made = func(*args, **kwargs)
    for tensor in written:
        if tensor.held is None:  # the caller's own memory, when the graph runs
            torch.ops.torchcache.store(tensor.token, tensor.load(), tensor.single)
    return pytree.tree_map_only(torch.Tensor, lambda leaf: given[id(leaf)][1] if id(leaf) in given else leaf, made)
