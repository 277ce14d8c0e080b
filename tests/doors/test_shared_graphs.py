"""One graph may serve several modules: each has rows of its own, and only what changes in it counts as a change."""

import gc
import weakref

import pytest
import torch
from test_partly import DOORS, assert_trains_the_same, counted, nets, opened
from torch import nn

import torchcache


class Block(nn.Module):
    """A part in which a graph ends, so that Dynamo makes one for all blocks."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x):
        h = self.norm(x)
        torch._dynamo.graph_break()
        return x + nn.functional.gelu(self.linear(h))


class Stack(nn.Module):
    """Frozen blocks and a trainable layer."""

    def __init__(self, blocks=12):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks)).requires_grad_(False)
        self.top = nn.Linear(16, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.top(x)


class Side(Stack):
    """Blocks that are given the same rows."""

    def __init__(self):
        super().__init__(4)

    def forward(self, x):
        return self.top(torch.cat([block(x)[..., :4] for block in self.blocks], -1))


@pytest.mark.parametrize("door", DOORS)
def test_blocks_that_share_a_graph_are_all_found_again(door, warnings):
    model, twin = nets(Stack)
    run, x = opened(door, model), torch.randn(8, 16)
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [7, 1, 3, 4], [2, 0, 5, 6], [5, 1]):
        assert_trains_the_same(run, model, twin, [x[rows]])
        if rows == [4, 5, 6, 7]:
            first = counted(model)
    parts = first[1] // 8
    assert parts >= 12
    assert first == (0, 8 * parts, 0)
    assert counted(model) == (10 * parts, 8 * parts, 0)
    assert not warnings


def _in_place(linear):
    with torch.no_grad():
        linear.weight.mul_(0.99)


def _replaced(linear):
    linear.weight = nn.Parameter(linear.weight * 0.99, requires_grad=False)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("change", [_in_place, _replaced])
def test_a_block_that_is_updated_in_every_step_is_told_and_the_others_are_found(change, door, warnings):
    model, twin = nets(Stack)
    run, x = opened(door, model), torch.randn(4, 16)
    for _ in range(12):
        assert_trains_the_same(run, model, twin, [x])
        change(model.blocks[11].linear)
        change(twin.blocks[11].linear)
    hits, misses, bypasses = counted(model)
    steady = (hits + misses + bypasses) // 12 // 4 - 1
    assert hits == 11 * 4 * steady
    assert bypasses > 0
    assert bypasses + misses == 12 * 4 + 4 * steady
    assert ["unmark what is updated in every step" in text for text in warnings] == [True]
    assert "(blocks.11.linear.weight) change" in warnings[0]


def test_states_that_are_gone_leave_no_rows_behind():
    model, twin = nets(Side)
    x = torch.randn(4, 16)
    for step in range(20):
        assert_trains_the_same(model, model, twin, [x])
        if not step:
            regions = len(torchcache.stats(model).regions)
        for net in (model, twin):
            torch.manual_seed(step)
            net.blocks[1] = Block().requires_grad_(False)
    stats = torchcache.stats(model)
    assert len(stats.regions) == regions
    rows = [region.rows_stored for region in stats.regions]
    assert max(rows) <= 4 * 4, rows


def test_the_weights_of_a_block_that_is_dropped_are_given_back():
    model, _ = nets(Stack)
    model(torch.randn(4, 16)).sum().backward()
    gone = weakref.ref(model.blocks[3].linear.weight.untyped_storage())
    del model.blocks[3]
    model(torch.randn(4, 16))
    gc.collect()
    assert gone() is None


def test_a_name_for_all_of_a_mark_does_not_mix_its_blocks(tmp_path, warnings):
    x = torch.randn(8, 16)
    for _ in range(2):
        model, twin = nets(Side, persistent=True, persistent_cache_dir=tmp_path, persistent_module_hash="side")
        for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [1, 5]):
            assert_trains_the_same(model, model, twin, [x[rows]])
        torchcache.flush()
    assert counted(model)[1] == 0
    assert not warnings


@pytest.mark.once
@pytest.mark.parametrize("door", DOORS)
def test_many_models_of_one_class_each_find_their_own_rows(door, warnings):
    pairs = [nets(lambda: Stack(2)) for _ in range(9)]  # torch traces a code object 8 times
    with torch.no_grad():
        for number, pair in enumerate(pairs):
            for net in pair:
                net.blocks[0].linear.bias.add_(number)
    runs, x = [opened(door, model) for model, _ in pairs], torch.randn(6, 16)
    for rows in ([0, 1, 2, 3, 4, 5], [3], [5, 4, 3, 2, 1, 0], [0]):
        for run, (model, twin) in zip(runs, pairs, strict=True):
            assert_trains_the_same(run, model, twin, [x[rows]])
    for model, _ in pairs:
        hits, misses, bypasses = counted(model)
        assert bypasses == 0
        assert hits >= misses
    assert not warnings


@pytest.mark.parametrize("door", DOORS)
def test_what_was_traced_keeps_no_model_alive_and_leaves_room_for_others(door, warnings):
    gone = []
    for _ in range(9):  # torch traces a code object 8 times
        model, twin = nets(lambda: Stack(2))
        run, x = opened(door, model), torch.randn(6, 16)
        for rows in ([0, 1, 2, 3, 4, 5], [3], [5, 4, 3, 2, 1, 0]):
            assert_trains_the_same(run, model, twin, [x[rows]])
        assert counted(model)[0] >= 7
        gone.append(weakref.ref(model.blocks[0]))
        del model, twin, run
        if door != "compile":  # Dynamo itself keeps what torch.compile is given
            gc.collect()
            assert gone[-1]() is None
    assert not warnings


class Hidden(Stack):
    """A forward that Dynamo leaves alone."""

    @torch._dynamo.disable
    def forward(self, x):
        return super().forward(x)


def test_what_dynamo_runs_no_trace_of_is_told(warnings):
    model, twin = nets(lambda: Hidden(2))
    run, x = opened("eager", model), torch.randn(6, 16)
    for _ in range(3):
        assert_trains_the_same(run, model, twin, [x])
    (said,) = warnings
    assert "Dynamo runs no trace of it" in said
