"""What is stored of a partly trainable mark: the values of fewest bytes from which the rest is cheap to compute."""

import copy

import pytest
import torch
from test_partly import DOORS, assert_trains_the_same, opened
from torch import nn

import torchcache
from torchcache import dynamo

# Older releases cannot trace this attention for any number of rows, and what follows it is computed.
pytestmark = pytest.mark.skipif(not dynamo.names_parts(), reason="needs torch 2.10 or newer")

WIDTH, LENGTH, ROWS = 16, 5, 6
HIDDEN = LENGTH * WIDTH * 4  # bytes a row of one state between blocks


class Attention(nn.Module):
    """Attention over tokens, with a mask made from the arguments."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, tokens, mask):
        normed = self.norm(tokens)
        found = nn.functional.scaled_dot_product_attention(
            self.query(normed), self.key(normed), self.value(normed), attn_mask=mask
        )
        return tokens + self.out(found)


class Blocks(nn.Module):
    """Frozen blocks, and a last one of which a part trains."""

    def __init__(self, depth=8):
        super().__init__()
        self.words = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(Attention() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 3)
        self.requires_grad_(False)
        self.head.requires_grad_(True)

    def forward(self, ids, mask):
        hidden = self.words(ids)
        mask = mask[:, None, :].expand(-1, LENGTH, -1).bool()
        for block in self.blocks:
            hidden = self.between(block(hidden, mask))
        return self.head(hidden.mean(1))

    def between(self, hidden):
        return hidden


def trains(part):
    """Blocks whose last block trains one linear layer."""

    def make():
        net = Blocks()
        getattr(net.blocks[-1], part).requires_grad_(True)
        return net

    return make


class Deep(Blocks):
    """The last frozen value is read twice, by light operators."""

    def between(self, hidden):
        return nn.functional.gelu(hidden) * 0.5 + hidden


class Half(Blocks):
    """Blocks under autocast, inside of the mark."""

    def forward(self, ids, mask):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(ids, mask).float()


class Writing(Blocks):
    """Writes in place to what is read later."""

    def between(self, hidden):
        kept = hidden.relu()
        hidden.mul_(0.5)
        return hidden + kept


class Two(Blocks):
    """Two values of other sizes are read: of one, what is smaller follows."""

    def forward(self, ids, mask):
        hidden = self.words(ids)
        for block in self.blocks:
            hidden = block(hidden, mask[:, None, :].expand(-1, LENGTH, -1).bool())
        return self.head(hidden[:, 0]) + self.head(hidden.float().amax(1).tanh())


def made(kind, seed=0):
    torch.manual_seed(seed)
    net = kind()
    return net.train(), copy.deepcopy(net)


def batch(count=ROWS, seed=0):
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (count, LENGTH), generator=chance)
    mask = (torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (count, 1), generator=chance)).long()
    return ids, mask


def bytes_a_row(model):
    regions = torchcache.stats(model).regions
    return sum(region.memory_bytes for region in regions) / sum(region.misses for region in regions)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (trains("query"), HIDDEN),
        (trains("value"), HIDDEN),
        (trains("norm"), HIDDEN),
        (trains("out"), 2 * HIDDEN),  # the attention and what it is added to
        (Blocks, WIDTH * 4),  # the mean is the smallest
        (Deep, WIDTH * 4),
        (Half, WIDTH * 4),
        (Writing, WIDTH * 4),
        (Two, 2 * WIDTH * 4),
    ],
)
def test_the_fewest_bytes_are_stored_and_it_trains_the_same(door, kind, size):
    net, twin = made(kind)
    model = torchcache.mark(net, audit=0)
    run = opened(door, model)
    for seed in (0, 1, 0):
        assert_trains_the_same(run, model, twin, batch(seed=seed))
    stats = torchcache.stats(model)
    assert (stats.misses, stats.hits, stats.bypasses) == (2 * ROWS, ROWS, 0)
    assert bytes_a_row(model) == size


@pytest.mark.parametrize("door", DOORS)
def test_products_are_done_again_only_where_that_is_little_of_the_work(door):
    net, twin = made(lambda: Blocks(depth=2))
    for each in (net, twin):
        each.blocks[-1].query.requires_grad_(True)
    model = torchcache.mark(net, audit=0)
    run = opened(door, model)
    for _ in range(2):
        assert_trains_the_same(run, model, twin, batch())
    assert bytes_a_row(model) == 3 * HIDDEN  # the state, key and value; its norm is done again


def test_frozen_weights_of_what_is_computed_again_may_change():
    """They are no part of what is stored: rows that were stored before are found, and are right."""
    net, twin = made(trains("query"))
    model = torchcache.mark(net, audit=0)
    assert_trains_the_same(model, model, twin, batch())
    for each in (model, twin):
        with torch.no_grad():
            each.blocks[-1].key.weight.mul_(3)
            each.blocks[-1].norm.bias.add_(1)
    assert_trains_the_same(model, model, twin, batch())
    assert torchcache.stats(model).hits == ROWS
    for each in (model, twin):
        with torch.no_grad():
            each.blocks[0].key.weight.mul_(3)
    assert_trains_the_same(model, model, twin, batch())
    assert torchcache.stats(model).hits == ROWS


def test_it_is_found_again_in_batches_of_any_size():
    net, twin = made(trains("value"))
    model = torchcache.mark(net, audit=0)
    ids, mask = batch(12)
    for rows in (range(6), range(6, 12), range(12), [3, 7], [11, 0, 0, 5]):
        assert_trains_the_same(model, model, twin, (ids[[*rows]], mask[[*rows]]))
    assert torchcache.stats(model).misses == 12


class Tokens(nn.Module):
    """A frozen backbone: tokens of images, and what else such models return."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.body = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.requires_grad_(False).eval()

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return {"tokens": tokens + self.body(tokens), "map": tokens}


