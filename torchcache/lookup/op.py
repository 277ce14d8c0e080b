"""``torch.ops.torchcache.lookup``: the one node that stands for a region in a graph.

``lookup(Tensor[] inputs, SymInt[] sizes, str region) -> Tensor[]`` hands the region's inputs to the region of
that name. Its outputs never alias its inputs. It is opaque to compilers, and CUDA graphs are split around it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

__all__ = ["LOOKUP", "Region", "name_region"]


class Region(Protocol):
    """What the op calls."""

    def __call__(self, inputs: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
        """The region's outputs."""

    def fake(self, inputs: list[torch.Tensor], sizes: Sequence[int | torch.SymInt]) -> list[torch.Tensor]:
        """Outputs of the same shapes, dtypes, strides and devices, without their contents."""


_regions: weakref.WeakValueDictionary[str, Region] = weakref.WeakValueDictionary()

_library = torch.library.Library("torchcache", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "lookup(Tensor[] inputs, SymInt[] sizes, str region) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)


@torch.library.impl(_library, "lookup", "CompositeExplicitAutograd")
def _lookup(inputs: list[torch.Tensor], sizes: list[int], region: str) -> list[torch.Tensor]:
    return _find(region)(inputs, sizes)


@torch.library.register_fake("torchcache::lookup", lib=_library)  # type: ignore[untyped-decorator]
def _fake_lookup(inputs: list[torch.Tensor], sizes: list[int], region: str) -> list[torch.Tensor]:
    return _find(region).fake(inputs, sizes)


LOOKUP = torch.ops.torchcache.lookup.default


def name_region(wanted: str, region: Region) -> str:
    """Register ``region`` under ``wanted``, numbered where that is taken, for as long as it lives."""
    name, number = wanted, 1
    while name in _regions:
        name, number = f"{wanted}#{number}", number + 1
    _regions[name] = region
    return name


def _find(name: str) -> Region:
    region = _regions.get(name)
    if region is None:
        raise RuntimeError(
            f"torchcache: the graph refers to the region {name!r}, which is gone: compile the model again"
        )
    return region
