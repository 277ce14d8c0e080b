"""What a ``with`` block around a call says to every lookup inside it."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from torchcache import dynamo
from torchcache.errors import SampleKeyError

# The reason of calls that the caller wants computed.
ASKED = "torchcache.bypass() is in force"

_bypass: ContextVar[bool] = ContextVar("torchcache_bypass", default=False)
_computing: ContextVar[bool] = ContextVar("torchcache_computing", default=False)


class _Ids:
    """A block with ids for its rows, and how often each region was called within it."""

    # A step between others finds no code in the processor's caches: this is a third of a ``contextmanager``.
    __slots__ = ("_token", "calls", "ids", "there")

    def __init__(self, ids: list[bytes]) -> None:
        self.ids = ids
        self.calls: dict[int, int] = {}
        # What was there when the block began, by its memory: that, and how often it had been written to.
        self.there: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def __enter__(self) -> None:
        self._token = _ids.set(self)

    def __exit__(self, *error: object) -> None:
        _ids.reset(self._token)

    def count(self, owner: object) -> int:
        """Which call of ``owner`` in this block this is, from 1."""
        number = self.calls[id(owner)] = self.calls.get(id(owner), 0) + 1
        return number


class _Named(_Ids):
    """A block of the user's."""

    __slots__ = ()

    def __enter__(self) -> None:
        frame: Any = sys._getframe(1)
        while frame.f_code.co_filename == contextlib.__file__ and frame.f_back is not None:  # an ``ExitStack``
            frame = frame.f_back
        self._add(frame.f_locals.values(), depth=2)
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.there.clear()

    def _add(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                with contextlib.suppress(RuntimeError, NotImplementedError):  # sparse ones, and those of inference mode
                    self.there[dynamo.storage_of(value)] = (torch.Tensor.untyped_storage(value), value._version)
            elif depth and isinstance(value, (list, tuple, Mapping)) and len(value) <= MOST_IN_ONE:
                self._add(value.values() if isinstance(value, Mapping) else value, depth - 1)


_ids: ContextVar[_Ids | None] = ContextVar("torchcache_ids", default=None)
# In containers of more values nobody looks for a batch.
MOST_IN_ONE = 64
# Up to so many ids are encoded faster one by one than by several operations on an array.
FEW_IDS = 256


@contextlib.contextmanager
def bypass() -> Iterator[None]:
    """Compute everything and store nothing inside this block."""
    token = _bypass.set(True)
    try:
        yield
    finally:
        _bypass.reset(token)


def sample_keys(ids: Sequence[int] | Sequence[str] | torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Use ``ids`` instead of hashes of the inputs inside this block.

    Weights, code, arguments, row shapes and dtypes still count; the inputs' contents do not, so an id must name
    its sample's content (with augmentation: content and seed). It stands for the tensors that the function which has
    the block holds when it begins, in variables or in lists and dicts there. A mark that is given another one, which
    was computed within the block, hashes it, since layers that compute it may have changed. A module called twice in a
    block, on two views of the sample for instance, keeps rows of the first call and of the second apart: use one block
    for each step.

    Parameters
    ----------
    ids : sequence of int or str, or integer tensor of shape (B,)
        One id a row, in the batch's order.

    Raises
    ------
    SampleKeyError
        When an id is neither an integer of up to 127 bits nor a string, or when their number is not that of
        the rows of a marked call inside the block.
    """
    return _Named(_encode_ids(ids))


def _encode_ids(ids: Sequence[int] | Sequence[str] | torch.Tensor) -> list[bytes]:
    if isinstance(ids, torch.Tensor):
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise SampleKeyError(f"sample_keys takes a 1-D integer tensor, not {ids.dtype} of shape {tuple(ids.shape)}")
        if len(ids) > FEW_IDS and ids.dtype != torch.uint64:
            return _encode_integers(ids.numpy(force=True))
        ids = ids.tolist()
    if set(map(type, ids)) == {int}:
        with contextlib.suppress(OverflowError):
            if len(ids) > FEW_IDS:
                return _encode_integers(np.array(ids, dtype=np.int64))
            return [value.to_bytes(16, "big", signed=True) for value in cast(Sequence[int], ids)]
    return [_encode_id(position, value) for position, value in enumerate(ids)]


def _encode_integers(values: npt.NDArray[Any]) -> list[bytes]:
    """What ``_encode_id`` gives for each, all at once."""
    words = np.empty((len(values), 2), dtype=">i8")
    words[:, 1] = values
    words[:, 0] = values < 0
    np.negative(words[:, 0], out=words[:, 0])
    encoded: list[bytes] = words.view("V16").ravel().tolist()
    return encoded


def _encode_id(position: int, value: object) -> bytes:
    if isinstance(value, str):
        return hashlib.blake2b(b"id:" + value.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        try:
            return int(value).to_bytes(16, "big", signed=True)
        except OverflowError:
            pass
    raise SampleKeyError(f"sample_keys takes ints (up to 127 bits) and strings; id {position} is {value!r}")


def bypassed() -> bool:
    """Whether the caller asked for ``bypass``."""
    return _bypass.get()


def number_of_call(owner: object) -> int:
    """Which call of ``owner`` within a block with ids this is, from 1; 0 outside. To be asked once in every call."""
    given = _ids.get()
    return 0 if given is None else given.count(owner)


def was_there(tensor: torch.Tensor) -> bool:
    """Whether it shares memory with what was there when the block with ids began, and nobody wrote to it since."""
    given = _ids.get()
    try:
        _, version = given.there[dynamo.storage_of(tensor)] if given is not None else (None, -1)
        return version == tensor._version
    except (KeyError, RuntimeError, NotImplementedError):
        return False


def current_ids(rows: int, name: str) -> list[bytes] | None:
    """The ids given for this batch, if any were.

    Parameters
    ----------
    rows : int
        The batch size.
    name : str
        The region, for errors.
    """
    given = _ids.get()
    if given is None:
        return None
    if len(given.ids) != rows:
        raise SampleKeyError(f"sample_keys got {len(given.ids)} ids, but {name} is called with a batch of {rows} rows")
    return given.ids


def ids_given() -> bool:
    """Whether rows are known by ids inside this block."""
    return _ids.get() is not None


def some_ids(rows: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    """Within this block the ids, if any were given, are those of some rows of the batch."""
    given = _ids.get()
    return contextlib.nullcontext() if given is None else _Ids([given.ids[row] for row in rows])


def inside_region() -> bool:
    """Whether an original is being computed: marks inside it belong to the outer one."""
    return _computing.get()


class _Computing:
    """A block in which an original is computed."""

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = _computing.set(True)
        torch.clear_autocast_cache()  # casts of weights as they may not be any more

    def __exit__(self, *error: object) -> None:
        _computing.reset(self._token)


def computing() -> contextlib.AbstractContextManager[None]:
    """Compute an original: marks inside it are at rest."""
    return _Computing()


def normal_tensors() -> contextlib.AbstractContextManager[None]:
    """Leave inference mode: what is stored there would be of no use where gradients are taken."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


Watcher = Callable[[Any, Any], None]
_watcher: ContextVar[Watcher | None] = ContextVar("torchcache_watcher", default=None)


@contextlib.contextmanager
def watching_lookups(watcher: Watcher) -> Iterator[None]:
    """Show every lookup inside this block to ``watcher``: the region, and what its call found and did."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def current_watcher() -> Watcher | None:
    """Who is to be shown this lookup."""
    return _watcher.get()


Explainer = Callable[[Any, Any], Any]
_explainer: ContextVar[Explainer | None] = ContextVar("torchcache_explainer", default=None)


@contextlib.contextmanager
def explaining(explainer: Explainer) -> Iterator[None]:
    """Have ``explainer`` answer every marked call inside this block, given the region and the call as it was made."""
    token = _explainer.set(explainer)
    try:
        yield
    finally:
        _explainer.reset(token)


def current_explainer() -> Explainer | None:
    """Who answers marked calls instead of their regions."""
    return _explainer.get()
