"""Real architectures through every door: the same results as uncached, and the second time nothing is computed."""

import copy
import dataclasses
import functools

import pytest
import torch
from models import CASES, Adapter, adapt_last, build, captioned, clip_model, pair, unfreeze_last
from torch import nn
from torch.utils import _pytree as pytree

import torchcache
from torchcache import torchcache_backend
from torchcache.lookup.op import LOOKUP, _find

BATCH, NEW = 8, 3
# Their graphs reshape by the batch size, where convolutional ones do not.
TOKEN_MIXERS = [case for case in CASES if case.name in ("bert", "vit", "llama", "clip", "timm-vit", "timm-swin")]
SMALLEST = [case for case in CASES if case.name in ("bert", "resnet")]

# What is left of a model in the outer graph when all of its backbone is looked up: the head's one linear layer.
HEAVY = ("linear", "conv2d", "matmul", "scaled_dot_product_attention", "layer_norm", "batch_norm", "embedding")
FEW = ("bert", "resnet")


def cases_and_doors(*doors, first=CASES, cheap=()):
    """Those in ``first`` through the first door and cheap ones, a few through the others; the rest is slow."""
    pairs = [(case, door) for case in CASES for door in doors]
    return pytest.mark.parametrize(
        ("case", "door"),
        [
            pytest.param(
                case,
                door,
                id=f"{case}-{door}",
                marks=[] if case.name in FEW or (door in (doors[0], *cheap) and case in first) else [pytest.mark.slow],
            )
            for case, door in pairs
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
    if door == "compile":
        return torch.compile(model, backend=torchcache_backend, options={"inner": "aot_eager"}, fullgraph=True)
    if door == "inductor":
        return torch.compile(model, backend=torchcache_backend, fullgraph=True)
    return model


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


def assert_counts(run, case, door, misses, hits):
    stats = torchcache.stats(run)
    regions = 1 if door == "eager" else case.regions
    assert (stats.misses, stats.hits, stats.bypasses) == (misses * regions, hits * regions, 0)


def looked_up(model):
    """The regions that the graphs of a transformed model look up, without duplicates for retraced graphs."""
    (graph,) = torchcache.graphs(model)
    return [(node, _find(node.args[2])) for node in graph.graph.nodes if node.target is LOOKUP]


@cases_and_doors("transform", "eager", "compile", cheap=["eager"])
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
        assert_counts(run, case, door, misses, hits)
    assert list(model.state_dict()) == keys == list(twin.state_dict())
    if door == "transform":
        (graph,) = torchcache.graphs(model)
        left = [getattr(node.target, "__name__", "") for node in graph.graph.nodes if node.op == "call_function"]
        assert [name for name in left if name in HEAVY] == ["linear"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*SMALLEST, *(case for case in CASES if case.name == "timm-vit")], ids=str)
def test_inductor(case):
    model, twin = pair(case)
    run = opened("inductor", model)
    misses = hits = 0
    for name, inputs in batches(case).items():
        assert_trains_the_same(run, model, twin, inputs, name)
        new = {"miss": BATCH, "hit": 0, "mixed": NEW}[name]
        misses, hits = misses + new, hits + BATCH - new
        assert_counts(run, case, "inductor", misses, hits)


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALLEST, ids=str)
def test_inductor_partly_trainable(case):
    model, twin = pair(case, functools.partial(unfreeze_last, case))
    model.shows = twin.shows = False
    run = opened("inductor", model)
    for name, inputs in batches(case).items():
        assert_trains_the_same(run, model, twin, inputs, name)
    stats = torchcache.stats(run)
    assert (len(stats.regions), stats.misses, stats.hits) == (1, BATCH + NEW, 2 * BATCH - NEW)


def read_by(block, run, inputs):
    """Row shapes of the tensors that ``block`` gets as its first argument."""
    seen = []
    with block.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True):
        run(*inputs)
    args, kwargs = seen[0]
    first = args[0] if args else next(iter(kwargs.values()))
    return [leaf.shape[1:] for leaf in pytree.tree_leaves(first)]


@cases_and_doors("transform", "compile", "eager")
def test_last_block_trainable(case, door):
    model, twin = pair(case, functools.partial(unfreeze_last, case))
    model.shows = twin.shows = False
    run = opened(door, model)
    given = batches(case)
    for name, inputs in given.items():
        assert_trains_the_same(run, model, twin, inputs, name)
    stats = torchcache.stats(run)
    assert len(stats.regions) == case.regions
    assert (stats.misses, stats.hits) == ((BATCH + NEW) * case.regions, (2 * BATCH - NEW) * case.regions)
    if door != "transform":
        return
    regions = looked_up(model)
    assert len(regions) == case.regions
    node, region = max(regions, key=lambda found: any("pixel" in n.name or "image" in n.name for n in found[0].args[0]))
    # Sizes, not shapes: what is stored may be a transposed view of what the block is given.
    stored = [leaf.shape[1:].numel() for leaf in region.plan.outputs]
    assert stored == [shape.numel() for shape in read_by(case.blocks(twin.backbone)[-1], twin, given["miss"])]
    roles = [region.plan.roles[index] for index in region.given]
    rows = [source for source, role in zip(node.args[0], roles, strict=True) if role == "row"]
    if case.name != "llama":  # its mask is built under vmap, which no region can hold: the region reads it
        assert {source.op for source in rows} == {"placeholder"}
        assert "shared" not in region.plan.roles


