"""A linear classifier on a frozen timm backbone (pip install timm)."""

import argparse

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchcache


class Probe(nn.Module):
    """A frozen backbone, and a linear layer on its pooled features."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = torchcache.mark(backbone, freeze=True)
        self.head = nn.Linear(backbone.num_features, classes)

    def forward(self, images):
        return self.head(self.backbone(images))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args(argv)

    torch.manual_seed(0)
    extra = {"img_size": given.size} if "vit" in given.model else {}
    backbone = timm.create_model(given.model, pretrained=given.pretrained, num_classes=0, **extra)
    model = torchcache.transform(Probe(backbone, classes=10))
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)

    # Your own: any data set whose images are the same in every epoch (augmentation: see augmented_images.py).
    images, labels = torch.randn(given.samples, 3, given.size, given.size), torch.randint(10, (given.samples,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)

    losses = []
    for epoch in range(given.epochs):
        for x, y in torchcache.prefetch(loader):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    print(torchcache.stats(model))
    return model, losses


if __name__ == "__main__":
    main()
