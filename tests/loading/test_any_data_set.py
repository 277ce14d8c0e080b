"""Any data set of nested samples, any sampler, any use of the batches: all is as with PyTorch's loader."""

from __future__ import annotations

import collections
import copy
import io
import random
import zlib
from unittest import mock

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_loader import equal
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils import data

import torchcache

EPOCHS = 4
Pair = collections.namedtuple("Pair", "first second")

# What a leaf is, from random numbers of 16 x 24 for its sample and place: large ones may be left out.
LEAVES = {
    "image": lambda x: x,
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "bytes": lambda x: x.repeat(4, 1).mul(40).to(torch.uint8),
    "mask": lambda x: x.repeat(4, 1) > 0,
    "ids": lambda x: (x * 100).long(),
    "complex": lambda x: torch.complex(x, -x),
    "slanted": lambda x: x.T,
    "array": lambda x: x.numpy().copy(),
    "array_of_shorts": lambda x: (x.numpy() * 99).astype(np.int16),
    "one_of_two_dtypes": lambda x: x.double() if x[0, 0] > 1 else x,
    "small": lambda x: x[0, :3],
    "small_array": lambda x: x.numpy()[0, :3].copy(),
    "empty": lambda x: x[:0],
    "label": lambda x: int(x[0, 0] * 100),
    "weight": lambda x: float(x[0, 0]),
    "number": lambda x: np.float32(x[0, 0]),
    "flag": lambda x: bool(x[0, 0] > 0),
    "name": lambda x: f"sample {x[0, 0]:.3f}",
    "path": lambda x: f"{x[0, 0]:.3f}".encode(),
}
samples = st.recursive(
    st.sampled_from(["image", *sorted(LEAVES)]),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=3).map(tuple)
        | st.tuples(inner, inner).map(lambda pair: Pair(*pair))
        | st.dictionaries(st.sampled_from(["image", "text", "a b", 3]), inner, min_size=1, max_size=3)
    ),
    max_leaves=6,
)


class Nested(data.Dataset):
    """Samples of one form."""

    def __init__(self, form, count):
        self.form, self.count = form, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        leaves, form = pytree.tree_flatten(self.form)
        return pytree.tree_unflatten([self.leaf(name, index, place) for place, name in enumerate(leaves)], form)

    def leaf(self, name, index, place):
        numbers = np.random.default_rng([index, place, zlib.crc32(name.encode())]).standard_normal((16, 24))
        return LEAVES[name](torch.from_numpy(numbers.astype(np.float32)))


class AtOnce(Nested):
    """The same, a batch at once."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


SAMPLERS = {
    "in_order": lambda source, size: {"batch_size": size},
    "shuffled": lambda source, size: {"batch_size": size, "shuffle": True, "drop_last": True},
    "with_repeats": lambda source, size: {
        "batch_size": size,
        "sampler": data.WeightedRandomSampler([1.0 + index % 3 for index in range(len(source))], 2 * len(source)),
    },
    "batches": lambda source, size: {
        "batch_sampler": data.BatchSampler(data.SubsetRandomSampler(range(1, len(source))), size, False)
    },
    "a_rank": lambda source, size: {
        "batch_size": size, "sampler": data.DistributedSampler(source, num_replicas=2, rank=1, seed=3)
    },
    "single": lambda source, size: {"batch_size": None, "shuffle": True},
}  # fmt: skip


def as_they_are(samples):
    return samples


def stacked(samples):
    """Samples with their tensors stacked, the rest as lists: what many projects write."""
    leaves, forms = zip(*map(pytree.tree_flatten, samples), strict=True)
    columns = zip(*leaves, strict=True)
    made = [torch.stack(column) if isinstance(column[0], torch.Tensor) else list(column) for column in columns]
    return made, str(forms[0])


COLLATES = {"default": None, "as_they_are": as_they_are, "stacked": stacked}


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


def through_autograd(x):
    if not x.is_floating_point():
        return x
    weight = torch.ones((), dtype=x.dtype, requires_grad=True)
    (x * weight).float().sum().backward()
    return weight.grad


def written_to(x):
    x[: len(x) // 2] = 0
    return x


# What a loop does with each tensor of a batch.
USES = {
    "nothing": lambda x: None,
    "kept": lambda x: x,
    "sum": lambda x: x.sum(),
    "first": lambda x: x[:1],
    "last_two_reversed": lambda x: x[[-1, -2]] if x.ndim and len(x) > 1 else x,
    "doubled": lambda x: torch.cat([x, x]) if x.ndim else x,
    "array": lambda x: np.asarray(x.float() if x.dtype == torch.bfloat16 else x).copy(),
    "text": lambda x: repr(x),
    "saved": saved,
    "copied": copy.deepcopy,
    "written_to": lambda x: written_to(x) if x.ndim else x,
    "autograd": through_autograd,
    "moved": lambda x: x.to("cpu", torch.float64) if not x.is_complex() else x,
    "numbers": lambda x: x.tolist(),
    "flat": lambda x: x.reshape(-1)[:5],
    "halves": lambda x: x.chunk(2) if x.ndim and len(x) > 1 else x,
    "over_rows": lambda x: [row for row in x] if x.ndim else x,  # noqa: C416
}


class Body(nn.Module):
    """Looks at any tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.rand(()), requires_grad=False)
        self.eval()

    def forward(self, x):
        x = torch.view_as_real(x) if x.is_complex() else x
        return (x.double() * self.scale).flatten(1).sum(1, keepdim=True)


