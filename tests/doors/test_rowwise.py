"""Rows that depend on each other: refused by name before any is served, and never served where it shows later."""

import contextlib
import copy
import inspect
import re
import time

import pytest
import torch
from marked import counts, reasons, unmarked
from torch import nn

import torchcache
from torchcache.checks import patience

DOORS = {
    "eager": lambda model: model,
    "transform": torchcache.transform,
    "compile": lambda model: torch.compile(model, backend="torchcache", options={"inner": "eager"}),
}


class Backbone(nn.Module):
    """A frozen stem before the part under test."""

    def __init__(self, part):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.part = part

    def forward(self, x, *others):
        return self.part(self.stem(x), *others)


class Net(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.backbone = Backbone(part)

    def forward(self, *inputs):
        return self.backbone(*inputs) * 2


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        return self.norm(x).relu()


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Gram(nn.Module):
    def forward(self, x):
        return (x @ x.T).sum(1, keepdim=True) * x


class Ranked(nn.Module):
    def forward(self, x):
        return x.softmax(0).relu()


class Shuffled(nn.Module):
    def forward(self, x):
        return x.T.contiguous().cumsum(1).flip(1).T.contiguous()


computed = []


LIBRARY = torch.library.Library("torchcache_tests", "FRAGMENT")
LIBRARY.define("cosh(Tensor x) -> Tensor")


def cosh(x):
    computed.append(len(x))
    return x.cosh()


# Past the way that Python code goes by: what it writes is not to count.
LIBRARY.m.impl("cosh", "CompositeExplicitAutograd", cosh, False)


@torch.library.register_fake("torchcache_tests::cosh", lib=LIBRARY)
def fake_cosh(x):
    return torch.empty_like(x)


class Curved(nn.Module):
    def forward(self, x):
        return torch.ops.torchcache_tests.cosh(x)


class Nudged(nn.Module):
    def forward(self, x):
        return x + 1e-3 * x.mean(0)


class Shares(nn.Module):
    def forward(self, x):
        return x.tanh() / x.shape[0]


class Late(nn.Module):
    """Normalises over the batch from a length, or a size of values, on."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        mixes = x.shape[1] > 4 if self.what == "length" else x.abs().max() > 50
        return x - x.mean(0) if mixes else x * 2


MIXING = {Normed: "batch_norm", Centred: "mean", Gram: "matmul", Ranked: "softmax"}


def opened(part, door, **options):
    model = Net(part()).eval().requires_grad_(False)
    twin = copy.deepcopy(model)
    torchcache.mark(model.backbone, **{"audit": 0, **options})
    return DOORS[door](model), model, twin


def refused(run, *inputs):
    with pytest.raises(torchcache.RowwiseError) as caught:
        run(*inputs)
    return str(caught.value)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("part", MIXING)
def test_what_mixes_rows_is_named_with_its_line_and_module(part, door):
    run, model, _ = opened(part, door)
    text = refused(run, torch.randn(6, 4))
    assert text.startswith(("Backbone cannot", "backbone (Backbone) cannot"))
    assert "other rows" in text
    if part is Normed:
        assert "`batch_norm` in part.norm" in text
    else:
        line = inspect.getsourcelines(part.forward)[1] + 1
        where = re.escape(f"part, a {part.__name__} ({__file__}:{line})")
        assert re.search(rf"`{MIXING[part]}` in (backbone\.)?{where}", text)
    assert torchcache.stats(model).hits == 0


@pytest.mark.parametrize("door", DOORS)
def test_rows_that_mix_where_they_are_not_first_give_the_list_of_likely_culprits(door):
    run, _, _ = opened(Shuffled, door)
    assert "Likely: BatchNorm" in refused(run, torch.randn(6, 4))


@pytest.mark.parametrize("door", DOORS)
def test_rows_that_differ_by_little_are_named_as_well(door):
    run, _, _ = opened(Nudged, door)
    assert "`mean`" in refused(run, torch.randn(6, 4))


FORWARDS = {
    "matmul of the batch": lambda x: x @ x.t() @ x,
    "cumulated": lambda x: x.cumsum(0),
    "neighbour": lambda x: x.roll(1, 0),
    "differences": lambda x: torch.cat([x[:1], x[1:] - x[:-1]]),
    "sorted": lambda x: x.sort(0).values,
    "the first row": lambda x: x - x[:1],
    "the last row": lambda x: x * x[-1:],
    "maximum": lambda x: x / x.abs().max(),
    "attention over the batch": lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "experts with a capacity": lambda x: x * (torch.arange(len(x)) < 3)[:, None],
}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("rows", [2, 3, 6])
def test_functions_that_mix_rows_are_never_served_wrongly(name, rows):
    torch.manual_seed(0)
    features = torchcache.torchcache(audit=0)(FORWARDS[name])
    seen = []
    for _ in range(4):
        x = torch.randn(rows, 5)
        for batch in (x, x, x[: rows - 1], x.flip(0)):
            try:
                torch.testing.assert_close(features(batch), FORWARDS[name](batch))
            except torchcache.RowwiseError:
                seen.append(len(batch))
    assert name in ("sorted", "experts with a capacity") or seen
    assert torchcache.stats(features).hits == 0 or (name == "experts with a capacity" and rows < 4)


class Stateful(nn.Module):
    """Takes what an LSTM gives: its states have their rows along the second dimension."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, tokens, hidden, cells):
        return self.linear(tokens[:, -1] + hidden[0]) + cells[0]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rows", [2, 3, 6])
def test_arguments_with_their_rows_elsewhere_are_computed(rows, layers):
    plain = Stateful().eval()
    cached = torchcache.mark(copy.deepcopy(plain), freeze=True)
    for _ in range(3):
        states = torch.randn(layers, rows, 4), torch.randn(layers, rows, 4)
        inputs = (torch.randn(rows, 5, 4), *states)
        for _ in range(2):
            torch.testing.assert_close(cached(*inputs), plain(*inputs))
    assert counts(cached)[0] == 0
    assert torchcache.stats(cached).bypasses == 6 * rows


@pytest.mark.parametrize("door", ["eager", "transform"])
def test_a_head_on_a_frozen_recurrent_net_trains(door):
    torch.manual_seed(0)
    scan = nn.LSTM(4, 4, batch_first=True).requires_grad_(False)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.scan, self.between, self.head = scan, nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2)

        def forward(self, x):
            tokens, (hidden, _) = self.scan(x)
            return self.head(self.between(tokens[:, -1] + hidden[0]))

    model = torchcache.mark(Reader())
    run = DOORS[door](model)
    x = torch.randn(6, 5, 4)
    for _ in range(3):
        tokens, (hidden, _) = scan(x)
        torch.testing.assert_close(run(x), model.head(model.between(tokens[:, -1] + hidden[0])))


