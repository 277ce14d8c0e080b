"""A frozen sentence encoder, with batches padded to their longest sentence (pip install transformers).

``padding="attention_mask"`` takes the padding out of rows: a sentence is found again in any batch, however long that
is, and what is stored of it covers its own tokens. That padding changes nothing at real tokens is checked.
"""

import argparse
import random

import torch
from torch import nn
from transformers import BertConfig, BertModel

import torchcache


class Classifier(nn.Module):
    """A linear layer on the mean of a sentence's tokens, without the padding."""

    def __init__(self, encoder, width, classes):
        super().__init__()
        self.encoder = torchcache.mark(encoder, freeze=True, padding="attention_mask")
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids, attention_mask):
        tokens = self.encoder(input_ids, attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return self.head((tokens * weights).sum(1) / weights.sum(1))


def batches(sentences, labels, size, order):
    """Shuffled batches, each padded to its longest sentence."""
    members = list(range(len(sentences)))
    order.shuffle(members)
    for at in range(0, len(members), size):
        rows = members[at : at + size]
        end = max(len(sentences[index]) for index in rows)
        ids, mask = torch.zeros(len(rows), end, dtype=torch.long), torch.zeros(len(rows), end, dtype=torch.long)
        for row, index in enumerate(rows):
            ids[row, : len(sentences[index])] = torch.tensor(sentences[index])
            mask[row, : len(sentences[index])] = 1
        yield ids, mask, labels[rows]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args(argv)

    torch.manual_seed(0)
    order = random.Random(0)
    # Your own: AutoModel.from_pretrained("sentence-transformers/all-MiniLM-L6-v2") and its tokenizer
    config = BertConfig(
        hidden_size=given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=4,
        intermediate_size=4 * given.width,
        vocab_size=1000,
    )
    model = Classifier(BertModel(config, add_pooling_layer=False), given.width, classes=4)
    torchcache.transform(model)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)

    sentences = [[order.randrange(1, 1000) for _ in range(order.randint(4, 64))] for _ in range(given.samples)]
    labels = torch.randint(4, (given.samples,))
    losses = []
    for epoch in range(given.epochs):
        for ids, mask, y in batches(sentences, labels, 32, order):
            loss = nn.functional.cross_entropy(model(ids, mask), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    print(torchcache.stats(model))
    return model, losses


if __name__ == "__main__":
    main()
