"""By whom: the fingerprint of a region, from its program and its state, and the cheap check that neither changed."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from torchcache.lookup.digest import digest_bytes, digest_tensor
from torchcache.lookup.encode import Encoder
from torchcache.lookup.stamps import Looks

__all__ = ["Program", "State", "content_digest", "program_of"]


# A program that is replaced so often by an equal one is not worth looking at in every call.
FALSE_ALARMS = 16


class Program:
    """Code and plain attributes of a module tree or a function.

    Parameters
    ----------
    subject : nn.Module or function
        Whose program.
    where : str
        Its path, for errors.

    Attributes
    ----------
    digest : bytes
        16 bytes of identity, without the contents of tensors.
    tensors : list of torch.Tensor
        Every tensor the subject holds, in the order met: parameters, buffers, plain attributes, globals.
    alarms : int
        How often the program was looked at again and found equal.

    Raises
    ------
    FingerprintError
        When the subject holds something that has no identity.
    """

    def __init__(self, subject: Any, where: str) -> None:
        encoder = Encoder(where)
        encoder.global_hooks()
        encoder.value(subject)
        self.digest = encoder.digest()
        self._tensors = [weakref.ref(tensor) for _, tensor in encoder.tensors]
        self._watch = encoder.watch
        self.alarms = 0

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor the subject holds; only to be read after ``unchanged``."""
        return [tensor for reference in self._tensors if (tensor := reference()) is not None]

    def at(self, place: int) -> torch.Tensor:
        """The tensor at ``place``; programs with equal digests hold theirs at equal places."""
        return cast(torch.Tensor, self._tensors[place]())

    @property
    def watched(self) -> bool:
        """Whether ``program_of`` looks for changes in every call."""
        return self.alarms <= FALSE_ALARMS

    def unchanged(self) -> bool:
        """Whether no attribute, container, class, function or global that was read has changed since."""
        return self._watch.unchanged()


class _Programs(dict[Any, Program]):
    """Programs kept in the ``__dict__`` of what they describe, to die with it; copies start empty."""

    def __reduce__(self) -> tuple[type[_Programs], tuple[()]]:
        return _Programs, ()


def program_of(module: nn.Module | None, function: Any, where: str) -> Program:
    """The program of a marked call as it is now, looked at again only if something changed.

    Parameters
    ----------
    module : nn.Module or None
        The marked module; ``None`` for a function.
    function : callable
        The original that the mark stands for.
    where : str
        Its path, for errors.

    Raises
    ------
    FingerprintError
        When it holds something that has no identity.
    """
    subject = function if module is None else (module, function)
    programs = vars(function if module is None else module).setdefault("_torchcache_programs", _Programs())
    known = programs.get(function)
    if known is not None and (not known.watched or known.unchanged()):
        return cast(Program, known)
    fresh = Program(subject, where)
    if known is not None and fresh.digest == known.digest:
        fresh.alarms = known.alarms + 1
    programs[function] = fresh
    return fresh


class State:
    """The contents of the tensors a region reads, hashed when they change and only then.

    A change is seen by the tensors' identities, storages, pointers, shapes, strides, dtypes and version counters.
    Writes that bypass the version counter (into ``.data`` in place, or through a numpy view) are not.

    Parameters
    ----------
    guarded : bool
        Whether the caller knows that types, shapes and strides are those of the last time, as Dynamo's guards say.
    """

    def __init__(self, guarded: bool = False) -> None:
        self._guarded = guarded
        self._identities: list[int] = []
        self._references: list[Any] = []
        self._gone: list[Any] = []
        self._pointers: list[int] = []
        self._versions: list[int] = []
        self._looks: Looks | None = None
        self.digest = b""

    def unchanged(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether ``tensors`` are those last hashed, untouched."""
        try:
            return (
                list(map(_version, tensors)) == self._versions
                and list(map(torch.Tensor.data_ptr, tensors)) == self._pointers
                and list(map(id, tensors)) == self._identities
                # As long as tensors and storages live, nothing else has their identities and addresses.
                and not self._gone
                and (self._looks is None or self._looks.hold(tensors))
            )
        except RuntimeError:  # inference tensors have no version: hash them every time
            return False

    def update(self, tensors: Sequence[torch.Tensor]) -> bytes:
        """Hash what changed since the last time; 16 bytes over all tensors, in order."""
        gone: list[Any] = []
        held = [*tensors, *(tensor.untyped_storage() for tensor in tensors)]
        self._gone, self._references = gone, [weakref.ref(part, gone.append) for part in held]
        try:
            versions = list(map(_version, tensors))
        except RuntimeError:
            versions = [-1]
        self._versions = versions
        self._pointers = list(map(torch.Tensor.data_ptr, tensors))
        self._identities = list(map(id, tensors))
        self._looks = None if self._guarded else Looks(tensors)
        self.digest = digest_bytes(b"".join(_content(tensor) for tensor in tensors))
        return self.digest


_version = operator.attrgetter("_version")
_expired: Callable[[int], bool] = cast(Any, torch.UntypedStorage._expired)


def _weak_storage(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


_Known = tuple[Callable[[], torch.Tensor | None], StorageWeakRef, tuple[Any, ...], bytes]
_contents: dict[int, _Known] = {}


def content_digest(tensor: torch.Tensor) -> bytes:
    """Digest of a tensor's dtype, shape and elements, remembered as long as the tensor is untouched."""
    return _content(tensor)


def _content(tensor: torch.Tensor) -> bytes:
    known = _contents.get(id(tensor))
    try:
        version = tensor._version
    except RuntimeError:
        version = -1
    found = (version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    if (
        known is not None
        and known[0]() is tensor
        and version != -1
        and known[2] == found
        and not _expired(known[1].cdata)
    ):
        return known[3]
    described = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    digest = digest_bytes(described + digest_tensor(tensor))
    key = id(tensor)
    storage = _weak_storage(tensor)
    _contents[key] = (weakref.ref(tensor, lambda _: _contents.pop(key, None)), storage, found, digest)
    return digest
