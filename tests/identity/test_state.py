"""State is known by content: every way to write a weight is seen, and nothing else is taken for a change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from states import known
from torch import Tensor, nn

from torchcache.identity.state import State

LARGE = (512, 300)


class Net(nn.Module):
    """Small and large tensors, a buffer, a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(6, 5)
        self.large = nn.Linear(300, 512)
        self.norm = nn.BatchNorm1d(5, affine=False)
        self.register_buffer("table", torch.arange(16.0).view(4, 4))


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def assert_seen(module: nn.Module, write: Callable[[], object]) -> None:
    """``write`` is a change, and after an update it is not."""
    state = known(tensors_of(module))
    before = state.digest
    write()
    assert not state.unchanged(tensors_of(module))
    assert not state.unchanged(tensors_of(module)), "a change is told once only"
    assert state.update(tensors_of(module)) == state.digest != before
    assert state.unchanged(tensors_of(module))


def through_data(change: Callable[[Tensor], object]) -> Callable[[Net], object]:
    return lambda net: [change(parameter.data) for parameter in net.parameters()]


def add_in_place(tensor: Tensor) -> None:
    tensor += 1


def under_no_grad(net: Net) -> None:
    with torch.no_grad():
        net.large.weight.mul_(0.5)


def one_element_through_numpy(net: Net) -> None:
    net.small.weight.detach().numpy()[2, 3] += 1e-6


def one_element_of_a_large_one(net: Net) -> None:
    with torch.no_grad():
        net.large.weight[100, 77] += 1


def through_numpy(net: Net) -> None:
    net.large.weight.detach().numpy()[...] *= 2


def running_statistics(net: Net) -> None:
    net.norm.train()
    net.norm(torch.randn(7, 5))


def functional_statistics(net: Net) -> None:
    nn.functional.batch_norm(torch.randn(7, 5), net.norm.running_mean, net.norm.running_var, training=True)


def into_flat_buffer_and_write(net: Net) -> None:
    flat = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
    at = 0
    for parameter in net.parameters():
        parameter.data = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    flat.mul_(0.5)


def vector_to_parameters(net: Net) -> None:
    size = sum(parameter.numel() for parameter in net.parameters())
    nn.utils.vector_to_parameters(torch.linspace(0, 1, size), net.parameters())


def swap_tensors(net: Net) -> None:
    torch.utils.swap_tensors(net.small.weight, nn.Parameter(torch.randn(5, 6)))


def set_source(net: Net) -> None:
    net.table.set_(torch.ones(4, 4))


def grow_storage(net: Net) -> None:
    net.large.weight.untyped_storage().resize_(4 * 512 * 300 + 400)
    net.large.weight.data.add_(1)


def resize(net: Net) -> None:
    net.table.resize_(2, 4)


def copy_storage(net: Net) -> None:
    net.large.weight.untyped_storage().copy_(torch.randn(LARGE).untyped_storage())


def averaged(net: Net) -> None:
    model = torch.optim.swa_utils.AveragedModel(net)
    model.module = net
    model.n_averaged += 1
    model.update_parameters(copy.deepcopy(net).apply(lambda m: m.reset_parameters() if hasattr(m, "weight") else None))


def foreach_copy(net: Net) -> None:
    with torch.no_grad():
        torch._foreach_copy_(list(net.parameters()), [torch.ones_like(p) for p in net.parameters()])


