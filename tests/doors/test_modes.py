"""Train and eval mode, frozen and trainable, gradients, and the modes and transforms of torch around a call."""

import contextlib
import copy

import pytest
import torch
from marked import counts, frozen, reasons, unmarked
from torch import nn
from torch.autograd import forward_ad
from torch.optim.swa_utils import AveragedModel, update_bn

import torchcache
from torchcache import cached

DOORS = {
    "eager": lambda model: model,
    "transform": torchcache.transform,
    "compile": lambda model: torch.compile(model, backend="torchcache", options={"inner": "aot_eager"}),
    "plain compile": lambda model: torch.compile(model, backend="aot_eager"),
}


class Net(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, *inputs):
        return self.backbone(*inputs) * 2


def opened(backbone, door, **options):
    """A model with ``backbone`` marked, opened through ``door``, and its uncached twin."""
    model = Net(backbone.eval()).requires_grad_(False)
    twin = copy.deepcopy(model)
    torchcache.mark(model.backbone, **{"audit": 0, **options})
    return DOORS[door](model), twin


def test_train_leaves_a_frozen_mark_in_eval_mode():
    module = torchcache.mark(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), freeze=True, audit=0)
    model = nn.Sequential(module, nn.Dropout(0.5))
    model.train()
    assert not any(part.training for part in module.modules())
    assert model[1].training
    x = torch.randn(8, 3)
    for _ in range(2):
        torch.testing.assert_close(module(x), module[0](x))
    assert counts(module) == (8, 8)

    @cached
    class Decorated(nn.Sequential):
        pass

    decorated = Decorated(nn.Linear(3, 3)).requires_grad_(False)
    decorated.train()
    assert not decorated[0].training


class DropPath(nn.Module):
    """Stochastic depth, as libraries write it."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return nn.functional.dropout(x, self.drop_prob, self.training)


class Centred(nn.Module):
    """Takes the mean of what it saw in train mode away."""

    def __init__(self):
        super().__init__()
        self.mean, self.count = torch.zeros(3), 0

    def forward(self, x):
        if self._gathers():
            self._gather(x)
        return x - self.mean

    def _gathers(self):
        return self.training

    def _gather(self, x):
        self.count += len(x)
        self.mean = self.mean + (x - self.mean).sum(0) / self.count


class Codebook(nn.Module):
    """The nearest of some vectors, which become averages of what is nearest to them in train mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sizes", torch.ones(5))
        self.vectors = nn.Embedding(5, 3).requires_grad_(False)

    def forward(self, x):
        nearest = torch.cdist(x, self.vectors.weight).argmin(1)
        found = self.vectors(nearest)
        if self.training:
            chosen = nn.functional.one_hot(nearest, 5).to(x.dtype)
            self.sizes.data.mul_(0.9).add_(0.1 * chosen.sum(0))
            self.vectors.weight.data.add_(0.1 * (chosen.t() @ x - self.vectors.weight) / (1 + self.sizes[:, None]))
        return found


