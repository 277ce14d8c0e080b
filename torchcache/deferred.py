"""A module that is built when it is needed first."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from torchcache import dynamo
from torchcache.checks.chance import generators_kept
from torchcache.errors import MarkError

__all__ = ["Deferred"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# One module is built at a time: building may take most of a machine's memory.
_building = threading.RLock()


class Deferred(nn.Module):
    """Stands for a module that ``build`` makes. ``torchcache.deferred`` makes one, and marks it.

    What is built is no submodule: checkpoints are the same whether it was built or not, and optimizers see nothing of
    it. It is frozen and in eval mode. ``.to``, ``.half`` and the like have it go to that device and dtype; nothing else
    that is done to all parameters of a model reaches it.

    Parameters
    ----------
    make : callable
        Makes an ``nn.Module``, or a method of one.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self._make = make
        self._made: list[Callable[..., Any]] = []
        # What was done to all tensors of the model around it shows in these.
        self._probes = [torch.empty(0, dtype=dtype, device="cpu") for dtype in _DTYPES]

    @property
    def built(self) -> bool:
        """Whether the module is there."""
        return bool(self._made)

    @property
    def module(self) -> nn.Module | None:
        """The module, without building it; ``None`` before it is built."""
        made = self._made[0] if self._made else None
        return made.__self__ if isinstance(made, types.MethodType) else made  # type: ignore[return-value]

    @property
    def casts(self) -> str:
        """Which floating dtypes were cast to which others: a part of who computes."""
        pairs = zip(_DTYPES, self._probes, strict=True)
        return ", ".join(f"{dtype} to {probe.dtype}" for dtype, probe in pairs if probe.dtype != dtype)

    @dynamo.untraced
    def build(self) -> Any:
        """What ``build`` made, which is called now if it was not before.

        Returns
        -------
        nn.Module or method
            Frozen, in eval mode, and where the model around it was moved to.

        Raises
        ------
        MarkError
            When it made neither a module nor a method of one.
        """
        if not self._made:
            with _building:
                if not self._made:
                    self._build()
        return self._made[0]

    def _build(self) -> None:
        with dynamo.no_modes(), torch.inference_mode(False), generators_kept():
            made = self._make()
        module = made.__self__ if isinstance(made, types.MethodType) else made
        if not isinstance(module, nn.Module):
            raise MarkError(
                f"torchcache.deferred: what build returns is a {type(made).__name__}: let it return an nn.Module, or a "
                "method of one"
            )
        _move(module.requires_grad_(False).eval(), self._probes)
        self._made.append(made)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.build()(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Deferred:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._probes = [fn(probe) for probe in self._probes]
        if self.module is not None:
            _move(self.module, self._probes)
        return self

    def extra_repr(self) -> str:
        """Its name, and whether it is there."""
        return "built" if self._made else "not built"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            self._lacks(error)

    def _lacks(self, error: AttributeError) -> NoReturn:
        raise AttributeError(f"{error}; what it stands for may have it: .build() returns that") from None


def _move(module: nn.Module, probes: list[torch.Tensor]) -> None:
    """Have ``module`` go where the probes went, which began in host memory."""
    casts = {dtype: probe.dtype for dtype, probe in zip(_DTYPES, probes, strict=True)}
    device = probes[0].device
    moved = device.type not in ("cpu", "meta")
    if not moved and all(dtype == cast for dtype, cast in casts.items()):
        return

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device if moved else tensor.device, casts.get(tensor.dtype, tensor.dtype))

    with torch.no_grad():
        module._apply(there)  # type: ignore[no-untyped-call]
