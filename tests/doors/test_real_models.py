"""Real architectures through every door: the same results as uncached, and the second time nothing is computed."""

import copy
import dataclasses
import functools

import pytest
import torch
from models import CASES, Adapter, adapt_last, build, captioned, clip_model, pair, unfreeze_last
from torch import nn

import torchcache
from torchcache import dynamo, torchcache_backend

BATCH, NEW = 8, 3
# One that reshapes by the batch size, and one that writes in place.
FEW = [case for case in CASES if case.name in ("bert", "resnet")]
PARTS = {"unfrozen": unfreeze_last, "adapted": adapt_last}
# What a trainable part is tried with in every run, one kind of model through each door; the rest is slow.
QUICK = [
    ("bert", "unfrozen", "aot_eager"), ("vit", "adapted", "call"), ("clip", "unfrozen", "call"),
    ("timm-vit", "unfrozen", "transform"), ("resnet", "unfrozen", "aot_eager"), ("resnet", "adapted", "transform"),
]  # fmt: skip


def cases_and_doors(*doors):
    """All through the first door and a few through the others; the rest is slow."""
    return pytest.mark.parametrize(
        ("case", "door"),
        [
            pytest.param(
                case, door, id=f"{case}-{door}", marks=[] if case in FEW or door == doors[0] else [pytest.mark.slow]
            )
            for case in CASES
            for door in doors
        ],
    )


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def opened(door, model):
    """The model as a user runs it through this door."""
    if door == "transform":
        return torchcache.transform(model)
    if door == "call":
        return model
    whole = dynamo.passes_structures() and dynamo.names_parts()  # an older torch ends its graph at a mark
    return torch.compile(model, backend=torchcache_backend, options={"inner": door}, fullgraph=whole)


def batches(case):
    """Eight unknown rows, the same eight, and five of them among three others."""
    first = case.inputs(BATCH)
    order = torch.randperm(BATCH)
    mixed = [torch.cat([old[: BATCH - NEW], new])[order] for old, new in zip(first, case.inputs(NEW), strict=True)]
    return {"miss": first, "hit": [leaf.clone() for leaf in first], "mixed": mixed}


def memory_order(leaf):
    """Dimensions from the outermost to the innermost."""
    return sorted((dim for dim in range(leaf.ndim) if leaf.shape[dim] > 1), key=lambda dim: -leaf.stride(dim))


def assert_same(given, expected, what):
    """Equal contents within rounding; equal types, structure, shapes, dtypes and order in memory."""
    assert type(given) is type(expected), what
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4, msg=lambda text: f"{what}: {text}")
        # A hit is dense where the original may be a view into a larger tensor; the order in memory is the same.
        assert memory_order(given) == memory_order(expected), f"{what}: {given.stride()} for {expected.stride()}"
        assert given.requires_grad == expected.requires_grad, what
    elif isinstance(expected, (tuple, list)):
        assert len(given) == len(expected), what
        for index, (a, b) in enumerate(zip(given, expected, strict=True)):
            assert_same(a, b, f"{what}[{index}]")
    elif isinstance(expected, dict):
        assert list(given) == list(expected), what
        for key in expected:
            assert_same(given[key], expected[key], f"{what}[{key!r}]")
    else:
        assert given == expected, what


