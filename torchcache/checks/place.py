"""Where an operator was called from: the user's source line, and the module."""

from __future__ import annotations

import os
import re
import types
from collections.abc import Iterator

import torch
from torch import fx, nn

__all__ = ["place_of"]

_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep


def place_of(frame: types.FrameType | None) -> str:
    """Source line and module of the operator called in ``frame``, for the end of a sentence."""
    line, owners = "", []
    for found in _frames(frame):
        names, file = found.f_code.co_varnames, found.f_code.co_filename
        owner = found.f_locals.get(names[0]) if names else None
        if isinstance(owner, fx.GraphModule) and file.startswith("<eval_with_key>"):
            return _traced_place(owner, found.f_lineno)
        if not line and not file.startswith(_TORCH):
            line = f"{file}:{found.f_lineno}"
        if isinstance(owner, nn.Module):
            owners.append(owner)
    path = next((name for name, part in owners[-1].named_modules() if part is owners[0]), "") if owners else ""
    return _said(line, path, type(owners[0]).__name__ if owners else "")


def _frames(frame: types.FrameType | None) -> Iterator[types.FrameType]:
    while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
        yield frame
        frame = frame.f_back


def _traced_place(module: fx.GraphModule, line: int) -> str:
    index = getattr(module, "_lineno_map", {}).get(line - getattr(module, "_prologue_start", 0))
    if index is None:
        return ""
    node = list(module.graph.nodes)[index]
    frames = [f"{file}:{at}" for file, at in re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")]
    own = [found for found in frames if not found.startswith((_TORCH, _OURS))]
    path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
    path = re.sub(r"^L\['\w+'\](\.__self__\.module)?\.?|\.forward\.module", "", path)
    return _said(own[-1] if own else "", path, getattr(kind, "__name__", str(kind)))


def _said(line: str, path: str, kind: str) -> str:
    module = f"{path}, a {kind}" if path and kind else path or kind
    return (f" in {module}" if module else "") + (f" ({line})" if line else "")
