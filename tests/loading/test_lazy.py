"""A lazy tensor is the tensor that it stands for, whatever is done with it."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import torchcache
from torchcache.digest.rows import digest_rows
from torchcache.lazy.rows import Kind, Row
from torchcache.lazy.tensor import LazyTensor
from torchcache.lazy.use import stack_rows

SHAPE = (2, 16, 8)


class Store:
    """A source of rows from memory, that counts what is loaded."""

    digest = "xxh3_128"

    def __init__(self, count=8):
        self.rows = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
        self.digests = digest_rows([self.rows], self.digest)
        self.loaded = 0

    def load(self, rows, *, foreign):
        self.loaded += len(rows)
        for row in rows:
            row.data = self.rows[row.index].clone()

    def learn(self, owner, leaf, foresee):
        pass

    def lazy(self, indices):
        kind = Kind(torch.float32, SHAPE)
        return stack_rows([Row(self, index, 0, kind, self.digests[index]) for index in indices])


# What changes no data, and is not to load any.
KEEPING = {
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "to": lambda x: x.to("cpu", copy=True),
    "contiguous": lambda x: x.contiguous(),
    "front": lambda x: x[: len(x) // 2 + 1],
    "back": lambda x: x[-2:],
    "reversed": lambda x: x[list(range(len(x)))[::-1]],
    "masked": lambda x: x[torch.arange(len(x)) % 2 == 0],
    "picked": lambda x: x.index_select(0, torch.tensor([0, len(x) - 1])),
    "doubled": lambda x: torch.cat([x, x]),
    "restacked": lambda x: torch.stack(list(x)),
    "split": lambda x: x.split(2)[0],
    "chunked": lambda x: torch.cat(x.chunk(2)),
    "one": lambda x: x[-1:],
    "narrowed": lambda x: x.narrow(0, 0, 1),
    "wrapped": lambda x: x[0][None],
}
# What uses the data; some write.
USING = {
    "add": lambda x: x + 1,
    "add_": lambda x: x.add_(1),
    "mul_row": lambda x: x[0].mul_(2),
    "setitem": lambda x: x.__setitem__(0, 5.0),
    "zero_view": lambda x: x.view(len(x), -1)[:, :3].zero_(),
    "transpose": lambda x: x.transpose(1, 2),
    "half": lambda x: x.half(),
    "numpy_write": lambda x: x.numpy().__setitem__(0, 7.0),
    "out": lambda x: torch.neg(torch.ones_like(x), out=x),
    "copy_": lambda x: x.copy_(torch.zeros(())),
    "normalise": lambda x: (x - x.mean()) / x.std(),
    "apply_": lambda x: x.apply_(lambda element: element + 1),
    "map_": lambda x: x.map_(torch.ones_like(x), lambda one, other: one * 2 + other),
    "subclass": lambda x: x.as_subclass(nn.Parameter),
    "relu_": lambda x: nn.functional.relu_(x),
    "interleaved": lambda x: x[::2],
}
OPERATIONS = KEEPING | USING


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(0, 7), min_size=2, max_size=6),
    st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 5)), min_size=1, max_size=8),
)
def test_any_chain_of_operations_gives_what_it_gives_on_plain_tensors(indices, chain):
    store = Store()
    lazy, plain = [store.lazy(indices)], [store.rows[indices].clone()]
    for name, which in chain:
        source = which % len(plain)
        if plain[source].shape[1:] != SHAPE or plain[source].dtype != torch.float32 or len(plain[source]) < 2:
            continue
        results = [OPERATIONS[name](tensors[source]) for tensors in (lazy, plain)]
        if isinstance(results[1], torch.Tensor):
            lazy.append(results[0])
            plain.append(results[1])
    for one, other in zip(lazy, plain, strict=True):  # views that were written through show it, copies do not
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert torch.allclose(one + 0, other + 0, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", sorted(KEEPING))
def test_what_changes_no_data_loads_none(name):
    store = Store()
    kept = KEEPING[name](store.lazy([3, 1, 4]))
    assert store.loaded == 0
    assert torch.equal(kept + 0, KEEPING[name](store.rows[[3, 1, 4]]))


@pytest.mark.parametrize("name", sorted(KEEPING))
def test_a_marked_call_finds_rows_of_what_was_kept(name):
    body = torchcache.mark(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), freeze=True, audit=0.0)
    store = Store()
    for _ in range(3):
        body(store.rows.clone())
    body(store.rows[:1].clone())  # the first row alone is compared
    given = KEEPING[name](store.lazy([3, 1, 4, 0]))
    hits = torchcache.stats(body).hits
    expected = KEEPING[name](store.rows[[3, 1, 4, 0]])
    assert torch.allclose(
        body(given), nn.functional.linear(expected.flatten(1), body[1].weight, body[1].bias), atol=1e-5
    )
    assert torchcache.stats(body).hits == hits + len(given)
    assert store.loaded == 0


def test_rows_that_were_written_to_are_not_those_that_are_remembered():
    body = torchcache.mark(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), freeze=True, audit=0.0)
    store = Store()
    for _ in range(3):
        body(store.rows.clone())
    for write in (
        lambda x: x.add_(1),
        lambda x: x[1:].mul_(3),
        lambda x: x.numpy().fill(2.0),
        lambda x: x.view(-1).zero_(),
    ):
        given = store.lazy([3, 1, 4])
        write(given)
        plain = store.rows[[3, 1, 4]].clone()
        write(plain)
        assert torch.allclose(
            body(given), nn.functional.linear(plain.flatten(1), body[1].weight, body[1].bias), atol=1e-4
        )


def test_python_and_numpy_see_values():
    store = Store()
    x, plain = store.lazy([0, 5]), store.rows[[0, 5]]
    assert np.array_equal(np.asarray(x), plain.numpy())
    assert np.array_equal(
        np.stack([store.lazy([1])[0], store.lazy([2])[0]]), plain.numpy() * 0 + store.rows[[1, 2]].numpy()
    )
    assert x.tolist() == plain.tolist()
    assert repr(x) == repr(plain)
    assert f"{x.sum():.3f}" == f"{plain.sum():.3f}"
    assert len(x) == 2
    assert bool((x == plain).all())


def saved(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer)


@pytest.mark.parametrize("through", [saved, copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_that_leave_it_hold_the_data(through):
    store = Store()
    back = through(store.lazy([2, 3]))
    assert type(back) is torch.Tensor
    assert torch.equal(back, store.rows[[2, 3]])


def test_gradients_reach_it():
    store = Store()
    x, plain = store.lazy([0, 1]).requires_grad_(), store.rows[[0, 1]].clone().requires_grad_()
    for each in (x, plain):
        (each.sin() * each).sum().backward()
    assert torch.equal(x.grad, plain.grad)


GRADIENTS = {
    "backward": lambda net, x: torch.autograd.grad(net(x.requires_grad_()).square().sum(), x)[0],
    "clone": lambda net, x: torch.autograd.grad(net(x.requires_grad_().clone()).square().sum(), x)[0],
    "parameter": lambda net, x: torch.autograd.grad(net(y := nn.Parameter(x)).square().sum(), y)[0],
    "jacobian": lambda net, x: torch.autograd.functional.jacobian(lambda y: net(y).sum(), x),
    "vjp": lambda net, x: torch.autograd.functional.vjp(lambda y: net(y).sum(), x)[1],
    "keyword": lambda net, x: torch.autograd.grad(net(x=x.requires_grad_()).square().sum(), x)[0],
}


class Features(nn.Module):
    """A frozen convolution, and a trained layer on it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.head = nn.Conv2d(SHAPE[0], 4, 3), nn.Linear(4, 3)
        self.requires_grad_(False)

    def forward(self, x):
        return self.head(self.frozen(x).relu().mean((2, 3)))


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("door", ["call", "transform", "eager", "bypass"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_reach_it_through_a_mark(name, door, trains):
    store = Store()
    plain, net = Features(), torchcache.mark(Features())
    for each in (plain, net):
        each.head.requires_grad_(trains)
    net(store.lazy([0, 1, 2]))
    run = torchcache.transform(net) if door == "transform" else net
    run = torch.compile(net, backend="eager") if door == "eager" else run
    with torchcache.bypass() if door == "bypass" else torch.enable_grad():
        found = GRADIENTS[name](run, store.lazy([2, 3, 4]))
    expected = GRADIENTS[name](plain, store.rows[[2, 3, 4]].clone())
    assert expected.any()
    torch.testing.assert_close(found + 0, expected)


def test_threads_share_one_memory():
    store = Store()
    x, seen = store.lazy([0, 1, 2]), []
    threads = [threading.Thread(target=lambda: seen.append((x * 1).sum().item())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {store.rows[:3].sum().item()}
    assert store.loaded == 3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_that_writes_into_a_batch_does_so(backend):
    store = Store()
    body = torchcache.mark(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), freeze=True, audit=0.0)
    for _ in range(3):
        body(store.rows.clone())

    @torch.compile(backend=backend, fullgraph=True)
    def step(x):
        before = body(x).sum()
        x.sub_(1).mul_(2)
        return before + 3 * body(x).sum() + x.mean()

    x, plain = store.lazy([1, 2, 3]), store.rows[[1, 2, 3]].clone()
    with torchcache.bypass():
        wanted = step._torchdynamo_orig_callable(plain)
    assert torch.allclose(step(x), wanted, atol=1e-3)
    assert torch.equal(x + 0, plain)


@pytest.mark.parametrize(
    "reshape",
    [
        lambda x: x.unsqueeze_(0),
        lambda x: x.transpose_(0, 1),
        lambda x: x.resize_(2, 8),
        lambda x: x.set_(torch.ones(3)),
    ],
)
def test_what_changes_a_shape_in_place_changes_it(reshape):
    store = Store()
    x, plain = store.lazy([1, 2, 3]), store.rows[[1, 2, 3]].clone()
    reshape(x)
    reshape(plain)
    assert x.shape == plain.shape
    assert torch.equal(x, plain)


def test_data_can_be_set_and_taken_in_inference_mode():
    store = Store()
    x = store.lazy([1, 2])
    x.data = torch.ones(3)
    assert x.tolist() == [1, 1, 1]
    with torch.inference_mode():
        assert torch.equal(store.lazy([1, 2]).detach() + 0, store.rows[[1, 2]])


def test_other_code_in_a_compiled_graph_gets_the_data():
    store, head = Store(), nn.Linear(256, 2)
    body = torchcache.mark(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), freeze=True, audit=0.0)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x):
        return body(x).sum() + head(x.flatten(1) * 2).sum() + x[1:].mean()

    for indices in ([0, 1, 2], [5, 4, 3], [1, 2, 7], [3, 6]):
        plain = store.rows[indices]
        wanted = step._torchdynamo_orig_callable(plain)
        assert torch.allclose(step(store.lazy(indices)), wanted, atol=1e-3)
    assert isinstance(store.lazy([0]), LazyTensor)


# What goes to the memory itself.
MEMORY = {
    "storage": lambda x: x.untyped_storage().tolist(),
    "typed_storage": lambda x: x.storage().tolist(),
    "bytes_of_a_storage": lambda x: x[1:].untyped_storage().nbytes(),
    "set_to_it": lambda x: torch.empty(0).set_(x.untyped_storage(), x[1].storage_offset(), SHAPE),
    "strided": lambda x: x[2].as_strided(SHAPE, x[2].stride(), x[2].storage_offset()),
    "one_for_all_views": lambda x: x.untyped_storage().data_ptr() == x[2].untyped_storage().data_ptr(),
    "own_for_copies": lambda x: x.untyped_storage().data_ptr() == x[2:].clone().untyped_storage().data_ptr(),
    "offsets": lambda x: [y.storage_offset() for y in (x, x[2], x[1:][1], x[1:3], x[1:3].clone(), x[4:], *x.split(3))],
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("use", sorted(MEMORY))
def test_its_memory_is_that_of_the_tensor_it_stands_for(use):
    store = Store()
    one, other = MEMORY[use](store.lazy([3, 1, 4, 0])), MEMORY[use](store.rows[[3, 1, 4, 0]])
    assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_where_it_begins_in_memory_is_known_without_loading():
    store = Store()
    assert store.lazy([3, 1, 4])[2].storage_offset() == 2 * 256
    assert not store.loaded


def test_safetensors_saves_what_it_stands_for():
    safetensors = pytest.importorskip("safetensors.torch")
    store = Store()
    saved = safetensors.load(safetensors.save({"x": store.lazy([3, 1, 4]), "y": store.lazy([2])}))
    assert torch.equal(saved["x"], store.rows[[3, 1, 4]])
    assert torch.equal(saved["y"], store.rows[[2]])
