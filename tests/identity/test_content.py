"""Every byte of every kind of tensor counts; what cannot be read is a bypass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from states import known
from torch import Tensor, nn

from torchcache.errors import Bypass
from torchcache.identity.content import content_digest
from torchcache.identity.state import State

KINDS = {
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 3),
    "bool": torch.rand(4000) > 0.5,
    "int8": torch.arange(100, dtype=torch.int8),
    "int64": torch.arange(3000),
    "half": torch.randn(50, 70).half(),
    "bfloat16": torch.randn(50, 70).bfloat16(),
    "float8": torch.randn(50, 70).to(torch.float8_e4m3fn),
    "complex64": torch.randn(50, 70, dtype=torch.complex64),
    "complex128": torch.randn(7, dtype=torch.complex128),
    "conj": torch.randn(50, 70, dtype=torch.complex64).conj(),
    "neg": torch.randn(50, 70, dtype=torch.complex64).conj().imag,
    "expanded": torch.randn(1, 70).expand(50, 70),
    "expanded small": torch.randn(1).expand(5, 7),
    "transposed": torch.randn(50, 70).t(),
    "sliced": torch.randn(100, 90)[3:, ::7],
    "channels_last": torch.randn(20, 8, 5, 5).to(memory_format=torch.channels_last),
    "misaligned": torch.arange(5001, dtype=torch.uint8)[1:],
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_tensor(name: str) -> None:
    tensor = KINDS[name].clone() if KINDS[name].is_contiguous() else KINDS[name]
    plain = tensor.clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    state = known([tensor])
    same = name not in ("transposed", "channels_last")  # the order in memory counts, and gaps do not
    assert (state.digest == known([plain]).digest) is same
    assert (content_digest(tensor) == content_digest(plain)) is same
    assert content_digest(tensor) == content_digest(tensor.clone().resolve_conj().resolve_neg())
    if not tensor.numel():
        return
    before = content_digest(tensor)
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    raw ^= 1
    assert content_digest(tensor) != before
    assert not state.unchanged([tensor])


def test_conjugated_in_place_is_seen() -> None:
    parameter = nn.Parameter(torch.randn(3, dtype=torch.complex64), requires_grad=False)
    state = known([parameter])
    parameter.data = parameter.data.conj()
    assert not state.unchanged([parameter])


def test_dtype_and_shape_are_content() -> None:
    zeros = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(4, device="meta")]
    assert len({content_digest(tensor) for tensor in zeros}) == 4


def test_content_digest_reads_every_byte_in_every_call() -> None:
    tensor = torch.zeros(3 << 18)
    digests = {content_digest(tensor)}
    for place in (0, 1 << 18, -1):
        tensor.numpy()[place] = 1
        digests.add(content_digest(tensor))
    assert len(digests) == 4


def test_the_digest_depends_on_order_and_not_on_what_is_tied() -> None:
    one, two = torch.randn(5), torch.randn(5)
    assert known([one, two]).digest != known([two, one]).digest
    assert known([one, one]).digest == known([one, one.clone()]).digest


def test_the_digest_depends_neither_on_threads_nor_on_who_made_it() -> None:
    tensor = torch.arange(5 << 18, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = content_digest(tensor)
        torch.set_num_threads(4)
        assert content_digest(tensor) == one
    finally:
        torch.set_num_threads(threads)


def test_meta_tensors_are_constant() -> None:
    tensor = torch.empty(5, device="meta")
    state = known([tensor])
    tensor.add_(1)
    assert state.unchanged([tensor])


def test_inference_tensors_are_seen_by_content() -> None:
    with torch.inference_mode():
        weight = torch.zeros(5)
    state = known([weight])
    with torch.inference_mode():
        assert state.unchanged([weight])
        weight.add_(1)
    assert not state.unchanged([weight])


class Scaled(Tensor):
    """A quantized weight as torchao makes them."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor, bits: int) -> Scaled:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, values: Tensor, scale: Tensor, bits: int) -> None:
        self.values, self.scale, self.bits = values, scale, bits

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["values", "scale"], self.bits

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> None:
        raise AssertionError("what it holds is read, and no operator runs on it")