class Probe(nn.Module):
    """A head, and the way from tokens to what it reads; backbones are no part of what trains."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Tokens(), nn.Linear(WIDTH, 3)

    def forward(self, images, mask):
        return self.head(self.read(self.backbone(images)["tokens"], mask))

    def read(self, tokens, mask):
        return tokens[:, 0]


class Normalized(Probe):
    def read(self, tokens, mask):
        return nn.functional.normalize(tokens.amax(1), dim=-1)


class Masked(Probe):
    def read(self, tokens, mask):
        weight = mask[..., None].to(tokens.dtype)
        return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


class Prepared(Probe):
    """From bytes to floats inside, and in half precision behind."""

    def forward(self, images, mask):
        images = (images * 20 + 128).to(torch.uint8).float().div(255).sub(0.5).mul(4)
        return self.head(self.backbone(images)["tokens"].mean(1).half().float())


class Both(Probe):
    def __init__(self):
        super().__init__()
        self.other, self.head = Tokens(8), nn.Linear(WIDTH + 8, 3)

    def forward(self, images, mask):
        return self.head(torch.cat([self.backbone(images)["tokens"][:, 0], self.other(images)["tokens"].mean(1)], 1))


@pytest.mark.parametrize("kind", [Probe, Normalized, Masked, Prepared, Both])
def test_the_mark_may_hold_backbone_and_head(kind):
    """What follows the backbone is part of the region; its rows are the same through all doors."""
    net, twin = made(kind)
    model = torchcache.mark(net, audit=0)
    images, mask = torch.randn(9, 3, 8, 8), torch.rand(9, 4) > 0.3
    for door in [*DOORS, "transform"]:
        run = opened(door, model)
        for rows in (range(6), [7, 3, 8], [5, 5, 0], range(9)):
            assert_trains_the_same(run, model, twin, (images[[*rows]], mask[[*rows]]))
    stats = torchcache.stats(model)
    assert (stats.misses, stats.bypasses) == (9, 0)
    size = {Prepared: 2, Both: 6}.get(kind, 4) * WIDTH
    assert bytes_a_row(model) == size


class Neck(Probe):
    """A frozen part between backbone and head."""

    def __init__(self):
        super().__init__()
        self.neck = nn.Linear(WIDTH, 2 * WIDTH).requires_grad_(False)
        self.head = nn.Linear(2 * WIDTH, 3)

    def read(self, tokens, mask):
        return torch.tanh(self.neck(tokens.mean(1)))


@pytest.mark.parametrize("door", [*DOORS, "transform"])
@pytest.mark.parametrize("kind", [Probe, Neck])
def test_a_mark_inside_a_mark_is_looked_up_by_itself(door, kind, warnings):
    net, twin = made(kind)
    torchcache.mark(net.backbone, audit=0)
    model = torchcache.mark(net, audit=0)
    run, images, mask = opened(door, model), torch.randn(9, 3, 8, 8), torch.rand(9, 4) > 0.3
    for rows in (range(6), [7, 3, 8], [5, 5, 0], range(9)):
        assert_trains_the_same(run, model, twin, (images[[*rows]], mask[[*rows]]))
    found = [region for region in torchcache.stats(model).regions if region.misses]
    assert [region.misses for region in found] == [9] * (2 if kind is Neck else 1)
    assert any("unmark" in text for text in warnings) == (kind is Probe)


class Apart(nn.Module):
    """How far the rows of a batch are from each other, as a contrastive loss reads it."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = nn.Linear(WIDTH, 64).requires_grad_(False), nn.Parameter(torch.ones(3))

    def forward(self, x):
        found = torch.tanh(self.body(x))
        apart = (found[:, None] - found[None]).square().sum(-1)
        return apart.mean(1, keepdim=True) * self.scale


