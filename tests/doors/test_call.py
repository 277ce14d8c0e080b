"""What a call may be given and may return, and that a row served is the row computed."""

import contextlib
import copy
import dataclasses
import enum
import functools
import gc
import operator
import os
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marked import assert_same, counts, frozen, reasons, unmarked
from torch import nn

import torchcache
from torchcache import cached


class Kind(enum.Enum):
    A = 1
    B = 2


@dataclasses.dataclass
class Output:
    features: torch.Tensor
    pair: tuple
    missing: None = None


class Plain(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, k=1, *, shift=0.0):
        return self.linear(x) * k + shift


def plain(**options):
    return torchcache.mark(Plain(), freeze=True, audit=0, **options)


def test_a_default_that_is_passed_is_the_same_call():
    module = plain()
    x = torch.randn(5, 6)
    module(x)
    module(x, 1)
    module(x=x, k=1, shift=0.0)
    assert counts(module) == (5, 10)
    for args, kwargs in (((x, 2), {}), ((x,), {"shift": 1.0}), ((x, True), {}), ((x,), {"shift": -0.0})):
        torch.testing.assert_close(module(*args, **kwargs), unmarked(module)(*args, **kwargs))
    assert counts(module) == (25, 10)


def test_a_default_that_changes_is_not_taken_for_the_one_before():
    def features(x, k=2.0):
        return x * k

    x, run = torch.randn(4, 3), cached(audit=0)(features)
    for _ in range(2):
        assert torch.equal(run(x, 2.0), x * 2)
    features.__defaults__ = (3.0,)
    assert torch.equal(run(x, 2.0), x * 2)
    assert torch.equal(run(x), x * 3)


def test_names_are_those_of_the_forward_that_runs():
    module = torchcache.mark(nn.Identity(), audit=0)
    torchcache.unmark(module).forward = lambda a, b: a - 2 * b
    torchcache.mark(module, audit=0)
    p, q = torch.randn(2, 4, 3)
    assert torch.equal(module(p, q), p - 2 * q)
    torchcache.unmark(module).forward = lambda b, a: b - 2 * a
    torchcache.mark(module, audit=0)
    for _ in range(2):
        assert torch.equal(module(b=q, a=p), q - 2 * p)
        assert torch.equal(module(p, q), p - 2 * q)


def test_plain_arguments_count_by_kind_and_value():
    module = frozen(lambda self, x, option=(): x * 2, nn.Linear(2, 2))
    x = torch.randn(3, 2)
    options = [None, True, False, 0, 1, 1.0, "1", torch.float32, Kind.A, Kind.B, (1, 2), [1, 2], [1, (2, 3)]]
    options += [{"a": 1}, {"a": 2}, {"b": 1, "a": 2}, {"a": 2, "b": 1}, range(2), slice(1), b"1", 1j]
    for _ in range(2):
        for option in options:
            module(x, option=option)
    assert counts(module) == (3 * len(options), 3 * len(options))


@pytest.mark.parametrize(
    "thing", [object(), (n for n in range(2)), torch.nn.Linear(2, 2)], ids=lambda t: type(t).__name__
)
def test_an_argument_that_is_not_understood_is_computed_and_named(thing, warnings):
    module = frozen(lambda self, x, thing=None: x * 2, nn.Linear(2, 2))
    x = torch.randn(3, 2)
    for _ in range(3):
        assert torch.equal(module(x, thing=thing), x * 2)
    assert counts(module) == (0, 0)
    assert torchcache.stats(module).bypasses == 9
    assert "argument thing" in reasons(module) or "'thing'" in reasons(module)
    assert len(warnings) == 1


def test_shared_inputs_are_part_of_every_key():
    module = frozen(lambda self, x, table: x @ table, nn.Linear(2, 2))
    x, table = torch.randn(5, 4), torch.randn(4, 3)
    torch.testing.assert_close(module(x, table), x @ table)
    torch.testing.assert_close(module(x[:2], table), x[:2] @ table)
    assert counts(module) == (5, 2)
    table.mul_(2)
    torch.testing.assert_close(module(x, table), x @ table)
    assert counts(module) == (10, 2)


