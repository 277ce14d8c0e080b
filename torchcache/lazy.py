"""Tensors of samples that nobody has loaded: their shape, dtype, device and digests, and their data when it is used."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils import _pytree as pytree

from torchcache import dynamo
from torchcache.context import inside_region

__all__ = [
    "Foresee",
    "Kind",
    "LazyTensor",
    "Row",
    "Source",
    "digests_of",
    "loaded",
    "one_row",
    "reduced",
    "register",
    "stack_rows",
    "stand_in",
    "take_whole",
    "tell",
]


class Kind(NamedTuple):
    """What one leaf of a sample is, without its content."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Source(Protocol):
    """Where rows come from.

    Attributes
    ----------
    digest : str
        The algorithm of the rows' digests.
    """

    digest: str

    def load(self, rows: Sequence[Row], *, foreign: bool) -> None:
        """Give all of ``rows`` their data. ``foreign`` says that code reads it that is no part of a region."""

    def learn(self, owner: Any, leaf: int, foresee: Foresee) -> None:
        """Note that a region looks rows of ``leaf`` up, and how to tell whether it will find them."""


# From rows to whether each will be found; ``None`` where that cannot be told.
Foresee = Callable[[Sequence[torch.Tensor]], "Sequence[bool] | None"]


class Row:
    """One tensor of one sample.

    Parameters
    ----------
    source : Source
        The data set that it comes from.
    index : object
        The sample's index there.
    leaf : int
        Which of the sample's large tensors it is.
    kind : Kind
        Its dtype and shape.
    digest : bytes
        16 bytes over its elements.
    data : torch.Tensor or None
        Its elements, once they are loaded. Nobody writes to them.
    """

    __slots__ = ("data", "digest", "index", "kind", "leaf", "source")

    def __init__(
        self, source: Source, index: Any, leaf: int, kind: Kind, digest: bytes, data: torch.Tensor | None = None
    ) -> None:
        self.source, self.index, self.leaf, self.kind = source, index, leaf, kind
        self.digest, self.data = digest, data


class _Held:
    """Rows that lie side by side in one memory, as soon as they lie anywhere. Views share it.

    Attributes
    ----------
    data : torch.Tensor or None
        The memory. From when on there is one, anybody may have written to it.
    """

    __slots__ = ("__weakref__", "data", "device", "number", "pinned", "rows")

    def __init__(self, rows: Sequence[Row], device: torch.device, pinned: bool = False) -> None:
        self.rows, self.device, self.pinned = rows, device, pinned
        self.data: torch.Tensor | None = None
        self.number = -1

    def load(self) -> torch.Tensor:
        if self.data is None:
            with _lock, dynamo.no_mode(), torch.inference_mode(False), torch.no_grad():
                if self.data is None:
                    self.data = self._gather(range(len(self.rows)))
        return self.data

    def fresh(self, places: Sequence[int]) -> torch.Tensor:
        """Some of the rows as they are now, in memory that nobody else has."""
        if self.data is None:
            with _lock, dynamo.no_mode(), torch.no_grad():
                return self._gather(places)
        return self.data[[*places]]

    def _gather(self, places: Sequence[int]) -> torch.Tensor:
        rows = [self.rows[place] for place in places]
        missing: dict[int, list[Row]] = {}
        for row in rows:
            if row.data is None:
                missing.setdefault(id(row.source), []).append(row)
        for some in missing.values():
            some[0].source.load(some, foreign=not inside_region())
        made = torch.stack([row.data for row in rows if row.data is not None])
        made = made.to(self.device)
        return made.pin_memory() if self.pinned else made

    def handle(self) -> int:
        """A number by which a graph finds these rows, as long as somebody holds them."""
        if self.number < 0:
            self.number = next(_numbers)
            _numbered[self.number] = self
        return self.number


_lock = threading.RLock()
_numbers = itertools.count()
_numbered: weakref.WeakValueDictionary[int, _Held] = weakref.WeakValueDictionary()


