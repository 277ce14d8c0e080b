"""The ambient settings that change what the same program computes."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from torchcache import dynamo

# Switches of float32 precision, by backend and operation.
_PRECISIONS = {
    "cpu": ("mkldnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"),
    "cuda": ("cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn"),
}


def _readers(backends: tuple[str, ...]) -> list[Callable[[Any], Any]]:
    """What reads the switches that this release of torch has."""
    found: list[Callable[[Any], Any]] = []
    for path in ("fp32_precision", *(f"{backend}.fp32_precision" for backend in backends)):
        read = operator.attrgetter(path)
        with contextlib.suppress(AttributeError, RuntimeError):
            read(torch.backends)
            found.append(read)
    return found


# As variables: the compiler of Python multiplies constants itself.
_SMALLEST, _ONE = 5e-324, 1.0


def _kinds() -> list[str]:
    """Device types that have autocast in this release of torch."""
    found = []
    for kind in ("cpu", "cuda", "mps", "xpu"):
        with contextlib.suppress(RuntimeError):
            torch.is_autocast_enabled(kind)
            found.append(kind)
    return found


_KINDS = _kinds()
_read = {device: _readers(backends) for device, backends in _PRECISIONS.items()}


class NumericMode(NamedTuple):
    """The numeric mode of a call.

    Parameters
    ----------
    device : str
        Device type, without an index.
    autocast : torch.dtype or None
        The autocast dtype on this device, ``None`` where autocast is off.
    autocasts : tuple of (str, torch.dtype)
        Device types on which autocast is on: a forward may compute elsewhere than where its arguments are.
    dtypes : tuple of torch.dtype
        What autocast casts to by device type, on or off: a forward may turn it on itself.
    default : torch.dtype
        ``torch.get_default_dtype()``.
    made_on : str
        Type of ``torch.get_default_device()``, where tensors are made.
    deterministic : bool
        ``torch.are_deterministic_algorithms_enabled()``.
    gradients : bool or None
        Whether gradients are recorded, where the program asks that; else ``None``.
    fastpath : bool
        ``torch.backends.mha.get_fastpath_enabled()``: what attention puts where a mask leaves nothing.
    precisions : tuple of str
        What float32 products may be rounded to, by backend and operation.
    flushes : bool
        ``torch.set_flush_denormal``, whether the smallest numbers are taken for zero.
    """

    device: str
    autocast: torch.dtype | None
    autocasts: tuple[tuple[str, torch.dtype], ...]
    dtypes: tuple[torch.dtype, ...]
    default: torch.dtype
    made_on: str
    deterministic: bool
    gradients: bool | None
    fastpath: bool
    precisions: tuple[Any, ...]
    flushes: bool

    @classmethod
    def current(cls, device: str, gradients: bool | None = None) -> NumericMode:
        """The mode in force on this thread for ``device``."""
        return cls(
            device,
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            autocasts(),
            tuple(map(torch.get_autocast_dtype, _KINDS)),
            torch.get_default_dtype(),
            dynamo.default_device(),
            torch.are_deterministic_algorithms_enabled(),
            gradients,
            torch.backends.mha.get_fastpath_enabled(),
            _precisions(device),
            _SMALLEST * _ONE == 0.0,
        )


def autocasts() -> tuple[tuple[str, torch.dtype], ...]:
    """Device types on which autocast is on, on this thread, each with its dtype."""
    return tuple([(kind, torch.get_autocast_dtype(kind)) for kind in _KINDS if torch.is_autocast_enabled(kind)])


def _precisions(device: str) -> tuple[Any, ...]:
    read = _read.get(device)
    if read:
        return tuple([switch(torch.backends) for switch in read])
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
