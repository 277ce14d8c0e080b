"""Tiny real models with random weights, built from their configurations, and the head trained on top of them."""

import copy
import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchcache

IMAGE = (3, 32, 32)
WORDS = 100
LENGTH = 7


@dataclasses.dataclass(frozen=True)
class Case:
    """One architecture.

    Parameters
    ----------
    name : str
        The test's id.
    build : callable
        Makes the backbone; skips the test where its package is missing.
    inputs : callable
        From a number of rows to the backbone's arguments.
    read : callable
        From the backbone's outputs to features of shape ``(B, F)``.
    blocks : callable
        From the backbone to its blocks in the order they run; the last one is unfrozen or adapted.
    names : tuple of str
        The arguments' names, where they are passed by name.
    regions : int
        Regions that its frozen part makes where its last block trains.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    read: Callable[[Any], torch.Tensor]
    blocks: Callable[[nn.Module], list[nn.Module]]
    names: tuple[str, ...] = ()
    regions: int = 1

    def __str__(self):
        return self.name


class Model(nn.Module):
    """A backbone and a trainable head; returns the logits, and what the backbone returned if asked to."""

    def __init__(self, case, backbone, features):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, 3)
        self.names = case.names
        self.read = case.read
        self.shows = True

    def forward(self, *inputs):
        outputs = self.backbone(**dict(zip(self.names, inputs, strict=True))) if self.names else self.backbone(*inputs)
        logits = self.head(self.read(outputs))
        return (logits, outputs) if self.shows else logits


def build(case, seed=0):
    """An uncached, frozen model with random weights and random BatchNorm statistics."""
    torch.manual_seed(seed)
    backbone = case.build()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    backbone.requires_grad_(False)
    backbone.eval()
    inputs = case.inputs(2)
    with torch.no_grad():
        outputs = backbone(**dict(zip(case.names, inputs, strict=True))) if case.names else backbone(*inputs)
    return Model(case, backbone, case.read(outputs).shape[1])


def pair(case, change=None, seed=0, **options):
    """A model whose backbone is marked, and its uncached twin; ``change`` unfreezes or adapts a backbone first."""
    twin = build(case, seed)
    if change is not None:
        change(twin.backbone)
    model = copy.deepcopy(twin)
    torchcache.mark(model.backbone, **options)
    return model, twin


def unfreeze_last(case, backbone):
    """Make the last block trainable."""
    case.blocks(backbone)[-1].requires_grad_(True)


def adapt_last(case, backbone):
    """Put a trainable adapter on every dense layer of the last block."""
    torch.manual_seed(17)
    block = case.blocks(backbone)[-1]
    for module in list(block.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) or (isinstance(child, nn.Conv2d) and child.groups == 1):
                setattr(module, name, Adapter(child))


class Adapter(nn.Module):
    """``base`` with a trainable low-rank path beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        if isinstance(base, nn.Linear):
            self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)
        else:
            self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding)
            self.up = nn.Conv2d(2, base.out_channels, 1)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def images(count):
    return (torch.randn(count, *IMAGE),)


def sentences(count):
    """Token ids and a mask with padding at the end."""
    lengths = torch.randint(3, LENGTH + 1, (count,))
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return torch.randint(1, WORDS, (count, LENGTH)) * mask, mask


def captioned(count):
    return (*images(count), *sentences(count))


