"""Door 3: marked modules and functions called on their own."""

import copy
import dataclasses
import enum
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from torch import nn

import torchcache
from torchcache import torchcache as cached


@cached
class Plain(nn.Module):
    """A marked class, without parentheses."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.requires_grad_(False)

    def forward(self, x, k=1, *, shift: float = 0.0):
        return self.linear(x) * k + shift


@cached(max_memory_cache_size=10**6)
class WithOptions(Plain):
    """A marked subclass, with options."""


class Kind(enum.Enum):
    A = 1
    B = 2


@dataclasses.dataclass
class Output:
    features: torch.Tensor
    pair: tuple
    missing: None = None


def counts(target):
    stats = torchcache.stats(target)
    return stats.misses, stats.hits


def frozen(forward, *parts):
    """A marked module with this forward."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, *args, **kwargs):
            return forward(self, *args, **kwargs)

    return torchcache.mark(Module(), freeze=True)


def test_the_class_stays_the_same_class():
    assert Plain.__name__ == "Plain"
    assert Plain.__module__ == __name__
    assert Plain.__doc__.startswith("A marked class")
    assert list(inspect.signature(Plain).parameters) == ["width"]
    assert list(inspect.signature(Plain.forward).parameters) == ["self", "x", "k", "shift"]
    module = WithOptions()
    assert isinstance(module, Plain)
    assert isinstance(module, WithOptions)
    assert type(pickle.loads(pickle.dumps(module))) is WithOptions
    assert issubclass(WithOptions, Plain)


@pytest.mark.parametrize("cls", [Plain, WithOptions])
def test_eager_calls_are_cached(cls):
    module = cls()
    x = torch.randn(5, 6)
    expected = nn.functional.linear(x, module.linear.weight, module.linear.bias)
    for _ in range(3):
        torch.testing.assert_close(module(x), expected)
    assert counts(module) == (5, 10)


def test_keyword_positional_and_default_arguments_are_the_same_call():
    module = Plain()
    x = torch.randn(5, 6)
    module(x)
    module(x, 1)
    module(x=x, k=1, shift=0.0)
    assert counts(module) == (5, 10)
    module(x, 2)
    module(x, shift=1.0)
    assert counts(module) == (15, 10)


def test_arguments_of_every_plain_kind_are_part_of_the_key():
    module = frozen(lambda self, x, option=None: x * 2, nn.Linear(2, 2))
    x = torch.randn(3, 2)
    options = [
        None,
        True,
        False,
        0,
        1,
        1.0,
        "1",
        torch.float32,
        Kind.A,
        Kind.B,
        (1, 2),
        [1, (2, 3)],
        {"a": 1},
        {"a": 2},
    ]
    for _ in range(2):
        for option in options:
            module(x, option=option)
    # A list and a tuple of the same values mean the same; 1, 1.0, True and "1" do not.
    assert counts(module) == (3 * len(options), 3 * len(options))


def test_an_argument_of_another_kind_is_named():
    module = frozen(lambda self, x, thing=None: x * 2, nn.Linear(2, 2))
    with pytest.raises(torchcache.ArgumentError, match=r"thing.*object"):
        module(torch.randn(3, 2), thing=object())


def test_shared_inputs_are_part_of_every_key():
    module = frozen(lambda self, x, table: x @ table, nn.Linear(2, 2))
    x, table = torch.randn(5, 4), torch.randn(4, 3)
    torch.testing.assert_close(module(x, table), x @ table)
    torch.testing.assert_close(module(x[:2], table), x[:2] @ table)
    assert counts(module) == (5, 2)
    table.mul_(2)
    torch.testing.assert_close(module(x, table), x @ table)
    torch.testing.assert_close(module(x, torch.randn(4, 3)[:, :3] * 0), torch.zeros(5, 3))
    assert counts(module) == (15, 2)


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
    rows = torch.tensor([4, 0, 4, 5])
    raw = x.view(torch.uint8).reshape(6, -1)
    for run in range(2):  # the second from disk
        module = frozen(forward, nn.Linear(2, 2))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(0.5)
        torchcache.mark(module, persistent=True, persistent_cache_dir=tmp_path)
        for index in (torch.arange(6), rows, torch.arange(6)):
            batch = raw[index].view(dtype).reshape(len(index), 4)
            for got in module(batch):
                assert got.dtype == dtype
                assert torch.equal(got.view(torch.uint8).reshape(len(index), -1), raw[index])
        torchcache.flush()
        assert torchcache.stats(module).misses == (6 if run == 0 else 0)


