"""Marks on classes, instances, methods and functions: the call belongs to the object that it is made on."""

import abc
import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from marked import counts, process_group, reasons, unmarked
from torch import nn

import torchcache
from torchcache import cached


@cached(audit=0)
class Plain(nn.Module):
    """A marked class."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.requires_grad_(False)

    def forward(self, x, k=1, *, shift: float = 0.0):
        return self.linear(x) * k + shift


@cached(max_memory_cache_size=10**6, audit=0)
class WithOptions(Plain):
    """A marked subclass, with options."""


class Clip(nn.Module):
    """Two encoders, neither of which is its forward."""

    def __init__(self):
        super().__init__()
        self.image = nn.Linear(4, 3)
        self.text = nn.Embedding(9, 3)

    def encode_image(self, x):
        return self.image(x)

    def encode_text(self, ids):
        return self.text(ids).mean(1)

    def forward(self, x, ids):
        return self.encode_image(x) @ self.encode_text(ids).T


class Taught(Clip):
    """Calls its parent's method, and has a marked one of its own."""

    @cached(audit=0)
    def encode_image(self, x):
        return super().encode_image(x) + 1


def test_the_class_stays_the_same_class():
    assert (Plain.__name__, Plain.__module__, Plain.__doc__) == ("Plain", __name__, "A marked class.")
    assert list(inspect.signature(Plain).parameters) == ["width"]
    assert list(inspect.signature(Plain.forward).parameters) == ["self", "x", "k", "shift"]
    module = WithOptions()
    assert isinstance(module, Plain)
    assert type(pickle.loads(pickle.dumps(module))) is WithOptions


@pytest.mark.parametrize("cls", [Plain, WithOptions])
def test_calls_of_a_marked_class_are_cached(cls):
    module = cls()
    x = torch.randn(5, 6)
    for _ in range(3):
        torch.testing.assert_close(module(x), nn.functional.linear(x, module.linear.weight, module.linear.bias))
    assert counts(module) == (5, 10)


def test_marked_instances_are_of_their_class_for_all_who_ask():
    module = torchcache.mark(Clip(), freeze=True)
    assert isinstance(module, Clip)
    assert type(module).__name__ == "Clip"
    assert type(module).__module__ == __name__
    assert repr(module) == repr(Clip())
    assert module.state_dict().keys() == Clip().state_dict().keys()


def both(clip):
    """A model with both of its encoders marked, in every way to say so."""
    return torchcache.mark(clip, method=["encode_image", "encode_text"], freeze=True, audit=0)


def one_by_one(clip):
    torchcache.mark(clip.encode_image, freeze=True, audit=0)
    torchcache.mark(clip, method="encode_text", audit=0)
    return clip


@pytest.mark.parametrize("marked", [both, one_by_one])
def test_methods_are_cached_each_for_itself(marked):
    clip = marked(Clip())
    twin = unmarked(clip)
    x, ids = torch.randn(5, 4), torch.randint(0, 9, (5, 6))
    for _ in range(3):
        torch.testing.assert_close(clip.encode_image(x), twin.encode_image(x))
    for _ in range(2):
        torch.testing.assert_close(clip.encode_text(ids), twin.encode_text(ids))
    regions = {region.name: (region.misses, region.hits) for region in torchcache.stats(clip).regions}
    assert regions == {"Clip.encode_image": (5, 10), "Clip.encode_text": (5, 5)}
    torch.testing.assert_close(clip(x, ids), twin(x, ids))  # which is not marked, and calls both
    assert counts(clip) == (10, 25)
    with torch.no_grad():
        clip.image.weight.add_(1), twin.image.weight.add_(1)
    torch.testing.assert_close(clip.encode_image(x), twin.encode_image(x))
    torch.testing.assert_close(clip.encode_text(ids), twin.encode_text(ids))
    assert counts(clip) == (15, 30)


def test_code_reads_the_annotations_of_its_class():
    class Annotated(nn.Module):
        gain: "2.0"

        def forward(self, x):
            return x * float(type(self).__annotations__["gain"])

    marked = torchcache.mark(Annotated())
    x = torch.randn(4, 3)
    for _ in range(2):
        assert torch.equal(marked(x), x * 2)
    assert type(marked).__annotations__ == Annotated.__annotations__
    assert counts(marked) == (4, 4)


def test_a_method_decorated_in_its_class_may_call_its_parents():
    model = Taught().requires_grad_(False)
    x = torch.randn(5, 4)
    for _ in range(2):
        torch.testing.assert_close(model.encode_image(x), model.image(x) + 1)
    assert counts(model) == (5, 5)
    parent = torchcache.mark(Clip(), method="encode_image", freeze=True, audit=0)
    torch.testing.assert_close(parent.encode_image(x), parent.image(x))