WRITES = {
    "data.copy_": through_data(lambda data: data.copy_(torch.ones_like(data))),
    "data.mul_": through_data(lambda data: data.mul_(0.5)),
    "data.add_": through_data(lambda data: data.add_(1e-3)),
    "data +=": through_data(add_in_place),
    "data = new": lambda net: setattr(net.large.weight, "data", torch.randn(LARGE)),
    "data = other shape": lambda net: setattr(net.large.weight, "data", net.large.weight.data.view(300, 512)),
    "data = transposed": lambda net: setattr(net.large.weight, "data", net.large.weight.data.t()),
    "data = transposed square": lambda net: setattr(net.table, "data", net.table.data.t()),
    "replaced parameter": lambda net: setattr(net.small, "weight", nn.Parameter(torch.randn(5, 6))),
    "replaced buffer": lambda net: setattr(net, "table", torch.zeros(4, 4)),
    "viewed as integers": lambda net: setattr(net, "table", net.table.view(torch.int32)),
    "removed": lambda net: delattr(net, "table"),
    "no_grad": under_no_grad,
    "one element, numpy": one_element_through_numpy,
    "one element, no_grad": one_element_of_a_large_one,
    "all elements, numpy": through_numpy,
    "running statistics": running_statistics,
    "running statistics, functional": functional_statistics,
    "flat buffer": into_flat_buffer_and_write,
    "vector_to_parameters": vector_to_parameters,
    "swap_tensors": swap_tensors,
    "set_": set_source,
    "resize_": resize,
    "storage.resize_": grow_storage,
    "storage.copy_": copy_storage,
    "averaging": averaged,
    "foreach": foreach_copy,
    "load_state_dict": lambda net: net.load_state_dict(Net().state_dict()),
    "load_state_dict(assign)": lambda net: net.load_state_dict(Net().state_dict(), assign=True),
    "to(bfloat16)": lambda net: net.to(torch.bfloat16),
    "half and back": lambda net: net.half().float(),
    "double": lambda net: net.double(),
}


@pytest.mark.parametrize("name", WRITES)
def test_every_write_is_seen(net: Net, name: str) -> None:
    assert_seen(net, lambda: WRITES[name](net))


def test_a_write_to_the_flat_buffer_behind_parameters_is_seen(net: Net) -> None:
    flat = torch.randn(sum(parameter.numel() for parameter in net.parameters()))
    at = 0
    for parameter in net.parameters():
        parameter.data = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    assert_seen(net, lambda: flat.mul_(0.5))


def test_data_moved_to_and_fro_is_seen_though_addresses_and_versions_return() -> None:
    parameter = nn.Parameter(torch.zeros(5000), requires_grad=False)
    state = State()
    for _ in range(50):
        state.update([parameter])
        address = parameter.data_ptr()
        parameter.data = torch.empty(0)
        parameter.data = torch.zeros(5000)
        if parameter.data_ptr() == address:
            break
    else:
        pytest.skip("the allocator gives no address twice")
    # A sample is not to find it.
    parameter.data[77] = 1
    assert not state.unchanged([parameter])


def test_a_new_tensor_at_an_old_address_is_seen() -> None:
    state, old = State(), None
    for _ in range(50):
        del old
        old = torch.zeros(5000)
        place = id(old), old.data_ptr()
        state.update([old])
        del old
        old = torch.zeros(5000)
        if (id(old), old.data_ptr()) == place:
            break
    else:
        pytest.skip("the allocator gives no address twice")
    torch.from_numpy(old.numpy())[77] = 1
    assert not state.unchanged([old])


def test_what_does_not_change_content_is_no_change(net: Net) -> None:
    state = known(tensors_of(net))
    digest = state.digest
    net.requires_grad_(False)
    assert state.unchanged(tensors_of(net))
    with torch.no_grad():
        net.large.weight.add_(0)
    assert state.unchanged(tensors_of(net))
    net.large.weight.data = net.large.weight.data.clone()
    assert state.unchanged(tensors_of(net))
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    assert state.unchanged(tensors_of(net))
    assert state.unchanged(tensors_of(copy.deepcopy(net)))
    assert state.digest == digest == known(tensors_of(net)).digest


def test_other_tensors_on_the_same_memory_are_no_change() -> None:
    flat = torch.randn(1 << 20)
    state = known([flat[:500], flat[500:]])
    flat.data[-77] = 5  # which a hash would find
    assert state.unchanged([flat[:500], flat[500:]])


def test_a_change_that_is_taken_back_is_no_change(net: Net) -> None:
    state = known(tensors_of(net))
    kept = net.large.weight.detach().clone()
    net.large.weight.data.zero_()
    assert not state.unchanged(tensors_of(net))
    net.large.weight.data.copy_(kept)
    assert state.unchanged(tensors_of(net))


