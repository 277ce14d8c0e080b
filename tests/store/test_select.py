"""Rows that are copied out of tensors, of any dtype and however these lie in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchcache.store.blob import CODES
from torchcache.store.select import INDEXABLE, select_rows

SHAPES = st.lists(st.integers(0, 5), max_size=3)


def made(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of any bytes."""
    count = torch.Size(shape).numel()
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of its elements in order."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@given(st.data(), st.sampled_from(sorted(CODES, key=str)), st.integers(1, 9), SHAPES, st.booleans())
def test_rows_are_those_that_were_asked_for(data, dtype, count, shape, turned):
    leaf = made(dtype, (count, *shape))
    turned = turned and len(shape) > 1 and dtype in INDEXABLE
    if turned:
        leaf = leaf.transpose(1, 2)
    rows = data.draw(st.lists(st.integers(0, count - 1), max_size=12))
    found = select_rows(leaf, rows)
    assert found.dtype is dtype
    assert found.shape == (len(rows), *leaf.shape[1:])
    assert [bytes_of(row) for row in found] == [bytes_of(leaf[row]) for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_long_rows_are_copied_by_several_threads(dtype):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        leaf = made(dtype, (40, 1 << 18))
        rows = torch.randperm(40)
        assert bytes_of(select_rows(leaf, rows.tolist())) == bytes_of(leaf[rows])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("row", [3, -1, -(2**62)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_row_that_is_not_there_is_an_error(row, turned):
    leaf = torch.randn(3, 4, 5)
    with pytest.raises((IndexError, RuntimeError)):
        select_rows(leaf.transpose(1, 2) if turned else leaf, [0, row])


def test_rows_keep_their_gradients():
    leaf = torch.randn(4, 3, requires_grad=True)
    select_rows(leaf, [2, 2, 0]).sum().backward()
    assert leaf.grad.sum(1).tolist() == [3.0, 0.0, 6.0, 0.0]