def test_nan_and_negative_zero_are_just_bytes():
    module = frozen(lambda self, x: x * 1, nn.Linear(2, 2))
    x = torch.tensor([[float("nan")], [0.0], [-0.0], [float("nan")]])
    for _ in range(2):
        got = module(x)
        assert torch.equal(got.view(torch.int32), x.view(torch.int32))
    assert counts(module) == (3, 5)


def test_nested_outputs_keep_their_structure():
    def forward(self, x, mask):
        h = self.parts[0](x)
        return {"out": Output(h, (h.sum(1), mask.logical_not())), "list": [h.argmax(1)], "flag": 3}

    module = frozen(forward, nn.Linear(4, 4))
    x, mask = torch.randn(5, 4), torch.rand(5, 7) > 0.5
    first, again = module(x, mask), module(x.flip(0), mask.flip(0))
    assert counts(module) == (5, 5)
    assert type(again["out"]) is Output
    assert list(again) == ["out", "list", "flag"]
    assert again["flag"] == 3
    assert again["out"].missing is None
    torch.testing.assert_close(again["out"].features.flip(0), first["out"].features)
    torch.testing.assert_close(again["out"].pair[1].flip(0), ~mask)
    torch.testing.assert_close(again["list"][0].flip(0), first["list"][0])


def test_memory_formats_are_kept():
    def forward(self, x):
        h = self.parts[0](x)
        return h, h.flatten(2).permute(2, 0, 1).contiguous().transpose(0, 1)

    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    module = frozen(forward, nn.Conv2d(3, 5, 3))
    plain = torchcache.unmark(copy.deepcopy(module))
    for rows in (range(4), range(4), [2, 1]):
        for got, expected in zip(module(x[list(rows)]), plain(x[list(rows)]), strict=True):
            torch.testing.assert_close(got, expected)
            assert got.stride() == expected.stride()
    assert counts(module) == (4, 6)


def test_strided_and_one_dimensional_inputs():
    module = frozen(lambda self, x: x * 2.0, nn.Linear(2, 2))
    x = torch.randn(6, 8)
    for _ in range(2):
        torch.testing.assert_close(module(x[:, ::2]), x[:, ::2] * 2)
        torch.testing.assert_close(module(x[:, 0]), x[:, 0] * 2)
        torch.testing.assert_close(module(x.t()), x.t() * 2)
        torch.testing.assert_close(module(x[:1].expand(6, 8)), x[:1].expand(6, 8) * 2)
    misses, hits = counts(module)
    assert misses == 6 + 6 + 8 + 1
    assert hits == 6 + 6 + 8 + 5 + 6


def test_output_without_rows_is_named():
    module = frozen(lambda self, x: {"good": x * 2, "bad": x.sum(0)}, nn.Linear(2, 2))
    with pytest.raises(torchcache.OutputError, match="bad"):
        module(torch.randn(5, 3))


def test_a_function_is_cached_with_its_code_defaults_and_closure():
    def make(factor, power=2):
        @cached()
        def features(x, k=3):
            return x * factor + k**power

        return features

    x = torch.randn(4, 3)
    first = make(2.0)
    for _ in range(2):
        torch.testing.assert_close(first(x), x * 2 + 9)
    assert counts(first) == (4, 4)
    torch.testing.assert_close(make(3.0)(x), x * 3 + 9)
    torch.testing.assert_close(first(x, k=1), x * 2 + 1)
    assert first.__name__ == "features"