@pytest.mark.parametrize("first", [4, 70])
def test_no_row_holds_what_grows_with_the_batch(first):
    """However small that is in the batch that was traced."""
    net, twin = made(Apart)
    model, x = torchcache.mark(net, audit=0), torch.randn(70, WIDTH)
    for rows in (x[:first], x[:6], x):
        assert_trains_the_same(model, model, twin, [rows])
    assert torchcache.stats(model).bypasses == 0
    assert bytes_a_row(model) == 64 * 4


class Several(nn.Module):
    """Of each row several are made, or come: the trainable head gets them as a batch."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, 64).requires_grad_(False), nn.Linear(64, 3)

    def forward(self, x):
        found = self.head(torch.tanh(self.body(self.apart(x))))
        return self.together(found, len(x)).sum(1)

    def apart(self, x):
        return x.flatten(0, 1)

    def together(self, found, count):
        return found.unflatten(0, (count, -1))


class Turned(Several):
    """The first of each row come first."""

    def apart(self, x):
        return x.transpose(0, 1).reshape(-1, WIDTH)

    def together(self, found, count):
        return found.unflatten(0, (-1, count)).transpose(0, 1)


class Repeated(Turned):
    def apart(self, x):
        return x[:, 0].repeat(3, 1)


class Crops(Turned):
    def apart(self, x):
        return torch.cat([x[:, 0], x[:, 1], x[:, 0] * 2])


class Twice(Several):
    """Parts of parts, which meet within their row."""

    def apart(self, x):
        parts = x[:, :, None].expand(-1, -1, 2, -1).reshape(-1, 2, WIDTH)
        return (parts - parts.mean(1, keepdim=True) + parts[:, :1]).flatten(0, 1)


class Late(Several):
    """What is frozen ends where parts of different rows meet."""

    def forward(self, x):
        flat = torch.tanh(self.body(x)).flatten(0, 1)
        return self.together(self.head(flat + flat.roll(1, 0)), len(x)).sum(1)


class Chunked(Several):
    """Several tensors of one, as attention makes its queries, keys and values."""

    def forward(self, x):
        one, other = self.body(x.flatten(0, 1)).chunk(2, -1)
        return self.together(self.head(torch.cat([one.softmax(-1), other.square()], -1)), len(x)).sum(1)


class Shifted(Several):
    """Each part reads the one before it, which may be of another row."""

    def apart(self, x):
        flat = x.flatten(0, 1)
        return flat + flat.roll(1, 0)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (Several, 3 * 64 * 4),
        (Twice, 6 * 64 * 4),
        (Late, 3 * 64 * 4),
        (Chunked, 3 * 64 * 4),
        (Turned, None),
        (Repeated, None),
        (Crops, None),
        (Shifted, None),
    ],
)
def test_a_row_may_be_several_entries_of_a_batch(door, kind, size):
    """Those of one row beside each other; where they lie elsewhere, or rows meet, it is right all the same."""
    net, twin = made(kind)
    model = torchcache.mark(net, audit=0)
    run, x = opened(door, model), torch.randn(9, 3, WIDTH)
    for rows in (range(6), range(6), [7, 3, 8], [8, 2], [0, 1, 1, 5], range(9)):
        assert_trains_the_same(run, model, twin, [x[[*rows]]])
    if size is not None:
        stats = torchcache.stats(model)
        assert (stats.misses, stats.bypasses) == (9, 0)
        assert bytes_a_row(model) == size


class Mixes(nn.Module):
    """Its rows depend on each other in eval mode alone."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Linear(WIDTH, 3)
        self.out = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x):
        found = self.body(x)
        if not self.training:
            found = self.out(found - found.mean(0))
        return self.head(torch.tanh(found))


