"""``cache_dtype``: what is stored in fewer bits comes back as near as its dtype allows, and nothing as another kind."""

import json
import math
import sqlite3
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from marked import counts, frozen, reasons
from torch import nn

import torchcache
from torchcache.cli.main import main
from torchcache.store import precision

INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
SCALED = [INT8, E4M3, E5M2]
# Half the distance of the largest numbers, by the largest.
HALF_STEP = {INT8: 0.5 / 127, E4M3: 16 / 448, E5M2: 4096 / 57344}


def through(dtype, **options):
    """A module that returns its argument, through a store of ``dtype``, whose rows were seen to be rows already."""
    return frozen(lambda self, x: x * 1, cache_dtype=dtype, **options)


def served(module, x):
    """What the module gives for rows that it met before, and how many of them it computed again."""
    module(x)
    before = counts(module)[0]
    return module(x), counts(module)[0] - before


def check_served(x, dtype):
    """Rows come back within half a step; those that ``dtype`` cannot hold as they were computed."""
    module = through(dtype)
    if x[0].numel():
        module((torch.arange(4.0)[:, None] + torch.arange(x[0].numel())).reshape(4, *x.shape[1:]).to(x.dtype))
    got, computed = served(module, x)
    assert (got.dtype, got.shape) == (x.dtype, x.shape)
    flat = [leaf.reshape(4, x[0].numel()).double() for leaf in (got, x)]
    for mine, row in zip(*flat, strict=True):
        largest = float(row.abs().max()) if row.numel() else 0.0
        if not math.isfinite(largest):
            assert torch.equal(mine.nan_to_num(7, 8, 9), row.nan_to_num(7, 8, 9))
            continue
        assert mine.isfinite().all()
        bound = largest * (HALF_STEP[dtype] + torch.finfo(x.dtype).eps)
        assert float((mine - row).abs().max() if row.numel() else 0) <= bound
        if largest:
            assert float(mine.abs().max()) == pytest.approx(largest, rel=2 * torch.finfo(x.dtype).eps)
    if x[0].numel() and not reasons(module):
        usual = [row for row in flat[1] if float(row.abs().max()) == 0 or 1e-30 < row.abs().max() < 1e30]
        assert computed <= len(x) - len(usual)


NUMBERS = st.one_of(
    st.floats(width=32),
    st.floats(-10, 10, width=32),
    st.sampled_from(
        [0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 6e-8, 1e-4, 65504.0, 1e5, -3.4e38, math.inf, -math.inf, math.nan]
    ),
)
SHAPES = st.sampled_from([(), (0,), (1,), (3,), (2, 2), (2, 0, 3)])