def test_a_subclass_of_a_marked_class_answers_for_itself():
    class Doubled(Plain):
        def forward(self, x, k=1, *, shift=0.0):
            return 2 * super().forward(x, k, shift=shift)

    module, x = Doubled(), torch.randn(4, 6)
    for _ in range(2):
        torch.testing.assert_close(module(x), 2 * module.linear(x))
    marked = torchcache.mark(Doubled(), audit=0)
    for _ in range(2):
        torch.testing.assert_close(marked(x), 2 * marked.linear(x))
    assert counts(marked) == (4, 4)


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
    "shallow": copy.copy,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_answers_for_itself(way):
    module = torchcache.mark(Clip(), method="encode_image", freeze=True, audit=0)
    x, ids = torch.randn(5, 4), torch.randint(0, 9, (5, 6))
    before = module.encode_image(x)
    other = COPIES[way](module)
    assert isinstance(other, Clip)
    torch.testing.assert_close(other.encode_image(x), before)
    assert counts(other) == (5, 0)
    # A shallow copy shares the dict of its children.
    other._modules = module._modules | {"image": nn.Linear(4, 3).requires_grad_(False)}
    torch.testing.assert_close(other.encode_image(x), other.image(x))
    torch.testing.assert_close(other.encode_text(ids), other.text(ids).mean(1))
    torch.testing.assert_close(module.encode_image(x), before)


def call_and_drop():
    """What a decorated function and a module that it closes over leave, when nobody holds them any more."""
    module = nn.Linear(16, 4).requires_grad_(False)

    @cached
    def features(x):
        return module(x) * 2

    torch.compile(lambda x: features(x) + 1, backend="eager")(torch.randn(4, 16))
    return weakref.ref(module), weakref.ref(features)


def test_a_dropped_function_and_what_it_closes_over_are_given_back():
    gone = call_and_drop()
    torch._dynamo.reset()
    gc.collect()
    assert [found() for found in gone] == [None, None]


@pytest.mark.parametrize("mark", [torchcache.mark, lambda net, **options: cached(**options)(type(net)) and net])
def test_classes_made_in_a_function_and_what_their_methods_close_over_are_given_back(mark):
    def experiment():
        features, x = torch.randn(4, 3), torch.randn(5, 4)

        class Held:
            __slots__ = ("scale",)

            def times(self, x):
                return x @ features * self.scale

        class Net(nn.Module):
            def forward(self, x):
                return self.held.times(x) + self.plain.times(x)

        net = Net()
        net.held, net.plain = Held(), type("Plain", (Held,), {})()
        net.held.scale = net.plain.scale = 2.0
        mark(net, audit=0)
        for _ in range(3):
            net(x)
        assert counts(net)[1]
        return weakref.ref(features), weakref.ref(Net), weakref.ref(Held)

    held = experiment()
    gc.collect()
    assert [reference() for reference in held] == [None, None, None]


def test_copies_keep_their_options_and_state():
    module = torchcache.mark(nn.Linear(4, 4), freeze=True, audit=0, max_memory_cache_size=2 * 16)
    x = torch.randn(5, 4)
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), saved(module)):
        torch.testing.assert_close(other(x), expected)
        assert torchcache.stats(other).regions[0].memory_bytes == 32
        with torch.no_grad():
            other.weight.zero_(), other.bias.zero_()
        assert not other(x).any()
    torch.testing.assert_close(module(x), expected)


def test_replicas_compute_with_their_own_weights(warnings):
    """As ``nn.DataParallel`` makes them for every step."""
    module = torchcache.mark(nn.Sequential(nn.Linear(4, 4)), freeze=True, audit=0)
    x = torch.randn(5, 4)
    module(x)
    replica = module._replicate_for_data_parallel()
    replica._modules = {"0": nn.Linear(4, 4)}
    for _ in range(2):
        torch.testing.assert_close(replica(x), replica[0](x))
    assert counts(module) == (5, 0)
    assert sum("replica of DataParallel" in text for text in warnings) == 1


def test_distributed_data_parallel_finds_rows():
    with process_group():
        model = nn.Sequential(torchcache.mark(nn.Linear(4, 4), freeze=True, audit=0), nn.Linear(4, 2))
        run = nn.parallel.DistributedDataParallel(model)
        x = torch.randn(5, 4)
        for _ in range(3):
            run(x).sum().backward()
        assert counts(model) == (5, 10)
        torch.testing.assert_close(run(x), model[1](unmarked(model[0])(x)))