def test_a_shared_input_may_come_first_and_be_as_long_as_the_batch():
    module = frozen(lambda self, table, x: x @ table, nn.Linear(2, 2))
    table = torch.randn(4, 3)
    for rows in (5, 4, 1, 4, 5):
        x = torch.randn(rows, 4)
        for _ in range(2):
            torch.testing.assert_close(module(table, x), x @ table)
    assert torchcache.stats(module).hits >= 19


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_in_and_out(dtype, tmp_path):
    def forward(self, x):
        return x.clone(), x.view(torch.uint8).view(dtype).clone()

    x = torch.tensor([[row >> bit & 1 for bit in range(4)] for row in range(6)]).to(dtype)  # six different rows
    raw = x.view(torch.uint8).reshape(6, -1)
    for run in range(2):  # the second from disk
        module = frozen(forward, persistent=True, persistent_cache_dir=tmp_path, audit=0.01)
        for index in (torch.arange(6), torch.tensor([4, 0, 4, 5]), torch.arange(6)):
            for got in module(raw[index].view(dtype).reshape(len(index), 4)):
                assert got.dtype == dtype
                assert torch.equal(got.view(torch.uint8).reshape(len(index), -1), raw[index])
        torchcache.flush()
        assert torchcache.stats(module).misses == (6 if run == 0 else 0)


def test_nan_and_negative_zero_are_just_bytes():
    module = frozen(lambda self, x: x * 1)
    x = torch.tensor([[float("nan")], [0.0], [-0.0], [float("nan")]])
    for _ in range(2):
        assert torch.equal(module(x).view(torch.int32), x.view(torch.int32))
    assert counts(module) == (3, 5)


def test_memory_formats_and_strides_are_kept():
    def forward(self, x):
        h = self.parts[0](x)
        return h, h.flatten(2).permute(2, 0, 1).contiguous().transpose(0, 1)

    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    module = frozen(forward, nn.Conv2d(3, 5, 3))
    for rows in (range(4), range(4), [2, 1]):
        assert_same(module(x[list(rows)]), unmarked(module)(x[list(rows)]))
    assert counts(module) == (4, 6)


def _doubled_where_contiguous(self, x):
    return self.parts[0](x) * (2.0 if x.is_contiguous() else 1.0)


def _with_its_stride(self, x):
    return self.parts[0](x) + float(x.stride(1) == 1)


def _viewed(self, x):
    return self.parts[0](x.view(-1)).view(x.shape)


@pytest.mark.parametrize("forward", [_doubled_where_contiguous, _with_its_stride, _viewed])
def test_rows_are_not_served_to_arguments_that_lie_otherwise_in_memory(forward):
    part = nn.Tanh() if forward is _viewed else nn.Linear(4, 4)
    x = torch.randn(6, 4)
    lies = [x, x.t().contiguous().t(), torch.stack([x, x], -1)[..., 0], x[:, :1].expand(6, 4), x[:1].expand(6, 4)]
    for first in range(len(lies)):
        module = frozen(forward, part)
        twin = unmarked(module)
        for batch in [*lies[first:], *lies[:first]] * 2:
            for rows in (batch, batch[1:4], batch[2:3]):
                try:
                    expected = twin(rows)
                except RuntimeError:
                    with pytest.raises(RuntimeError):
                        module(rows)
                else:
                    assert_same(module(rows), expected)


def test_fixed_strides_read_other_elements_of_arguments_that_lie_otherwise():
    module = frozen(lambda self, x: self.parts[0](torch.as_strided(x, (len(x), 4), (4, 1))), nn.Linear(4, 4))
    x, twin = torch.randn(6, 4), unmarked(module)
    for batch in (x, x, x.t().contiguous().t(), x):
        assert_same(module(batch), twin(batch))
    assert counts(module) == (6, 6)


def test_shared_arguments_count_with_how_they_lie():
    module = frozen(lambda self, x, y: self.parts[0](x) * (2.0 if y.is_contiguous() else 1.0), nn.Linear(4, 4))
    x, y, twin = torch.randn(6, 4), torch.randn(3, 5), unmarked(module)
    for shared in (y, torch.stack([y, y], -1)[..., 0], y.t().contiguous().t()) * 2:
        assert_same(module(x, shared), twin(x, shared))
    assert counts(module) == (18, 18)