def test_functions_differ_by_what_they_name(tmp_path):
    def run(source, x):
        scope = {"torch": torch}
        exec(source, scope)
        features = cached(persistent=True, persistent_cache_dir=tmp_path)(scope["features"])
        out = features(x)
        torchcache.flush()
        return out, torchcache.stats(features).misses

    x = torch.randn(4, 3)
    source = "SCALE = {}\ndef helper(x):\n    return x * {}\ndef features(x):\n    return helper(x) + SCALE\n"
    for scale, factor in ((1, 2), (1, 3), (2, 2)):
        out, misses = run(source.format(scale, factor), x)
        torch.testing.assert_close(out, x * factor + scale)
        assert misses == 4
    assert run(source.format(1, 2), x)[1] == 0


def test_changed_attribute_in_a_submodule_is_a_miss():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.settings = {"scale": [1.0, 2.0]}

        def forward(self, x):
            return self.linear(x) * self.settings["scale"][1]

    module = torchcache.mark(nn.Sequential(Inner()), freeze=True)
    x = torch.randn(4, 3)
    before = module(x)
    module[0].settings["scale"][1] = 4.0
    torch.testing.assert_close(module(x), before * 2)
    module[0].settings["scale"][1] = 2.0
    torch.testing.assert_close(module(x), before)
    assert counts(module) == (8, 4)


def test_changed_weights_and_buffers_are_a_miss():
    module = torchcache.mark(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), freeze=True)
    x = torch.randn(4, 3)
    changes = [
        lambda: module[0].weight.data.__class__,
        lambda: module[1].running_mean.add_(1),
        lambda: module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}),
        lambda: setattr(module[0], "bias", nn.Parameter(torch.ones(3), requires_grad=False)),
        lambda: module.__setitem__(0, nn.Linear(3, 3).requires_grad_(False)),
        lambda: module.add_module("2", nn.Tanh()),
    ]
    for change in changes:
        with torch.no_grad():
            change()
        expected = x
        for part in module:
            expected = part.eval()(expected)
        torch.testing.assert_close(module(x), expected)
    assert counts(module) == (4 * len(changes), 0)


def test_train_leaves_a_frozen_mark_in_eval_mode():
    module = torchcache.mark(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), freeze=True)
    model = nn.Sequential(module, nn.Dropout(0.5))
    model.train()
    assert not any(part.training for part in module.modules())
    assert model[1].training
    x = torch.randn(8, 3)
    torch.testing.assert_close(module(x), module[0](x))
    decorated = Plain()
    decorated.train()
    assert not decorated.linear.training


def test_a_partly_trainable_mark_caches_its_frozen_part():
    module = torchcache.mark(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    module[0].requires_grad_(False)
    x = torch.randn(4, 3)
    for _ in range(2):
        module[2].weight.grad = None
        module(x).sum().backward()
        torch.testing.assert_close(module[2].weight.grad, torch.tanh(module[0](x)).sum(0).expand(3, 3))
        with torch.no_grad():
            module[2].weight.add_(1)
    assert counts(module) == (4, 4)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x - x.mean(0),
        lambda self, x: x @ x.t() @ x,
        lambda self, x: x.softmax(0),
        lambda self, x: x.cumsum(0),
        lambda self, x: x / x.shape[0],
        lambda self, x: x.roll(1, 0),
        lambda self, x: nn.functional.batch_norm(x, None, None, training=True),
        lambda self, x: torch.cat([x[:1], x[1:] - x[:-1]]),
    ],
)
def test_modules_that_mix_rows_are_refused(forward):
    module = frozen(forward, nn.Linear(2, 2))
    for _ in range(2):
        with pytest.raises(torchcache.RowwiseError, match="other rows"):
            module(torch.randn(6, 5))
    assert torchcache.stats(module).hits == 0


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x + torch.rand_like(x),
        lambda self, x: nn.functional.dropout(x, 0.5, training=True),
    ],
)
def test_random_modules_are_refused(forward):
    with pytest.raises(torchcache.RowwiseError, match=r"random|other rows"):
        frozen(forward, nn.Linear(2, 2))(torch.randn(6, 5))


