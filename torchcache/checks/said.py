"""What an output says beside its tensors, such as a height or a length, and whether that may follow from its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchcache.dynamo import Observer
from torchcache.errors import Bypass
from torchcache.values.take import Taken

# Methods of tensors that give what they hold to Python.
_READS = frozenset(
    "item tolist numpy __array__ __dlpack__ __bool__ __int__ __float__ __complex__ __index__ __contains__".split()
)
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def check_said(output: Taken, run: Callable[[], object]) -> None:
    """Refuse an output with numbers or texts whose original reads what tensors hold: they may be of all rows together.

    Sizes are the same in all calls with rows of one shape. A maximum over the batch is not, and rows of other batches
    would be served with it.

    Parameters
    ----------
    output : Taken
        What the original returned.
    run : callable
        Runs the original once more.
    """
    if not any(value is not None for value in output.constants()):
        return
    functions, operators = _Functions(), _Operators()
    with torch.compiler.set_stance("force_eager"), functions, operators:  # what is compiled shows nothing
        run()
    if functions.read or operators.read:
        raise Bypass(
            "its output holds a number or a text that may depend on what its rows hold",
            "return tensors, or mark a part of it that does",
        )


class _Functions(TorchFunctionMode):
    """Notes whether a tensor is read by a method that no operator stands behind."""

    def __init__(self) -> None:
        super().__init__()
        self.read = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read |= getattr(func, "__name__", "") in _READS
        return func(*args, **(kwargs or {}))


class _Operators(Observer):  # type: ignore[no-untyped-call]
    """Notes whether an operator reads a tensor, or gives as many elements as it finds."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Places by number are as many as there are; of a mask there are as many as it finds.
        by_number = func is torch.ops.aten.index.Tensor and not any(
            place is not None and place.dtype in (torch.bool, torch.uint8) for place in args[1]
        )
        self.read |= not (by_number or _TAGS.isdisjoint(func.tags))
        return func(*args, **(kwargs or {}))