LIES = {
    "as usual": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "with gaps": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("lie", LIES)
def test_rows_are_found_again_in_batches_of_any_size(lie):
    x = torch.randn(6, 3, 5, 4)
    batch, twice = LIES[lie](x), LIES[lie](torch.cat([x, x]))
    module = frozen(lambda self, x: self.parts[0](x), nn.Conv2d(3, 4, 3))
    twin = unmarked(module)
    module(batch)
    for rows in (batch, batch[2:5], twice, batch[:2]):
        assert_same(module(rows), twin(rows))
    assert counts(module)[0] == 6
    assert_same(module(batch[3:4]), twin(batch[3:4]))
    assert counts(module)[0] == 6 + (lie == "with gaps")


def test_one_row_may_have_any_stride():
    module = frozen(lambda self, x: self.parts[0](x), nn.Linear(4, 4))
    x, twin = torch.randn(6, 4), unmarked(module)
    module(x)
    for row in range(6):
        for rows in (x[row][None], x[row::6], torch.from_numpy(x[row].numpy()[None]), x[row : row + 1].expand(1, 4)):
            torch.testing.assert_close(module(rows), twin(rows))
    assert counts(module) == (6, 24)


@pytest.mark.parametrize("size", [(1, 6, 6), (3, 1, 1), (3, 6, 1), (1, 1, 6)])
@pytest.mark.parametrize("out", [1, 4])
def test_sizes_of_one_keep_their_memory_format(size, out):
    channels, height, width = size
    x = torch.randn(4, *size)
    last = torch.empty_strided(x.shape, (channels * height * width, 1, width * channels, channels)).copy_(x)
    named = torch.from_numpy(x[:, 0].numpy()[:, None]) if channels == 1 else x
    for order in ((x, last, named), (named, last, x)):
        module = frozen(lambda self, x: self.parts[0](x), nn.Conv2d(channels, out, 3, padding=1))
        twin = unmarked(module)
        for batch in order * 2:
            for rows in (batch, batch[1:3], batch[2:3], batch[0][None]):
                assert_same(module(rows), twin(rows))


def test_views_count_by_their_content():
    module = frozen(lambda self, x: x * 2.0)
    x = torch.randn(6, 8)
    for _ in range(2):
        for view in (x[:, ::2], x[:, 0], x.t(), x[:1].expand(6, 8)):
            torch.testing.assert_close(module(view), view * 2)
    misses, hits = counts(module)
    assert misses + hits + torchcache.stats(module).bypasses == 2 * (6 + 6 + 8 + 6)
    assert hits >= 6 + 6 + 8 + 6


def test_nested_outputs_keep_their_structure():
    def forward(self, x, mask):
        h = self.parts[0](x)
        return {"out": Output(h, (h.sum(1), mask.logical_not())), "list": [h.argmax(1)], "flag": 3}

    module = frozen(forward, nn.Linear(4, 4))
    x, mask = torch.randn(5, 4), torch.rand(5, 7) > 0.5
    first, again = module(x, mask), module(x.flip(0), mask.flip(0))
    assert counts(module) == (5, 5)
    assert (type(again["out"]), list(again), again["flag"]) == (Output, ["out", "list", "flag"], 3)
    assert again["out"].missing is None
    torch.testing.assert_close(again["out"].features.flip(0), first["out"].features)
    torch.testing.assert_close(again["out"].pair[1].flip(0), ~mask)
    torch.testing.assert_close(again["list"][0].flip(0), first["list"][0])


def test_numbers_in_an_output_are_those_of_its_rows():
    """As of encoders that return tokens with the height and width of their grid."""

    def forward(self, x):
        h = self.parts[0](x)
        return h.flatten(2).transpose(1, 2), h.shape[2], h.shape[3]

    module = frozen(forward, nn.Conv2d(3, 4, 2, 2))
    tall, wide = torch.randn(4, 3, 16, 8), torch.randn(4, 3, 8, 16)  # as many tokens
    for images in (tall, wide, tall.flip(0), wide.flip(0), tall[:2]):
        tokens, *grid = module(images)
        assert grid == [images.shape[2] // 2, images.shape[3] // 2]
        torch.testing.assert_close(tokens, unmarked(module)(images)[0])
    assert counts(module) == (8, 10)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda self, x: {"good": x * 2, "bad": x.sum(0)}, "one row a sample"),
        (lambda self, x: x.sum(), "row"),
        (lambda self, x: (x * 2, len(x)), "number"),
        (lambda self, x: 3, "no tensor"),
    ],
)
def test_outputs_without_rows_are_computed_and_the_reason_is_told(forward, why, warnings):
    module = frozen(forward)
    for rows in (5, 4, 5):
        x = torch.randn(rows, 3)
        assert_same(module(x), forward(None, x))
    assert counts(module) == (0, 0)
    assert why in reasons(module)
    assert len(warnings) <= 2


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [True, False])
def test_hidden_states_have_their_batch_second(kind, batch_first):
    module = torchcache.mark(
        kind(4, 5, 2, batch_first=batch_first), freeze=True, audit=0, batch_dim=0 if batch_first else 1
    )
    x, twin = torch.randn(6, 3, 4), unmarked(module)
    for rows in ([0, 1, 2], [2, 1, 4, 5], [0, 5], [3]):
        given = x[rows] if batch_first else x[rows].transpose(0, 1)
        assert_same(module(given), twin(given))
    assert counts(module) == (6, 4)


