"""Operations that change a model: each is applied to the cached model and to its twin in the same way."""

import functools
import random

import nets
import torch
from pair import floating, fresh, shake
from torch import nn

GAINS = (1.0, 2.5, -2.0)


def weights(model, draw):
    """In place: all of them, or one in one of several ways."""
    backbone = model.backbone
    if draw.random() < 0.5:
        shake(backbone, draw)
        return
    name = draw.choice(floating(backbone))
    tensor = backbone.state_dict(keep_vars=True)[name]
    with torch.no_grad():
        way = draw.randrange(3)
        if way == 0:
            shake(backbone, draw, [name])
        elif way == 1:
            tensor[0] += 2.0
        elif "var" not in name:
            tensor.neg_()


def _optimizer(kind, **options):
    def step(backbone, parameter, values):
        if parameter.numel() > 2048:  # an embedding's gradient has the rows that were asked for
            values[:2], values[3:] = 0, 0
        parameter.grad = values
        kind([parameter], lr=2.0, **options).step()
        parameter.grad = None

    return step


def _numpy(backbone, parameter, values):
    if parameter.is_cpu:
        view = parameter.detach().numpy()
        view *= -2


def _flat(backbone, parameter, values):
    """The first time parameters are only moved into one buffer; afterwards it is written to."""
    first = next(backbone.parameters())
    flat = vars(backbone).get("flat_buffer")
    if flat is not None and first.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr():
        flat.mul_(-2)
        return
    held = [p for p in backbone.parameters() if p.dtype == first.dtype]
    vars(backbone)["flat_buffer"] = flat = torch.cat([p.detach().flatten() for p in held])
    for p, part in zip(held, flat.split([p.numel() for p in held]), strict=True):
        p.data = part.view_as(p)


def _running_statistics(backbone, parameter, values):
    for part in backbone.modules():
        if isinstance(part, nn.BatchNorm2d):
            rows = fresh("", torch.empty(6, part.num_features, 3, 3), random.Random(len(values))).to(values.dtype)
            nn.functional.batch_norm(4 * rows, part.running_mean, part.running_var, training=True, momentum=0.9)


def _swap(backbone, parameter, values):
    torch.utils.swap_tensors(parameter, nn.Parameter(values, parameter.requires_grad))


# Ways to write to a parameter, given the module, the parameter, and other values for it.
WRITES = {
    "data copy": lambda backbone, parameter, values: parameter.data.copy_(values),
    "data mul": lambda backbone, parameter, values: parameter.data.mul_(-2),
    "data view": lambda backbone, parameter, values: parameter.data.view(-1)[:3].fill_(2.5),
    "detach": lambda backbone, parameter, values: parameter.detach().add_(1.5),
    "foreach": lambda backbone, parameter, values: torch._foreach_mul_([parameter], -2.0),
    "foreach copy": lambda backbone, parameter, values: torch._foreach_copy_([parameter.data], [values]),
    "vector": lambda backbone, parameter, values: nn.utils.vector_to_parameters(values.flatten(), [parameter]),
    "storage": lambda backbone, parameter, values: parameter.untyped_storage().copy_(values.untyped_storage()),
    "out": lambda backbone, parameter, values: torch.mul(values, 2, out=parameter.data),
    "sgd": _optimizer(torch.optim.SGD, foreach=False),
    "sgd foreach": _optimizer(torch.optim.SGD, foreach=True),
    "sgd fused": _optimizer(torch.optim.SGD, fused=True),
    "adam fused": _optimizer(torch.optim.Adam, fused=True),
    "adamw": _optimizer(torch.optim.AdamW),
    "numpy": _numpy,
    "flat buffer": _flat,
    "running statistics": _running_statistics,
    "swap": _swap,
}
# These take no dtype but the usual ones.
_PARTICULAR = ("numpy", "storage", "sgd fused", "adam fused")


