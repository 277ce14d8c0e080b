"""Which tensors are rows as they are: plain, dense, with nothing attached."""

from __future__ import annotations

import torch

from torchcache.dynamo import is_wrapped
from torchcache.errors import Bypass
from torchcache.lazy.tensor import LazyTensor

# By exact type, as a subclass may compute anything: what stands for it in a key.
TENSORS: dict[type, bytes] = {torch.Tensor: b"T", torch.nn.Parameter: b"P", LazyTensor: b"T"}
# Attributes that compilers and torchcache leave on tensors.
HARMLESS = ("_dynamo", "_has_dynamo", "_specialize_on", "_torchdynamo", "_torchcache")


def check_tensor(tensor: torch.Tensor) -> None:
    """Raise unless a tensor's shape, dtype, device and content are all there is to it.

    Raises
    ------
    Bypass
        For a tensor that is sparse, quantized, nested, without data, inside a transform of ``torch.func``, or with
        attributes of its own.
    """
    if (
        tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and not tensor.is_nested
        and not is_wrapped(tensor)
        and (not tensor.__dict__ or type(tensor) is LazyTensor or all(map(_is_harmless, tensor.__dict__)))
    ):
        return
    raise Bypass(*_reason(tensor))


def _is_harmless(name: str) -> bool:
    return name.startswith(HARMLESS)


def _reason(tensor: torch.Tensor) -> tuple[str, str]:
    if is_wrapped(tensor):
        return "a tensor inside a transform of torch.func", ""
    if tensor.is_quantized:
        return "a quantized tensor", "pass its int_repr(), or dequantize() it"
    if tensor.is_nested:
        return "a nested tensor", "pass a padded tensor and a mask"
    if tensor.layout is not torch.strided:
        return f"a tensor of layout {tensor.layout}", "pass its to_dense()"
    if tensor.is_meta:
        return "a tensor on the meta device", ""
    names = ", ".join(map(repr, tensor.__dict__))
    return f"a tensor with attributes of its own ({names})", "pass what they hold as an argument"