def test_another_batch_dimension_is_named():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    module = torchcache.mark(layer, freeze=True, batch_dim=1, audit=0)
    x, twin = torch.randn(3, 6, 8), unmarked(module)  # as sequences first: 3 tokens of 6 samples
    for rows in ([0, 1, 2], [2, 1, 4, 5]):
        torch.testing.assert_close(module(x[:, rows]), twin(x[:, rows]))
    assert counts(module) == (5, 2)


class Images(nn.Module):
    """Takes one image a sample, as vision-language models do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return self.conv(torch.stack(list(images))).mean((2, 3))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=2, max_size=6),
    st.sampled_from([list, tuple]),
)
def test_a_list_with_one_tensor_a_sample_is_a_batch(batches, kind):
    torch.manual_seed(0)
    module, pool = torchcache.mark(Images(), freeze=True, audit=0), torch.randn(6, 3, 8, 8)
    twin = unmarked(module)
    for rows in ([0, 1], *batches):
        torch.testing.assert_close(module(kind(pool[rows])), twin(kind(pool[rows])))
    assert counts(module)[0] == len({0, 1, *functools.reduce(operator.iadd, batches, [])})


def test_a_list_that_holds_levels_has_the_rows_of_its_tensors():
    module = frozen(lambda self, levels: [level * 2 for level in levels])
    levels = [torch.randn(4, 3), torch.randn(4, 3)]
    for _ in range(2):
        assert_same(module(levels), [level * 2 for level in levels])
    assert counts(module) == (4, 4)


def test_a_list_whose_elements_depend_on_each_other_is_not_cached():
    module = frozen(lambda self, images: torch.stack(images).sub(torch.stack(images).mean(0)).sum((1, 2)))
    images = [torch.randn(5, 7) for _ in range(4)]
    for rows in (images, images[:3], images):
        torch.testing.assert_close(module(rows), unmarked(module)(rows))
    assert counts(module) == (0, 0)
    assert reasons(module)
    ragged = [torch.randn(3, 5), torch.randn(3, 6)]
    short = frozen(lambda self, images: torch.stack([image.sum() for image in images]))
    for _ in range(2):
        torch.testing.assert_close(short(ragged), torch.stack([image.sum() for image in ragged]))
    assert counts(short) == (0, 0)
    assert reasons(short)


def test_a_function_is_cached_with_its_code_defaults_and_closure():
    def make(factor, power=2):
        @cached()
        def features(x, k=3):
            return x * factor + k**power

        return features

    x, first = torch.randn(4, 3), make(2.0)
    for _ in range(2):
        torch.testing.assert_close(first(x), x * 2 + 9)
    assert counts(first) == (4, 4)
    torch.testing.assert_close(make(3.0)(x), x * 3 + 9)
    torch.testing.assert_close(first(x, k=1), x * 2 + 1)
    assert first.__name__ == "features"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cache_dtype_rounds_what_is_stored_and_gives_the_dtype_back(dtype):
    module = torchcache.mark(nn.Linear(4, 4), freeze=True, cache_dtype=dtype, audit=0.5)
    x = torch.randn(5, 4)
    exact = module(x)
    torch.testing.assert_close(exact, unmarked(module)(x))
    for _ in range(6):  # rows are computed again meanwhile
        assert torch.equal(module(x), exact.to(dtype).float())
    assert torchcache.stats(module).regions[0].alarms == 0


def test_memory_budget_is_hard_and_keeps_a_stable_share():
    module = torchcache.mark(nn.Linear(4, 4), freeze=True, max_memory_cache_size=16 * 10)
    x, twin = torch.randn(25, 4), unmarked(module)
    for _ in range(4):
        for start in range(0, 25, 5):
            torch.testing.assert_close(module(x[start : start + 5]), twin(x[start : start + 5]))
    (region,) = torchcache.stats(module).regions
    assert region.memory_bytes == 160
    assert (region.hits, region.misses) == (3 * 10, 25 + 3 * 15)


@pytest.mark.parametrize("door", ["eager", "transform"])
def test_rows_of_other_weights_make_room_when_memory_is_full(door):
    module = torchcache.mark(nn.Linear(4, 4), freeze=True, max_memory_cache_size=16 * 10)
    run = torchcache.transform(nn.Sequential(module)) if door == "transform" else module
    x = torch.randn(10, 4)
    for _ in range(3):
        with torch.no_grad():
            module.weight.add_(1)
        run(x), run(x)
    (region,) = torchcache.stats(module).regions
    assert (region.misses, region.hits, region.memory_bytes) == (30, 30, 160)


def test_outputs_do_not_alias_what_is_stored():
    module = frozen(lambda self, x: x * 2)
    x = torch.randn(4, 3)
    for _ in range(3):
        got = module(x)
        assert torch.equal(got, x * 2)
        got.zero_()


@pytest.fixture
def no_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.once
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "partly trained"])
@pytest.mark.parametrize("door", ["eager", "transform", "compile"])
def test_modules_and_their_rows_are_freed_as_soon_as_nobody_has_them(door, trains, tmp_path, no_garbage_collection):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    module[1].requires_grad_(trains)
    torchcache.mark(module, persistent=True, persistent_cache_dir=tmp_path)
    model = nn.Sequential(module, nn.Linear(4, 2))
    if door == "compile":
        run = torch.compile(model, backend="torchcache")
    else:
        run = torchcache.transform(model) if door == "transform" else model
    x = torch.randn(3, 4)
    for _ in range(3):
        run(x).sum().backward()
    torchcache.flush()
    assert torchcache.stats(run).hits
    gone = [weakref.ref(part) for part in (*model.modules(), *model.parameters())]
    gone += [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters()]
    torch._dynamo.reset()
    del module, model, run
    assert not any(reference() is not None for reference in gone)
    if os.path.isdir("/proc/self/fd"):
        files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        assert not [file for file in files if file.startswith(str(tmp_path))]


def writing(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return self[0](x) * self.calls


def failing(self, x):
    if len(x) == 3:
        raise RuntimeError("out of memory")
    return self[0](x)


@pytest.mark.parametrize("forward", [writing, failing, lambda self, x: self[0](x - x.mean(0))])
def test_what_is_computed_or_fails_keeps_neither_a_module_nor_a_batch(forward, no_garbage_collection):
    kind = type("Net", (nn.Sequential,), {"forward": forward})
    module = torchcache.mark(kind(nn.Linear(4, 4)), freeze=True)
    batch = torch.randn(5, 4)
    for x in (batch, batch, batch[:3]):
        with contextlib.suppress(RuntimeError, torchcache.RowwiseError):
            module(x)
    gone = [weakref.ref(batch), weakref.ref(module), weakref.ref(module[0].weight)]
    del module, batch, x
    assert [reference() for reference in gone] == [None, None, None]


def test_stats_prints_a_table_and_takes_only_models():
    module = plain()
    module(torch.randn(4, 6))
    assert "Plain" in str(torchcache.stats(module))
    with pytest.raises(TypeError):
        torchcache.stats(3)


class Attending(nn.Module):
    """Adds what only attention of a sequence to itself has."""

    def __init__(self):
        super().__init__()
        self.own, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, context):
        out = self.own(x) + context
        return out + self.other(x) if context is x else out


@pytest.mark.parametrize("first", ["one object", "two objects"])
def test_arguments_that_are_one_object_are_another_call(first):
    torch.manual_seed(0)
    twin = Attending().eval().requires_grad_(False)
    module = torchcache.mark(copy.deepcopy(twin), audit=0)
    known, more = torch.randn(5, 4), torch.randn(3, 4)
    calls = [(known, known), (known, known.clone())]
    mixed = torch.cat([known[:2], more])
    for x, context in [*(calls if first == "one object" else calls[::-1]), *calls, (mixed, mixed)]:
        torch.testing.assert_close(module(x, context), twin(x, context))
    assert torchcache.stats(module).hits == 12


def test_outputs_that_are_one_object_stay_one():
    pair = torchcache.mark(Both(), audit=0)
    x = torch.randn(5, 4)
    for _ in range(3):
        first, second = pair(x)
        assert first is second
        torch.testing.assert_close(first, x + 1)


@pytest.mark.parametrize("door", ["call", "eager", "aot_eager"])
def test_parameters_come_back_as_parameters(door):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = nn.Parameter(self.linear(x), requires_grad=False)
            return y, x + isinstance(x, nn.Parameter), y

    module = torchcache.mark(Tokens(), freeze=True, audit=0)
    run = module if door == "call" else torch.compile(module, backend=door)
    x = torch.randn(6, 4)
    for rows in (x[:4], nn.Parameter(x[:4], False), x, nn.Parameter(x, False)):
        tokens, raised, again = run(rows)
        assert type(tokens) is nn.Parameter
        assert tokens is again
        torch.testing.assert_close(tokens.data, unmarked(module)(rows)[0].data)
        assert torch.equal(raised, rows + (type(rows) is nn.Parameter))
    assert counts(module) == (12, 8)


class Both(nn.Module):
    def forward(self, x):
        y = x + 1
        return y, y


class Twice(nn.Module):
    """Calls itself on inputs that are large."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, further=True):
        if further and x.shape[1] > 2:
            return self(x[:, 1:], False)
        return self.linear(x).sum(1) if x.shape[1] == 4 else x.sum(1)