@st.composite
def rows(draw):
    shape = draw(SHAPES)
    count = 4 * math.prod(shape)
    numbers = draw(st.lists(NUMBERS, min_size=count, max_size=count))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    return torch.tensor(numbers, dtype=torch.float64).reshape(4, *shape).to(dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(x=rows(), dtype=st.sampled_from(SCALED))
@example(x=torch.zeros(4, 3), dtype=INT8)
@example(x=torch.tensor([[1.0, torch.inf], [2.0, torch.nan], [3.4e38, 1.0], [1e-44, 0.0]]), dtype=INT8)
@example(x=torch.tensor([[1.0, 65504.0], [6e-8, 0.0], [1.0, -1.0], [0.0, 0.0]]).half(), dtype=E4M3)
@example(x=torch.tensor([[3.3895e38, 1.0], [1.0, 2.0], [1e-30, 0.0], [-3.3895e38, 7.0]]).bfloat16(), dtype=E5M2)
@example(x=torch.tensor([[1e300, 1.0], [1e-300, 0.0], [1e308, 0.0], [1.0, 1e-9]]).double(), dtype=INT8)
def test_rows_come_back_within_half_a_step_or_as_they_were_computed(x, dtype):
    check_served(x, dtype)


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("plant", ["scale of the batch", "scale too small", "scale too large", "no check of rows"])
def test_planted_bugs_of_scales_are_found(dtype, plant, monkeypatch):
    numbers = precision._numbers

    def wrong(leaf, kind):
        codes, scale, fits = numbers(leaf, kind)
        if plant == "scale of the batch":
            return (leaf / scale.amax()).to(kind), scale.amax().expand_as(scale), fits
        if plant == "no check of rows":
            return codes, scale, torch.ones_like(fits)
        return codes, scale * (0.9 if plant == "scale too small" else 1.1), fits

    monkeypatch.setattr(precision, "_numbers", wrong)
    x = torch.tensor([[1.0, 0.5, 0.3], [1e-3, 2e-3, 3e-4], [5.0, torch.inf, 1.0], [1e3, -7.0, 2.0]])
    with pytest.raises(AssertionError):
        check_served(x, dtype)


@pytest.mark.parametrize("dtype", SCALED)
def test_memory_holds_a_byte_an_element_and_a_scale_a_row(dtype):
    module = through(dtype)
    served(module, torch.randn(10, 6, 7))
    (region,) = torchcache.stats(module).regions
    assert region.memory_bytes == 10 * (6 * 7 + 4)
    assert torchcache.explain(module, torch.randn(2, 6, 7)).regions[0].row_bytes == 6 * 7 + 4


@pytest.mark.parametrize("given_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_number_of_float8_comes_back(given_dtype):
    every = torch.arange(256, dtype=torch.uint8)
    for dtype in (E4M3, E5M2):
        numbers = every.view(dtype).to(torch.float64)
        numbers = numbers[numbers.isfinite()]
        x = torch.stack([numbers, numbers / 2, -numbers, numbers.flip(0)])  # their scales are powers of two
        got, computed = served(through(dtype), x.to(given_dtype))
        assert computed == 0
        assert torch.equal(got, x.to(given_dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_makes_no_finite_value_infinite(dtype, warnings):
    limit = torch.finfo(dtype).max
    x = torch.tensor([[1.0, 2.0], [limit, -limit], [3.4028e38, 1.0], [torch.inf, torch.nan], [1.0, -torch.inf]])
    got, computed = served(through(dtype), x)
    torch.testing.assert_close(got, x, rtol=1e-2, atol=0, equal_nan=True)
    assert computed == 1
    assert any("too large" in text for text in warnings)


@pytest.mark.parametrize("dtype", SCALED)
def test_what_is_stored_of_a_row_does_not_depend_on_its_company(dtype, tmp_path):
    x = torch.randn(12, 5) * torch.logspace(-3, 3, 12)[:, None]
    stored = []
    for name, size in (("one", 12), ("other", 5)):
        options = {"persistent": True, "persistent_cache_dir": tmp_path / name, "zstd_compression_level": None}
        module = frozen(lambda self, x: x * 2, nn.Linear(2, 2), cache_dtype=dtype, **options)
        nn.init.ones_(module.parts[0].weight), nn.init.zeros_(module.parts[0].bias)
        for start in range(0, 12, size):
            module(x[start : start + size])
        torchcache.flush()
        with sqlite3.connect(tmp_path / name / "rows-1" / "cache.db") as connection:
            stored.append(dict(connection.execute("SELECT key, value FROM Cache")))
        both = module(x)
        order = torch.randperm(12)
        assert torch.equal(module(x[order]), both[order])
    assert stored[0] == stored[1]
    assert len(stored[0]) == 12


RUN = """
    import sys, torch, torchcache
    from torch import nn

    class Backbone(nn.Module):
        def forward(self, x):
            return {"wide": x * 3.0, "count": x.long(), "inner": (x.mean(1), [x.half() - 1])}

    torch.manual_seed(0)
    x = torch.randn(16, 9)
    chosen = {"wide": torch.int8, "inner[0]": torch.float8_e5m2, "inner[1][0]": torch.float8_e4m3fn}
    module = torchcache.mark(Backbone(), persistent=True, persistent_cache_dir=sys.argv[1], cache_dtype=chosen,
                             max_memory_cache_size=int(sys.argv[2]))
    with torchcache.bypass():
        expected = module(x)
    order = torch.randperm(16)
    for rows in (order[:5], order[5:], order):
        got = module(x[rows])
        assert torch.equal(got["count"], expected["count"][rows])
        torch.testing.assert_close(got["inner"][0], expected["inner"][0][rows])  # a number a row has no error
        half = got["inner"][1][0], expected["inner"][1][0]
        for mine, its, step in ((got["wide"], expected["wide"], 1 / 250), (*half, 1 / 27)):
            assert mine.dtype == its.dtype
            assert ((mine - its[rows]).abs().amax(1) <= step * its[rows].abs().amax(1)).all()
    torchcache.flush()
    (region,) = torchcache.stats(module).regions
    print(region.misses, region.disk_hits, region.alarms)
"""


@pytest.mark.once
@pytest.mark.parametrize("memory", [10**6, 400, 0])
def test_a_second_process_finds_the_rows_also_where_memory_is_short(tmp_path, memory):
    for expected in (["16", "0", "0"], ["0", "16", "0"]):
        arguments = [sys.executable, "-c", textwrap.dedent(RUN), str(tmp_path), str(memory)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said = done.stdout.split()
        assert said[2] == "0"
        if memory == 10**6:
            assert said == expected
        assert said[0] == "0" or expected[0] == "16"


def structured(kind):
    if kind == "ModelOutput":
        outputs = pytest.importorskip("transformers.modeling_outputs")
        return lambda a, b: outputs.BaseModelOutputWithPooling(last_hidden_state=a, pooler_output=b)
    return {
        "dict": lambda a, b: {"last_hidden_state": a, "pooler_output": b},
        "tuple": lambda a, b: (a, b),
        "nested": lambda a, b: ((a, 3), {"x": [b]}),
        "tensor": lambda a, b: a,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "name", "others"),
    [
        ("ModelOutput", "last_hidden_state", ["pooler_output"]),
        ("dict", "last_hidden_state", ["pooler_output"]),
        ("tuple", "[0]", ["[1]"]),
        ("nested", "[0][0]", ["[1]['x'][0]"]),
        ("tensor", "output", []),
    ],
)
def test_outputs_are_named_as_explain_shows_them(kind, name, others, warnings):
    make = structured(kind)
    x = torch.randn(8, 6)

    def leaves(module):
        taken = module(x)
        flat, _ = torch.utils._pytree.tree_flatten(taken)
        return [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]

    module = frozen(lambda self, x: make(x * 2, x * 3), cache_dtype={name: INT8})
    (planned,) = torchcache.explain(module, x).regions
    assert planned.outputs == [f"{name}: float32 (6,) as int8", *(f"{other}: float32 (6,)" for other in others)]
    leaves(module)
    first, *rest = leaves(module)
    assert counts(module) == (8, 8)
    assert 0 < float((first - x * 2).abs().max()) < 0.1
    assert all(torch.equal(leaf, x * 3) for leaf in rest)
    assert planned.row_bytes == 6 + 4 + 24 * len(rest)
    if others:  # all the others, but for one
        module = frozen(lambda self, x: make(x * 2, x * 3), cache_dtype={"*": E5M2, name: None})
        leaves(module)
        first, *rest = leaves(module)
        assert torch.equal(first, x * 2)
        assert not any(torch.equal(leaf, x * 3) for leaf in rest)
    assert not [text for text in warnings if "cache_dtype" in text]


def test_names_that_no_output_has_are_told_once_with_those_that_there_are(warnings):
    module = frozen(lambda self, x: {"a": x * 2, "b": x * 3}, cache_dtype={"a": INT8, "c": INT8})
    for _ in range(3):
        module(torch.randn(4, 3))
    (text,) = [text for text in warnings if "cache_dtype" in text]
    assert "names 'c', but the outputs are 'a', 'b'" in text


def test_integers_and_booleans_and_a_byte_an_element_stay_as_they_are():
    module = frozen(lambda self, x: (x > 0, x.long(), x.to(E5M2), torch.complex(x, -x), x), cache_dtype=INT8)
    x = torch.randn(6, 5)
    module(x)
    *exact, rounded = module(x)
    assert counts(module) == (6, 6)
    for leaf, expected in zip(exact, (x > 0, x.long(), x.to(E5M2), torch.complex(x, -x)), strict=True):
        assert leaf.dtype == expected.dtype
        assert torch.equal(leaf.to(torch.complex64), expected.to(torch.complex64))
    assert not torch.equal(rounded, x)


def test_rows_of_another_precision_are_not_found(tmp_path):
    x = torch.randn(5, 4)
    found = {}
    chosen = [None, torch.bfloat16, INT8, E4M3, {"output": INT8}, {"*": torch.bfloat16}, {"output": None}, {}]
    for number, dtype in enumerate(chosen):
        module = through(dtype, persistent=True, persistent_cache_dir=tmp_path)
        module(x)
        torchcache.flush()
        found[number] = counts(module)
    assert [hits for _, hits in found.values()] == [0, 0, 0, 0, 0, 5, 5, 5]  # the last three say what others did


def test_an_attribute_overrides_the_option_also_when_its_mapping_is_written_to():
    module = frozen(lambda self, x: (x * 2, x * 3), cache_dtype=torch.bfloat16)
    x = torch.randn(5, 40)
    module.torchcache_cache_dtype = {"[0]": INT8}
    for changed in (False, True):
        if changed:
            module.torchcache_cache_dtype["[1]"] = INT8
        module(x)
        one, other = module(x)
        assert not torch.equal(one, x * 2)
        assert torch.equal(other, x * 3) is not changed
        assert torchcache.stats(module).regions[0].memory_bytes == 5 * (44 + (44 if changed else 160))


def test_directories_tell_the_precision_of_their_rows(tmp_path, capsys):
    names = {"a": INT8, "\udcff\n" * 3: E4M3, **{f"layer{index}" * 8: torch.float16 for index in range(40)}}
    for dtype in (INT8, names):
        through(dtype, persistent=True, persistent_cache_dir=tmp_path)(torch.randn(4, 3))
        torchcache.flush()
        assert main(["info", str(tmp_path), "--json"]) == 0
        held = json.loads(capsys.readouterr().out)["regions"]
        assert all(region["region"] is not None for region in held)
    texts = [region["region"]["options"]["cache_dtype"] for region in held]
    assert "torch.int8 scaled" in texts or any(text.startswith("'a': torch.int8 scaled") for text in texts)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, *SCALED])
def test_what_the_store_rounds_is_no_alarm_and_is_told(dtype):
    module = torchcache.mark(nn.Sequential(nn.Linear(6, 30), nn.Tanh()), freeze=True, cache_dtype=dtype, audit=0.5)
    x = torch.randn(40, 6)
    for step in range(12):
        module(x[torch.randperm(40)[: 10 + step]])
    (region,) = torchcache.stats(module).regions
    assert region.alarms == 0
    assert region.audit_seconds > 0
    told = torchcache.audit(module, x, rows=40)
    assert told.ok
    (audited,) = told.regions
    (planned,) = torchcache.explain(module, x).regions
    shown = (str(torchcache.stats(module)), str(torchcache.summary(module)), str(torchcache.explain(module, x)))
    if dtype is None:
        assert region.largest_error is planned.largest_error is None
        assert audited.largest_relative < 1e-5
        assert not any("largest error" in text for text in shown)
        return
    most = HALF_STEP.get(dtype) or torch.finfo(dtype).eps / 2
    assert most / 10 < region.largest_error <= most + 1e-6
    assert most / 10 < audited.largest_relative <= most + 1e-6
    assert planned.largest_error == torchcache.stats(module).regions[0].largest_error
    assert all("largest error" in text for text in shown)


@pytest.mark.parametrize("dtype", [torch.float16, *SCALED])
@pytest.mark.parametrize("size", [1e-7, 1e-3, 1e3])
def test_small_and_large_outputs_raise_no_alarm_either(dtype, size):
    module = frozen(lambda self, x: (x * size, x.sum(1) * size), cache_dtype=dtype, audit=0.5)
    for _ in range(6):
        module(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)))
    (region,) = torchcache.stats(module).regions
    assert (region.alarms, region.misses) == (0, 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *SCALED])