def test_unmark_restores_the_instance():
    for module in (nn.Linear(3, 3), nn.Linear(3, 3)):
        module.forward = module.forward if module.bias is None else (lambda x: x * 2)
        members, kind = dict(vars(module)), type(module)
        torchcache.mark(module)(torch.randn(2, 3))
        torchcache.unmark(module)
        assert type(module) is kind
        assert {name for name in vars(module) if "regions" not in name} == set(members)
        assert module.forward is members["forward"]


def test_an_instance_of_a_marked_class_can_be_left_out():
    module = Plain()
    module.torchcache_enabled = False
    x = torch.randn(4, 6)
    torch.testing.assert_close(module(x), module.linear(x))
    assert torchcache.stats(module).regions == []
    other = torchcache.unmark(Plain())
    other(x)
    assert torchcache.stats(other).regions == []
    torchcache.mark(other, audit=0)
    other(x), other(x)
    assert counts(other) == (4, 4)


def test_a_forward_of_the_instances_own_is_the_original():
    module = nn.Linear(3, 3)
    module.forward = lambda x: x * 2
    torchcache.mark(module, freeze=True, audit=0)
    x = torch.randn(4, 3)
    for _ in range(2):
        assert torch.equal(module(x), x * 2)
    assert counts(module) == (4, 4)


def test_hooks_run_for_hits_too():
    module = torchcache.mark(nn.Linear(3, 3), freeze=True, audit=0)
    x, seen = torch.randn(4, 3), []
    module(x)
    module.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    for _ in range(2):
        module(x)
    assert seen == [4, 4]


def test_a_mark_within_a_mark_is_at_rest():
    inner = torchcache.mark(nn.Linear(3, 3), freeze=True, audit=0)
    outer = torchcache.mark(nn.Sequential(inner, nn.Tanh()), freeze=True, audit=0)
    x = torch.randn(4, 3)
    for _ in range(2):
        outer(x)
    assert torchcache.stats(outer).hits == 4
    assert torchcache.stats(inner).misses == 0


def test_wrong_targets_are_refused_with_advice():
    with pytest.raises(torchcache.MarkError, match="instance"):
        torchcache.mark(nn.Linear)
    with pytest.raises(torchcache.MarkError, match="not a Parameter; decorate"):
        torchcache.mark(nn.Linear(2, 2).weight)
    with pytest.raises(torchcache.MarkError, match=r"torchcache\.mark"):
        cached(nn.Linear(2, 2))
    with pytest.raises(torchcache.MarkError, match="no method 'encode'"):
        torchcache.mark(nn.Linear(2, 2), method="encode")
    with pytest.raises(torchcache.MarkError, match="TorchScript"):
        torchcache.mark(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), freeze=True)
    with pytest.raises(torchcache.MarkError, match="nothing in Linear is marked"):
        torchcache.transform(nn.Linear(2, 2))
    assert not reasons(torchcache.mark(nn.Linear(2, 2)))


def test_a_module_keeps_its_mark_when_parametrizations_are_removed():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4).eval()).requires_grad_(False)
    layer, x = torchcache.mark(layer, audit=0), torch.randn(6, 4)
    layer(x)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    layer.requires_grad_(False)
    for _ in range(2):
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected)
    assert torchcache.stats(layer).hits >= 6
    torch.save(layer, io.BytesIO())
    assert type(torchcache.unmark(layer)) is nn.Linear


def test_a_lazy_module_keeps_its_mark_when_it_becomes_another_class():
    module = torchcache.mark(nn.LazyLinear(4))
    x = torch.randn(6, 5)
    module(x)
    module.requires_grad_(False)
    for _ in range(2):
        torch.testing.assert_close(module(x), nn.functional.linear(x, module.weight, module.bias))
    assert isinstance(module, nn.Linear)
    assert torchcache.stats(module).hits == 6
    assert type(torchcache.unmark(module)) is nn.Linear
    with pytest.raises(torchcache.MarkError, match="call it once on a batch"):
        torchcache.mark(nn.LazyLinear(4), freeze=True)


@pytest.mark.parametrize("kind", [staticmethod, classmethod, property])
def test_what_is_no_method_of_the_instance_is_not_marked(kind):
    class Odd(nn.Module):
        other = kind(lambda *args: torch.ones_like)

    with pytest.raises(torchcache.MarkError, match=f"Odd.other is a {kind.__name__}"):
        torchcache.mark(Odd(), method="other")