class LazyTensor(torch.Tensor):
    """A tensor whose data is loaded when something uses it.

    Moving it to a device, detaching, cloning, pinning, stacking and concatenating whole rows, and indexing along the
    first dimension do not use it, and a lookup takes the digests of its rows. Any other operation loads the data and
    goes on with it. It behaves as the tensor that it stands for, but for its type.

    A compiler takes it apart into ``token``, which names its rows for the time of a call.
    """

    _held: _Held
    _span: range
    _single: bool
    _token: torch.Tensor | None

    @staticmethod
    def __new__(
        cls: type[LazyTensor],
        held: _Held | None,
        span: range,
        kind: Kind,
        device: torch.device,
        *,
        single: bool = False,
        token: torch.Tensor | None = None,
    ) -> LazyTensor:
        count: Any = len(span) if token is None else token.shape[0]
        shape = kind.shape if single else (count, *kind.shape)
        made: LazyTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=kind.dtype, device=device)  # type: ignore[attr-defined]
        made._held, made._span, made._single, made._token = held, span, single, token  # type: ignore[assignment]
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    __torch_function__ = dynamo.no_torch_function

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _takes_whole:
            return _call_whole(func, args, kwargs)
        stays = _STAYS.get(func)
        made = stays(*args, **kwargs) if stays is not None else None
        return made if made is not None else _call_loaded(func, args, kwargs)

    @property
    def kind(self) -> Kind:
        """Of one row."""
        return Kind(self.dtype, tuple(self.shape if self._single else self.shape[1:]))

    @property
    def rows(self) -> Sequence[Row] | None:
        """Its rows, as long as nobody can have written to them."""
        if self._token is not None and self._held is None:
            return None
        return None if self._held.data is not None else [self._held.rows[place] for place in self._span]

    def load(self) -> torch.Tensor:
        """The tensor that it stands for: always the same memory."""
        if self._held is None:
            assert self._token is not None
            return _LOAD(self._token, [*self.kind.shape], self.dtype, self.device, self._single)  # type: ignore[no-any-return]
        whole, span = self._held.load(), self._span
        if self._single:
            return whole[span.start]
        return whole if len(span) == len(whole) else whole[span.start : span.stop]

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        if self._token is None:
            number = self._held.handle()
            self._token = torch.tensor([[number, place] for place in self._span], dtype=torch.int64).reshape(-1, 2)
        return ["_token"], (self.kind, str(self.device), self._single)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> LazyTensor:
        kind, device, single = context
        return LazyTensor(None, range(0), kind, torch.device(device), single=single, token=inner["_token"])

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self.load())

    def __format__(self, spec: str) -> str:
        return format(self.load(), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.load().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        copied: torch.Tensor = self.load().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        return copied


def _through(name: str) -> Callable[..., Any]:
    def method(self: LazyTensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.load(), name)(*args, **kwargs)

    method.__name__ = name
    return method


# What reads memory without an operator.
for _name in ("numpy", "tolist", "data_ptr", "__array__", "__dlpack__", "share_memory_"):
    setattr(LazyTensor, _name, _through(_name))


def stack_rows(rows: Sequence[Row]) -> torch.Tensor:
    """A batch of ``rows``, not loaded where it can be."""
    if len({row.kind for row in rows}) == 1:
        return LazyTensor(_Held(rows, torch.device("cpu")), range(len(rows)), rows[0].kind, torch.device("cpu"))
    return torch.stack([one_row(row).load() for row in rows])  # raises what torch raises


def one_row(row: Row) -> LazyTensor:
    """A sample's tensor."""
    cpu = torch.device("cpu")
    return LazyTensor(_Held([row], cpu), range(1), row.kind, cpu, single=True)


def digests_of(tensor: torch.Tensor, algorithm: str) -> list[bytes] | None:
    """The digest of each row, 16 bytes, where they are known without the data."""
    if type(tensor) is not LazyTensor or tensor._single:
        return None
    rows = tensor.rows
    if rows is None or any(row.source.digest != algorithm for row in rows):
        return None
    return [row.digest for row in rows]


def register(number: int, source: Source) -> None:
    """Have rows that come from workers find ``source`` by a number, as long as it lives."""
    _sources[number] = source


_sources: weakref.WeakValueDictionary[int, Source] = weakref.WeakValueDictionary()


def reduced(tensor: LazyTensor, away: type) -> Any:
    """How to pickle ``tensor`` for another process: as it is where all its rows are of a source of class ``away``.

    Rows that are loaded go with it. Of any other one the data goes.
    """
    rows = tensor.rows
    if not rows or not all(type(row.source) is away for row in rows):
        return reduce_tensor(tensor.load())
    source: Any = rows[0].source
    there = [place for place, row in enumerate(rows) if row.data is not None]
    data = torch.stack([rows[place].data for place in there]) if there else None  # type: ignore[misc]
    named = [(row.index, row.leaf, row.digest) for row in rows]
    return _rebuilt, (source.number, named, tensor.kind, tensor._single, there, data)


def _rebuilt(
    number: int, named: list[tuple[Any, int, bytes]], kind: Kind, single: bool, there: list[int], data: Any
) -> LazyTensor:
    source = _sources.get(number)
    if source is None:
        raise RuntimeError("torchcache.DataLoader: a batch came from workers of a loader that is gone")
    rows = [Row(source, index, leaf, kind, digest) for index, leaf, digest in named]
    for row, place in enumerate(there):
        rows[place].data = data[row]
    cpu = torch.device("cpu")
    return LazyTensor(_Held(rows, cpu), range(len(rows)), kind, cpu, single=single)


def tell(owner: Any, rows: Sequence[torch.Tensor], foresee: Callable[[], Foresee]) -> None:
    """Tell where ``rows`` come from that ``owner`` looks them up by what they are alone."""
    if len(rows) == 1 and type(rows[0]) is LazyTensor and rows[0].rows:
        first = rows[0].rows[0]
        first.source.learn(owner, first.leaf, foresee())


def loaded(value: Any) -> Any:
    """``value`` with the tensors that its lazy ones stand for, in containers that pytrees know."""
    if not any(isinstance(leaf, LazyTensor) for leaf in pytree.tree_leaves(value)):
        return value
    return pytree.tree_map_only(LazyTensor, LazyTensor.load, value)


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """What tells whether a call with ``tensor`` is traced: a lazy one is where its token is."""
    if type(tensor) is not LazyTensor:
        return tensor
    return _PLAIN if tensor._token is None else tensor._token


_PLAIN = torch.empty(0)
_takes_whole: dict[Any, Callable[..., Any]] = {}


def take_whole(operator: Any, function: Callable[..., Any]) -> None:
    """Have ``operator`` be given lazy tensors as they are; ``function`` is what it does where nothing is traced."""
    _takes_whole[operator] = function


def _call_whole(func: Any, args: Any, kwargs: Any) -> Any:
    leaves = pytree.tree_leaves((args, kwargs))
    if not any(isinstance(leaf, LazyTensor) and leaf._held is None for leaf in leaves):
        return _takes_whole[func](*args, **kwargs)
    named = pytree.tree_map_only(LazyTensor, _named, (args, kwargs))
    if any(isinstance(leaf, LazyTensor) for leaf in pytree.tree_leaves(named)):  # real tokens: the graph runs
        return _takes_whole[func](*named[0], **named[1])
    return func(*named[0], **named[1])


def _named(tensor: LazyTensor) -> torch.Tensor:
    if tensor._held is not None:
        return tensor
    return _UNLOADED(tensor._token, [*tensor.kind.shape], tensor.dtype, tensor.device, tensor._single)  # type: ignore[no-any-return]


def _call_loaded(func: Any, args: Any, kwargs: Any) -> Any:
    """The operator on what its arguments stand for. What it wrote into stays the tensor that the caller has."""
    given: dict[int, tuple[torch.Tensor, LazyTensor]] = {}

    def load(lazy: LazyTensor) -> torch.Tensor:
        real = lazy.load()
        given[id(real)] = (real, lazy)
        return real

    args, kwargs = pytree.tree_map_only(LazyTensor, load, (args, kwargs))
    made = func(*args, **kwargs)
    return pytree.tree_map_only(torch.Tensor, lambda leaf: given[id(leaf)][1] if id(leaf) in given else leaf, made)


# Where a graph is traced or runs: rows by their names.

_library = torch.library.Library("torchcache", "FRAGMENT")  # type: ignore[no-untyped-call]
for _operator in ("load", "unloaded"):
    _library.define(  # type: ignore[no-untyped-call]
        f"{_operator}(Tensor token, SymInt[] shape, ScalarType dtype, Device device, bool single) -> Tensor",
        tags=dynamo.OPAQUE_TAGS,
    )


def _find(token: torch.Tensor) -> tuple[_Held, list[int]]:
    pairs = token.tolist()
    held = {number: _numbered.get(number) for number in dict.fromkeys(number for number, _ in pairs)}
    if len(held) == 1:
        (only,) = held.values()
        if only is not None:
            return only, [place for _, place in pairs]
    raise RuntimeError("torchcache: a graph reads samples of a batch that is gone")


@torch.library.impl(_library, "load", "CompositeExplicitAutograd")
def _load(
    token: torch.Tensor, shape: list[int], dtype: torch.dtype, device: torch.device, single: bool
) -> torch.Tensor:
    held, places = _find(token)
    fresh = held.fresh(places).to(device)
    return fresh[0] if single else fresh


@torch.library.impl(_library, "unloaded", "CompositeExplicitAutograd")
def _unloaded(
    token: torch.Tensor, shape: list[int], dtype: torch.dtype, device: torch.device, single: bool
) -> torch.Tensor:
    held, places = _find(token)
    if held.data is not None:
        return _load(token, shape, dtype, device, single)
    same = places == [*range(len(held.rows))] and held.device == device
    if not same:
        held = _Held([held.rows[place] for place in places], device, held.pinned)
    return LazyTensor(held, range(len(places)), Kind(dtype, tuple(shape)), device, single=single)


def _fake(
    token: torch.Tensor, shape: list[Any], dtype: torch.dtype, device: torch.device, single: bool
) -> torch.Tensor:
    return torch.empty(shape if single else [token.shape[0], *shape], dtype=dtype, device=device)


torch.library.register_fake("torchcache::load", _fake, lib=_library)
torch.library.register_fake("torchcache::unloaded", _fake, lib=_library)
_LOAD = torch.ops.torchcache.load.default
_UNLOADED = torch.ops.torchcache.unloaded.default


# Operators that do not use the data. Each returns ``None`` where it does for these arguments.


def _is_lazy(tensor: Any) -> bool:
    return type(tensor) is LazyTensor and tensor._held is not None and tensor._held.data is None


def _view(tensor: LazyTensor, span: range, single: bool) -> LazyTensor:
    return LazyTensor(tensor._held, span, tensor.kind, tensor.device, single=single)


def _again(tensor: LazyTensor, device: torch.device | None = None, pinned: bool = False) -> LazyTensor | None:
    """The same rows in a memory of their own."""
    device = tensor.device if device is None else device
    if tensor._held is None:
        token = tensor._token
        return LazyTensor(None, range(0), tensor.kind, device, single=tensor._single, token=token)
    rows = tensor.rows
    if rows is None:
        return None
    return LazyTensor(_Held(rows, device, pinned), range(len(rows)), tensor.kind, device, single=tensor._single)


def _alias(tensor: LazyTensor) -> LazyTensor | None:
    if tensor._held is None:
        return _again(tensor)
    return _view(tensor, tensor._span, tensor._single) if _is_lazy(tensor) else None


def _clone(tensor: LazyTensor, *, memory_format: Any = None) -> LazyTensor | None:
    return _again(tensor) if memory_format in _ORDERS else None


def _to_copy(
    tensor: LazyTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> LazyTensor | None:
    if dtype not in (None, tensor.dtype) or layout not in (None, torch.strided) or memory_format not in _ORDERS:
        return None
    return _again(tensor, device, bool(pin_memory))


def _pin_memory(tensor: LazyTensor, device: Any = None) -> LazyTensor | None:
    return _again(tensor, pinned=True)


def _is_pinned(tensor: LazyTensor, device: Any = None) -> bool | None:
    return tensor._held.pinned if _is_lazy(tensor) else None


def _slice(tensor: LazyTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> LazyTensor | None:
    if not _is_lazy(tensor) or tensor._single or dim not in (0, -tensor.ndim) or step != 1:
        return None
    return _view(tensor, tensor._span[slice(start, end)], False)


def _select(tensor: LazyTensor, dim: int, index: int) -> LazyTensor | None:
    if not _is_lazy(tensor) or tensor._single or dim not in (0, -tensor.ndim):
        return None
    place = tensor._span[index]
    return _view(tensor, range(place, place + 1), True)


def _unbind(tensor: LazyTensor, dim: int = 0) -> list[LazyTensor] | None:
    if not _is_lazy(tensor) or tensor._single or dim not in (0, -tensor.ndim):
        return None
    return [_view(tensor, range(place, place + 1), True) for place in tensor._span]


def _split(tensor: LazyTensor, size: Any, dim: int = 0) -> list[LazyTensor] | None:
    if not _is_lazy(tensor) or tensor._single or dim not in (0, -tensor.ndim) or not len(tensor._span):
        return None
    sizes = size if isinstance(size, (list, tuple)) else [size] * -(-len(tensor._span) // size) if size else []
    ends = list(itertools.accumulate(sizes))
    if not ends or (isinstance(size, (list, tuple)) and ends[-1] != len(tensor._span)):
        return None
    return [_view(tensor, tensor._span[end - part : end], False) for part, end in zip(sizes, ends, strict=True)]


def _unsqueeze(tensor: LazyTensor, dim: int) -> LazyTensor | None:
    if not _is_lazy(tensor) or not tensor._single or dim not in (0, -tensor.ndim - 1):
        return None
    return _view(tensor, tensor._span, False)


def _index_select(tensor: LazyTensor, dim: int, index: torch.Tensor) -> LazyTensor | None:
    if not _is_lazy(tensor) or tensor._single or dim not in (0, -tensor.ndim) or index.ndim != 1:
        return None
    return _picked(tensor, index.tolist())


def _index(tensor: LazyTensor, indices: Sequence[torch.Tensor | None]) -> LazyTensor | None:
    if not _is_lazy(tensor) or tensor._single or len(indices) != 1 or indices[0] is None or indices[0].ndim != 1:
        return None
    index = indices[0]
    if index.dtype == torch.bool and len(index) != len(tensor._span):
        return None
    return _picked(tensor, (index.nonzero().flatten() if index.dtype == torch.bool else index).tolist())


def _picked(tensor: LazyTensor, places: Sequence[int]) -> LazyTensor | None:
    rows = tensor.rows
    if rows is None or any(not -len(rows) <= place < len(rows) for place in places):
        return None
    return _joined([[rows[place] for place in places]], tensor, tensor.device)


def _cat(tensors: Sequence[Any], dim: int = 0) -> LazyTensor | None:
    if not all(_is_lazy(tensor) and not tensor._single for tensor in tensors):
        return None
    return _together(tensors) if dim in (0, -tensors[0].ndim) else None


def _stack(tensors: Sequence[Any], dim: int = 0) -> LazyTensor | None:
    if not all(_is_lazy(tensor) and tensor._single for tensor in tensors):
        return None
    return _together(tensors) if dim in (0, -tensors[0].ndim - 1) else None


def _together(tensors: Sequence[LazyTensor]) -> LazyTensor | None:
    first = tensors[0]
    if any(tensor.kind != first.kind or tensor.device != first.device for tensor in tensors):
        return None
    return _joined([tensor.rows or () for tensor in tensors], first, first.device)


def _joined(parts: Sequence[Sequence[Row]], like: LazyTensor, device: torch.device) -> LazyTensor:
    rows = [row for part in parts for row in part]
    return LazyTensor(_Held(rows, device), range(len(rows)), like.kind, device)


_ORDERS = (None, torch.preserve_format, torch.contiguous_format)
_aten = torch.ops.aten
_STAYS: dict[Any, Callable[..., Any]] = {
    _aten.alias.default: _alias,
    _aten.cat.default: _cat,
    _aten.clone.default: _clone,
    _aten.detach.default: _alias,
    _aten.index.Tensor: _index,
    _aten.index_select.default: _index_select,
    _aten.is_pinned.default: _is_pinned,
    _aten._pin_memory.default: _pin_memory,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.stack.default: _stack,
    _aten._to_copy.default: _to_copy,
    _aten.unbind.int: _unbind,
    _aten.unsqueeze.default: _unsqueeze,
}