def test_an_output_that_really_changed_is_found(dtype, tmp_path):
    factor = tmp_path / "factor"  # what a file says is in no identity
    factor.write_text("2.0")
    module = frozen(lambda self, x: x * float(factor.read_text()), cache_dtype=dtype, audit=0.5)
    x = torch.randn(20, 8)
    for _ in range(3):
        module(x)
    factor.write_text(str(2.0 * (1 + 2 * HALF_STEP.get(dtype, 2e-3) + 0.001)))
    assert not torchcache.audit(module, x, rows=20).ok
    for _ in range(10):
        module(x)
    assert torchcache.stats(module).regions[0].alarms


@pytest.mark.parametrize("door", ["transform", "compile"])
def test_a_head_trains_on_rows_of_int8(door):
    backbone = nn.Sequential(nn.Linear(4, 16), nn.Tanh())
    model = nn.Sequential(torchcache.mark(backbone, freeze=True, cache_dtype=INT8), nn.Linear(16, 2))
    run = torchcache.transform(model) if door == "transform" else torch.compile(model, backend="eager")
    x = torch.randn(12, 4)
    for _ in range(3):
        loss = run(x).square().mean()
        loss.backward()
    with torchcache.bypass(), torch.no_grad():
        torch.testing.assert_close(run(x), model[1](backbone(x)), atol=0.05, rtol=0)
    assert torchcache.stats(run).regions[0].hits == 24