@pytest.mark.parametrize("door", DOORS)
def test_rows_of_a_batch_of_one_are_not_trusted_before_more_are_seen(door):
    run, model, twin = opened(Shares, door)
    x = torch.randn(6, 4)
    refusals = []
    for rows in (*(x[row : row + 1] for row in range(6)), x, x[:3]):
        try:
            torch.testing.assert_close(run(rows), twin(rows))
        except torchcache.RowwiseError:
            refusals.append(len(rows))
    assert 6 in refusals or refusals[:1] == [1]
    assert torchcache.stats(model).hits == 0


@pytest.mark.parametrize("first", [torch.zeros(6, 4), torch.ones(1, 4), torch.randn(1, 4).expand(6, 4)])
def test_rows_that_are_alike_prove_nothing(first):
    run, model, twin = opened(Centred, "eager")
    for batch in (first, first, torch.randn(6, 4)):
        with contextlib.suppress(torchcache.RowwiseError):
            torch.testing.assert_close(run(batch), twin(batch))
    assert counts(model) == (0, 0)


@pytest.mark.parametrize("door", DOORS)
def test_batches_of_one_are_cached_and_share_rows_with_larger_ones(door):
    run, model, _ = opened(Curved, door)
    x = torch.randn(6, 4)
    for _ in range(2):
        run(x[:1])
    run(x)
    misses = torchcache.stats(model).misses
    for row in range(6):
        run(x[row : row + 1])
    stats = torchcache.stats(model)
    assert (stats.misses, stats.hits >= 6) == (misses, True)


