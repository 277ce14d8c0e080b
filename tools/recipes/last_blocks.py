"""Fine-tuning the last two blocks of a ViT: what comes before them is cached (pip install transformers)."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTModel

import torchcache


class Classifier(nn.Module):
    """A ViT whose last blocks train, and a linear layer on its class token."""

    def __init__(self, vit, classes, trainable):
        super().__init__()
        self.vit = torchcache.mark(vit, freeze=True)
        for block in vit.layers[-trainable:]:
            block.requires_grad_(True)
        self.head = nn.Linear(vit.config.hidden_size, classes)

    def forward(self, pixel_values):
        return self.head(self.vit(pixel_values).last_hidden_state[:, 0])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--trainable", type=int, default=2, help="how many of the last blocks train")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args(argv)

    torch.manual_seed(0)
    # Your own: ViTModel.from_pretrained("google/vit-base-patch16-224-in21k", add_pooling_layer=False)
    config = ViTConfig(
        hidden_size=given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=3,
        intermediate_size=4 * given.width,
        image_size=64,
    )
    model = Classifier(ViTModel(config, add_pooling_layer=False), classes=10, trainable=given.trainable)
    torchcache.transform(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    images, labels = torch.randn(given.samples, 3, 64, 64), torch.randint(10, (given.samples,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)

    losses = []
    for epoch in range(given.epochs):
        model.train()
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    print(torchcache.explain(model, x))
    print(torchcache.stats(model))
    return model, losses


if __name__ == "__main__":
    main()