def test_a_module_that_counts_its_calls_is_refused():
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return x * self.calls

    with pytest.raises(torchcache.RowwiseError):
        frozen(forward, nn.Linear(2, 2))(torch.randn(6, 5))


def test_a_module_that_sets_itself_up_in_its_first_call_is_cached():
    def forward(self, x):
        if not hasattr(self, "table"):
            self.table = torch.ones(5)
        return x * self.table

    module = frozen(forward, nn.Linear(2, 2))
    x = torch.randn(6, 5)
    for _ in range(3):
        torch.testing.assert_close(module(x), x)
    assert torchcache.stats(module).hits >= 6


def test_verify_can_be_turned_off():
    module = frozen(lambda self, x: x - x.mean(0), nn.Linear(2, 2))
    torchcache.mark(module, verify=False)
    x = torch.randn(6, 5)
    torch.testing.assert_close(module(x), x - x.mean(0))


def test_sample_keys_replace_the_hash():
    module = frozen(lambda self, x: x * 2, nn.Linear(2, 2))
    x = torch.randn(4, 5)
    for ids in ([1, 2, 3, 4], torch.tensor([1, 2, 3, 4])):
        with torchcache.sample_keys(ids):
            torch.testing.assert_close(module(x), x * 2)
    assert counts(module) == (4, 4)
    with torchcache.sample_keys([4, 1]):
        torch.testing.assert_close(module(x[:2]), x[[3, 0]] * 2)  # the ids' rows, not the inputs'
    with torchcache.sample_keys(["1", "a", "b", "c"]):
        module(x)
    module(x)
    assert counts(module) == (12, 6)


@pytest.mark.parametrize("ids", [[1, 2], ["a"], torch.arange(5)])
def test_a_wrong_number_of_sample_keys_is_an_error(ids):
    module = Plain()
    with torchcache.sample_keys(ids), pytest.raises(torchcache.SampleKeyError, match="4 rows"):
        module(torch.randn(4, 6))


@pytest.mark.parametrize("ids", [[1.5], [None], torch.rand(4), torch.ones(2, 2).long(), [2**127]])
def test_sample_keys_that_are_no_ids_are_an_error(ids):
    with pytest.raises(torchcache.SampleKeyError), torchcache.sample_keys(ids):
        pass


def test_bypass_computes_and_stores_nothing():
    module = Plain()
    x = torch.randn(4, 6)
    with torchcache.bypass():
        module(x)
        module(x)
    stats = torchcache.stats(module)
    assert (stats.bypasses, stats.misses, stats.hits) == (8, 0, 0)
    assert module(x).shape == (4, 6)
    assert counts(module) == (4, 0)


def test_one_instance_can_turn_itself_off():
    module = Plain()
    module.torchcache_enabled = False
    module(torch.randn(4, 6))
    assert torchcache.stats(module).regions == []
    other = torchcache.unmark(Plain())
    other(torch.randn(4, 6))
    assert torchcache.stats(other).regions == []


def test_unmark_restores_the_instance():
    module = nn.Linear(3, 3)
    members = set(vars(module))
    torchcache.unmark(torchcache.mark(module))
    assert set(vars(module)) == members


def test_cache_dtype_rounds_what_is_stored_and_gives_the_dtype_back():
    module = torchcache.mark(nn.Linear(4, 4), freeze=True, cache_dtype=torch.bfloat16)
    x = torch.randn(5, 4)
    exact = module(x)
    again = module(x)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, exact.bfloat16().float())


def test_memory_budget_is_hard_and_keeps_a_stable_share():
    module = torchcache.mark(nn.Linear(4, 4), freeze=True, max_memory_cache_size=16 * 10)
    x = torch.randn(25, 4)
    expected = nn.functional.linear(x, module.weight, module.bias)
    for _ in range(4):
        for start in range(0, 25, 5):
            torch.testing.assert_close(module(x[start : start + 5]), expected[start : start + 5])
    (region,) = torchcache.stats(module).regions
    assert region.memory_bytes == 160
    assert (region.hits, region.misses) == (3 * 10, 25 + 3 * 15)