def epochs_of(kind, source, collate, sampler, size, uses, seed, cached, **options):
    """All that a loop sees, and the random state in the end; the same draws for every loader."""
    torch.manual_seed(seed)
    body = torchcache.mark(Body()) if cached else Body()
    given = {**SAMPLERS[sampler](source, size), **options}
    if COLLATES[collate] is not None:
        given["collate_fn"] = COLLATES[collate]
    loader, seen = kind(source, **given), []
    chance = random.Random(seed)
    for _ in range(EPOCHS):
        for batch in loader:
            tensors, form = pytree.tree_flatten(batch)
            names = chance.choices(uses, k=len(tensors))
            found = []
            for name, x in zip(names, tensors, strict=True):
                if isinstance(x, torch.Tensor):
                    if x.ndim > 1 and x.numel():
                        found.append(body(x))
                    found.append(USES[name](x))
                else:
                    found.append(x)
            seen.append(([str(form)], found))
    return seen, torch.rand(1).item(), loader


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    samples,
    st.sampled_from([Nested, AtOnce]),
    st.sampled_from(sorted(SAMPLERS)),
    st.sampled_from(sorted(COLLATES)),
    st.integers(1, 5),
    st.lists(st.sampled_from(sorted(USES)), min_size=1, max_size=3),
    st.integers(0, 1000),
    st.booleans(),
)
def test_what_comes_of_the_batches_is_as_with_torchs_loader(form, kind, sampler, collate, size, uses, seed, device):
    source = kind(form, 12)
    given = (source, collate, sampler, size, uses, seed)
    try:
        expected, drawn, _ = epochs_of(data.DataLoader, *given, cached=False)
    except Exception as error:  # PyTorch's loader makes no batch of it
        expected, drawn = type(error), None
    try:
        with mock.patch("torch.accelerator.is_available", return_value=device):  # batches are lazy from the first on
            got, left, loader = epochs_of(torchcache.DataLoader, *given, cached=True)
    except Exception as error:
        if expected is not type(error):
            raise
        return
    assert isinstance(expected, list)
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert equal(one[0], other[0])
        for made, wanted in zip(one[1], other[1], strict=True):
            assert same(made, wanted), f"batch {number}: {wanted} became {made}; {torchcache.stats(loader)}"
    assert left == drawn


def same(one, other):
    if isinstance(other, np.ndarray):
        return isinstance(one, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(other, torch.Tensor) and other.is_floating_point():  # what is summed up may lie in another order
        return isinstance(one, torch.Tensor) and one.dtype == other.dtype and torch.allclose(one, other, rtol=1e-2)
    if isinstance(other, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return equal(one, other)
