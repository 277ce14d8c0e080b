"""What a frame has written to a marked module, or to what it reads, before calling it.

Dynamo makes such writes good after the graph has run. Until then the module says something else of itself than what
the graph was traced with.
"""

from __future__ import annotations

from typing import Any

from torchcache.errors import FingerprintError
from torchcache.lookup.encode import Encoder

__all__ = ["pending_write"]


def pending_write(effects: Any, subject: Any, where: str) -> str:
    """The first write that the program of ``subject`` would show if it were made already; empty if there is none.

    Parameters
    ----------
    effects : SideEffects
        Of Dynamo's trace, as far as it has come.
    subject : tuple or function
        A marked module and its forward, or a marked function.
    where : str
        Its path.
    """
    from torch._dynamo.variables.misc import NewGlobalVariable, PythonModuleVariable

    existing = effects.id_to_variable.items()
    written = {key: held for key, held in existing if held.mutation_type is not None and effects.is_modified(held)}
    attributes = effects.store_attr_mutations
    scopes = [held for held in attributes if isinstance(held, (NewGlobalVariable, PythonModuleVariable))]
    if not written and not scopes:
        return ""
    encoder = Encoder(where)
    try:
        encoder.value(subject)
    except FingerprintError:  # told of where it is fingerprinted
        return ""
    for key, held in written.items():
        if encoder.met(key):
            members = ", ".join(attributes.get(held, ()))
            return f"{members or 'content'} of a {_kind(held)}"
    names = [name for held in scopes for name in attributes[held]]
    return next((f"the global {name}" for name in names if encoder.watch.reads_global(name)), "")


def _kind(held: Any) -> str:
    try:
        return str(held.python_type().__name__)
    except NotImplementedError:  # Dynamo does not know
        return type(held).__name__.removesuffix("Variable").lower()
