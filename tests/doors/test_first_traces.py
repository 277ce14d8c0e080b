"""What a module sets up when it is first called, where that call is traced: nothing without data is left behind."""

import collections
import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torchcache

BACKENDS = ["eager", "aot_eager", "torchcache"]


def compiled(module, backend, **options):
    torch._dynamo.reset()
    if backend == "torchcache":
        options["options"] = {"inner": "eager"}
    return torch.compile(module, backend=backend, **options)


@functools.cache
def pair(n):
    return torch.linspace(-1, 1, n), torch.ones(n)


@functools.lru_cache(maxsize=4)
def listed(n):
    return [torch.linspace(-1, 1, n), {"ones": torch.ones(n)}]


PLAIN, LISTS, ROW, NESTED, QUEUE = {}, {}, [], {"tables": {}}, collections.deque()


def by_length(n):
    if n not in PLAIN:
        PLAIN[n] = torch.linspace(-1, 1, n)
    return PLAIN[n]


def in_lists(n):
    if n not in LISTS:
        LISTS[n] = {"cos": [torch.linspace(-1, 1, n)], "n": n}
    return LISTS[n]["cos"][0]


def in_a_row(n):
    while not ROW:
        ROW.append(torch.linspace(-1, 1, n)[None])
    return ROW[0][0]


def queued(n):
    if not QUEUE:
        QUEUE.append(torch.linspace(-1, 1, n))
    return QUEUE[0]


def nested(n):
    if n not in NESTED["tables"]:
        NESTED["tables"][n] = (torch.zeros(n), (torch.linspace(-1, 1, n), None))
    return NESTED["tables"][n][1][0]


