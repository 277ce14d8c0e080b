"""Memory of batches that is used again: never while anyone holds the batch in it."""

import copy
import gc
import threading

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchcache.store.buffers import SHORTEST, Buffers

LONG = SHORTEST // 4  # floats


def filled(buffers, count, value):
    return buffers.empty((count,), torch.float32).fill_(value)


def test_memory_is_used_again_once_its_tensor_is_gone():
    buffers = Buffers()
    first = filled(buffers, 2 * LONG, 1)
    place = first.data_ptr()
    second = filled(buffers, 2 * LONG, 2)
    assert second.data_ptr() != place
    del first
    assert filled(buffers, 2 * LONG - 5, 3).data_ptr() == place


def test_whatever_shares_the_memory_keeps_it():
    buffers = Buffers()
    holders = [
        lambda x: x[3:5],
        lambda x: x.numpy(),
        lambda x: x.untyped_storage(),
        lambda x: memoryview(x.numpy()),
        lambda x: torch.from_dlpack(x),
        lambda x: (torch.ones(1, requires_grad=True) * x).sum(),  # saved for the backward pass
        lambda x: {"of a module": torch.nn.Parameter(x)},
    ]
    held, places = [], set()
    for holder in holders:
        x = filled(buffers, LONG, 1)
        places.add(x.data_ptr())
        held.append(holder(x))
        del x
    assert len(places) == len(holders)
    del held
    gc.collect()
    assert filled(buffers, LONG, 1).data_ptr() in places


def test_a_tensor_is_like_any_other():
    x = Buffers().empty((LONG, 2), torch.float64).fill_(2)
    assert not x._is_view()
    assert x.is_contiguous()
    assert x._version == 1
    assert not x.requires_grad
    assert torch.equal(copy.deepcopy(x), x)
    x.requires_grad_().sum().backward()
    assert x.grad.shape == x.shape


def test_short_tensors_and_those_of_much_longer_buffers_have_memory_of_their_own():
    buffers = Buffers()
    del_me = filled(buffers, 4 * LONG, 1)
    place = del_me.data_ptr()
    del del_me
    assert filled(buffers, LONG, 1).data_ptr() != place
    assert buffers.empty((3, 0), torch.int8).shape == (3, 0)
    assert filled(buffers, 4, 1).tolist() == [1] * 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(LONG, 3 * LONG)), max_size=40))
def test_nothing_that_is_held_is_written_over(steps):
    buffers, held = Buffers(), {}
    for number, (place, count) in enumerate(steps):
        held.pop(place, None)
        held[place] = (number, filled(buffers, count, number))
        for value, x in held.values():
            assert (x == value).all()
        assert len(buffers) <= buffers.kept


def test_of_many_batches_that_are_held_no_more_than_two_are_remembered():
    buffers = Buffers()
    held = [filled(buffers, LONG, number) for number in range(10)]
    assert len({x.data_ptr() for x in held}) == 10
    assert [x[0].item() for x in held] == list(range(10))
    assert len(buffers) == buffers.kept == 2


def test_threads_have_memory_of_their_own():
    buffers, wrong = Buffers(), []

    def work(number):
        for step in range(200):
            x = filled(buffers, LONG, 1000 * number + step)
            if not (x == 1000 * number + step).all():
                wrong.append(step)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
