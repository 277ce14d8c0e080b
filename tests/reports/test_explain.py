"""What would be cached in a model and what not, and why."""

import pytest
import torch
from torch import nn

import torchcache
from torchcache.context import explaining


class Encoder(nn.Module):
    def __init__(self, blocks=2):
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

    def pooled(self, ids):
        return self(ids).mean(1)


class Model(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(8, 2)

    def forward(self, ids):
        return self.head(self.encoder(ids).mean(1))


IDS = torch.arange(20).reshape(4, 5)


def frozen_bytes(module):
    return sum(parameter.nbytes for parameter in module.parameters())


@pytest.mark.parametrize("door", ["called", "transformed", "compiled", "compiled in place"])
def test_a_frozen_mark_is_one_region(door):
    model = Model(torchcache.mark(Encoder(), freeze=True))
    if door == "transformed":
        torchcache.transform(model)
    if door == "compiled in place":
        model.compile(backend="eager")
    compiled = torch.compile(model, backend="eager") if door == "compiled" else model
    told = torchcache.explain(compiled, IDS)
    (region,) = told.regions
    assert region.name == "encoder (Encoder)"
    assert region.inputs == ["ids: int64 (5,)"]
    assert region.outputs == ["output: float32 (5, 8)"]
    assert region.row_bytes == 5 * 8 * 4
    assert region.state_bytes == frozen_bytes(model.encoder)
    assert told.left_out == []
    assert "encoder (Encoder)" in str(told)


def test_nothing_is_stored_or_counted_and_what_is_served_later_is_right(tmp_path):
    options = {"persistent": True, "persistent_cache_dir": tmp_path}
    model = Model(torchcache.mark(Encoder(), freeze=True, **options))
    with torchcache.bypass():
        expected = model(IDS)
    before = torchcache.stats(model).bypasses
    torchcache.explain(model, IDS)
    torchcache.flush()
    stats = torchcache.stats(model)
    assert (stats.hits, stats.misses, stats.bypasses - before) == (0, 0, 0)
    assert stats.regions[0].rows_stored == stats.regions[0].rows_written == 0
    for _ in range(2):
        torch.testing.assert_close(model(IDS), expected)
    assert torchcache.stats(model).hits == 4


def test_the_forward_outside_of_marks_runs_once():
    class Counted(Model):
        calls = 0

        def forward(self, ids):
            Counted.calls += 1
            return super().forward(ids)

    torchcache.explain(Counted(torchcache.mark(Encoder(), freeze=True)), IDS)
    assert Counted.calls == 1


def test_roles_of_inputs_and_structure_of_outputs_are_told():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, prototypes, scale=2.0):
            return {"logits": self.linear(x) @ prototypes.T, "norm": x.norm(dim=1) * scale}

    module = torchcache.mark(Attends(), freeze=True, cache_dtype=torch.float16)
    explained = torchcache.explain(module, torch.randn(6, 4), prototypes=torch.randn(3, 4))
    (region,) = explained.regions
    assert [line.split("│")[2].strip() for line in str(explained).splitlines() if "float32" in line] == region.inputs
    assert region.inputs == ["x: float32 (4,)", "prototypes: float32 (3, 4), shared"]
    assert region.outputs == ["logits: float32 (3,) as float16", "norm: float32 () as float16"]
    assert region.row_bytes == (3 + 1) * 2


def test_what_acts_in_train_mode_only_is_told():
    model = Model(torchcache.mark(Encoder(), freeze=True))
    model.train()
    (region,) = torchcache.explain(model, IDS).regions
    assert "Dropout" in region.mode
    (plain,) = torchcache.explain(torchcache.mark(nn.Linear(5, 2), freeze=True), torch.randn(3, 5)).regions
    assert plain.mode == "kept in eval"


def test_a_mark_that_trains_names_what_it_trains():
    model = Model(torchcache.mark(Encoder()))
    told = torchcache.explain(model, IDS)
    assert told.regions == []
    (part,) = told.left_out
    assert (part.name, part.kind) == ("encoder (Encoder)", "trainable")
    assert "embedding.weight" in part.reason
    assert "freeze=True" in part.reason


def test_bypasses_and_refusals_come_with_their_reason():
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

    class Mixing(Encoder):
        def forward(self, ids):
            h = super().forward(ids)
            return h - h.mean(0)

    expected = {Noisy: ("bypass", "random numbers"), Mixing: ("refused", "other rows of the batch")}
    for kind, (outcome, text) in expected.items():
        told = torchcache.explain(Model(torchcache.mark(kind(), freeze=True)), IDS)
        assert told.regions == []
        (part,) = told.left_out
        assert part.kind == outcome
        assert text in part.reason
        assert part.name == f"encoder ({kind.__name__})"
    told = torchcache.explain(Model(torchcache.mark(Counting(), freeze=True)), IDS)
    assert "seen" in told.left_out[0].reason


