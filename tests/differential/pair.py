"""A model with marks and its twin without: built alike, changed alike, compared call by call."""

import copy
import dataclasses
import pickle
import random

import nets
import structures
import torch
from torch import nn

import torchcache

# Of the largest magnitude. Rounding stays far below, a stale or foreign row lies far above.
SMALLEST = 1e-3  # a difference of equal numbers is rounding alone
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.12}


@dataclasses.dataclass
class Pair:
    """A model, its twin, and how the model is called."""

    model: nn.Module
    twin: nn.Module
    run: object
    parts: tuple[str, ...]

    @classmethod
    def build(cls, program, directory):
        chosen = kept_options(program)
        twin, parts = _build(program, nets.KEPT if "output" in chosen else nets.KINDS, nets.Block)
        by_class = program.mark == "class" or (program.mark == "blocks" and parts == ("",))
        block = nets.MarkedBlock if program.mark in ("blocks", "nested") else nets.Block
        model, _ = _build(program, nets.MARKED if by_class else nets.KINDS, block)
        options = {"max_memory_cache_size": program.memory, "persistent": program.persistent}
        options |= {"batch_dim": nets.KINDS[program.net].BATCH_DIM, **chosen}
        if program.persistent:
            options["persistent_cache_dir"] = str(directory)
        for path in parts:
            part = model.backbone.get_submodule(path)
            if program.mark in ("class", "blocks"):
                vars(part).update({f"torchcache_{name}": value for name, value in options.items()})
            else:
                torchcache.mark(part, **options)
        model.train()
        return cls.of(model, twin, parts, program)

    @classmethod
    def of(cls, model, twin, parts, program):
        pair = cls(model, twin, model, parts)
        pair.set_mode(twin.training)
        for both in pair.both:
            both.compiled = program.door == "compile"
            both.traced = both.compiled or program.mark in ("partial", "unfrozen")
            both.partial = program.mark == "partial"
        if program.door == "transform" and program.mark != "unfrozen":
            torchcache.transform(model)
        elif program.door == "compile":
            inner = "aot_eager" if program.seed % 5 == 0 else "eager"
            pair.run = torch.compile(
                model,
                backend=torchcache.torchcache_backend,
                options={"inner": inner},
                dynamic=True if program.seed % 3 == 0 else None,
            )
        return pair

    @property
    def both(self):
        return self.model, self.twin

    @property
    def trains(self):
        """Whether what is marked is trainable: cached under ``no_grad``, and never put in eval mode."""
        return any(all(p.requires_grad for p in part.parameters()) for part in self.marked())

    def marked(self):
        """The marked modules."""
        return [self.model.backbone.get_submodule(path) for path in self.parts]

    def set_mode(self, training):
        """Call ``train``; what is marked stays in eval mode."""
        training = training and not self.trains
        self.model.train(training)
        self.twin.train(training)
        for path in self.parts:
            self.twin.backbone.get_submodule(path).eval()

    def copied(self, program, way):
        """A pair of copies, made in one of ``COPIES``."""
        model, twin = way(self.model), way(self.twin)
        return type(self).of(model, twin, self.parts, program)


def kept_options(program):
    """The options that say what of a whole backbone's output is stored, and how."""
    if program.mark not in ("instance", "class", "nested", "unfrozen"):
        return {}
    options = dict(nets.KINDS[program.net].OPTIONS)
    if program.kept == "output" and program.mark != "class" and not options:
        options["output"] = nets.kept
    elif program.kept == "bfloat16" or (program.kept == "int8" and not options):
        options["cache_dtype"] = getattr(torch, program.kept)
    return options


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _replica(model):
    """As ``DataParallel`` makes one of a module and of those in it, with parameters of its own."""
    made = model._replicate_for_data_parallel()
    for name, child in model._modules.items():
        made._modules[name] = _replica(child)
    for name, tensor in model._parameters.items():
        made._parameters[name] = None if tensor is None else nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
    for name, tensor in model._buffers.items():
        made._buffers[name] = None if tensor is None else tensor.clone()
    return made


