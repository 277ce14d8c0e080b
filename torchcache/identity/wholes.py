"""Names by which much more is read than they name, and some by which nothing is."""

from __future__ import annotations

__all__ = ["DISPLAYED", "STREAMS", "TREE", "TREE_HOMES"]

# Names of nn.Module by which a whole tree is read at once, and modules whose functions do.
TREE = frozenset(
    "parameters named_parameters buffers named_buffers children named_children modules named_modules state_dict "
    "_parameters _buffers _modules get_submodule get_parameter get_buffer named_members apply".split()
)
TREE_HOMES = ("torch.func", "torch._functorch", "torch.nn.utils", "torch.export", "torch.fx", "torch.jit")

# How an object that is read as a whole may be turned into text.
DISPLAYED = frozenset({"__str__", "__repr__", "__format__"})

# Of sys: whatever they are, they are only written to.
STREAMS = frozenset({"stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__"})