def test_copies_know_nothing() -> None:
    state = known([torch.ones(3)])
    for twin in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert twin.digest == b""
        assert not twin.unchanged([torch.ones(3)])


def test_no_state_and_no_update() -> None:
    state = State()
    assert state.digest == b""
    assert not state.unchanged([])
    assert len(state.update([])) == 16
    assert state.unchanged([])
    assert not state.unchanged([torch.ones(1)])


def test_hashed_whole_are_small_tensors_before_large_ones_up_to_so_many_bytes() -> None:
    large, small, state = torch.zeros(3_000_000), torch.zeros(200_000), State()
    state.update([large, small])
    small.numpy()[77_777] = 1
    assert not state.unchanged_whole([large, small], most=small.nbytes)
    state.update([large, small])
    assert state.unchanged_whole([large, small], most=1e9)
    large.numpy()[77_777] = 1
    assert not state.unchanged_whole([large, small], most=1e9)
    state.update([large, small])
    assert state.unchanged_whole([large, small], most=0)


def write_from_elsewhere(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    writes: list[Callable[[Tensor], object]] = [
        lambda tensor: dist.broadcast(tensor, 1),
        lambda tensor: dist.all_reduce(tensor),
        lambda tensor: dist._broadcast_coalesced(dist.group.WORLD, [tensor], 1 << 20, 1),
        lambda tensor: dist.scatter(tensor, [tensor * 3, tensor * 5] if rank == 0 else None, 0),
    ]
    for size in (10, 10_000):
        for write in writes:
            tensors: list[Tensor] = [nn.Parameter(torch.randn(size), requires_grad=False)]
            before, state = tensors[0].clone(), known(tensors)
            write(tensors[0])
            assert state.unchanged(tensors) is torch.equal(tensors[0], before)
    dist.destroy_process_group()


@pytest.mark.slow
def test_what_other_processes_write_is_seen(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(write_from_elsewhere, (str(tmp_path / "store"),), nprocs=2)


def write_one(tensor: Tensor, value: float) -> None:
    tensor.detach().numpy().reshape(-1)[-1] = value


def write_zero_times(tensor: Tensor, value: float) -> None:
    with torch.no_grad():
        tensor.mul_(1)


RANDOM_WRITES: list[Callable[[Tensor, float], object]] = [
    lambda tensor, value: tensor.data.fill_(value),
    lambda tensor, value: setattr(tensor, "data", torch.full_like(tensor, value)),
    lambda tensor, value: setattr(tensor, "data", tensor.data.clone()),
    lambda tensor, value: tensor.untyped_storage().fill_(int(value)),
    lambda tensor, value: tensor.requires_grad_(value > 1),
    lambda tensor, value: torch.utils.swap_tensors(tensor, nn.Parameter(torch.full_like(tensor, value))),
    lambda tensor, value: np.copyto(tensor.detach().numpy(), np.float32(value)),
    write_one,
    write_zero_times,
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(RANDOM_WRITES), st.sampled_from([0.0, 1.0, 2.0]), st.booleans()),
        max_size=12,
    )
)
def test_unchanged_means_equal_content(
    writes: list[tuple[int, Callable[[Tensor, float], object], float, bool]],
) -> None:
    """Any writes in any order: the answer is whether each byte of each tensor is what it was at the last update."""
    tensors: list[Tensor] = [nn.Parameter(torch.ones(size), requires_grad=False) for size in (3, 64, 2048)]
    tensors.append(nn.Parameter(torch.ones(1, 5).expand(4, 5).clone().t(), requires_grad=False))
    state = known(tensors)
    kept = [tensor.detach().clone() for tensor in tensors]
    for index, write, value, update in writes:
        if write is write_one and not tensors[index].is_contiguous():
            continue
        write(tensors[index], value)
        same = all(torch.equal(now, then) for now, then in zip(tensors, kept, strict=True))
        assert state.unchanged(tensors) is same
        if update:
            state.update(tensors)
            kept = [tensor.detach().clone() for tensor in tensors]
            assert state.unchanged(tensors)