@pytest.mark.parametrize("early", [True, False])
def test_hooks_of_a_marked_module_run_around_its_call(early):
    """As those that keep features do; what they keep is no part of who computes."""
    module, kept, data = nn.Linear(4, 3).requires_grad_(False), [], torch.randn(9, 4)
    if not early:
        torchcache.mark(module, audit=0)
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    module.register_forward_hook(lambda module, inputs, output: kept.append(output))
    if early:
        torchcache.mark(module, audit=0)
    twin = unmarked(module)
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7, 8], [8, 0, 3], [1, 2, 4, 5, 6, 7], [3, 3, 0]):
        torch.testing.assert_close(module(data[rows]), twin(data[rows]))
        torch.testing.assert_close(kept[-1], kept[-2])
    assert torchcache.stats(module).hits >= 12


def test_hooks_of_a_module_that_calls_itself_are_a_part_of_it():
    module, factor, data = Twice().requires_grad_(False), [2.0], torch.randn(6, 4)
    torchcache.mark(module, audit=0)
    module.register_forward_hook(lambda module, inputs, output: output * factor[0])
    twin = unmarked(module)
    for value in (2.0, 2.0, 3.0, 3.0, 2.0):
        factor[0] = value
        for rows in (data, data[:, :3], data[[2, 1]]):
            torch.testing.assert_close(module(rows), twin(rows))
