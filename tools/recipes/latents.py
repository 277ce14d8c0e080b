"""Latents and text embeddings of a diffusion model, cached before training (pip install transformers).

The image encoder and the text encoder are frozen; ``warm`` runs both over the data set once, and they are on disk for
every run after this one. Training then needs neither, and adds noise to latents, which are the same in each epoch:
``torchcache.deferred`` in place of ``mark`` lets them go, and does not even load them in later runs.
"""

import argparse
import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import CLIPTextConfig, CLIPTextModel

import torchcache


def image_encoder():
    """Your own: the encoder half of an autoencoder, such as ``AutoencoderKL.from_pretrained(...).encoder``."""
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.SiLU(), nn.Conv2d(16, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 4, 1))


class Denoiser(nn.Module):
    """Predicts the noise in a latent from the latent, how noisy it is, and a text."""

    def __init__(self, text_width):
        super().__init__()
        self.text = nn.Linear(text_width, 32)
        self.first, self.last = nn.Conv2d(5, 32, 3, 1, 1), nn.Conv2d(32, 4, 3, 1, 1)

    def forward(self, noisy, level, text):
        level = level.view(-1, 1, 1, 1).expand(-1, 1, *noisy.shape[2:])
        return self.last(
            nn.functional.silu(self.first(torch.cat([noisy, level], 1)) + self.text(text)[..., None, None])
        )


class Diffusion(nn.Module):
    """The loss of one training step, on images and tokens as they come."""

    def __init__(self, images, texts, directory):
        super().__init__()
        options = {"persistent": True, "persistent_cache_dir": directory, "freeze": True}
        self.images = torchcache.mark(images, cache_dtype=torch.float16, **options)
        self.texts = torchcache.mark(texts, output=lambda found: found.pooler_output, **options)  # no tokens
        self.denoiser = Denoiser(texts.config.hidden_size)

    def forward(self, images, input_ids):
        latents, text = self.images(images), self.texts(input_ids)
        level, noise = torch.rand(len(latents)), torch.randn_like(latents)
        noisy = latents + level.view(-1, 1, 1, 1) * (noise - latents)
        return nn.functional.mse_loss(self.denoiser(noisy, level, text), noise)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--directory", help="where rows are kept; a temporary directory without")
    given = parser.parse_args(argv)
    directory = given.directory or tempfile.mkdtemp(prefix="latents-")

    torch.manual_seed(0)
    # Your own: CLIPTextModel.from_pretrained(...)
    config = CLIPTextConfig(
        hidden_size=given.width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=500
    )
    model = torchcache.transform(Diffusion(image_encoder(), CLIPTextModel(config), directory))
    optimizer = torch.optim.AdamW(model.denoiser.parameters(), lr=1e-3)

    images, ids = torch.randn(given.samples, 3, 64, 64), torch.randint(500, (given.samples, 16))
    loader = DataLoader(TensorDataset(images, ids), batch_size=32, shuffle=True)
    print(torchcache.warm(model, loader, progress=False))

    losses = []
    for epoch in range(given.epochs):
        for x, tokens in torchcache.prefetch(loader):
            loss = model(x, tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    print(torchcache.stats(model))
    return model, losses


if __name__ == "__main__":
    main()
