"""Bytes a row and time of an epoch in which all rows hit: what the head reads, and what a LoRA's block reads.

    python tools/bench/kept.py [--count 64] [--layers 12]

For each model: marked as it is, marked with ``output=`` where something is made of its output, marked together with its
head, and features that were computed by hand. Needs transformers, peft and diffusers; weights are random. Medians of
later epochs, in a row.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, EsmConfig, EsmModel, ViTConfig, ViTModel

import torchcache

BATCH, LENGTH = 16, 128
Step = Callable[[list[int]], torch.Tensor]


def first_token(found: Any) -> torch.Tensor:
    """What a linear probe reads of a ViT."""
    return found.last_hidden_state[:, 0]


def pooled(found: Any) -> torch.Tensor:
    """What a classifier reads of CLIP's image tower."""
    return found.pooler_output


def distribution(found: Any) -> torch.Tensor:
    """Mean and variance of latents: each epoch draws from them."""
    return found.latent_dist.parameters


def probe(
    encode: Callable[[torch.Tensor], Any], data: torch.Tensor, output: Callable[[Any], torch.Tensor], again: Any
) -> dict[str, tuple[Step, Any]]:
    """A linear head on what ``output`` makes of an encoder's output; ``again`` copies and marks it."""
    with torch.no_grad():
        features = torch.cat([output(encode(part)).flatten(1) for part in data.split(BATCH)])
    head = nn.Linear(features.shape[1], 10)
    whole, kept = again(None), again(output)
    both = torchcache.mark(Both(encode, output, head))
    return {
        "marked": (lambda rows: head(output(whole(data[rows])).flatten(1)), whole),
        "output=": (lambda rows: head(kept(data[rows]).flatten(1)), kept),
        "with its head": (lambda rows: both(data[rows]), both),
        "by hand": (lambda rows: head(features[rows]), features),
    }


class Both(nn.Module):
    """A copy of an encoder, what is read of its output, and the head that reads it."""

    def __init__(self, encode: Any, output: Callable[[Any], torch.Tensor], head: nn.Linear) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(getattr(encode, "__self__", encode))
        self.method, self.output, self.head = getattr(encode, "__name__", "forward"), output, head

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.output(getattr(self.encoder, self.method)(data)).flatten(1))


def marked(module: nn.Module, output: Any, method: str = "forward") -> Any:
    """A marked copy, as what is called."""
    twin = torchcache.mark(copy.deepcopy(module), freeze=True, method=method, output=output)
    return twin if method == "forward" else getattr(twin, method)


def adapted(layers: int, data: torch.Tensor) -> dict[str, tuple[Step, Any]]:
    """ESM with LoRA on the query and value of its last block; by hand, what that block reads."""
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=33, hidden_size=480, num_hidden_layers=layers, num_attention_heads=20, intermediate_size=1920,
        pad_token_id=1, mask_token_id=32, position_embedding_type="rotary", token_dropout=False,
    )  # fmt: skip
    lora = LoraConfig(target_modules=["query", "value"], layers_to_transform=[layers - 1], layers_pattern="layer", r=8)
    model = get_peft_model(EsmModel(config, add_pooling_layer=False), lora).eval()
    plain = copy.deepcopy(model)
    torchcache.transform(torchcache.mark(model))
    encoder = plain.base_model.model.encoder
    held: list[tuple[Any, Any]] = []
    last = encoder.layer[-1]
    hook = last.register_forward_pre_hook(lambda _, args, kwargs: held.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        for part in data.split(BATCH):
            plain(input_ids=part)
    hook.remove()
    states = torch.cat([args[0] for args, _ in held])
    args, kwargs = held[0]

    def by_hand(rows: list[int]) -> torch.Tensor:
        found = last(states[rows], *args[1:], **kwargs)
        return encoder.emb_layer_norm_after(found[0] if isinstance(found, tuple) else found).mean(1)

    return {
        "marked": (lambda rows: model(input_ids=data[rows]).last_hidden_state.mean(1), model),
        "by hand": (by_hand, states),
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64, help="samples")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=9)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    images, ids = torch.randn(chosen.count, 3, 224, 224), torch.randint(4, 33, (chosen.count, LENGTH))
    vit = ViTModel(ViTConfig(num_hidden_layers=chosen.layers)).eval().requires_grad_(False)
    clip = CLIPVisionModel(
        CLIPVisionConfig(num_hidden_layers=chosen.layers, hidden_size=768, intermediate_size=3072, patch_size=16)
    )
    clip = clip.eval().requires_grad_(False)
    vae = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=8,
    ).eval().requires_grad_(False)  # fmt: skip
    small = nn.functional.interpolate(images, size=64)
    cases = {
        "ViT-B, class token": lambda: probe(vit, images, first_token, functools.partial(marked, vit)),
        "CLIP's image tower, pooled": lambda: probe(clip, images, pooled, functools.partial(marked, clip)),
        "ESM of width 480, LoRA on its last block": lambda: adapted(chosen.layers, ids),
        "VAE, latents of 64 x 64": lambda: probe(
            vae.encode, small, distribution, functools.partial(marked, vae, method="encode")
        ),
    }
    table = Table("model", "run", "bytes a row", "all-hit epoch, s", "of by hand", "hits")
    for name, make in cases.items():
        found = {}
        for run, (step, what) in make().items():
            seconds = []
            for _ in range(chosen.epochs):
                start = time.perf_counter()
                for rows in torch.randperm(chosen.count).split(BATCH):
                    step(rows.tolist()).square().sum().backward()
                seconds.append(time.perf_counter() - start)
            if isinstance(what, torch.Tensor):
                size, hits = what[0].nbytes, ""
            else:
                stats = torchcache.stats(getattr(what, "__self__", what))
                size = sum(region.memory_bytes for region in stats.regions) / chosen.count
                hits = f"{stats.hits / max(1, stats.hits + stats.misses + stats.bypasses):.0%}"
            found[run] = size, statistics.median(seconds[3:]), hits
        for run, (size, later, hits) in found.items():
            table.add_row(name, run, f"{size:,.0f}", f"{later:.4f}", f"{later / found['by hand'][1]:.2f}x", hits)
            name = ""
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
