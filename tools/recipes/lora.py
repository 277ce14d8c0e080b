"""LoRA from block k of a BERT on: the blocks before it are cached (pip install transformers).

LoRA by Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertModel

import torchcache


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable product of two thin matrices, zero at first."""

    def __init__(self, linear, rank=4, alpha=8.0):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        self.scale = alpha / rank
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.linear(x) + self.scale * self.up(self.down(x))


class Classifier(nn.Module):
    """A BERT with adapters in the queries and values from one block on, and a linear layer on its first token."""

    def __init__(self, bert, classes, first_block):
        super().__init__()
        self.bert = torchcache.mark(bert, freeze=True)
        for layer in bert.encoder.layer[first_block:]:
            attention = layer.attention.self
            attention.query = LoraLinear(attention.query)
            attention.value = LoraLinear(attention.value)
        self.head = nn.Linear(bert.config.hidden_size, classes)

    def forward(self, input_ids, attention_mask):
        return self.head(self.bert(input_ids, attention_mask).last_hidden_state[:, 0])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--first-block", type=int, default=4, help="the first block with adapters")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args(argv)

    torch.manual_seed(0)
    # Your own: BertModel.from_pretrained("bert-base-uncased", add_pooling_layer=False)
    config = BertConfig(
        hidden_size=given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=4,
        intermediate_size=4 * given.width,
        vocab_size=1000,
    )
    model = Classifier(BertModel(config, add_pooling_layer=False), classes=4, first_block=given.first_block)
    torchcache.transform(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    ids, mask = torch.randint(1000, (given.samples, 32)), torch.ones(given.samples, 32, dtype=torch.long)
    labels = torch.randint(4, (given.samples,))
    loader = DataLoader(TensorDataset(ids, mask, labels), batch_size=32, shuffle=True)

    losses = []
    for epoch in range(given.epochs):
        for input_ids, attention_mask, y in loader:
            loss = nn.functional.cross_entropy(model(input_ids, attention_mask), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    print(torchcache.stats(model))
    return model, losses


if __name__ == "__main__":
    main()
