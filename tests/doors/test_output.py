"""``mark(module, output=...)``: what is made of an original's output is stored, and returned in its place."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from marked import counts, reasons
from torch import nn

import torchcache
from torchcache import dynamo


class Tokens(nn.Module):
    """Tokens and a sum, of images of 4 rows of 6 numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(6, 8)
        self.last = nn.Linear(8, 8)

    def encode(self, x):
        return torch.tanh(self.body(x))

    def forward(self, x, scale=1.0):
        tokens = self.last(self.encode(x)) * scale
        return {"tokens": tokens, "pooled": tokens.mean(1)}


class Scaled:
    """A function with a setting."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, outputs):
        return outputs["tokens"][:, 0] * self.scale


def first(outputs):
    return outputs["tokens"][:, 0]


def both(outputs):
    return outputs["pooled"].half(), [outputs["tokens"].amax(1)]


def assert_same(got, expected):
    """Same structure, dtypes and values."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def data(count=12):
    return torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(0))


def marked(output, **options):
    return torchcache.mark(Tokens(), freeze=True, output=output, **{"audit": 0, **options})


def opened(door, module):
    if door == "transform":
        return torchcache.transform(module)
    whole = door == "aot_eager" and dynamo.passes_structures()
    return torch.compile(module, backend=door, fullgraph=whole) if door != "call" else module


@pytest.mark.parametrize("door", ["call", "transform", "aot_eager", "torchcache"])
@pytest.mark.parametrize("output", [first, both, lambda outputs: outputs["tokens"][:, 1:].flatten(1)])
def test_the_caller_gets_what_is_made_of_the_output(door, output):
    if door == "torchcache":
        door = functools.partial(torchcache.torchcache_backend, inner="eager")
    module = marked(output)
    run, images = opened(door, module), data()
    expected = [output(Tokens()(part)) for part in images.split(4)]
    for _ in range(3):
        for part, want in zip(images.split(4), expected, strict=True):
            assert_same(run(part), want)
    assert counts(module) == (12, 24)


def test_only_that_is_stored():
    whole, less = torchcache.mark(Tokens(), freeze=True, audit=0), marked(first)
    for module in (whole, less):
        module(data())
    used = [sum(region.memory_bytes for region in torchcache.stats(module).regions) for module in (whole, less)]
    assert used == [12 * (4 + 1) * 8 * 4, 12 * 8 * 4]


def test_its_code_and_its_settings_tell_rows_apart(tmp_path):
    options = {"persistent": True, "persistent_cache_dir": tmp_path}
    images = data()
    for output, found in (
        (lambda outputs: outputs["tokens"][:, 0], 0),
        (lambda outputs: outputs["tokens"][:, 1], 0),
        (Scaled(2.0), 0),
        (Scaled(3.0), 0),
        (Scaled(2.0), 12),
        (lambda outputs: outputs["tokens"][:, 1], 12),
    ):
        module = marked(output, **options)
        assert_same(module(images), output(Tokens()(images)))
        assert counts(module) == (12 - found, found)
        torchcache.flush()


def test_a_setting_that_changes_while_it_runs_is_seen():
    output = Scaled(2.0)
    module, images = marked(output), data()
    module(images)
    output.scale = 5.0
    assert_same(module(images), output(Tokens()(images)))
    assert counts(module) == (24, 0)


def test_marking_again_replaces_it_and_unmark_removes_it():
    module, images = marked(first), data()
    module(images)
    torchcache.mark(module, audit=0)
    assert_same(module(images), Tokens()(images))
    torchcache.mark(module, output=both, audit=0)
    assert_same(module(images), both(Tokens()(images)))
    assert_same(torchcache.unmark(module)(images), Tokens()(images))


@pytest.mark.parametrize("how", ["enabled", "attribute", "bypass", "trains"])
def test_it_is_made_where_nothing_is_cached_too(how):
    module, images = marked(first, enabled=how != "enabled"), data()
    if how == "attribute":
        module.torchcache_enabled = False
    if how == "trains":
        module.requires_grad_(True)
    with torchcache.bypass() if how == "bypass" else torch.enable_grad():
        assert_same(module(images).detach(), first(Tokens()(images)).detach())
        compiled = torch.compile(module, backend="eager")
        assert_same(compiled(images).detach(), first(Tokens()(images)).detach())
    assert counts(module) == (0, 0)


def test_what_depends_on_other_rows_or_on_chance_is_not_cached():
    images = data()
    with pytest.raises(torchcache.RowwiseError, match="Tokens"):
        marked(lambda outputs: first(outputs) - first(outputs).mean(0))(images)
    random = marked(lambda outputs: first(outputs) * torch.rand(()))
    assert not torch.equal(random(images), random(images))
    assert counts(random) == (0, 0)
    assert "random" in reasons(random)


@pytest.mark.parametrize("door", ["call", "torchcache"])
def test_of_a_partly_trainable_mark_it_is_a_part(door):
    module, twin, images = marked(first), Tokens(), data()
    for each in (module, twin):
        each.requires_grad_(False)
        each.last.requires_grad_(True)
    run = opened(functools.partial(torchcache.torchcache_backend, inner="eager") if door != "call" else door, module)
    for _ in range(3):
        for part in images.split(4):
            got, want = run(part), first(twin(part))
            assert_same(got.detach(), want.detach())
            got.square().sum().backward()
            want.square().sum().backward()
    torch.testing.assert_close(module.last.weight.grad, twin.last.weight.grad)
    assert counts(module) == (12, 24)


def test_weights_that_it_holds_are_part_of_who_computes():
    norm = nn.LayerNorm(8).requires_grad_(False)
    module, images = marked(lambda outputs: norm(first(outputs))), data()
    module(images)
    with torch.no_grad():
        norm.weight.mul_(2)
    assert_same(module(images), norm(first(Tokens()(images))).detach())
    assert counts(module) == (24, 0)
    norm.requires_grad_(True)
    module(images).sum().backward()
    assert norm.weight.grad is not None


def test_a_method_has_one_too():
    module = torchcache.mark(Tokens(), method="encode", freeze=True, output=lambda tokens: tokens[:, -1], audit=0)
    images = data()
    for _ in range(2):
        assert_same(module.encode(images), Tokens().encode(images)[:, -1].detach())
    assert counts(module) == (12, 12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_it(copied):
    module, images = marked(first), data()
    module(images)
    twin = copied(module)
    with torch.no_grad():
        twin.body.bias.add_(1)
    plain = Tokens()
    with torch.no_grad():
        plain.body.bias.add_(1)
    assert_same(twin(images), first(plain(images)).detach())
    assert_same(module(images), first(Tokens()(images)).detach())


def test_nothing_keeps_it_when_the_module_is_gone():
    output = Scaled(1.0)
    module, gone = marked(output), weakref.ref(output)
    module(data())
    del module, output
    gc.collect()
    assert gone() is None


def test_it_must_be_callable():
    with pytest.raises(TypeError, match="output must be a function"):
        torchcache.mark(Tokens(), output="last_hidden_state")