def test_copies_of_marked_modules_are_independent():
    module = torchcache.mark(nn.Linear(4, 4), freeze=True)
    x = torch.randn(5, 4)
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), expected)
        assert counts(other) == (5, 0)
        with torch.no_grad():
            other.weight.zero_(), other.bias.zero_()
        assert not other(x).any()
    torch.testing.assert_close(module(x), expected)


def test_mark_takes_modules_and_the_decorator_classes():
    with pytest.raises(torchcache.MarkError, match="instance"):
        torchcache.mark(nn.Linear)
    with pytest.raises(torchcache.MarkError, match=r"torchcache\.mark"):
        cached(nn.Linear(2, 2))


def test_stats_prints_a_table_and_takes_only_models():
    module = Plain()
    module(torch.randn(4, 6))
    assert "Plain" in str(torchcache.stats(module))
    with pytest.raises(TypeError):
        torchcache.stats(3)


def test_a_shared_input_may_come_first_and_may_have_as_many_rows_as_the_batch():
    module = frozen(lambda self, table, x: x @ table, nn.Linear(2, 2))
    table = torch.randn(4, 3)
    for rows in (5, 4, 1, 4, 5):
        x = torch.randn(rows, 4)
        for _ in range(2):
            torch.testing.assert_close(module(table, x), x @ table)
    assert torchcache.stats(module).hits >= 19


@pytest.mark.parametrize("door", ["eager", "transform", "partial"])
def test_modules_and_their_rows_are_freed(door):
    module = torchcache.mark(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), freeze=door != "partial")
    module[0].requires_grad_(False)
    model = torchcache.transform(nn.Sequential(module)) if door == "transform" else module
    for _ in range(2):
        model(torch.randn(3, 4))
    gone = weakref.ref(module)
    torch._dynamo.reset()
    del module, model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("asking", [0, 3], ids=["guarded by Dynamo", "watched"])
@pytest.mark.parametrize("by_class", [False, True])
def test_models_that_were_compiled_are_freed(asking, by_class, monkeypatch):
    monkeypatch.setattr("torchcache.graph.trust.ASKING", asking)
    if by_class:
        marked = cached(type("Marked", (nn.Sequential,), {}))(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    else:
        marked = torchcache.mark(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), freeze=True)
    model = nn.Sequential(marked)
    del marked
    compiled = torch.compile(model, backend="torchcache", options={"inner": "eager"})
    for _ in range(2):
        compiled(torch.randn(3, 4))
    parts = [model, model[0], model[0][1], *model.parameters()]
    gone = [weakref.ref(part) for part in parts]
    del model, compiled, parts
    gc.collect()
    assert not any(reference() is not None for reference in gone)


@pytest.mark.parametrize("door", ["eager", "transform"])
def test_rows_of_old_weights_make_room_when_memory_is_full(door):
    module = torchcache.mark(nn.Linear(4, 4), freeze=True, max_memory_cache_size=16 * 10)
    run = torchcache.transform(nn.Sequential(module)) if door == "transform" else module
    x = torch.randn(10, 4)
    for _ in range(3):
        with torch.no_grad():
            module.weight.add_(1)
        run(x), run(x)
    (region,) = torchcache.stats(module).regions
    assert (region.misses, region.hits) == (30, 30)
    assert region.memory_bytes == 160


def test_a_module_may_set_itself_up_after_every_change_from_outside():
    class Encoder(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    module, plain = torchcache.mark(Encoder(4, 4, batch_first=True), freeze=True), Encoder(4, 4, batch_first=True)
    x = torch.randn(3, 5, 4)
    for seed in range(5):  # the first call with other parameter objects rewrites the list of them
        torch.manual_seed(seed)
        state = {name: torch.randn_like(tensor) for name, tensor in plain.state_dict().items()}
        module.load_state_dict(state, assign=True)
        plain.load_state_dict(state)
        for _ in range(3):  # under another key from the second call on
            torch.testing.assert_close(module(x), plain(x))
    assert torchcache.stats(module).hits == 15
