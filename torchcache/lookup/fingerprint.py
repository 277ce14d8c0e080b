"""By whom: the fingerprint of a region, from its program and its state, and the cheap check that neither changed."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from torchcache.lookup.digest import digest_bytes, digest_tensor
from torchcache.lookup.encode import Encoder

__all__ = ["Program", "State"]


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
    paths : list of str
        Their paths.

    Raises
    ------
    FingerprintError
        When the subject holds something that has no identity.
    """

    def __init__(self, subject: Any, where: str) -> None:
        encoder = Encoder(where)
        encoder.value(subject)
        self.digest = encoder.digest()
        self.paths = [path for path, _ in encoder.tensors]
        self._tensors = [weakref.ref(tensor) for _, tensor in encoder.tensors]
        self._bindings = encoder.bindings
        self._live: list[Any] = []
        self._copies: list[Any] = []
        self._identities: list[tuple[Any, list[Any]]] = []
        self._arrays: list[tuple[Any, bytes]] = []
        for container in encoder.containers:
            self._watch(container)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor the subject holds; only to be read after ``unchanged``."""
        return [tensor for reference in self._tensors if (tensor := reference()) is not None]

    def unchanged(self) -> bool:
        """Whether no attribute, container or global that was read has changed since."""
        try:
            return (
                all(map(operator.eq, self._live, self._copies))
                and all(_same_items(container, values) for container, values in self._identities)
                and all(scope.get(name) is value for scope, name, value in self._bindings)
                and all(array.tobytes() == content for array, content in self._arrays)
            )
        except Exception:  # an exotic __eq__: look again rather than trust it
            return False

    def _watch(self, container: Any) -> None:
        if isinstance(container, np.ndarray):
            self._arrays.append((container, container.tobytes()))
            return
        values = list(container.values() if isinstance(container, Mapping) else container)
        if any(isinstance(value, torch.Tensor) for value in values):
            # Comparing tensors would compare elements: these must be the very same objects.
            self._identities.append((container, values))
        else:
            self._live.append(container)
            self._copies.append(container.copy())


def _same_items(container: Any, values: list[Any]) -> bool:
    live = container.values() if isinstance(container, Mapping) else container
    return len(live) == len(values) and all(map(operator.is_, live, values))


class State:
    """The contents of the tensors a region reads, hashed when they change and only then.

    A change is seen by the tensors' identities, storage pointers and version counters. Writes that bypass the
    version counter (through ``.data`` or a numpy view) are not.
    """

    def __init__(self) -> None:
        self._references: list[Callable[[], torch.Tensor | None]] = []
        self._pointers: list[int] = []
        self._versions: list[int] = []
        self.digest = b""

    def unchanged(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether ``tensors`` are those last hashed, untouched."""
        try:
            return (
                [tensor._version for tensor in tensors] == self._versions
                and [tensor.data_ptr() for tensor in tensors] == self._pointers
                and all(map(operator.is_, map(_call, self._references), tensors))
            )
        except RuntimeError:  # inference tensors have no version: hash them every time
            return False

    def update(self, tensors: Sequence[torch.Tensor]) -> bytes:
        """Hash what changed since the last time; 16 bytes over all tensors, in order."""
        self.digest = digest_bytes(b"".join(_content(tensor) for tensor in tensors))
        try:
            versions = [tensor._version for tensor in tensors]
        except RuntimeError:
            versions = [-1]
        self._versions = versions
        self._pointers = [tensor.data_ptr() for tensor in tensors]
        self._references = [weakref.ref(tensor) for tensor in tensors]
        return self.digest


_contents: dict[int, tuple[Callable[[], torch.Tensor | None], int, int, bytes]] = {}


def content_digest(tensor: torch.Tensor) -> bytes:
    """Digest of a tensor's dtype, shape and elements, remembered as long as the tensor is untouched."""
    return _content(tensor)


def _content(tensor: torch.Tensor) -> bytes:
    known = _contents.get(id(tensor))
    try:
        version = tensor._version
    except RuntimeError:
        version = -1
    if known is not None and known[0]() is tensor and version != -1 and known[1:3] == (tensor.data_ptr(), version):
        return known[3]
    described = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    digest = digest_bytes(described + digest_tensor(tensor))
    key = id(tensor)
    _contents[key] = (weakref.ref(tensor, lambda _: _contents.pop(key, None)), tensor.data_ptr(), version, digest)
    return digest


def _call(reference: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
    return reference()
