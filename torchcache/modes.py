"""Which parts of a marked module stay in eval mode: subtrees whose weights are frozen, without what learns there."""

from __future__ import annotations

import inspect
import itertools
import re
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from torchcache.identity.homes import beneath, beneath_class
from torchcache.identity.per_class import once_per_class
from torchcache.identity.reader import reads_of
from torchcache.logging import warn_once
from torchcache.trainable import is_frozen

# Marked modules that were last asked to be in train mode.
_asked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# By marked module: its parts that would be in train mode, were they not frozen.
_held: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()
# Marked modules whose next call is to say what stays in eval mode.
_untold: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Names of operators that write to a tensor.
_IN_PLACE = re.compile(r"[a-z]\w*_").fullmatch
_DROPOUTS = (nn.modules.dropout._DropoutNd, nn.RReLU)


def settle(module: nn.Module, asked: bool = False) -> None:
    """Put ``module`` in eval mode if it is frozen, else those of its subtrees that hold frozen parameters only.

    What has no weights, such as a dropout beside trainable layers or a random crop, keeps its mode. So does what is in
    train mode within a part that is not, unless a mode was ``asked`` for: it was put there on its own.
    """
    roots = [root for root in _staying(module) if asked or (module.training and root.training)]
    changed = [part for root in roots for part in _not_learning(root) if part.training]
    for part in changed:  # only where needed: a write costs those who watch the module a closer look
        part.training = False
    if changed:
        _held.setdefault(module, weakref.WeakSet()).update(changed)
        _untold.add(module)


def tell_of_eval(module: nn.Module) -> None:
    """Say once, in a call, what stays in eval mode and may compute something else in train mode.

    Whoever asks for train mode may ask for eval mode of what is frozen before that.
    """
    if module not in _untold:
        return
    _untold.discard(module)
    kinds = _acting_in_training(part for part in held(module) if not part.training)
    if kinds:
        name = type(module).__name__
        what = (
            f"{name} is frozen and cached, so it" if is_frozen(module) else f"what is frozen of {name} is cached, and"
        )
        warn_once(
            f"{what} stays in eval mode, also under model.train(): its {', '.join(kinds)} may act otherwise in train "
            "mode"
        )


def differs_in_training(module: nn.Module) -> list[str]:
    """The kinds of parts that stay in eval mode and would compute something else in train mode."""
    return _acting_in_training(_kept_in_eval(module))


def train(module: nn.Module, original: Callable[..., Any], mode: bool, kept: bool) -> nn.Module:
    """``module.train(mode)``, frozen parts of marked modules left in eval mode.

    Parameters
    ----------
    module : nn.Module
        The module.
    original : callable
        The ``train`` of its class.
    mode : bool
        What was asked for.
    kept : bool
        Whether a mark on it is enabled.
    """
    if mode and module not in _asked:
        _untold.add(module)
    elif not mode:
        _untold.discard(module)
    (_asked.add if mode else _asked.discard)(module)
    # Trainers call this in every step; a round trip through train mode would be a write to every part.
    if not (kept and _stays(module) and all(map(_is_flagged, module.modules()))):
        original(module, mode)
        _held.pop(module, None)
    elif mode:
        _held[module] = weakref.WeakSet(module.modules())
    else:
        _held.pop(module, None)
    if kept:
        settle(module, asked=True)
    return module


