"""What would be cached and what not, and why."""

import torch
from torch import nn

import torchcache


class Encoder(nn.Module):
    def __init__(self, blocks=4):
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1) for _ in range(blocks)
        )

    def forward(self, ids):
        h = self.embedding(ids)
        for block in self.blocks:
            h = block(h)
        return h


class Model(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(8, 2)

    def forward(self, ids):
        return self.head(self.encoder(ids).mean(1))


IDS = torch.arange(20).reshape(4, 5)


def test_a_frozen_mark_is_one_region():
    model = Model(torchcache.mark(Encoder(), freeze=True))
    told = torchcache.explain(model, IDS)
    (region,) = told.regions
    assert region.name == "encoder (Encoder)"
    assert region.row_bytes == 5 * 8 * 4
    assert len(region.inputs) == len(region.outputs) == 1
    frozen = sum(p.numel() * 4 for p in model.encoder.parameters())
    assert region.state_bytes == frozen
    assert told.left_out == []
    assert torchcache.stats(model).misses == 0


def test_trainable_blocks_are_left_out_with_their_path_and_line():
    encoder = torchcache.mark(Encoder(), freeze=True)
    encoder.blocks[2].requires_grad_(True)
    told = torchcache.explain(Model(encoder), IDS)
    (region,) = told.regions
    assert region.outputs[0].endswith("float32 (5, 8)")
    (part,) = told.left_out
    assert part.kind == "trainable"
    assert "blocks.2" in part.reason
    assert ".py:" in part.source
    assert part.operators > 5
    assert "blocks.2" in str(told)


def test_random_and_mutating_operators_are_named():
    class Noisy(Encoder):
        def forward(self, ids):
            h = super().forward(ids)
            return h + torch.randn_like(h)

    class Counting(Encoder):
        def __init__(self):
            super().__init__(1)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, ids):
            self.seen.add_(1)
            return super().forward(ids) + self.seen

    for encoder, kind in ((Noisy(), "random"), (Counting(), "mutation")):
        told = torchcache.explain(Model(torchcache.mark(encoder, freeze=True)), IDS)
        assert {part.kind for part in told.left_out} == {kind}
        assert __file__ in told.left_out[0].source


def test_graph_breaks_are_told():
    class Breaking(Encoder):
        def forward(self, ids):
            torch._dynamo.graph_break()
            return super().forward(ids)

    told = torchcache.explain(Model(torchcache.mark(Breaking(1), freeze=True)), IDS)
    assert told.regions == []
    (part,) = told.left_out
    assert part.kind == "graph break"
    assert "encoder" in part.name


def test_the_drawing_colours_what_is_cached():
    drawing = torchcache.explain(Model(torchcache.mark(Encoder(1), freeze=True)), IDS).to_dot()
    assert drawing.startswith("digraph")
    assert drawing.count("palegreen") >= 2
    assert drawing.count("{") == drawing.count("}")