class BasicBlock(nn.Module):
    """The residual block of ResNet-18, with in-place activations and BatchNorm."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class TinyResNet(nn.Module):
    """ResNet in three stages."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.layer1 = BasicBlock(width, width, 1)
        self.layer2 = BasicBlock(width, 2 * width, 2)
        self.layer3 = BasicBlock(2 * width, 4 * width, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return torch.flatten(self.pool(x), 1)


class Towers(nn.Module):
    """CLIP's two encoders without the comparison between rows that makes its loss."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    def forward(self, pixel_values, input_ids, attention_mask):
        image = self.clip.vision_model(pixel_values=pixel_values)
        text = self.clip.text_model(input_ids=input_ids, attention_mask=attention_mask)
        return {
            "image": self.clip.visual_projection(image.pooler_output),
            "text": self.clip.text_projection(text.pooler_output),
        }


def imported(name):
    """A module, or a skipped test where it is not installed."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision without its operators raises RuntimeError
        return pytest.skip(f"{name} cannot be imported here: {error}")


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SEEING = {"image_size": 32, "patch_size": 8}
READING = {"vocab_size": WORDS, "max_position_embeddings": 16}


def bert():
    transformers = imported("transformers")
    return transformers.BertModel(transformers.BertConfig(**SMALL, **READING))


def vit():
    transformers = imported("transformers")
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, **SEEING))


def llama():
    transformers = imported("transformers")
    config = transformers.LlamaConfig(**SMALL, **READING, num_key_value_heads=1, use_cache=False)
    return transformers.LlamaModel(config)


def clip_model():
    transformers = imported("transformers")
    text = {**SMALL, **READING, "eos_token_id": WORDS - 1, "bos_token_id": 1, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config={**SMALL, **SEEING}, projection_dim=16)
    return transformers.CLIPModel(config)


def towers():
    return Towers(clip_model())


def timm_model(name, **options):
    timm = imported("timm")
    return timm.create_model(name, num_classes=0, **options)


def timm_swin():
    return timm_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
    )


def resnet18():
    model = imported("torchvision.models").resnet18(width_per_group=64)
    model.fc = nn.Identity()
    return model


def fpn():
    resnet = imported("torchvision.models.resnet")
    feature_pyramid = imported("torchvision.models.detection.backbone_utils")
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    stages = {f"layer{index}": str(index - 1) for index in (1, 2, 3, 4)}
    return feature_pyramid.BackboneWithFPN(body, stages, [64, 128, 256, 512], 16)


def plain(outputs):
    return outputs


def pooler_output(outputs):
    return outputs.pooler_output


def last_token(outputs):
    return outputs.last_hidden_state[:, -1]


def mean_of_both(outputs):
    return torch.cat([outputs["image"], outputs["text"]], 1)


def mean_of_maps(outputs):
    return torch.cat([level.mean((2, 3)) for level in outputs.values()], 1)


def named(*paths):
    """The blocks with these paths, as a function of the backbone."""
    return lambda backbone: [backbone.get_submodule(path) for path in paths]


TOKENS = ("input_ids", "attention_mask")

CASES = [
    Case("bert", bert, sentences, pooler_output, named("encoder.layer.0", "encoder.layer.1"), TOKENS),
    Case("vit", vit, images, pooler_output, named("layers.0", "layers.1"), ("pixel_values",)),
    Case("llama", llama, sentences, last_token, named("layers.0", "layers.1"), TOKENS),
    Case(
        "clip",
        towers,
        captioned,
        mean_of_both,
        named("clip.vision_model.encoder.layers.0", "clip.vision_model.encoder.layers.1"),
        ("pixel_values", *TOKENS),
        regions=2,
    ),
    Case(
        "timm-vit", functools.partial(timm_model, "test_vit", img_size=32), images, plain, named("blocks.0", "blocks.1")
    ),
    Case("timm-resnet", functools.partial(timm_model, "test_resnet"), images, plain, named("layer1", "layer4")),
    Case("timm-convnext", functools.partial(timm_model, "test_convnext"), images, plain, named("stages.0", "stages.3")),
    Case("timm-swin", timm_swin, images, plain, named("layers.0", "layers.1.blocks.1")),
    Case(
        "timm-efficientnet",
        functools.partial(timm_model, "test_efficientnet"),
        images,
        plain,
        named("blocks.0", "blocks.2"),
    ),
    Case("resnet", TinyResNet, images, plain, named("layer1", "layer3")),
    Case("resnet18", resnet18, images, plain, named("layer1", "layer4.1")),
    Case("fpn", fpn, images, mean_of_maps, named("body.layer4", "fpn")),
]