def write(model, draw):
    """In place by something that may move no version: ``.data``, optimizers, buffers of many, other views."""
    backbone = model.backbone
    name = draw.choice([name for name, _ in backbone.named_parameters()])
    way = draw.choice(list(WRITES))
    parameter = backbone.get_parameter(name)
    whole = parameter.is_contiguous() and parameter.untyped_storage().nbytes() == parameter.numel() * parameter.itemsize
    # Dynamo keeps weak references to what it traces, partly trainable marks included, and recurrent modules to their
    # weights: torch does not swap those.
    unable = way == "swap" and (model.traced or any(isinstance(part, nn.RNNBase) for part in backbone.modules()))
    if unable or (way in _PARTICULAR and not (parameter.dtype in (torch.float32, torch.float64) and whole)):
        way = "data copy"
    with torch.no_grad():
        WRITES[way](backbone, parameter, fresh(name, parameter, draw))


def code(model, draw):
    """Methods, hooks and functions of this model alone."""
    backbone = model.backbone
    part = draw.choice([part for part in backbone.modules() if isinstance(part, (nn.Linear, nets.Block))])
    way = draw.randrange(6)
    if way == 0:
        backbone.turn = draw.choice(nets.TURNS)
    elif way == 1:
        vars(backbone).pop("turn", None)
    elif way == 2:
        part.register_forward_pre_hook(nets.doubled_input)
    elif way == 3:
        part.register_forward_hook(nets.lowered)
    elif way == 4:
        for inner in backbone.modules():
            inner._forward_hooks.clear()
            inner._forward_pre_hooks.clear()
    elif isinstance(part, nn.Linear):  # a marked block's own forward is found through its mark
        part.forward = functools.partial(nets.squared, part)


def memory_format(model, draw):
    """Weights of convolutions in another order."""
    model.to(memory_format=draw.choice((torch.channels_last, torch.contiguous_format)))


def load(model, draw):
    """A state dict of other values, copied or taken over."""
    backbone = model.backbone
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    state.update({name: fresh(name, state[name], draw) for name in floating(backbone)})
    backbone.load_state_dict(state, assign=draw.random() < 0.5)


def replace(model, draw):
    """Another parameter object, or other data in the old one."""
    name = draw.choice([name for name, _ in model.backbone.named_parameters()])
    path, _, leaf = name.rpartition(".")
    owner = model.backbone.get_submodule(path)
    old = getattr(owner, leaf)
    values = fresh(name, old, draw)
    if draw.random() < 0.5:
        old.data = values
    else:
        setattr(owner, leaf, nn.Parameter(values, requires_grad=old.requires_grad))


def dtype(model, draw):
    """Another floating-point type."""
    way = draw.randrange(5)
    if way == 0:
        model.half()
    elif way == 1:
        model.bfloat16()
    else:
        model.to((torch.float32, torch.float32, torch.float64)[way - 2])


def attribute(model, draw):
    """An attribute of the backbone, of its config, or of a module inside it."""
    backbone = model.backbone
    way = draw.randrange(4)
    if way == 0:
        backbone.gain = draw.choice(GAINS)
    elif way == 1:
        backbone.config.shift = draw.choice((0.0, 3.0))
    elif way == 2:
        backbone.config = nets.Config(draw.choice((0.0, 3.0)))
    else:
        value = draw.choice((1e-5, 5.0))
        for part in backbone.modules():
            if hasattr(part, "eps"):
                part.eps = value
            if isinstance(part, nets.Block):
                part.slope = value + 1


def asking(model, draw):
    """Code that answers otherwise where it is compiled, in models that nobody compiles."""
    model.backbone.asks = draw.random() < 0.7 and not model.compiled


def freezing(model, draw):
    """Which layer trains of a model of which one does."""
    if model.partial:
        model.backbone.last.requires_grad_(draw.random() < 0.7)


CHANGES = {
    function.__name__: function
    for function in (weights, write, load, replace, code, memory_format, dtype, attribute, asking, freezing)
}


def apply(change, pair, number):
    """Change both models of a pair alike."""
    for model in pair.both:
        change(model, random.Random(number))
