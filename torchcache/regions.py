"""The regions of marked modules and functions: made at their first call, found by who was called."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from torch import nn

from torchcache.call import Region
from torchcache.identity.identity import Identity
from torchcache.identity.later import LaterIdentity
from torchcache.logging import logger
from torchcache.mark import Mark, and_then
from torchcache.modes import estimate, resume, settle
from torchcache.options import CacheOptions
from torchcache.stand_in import Deferred
from torchcache.usefulness import note_call


class Called:
    """What is called: a marked function, or a marked method of one module.

    Parameters
    ----------
    mark : Mark
        The mark.
    module : nn.Module or None
        The module, held weakly.
    """

    def __init__(self, mark: Mark, module: nn.Module | None) -> None:
        self.mark = mark
        self._module = weakref.ref(module) if module is not None else None
        self.name = _name(mark, module)
        self._names: tuple[Any, Any, tuple[str, ...]] | None = None
        self.identity = self._identity(mark.options_for(module))

    def _identity(self, options: CacheOptions) -> Identity:
        mark, reference = self.mark, self._module

        def subject() -> Any:
            module = reference() if reference is not None else None
            original = mark.original(module)
            return original if module is None else (module, original)

        def function() -> Any:
            return mark.called(reference() if reference is not None else None)

        # Those of a module run around the call of its forward, on hits as well.
        hooked = reference is None or mark.name != "forward"
        return Identity(subject, self.name, options.persistent_module_hash, options.pure, function, hooked)

    def rename(self) -> None:
        """Take the name that the module has by its path."""
        self.name = _name(self.mark, self.marked)

    @property
    def marked(self) -> nn.Module | None:
        """The module that is marked, as long as it lives."""
        return self._module() if self._module is not None else None

    @property
    def module(self) -> nn.Module | None:
        """The module that computes."""
        return self.marked

    @property
    def deferred(self) -> CalledLater | None:
        """What computes, where that is built when it is needed."""
        return None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the original's positional parameters, read again where it is another function."""
        module = self.marked
        function = self.mark.called(module)
        code = getattr(function, "__code__", None)
        if self._names is None or self._names[0] is not function or self._names[1] is not code:
            self._names = (function, code, self.mark.names(module))
        return self._names[2]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original."""
        module = self.marked
        resume(module)
        estimate(module)
        original = self.mark.original(module)
        return original(*args, **kwargs) if module is None else original(module, *args, **kwargs)


class CalledLater(Called):
    """What is called, where it is built when it is needed first.

    Parameters
    ----------
    mark : Mark
        The mark.
    module : Deferred
        What stands for it.
    """

    identity: LaterIdentity

    def _identity(self, options: CacheOptions) -> LaterIdentity:
        output, reference = self.mark.output, self._module

        def name() -> str:
            stands = _stands(reference)
            return f"{stands.called}\0{stands.casts}"

        def subject() -> Any:
            module, function = _stands(reference).bring().subject
            return module, and_then(function, output)

        return LaterIdentity(subject, self.name, name, options.pure, output, lambda: _stands(reference).there)

    def _stands(self) -> Deferred:
        return _stands(self._module)

    @property
    def deferred(self) -> CalledLater:
        """Itself."""
        return self

    @property
    def built(self) -> bool:
        """Whether what computes is there."""
        return self._stands().built

    def build(self) -> None:
        """Have it be there."""
        self._stands().bring()

    def note(self, computed: bool) -> None:
        """Take note of a call; what nobody needs goes, if another one like it can be had."""
        stands = self._stands()
        there = stands.there
        if stands.idles(computed) and there is not None and there.is_as_built():
            alive, there = weakref.ref(there.module), None
            stands.let_go()
            self.identity.there()
            if alive() is not None:
                gc.collect()  # modules may be in circles
            logger.info("%s was let go, since all rows are found", self.name)

    @property
    def module(self) -> nn.Module | None:
        """The module that computes, while it is there."""
        there = self._stands().there
        return there.module if there is not None else None

    @property
    def names(self) -> tuple[str, ...]:
        """None: they are the same before it is built and after."""
        return ()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original; its first call may set it up, which is no change."""
        built = self._stands().bring()
        unchanged = not built.ran and built.is_as_built()
        outputs = super().run(args, kwargs)
        if not built.ran:
            built.ran = True
            if unchanged:
                built.accept()
        return outputs


def _stands(reference: weakref.ReferenceType[nn.Module] | None) -> Deferred:
    stands = reference() if reference is not None else None
    assert isinstance(stands, Deferred)
    return stands