@pytest.mark.parametrize("door", ["eager", "transform"])
def test_rows_that_begin_to_mix_with_their_length_are_computed(door, warnings):
    run, model, twin = opened(lambda: Late("length"), door)
    model.backbone.stem = twin.backbone.stem = nn.Identity()
    for length in (3, 6, 3, 6, 6):
        x = torch.randn(5, length)
        torch.testing.assert_close(run(x), twin(x))
        torch.testing.assert_close(run(x[:3]), twin(x[:3]))
    assert counts(model) == (5, 3)  # the first rows, before it was known
    assert "other rows" in reasons(model)
    assert len(warnings) == 1


def test_rows_that_begin_to_mix_with_their_values_are_computed(warnings):
    run, model, twin = opened(lambda: Late("values"), "eager")
    model.backbone.stem = twin.backbone.stem = nn.Identity()
    x = torch.randn(6, 4)
    large = 100 * torch.randn(6, 4).sign()
    for given in (x, x, large, large[:3], large + 1, x):
        torch.testing.assert_close(run(given), twin(given))
    assert "other rows" in reasons(model)
    assert counts(model) == (6, 6)
    assert len(warnings) == 1


@pytest.mark.parametrize("door", DOORS)
def test_checks_of_new_rows_cost_a_few_calls_of_two_or_three(door):
    run, _, twin = opened(Curved, door)
    data = [torch.randn(6, 4) for _ in range(3)]
    twin(data[0])  # torch.ops changes when an operator is first used
    computed.clear()
    for inputs in (*data, *data):
        run(inputs)
    assert sorted(computed[:7]) == [2, 2, 2, 2, 2, 3, 6]  # three to learn, and three for rows that are farthest apart
    assert sorted(computed)[-3:] == [6, 6, 6]
    assert all(rows <= 3 for rows in sorted(computed)[:-3])
    assert len(computed) <= 7 + 2 * 7  # of later calls, two rows that are unlike all before


def test_what_all_rows_share_is_told_from_rows_of_the_same_number():
    def contrast(x, y):
        return (x @ y.t()).logsumexp(1)

    features, y = torchcache.torchcache(audit=0)(contrast), torch.randn(6, 4)
    for _ in range(3):
        x = torch.randn(6, 4)
        for _ in range(2):
            torch.testing.assert_close(features(x, y), contrast(x, y))
            torch.testing.assert_close(features(x[:4], y), contrast(x[:4], y))
            torch.testing.assert_close(features(x, y.flip(0)), contrast(x, y.flip(0)))
    assert torchcache.stats(features).hits >= 3 * (4 + 16)


