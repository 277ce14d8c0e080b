"""A head on a frozen network over image files, which later epochs and runs do not open (pip install pillow)."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import torchcache


class Pictures(Dataset):
    """Files of a folder, decoded and resized. What is done to every image belongs here, not into the training loop."""

    def __init__(self, folder, size):
        self.paths = [str(path) for path in sorted(Path(folder).glob("*.png"))]
        self.size = size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as image:
            pixels = np.array(image.convert("RGB").resize((self.size, self.size)))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, index % 10


class Classifier(nn.Module):
    """A frozen backbone, and a linear head on what it gives."""

    def __init__(self, width, size, cache):
        super().__init__()
        # Your own: timm.create_model(...), AutoModel.from_pretrained(...)
        backbone = nn.Sequential(
            nn.Conv2d(3, width, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(width * (size // 8) ** 2, 64)
        )
        self.backbone = torchcache.mark(backbone, freeze=True, persistent=True, persistent_cache_dir=cache)
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        return self.head(self.backbone(images))


def draw(folder, count):
    """Pictures to try this with."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((400, 300)).save(Path(folder, f"{index:05d}.png"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="of your own images; pictures are drawn where there is none")
    parser.add_argument("--cache", help="the cache directory; a temporary one by default")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args(argv)

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder, cache = given.folder or f"{temporary}/images", given.cache or f"{temporary}/cache"
        if given.folder is None:
            draw(folder, given.samples)
        images = Pictures(folder, given.size)
        # PyTorch's arguments; a second run with the same cache opens no file but those that it checks.
        loader = torchcache.DataLoader(
            images, batch_size=32, shuffle=True, num_workers=given.workers, persistent=True, persistent_cache_dir=cache
        )
        model = torchcache.transform(Classifier(given.width, given.size, cache))
        optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
        losses = []
        for _ in range(given.epochs):
            for pixels, labels in loader:
                loss = nn.functional.cross_entropy(model(pixels), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        print(torchcache.stats(loader))
        torchcache.flush()
    return model, losses


if __name__ == "__main__":
    main()