class _Regions(dict[Any, Region]):
    """The regions of one owner, kept in its ``__dict__`` to go with it; copies of the owner start without.

    Attributes
    ----------
    calls : dict
        What graphs call, by name, and what finds their regions: it may lead to the owner, so that nothing else may
        hold it.
    """

    def __init__(self, owner: Any = None) -> None:
        super().__init__()
        self.calls: dict[Any, Any] = {}
        self._owner = weakref.ref(owner) if owner is not None else None

    def is_of(self, owner: Any) -> bool:
        """Whether these are the regions of ``owner``: a shallow copy has its original's ``__dict__``."""
        return self._owner is not None and self._owner() is owner

    def __reduce__(self) -> tuple[type[_Regions], tuple[()]]:
        return _Regions, ()

    def __deepcopy__(self, memo: Any) -> _Regions:
        return _Regions()


_ATTRIBUTE = "_torchcache_regions"
_paths: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _held(owner: Any) -> _Regions:
    members = vars(owner)
    held = members.get(_ATTRIBUTE)
    if held is None or not held.is_of(owner):
        held = members[_ATTRIBUTE] = _Regions(owner)
    regions: _Regions = held
    return regions


def region_of(mark: Mark, module: nn.Module | None) -> Region:
    """The region of a marked function, or of a marked method of ``module``."""
    regions = _held(mark if module is None else module)
    options = mark.options_for(module)
    region = regions.get(mark)
    if region is None or (region.options is not options and region.options != options):
        if module is not None and options.enabled:
            settle(module)
        note_call()
        subject = CalledLater(mark, module) if isinstance(module, Deferred) else Called(mark, module)
        region = regions[mark] = Region(subject, options)
    return region


def note_reentry(mark: Mark, module: nn.Module | None) -> None:
    """Take note of a marked call that is made while an original is computed, which may be its own."""
    held = vars(module).get(_ATTRIBUTE) if module is not None else None
    region = held.get(mark) if held is not None and held.is_of(module) else None
    if region is not None:
        region.subject.identity.enters_itself()


def add_region(owner: Any, key: Any, region: Region) -> None:
    """Keep the region of a part with its owner."""
    _held(owner)[key] = region


def add_call(owner: Any, name: Any, call: Any) -> None:
    """Keep what graphs call by ``name`` with its owner."""
    _held(owner).calls[name] = call


def kept_call(owner: Any, name: Any) -> Any:
    """What ``add_call`` keeps under this name."""
    return _held(owner).calls.get(name)


def regions_in(target: Any) -> list[Region]:
    """The regions of a model, a marked module or a decorated function, in the model's order.

    Modules that have no path yet are named by their path in this model.
    """
    own = (
        regions_of(target) if isinstance(target, nn.Module) else []
    )  # of what torch.compile returned, if that is marked
    target = getattr(target, "_orig_mod", target)
    target = getattr(target, "_torchdynamo_orig_callable", target)
    if isinstance(target, nn.Module):
        for path, module in target.named_modules():
            if path and module not in _paths and regions_of(module):
                name_module(module, path)
        found = own + [region for module in target.modules() for region in regions_of(module)]
    elif isinstance(getattr(target, "torchcache_mark", None), Mark):
        owner = getattr(target, "__self__", None)
        found = regions_of(target.torchcache_mark if owner is None else owner)
    else:
        raise TypeError(f"torchcache takes a model, a marked module or a decorated function here, not {target!r}")
    return list(dict.fromkeys(found))


def regions_of(owner: Any) -> list[Region]:
    """The regions of a module, or of a function's mark, in the order of their first calls."""
    held = vars(owner).get(_ATTRIBUTE)
    return list(held.values()) if held is not None and held.is_of(owner) else []


def name_module(module: nn.Module, path: str) -> None:
    """Have messages name ``module`` by its path in the user's model."""
    if _paths.get(module) == path:
        return
    _paths[module] = path
    for region in regions_of(module):
        if isinstance(region.subject, Called):
            region.subject.rename()


def _name(mark: Mark, module: nn.Module | None) -> str:
    if module is None:
        return str(getattr(mark.function, "__qualname__", mark.name))
    kind, path = type(module).__name__, _paths.get(module)
    if isinstance(module, Deferred):
        kind = module.called
    name = f"{path} ({kind})" if path else kind
    return name if mark.name == "forward" else f"{name}.{mark.name}"
