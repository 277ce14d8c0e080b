"""Door 3: a marked module or function called on its own, cached as a whole."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame

from torchcache.errors import OutputError, RowwiseError
from torchcache.graph.marked import Mark, graph_break
from torchcache.graph.region import add_lookup
from torchcache.logging import logger, warn_once
from torchcache.lookup.cache_lookup import CacheLookup, Call, learn_layouts
from torchcache.lookup.context import bypassed, inside_region
from torchcache.lookup.digest import digest_bytes
from torchcache.lookup.fingerprint import Program, State
from torchcache.lookup.key import NumericMode
from torchcache.lookup.rows import Tree, batch_size, flatten_arguments, flatten_outputs
from torchcache.modes import settle
from torchcache.options import CacheOptions
from torchcache.tracing import Traced

__all__ = ["call", "traced_parts"]

# A module may set itself up during its first call; one that changes in every call keeps state.
SETUP_CALLS = 2


def call(mark: Mark, door: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a marked call, cached where it can be.

    Parameters
    ----------
    mark : Mark
        What was marked.
    door : callable
        The marked function itself, for tracing what is only partly frozen.
    args, kwargs
        The call's arguments, the module first.
    """
    if inside_region() or torch._C._is_tracing() or torch.compiler.is_exporting():
        return mark.function(*args, **kwargs)
    watching = eval_frame.set_eval_frame(None)
    try:
        owner = args[0] if mark.of_module and args else None
        cache = _cache_of(mark, owner, door)
        if watching:
            cache.tell_fallback()
        return cache(args, kwargs)
    finally:
        eval_frame.set_eval_frame(watching)


# Dynamo may be watching a thread that gets here; what the cache does is not for it to trace.
eval_frame.set_code_exec_strategy(
    call.__code__, eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
)


