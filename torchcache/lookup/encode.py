"""Python values, modules and code as canonical bytes: equal bytes mean the same program.

The encoding is structural: no ``id``, no address, no hash order. Code of the user's own is followed through
everything it names (helper functions, classes, constants, attributes of modules); code of an installed package
or of the standard library is identified by its name, its own bytecode and the package's version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from typing import Any

import torch
from torch import nn

from torchcache.errors import FingerprintError
from torchcache.lookup.code_parts import parts_of_code
from torchcache.lookup.digest import digest_tensor
from torchcache.lookup.module_parts import parts_of_global_hooks, parts_of_module
from torchcache.lookup.parts import ATOMS, NoIdentityError, Parts, atom, parts_of_tensor, parts_of_value
from torchcache.lookup.watch import Watch

__all__ = ["Encoder"]


class Encoder:
    """Feeds a hash with canonical bytes, and notes what it met on the way.

    Parameters
    ----------
    where : str
        Path of what is encoded, for errors.

    Attributes
    ----------
    tensors : list of (str, torch.Tensor)
        Every tensor met, with its path, in order. Their contents are not part of the bytes.
    watch : Watch
        Everything else that was read and may change.
    """

    def __init__(self, where: str = "") -> None:
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.watch = Watch()
        self._hash = hashlib.blake2b(digest_size=16)
        self._where = where
        self._known: dict[int, bytes] = {}
        self._kept: list[Any] = []

    def digest(self) -> bytes:
        """16 bytes over everything encoded so far."""
        return self._hash.digest()

    def value(self, value: Any) -> None:
        """Encode any value.

        Raises
        ------
        FingerprintError
            For what has no identity that can be computed; the message names its path.
        """
        self._run(iter((("", value),)))

    def met(self, identity: int) -> bool:
        """Whether the object with this ``id`` is among what was encoded."""
        return identity in self._known

    def global_hooks(self) -> None:
        """Encode the hooks that run with every module's forward, if there are any."""
        self._run(parts_of_global_hooks(self))

    @staticmethod
    def alone(value: Any) -> bytes:
        """Everything about ``value`` by itself, contents of tensors included, as bytes."""
        encoder = Encoder()
        encoder.value(value)
        return encoder.digest() + b"".join(digest_tensor(tensor) for _, tensor in encoder.tensors)

    def _run(self, parts: Parts) -> None:
        """Encode parts; a stack of its own lets values nest as deeply as they like.

        A compound value becomes one digest, so that sharing it or repeating it looks the same.
        """
        frames = [_Frame("", None, parts, self._hash)]
        depths: dict[int, int] = {}
        while frames:
            frame = frames[-1]
            try:
                part = next(frame.parts, None)
            except NoIdentityError:
                kind = type(frame.value)
                raise FingerprintError(
                    f"{self._path(frames)} holds a {kind.__module__}.{kind.__qualname__}, whose content cannot be "
                    "part of a key: remove it, or name the program yourself with persistent_module_hash"
                ) from None
            if part is None:
                frames.pop()
                if frames:
                    digest = self._known[id(frame.value)] = frame.hash.digest()
                    self._kept.append(frame.value)
                    del depths[id(frame.value)]
                    frames[-1].put(digest)
            elif not isinstance(part, tuple):
                frame.put(part)
            elif type(part[1]) in ATOMS:
                frame.put(*atom(part[1]))
            elif id(part[1]) in self._known:
                frame.put(self._known[id(part[1])])
            elif id(part[1]) in depths:
                frame.put("cycle", str(len(depths) - depths[id(part[1])]))
            else:
                name, value = part
                depths[id(value)] = len(depths)
                frames.append(_Frame(name, value, self._parts(value), hashlib.blake2b(digest_size=16)))
                if isinstance(value, torch.Tensor):
                    frames[-1].put("tensor", str(self._note(value, frames)))

    def _parts(self, value: Any) -> Parts:
        if isinstance(value, torch.Tensor):
            return parts_of_tensor(value, self)
        if isinstance(value, nn.Module):
            return parts_of_module(value, self)
        return parts_of_code(value, self) or parts_of_value(value, self)

    def _note(self, tensor: torch.Tensor, frames: list[_Frame]) -> int:
        """The number of a tensor that was not met before."""
        path = self._path(frames)
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise FingerprintError(f"{path} is not initialised yet: run one batch through the module first")
        self.tensors.append((path, tensor))
        return len(self.tensors)

    def _path(self, frames: list[_Frame]) -> str:
        names = [self._where, *(frame.name for frame in frames)]
        return ".".join(name for name in names if name) or "the program"


@dataclasses.dataclass
class _Frame:
    """A value that is being encoded."""

    name: str
    value: Any
    parts: Parts
    hash: Any

    def put(self, *parts: str | bytes) -> None:
        for part in parts:
            data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            self.hash.update(struct.pack("<Q", len(data)))
            self.hash.update(data)