class Longest(nn.Module):
    """Returns a number that all rows have a say in, as code before ``pad_packed_sequence`` does."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how

    def forward(self, x, lengths):
        ways = {
            "int": lambda: int(lengths.max()),
            "item": lambda: lengths.max().item(),
            "bool": lambda: bool((lengths < 3).any()),
            "tolist": lambda: max(lengths.tolist()),
            "numpy": lambda: float(lengths.numpy().max()),
            "text": lambda: f"up to {int(lengths.max())}",
            "key": lambda: {int(lengths.max()): x * 2},
            "found": lambda: len(lengths[lengths > 3]),
        }
        return self.linear(x) * lengths[:, None], ways[self.how]()


@pytest.mark.parametrize("how", ["int", "item", "bool", "tolist", "numpy", "text", "key", "found"])
def test_a_number_that_follows_from_all_rows_is_theirs(how):
    plain = Longest(how).requires_grad_(False)
    module = torchcache.mark(copy.deepcopy(plain), audit=0)
    x, alike, mixed = torch.randn(8, 4), torch.full((8,), 5), torch.tensor([5, 3, 3, 2, 5, 3, 3, 2])
    for lengths, rows in ((alike, range(8)), (mixed, range(8)), (mixed, [1, 2, 5, 6]), (mixed, [3, 7])):
        (found, said), (expected, wanted) = module(x[[*rows]], lengths[[*rows]]), plain(x[[*rows]], lengths[[*rows]])
        torch.testing.assert_close(found, expected)
        assert str(said) == str(wanted)
    assert counts(module) == (0, 0)


class Sized(nn.Module):
    """Looks rows up in a table by their numbers, and returns a size and a name."""

    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), nn.Parameter(torch.randn(9, 4))

    def forward(self, x, ids):
        y = self.linear(x) + self.table[ids] + self.table[ids, 0][:, None] + self.table.index_select(0, ids)
        return {"features": y, "width": y.shape[1], "name": "sized", "none": None}


def test_a_number_that_follows_from_sizes_is_stored():
    plain = Sized().requires_grad_(False)
    module = torchcache.mark(copy.deepcopy(plain), audit=0)
    x, ids = torch.randn(8, 4), torch.randint(0, 9, (8,))
    for rows in (range(8), [1, 2], [7, 0, 3]):
        found, expected = module(x[[*rows]], ids[[*rows]]), plain(x[[*rows]], ids[[*rows]])
        torch.testing.assert_close(found.pop("features"), expected.pop("features"))
        assert found == expected
    assert counts(module) == (8, 5)


class Labelled(nn.Module):
    """Returns a text that comes from where nobody looks."""

    def __init__(self, file):
        super().__init__()
        self.linear, self.file = nn.Linear(4, 4), str(file)

    def forward(self, x):
        with open(self.file) as file:
            return self.linear(x), file.read()


def test_audits_compare_what_an_output_says(tmp_path):
    file = tmp_path / "unit"
    file.write_text("metres")
    module, x = torchcache.mark(Labelled(file), freeze=True, audit=0.5), torch.randn(8, 4)
    for _ in range(3):
        assert module(x)[1] == "metres"
    file.write_text("feet")
    assert any(module(x)[1] == "feet" for _ in range(300))
    assert torchcache.stats(module).regions[0].alarms == 1
    assert module(x)[1] == "feet"


class Pooled(nn.Module):
    """An output with rows, and one of all rows' patches in a row."""

    def forward(self, x):
        return {"scores": x.mean((1, 2)), "patches": x.flatten(0, 1)}


def test_the_output_that_has_no_rows_is_named():
    module = torchcache.mark(Pooled())
    with torch.no_grad():
        module(torch.randn(2, 3, 4))
    assert "'patches' has shape (6, 4) for 2 rows" in str(reasons(module))


class Squeezed(nn.Module):
    """Scores whose dimensions of one are dropped, that of a batch of one as well."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x):
        return {"score": self.linear(x).squeeze(), "x": x * 2}


@pytest.mark.parametrize("first", [8, 1])
def test_a_batch_of_one_that_comes_out_otherwise_is_computed_and_others_are_served(first, warnings):
    plain = Squeezed().requires_grad_(False)
    module, x = torchcache.mark(copy.deepcopy(plain), audit=0.5), torch.randn(17, 4)
    batches = [*x[:16].split(first), *x[:16].split(8), x[16:], *x[:16].split(1), *x[:16].split(5), x]
    for batch in batches * 2:
        found, expected = module(batch), plain(batch)
        torch.testing.assert_close(found, expected)
    assert torchcache.stats(module).regions[0].alarms == 0
    assert torchcache.stats(module).hits > 64
    (said,) = [text for text in warnings if "a batch of one row" in text]
    assert "squeeze(-1)" in said


class Doubled(nn.Module):
    """An output of one row alone has other values."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * (2 if len(x) == 1 else 1)


@pytest.mark.parametrize("first", [8, 1])
def test_a_row_alone_of_other_values_is_not_served_and_stored_for_no_batch(first):
    plain = Doubled().requires_grad_(False)
    module, x = torchcache.mark(copy.deepcopy(plain), audit=0), torch.randn(16, 4)
    for batch in (*x.split(first), *x.split(8), *x.split(1), *x[1:].split(3), *x.flip(0).split(5)):
        torch.testing.assert_close(module(batch), plain(batch))
    assert torchcache.stats(module).hits > 0


class Widened(nn.Module):
    """Numbers of a wider kind than they are computed in."""

    def __init__(self, narrow, wide):
        super().__init__()
        self.linear, self.narrow, self.wide = nn.Linear(64, 7), narrow, wide

    def forward(self, x):
        return self.linear(x).to(self.narrow).to(self.wide).sum(-1)