class _EagerCache:
    """The eager door of one module or function.

    Parameters
    ----------
    mark : Mark
        The mark.
    module : nn.Module or None
        The marked module.
    door : callable
        The marked function.
    """

    def __init__(self, mark: Mark, module: nn.Module | None, door: Callable[..., Any]) -> None:
        self._mark = mark
        self._module = weakref.ref(module) if module is not None else None
        self._door = door
        self._options: CacheOptions = mark.options_for(module)
        self._program: Program | None = None
        self._held: list[torch.Tensor] = []
        self._state = State()
        self._identity = b""
        self._changes = 0
        self._trees: dict[bytes, Tree] = {}
        self._roles: dict[bytes, _Roles] = {}
        self._lookups: dict[bytes, CacheLookup] = {}
        self.traced: Traced | None = None
        self._tracing = False
        self._told = False
        self.name = (
            type(module).__name__ if module is not None else str(getattr(mark.function, "__qualname__", "function"))
        )

    def tell_fallback(self) -> None:
        """Say once that a call inside a traced model ended here."""
        if not self._told:
            self._told = True
            reason = graph_break(self._mark) or "see torchcache.explain"
            logger.info("%s does not trace as one graph, so it is cached as a whole: %s", self.name, reason)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mark = self._mark
        module = self._module() if self._module is not None else None
        if not mark.options_for(module).enabled:
            return mark.function(*args, **kwargs)
        known = self._program
        self._look(module)
        if self._program is not known:
            self._changes = 0
        if any(tensor.requires_grad for tensor in self._held):
            return self._partial(module, args, kwargs)
        bound = mark.signature().bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        if mark.of_module:
            arguments.pop(next(iter(arguments)))
        tensors, tree = flatten_arguments(arguments, self.name)
        lookup = self._lookup(tree.constants)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            warn_once(f"{self.name} got an input that needs a gradient: such calls bypass the cache")
            lookup.counters.count_bypass(batch_size(tensors, self.name))
            return mark.function(*args, **kwargs)
        roles = self._roles.setdefault(tree.constants, _Roles(self.name))

        def compute(some: list[torch.Tensor]) -> list[torch.Tensor]:
            given = iter(some)
            leaves = [next(given) if row else tensor for tensor, row in zip(tensors, rows, strict=True)]
            passed = _as_passed(args, kwargs, tensors, self.name, 1 if mark.of_module else 0)
            return self._original(module, passed(leaves), tree.constants, lookup)

        while True:
            rows = roles.of(tensors)
            described = self._call(tensors, rows, tree.constants, compute)
            lookup.tag = self._identity.hex()
            try:
                outputs = lookup.bypass(described) if bypassed() else lookup(described)
            except OutputError:
                if not roles.look_elsewhere(tensors, lookup.output_rows):
                    raise
            else:
                return self._trees[tree.constants].rebuild(outputs)

    def _call(
        self,
        tensors: list[torch.Tensor],
        rows: list[bool],
        constants: bytes,
        compute: Callable[[list[torch.Tensor]], list[torch.Tensor]],
    ) -> Call:
        batched = [tensor for tensor, row in zip(tensors, rows, strict=True) if row]
        described = Call(
            digest_bytes(self._identify() + digest_bytes(constants) + bytes(rows)),
            NumericMode.current(batched[0].device.type),
            batched,
            [tensor for tensor, row in zip(tensors, rows, strict=True) if not row],
            compute,
            lambda: learn_layouts(described),
            state=self._state.digest,
        )
        return described

    def _look(self, module: nn.Module | None) -> None:
        """Look at the program again if it changed."""
        if self._program is not None and self._program.unchanged():
            return
        if module is not None:
            settle(module)
        subject = self._mark.function if module is None else (module, self._mark.function)
        self._program = Program(subject, self.name)
        self._held = self._program.tensors
        self._identity = b""

    def _identify(self) -> bytes:
        """Fingerprint of program and state, recomputed when either changed."""
        assert self._program is not None
        name = self._options.persistent_module_hash
        if self._identity and (name is not None or self._state.unchanged(self._held)):
            return self._identity
        if self._identity:  # changed by others, after which a module may set itself up again
            self._changes = 0
        if name is not None:
            self._identity = digest_bytes(b"name:" + name.encode())
        else:
            self._identity = digest_bytes(b"eager" + self._program.digest + self._state.update(self._held))
        return self._identity

    def _original(
        self,
        module: nn.Module | None,
        given: tuple[tuple[Any, ...], dict[str, Any]],
        constants: bytes,
        lookup: CacheLookup,
    ) -> list[torch.Tensor]:
        """Run the original on other rows of a call; note its output's structure, and whether it changed itself."""
        args, kwargs = given
        outputs = self._mark.function(*args, **kwargs)
        leaves, tree, lookup.output_paths = flatten_outputs(outputs, self.name)
        lookup.output_rows = {leaf.shape[0] if leaf.ndim else -1 for leaf in leaves}
        self._trees[constants] = tree
        self._notice_changes(module)
        return leaves

    def _notice_changes(self, module: nn.Module | None) -> None:
        assert self._program is not None
        named = self._options.persistent_module_hash is not None
        if self._program.unchanged() and (named or self._state.unchanged(self._held)):
            return
        self._changes += 1
        if self._changes > SETUP_CALLS:
            raise RowwiseError(
                f"{self.name} cannot be cached: it changes its own attributes or buffers in every call (a counter, "
                "running statistics, a cache of its own). Mark a part that keeps no state, or unmark it"
            )
        self._look(module)
        self._identity = b""
        self._identify()

    def _partial(self, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace a mark that is only partly frozen, and cache its frozen part."""
        if self._tracing or all(tensor.requires_grad for tensor in self._held):
            warn_once(f"{self.name} is not cached: it reads trainable state and does not trace as one graph")
            return self._mark.function(*args, **kwargs)
        if self.traced is None:
            if module is not None:
                settle(module)
            self.traced = Traced(self._door, self.name, module)
        self._tracing = True
        try:
            return self.traced(*args, **kwargs)
        finally:
            self._tracing = False

    def _lookup(self, constants: bytes) -> CacheLookup:
        key = b"eager" + digest_bytes(constants)
        lookup = self._lookups.get(key)
        if lookup is None:
            lookup = self._lookups[key] = CacheLookup(self.name, self._options)
            module = self._module() if self._module is not None else None
            add_lookup(self._mark if module is None else module, key, lookup)
        return lookup


def _as_passed(
    args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor], where: str, skip: int
) -> Callable[[list[torch.Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]:
    """From other values for ``tensors`` to a call of the caller's own form: wrapped forwards tell forms apart."""
    own, tree = flatten_arguments({"args": args[skip:], "kwargs": kwargs}, where)
    places = {id(tensor): position for position, tensor in enumerate(tensors)}

    def rebuild(leaves: list[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = tree.rebuild([leaves[places[id(tensor)]] for tensor in own])
        return (*args[:skip], *given["args"]), given["kwargs"]

    return rebuild


class _Roles:
    """Which tensors of a call have rows, learnt from the calls seen.

    The batch size is dim 0 of the first tensor, until the outputs say that another one leads. A tensor whose first
    dimension once differed from the batch size is shared by all rows, also where the two happen to be equal later.

    Parameters
    ----------
    where : str
        Whose call, for errors.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._lead: int | None = None
        self._tried: set[int] = set()
        self._shared: set[int] = set()

    def of(self, tensors: list[torch.Tensor]) -> list[bool]:
        """Whether each of ``tensors`` has one row a sample."""
        count = batch_size(tensors if self._lead is None else tensors[self._lead :], self._where)
        for position, tensor in enumerate(tensors):
            if not tensor.ndim or tensor.shape[0] != count:
                self._shared.add(position)
        return [position not in self._shared for position in range(len(tensors))]

    def look_elsewhere(self, tensors: list[torch.Tensor], output_rows: set[int]) -> bool:
        """Let a tensor lead whose first dimension all outputs share; ``False`` if there is none untried."""
        for position, tensor in enumerate(tensors):
            if position not in self._tried and tensor.ndim and {tensor.shape[0]} == output_rows:
                self._tried.add(position)
                self._lead, self._shared = position, set()
                return True
        return False


class _Caches(dict[Mark, _EagerCache]):
    """The eager caches of one module or function, kept in its ``__dict__`` to die with it; copies start empty."""

    def __reduce__(self) -> tuple[type[_Caches], tuple[()]]:
        return _Caches, ()


_ATTRIBUTE = "_torchcache_caches"


def _cache_of(mark: Mark, module: Any, door: Callable[..., Any]) -> _EagerCache:
    owner = module if isinstance(module, nn.Module) else None
    caches = vars(door if owner is None else owner).setdefault(_ATTRIBUTE, _Caches())
    cache: _EagerCache | None = caches.get(mark)
    if cache is None:
        cache = caches[mark] = _EagerCache(mark, owner, door)
    return cache


def traced_parts(module: nn.Module) -> list[Traced]:
    """What the eager door traced because ``module`` is partly trainable."""
    return [cache.traced for cache in vars(module).get(_ATTRIBUTE, {}).values() if cache.traced is not None]