def test_a_graph_may_be_recompiled():
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).requires_grad_(False))
    module, x = torchcache.mark(graph, audit=0), torch.randn(4, 3)
    for _ in range(2):
        torch.testing.assert_close(module(x), unmarked(module)(x))
        module.recompile()
    assert sum(counts(module)) == 8
    relu = next(node for node in module.graph.nodes if node.op == "call_module" and node.target == "1")
    relu.replace_all_uses_with(relu.args[0])
    module.graph.erase_node(relu)
    module.recompile()
    torch.testing.assert_close(module(x), module.get_submodule("0")(x))
    assert sum(counts(module)) == 12


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_mark_beside_what_is_sharded():
    """FSDP's parameters are tensors around tensors, and name their mesh as a part."""
    from torch.distributed.fsdp import fully_shard

    with process_group():
        backbone, head = torchcache.mark(nn.Linear(4, 4), freeze=True), nn.Linear(4, 2)
        fully_shard(head, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        optimizer, x = torch.optim.AdamW(head.parameters()), torch.randn(6, 4)
        for _ in range(3):
            head(backbone(x)).sum().backward()
            optimizer.step()
        assert torchcache.stats(backbone).hits == 12


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", ["forward", "encode"])
def test_what_a_class_is_given_is_called(name, trains):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2).requires_grad_(trains)

        def encode(self, x):
            return self.head(self.body(x))

        def forward(self, x):
            return self.head(self.body(x))

    original, model, x = getattr(Encoder, name), Encoder(), torch.randn(3, 4)
    torchcache.mark(model, method=name, audit=0)
    for factor in (1.0, 2.0, 3.0, 1.0):

        def another(self, x, factor=factor):
            return original(self, x) * factor

        setattr(Encoder, name, original if factor == 1.0 else another)
        for _ in range(3):
            torch.testing.assert_close(getattr(model, name)(x), original(model, x) * factor)
    assert torchcache.stats(model).hits


class Switched(abc.ABC, nn.Module):
    """Its classes say by how much it multiplies."""

    factor = 2.0

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        return self.body(x) * self.factor


def test_what_is_assigned_to_the_class_of_an_instance_is_the_users_classs(monkeypatch):
    monkeypatch.setattr(Switched, "factor", 2.0)
    model, other, x = torchcache.mark(Switched(), audit=0), Switched(), torch.randn(3, 4)
    for factor in (2.0, 3.0, 4.0):
        type(model).factor = factor
        assert other.factor == factor
        for _ in range(2):
            torch.testing.assert_close(model(x), model.body(x) * factor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", lambda self, x: self.body(x) * 7)
        torch.testing.assert_close(model(x), model.body(x) * 7)
    torch.testing.assert_close(model(x), model.body(x) * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "factor", 5.0)
    assert Switched.factor == 4
    type(model).another = 1
    del type(model).another
    assert not hasattr(Switched, "another")
    torchcache.unmark(model)
    assert type(model) is Switched


def test_a_forward_that_counts_in_its_class_is_computed(warnings):
    class Counting(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x):
            type(self).calls += 1
            return self.body(x)

    model, x = torchcache.mark(Counting()), torch.randn(3, 4)
    for _ in range(4):
        model(x)
    assert Counting.calls == 4
    assert torchcache.stats(model).hits == 0
    assert any("writes to calls" in text for text in warnings)
    promised = torchcache.mark(Counting(), pure=True)
    for _ in range(4):
        promised(x)
    assert torchcache.stats(promised).hits == 9


@pytest.mark.parametrize("transformed", [False, True])
def test_a_class_may_be_made_of_a_marked_one_and_of_an_abstract_one(transformed):
    """As libraries do that patch a model for meta learning."""

    class Patched(abc.ABC):  # noqa: B024
        @property
        def factor(self):
            return 2.0

    model = torchcache.mark(nn.Linear(4, 4), freeze=True)
    model = torchcache.transform(model) if transformed else model
    made = type("Made", (type(model), Patched), {})(4, 4).requires_grad_(False)
    x = torch.randn(3, 4)
    for _ in range(3):
        torch.testing.assert_close(made(x), nn.functional.linear(x, made.weight, made.bias))
    assert (made.factor, isinstance(made, nn.Linear)) == (2.0, True)


def test_a_mark_that_nothing_can_call_is_told_of(warnings):
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def __call__(self, x):
            return self.linear(x)

    torchcache.mark(nn.ModuleList([nn.Linear(2, 2)]))
    torchcache.mark(Called(), freeze=True)
    assert [text.split(",")[0] for text in warnings] == [
        "torchcache.mark: ModuleList has no forward",
        "torchcache.mark: Called has no forward",
    ]
    module, x = torchcache.mark(Called(), freeze=True, method="__call__"), torch.randn(4, 3)
    for _ in range(3):
        torch.testing.assert_close(module(x), module.linear(x))
    assert torchcache.stats(module).hits == 8
    assert len(warnings) == 2