@pytest.mark.parametrize(
    ("narrow", "wide"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=["double", "bfloat16"]
)
def test_rounding_is_that_of_the_numbers_that_are_computed_with(narrow, wide, warnings):
    module, x = torchcache.mark(Widened(narrow, wide).requires_grad_(False), audit=0.5), torch.randn(40, 64)
    for size in (1, 2, 3, 4, 5, 6, 7) * 3:
        for rows in torch.randperm(40).split(size):
            module(x[rows])
    assert torchcache.stats(module).regions[0].alarms == 0
    assert counts(module) == (40, 20 * 40)
    assert not [text for text in warnings if "cached wrongly" in text]


def test_arguments_that_are_alike_do_not_hide_why_calls_are_computed(warnings):
    class Similar(nn.Module):
        def forward(self, x, flag):
            return {"logits": x @ x.T, "flag": flag * 2}

    module = torchcache.mark(Similar())
    for _ in range(2):
        module(torch.randn(5, 4), torch.zeros(5, 1))
    assert ["'logits' has shape (5, 5) for 5 rows" in text for text in warnings].count(True) == 1


class Inner(nn.Module):
    """A part that is compiled, beside one that is not."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.compiled = torch.compile(self.second, backend=self._backend, fullgraph=True)
        self.runs = []

    def _backend(self, graph, inputs):
        def run(*given):
            self.runs.append(len(given))
            return graph(*given)

        return run

    def forward(self, x):
        return self.compiled(self.first(x))


def test_a_probe_leaves_compiled_code_compiled():
    torch.compiler.reset()
    plain = Inner().requires_grad_(False)
    module, x = torchcache.mark(plain, pure=True, audit=0), torch.randn(12, 4)
    for size in (4, 3, 2, 5):
        for rows in x.split(size):
            module(rows)
    plain.runs.clear()
    with torchcache.bypass():
        for size in (4, 3, 2, 5):
            torch.testing.assert_close(module(x[:size]), plain.second(plain.first(x[:size])))
    assert len(plain.runs) == 4


class Stray(nn.Module):
    """Numbers of float32, and zeros of float16."""

    def __init__(self, file):
        super().__init__()
        self.linear, self.file = nn.Linear(4, 4), str(file)

    def forward(self, x):
        with open(self.file) as file:
            scale = float(file.read())
        return self.linear(x) * scale + torch.zeros(len(x), 1, dtype=torch.float16).float()


def test_numbers_that_are_made_of_none_are_not_rounded(tmp_path):
    file = tmp_path / "scale"
    file.write_text("1.0")
    module, x = torchcache.mark(Stray(file), freeze=True, audit=0.5), torch.randn(8, 4)
    for _ in range(3):
        module(x)
    file.write_text("1.003")
    for _ in range(300):
        module(x)
    assert torchcache.stats(module).regions[0].alarms == 1


class Recording(nn.Module):
    """One row alone has other values where gradients are recorded."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) + (1 if len(x) == 1 and torch.is_grad_enabled() else 0)


def test_a_row_alone_is_looked_at_in_both_grad_modes():
    plain = Recording().requires_grad_(False)
    module, x = torchcache.mark(copy.deepcopy(plain), audit=0), torch.randn(8, 4)
    for enabled in (False, True, False, True):
        with torch.set_grad_enabled(enabled):
            for batch in (*x.split(1), *x.split(4), *x.split(1)):
                torch.testing.assert_close(module(batch), plain(batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_mix_are_found_in_two_bytes(dtype):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            y = self.linear(x)
            return y + 0.3 * y.mean(0)

    module = torchcache.mark(Mixed().to(dtype), freeze=True, audit=0)
    with pytest.raises(torchcache.RowwiseError, match="changes with the other rows"):
        module(torch.randn(8, 16).to(dtype))


class Messages(nn.Module):
    """Adds to each node what its edge leads from; notes how many nodes it is given."""

    def __init__(self):
        super().__init__()
        self.linear, self.counts = nn.Linear(4, 4), []
        self.register_buffer("kept", torch.randperm(20))

    def forward(self, x, sources=None):
        self.counts.append(len(x))
        x = self.linear(x)
        return x + x[self.kept if sources is None else sources]


@pytest.mark.parametrize("given", [(), (torch.randperm(20),)], ids=["buffer", "argument"])
def test_a_graph_is_computed_and_not_tried_on_fewer_nodes_than_its_edges_name(given, warnings):
    twin = Messages()
    module = torchcache.mark(copy.deepcopy(twin), freeze=True, pure=True)
    for _ in range(4):
        x = torch.randn(20, 4)
        torch.testing.assert_close(module(x, *given), twin(x, *given))
    assert set(module.counts) == {20}
    assert torchcache.stats(module).hits == 0
    assert any("numbers that it is given point at" in text for text in warnings)


class Positions(nn.Module):
    """Adds what stands at positions, which all rows share."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 4)

    def forward(self, x, positions):
        return x + self.table(positions)


def test_positions_that_could_be_rows_are_none():
    module = torchcache.mark(Positions(), freeze=True, audit=0)
    x, positions = torch.randn(20, 12, 4), torch.arange(12)
    for _ in range(3):
        torch.testing.assert_close(module(x, positions), x + module.table(positions))
    assert torchcache.stats(module).hits == 40


class Waiting(nn.Module):
    """Goes over its rows until it met as many as it is told, or its patience ends."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, count):
        done, began = 0, time.monotonic()
        while done < count and time.monotonic() - began < 1:
            done += len(x[done : done + 4])
        return self.linear(x)


def test_checks_that_do_not_end_are_told_of_while_they_run(warnings, monkeypatch):
    monkeypatch.setattr(patience, "LONG", 0.2)
    module, x = torchcache.mark(Waiting(), freeze=True, audit=0), torch.randn(8, 4)
    module(x, 8)
    assert any("is tried on a few of its rows, for" in text for text in warnings)


class Experts(nn.Module):
    """Sends each row to an expert, which has room for so many rows."""

    def __init__(self, room):
        super().__init__()
        self.router, self.room = nn.Linear(6, 4), room
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))


class ByNumbers(Experts):
    def forward(self, x):
        chosen, out = self.router(x).argmax(-1), x.clone()
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0][: self.room]
            out[rows] = out[rows] + expert(x[rows])
        return out