def _kept_in_eval(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a marked module that stay in eval mode; not what learns in train mode without a gradient."""
    return itertools.chain.from_iterable(map(_not_learning, _staying(module)))


def _not_learning(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if not _learns(part))


def _staying(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of a marked module of which all stays in eval mode."""
    if _stays(module):
        yield module
        return
    for child in module.children():
        if next(child.parameters(), None) is not None:
            yield from _staying(child)


def _stays(module: nn.Module) -> bool:
    """Whether all of a marked module stays in eval mode: it has weights, and they are frozen."""
    return is_frozen(module) and any(True for _ in itertools.chain(module.parameters(), module.buffers()))


def held(module: nn.Module) -> list[nn.Module]:
    """The parts of a marked module that would be in train mode, were they not frozen."""
    return list(_held.get(module, ()))


def hold(module: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Have ``parts`` be those that were ``held`` before something else set modes back that it had taken down."""
    _held[module] = weakref.WeakSet(parts)


def resume(module: nn.Module | None) -> bool:
    """Put parts in train mode that stayed in eval mode, and are not frozen any more.

    Returns
    -------
    bool
        Whether there was any.
    """
    parts = _held.get(module) if module is not None else None
    if module is None or not parts:
        return False
    tell_of_eval(module)
    if _stays(module):
        return False
    kept = set(_kept_in_eval(module))
    found = [part for part in parts if part not in kept]
    for part in found:
        part.training = True
        parts.discard(part)
    kinds = _acting_in_training(found)
    if kinds:
        warn_once(
            f"what was unfrozen of {type(module).__name__} is in train mode, as train() asked: call eval() on what of "
            f"its {', '.join(kinds)} is to stay in eval mode"
        )
    return bool(found)


def estimate(module: nn.Module | None) -> bool:
    """Put each BatchNorm in train mode whose statistics are to be taken anew, where train mode was asked for.

    ``torch.optim.swa_utils.update_bn`` resets them, asks for train mode, and then sets the momentum to ``None``.

    Returns
    -------
    bool
        Whether there was any.
    """
    if module is None or module not in _asked:
        return False
    found = [part for part in module.modules() if not part.training and _is_estimated(part)]
    for part in found:
        part.training = True
    return bool(found)


def _is_estimated(part: nn.Module) -> bool:
    if not isinstance(part, nn.modules.batchnorm._BatchNorm) or part.momentum is not None:
        return False
    return part.num_batches_tracked is not None and not part.num_batches_tracked.any()


def _acting_in_training(parts: Iterable[nn.Module]) -> list[str]:
    return sorted({type(part).__name__ for part in parts if _acts_in_training(part)})


def _acts_in_training(part: nn.Module) -> bool:
    """Whether train mode may change what this part computes: torch's own tell, and others that ask for it."""
    if isinstance(part, _DROPOUTS):
        return bool(getattr(part, "p", 1.0))
    if isinstance(part, nn.MultiheadAttention):
        return bool(part.dropout)
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    if _normalises(part) or any(map(_reads_mode, hooks)):
        return True
    kind = beneath_class(type(part))
    return (_drops(part) or _is_of_torch(kind)) and _of_forward(kind)[0]


def _drops(part: nn.Module) -> bool:
    """Whether a part has a rate that is not zero: many ask for the mode to hand one on, or to recompute in backward."""
    return any(value for name, value in vars(part).items() if "drop" in name and isinstance(value, (int, float)))


def _normalises(part: nn.Module) -> bool:
    """Whether a part takes statistics of batches in train mode, as BatchNorm does."""
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        return True
    return "running_var" in part._buffers and _of_forward(beneath_class(type(part)))[0]


def _learns(part: nn.Module) -> bool:
    """Whether a part keeps what it sees in train mode: a codebook of averages, a queue, statistics of a data set.

    Nobody expects that to end where it is frozen, which is no more than to say that it learns without a gradient.
    """
    kind = beneath_class(type(part))
    asks, sets, writes = _of_forward(kind)
    if not asks or _normalises(part) or _drops(part) or _is_of_torch(kind):
        return False
    held = [vars(part).get(name, part._buffers.get(name)) for name in sets]
    return (writes and bool(part._buffers)) or any(isinstance(value, torch.Tensor) for value in held)


@once_per_class
def _of_forward(kind: type[nn.Module]) -> tuple[bool, frozenset[str], bool]:
    """Whether forward, with methods beside it that it names, asks for the mode, what it sets, if it writes in place."""
    names: set[str] = set()
    sets: set[str] = set()
    home = next(place for place, base in enumerate(kind.__mro__) if "forward" in vars(base))
    beside = set().union(*map(vars, kind.__mro__[: home + 1]))
    methods = ["forward"]
    for name in methods:
        member = inspect.getattr_static(kind, name)
        function = inspect.unwrap(beneath(getattr(member, "__func__", member)))
        if not isinstance(function, types.FunctionType) or str(function.__module__).startswith("torch.nn.modules."):
            continue
        reads = reads_of(function.__code__)
        names |= reads.names
        sets |= reads.written
        methods += sorted(reads.names.intersection(beside).difference(methods))
    return "training" in names, frozenset(sets), any(map(_IN_PLACE, names))


def _reads_mode(function: Any) -> bool:
    """Whether code reads ``training``: that of a function, or of what is called as one."""
    function = beneath(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code is not None and "training" in code.co_names


def _is_of_torch(kind: type) -> bool:
    return str(kind.__module__).partition(".")[0] == "torch"


def _is_flagged(module: nn.Module) -> bool:
    """Whether ``train`` of this module sets its flag and does nothing else, and the flag may stay as it is."""
    if _learns(module):
        return False
    own = type(module).train
    original = getattr(own, "torchcache_function", own)
    return original is nn.Module.train and "train" not in vars(module)
