import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchcache.errors import Bypass
from torchcache.store.buffers import Buffers
from torchcache.store.select import select_rows
from torchcache.values.layout import Layout, dense, inverted, laid, lie_of, memory_order

CPU = torch.device("cpu")


@st.composite
def leaves(draw):
    """A dense tensor with its dimensions in some order in memory, and which of them is the batch."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    dtype = draw(st.sampled_from([torch.float32, torch.int64, torch.bool]))
    values = torch.arange(math.prod(shape)).to(dtype).reshape([shape[dim] for dim in order])
    return values.permute(*inverted(order)), draw(st.integers(0, len(shape) - 1))


def rows_of(leaf, batch_dim):
    return leaf.movedim(batch_dim, 0).contiguous()


@given(leaves())
def test_rows_come_back_as_the_original_lay(drawn):
    leaf, batch_dim = drawn
    layout = Layout.of(leaf, batch_dim)
    rows = rows_of(leaf, batch_dim)
    assert layout.shape == rows.shape[1:]
    assert layout.empty(5, CPU, Buffers()).shape == (5, *rows.shape[1:])
    back = layout.apply(rows, CPU, Buffers())
    assert torch.equal(back, leaf)
    assert back.dtype == leaf.dtype
    assert back.stride() == leaf.stride()


@given(leaves(), st.integers(2, 4))
def test_a_layout_learnt_from_some_rows_fits_any_number(drawn, times):
    leaf, batch_dim = drawn
    rows = rows_of(leaf, batch_dim)
    more = torch.cat([rows] * times)
    back = Layout.of(leaf, batch_dim).apply(more, CPU, Buffers())
    assert torch.equal(back, torch.cat([leaf] * times, batch_dim))
    assert back.permute(*memory_order(leaf.shape, leaf.stride())).is_contiguous()


def test_the_hidden_state_of_an_lstm_has_its_batch_second():
    lstm = torch.nn.LSTM(3, 4, num_layers=2, batch_first=True)
    with torch.no_grad():
        _, (hidden, _) = lstm(torch.randn(1, 5, 3))
        _, (wanted, _) = lstm(torch.randn(6, 5, 3))
    back = Layout.of(hidden, batch_dim=1).apply(rows_of(wanted, 1), CPU, Buffers())
    assert torch.equal(back, wanted)
    assert back.stride() == wanted.stride()


def test_channels_last_rows_come_back_so():
    leaf = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    back = Layout.of(leaf).apply(leaf.contiguous(), CPU, Buffers())
    assert back.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(back, leaf)


def test_rows_that_lie_right_are_not_copied():
    rows = torch.randn(4, 3)
    assert Layout.of(rows).apply(rows, CPU, Buffers()) is rows
    turned = Layout.of(rows.t(), batch_dim=1).apply(rows, CPU, Buffers())
    assert turned.data_ptr() == rows.data_ptr()


@given(leaves())
def test_dense_tensors_lie_in_the_order_asked_for(drawn):
    leaf, _ = drawn
    order = memory_order(leaf.shape, leaf.stride())
    made = dense(leaf.expand(2, *leaf.shape)[0], order)
    assert torch.equal(made, leaf)
    assert made.permute(*order).is_contiguous()


@given(leaves(), st.integers(1, 3))
def test_how_rows_lie_does_not_depend_on_how_many_there_are(drawn, times):
    leaf, batch_dim = drawn
    again = laid(torch.cat([leaf] * times, batch_dim), leaf, batch_dim)
    assert torch.equal(again, torch.cat([leaf] * times, batch_dim))
    if leaf.shape[batch_dim] > 1:
        assert lie_of(again, batch_dim) == lie_of(leaf, batch_dim)


@st.composite
def views(draw):
    """A view with gaps or expanded dimensions, its rows first."""
    leaf, _ = draw(leaves())
    whole = torch.stack([leaf, leaf], draw(st.integers(0, leaf.ndim)))
    view = whole.select(draw(st.integers(0, whole.ndim - 1)), 0)
    dim = draw(st.integers(0, view.ndim - 1))
    return view.narrow(dim, 0, 1).expand_as(view) if draw(st.booleans()) else view


@given(views(), st.data())
def test_rows_of_a_view_lie_as_it_does(view, data):
    picked = data.draw(st.lists(st.integers(0, len(view) - 1), min_size=1, max_size=len(view), unique=True))
    rows = select_rows(view, picked)
    made = laid(rows, view, 0)
    assert torch.equal(made, rows)
    if len(picked) > 1:
        assert lie_of(made, 0) == lie_of(view, 0)


def test_elements_that_share_memory_are_no_rows():
    windows = torch.arange(9.0).unfold(0, 4, 1)
    with pytest.raises(Bypass, match="share memory"):
        lie_of(windows, 0)
    assert lie_of(torch.arange(8.0).unfold(0, 4, 4), 0) == ()
