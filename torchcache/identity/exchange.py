"""What exchanges data with other processes while it runs: served rows of one would leave the others waiting."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed, nn

ADVICE = "leave the marked module unsharded, or shard it as a whole and name it yourself with persistent_module_hash"


def exchange(modules: Iterable[tuple[str, nn.Module]], root: nn.Module | None) -> str:
    """Why a call that runs these modules needs other processes; empty where it does not.

    Parameters
    ----------
    modules : iterable of (str, nn.Module)
        What it runs, by path.
    root : nn.Module or None
        The marked module: FSDP2 gathers the parameters of that one around a call, and not in it.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return ""
    wrappers = (nn.parallel.DistributedDataParallel, *_loaded("torch.distributed.fsdp", "FullyShardedDataParallel"))
    spread = _loaded("torch.distributed.tensor", "DTensor")
    for path, module in modules:
        held: list[torch.Tensor] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if (
            isinstance(module, wrappers)
            or (module is not root and is_sharded(module))
            or any(isinstance(tensor, spread) for tensor in held)
        ):
            return f"{path or 'its forward'} exchanges data with other processes, which must all take part"
    return ""


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called with a module: but in its forward, a process has a part of its parameters."""
    return isinstance(module, _loaded("torch.distributed.fsdp", "FSDPModule"))


def _loaded(module: str, name: str) -> tuple[Any, ...]:
    """A class of torch, in a tuple, if its module is loaded: nothing can be of it otherwise."""
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)