class Normed(nn.Module):
    """BatchNorm, as libraries write it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x):
        if self.training:
            self.running_var.lerp_(x.var(0), 0.1)
        return x / self.running_var.sqrt()


class Recomputing(nn.Module):
    """Asks for the mode, and computes the same in each."""

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False) if self.training else x.tanh()


def _hooked(part):
    part.register_forward_hook(lambda module, args, output: output * 2 if module.training else output)
    return part


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (nn.Dropout(0.5), "Dropout"),
        (nn.BatchNorm1d(3), "BatchNorm1d"),
        (nn.Dropout(0.0), None),
        (nn.LayerNorm(3), None),
        (DropPath(0.2), "DropPath"),
        (DropPath(0.0), None),
        (Normed(), "Normed"),
        (Recomputing(), None),
        (_hooked(nn.LayerNorm(3)), "LayerNorm"),
        (nn.utils.spectral_norm(nn.Linear(3, 3)), "Linear"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), "_SpectralNorm"),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("mode", [False, True])
def test_a_body_that_train_mode_would_change_says_so_once(part, said, mode, whole, warnings):
    module = nn.Sequential(nn.Linear(3, 3), copy.deepcopy(part)).requires_grad_(False)
    module.train(mode)
    model = nn.Sequential(module, nn.Linear(3, 2))
    torchcache.mark(model if whole else module, audit=0)
    for _ in range(3):
        model(torch.randn(8, 3))
        model.train()
    model(torch.randn(8, 3))
    told = [text for text in warnings if "eval mode" in text]
    assert len(told) == (said is not None)
    assert said is None or said in told[0]


def test_who_asks_for_eval_mode_again_is_told_nothing(warnings):
    class Kept(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].eval()
            return self

    model = Kept(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).requires_grad_(False), nn.Linear(3, 2))
    torchcache.mark(model[0], audit=0)
    for _ in range(3):
        model.train()
        model(torch.randn(8, 3))
    assert not warnings


@pytest.mark.parametrize("whole", [False, True])
def test_statistics_are_taken_anew_as_without_a_mark(whole):
    data = torch.randn(64, 6) * 3 + 2

    def averaged(cached):
        torch.manual_seed(1)
        body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        for _ in range(20):
            body(data)
        model = nn.Sequential(body.eval().requires_grad_(False), nn.Linear(8, 2))
        if cached:
            torchcache.mark(model if whole else body, audit=0)
        average = AveragedModel(model)
        optimizer = torch.optim.SGD(model[1].parameters(), 0.01)
        for _ in range(3):
            model(data).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
        update_bn([data[:32], data[32:]], average)
        outputs = [average.eval()(data) for _ in range(3)]
        return average, [*outputs, average.module[0][1].running_mean, average.module[0][1].running_var]

    average, got = averaged(True)
    for one, other in zip(got, averaged(False)[1], strict=True):
        torch.testing.assert_close(one, other)
    assert torchcache.stats(average.module if whole else average.module[0]).hits >= 64


def test_statistics_are_taken_anew_in_a_compiled_model():
    data = torch.randn(64, 6) * 3 + 2
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()).requires_grad_(False).eval()
    model = nn.Sequential(model, nn.Linear(8, 2))
    twin = copy.deepcopy(model)
    compiled = DOORS["compile"](torchcache.mark(model, audit=0))
    for one in (compiled, twin):
        for _ in range(2):
            one(data).sum().backward()
        update_bn([data[:32], data[32:]], one)
    torch.testing.assert_close(model[0][1].running_var, twin[0][1].running_var)
    for _ in range(2):
        torch.testing.assert_close(compiled.eval()(data), twin.eval()(data))


class Attending(DropPath):
    """Shows what it did last."""

    def forward(self, x):
        self.last = x.detach()
        return super().forward(x)


class CentredAgain(Centred):
    """Its methods are of the class above."""


@pytest.mark.parametrize("learns", [Centred, CentredAgain, Codebook])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "partly trained"])
def test_what_learns_without_a_gradient_goes_on(learns, trains, warnings):
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(3, 3), learns(), nn.Linear(3, 3)).requires_grad_(False)
    twin[2].requires_grad_(trains)
    module = torchcache.mark(copy.deepcopy(twin))
    x = torch.randn(12, 3)
    for _ in range(3):
        module.train()
        twin.train()
        for rows in torch.randperm(len(x)).split(4):
            torch.testing.assert_close(module(x[rows]), twin(x[rows]))
    for name, held in twin.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], held)
    if trains:
        assert torchcache.stats(module).hits >= 12
    else:
        assert any("its forward writes to 1." in text for text in warnings)
    module.eval()
    twin.eval()
    for _ in range(2):
        torch.testing.assert_close(module(x), twin(x))


def test_a_mark_that_learns_itself_goes_on():
    module = torchcache.mark(Codebook()).train()
    assert module.training
    x = torch.randn(6, 3)
    before = module.vectors.weight.clone()
    module(x)
    assert not torch.equal(module.vectors.weight, before)


def test_what_drops_and_shows_its_values_stays_in_eval_mode():
    module = nn.Sequential(nn.Linear(3, 3), Attending(0.5)).requires_grad_(False)
    torchcache.mark(module, pure=True).train()
    x = torch.randn(6, 3)
    for _ in range(3):
        torch.testing.assert_close(module(x), module[0](x))
    assert torchcache.stats(module).hits == 12


def test_parts_that_train_keep_their_mode():
    body = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), nn.Dropout(0.5), nn.Linear(3, 3))
    body[0].requires_grad_(False)
    torchcache.mark(body)
    body.train()
    assert [part.training for part in body] == [False, True, True]
    assert not body[0][1].training


class Stages(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(self.first(x)))


@pytest.mark.parametrize("door", ["eager", "transform", "compile"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_unfrozen_after_train_is_in_train_mode(door, whole, warnings):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Stages().requires_grad_(False)
    model.head.requires_grad_(True)
    twin, data = copy.deepcopy(model), torch.randn(8, 8)
    torchcache.mark(model, audit=0)
    run = DOORS[door](model)
    model.eval(), twin.eval()
    for net in (model, twin):
        (run if net is model else net)(data).sum().backward()
    model.train(), twin.train()
    for _ in range(2):
        run(data).sum().backward()
    for net in (model, twin):
        net.zero_grad()
        (net if whole else net.block).requires_grad_(True)
    for _ in range(2):
        found = []
        for call, net in ((run, model), (twin, twin)):
            torch.manual_seed(1)
            found.append(call(data))
            assert [part.training for part in net.block.modules()] == [True] * 4
        torch.testing.assert_close(*found)
    torch.testing.assert_close(model.block[1].running_mean, twin.block[1].running_mean)
    assert any("what was unfrozen of Stages is in train mode" in text for text in warnings)
    model.eval(), twin.eval()
    torch.testing.assert_close(run(data), twin(data))
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("make", [lambda x: nn.LayerNorm(4)(x), lambda x: x.detach().requires_grad_() * 2])
def test_an_output_that_needs_a_gradient_by_itself_needs_it_after_rows_were_stored_without(make, warnings):
    module = torchcache.mark(frozen(lambda self, x: make(self.parts[0](x)), nn.Linear(4, 4)), audit=0)
    data = torch.randn(8, 4)
    with torch.no_grad():
        for _ in range(3):
            expected = module(data)
    assert torchcache.stats(module).hits >= 8
    for _ in range(2):
        found = module(data)
        torch.testing.assert_close(found, expected)
        found.sum().backward()
    assert any("its output needs a gradient" in text for text in warnings)


def test_what_has_no_weights_keeps_its_mode():
    model = torchcache.mark(nn.Sequential(nn.Dropout(0.5), nn.Flatten()))
    model.train()
    assert [part.training for part in model.modules()] == [True] * 3
    model.eval()
    assert [part.training for part in model.modules()] == [False] * 3
    model.train()
    assert [part.training for part in model.modules()] == [True] * 3
    quantized = torchcache.mark(nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Dropout(0.5)))
    quantized.train()
    assert [part.training for part in quantized.modules()] == [False] * 3


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_what_is_frozen_by_no_grad_alone_is_cached(guard):
    module = torchcache.mark(nn.Sequential(nn.Linear(3, 3), nn.Tanh()).eval(), audit=0)
    x = torch.randn(8, 3)
    for _ in range(3):
        with guard():
            torch.testing.assert_close(module(x), torch.tanh(module[0](x)))
    assert counts(module) == (8, 16)
    head = nn.Linear(3, 2)
    with torch.no_grad():
        features = module(x)
    head(features).sum().backward()
    assert head.weight.grad is not None


def test_a_mark_that_trains_is_computed_and_says_how_to_freeze_it(warnings):
    module = torchcache.mark(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), audit=0)
    x = torch.randn(8, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    twin = unmarked(module)
    for _ in range(3):
        module(x).sum().backward()
        twin(x).sum().backward()
        assert torch.equal(module[0].weight.grad, twin[0].weight.grad)
    assert counts(module) == (0, 0)
    assert torchcache.stats(module).bypasses == 24
    assert "trains 0.weight, 0.bias, 2.weight and 1 more" in reasons(module)
    assert sum("freeze=True" in text for text in warnings) == 1
    for _ in range(2):  # and evaluated, it is cached until it is trained again
        with torch.no_grad():
            before = module(x)
    assert counts(module) == (8, 8)
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(module(x), module[2](torch.tanh(module[0](x))))
        assert not torch.allclose(module(x), before)


def test_an_input_that_needs_a_gradient_is_computed_and_the_gradient_flows(warnings):
    module = frozen(lambda self, x: self.parts[0](x), nn.Linear(3, 3))
    prompt = torch.randn(4, 3, requires_grad=True)
    for _ in range(2):
        module(prompt).sum().backward()
    torch.testing.assert_close(prompt.grad, 2 * module.parts[0].weight.sum(0).expand(4, 3))
    assert counts(module) == (0, 0)
    assert "needs a gradient" in reasons(module)
    with torch.no_grad():
        module(prompt), module(prompt)
    assert counts(module) == (4, 4)


@pytest.mark.parametrize("door", DOORS)
def test_rows_are_shared_between_grad_modes(door):
    model, twin = opened(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), door)
    with torch.inference_mode():
        for _ in range(4):
            x = torch.randn(3, 4)
            assert torch.equal(model(x), twin(x))
    assert torchcache.stats(model).misses == 12
    with torch.inference_mode():
        assert torch.equal(model(x), twin(x))
    assert torch.equal(model(x), twin(x))
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))
    assert torchcache.stats(model).hits == 9


class Asking(nn.Module):
    """Asks in which mode it runs."""

    def __init__(self, ask):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.ask = ask

    def forward(self, x):
        return self.linear(x) * (2 if self.ask() else 3)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("ask", [torch.is_grad_enabled, torch.is_inference_mode_enabled])
def test_a_forward_that_asks_for_the_mode_gets_rows_of_its_own(ask, door):
    model, twin = opened(Asking(ask), door)
    x = torch.randn(5, 4)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode) * 3:
        with mode():
            torch.testing.assert_close(model(x), twin(x))
    assert torchcache.stats(model).hits


def test_attention_where_a_mask_leaves_nothing_depends_on_a_switch():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    twin = nn.TransformerEncoder(layer, 1).eval().requires_grad_(False)
    module = torchcache.mark(copy.deepcopy(twin), audit=0)
    x, pad = torch.randn(6, 5, 8), torch.zeros(6, 5, dtype=torch.bool)
    pad[1:-1, 3:] = True
    try:
        for enabled in (True, False, True):
            torch.backends.mha.set_fastpath_enabled(enabled)
            for _ in range(2):
                torch.testing.assert_close(
                    module(x, src_key_padding_mask=pad), twin(x, src_key_padding_mask=pad), atol=1e-5, rtol=0
                )
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class Tiny(nn.Module):
    """Products of small probabilities, scaled up again."""

    def forward(self, x):
        return (x.abs() * 1e-20 * 1e-19) * 1e38


def test_whether_the_smallest_numbers_are_zero_is_part_of_the_key():
    module, x = torchcache.mark(Tiny(), audit=0), torch.rand(8, 4) + 1
    try:
        for flush in (False, True, False):
            if not torch.set_flush_denormal(flush):
                pytest.skip("this processor has no such switch")
            for _ in range(2):
                assert torch.equal(module(x), Tiny()(x))
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("door", DOORS)
def test_autocast_is_part_of_the_key(door):
    model, twin = opened(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), door)
    x = torch.randn(3, 4)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(model(x), twin(x))
    assert torch.equal(model(x), twin(x))
    half = x.half()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(half), twin(half))
    assert counts(model) == (12, 6)


@pytest.mark.parametrize("door", DOORS)
def test_the_dtype_of_autocast_is_part_of_the_key_where_that_is_off(door, request):
    """A forward may turn it on."""

    def forward(self, x):
        with torch.autocast("cpu"):
            return self.parts[0](x).double()

    torch._dynamo.reset()
    torch.set_autocast_dtype("cpu", torch.bfloat16)
    request.addfinalizer(lambda: torch.set_autocast_dtype("cpu", torch.bfloat16))
    run, twin = opened(frozen(forward, nn.Linear(4, 4)), door)
    data = torch.randn(6, 4)
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float16, torch.float16, torch.bfloat16):
        torch.set_autocast_dtype("cpu", dtype)
        torch.testing.assert_close(run(data), twin(data), rtol=0, atol=0)


@pytest.mark.parametrize("door", DOORS)
def test_a_batch_of_one_element_with_a_stride(door):
    model, twin = opened(nn.Embedding(9, 5), door)
    x = torch.arange(8).reshape(4, 2)
    for _ in range(2):
        for row in range(4):
            assert torch.equal(model(x[row : row + 1, 1]), twin(x[row : row + 1, 1]))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, padding):
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]


@pytest.mark.parametrize("door", DOORS)
def test_empty_batches_and_batches_of_one(door):
    model, twin = opened(Attention(), door)
    padding = torch.tensor([[False, False, True]] * 4)
    x = torch.randn(4, 3, 8)
    assert model(x[:0], padding[:0]).shape == (0, 3, 8)
    for _ in range(2):
        torch.testing.assert_close(model(x, padding), twin(x, padding))
    for row in range(4):
        torch.testing.assert_close(model(x[row : row + 1], padding[:1]), twin(x[row : row + 1], padding[:1]))
    assert counts(model) == (4, 8)


def tangent(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS = {
    "a dual level": tangent,
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms_work_as_without_a_mark(name):
    module = torchcache.mark(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), freeze=True, audit=0)
    x, twin = torch.randn(5, 4), unmarked(module)
    for _ in range(2):
        torch.testing.assert_close(TRANSFORMS[name](module, x), TRANSFORMS[name](twin, x))
    assert counts(module) == (0, 0)
    module(x), module(x)
    assert counts(module) == (5, 5)


def test_meta_and_fake_tensors_are_computed():
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = torchcache.mark(nn.Linear(4, 3), freeze=True, audit=0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(torch.randn(5, 4))).shape == (5, 3)
    meta = torchcache.mark(nn.Linear(4, 3, device="meta"), freeze=True, audit=0)
    for _ in range(2):
        assert meta(torch.empty(5, 4, device="meta")).shape == (5, 3)
    assert counts(module) == counts(meta) == (0, 0)


def test_functional_call_uses_the_weights_it_is_given():
    module = torchcache.mark(nn.Linear(4, 3), freeze=True, audit=0)
    x = torch.randn(5, 4)
    for factor in (1, 2, 1):
        state = {name: tensor * factor for name, tensor in module.state_dict().items()}
        expected = nn.functional.linear(x, state["weight"], state["bias"])
        torch.testing.assert_close(torch.func.functional_call(module, state, (x,)), expected)


def test_sample_keys_replace_the_hash():
    module = frozen(lambda self, x: x * 2)
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


@pytest.mark.parametrize("door", DOORS)
def test_the_second_call_with_the_same_ids_has_rows_of_its_own(door):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(4, 4)

        def forward(self, x, y):
            return self.backbone(x).tanh() - self.backbone(y).relu()

    model = Two().requires_grad_(False)
    twin = copy.deepcopy(model)
    torchcache.mark(model.backbone, audit=0)
    run = DOORS[door](model)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    for _ in range(3):
        with torchcache.sample_keys([5, 6, 7]):
            torch.testing.assert_close(run(x, y), twin(x, y))
    assert torchcache.stats(model).misses == 6


class Prompted(nn.Module):
    """Layers that change before a frozen encoder, and one that is given the sample itself."""

    def __init__(self):
        super().__init__()
        self.prompt = nn.Linear(4, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.beside = nn.Linear(3, 4)

    def forward(self, x):
        return self.encoder(self.prompt(x)) + self.beside(x[:, 1:])


@pytest.mark.parametrize("kind", ["module", "function", "mark"])
@pytest.mark.parametrize("door", DOORS)
def test_an_id_stands_for_what_the_model_is_given(door, kind):
    plain = Prompted()
    plain.encoder.requires_grad_(False), plain.beside.requires_grad_(False)
    model = copy.deepcopy(plain)
    if kind == "mark":
        torchcache.mark(model, audit=0)
    else:
        torchcache.mark(model.encoder, audit=0), torchcache.mark(model.beside, audit=0)
    if kind == "function":
        run = model.forward if door in ("eager", "transform") else DOORS[door](model.forward)
    else:
        run = DOORS[door](model)
    x = torch.randn(6, 4)
    for step in range(6):
        with torchcache.sample_keys(range(6)), torch.set_grad_enabled(step % 3 == 2):
            torch.testing.assert_close(run(x), plain(x))
        for one in (plain, model):
            with torch.no_grad():
                one.prompt.weight.mul_(1.1)
    if kind != "mark":
        other = [1, 0, *range(2, 6)]
        with torchcache.sample_keys(other), torch.no_grad():
            torch.testing.assert_close(run(x), plain.encoder(plain.prompt(x)) + plain.beside(x[other, 1:]))


def test_an_id_names_what_was_there_and_was_not_written_to():
    module = frozen(lambda self, x: x * 2)
    x, other = torch.randn(3, 5), {"batch": [torch.randn(3, 5)]}
    with torchcache.sample_keys(range(3)):
        module(x)
    for batch in (x, x[:, :], other["batch"][0]):
        with torchcache.sample_keys([1, 0, 2]):
            torch.testing.assert_close(module(batch), x[[1, 0, 2]] * 2)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torchcache.sample_keys([1, 0, 2]))
        torch.testing.assert_close(module(x), x[[1, 0, 2]] * 2)
        y = x + 1
        torch.testing.assert_close(module(y), y * 2)
        x.mul_(3)
        torch.testing.assert_close(module(x), x * 2)
        with torch.inference_mode():
            torch.testing.assert_close(module(x.clone()), x * 2)


@pytest.mark.parametrize("ids", [[1, 2], ["a"], torch.arange(5)])
def test_a_wrong_number_of_sample_keys_is_an_error(ids):
    module, x = torchcache.mark(nn.Linear(6, 6), freeze=True), torch.randn(4, 6)
    with torchcache.sample_keys(ids), pytest.raises(torchcache.SampleKeyError, match="4 rows"):
        module(x)


@pytest.mark.parametrize("ids", [[1.5], [None], torch.rand(4), torch.ones(2, 2).long(), [2**127]])
def test_sample_keys_that_are_no_ids_are_an_error(ids):
    with pytest.raises(torchcache.SampleKeyError), torchcache.sample_keys(ids):
        pass


def test_a_tensor_that_dynamo_marked_is_cached():
    module = torchcache.mark(nn.Linear(4, 3), freeze=True, audit=0)
    x = torch.randn(5, 4)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    module(x), module(x)
    assert counts(module) == (5, 5)


def test_rows_that_inference_mode_found_on_disk_lie_beside_others(tmp_path):
    torch.manual_seed(0)
    first, x = nn.Linear(4, 4), torch.randn(8, 4)
    options = {"freeze": True, "persistent": True, "persistent_cache_dir": str(tmp_path)}
    module, twin = torchcache.mark(copy.deepcopy(first), **options), torchcache.mark(first, **options)
    module(x[:4])
    torchcache.flush()
    with torch.inference_mode():
        twin(x[:4])
    twin(x)
    twin(x)
    stats = torchcache.stats(twin)
    assert (stats.hits, stats.misses, stats.bypasses) == (16, 4, 0)


@pytest.mark.parametrize("first", ["bypassed", "needs a gradient"])
def test_a_first_call_that_is_computed_counts_in_a_block_of_sample_keys(first):
    module = torchcache.mark(nn.Linear(4, 4), freeze=True, audit=0)
    one, two, ids = torch.randn(8, 4), torch.randn(8, 4), range(8)
    with torchcache.sample_keys(ids):
        if first == "bypassed":
            with torchcache.bypass():
                module(one)
        else:
            module(one.clone().requires_grad_())
        module(two)
    for _ in range(2):
        with torchcache.sample_keys(ids):
            for x in (one, two):
                torch.testing.assert_close(module(x), nn.functional.linear(x, module.weight, module.bias))


def test_casts_that_autocast_keeps_are_not_of_other_weights():
    """Within a block autocast keeps the casts of weights that need a gradient, whatever becomes of these."""
    module = torchcache.mark(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), audit=0)
    data = torch.randn(4, 8, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for x in data[:2]:
            module(x)
        module[0].weight.mul_(3)
        for x in data:
            module(x)
    for x in data:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = module(x)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torchcache.bypass():
            torch.testing.assert_close(found, module(x))


def test_weights_that_parametrize_keeps_are_computed_with():
    module = nn.Sequential(nn.Linear(4, 4))
    torch.nn.utils.parametrizations.weight_norm(module[0])
    torchcache.mark(module, freeze=True, audit=0)
    x = torch.randn(8, 4)
    with torch.nn.utils.parametrize.cached():
        module(x)
        module[0].parametrizations.weight.original0.mul_(2)
        kept = module(x)
    with torchcache.bypass():
        expected = module(x)
    assert not torch.allclose(kept, expected)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("persistent", [False, True], ids=["in memory", "on disk"])
def test_another_default_device_is_none_of_the_rows(door, persistent, tmp_path):
    options = {"persistent": persistent, "persistent_cache_dir": tmp_path, "cache_dtype": torch.int8}
    run, twin = opened(nn.Sequential(nn.Linear(4, 8), nn.GELU()), door, **options)
    x = torch.randn(12, 4)
    with torch.device("meta"):
        for _ in range(2):
            for rows in torch.randperm(12, device="cpu").split(5):
                torch.testing.assert_close(run(x[rows]), twin(x[rows]), rtol=0.05, atol=0.05)
    assert counts(run) == (12, 12)


@pytest.mark.parametrize("door", DOORS)
def test_a_part_that_is_put_in_train_mode_on_its_own_learns_from_the_first_call(door):
    run, twin = opened(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), door)
    for model in (run, twin):
        model.backbone[1].train()
    for _ in range(3):
        x = torch.randn(8, 4)
        torch.testing.assert_close(run(x), twin(x))
    torch.testing.assert_close(run.backbone[1].running_mean, twin.backbone[1].running_mean)
    assert "writes to" in reasons(run)


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_a_mode_that_is_asked_for_reaches_what_was_put_in_train_mode_on_its_own(mode):
    backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).requires_grad_(False).eval()
    net, x = nn.Sequential(torchcache.mark(backbone), nn.Linear(4, 2)).eval(), torch.randn(8, 4)
    expected = net(x)
    for part in backbone[1:]:
        part.train()
    net(x)
    net.train(mode)
    assert not any(part.training for part in backbone)
    backbone[1].reset_running_stats()
    torch.testing.assert_close(net(x), expected)


def test_a_frozen_part_that_is_put_in_train_mode_before_the_first_call_stays_so():
    run, twin = (nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)) for _ in range(2))
    twin.load_state_dict(run.state_dict())
    for model in (run, twin):
        model[0].requires_grad_(False)
        model.eval()
    torchcache.mark(run)
    for model in (run, twin):
        model[0].train()
    x = torch.randn(8, 4)
    torch.testing.assert_close(run(x), twin(x))
    torch.testing.assert_close(run[0][1].running_mean, twin[0][1].running_mean)