def test_wrapped_tensors_are_seen() -> None:
    weight = Scaled(torch.zeros(4, 4, dtype=torch.int8), torch.ones(4), 8)
    state = known([weight])
    weight.scale.data.mul_(2)
    assert not state.unchanged([weight])
    before = state.update([weight])
    weight.bits = 4
    assert not state.unchanged([weight])
    assert state.update([weight]) != before


class OneElementInside(torch.optim.Optimizer):
    """An optimizer that knows what its parameters wrap."""

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.values.data.view(-1)[77] += 1


def test_a_step_on_wrapped_tensors_is_seen() -> None:
    weight = Scaled(torch.zeros(1 << 20), torch.ones(4), 8)
    weight.requires_grad = True
    state = known([weight])
    OneElementInside([weight], {}).step()
    assert not state.unchanged([weight])


def test_a_wrapper_that_does_not_say_what_it_is_is_a_bypass() -> None:
    for context in (object(), torch.zeros(5000)):
        weight = Scaled(torch.zeros(4, 4), torch.ones(4), context)  # type: ignore[arg-type]
        with pytest.raises(Bypass, match="context"):
            State().update([weight])


class Named(nn.Parameter):
    """A parameter of another class that changes nothing."""


def test_a_subclass_that_changes_nothing_is_plain() -> None:
    parameter = Named(torch.ones(3), requires_grad=False)
    assert_seen_one(parameter)
    assert content_digest(parameter) == content_digest(torch.ones(3) * 2)


def assert_seen_one(tensor: Tensor) -> None:
    state = known([tensor])
    tensor.data.mul_(2)
    assert not state.unchanged([tensor])


def unreadable() -> Iterator[Tensor]:
    yield torch.eye(3).to_sparse()
    yield torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    yield nn.parameter.UninitializedParameter()
    with torch._subclasses.FakeTensorMode() as mode:
        yield mode.from_tensor(torch.ones(3))
    emptied = torch.ones(3)
    emptied.untyped_storage().resize_(0)
    yield emptied


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_what_cannot_be_read_is_a_bypass() -> None:
    for tensor in unreadable():
        for act in (content_digest, lambda one: State().update([one])):
            with pytest.raises(Bypass) as raised:
                act(tensor)
            assert raised.value.reason


def test_tensors_inside_vmap_are_a_bypass() -> None:
    weight = torch.ones(2, 3)
    state = known([weight])

    def look(row: Tensor) -> Tensor:
        for act in (content_digest, lambda one: state.unchanged([one]), lambda one: state.update([one])):
            with pytest.raises(Bypass):
                act(row)
        return row

    torch.vmap(look)(weight)


def test_memory_given_back_is_a_bypass_and_its_return_no_change() -> None:
    weight = torch.ones(5000)
    state = known([weight])
    weight.untyped_storage().resize_(0)
    record = state._known[0]  # type: ignore[index]
    for portion in record.portions():
        record.check(*portion)  # reads nothing where nothing is
    with pytest.raises(Bypass):
        state.unchanged([weight])
    weight.untyped_storage().resize_(20000)
    weight.data.fill_(1)
    assert state.unchanged([weight])


class OnMesh(Scaled):
    """One that names what is no tensor among its parts, as a DTensor does."""

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["values", "scale", "mesh"], self.bits


def test_parts_of_a_wrapper_that_are_no_tensors_count_by_what_they_say() -> None:
    weight = OnMesh(torch.zeros(4, 4, dtype=torch.int8), torch.ones(4), 8)
    weight.mesh = (0, 1)
    state = known([weight])
    assert state.unchanged([weight])
    weight.mesh = (1, 0)
    assert not state.unchanged([weight])
    weight.mesh = object()
    with pytest.raises(Bypass, match="context"):
        known([weight])
