"""Activation checkpointing in partly trained marks that are called: frozen parts are served, steps are the same."""

import copy
import functools

import pytest
import torch
from test_partly import counted, gradients
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import torchcache


def _policy(context, operator, *args, **kwargs):
    saved = operator is torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


KINDS = {
    "plain": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "other numbers": {"use_reentrant": False, "preserve_rng_state": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, _policy),
    },
}


class Blocks(nn.Module):
    """Blocks with dropout, each under checkpointing, of which the first two are frozen; a scale between, and a head."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6)) for _ in range(4))
        self.blocks[:2].requires_grad_(False).eval()
        self.scale, self.head, self.kind = nn.Parameter(torch.ones(6)), nn.Linear(6, 3), kind

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = checkpoint(block, x * self.scale if number == 2 else x, **KINDS[self.kind])
        return self.head(x)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_masks_of_forward(kind, warnings):
    twin = Blocks(kind)
    model, data = torchcache.mark(copy.deepcopy(twin), audit=0), torch.randn(8, 6)
    for number, rows in enumerate([[0, 1, 2, 3], [4, 5, 6, 7], [2, 5, 7], [1, 0, 6, 4]]):
        seen = []
        for net in (model, twin):
            torch.manual_seed(number)
            outputs = net(data[rows])
            seen.append([outputs.detach(), *gradients(net, outputs).values(), torch.rand(2)])
        for got, expected in zip(*seen, strict=True):
            torch.testing.assert_close(got, expected)
    served, _, computed = counted(model)
    assert served >= 7
    assert not computed
    assert not [text for text in warnings if "computed" in text or "no part" in text]


def test_what_is_made_to_need_a_gradient_is_told_of(warnings):
    class Made(Blocks):
        def forward(self, x):
            x = self.blocks[0](x).requires_grad_()  # as transformers has embeddings do for reentrant checkpointing
            return self.head(self.blocks[1](x))

    model, data = torchcache.mark(Made("plain"), audit=0), torch.randn(8, 6)
    for _ in range(2):
        gradients(model, model(data))
    assert any("disable_input_require_grads()" in text for text in warnings)


def test_a_view_that_is_taken_without_recording_is_not_taken_for_that(warnings):
    class Matching(Blocks):
        def forward(self, x):
            x = self.head(self.blocks[0](x))
            torch._dynamo.graph_break()
            with torch.no_grad():  # as losses of detectors match boxes
                order = x.view(-1).argsort()
            return x.flatten()[order].view_as(x)

    model, data = torchcache.transform(torchcache.mark(Matching("plain"), audit=0)), torch.randn(8, 6)
    for _ in range(2):
        gradients(model, model(data))
    assert torchcache.stats(model).hits == 8
    assert not [text for text in warnings if "made to need a gradient" in text]


class Tuned(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("early", [0, 3])
def test_a_checkpoint_around_a_mark_that_trains(early, transformed):
    """The call in which a trace is tried runs it beside the code: a checkpoint is to see what one of them saves."""
    twin, data = Tuned(), torch.randn(8, 6)
    model = torchcache.mark(copy.deepcopy(twin))
    model = torchcache.transform(model) if transformed else model
    for _ in range(early):
        gradients(model, model(data))
    for number in range(12):
        rows = data[number % 3 :]
        got, expected = (gradients(net, checkpoint(net, rows, use_reentrant=False)) for net in (model, twin))
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient)
    assert torchcache.stats(model).hits > 60


@pytest.mark.parametrize("kind", ["plain", "reentrant"])
def test_checkpoints_in_and_around_a_mark(kind):
    twin, data = Blocks(kind), torch.randn(8, 6)
    model = torchcache.mark(copy.deepcopy(twin))
    for number in range(12):
        seen = []
        for net in (model, twin):
            torch.manual_seed(number)
            outputs = checkpoint(net, data[number % 3 :], use_reentrant=False)
            seen.append(gradients(net, outputs))
        for name, gradient in seen[1].items():
            torch.testing.assert_close(seen[0][name], gradient)


def test_hooks_of_saved_tensors_see_them_once():
    model, data, counts = torchcache.mark(Tuned()), torch.randn(8, 6), []

    def pack(kept):
        counts[-1] += 1
        return kept

    for _ in range(10):
        counts.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            gradients(model, model(data))
    assert counts == [counts[0]] * 10