def test_a_method_that_is_called_and_not_marked_is_named():
    class Pools(Model):
        def forward(self, ids):
            return self.head(self.encoder.pooled(ids))

    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)

        @torch.no_grad()
        def encode_image(self, x):
            return self.linear(x)

        def forward(self, x):
            return self.encode_image(x).sum(1)

    told = torchcache.explain(Pools(torchcache.mark(Encoder(), freeze=True)), IDS)
    assert [region.name for region in told.regions] == ["encoder (Encoder)"]
    body = torchcache.mark(Embeds(), freeze=True)
    told = torchcache.explain(lambda x: body.encode_image(x), torch.randn(3, 5))
    assert (told.regions, told.left_out) == ([], [])  # no model was given that has the mark

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torchcache.mark(Embeds(), freeze=True)

        def forward(self, x):
            return self.body.encode_image(x)

    (part,) = torchcache.explain(Outer(), torch.randn(3, 5)).left_out
    assert (part.name, part.kind) == ("body (Embeds)", "not called")
    assert "method='encode_image'" in part.reason
    outer = Outer()
    torchcache.mark(outer.body, method="encode_image")
    told = torchcache.explain(outer, torch.randn(3, 5))
    assert [region.name for region in told.regions] == ["body (Embeds).encode_image"]


def test_marks_that_are_nested_disabled_or_never_called_are_told():
    class Parts(Model):
        def __init__(self):
            super().__init__(torchcache.mark(Encoder(), freeze=True))
            torchcache.mark(self.encoder.blocks[1])
            self.off = torchcache.mark(nn.Linear(2, 2), freeze=True, enabled=False)
            self.spare = torchcache.mark(nn.Linear(2, 2), freeze=True)

        def forward(self, ids):
            return self.off(super().forward(ids))

    told = torchcache.explain(Parts(), IDS)
    assert [region.name for region in told.regions] == ["encoder (Encoder)"]
    assert {part.name: part.kind for part in told.left_out} == {
        "encoder.blocks.1 (TransformerEncoderLayer)": "nested",
        "off (Linear)": "disabled",
        "spare (Linear)": "not called",
    }
    assert "encoder (Encoder)" in next(part.reason for part in told.left_out if part.kind == "nested")


def test_functions_are_explained():
    @torchcache.torchcache
    def double(x):
        return x * 2

    (region,) = torchcache.explain(double, torch.randn(4, 3)).regions
    assert region.name.endswith("double")
    assert (region.row_bytes, region.state_bytes, region.mode) == (12, 0, "")


def test_an_error_of_the_model_is_its_own_and_leaves_nothing_behind():
    model = Model(torchcache.mark(Encoder(), freeze=True))
    with pytest.raises(IndexError):
        torchcache.explain(model, IDS + 1000)
    model(IDS)
    assert torchcache.stats(model).misses == 4


def test_names_with_brackets_are_shown_as_they_are():
    holder = nn.ModuleDict({"<b>[red]": torchcache.mark(nn.Linear(4, 8), freeze=True)})

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = holder

        def forward(self, x):
            return self.parts["<b>[red]"](x)

    assert "<b>[red]" in str(torchcache.explain(Holder(), torch.randn(3, 4)))


def test_an_explainer_answers_every_marked_call_and_no_other():
    model = Model(torchcache.mark(Encoder(), freeze=True))
    seen = []

    def answer(region, given):
        seen.append(region.name)
        return given.run()

    with explaining(answer):
        model(IDS)
    model(IDS)
    assert len(seen) == 1
    assert torchcache.stats(model).misses == 4


@pytest.mark.parametrize(("length", "is_said"), [(8, False), (800, True)])
def test_of_large_rows_it_is_said_how_fewer_bytes_are_stored(length, is_said):
    """As marks on both do then: on the model that holds the head, or on what the head reads."""
    ids, model = torch.arange(4 * length).reshape(4, length) % 30, Model(Encoder().requires_grad_(False))
    torchcache.mark(model.encoder)
    said = torchcache.explain(model, ids)
    assert said.regions[0].row_bytes == length * 8 * 4
    assert ("mark the model that holds both" in " ".join(str(said).split())) == is_said
    torchcache.unmark(model.encoder)
    torchcache.mark(model)
    said = torchcache.explain(model, ids)
    assert said.regions[0].row_bytes == 8 * 4
    assert "holds both" not in str(said)