def gradients(model, outputs):
    """Of every trainable parameter, after a backward pass from the logits."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    model.zero_grad()
    nn.functional.cross_entropy(logits, torch.arange(logits.shape[0]) % 3).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_trains_the_same(run, model, twin, inputs, what):
    found, expected = run(*inputs), twin(*inputs)
    assert_same(found, expected, what)
    found, expected = gradients(model, found), gradients(twin, expected)
    assert list(found) == list(expected), what
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), f"{what}: gradient of {name}"
        if gradient is not None:
            torch.testing.assert_close(
                found[name], gradient, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{what}: gradient of {n}: {text}"
            )


def assert_counts(run, misses, hits):
    stats = torchcache.stats(run)
    assert (stats.misses, stats.hits, stats.bypasses) == (misses, hits, 0)


@cases_and_doors("call", "transform", "aot_eager")
def test_outputs_gradients_and_counts(case, door):
    model, twin = pair(case)
    keys = list(model.state_dict())
    run = opened(door, model)
    run.train()
    twin.train()
    twin.backbone.eval()
    misses = hits = 0
    for name, inputs in batches(case).items():
        assert_trains_the_same(run, model, twin, inputs, name)
        new = {"miss": BATCH, "hit": 0, "mixed": NEW}[name]
        misses, hits = misses + new, hits + BATCH - new
        assert_counts(run, misses, hits)
    assert list(model.state_dict()) == keys == list(twin.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("case", [*FEW, *(case for case in CASES if case.name == "timm-vit")], ids=str)
def test_inductor(case):
    model, twin = pair(case)
    run = opened("inductor", model)
    misses = hits = 0
    for name, inputs in batches(case).items():
        assert_trains_the_same(run, model, twin, inputs, name)
        new = {"miss": BATCH, "hit": 0, "mixed": NEW}[name]
        misses, hits = misses + new, hits + BATCH - new
        assert_counts(run, misses, hits)


@pytest.mark.parametrize(
    ("case", "part", "door"),
    [
        pytest.param(
            case,
            part,
            door,
            id=f"{case}-{part}-{door}",
            marks=[] if (str(case), part, door) in QUICK else [pytest.mark.slow],
        )
        for case in CASES
        for part in PARTS
        for door in ("call", "transform", "eager", "aot_eager", "inductor")
    ],
)
def test_a_part_of_it_trains(case, part, door):
    model, twin = pair(case, functools.partial(PARTS[part], case))
    model.shows = twin.shows = False
    assert part == "unfrozen" or any(isinstance(module, Adapter) for module in model.modules())
    run = opened(door, model)
    for name, inputs in batches(case).items():
        assert_trains_the_same(run, model, twin, inputs, name)
    stats = torchcache.stats(run)
    assert len(stats.regions) == case.regions
    assert (stats.misses, stats.hits) == ((BATCH + NEW) * case.regions, (2 * BATCH - NEW) * case.regions)
    assert stats.bypasses == 0


@pytest.mark.parametrize("door", ["call", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_padded_batches_of_varying_sizes_hit_in_the_second_epoch(door):
    case = CASES[0]
    model, twin = pair(case, functools.partial(unfreeze_last, case))
    model.shows = twin.shows = False
    run, data = opened(door, model), case.inputs(20)
    for _ in range(2):
        for rows in torch.randperm(20).split(7):
            assert_trains_the_same(run, model, twin, [leaf[rows] for leaf in data], "an epoch")
    assert_trains_the_same(run, model, twin, [leaf[:1] for leaf in data], "one row")
    stats = torchcache.stats(model)
    assert (stats.hits, stats.bypasses) == (20, 0)
    assert stats.misses in (20, 21)  # Dynamo makes a graph of its own for one row


@pytest.mark.parametrize("door", ["call", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_lora_of_peft(door):
    peft = pytest.importorskip("peft")
    case = CASES[0]

    def adapt(backbone):
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=2, target_modules=["query"], layers_to_transform=[1], lora_dropout=0.0, init_lora_weights=False
        )
        peft.inject_adapter_in_model(config, backbone)

    model, twin = pair(case, adapt)
    model.shows = twin.shows = False
    run, data = opened(door, model), case.inputs(12)
    for _ in range(2):
        for rows in torch.randperm(12).split(6):
            assert_trains_the_same(run, model, twin, [leaf[rows] for leaf in data], "an epoch")
    assert (torchcache.stats(model).misses, torchcache.stats(model).hits) == (12, 12)


@pytest.mark.parametrize(
    ("case", "part"),
    [
        pytest.param(case, part, id=f"{case}-{part}", marks=[] if case in FEW else [pytest.mark.slow])
        for case in CASES
        for part in ("frozen", "unfrozen")
    ],
)
def test_transform_fills_what_compile_reads(case, part, tmp_path):
    change = functools.partial(unfreeze_last, case) if part == "unfrozen" else None
    options = {"persistent": True, "persistent_cache_dir": tmp_path}
    writer, twin = pair(case, change, **options)
    inputs = case.inputs(BATCH)
    torchcache.transform(writer)(*inputs)
    torchcache.flush()
    torch._dynamo.reset()
    reader, _ = pair(case, change, **options)
    run = opened("aot_eager", reader)
    # Dynamo makes a graph of its own for one row, whose trainable part is cut at other rows.
    for rows in (BATCH, 5, 1) if change is None else (BATCH, 5):
        some = [leaf[:rows].clone() for leaf in inputs]
        assert_same(run(*some), twin(*some), f"{rows} rows")
        assert torchcache.stats(run).misses == 0
    stats = torchcache.stats(run)
    assert sum(region.disk_hits for region in stats.regions) == BATCH * (case.regions if change is not None else 1)


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("sizes", [(8, 1, 5), pytest.param((5, 1, 8), marks=pytest.mark.slow)], ids=str)
def test_compile_fills_what_transform_reads(case, sizes, tmp_path):
    options = {"persistent": True, "persistent_cache_dir": tmp_path}
    writer, twin = pair(case, **options)
    inputs = case.inputs(BATCH)
    run = opened("aot_eager", writer)
    for rows in sizes:
        run(*[leaf[-rows:].clone() for leaf in inputs])
    assert torchcache.stats(run).misses == BATCH
    torchcache.flush()
    torch._dynamo.reset()
    reader, _ = pair(case, **options)
    torchcache.transform(reader)
    assert_same(reader(*inputs), twin(*inputs), "read")
    assert torchcache.stats(reader).misses == 0


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in FEW else [pytest.mark.slow]) for case in CASES], ids=str
)
def test_a_copy_uses_its_own_weights(case):
    model, twin = pair(case)
    run = torchcache.transform(model)
    inputs = case.inputs(4)
    assert_same(run(*inputs), twin(*inputs), "the original")
    other = build(case, seed=1)
    copied = copy.deepcopy(model)
    copied.load_state_dict(other.state_dict())
    for name, net, plain in (("the copy", copied, other), ("the original again", model, twin)):
        assert_same(net(*inputs), plain(*inputs), name)
    assert torchcache.stats(model).misses == torchcache.stats(copied).misses == 4


class Valued(nn.Module):
    """A backbone whose outputs have the same shape in two dtypes."""

    def __init__(self, dtype):
        super().__init__()
        self.layer = nn.Linear(10, 10)
        self.dtype = dtype

    def forward(self, x):
        return self.layer(x).mul(100).to(self.dtype)


class Plus(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.backbone = torchcache.mark(Valued(dtype), freeze=True)

    def forward(self, x):
        return self.backbone(x) + 1


@pytest.mark.slow
def test_inductor_never_takes_the_code_of_another_region(tmp_path, monkeypatch):
    # Inductor finds compiled code by the text of the outer graph, which does not show what the lookup returns.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(8, 10)
    for dtype in (torch.float32, torch.int32, torch.float64):
        torch._dynamo.reset()
        model = Plus(dtype)
        expected = model.backbone.layer(x).mul(100).to(dtype) + 1
        torch.testing.assert_close(opened("inductor", model)(x), expected, atol=1e-3, rtol=1e-4)


class ByTower(nn.Module):
    """CLIP with a trainable layer over both encoders, which are marked one by one."""

    def __init__(self):
        super().__init__()
        self.clip = clip_model().requires_grad_(False).eval()
        self.head = nn.Linear(32, 3)

    def forward(self, pixel_values, input_ids, attention_mask):
        image = self.clip.get_image_features(pixel_values=pixel_values)
        text = self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return self.head(torch.cat([image.pooler_output, text.pooler_output], 1))


@pytest.mark.parametrize("door", ["call", "aot_eager"])
def test_towers_marked_one_by_one(door):
    model = ByTower()
    twin = copy.deepcopy(model)
    torchcache.mark(model.clip.vision_model)
    torchcache.mark(model.clip.text_model)
    run = opened(door, model)
    case = dataclasses.replace(CASES[0], inputs=captioned, regions=2)
    misses = hits = 0
    for name, inputs in batches(case).items():
        assert_trains_the_same(run, model, twin, inputs, name)
        new = {"miss": BATCH, "hit": 0, "mixed": NEW}[name]
        misses, hits = misses + new, hits + BATCH - new
        assert_counts(run, 2 * misses, 2 * hits)
    # One image with many captions: each tower has its own rows.
    inputs = case.inputs(BATCH)
    inputs = (inputs[0][:1].repeat(BATCH, 1, 1, 1), *inputs[1:])
    assert_trains_the_same(run, model, twin, inputs, "one image")
    stats = torchcache.stats(run)
    assert stats.misses == 2 * misses + 1 + BATCH


class Contrast(nn.Module):
    def __init__(self):
        super().__init__()
        self.clip = clip_model().requires_grad_(False).eval()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values, input_ids, attention_mask):
        outputs = self.clip(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)
        return outputs.logits_per_image * self.scale


@pytest.mark.parametrize("door", ["call", "aot_eager"])
def test_similarities_between_rows_are_computed(door):
    model = Contrast()
    twin = copy.deepcopy(model)
    torchcache.mark(model.clip)
    run = opened(door, model)
    case = dataclasses.replace(CASES[0], inputs=captioned)
    for name, inputs in batches(case).items():
        assert_same(run(*inputs), twin(*inputs), name)
    (region,) = torchcache.stats(run).regions
    assert (region.hits, region.misses, region.bypasses) == (0, 0, 3 * BATCH)
    assert any("logits_per_image" in reason for reason in region.reasons)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_two_calls_of_one_backbone_share_rows(case):
    class Siamese(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, left, right):
            return self.model(*left) - self.model(*right)

    model, twin = pair(case)
    model.shows = twin.shows = False
    siamese, plain = torchcache.transform(Siamese(model)), Siamese(twin)
    left, right = case.inputs(4), case.inputs(4)
    assert_same(siamese(left, right), plain(left, right), "first")
    assert torchcache.stats(siamese).misses == 8
    assert_same(siamese(right, left), plain(right, left), "swapped")
    assert torchcache.stats(siamese).misses == 8
