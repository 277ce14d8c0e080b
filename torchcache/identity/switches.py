"""Switches of torch that code asks for by name: what they say is a part of its program."""

from __future__ import annotations

import types
from typing import Any

import torch

from torchcache.identity.node import Check, Node, Space

# Functions without arguments. Those that are left out are in every call's numeric mode, or say what a machine has.
_NAMES = {
    torch: "get_num_threads get_num_interop_threads is_anomaly_enabled is_anomaly_check_nan_enabled initial_seed "
    "get_deterministic_debug_mode is_deterministic_algorithms_warn_only_enabled is_warn_always_enabled "
    "get_float32_matmul_precision is_autocast_cache_enabled",
    torch.backends.cuda: "flash_sdp_enabled mem_efficient_sdp_enabled math_sdp_enabled cudnn_sdp_enabled "
    "fp16_bf16_reduction_math_sdp_allowed",
    torch.distributed: "is_initialized get_rank get_world_size get_backend",
}
_ASKED = [getattr(home, name, None) for home, names in _NAMES.items() for name in names.split()]

# Functions that give the state of a random generator: what is computed of it is another in every call.
_RANDOM = (torch.get_rng_state, torch.cuda.get_rng_state, torch.cuda.get_rng_state_all)


class Switch:
    """An attribute of a module of ``torch.backends`` that code answers.

    Parameters
    ----------
    module : module
        Where it is.
    name : str
        Its name.
    """

    def __init__(self, module: types.ModuleType, name: str) -> None:
        self._module, self._name = module, name

    def says(self) -> str:
        """How it is set, as text."""
        return repr(getattr(self._module, self._name, None))


def describe_switch(value: Switch) -> Node:
    """The node of a switch, by how it is set."""
    return Node(value, ("switch", value.says()), checks=[Check("content", value, read=Switch.says)])


def switches_of(module: types.ModuleType) -> list[Space]:
    """The switches of a module as a namespace, and the functions that tell of some: code may hold the module itself."""
    kinds = type(module).__mro__[: -len(types.ModuleType.__mro__)]
    names = [name for kind in kinds for name, held in vars(kind).items() if hasattr(type(held), "__set__")]
    held: dict[str, Any] = {name: Switch(module, name) for name in names if not name.startswith("__")}
    held |= {name: getattr(module, name, None) for name in _NAMES.get(module, "").split()}
    return [Space("global", held, held)] if held else []


def _answer(ask: Any) -> str:
    """What a function says, as text; of which process group, only where there is one."""
    try:
        return repr(ask())
    except (RuntimeError, ValueError) as error:
        return type(error).__name__


def add_answer(node: Node, function: Any) -> Node:
    """Add to the node of a named function what it says, where it is one that is asked for a switch."""
    if any(function is asked for asked in _ASKED):
        node.head += (_answer(function),)
        node.checks.append(Check("content", function, read=_answer))
    elif any(function is random for random in _RANDOM):
        node.problem = "reads the state of a random generator"
    return node
