"""PyTorch's own table of modules with inputs: each answers cached as it does uncached, or is refused at first."""

import copy

import pytest
import torch
from pair import compare
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils import _pytree as pytree

import torchcache
from torchcache import torchcache_backend

pytest.importorskip("expecttest")
from torch.testing._internal.common_modules import module_db

DOORS = ("call", "transform", "compile", "backend")
MOST_INPUTS = 40
# Modules that are tried through every door in each run of the suite; the others are slow.
FEW = ("Linear", "Conv2d", "BatchNorm2d", "LayerNorm", "MultiheadAttention", "TransformerEncoderLayer", "LSTM", "GRU")
FEW_INPUTS = 3
# Rows depend on each other by what these are: sequence first, a softmax over dim 0, statistics of the batch.
REFUSED = ("BatchNorm", "Softmax2d", "Transformer")


class Holder(nn.Module):
    """A model around the module that is marked."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, *args, **kwargs):
        return self.body(*args, **kwargs)


def constructed(info, most):
    """Modules of this entry, frozen, each with the arguments of a call."""
    given = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=False)
    for entry in given[:most]:
        if entry.forward_input is None:
            continue
        torch.manual_seed(0)
        made = entry.constructor_input
        module = info.module_cls(*made.args, **made.kwargs).eval()
        if not isinstance(module, LazyModuleMixin):  # their parameters are there from the first call on
            module.requires_grad_(False)
        yield entry, module, (tuple(entry.forward_input.args), dict(entry.forward_input.kwargs))


def picked(call):
    """The call with its rows in another order and one of them left out, by the longest first dimension."""
    leaves, spec = pytree.tree_flatten(call)
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
    if not sizes or sizes[0] < 2:
        return None
    rows = [*range(sizes[0] - 1, 0, -1)]
    return pytree.tree_unflatten([leaf[rows] if takes(leaf, sizes[0]) else leaf for leaf in leaves], spec)


def takes(leaf, size):
    return isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == size


def own(call):
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, call)


def opened(door, module):
    """The module, marked, as a user runs it through this door."""
    torchcache.mark(module)
    if door == "transform":
        return torchcache.transform(Holder(module))
    if door == "compile":
        return torch.compile(Holder(module), backend="eager")
    if door == "backend":
        return torch.compile(Holder(module), backend=torchcache_backend, options={"inner": "eager"})
    return module


def answer(run, call, lazy=False):
    """What a call returns, or the error that it raises."""
    args, kwargs = own(call)
    torch.manual_seed(1)
    try:
        with torch.set_grad_enabled(not lazy):
            return run(*args, **kwargs), None
    except Exception as error:
        return None, error


def endure(module, call, door):
    """Three calls of a marked module and of its twin; whether it was refused, and its statistics."""
    twin = copy.deepcopy(module)
    run = opened(door, module)
    other = picked(call)
    lazy = isinstance(module, LazyModuleMixin)
    for number, given in enumerate([call, call] + ([other] if other is not None else [])):
        expected, failed = answer(twin, given, lazy)
        found, error = answer(run, given, lazy)
        if isinstance(error, torchcache.TorchcacheError) and not number and failed is None:
            return error, None
        if failed is not None:
            if error is None:
                raise AssertionError(f"call {number} of the twin raised {failed!r}, and it gave an answer")
            continue
        if error is not None:
            raise AssertionError(f"call {number} raised {type(error).__name__}: {error}") from error
        compare(found, expected, torch.float32, f"call {number}")
    return None, torchcache.stats(module)


def entries(few):
    for info in module_db:
        for door in DOORS:
            if (info.module_cls.__name__ in FEW and door in ("call", "transform")) == few:
                yield pytest.param(info, door, id=f"{info.name}-{door}")


def check(info, door, most):
    for entry, module, call in constructed(info, most):
        if door == "transform" and isinstance(module, LazyModuleMixin):
            continue  # nothing in it is frozen yet, which is said
        torch._dynamo.reset()
        what = f"{info.name}{entry.constructor_input.args}{entry.constructor_input.kwargs}"
        refused, stats = endure(module, call, door)
        if refused is not None:
            assert isinstance(refused, torchcache.RowwiseError), what
            assert type(module).__name__.startswith(REFUSED), what
        else:
            assert not any(region.alarms for region in stats.regions), what


@pytest.mark.parametrize(("info", "door"), entries(few=True))
def test_modules_answer_as_they_do_uncached(info, door):
    check(info, door, FEW_INPUTS)


@pytest.mark.slow
@pytest.mark.parametrize(("info", "door"), entries(few=False))
def test_every_module_answers_as_it_does_uncached(info, door):
    check(info, door, MOST_INPUTS if door in ("call", "transform") else FEW_INPUTS)


def test_some_rows_are_served():
    (info,) = [info for info in module_db if info.name == "nn.Linear"]
    found = [endure(module, call, "call")[1].hits for _, module, call in constructed(info, MOST_INPUTS)]
    assert max(found) >= 4