class Tables:
    def __init__(self):
        self.one, self.all = None, {}

    def __call__(self, n):
        if self.one is None:
            self.one = torch.linspace(-1, 1, n)
        if n not in self.all:
            mask = torch.zeros(n)
            mask[: n // 2] = 1
            self.all[n] = mask.view(2, -1)
        return self.one + self.all[n].view(-1) - self.all[n].reshape(-1).clone()


class Slotted:
    __slots__ = ("table",)

    def __init__(self):
        self.table = None

    def __call__(self, n):
        if self.table is None:
            self.table = torch.linspace(-1, 1, n)
        return self.table


def in_a_cell():
    table = None

    def made(n):
        nonlocal table
        if table is None:
            table = torch.linspace(-1, 1, n)
        return table

    return made


WAYS = {
    "lru_cache": lambda: lambda n: pair(n)[0] + pair(n)[1] - 1,
    "lru_cache of lists": lambda: lambda n: listed(n)[0] + listed(n)[1]["ones"] - 1,
    "dict": lambda: by_length,
    "dict of dicts": lambda: in_lists,
    "list": lambda: in_a_row,
    "deque": lambda: queued,
    "dict in a dict": lambda: nested,
    "object": Tables,
    "slots": Slotted,
    "cell": in_a_cell,
}


class Encoder(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.linear, self.table = nn.Linear(8, 8), table

    def forward(self, x):
        return self.linear(x + self.table(x.shape[1]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_that_is_kept_anywhere_is_real(backend, way):
    pair.cache_clear(), listed.cache_clear(), NESTED["tables"].clear()
    for kept in (PLAIN, LISTS, ROW, QUEUE):
        kept.clear()
    table = WAYS[way]()
    module, other = torchcache.mark(Encoder(table), freeze=True, audit=0), Encoder(table)
    run, x = compiled(module, backend), torch.randn(4, 8)
    for one, answer in ((module, run), (module, run), (module, module), (other, other)):
        expected = nn.functional.linear(x + torch.linspace(-1, 1, 8), one.linear.weight, one.linear.bias)
        torch.testing.assert_close(answer(x), expected)
    assert torchcache.stats(module).hits == 8


class SetsUp(nn.Module):
    """What modules of libraries set up when they are first called."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("frequencies", torch.linspace(0, 1, 4), persistent=False)
        self.calls_to_come, self.ready, self.table = [], False, None

    def forward(self, x):
        self.set_up(x)
        return self.linear(x)


class Flag(SetsUp):
    def set_up(self, x):
        if not self.ready:
            self.ready = True


class Rotary(SetsUp):
    def set_up(self, x):
        if self.table is None or len(self.table) < x.shape[1]:
            angles = torch.outer(torch.arange(x.shape[1]), self.frequencies)
            self.table = torch.cat([angles.cos(), angles.sin()], 1)

    def forward(self, x):
        self.set_up(x)
        return self.linear(x) * self.table[: x.shape[1]].sum()


class Registers(SetsUp):
    def set_up(self, x):
        if "late" not in self._buffers:
            self.register_buffer("late", torch.full((8,), 0.5))

    def forward(self, x):
        self.set_up(x)
        return self.linear(x) * self.late


class Hooks(SetsUp):
    """Installs hooks once, and notes that it has."""

    def set_up(self, x):
        if not self.ready:
            self.linear.register_forward_hook(lambda module, args, output: output + 1)
            self.ready = True


@pytest.mark.parametrize("kind", [Flag, Rotary, Registers, Hooks])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_set_up_at_the_first_call_is_set_up_once(backend, whole, kind):
    plain = kind().eval().requires_grad_(False)
    module = torchcache.mark(copy.deepcopy(plain), audit=0)
    run = compiled(nn.Sequential(module, nn.Identity()), backend, fullgraph=whole)
    x = torch.randn(6, 8)
    for rows in (range(4), range(4), [5, 1, 0], range(6)):
        torch.testing.assert_close(run(x[[*rows]]), plain(x[[*rows]]))
    torch.testing.assert_close(module(x), plain(x))
    assert [*module.state_dict()] == [*plain.state_dict()]
    assert len(module.linear._forward_hooks) == len(plain.linear._forward_hooks)
    assert torchcache.stats(module).hits >= 11


class Counts(SetsUp):
    """Writes to its buffers where it sets itself up, and keeps a table of what they hold then."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(8))
        self.plain = torch.full((8,), 2.0)

    def set_up(self, x):
        if not self.ready:
            self.scale.add_(1)
            self.scale.view(2, 4)[0].mul_(2)
            self.plain.add_(1)
            self.table = self.scale * self.plain + self.frequencies.repeat(2)
            self.ready = True

    def forward(self, x):
        self.set_up(x)
        return self.linear(x) * self.table * self.scale


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_set_up_by_writes_in_place_is_written_once(backend, whole):
    plain = Counts().eval().requires_grad_(False)
    module = torchcache.mark(copy.deepcopy(plain), audit=0)
    run, x = compiled(nn.Sequential(module, nn.Identity()), backend, fullgraph=whole), torch.randn(6, 8)
    for rows in (range(4), range(4), [5, 1, 0], range(6)):
        torch.testing.assert_close(run(x[[*rows]]), plain(x[[*rows]]))
    for name in ("scale", "plain", "table"):
        torch.testing.assert_close(getattr(module, name), getattr(plain, name))


class KeepsInputs(SetsUp):
    """Keeps what it was given, which only a call with data can."""

    def set_up(self, x):
        self.table = x * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_of_the_input_is_real(backend):
    module = torchcache.mark(KeepsInputs(), freeze=True, audit=0)
    run, x = compiled(module, backend), torch.randn(4, 8)
    for _ in range(3):
        torch.testing.assert_close(run(x), nn.functional.linear(x, module.linear.weight, module.linear.bias))
        torch.testing.assert_close(module.table, x * 2)


class Looks(nn.Module):
    """What it returns looks as its attributes and its weights say."""

    def __init__(self):
        super().__init__()
        self.linear, self.aux, self.keep = nn.Linear(8, 6), False, 6

    def forward(self, x):
        h = self.linear(x.to(self.linear.weight.dtype))[:, : self.keep]
        return (h, h.sum(1)) if self.aux else h


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Looks().requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        h = self.encoder(x)
        h = h[0] + h[1][:, None] if isinstance(h, tuple) else h
        return h.float() * self.scale


CHANGES = {
    "cast": lambda encoder: encoder.bfloat16(),
    "double": lambda encoder: encoder.double(),
    "structure": lambda encoder: setattr(encoder, "aux", True),
    "shape": lambda encoder: setattr(encoder, "keep", 4),
    "hook": lambda encoder: encoder.linear.register_forward_hook(lambda module, args, output: output[:, :3].double()),
    "pruned": lambda encoder: prune.l1_unstructured(encoder.linear, "weight", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_is_not_run_for_outputs_that_look_otherwise(backend, gradients, change):
    twin = Model()
    model = copy.deepcopy(twin)
    torchcache.mark(model.encoder, audit=0)
    run, x = compiled(model, backend), torch.randn(6, 8)
    with torch.set_grad_enabled(gradients):
        for _ in range(3):
            torch.testing.assert_close(run(x), twin(x))
        CHANGES[change](model.encoder), CHANGES[change](twin.encoder)
        for _ in range(3):
            torch.testing.assert_close(run(x), twin(x))
    assert torchcache.stats(model).hits >= (12 if change == "pruned" else 24)  # it writes its weight in every call


class Said(nn.Module):
    """Returns something that its input's size decides."""

    def __init__(self, what):
        super().__init__()
        self.linear, self.what = nn.Linear(8, 8), what

    def forward(self, x):
        width = x.shape[1]
        said = {
            "text": f"{width} wide",
            "bytes": bytes([int(width)]),
            "dtype": torch.float32 if width > 5 else torch.float64,
            "none": None if width > 5 else 1,
            "size": x.shape[1:],
            "number": width,
        }
        return self.linear(x), said[self.what]


@pytest.mark.parametrize("what", ["text", "bytes", "dtype", "none", "size", "number"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_output_says_of_its_size_is_of_that_size(backend, what):
    plain = Said(what).requires_grad_(False)
    module = torchcache.mark(copy.deepcopy(plain), audit=0)
    run = compiled(nn.Sequential(module, nn.Identity()), backend)
    data = [torch.randn(4, 7, 8), torch.randn(5, 3, 8), torch.randn(2, 4, 8)]
    for x in (*data, *data):
        (found, said), (expected, wanted) = run(x), plain(x)
        torch.testing.assert_close(found, expected)
        assert (said, type(said)) == (wanted, type(wanted))
    assert torchcache.stats(module).hits == 11


class Prompted(nn.Module):
    def __init__(self):
        super().__init__()
        self.prompt, self.body = nn.Parameter(torch.zeros(8)), torchcache.mark(nn.Linear(8, 8), freeze=True)

    def forward(self, x):
        return self.body(x + self.prompt)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_a_part_of_a_graph_for_its_gradient_says_so(backend, warnings):
    model = Prompted()
    run = compiled(model, backend)
    for _ in range(3):
        run(torch.ones(6, 8)).sum().backward()
    assert sum("an argument needs a gradient: detach it" in text for text in warnings) == 1
    (region,) = torchcache.stats(model).regions
    assert list(region.reasons) == ["an argument needs a gradient"]


class Memo(SetsUp):
    """Keeps a table for each number of rows, as code does that keys tables by whole shapes."""

    def __init__(self):
        super().__init__()
        self.memo = {}

    def set_up(self, x):
        if x.shape not in self.memo:
            self.memo[x.shape] = torch.ones(x.shape)

    def forward(self, x):
        self.set_up(x)
        return self.linear(x) + self.memo[x.shape]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_for_numbers_of_rows_may_be_emptied_while_a_model_trains(backend):
    plain = Memo().eval().requires_grad_(False)
    module = torchcache.mark(copy.deepcopy(plain))
    net = nn.Sequential(module, nn.Linear(8, 2))
    run, batches = compiled(net, backend), [torch.randn(6, 8) for _ in range(2)]
    hits = []
    for epoch in range(6):
        if epoch == 2:
            module.memo.clear()
        for x in batches:
            torch.testing.assert_close(run(x), net[1](plain(x)))
            with torch.no_grad():
                torch.testing.assert_close(run(x), net[1](plain(x)))
        hits.append(torchcache.stats(module).hits)
    assert hits[5] - hits[4] == hits[4] - hits[3] == 24
