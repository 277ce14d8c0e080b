"""Tensors that are not loaded where a graph is traced or runs: operators that find rows by their names."""

from __future__ import annotations

from typing import Any

import torch

from torchcache import dynamo
from torchcache.lazy.rows import Held, Kind, held_of
from torchcache.lazy.tensor import LazyTensor

__all__: list[str] = []

_library = torch.library.Library("torchcache", "FRAGMENT")  # type: ignore[no-untyped-call]
for _operator in ("load", "unloaded"):
    _library.define(  # type: ignore[no-untyped-call]
        f"{_operator}(Tensor token, SymInt[] shape, ScalarType dtype, Device device, bool single) -> Tensor",
        tags=dynamo.OPAQUE_TAGS,
    )
_library.define("store(Tensor token, Tensor value, bool single) -> Tensor", tags=dynamo.OPAQUE_TAGS)  # type: ignore[no-untyped-call]


def _find(token: torch.Tensor) -> tuple[Held, list[int]]:
    pairs = token.tolist()
    held = {number: held_of(number) for number in dict.fromkeys(number for number, _ in pairs)}
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
        held = Held([held.rows[place] for place in places], held.kind, device, held.pinned)
    return LazyTensor(held, range(len(places)), Kind(dtype, tuple(shape)), device, single=single)


@torch.library.impl(_library, "store", "CompositeExplicitAutograd")
def _store(token: torch.Tensor, value: torch.Tensor, single: bool) -> torch.Tensor:
    held, places = _find(token)
    whole = held.load()
    if single:
        whole[places[0]].copy_(value)
    else:
        whole[places] = value
    return token.clone()


def _fake(
    token: torch.Tensor, shape: list[Any], dtype: torch.dtype, device: torch.device, single: bool
) -> torch.Tensor:
    return torch.empty(shape if single else [token.shape[0], *shape], dtype=dtype, device=device)


def _fake_store(token: torch.Tensor, value: torch.Tensor, single: bool) -> torch.Tensor:
    return token.clone()


torch.library.register_fake("torchcache::store", _fake_store, lib=_library)
torch.library.register_fake("torchcache::load", _fake, lib=_library)
torch.library.register_fake("torchcache::unloaded", _fake, lib=_library)