@cases_and_doors("transform", "compile", first=[])
def test_adapters_in_the_last_block(case, door):
    model, twin = pair(case, functools.partial(adapt_last, case))
    model.shows = twin.shows = False
    assert any(isinstance(module, Adapter) for module in model.modules())
    run = opened(door, model)
    for name, inputs in batches(case).items():
        assert_trains_the_same(run, model, twin, inputs, name)
    stats = torchcache.stats(run)
    assert len(stats.regions) == case.regions
    assert (stats.misses, stats.hits) == ((BATCH + NEW) * case.regions, (2 * BATCH - NEW) * case.regions)


@cases_and_doors("frozen", "partly trainable", first=TOKEN_MIXERS)
def test_transform_fills_what_compile_reads(case, door, tmp_path):
    change = functools.partial(unfreeze_last, case) if door != "frozen" else None
    options = {"persistent": True, "persistent_cache_dir": tmp_path}
    writer, twin = pair(case, change, **options)
    inputs = case.inputs(BATCH)
    torchcache.transform(writer)(*inputs)
    torchcache.flush()
    torch._dynamo.reset()
    reader, _ = pair(case, change, **options)
    run = opened("compile", reader)
    for rows in (BATCH, 5, 1):
        some = [leaf[:rows].clone() for leaf in inputs]
        assert_same(run(*some), twin(*some), f"{rows} rows")
        assert torchcache.stats(run).misses == 0
    stats = torchcache.stats(run)
    assert sum(region.disk_hits for region in stats.regions) == BATCH * case.regions


@pytest.mark.parametrize("case", SMALLEST, ids=str)
@pytest.mark.parametrize("sizes", [(8, 1, 5), (5, 1, 8)], ids=str)
def test_compile_fills_what_transform_reads(case, sizes, tmp_path):
    options = {"persistent": True, "persistent_cache_dir": tmp_path}
    writer, twin = pair(case, **options)
    inputs = case.inputs(BATCH)
    run = opened("compile", writer)
    for rows in sizes:
        run(*[leaf[-rows:].clone() for leaf in inputs])
    assert torchcache.stats(run).misses == BATCH
    torchcache.flush()
    torch._dynamo.reset()
    reader, _ = pair(case, **options)
    torchcache.transform(reader)
    assert_same(reader(*inputs), twin(*inputs), "read")
    assert torchcache.stats(reader).misses == 0


@cases_and_doors("eager", "transform")
def test_a_copy_uses_its_own_weights(case, door):
    model, twin = pair(case)
    run = opened(door, model)
    inputs = case.inputs(4)
    assert_same(run(*inputs), twin(*inputs), "the original")
    other = build(case, seed=1)
    copied = copy.deepcopy(model)
    copied.load_state_dict(other.state_dict())
    for name, net, plain in (("the copy", copied, other), ("the original again", model, twin)):
        assert_same(net(*inputs), plain(*inputs), name)
    regions = 1 if door == "eager" else case.regions
    assert torchcache.stats(model).misses == 4 * regions
    assert torchcache.stats(copied).misses == 4 * regions


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
        return self.head(torch.cat([image, text], 1))


@pytest.mark.parametrize("door", ["transform", "compile", "eager"])
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
        assert_counts(run, case, "both towers", misses, hits)
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


def test_similarities_between_rows_are_refused_where_the_model_is_cached_as_a_whole():
    model = Contrast()
    torchcache.mark(model.clip)
    with pytest.raises(torchcache.TorchcacheError, match=r"row|batch"):
        model(*captioned(BATCH))


@pytest.mark.parametrize("door", ["transform", "compile"])
def test_similarities_between_rows_are_computed_outside_of_a_region(door):
    model = Contrast()
    twin = copy.deepcopy(model)
    torchcache.mark(model.clip)
    run = opened(door, model)
    case = dataclasses.replace(CASES[0], inputs=captioned)
    for name, inputs in batches(case).items():
        assert_same(run(*inputs), twin(*inputs), name)
    assert torchcache.stats(run).hits


@pytest.mark.parametrize("case", [case for case in CASES if case.name in FEW], ids=str)
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
    assert torchcache.stats(siamese).misses == 8 * case.regions
    assert_same(siamese(right, left), plain(right, left), "swapped")
    assert torchcache.stats(siamese).misses == 8 * case.regions
