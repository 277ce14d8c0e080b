"""What is looked at in every call: parts of large tensors, others each time, on any device."""

from __future__ import annotations

import pytest
import torch
from states import known

from torchcache.identity.samples import OnDevice


def test_runs_of_a_sixteenth_are_seen_at_once() -> None:
    weight = torch.zeros(1 << 18)
    for start in range(0, weight.numel() * 15 // 16, weight.numel() // 64):
        state = known([weight])
        weight.data[start : start + weight.numel() // 16] += 1
        assert not state.unchanged([weight])


def test_each_call_looks_elsewhere() -> None:
    weight, found = torch.zeros(4096), 0
    for _ in range(20):
        state = known([weight])
        weight.data[:32] += 1  # one look in four finds this
        answers = [state.unchanged([weight]) for _ in range(64)]
        assert answers == sorted(answers, reverse=True), "what was found is found again in every call"
        found += not answers[-1]
    assert found >= 15


def test_gaps_between_elements_are_no_content() -> None:
    whole = torch.zeros(6000, 3, dtype=torch.uint8)
    strided = whole[:, 0]
    state = known([strided])
    whole[:, 1:] += 1
    assert state.unchanged([strided])
    assert [sample.differing([strided]) for sample in state._known[0]._samples] == [set()]  # type: ignore[index]


KINDS = {
    "scalar": torch.tensor(1.5),
    "bool": torch.rand(4000) > 0.5,
    "bfloat16": torch.randn(50, 70).bfloat16(),
    "float8": torch.randn(50, 70).to(torch.float8_e4m3fn),
    "complex64": torch.randn(50, 70, dtype=torch.complex64),
    "complex128": torch.randn(7, dtype=torch.complex128),
    "conj": torch.randn(50, 70, dtype=torch.complex64).conj(),
    "expanded": torch.randn(1, 70).expand(50, 70),
    "transposed": torch.randn(50, 70).t(),
    "sliced": torch.randn(100, 90)[3:, ::7],
    "channels_last": torch.randn(20, 8, 5, 5).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_tensor_on_a_device(name: str) -> None:
    """What other devices are asked works on the CPU as well."""
    tensor = KINDS[name].clone() if KINDS[name].is_contiguous() else KINDS[name]
    samples = OnDevice([1], [torch.ones(3), tensor])
    for _ in range(40):
        assert samples.same([torch.zeros(3), tensor])
    assert samples.differing([torch.zeros(3), tensor]) == set()
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    raw ^= 1
    assert not samples.same([torch.ones(3), tensor])
    assert samples.differing([torch.ones(3), tensor]) == {1}