def _halfway(model):
    """A shallow copy whose backbone is a copy of the backbone's own dict."""
    copied = copy.copy(model)
    copied._modules = dict(model._modules, backbone=copy.copy(model.backbone))
    return copied


COPIES = {"deepcopy": copy.deepcopy, "pickle": _pickled, "replica": _replica, "shallow": _halfway}


def _build(program, kinds, block):
    torch.manual_seed(program.seed)
    # A part that is not marked drops out in train mode, where no two runs agree.
    model = nets.Model(kinds[program.net](block, 0.0 if program.mark == "body" else 0.1))
    shake(model.backbone, random.Random(program.seed))
    backbone = model.backbone
    parts = ("",)
    if program.mark == "body":
        parts = ("body.stem", "body.blocks.1") if program.net == "Containers" else ("body",)
    elif program.mark == "blocks":
        parts = tuple(name for name, part in backbone.named_modules() if isinstance(part, nets.Block)) or parts
    for path in parts:
        backbone.get_submodule(path).requires_grad_(program.mark == "unfrozen").eval()
    if program.mark == "partial":
        backbone.last.requires_grad_(True)
    return model, parts


def fresh(name, tensor, draw):
    """Other values for a parameter or buffer."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    values = torch.randn(tensor.shape, generator=generator) * 0.6
    if "var" in name:
        values = values.abs() + 0.3
    return values.to(tensor.device, tensor.dtype)


def floating(module):
    """Names of the parameters and buffers that ``fresh`` can fill."""
    return [name for name, tensor in module.state_dict(keep_vars=True).items() if tensor.is_floating_point()]


def shake(module, draw, names=None):
    """Fill parameters and buffers with other values, in place."""
    state = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in floating(module) if names is None else names:
            state[name].copy_(fresh(name, state[name], draw))


class DiffersError(Exception):
    """The cached model's answer is not the twin's."""


def compare(found, expected, coarse, where="output", slack=0.0):
    """Raise unless ``found`` is ``expected`` within rounding and ``slack``, with its structure and dtypes."""
    if type(found) is not type(expected):
        raise DiffersError(f"{where} is a {type(found).__name__}, not a {type(expected).__name__}")
    if isinstance(expected, torch.Tensor):
        _compare_tensors(found, expected, coarse, where, slack)
    elif isinstance(expected, dict):
        compare(list(found), list(expected), coarse, f"{where}, keys")
        for key in expected:
            compare(found[key], expected[key], coarse, f"{where}[{key!r}]", slack)
    elif isinstance(expected, (list, tuple)):
        if len(found) != len(expected):
            raise DiffersError(f"{where} has {len(found)} items, not {len(expected)}")
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            compare(a, b, coarse, f"{where}[{index}]", slack)
    elif isinstance(expected, structures.Record):
        compare(vars(found), vars(expected), coarse, where, slack)
    elif repr(found) != repr(expected):  # zeros of either sign differ
        raise DiffersError(f"{where} is {found!r}, not {expected!r}")


def _compare_tensors(found, expected, coarse, where, slack):
    for name in ("dtype", "shape", "requires_grad", "device"):
        if getattr(found, name) != getattr(expected, name):
            raise DiffersError(f"{where}.{name} is {getattr(found, name)}, not {getattr(expected, name)}")
    a, b = found.detach().double(), expected.detach().double()
    if steps(expected) is not None and steps(found) != steps(expected):
        raise DiffersError(f"{where}.stride() is {found.stride()}, not {expected.stride()}")
    if not b.numel() or torch.equal(a, b):
        return
    rounding = TOLERANCE[coarse] if expected.is_floating_point() else 0
    allowed = rounding * max(b.nan_to_num(0, 0, 0).abs().max().item(), SMALLEST) + slack
    try:
        torch.testing.assert_close(a, b, rtol=0, atol=allowed, equal_nan=True)
    except AssertionError as error:
        raise DiffersError(f"{where} is wrong: {error}") from None


def steps(tensor):
    """The strides of the dimensions that have any, where the elements lie without gaps; others come back without."""
    held = [(size, step) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return [step for _, step in held] if sum((size - 1) * step for size, step in held) == tensor.numel() - 1 else None
