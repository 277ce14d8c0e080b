"""Lets torchvision import where its compiled library does not load; transformers and timm import it where they can."""

import importlib
import sys

import torch


def declare_operators():
    """Declare the two operators that torchvision's Python code asks for; returns the library, to keep alive."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for half_imported in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[half_imported]
    except ImportError:
        return None
    else:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


LIBRARY = declare_operators()