def test_rows_that_mix_in_another_mode_end_no_run(warnings):
    net, twin = made(Mixes)
    model, x = torchcache.mark(net, audit=0), torch.randn(6, WIDTH)
    for _ in range(2):
        model.train(), twin.train()
        assert_trains_the_same(model, model, twin, [x])
        model.eval(), twin.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(x), twin(x))
    assert torchcache.stats(model).hits >= 6


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.new_zeros((LENGTH, LENGTH)),
        lambda x: torch.ones_like(x[0, :, :LENGTH]),
        lambda x: x.new_full((LENGTH, LENGTH), 2.0),
    ],
)
def test_what_is_made_of_the_kind_of_rows_holds_none(make):
    """As the masks of shifted windows."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x):
            x = self.first(x).relu()
            mask = make(x)
            mask[2:] = 1.0
            return self.head(self.last(x + mask.sum(-1, keepdim=True)).mean(1))

    net = Masked().requires_grad_(False)
    net.head.requires_grad_(True)
    twin, model = copy.deepcopy(net), torchcache.mark(net, audit=0)
    x = torch.randn(ROWS, LENGTH, WIDTH)
    for _ in range(3):
        assert_trains_the_same(model, model, twin, [x])
    (region,) = torchcache.stats(model).regions
    assert region.memory_bytes <= 2 * ROWS * WIDTH * 4


def test_of_what_is_computed_beside_it_only_the_shape_is_read():
    """As decision transformers read that of the mask that they make."""

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
            self.places, self.head = nn.Embedding(4, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x, mask):
            twice = torch.stack((mask, mask), 1).reshape(len(x), -1)
            x = x + self.places(torch.zeros(twice.shape, dtype=torch.long))
            return self.head(self.body(x)).view(*twice.shape, 3).mean(1)

    net = Stacked().requires_grad_(False)
    net.head.requires_grad_(True)
    twin, model = copy.deepcopy(net), torchcache.mark(net, audit=0)
    x, mask = torch.randn(8, 6, WIDTH), torch.ones(8, 3)
    for _ in range(3):
        for some in (slice(0, 4), slice(4, 8)):
            assert_trains_the_same(model, model, twin, [x[some], mask[some]])
    assert torchcache.stats(model).hits >= 8
