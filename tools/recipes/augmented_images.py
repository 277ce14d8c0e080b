"""A CLIP image tower under random augmentation, cached by sample and augmentation (pip install transformers).

An augmented image is another row. Where each sample is augmented in a few fixed ways, a way for each epoch in turn,
its rows come back; ids of sample and way name them, and no image is hashed.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import torchcache


class Augmented(Dataset):
    """Images, each flipped and shifted in one of a few ways; gives the id of sample and way as well."""

    def __init__(self, images, labels, ways):
        self.images, self.labels, self.ways, self.epoch = images, labels, ways, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        way = self.epoch % self.ways
        draw = torch.Generator().manual_seed(index * self.ways + way)
        image = self.images[index]
        if torch.rand((), generator=draw) < 0.5:
            image = image.flip(-1)
        image = image.roll(torch.randint(-4, 5, (2,), generator=draw).tolist(), (-2, -1))
        return index * self.ways + way, image, self.labels[index]


class Classifier(nn.Module):
    """A linear layer on CLIP's image embeddings."""

    def __init__(self, tower, classes):
        super().__init__()
        self.tower = torchcache.mark(tower, freeze=True)
        self.head = nn.Linear(tower.config.projection_dim, classes)

    def forward(self, pixel_values):
        return self.head(self.tower(pixel_values).image_embeds)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--ways", type=int, default=2, help="augmentations of each sample")
    parser.add_argument("--epochs", type=int, default=6)
    given = parser.parse_args(argv)

    torch.manual_seed(0)
    # Your own: CLIPVisionModelWithProjection.from_pretrained("openai/clip-vit-base-patch32")
    config = CLIPVisionConfig(
        hidden_size=given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=4,
        intermediate_size=4 * given.width,
        image_size=32,
        patch_size=8,
        projection_dim=64,
    )
    model = torchcache.transform(Classifier(CLIPVisionModelWithProjection(config), classes=10))
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)

    data = Augmented(torch.randn(given.samples, 3, 32, 32), torch.randint(10, (given.samples,)), given.ways)
    loader = DataLoader(data, batch_size=32, shuffle=True)
    losses = []
    for epoch in range(given.epochs):
        data.epoch = epoch
        for ids, x, y in loader:
            with torchcache.sample_keys(ids):
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
