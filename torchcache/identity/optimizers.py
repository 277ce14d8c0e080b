"""Steps of optimizers make the tensors that they hold suspect: fused ones write without moving a version."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from torchcache.errors import Bypass
from torchcache.identity.content import plain_tensors
from torchcache.identity.record import Record

_records: dict[int, weakref.ref[Record]] = {}


def suspect_after_steps(record: Record) -> None:
    """Have every step of any optimizer make what it writes suspect to ``record``, as long as the record lives.

    What counts is the memory: an optimizer that holds a flat buffer writes to all tensors that lie in it.
    """
    _install()
    key = id(record)
    _records[key] = weakref.ref(record)
    weakref.finalize(record, _records.pop, key, None).atexit = False


@functools.cache
def _install() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    records = [record for reference in list(_records.values()) if (record := reference()) is not None]
    if not records:
        return
    # What has no gradient is left alone: by torch's own optimizers always, by others where it is frozen.
    of_torch = type(optimizer).__module__.startswith("torch.optim.")
    written = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None or (parameter.requires_grad and not of_torch)
    ]
    addresses = {address for parameter in written for address in _storage_addresses(parameter)}
    for record in records:
        for address in addresses & record.by_storage.keys():
            record.suspect(record.by_storage[address])


def _storage_addresses(parameter: torch.Tensor) -> list[int]:
    if type(parameter) is nn.Parameter:
        return [parameter.untyped_storage().data_ptr()]
    try:
        return [plain.untyped_storage().data_ptr() for plain in plain_tensors([parameter])[0]]
    except (Bypass, RuntimeError, NotImplementedError):  # no state that is known by content lies in such a tensor
        return []