class ByMask(Experts):
    def forward(self, x):
        chosen = nn.functional.one_hot(self.router(x).argmax(-1), 4)
        if self.room is not None:
            chosen = chosen * (chosen.cumsum(0) <= self.room)
        return x + sum(expert(x) * chosen[:, [number]] for number, expert in enumerate(self.experts))


class BySorting(Experts):
    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        order = chosen.argsort(stable=True)
        starts = torch.bincount(chosen, minlength=4).cumsum(0).roll(1).index_fill(0, torch.tensor(0), 0)
        place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(x))) - starts[chosen]
        made = torch.stack([expert(x) for expert in self.experts])[chosen, torch.arange(len(x))]
        return x + made if self.room is None else torch.where((place < self.room)[:, None], x + made, x)


@pytest.mark.parametrize("kind", [ByNumbers, ByMask, BySorting])
def test_experts_with_room_for_some_rows_are_refused_before_any_of_them_is_full(kind):
    module = torchcache.mark(kind(8), freeze=True)
    with torch.no_grad():  # no expert is full in the first batch
        rows = torch.randn(1000, 6)
        chosen = module.router(rows).argmax(-1)
        first = torch.cat([rows[chosen == number][:4] for number in range(4)])
    with pytest.raises(torchcache.RowwiseError, match="changes with the other rows"):
        module(first)


@pytest.mark.parametrize("kind", [ByNumbers, ByMask, BySorting])
def test_experts_with_room_for_all_rows_are_cached(kind):
    module = torchcache.mark(kind(None), freeze=True)
    plain, data = unmarked(module), torch.randn(40, 6)
    for _ in range(3):
        for rows in data[torch.randperm(40)].split(16):
            torch.testing.assert_close(module(rows), plain(rows))
    assert torchcache.stats(module).hits == 80
