"""Operations that change a model: each is applied to the cached model and to its twin in the same way."""

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


CHANGES = {function.__name__: function for function in (weights, load, replace, dtype, attribute)}


def apply(change, pair, number):
    """Change both models of a pair alike."""
    for model in pair.both:
        change(model, random.Random(number))
