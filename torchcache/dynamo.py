"""Every name of torch that is not public. Dynamo takes as long to import as torch, and is not before it compiles."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from traceback import walk_tb
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import fx, nn
from torch._C._dynamo import eval_frame
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import fake_tensor_tls, unset_fake_temporarily
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass

from torchcache import forks

F = TypeVar("F", bound=Callable[..., Any])

OPAQUE_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)
)

# What stands for an operator in a graph.
OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
ENTER_AUTOCAST: Callable[..., Any] = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST: Callable[..., Any] = torch.amp.autocast_mode._exit_autocast
# Whether a tensor is one of functorch's, as ``vmap`` and ``grad`` hand them around.
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
# What packs and unpacks what is saved for backward on this thread; ``None`` where nothing does.
hooks_of_saved = functools.partial(torch._C._autograd._top_saved_tensors_default_hooks, True)
# Where torch tells, at length, of operators that fail without data.
log_of_fakes = torch._subclasses.fake_tensor.log
# Compute with real tensors while a graph is traced.
no_mode = unset_fake_temporarily
# Have operators that are written in C++ take sizes that are traced as they are, as Dynamo does.
symbolic_sizes = enable_python_dispatcher
# Of a subclass of tensors whose operators are seen below autograd only.
no_torch_function = torch._C._disabled_torch_function_impl


def custom_operators(begin: str = "") -> dict[str, Any]:
    """What ``torch.library.custom_op`` made, by the names of operators that begin so: ``namespace::name``."""
    return {name: made for name, made in torch._library.custom_ops.OPDEFS.copy().items() if name.startswith(begin)}


def written(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors among the arguments of an operator that it writes to."""
    schema = getattr(operator, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    named = {argument.name: arg for argument, arg in zip(schema.arguments, args, strict=False)} | dict(kwargs)
    targets = [named[a.name] for a in schema.arguments if a.alias_info and a.alias_info.is_write and a.name in named]
    return [leaf for leaf in pytree.tree_leaves(targets) if isinstance(leaf, torch.Tensor)]


@functools.cache
def keep_effects(operator: Any) -> None:
    """Have compilers keep calls of ``operator`` whose result nobody uses, in their order."""
    from torch._higher_order_ops import effects  # where a compiler is at work anyway

    effects._register_effectful_op(operator, effects._EffectType.ORDERED)


def keeps_parametrized(module: nn.Module | None) -> bool:
    """Whether ``parametrize.cached()`` keeps what became of parametrized weights in ``module``."""
    if not parametrize._cache_enabled or module is None:
        return False
    return any(map(parametrize.is_parametrized, module.modules()))


def inductor(mode: str | None, options: Mapping[str, Any]) -> Callable[..., Any]:
    """torch.compile's own backend, with a mode and options as ``torch.compile`` takes them."""
    return cast(Callable[..., Any], torch._TorchCompileInductorWrapper(mode, dict(options) or None, None))  # type: ignore[no-untyped-call]


def backend_named(name: str) -> Callable[..., Any] | None:
    """The backend that is registered under a name; ``None`` where none is."""
    with contextlib.suppress(torch._dynamo.exc.InvalidBackend):
        return cast(Callable[..., Any], torch._dynamo.lookup_backend(name))
    return None


def vary(rows: torch.Tensor) -> None:
    """Have Dynamo trace the number of ``rows`` as a symbol, if it can."""
    torch._dynamo.maybe_mark_dynamic(rows, 0)


def nonstrict(function: Callable[..., Any]) -> None:
    """Have Dynamo, while it traces, put ``function`` into its graphs as a call that it does not look into."""
    rules = torch._dynamo.trace_rules  # ``function`` is never gone, so that its id stays its own
    for known in (rules._allowed_callable_ids, rules._nonstrict_trace_callable_ids):
        known.add(id(function))


def constant(function: F) -> F:
    """Have Dynamo run ``function`` while it traces, and put what it returns among the user's globals, by its name.

    That begins with ``torchcache_``, as all that is no part of a program.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def untraced(function: F) -> F:
    """Have Dynamo leave ``function`` and what it calls alone, and end a graph before it.

    As ``torch.compiler.disable``, which loads Dynamo. It may be watching the thread that gets there.
    """

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        watching = eval_frame.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            eval_frame.set_eval_frame(watching)

    skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
    eval_frame.set_code_exec_strategy(cast(Any, alone).__code__, skip)
    alone._torchdynamo_disable = alone._torchdynamo_disable_recursive = True  # type: ignore[attr-defined]
    alone._torchdynamo_disable_msg = "torchcache runs this call as it is"  # type: ignore[attr-defined]
    return cast(F, alone)


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees operators as they run. What is compiled goes on to be, and its operators are not seen."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Yes: under any other mode Dynamo leaves code that is called uncompiled for good."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would be imported


def at_the_top() -> contextlib.AbstractContextManager[None]:
    """Have all of torch's dispatcher again, where a mode handed a call on and has left out what is above it."""
    if not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.PythonTLSSnapshot):
        return contextlib.nullcontext()
    guard: Any = torch._C._ForceDispatchKeyGuard(*_keys(torch.is_inference_mode_enabled()))
    return cast(contextlib.AbstractContextManager[None], guard)


@functools.cache
def _keys(inference: bool) -> Sequence[Any]:
    """The keys of the dispatcher that a thread includes and excludes which has done nothing yet."""
    found: list[Any] = []

    def ask() -> None:
        with torch.inference_mode(inference):
            found.extend((torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()))

    thread = threading.Thread(target=ask, name="torchcache-keys")
    thread.start()
    thread.join()
    return found


def is_watched() -> bool:
    """Whether operators on this thread are seen by a mode or a transform that a lookup would hide them from."""
    modes = range(torch._C._len_torch_function_stack())
    return (
        bool(torch._C._len_torch_dispatch_stack())
        or any(type(torch._C._get_function_stack_at(place)) is not DeviceContext for place in modes)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def default_device() -> str:
    """Type of the device on which tensors are made; what sets it is a mode of functions."""
    return torch.get_default_device().type if torch._C._len_torch_function_stack() else "cpu"


def is_scripted() -> bool:
    """Whether ``torch.jit.trace`` records what runs."""
    return bool(torch._C._is_tracing())


def is_fake(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether any of ``tensors`` is fake."""
    return any(isinstance(tensor, FakeTensor) for tensor in tensors)


def forget_originals(graph: fx.Graph, copy: fx.Graph | None = None) -> None:
    """Have a traced graph, and a copy of it, no longer refer to what was traced: torch swaps no such tensors.

    For the end of a backend: were any of those traced once more, another fake tensor would stand for it.
    """
    for node in copy.nodes if copy is not None else ():  # in its own graph Dynamo does so itself
        node.meta.pop("grapharg", None)
    values = [node.meta.get("example_value") for node in graph.nodes]
    modes: set[Any] = {detect_fake_mode(), *(value.fake_mode for value in values if isinstance(value, FakeTensor))}
    for mode in modes - {None}:
        with contextlib.suppress(AttributeError):  # another release of torch
            mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()


def is_traced(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a call with ``tensors`` is being traced, and not made."""
    return is_watched() or any(type(tensor) not in (torch.Tensor, nn.Parameter) for tensor in tensors)


def traced_shapes(tensors: Sequence[torch.Tensor], numbers: Sequence[Any]) -> Any:
    """What tells calls apart for a fake kernel: sizes as expressions, dtypes, devices, strides."""
    sizes = [size for tensor in tensors for size in (*tensor.shape, *tensor.stride())]
    symbolic = [size for size in (*sizes, *numbers) if isinstance(size, torch.SymInt)]
    environment = id(symbolic[0].node.shape_env) if symbolic else 0
    kinds = [(tensor.dtype, tensor.device, tensor.ndim) for tensor in tensors]
    return environment, tuple(map(str, (*sizes, *numbers))), tuple(kinds)


def hint(size: Any) -> int:
    """A traced size as it was in the call that was traced."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def more(size: torch.SymInt, other: Any) -> int | None:
    """By how much a traced size is more than another; ``None`` where that varies."""
    found = size.node.expr - other.node.expr if isinstance(other, torch.SymInt) else None
    return int(found) if found is not None and found.is_Integer else None


def hints(tensors: Sequence[torch.Tensor]) -> str:
    """Dtypes, sizes and strides of traced tensors as they were in the call that was traced, where that is known."""
    sizes = [(leaf.dtype, *leaf.shape, *leaf.stride()) for leaf in tensors]
    return str([[size.node.hint if isinstance(size, torch.SymInt) else size for size in each] for each in sizes])


@contextlib.contextmanager
def faking(tensors: Sequence[torch.Tensor]) -> Iterator[FakeTensorMode]:
    """The mode of the fake ``tensors``, in force: nothing is run on other tensors either, for which fake ones stand."""
    mode = cast(FakeTensorMode, detect_fake_mode(list(tensors)))
    # Numbers that follow from contents are none of the caller's graph.
    unbacked = mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env else contextlib.nullcontext()
    before = fake_tensor_tls.allow_non_fake_inputs_override
    fake_tensor_tls.allow_non_fake_inputs_override = True
    try:
        with mode, _uncompiled(), unbacked:
            yield mode
    finally:
        fake_tensor_tls.allow_non_fake_inputs_override = before


def takes_constants(operator: Any) -> bool:
    """Whether an operator is given a tensor that code has just made of numbers, in Python."""
    return operator in FakeTensorMode.lift_fns


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Have compiled code run as it is: what Dynamo meets while it traces it leaves alone for good."""
    # It holds this lock while it traces. No other thread may switch the same meanwhile.
    lock = torch._dynamo.convert_frame.compile_lock if "torch._dynamo.convert_frame" in sys.modules else None
    if lock is None or not lock.acquire(blocking=False):
        yield
        return
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(RuntimeError):  # compiled code runs at this time
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        lock.release()


def stands_for(value: Any, tensor: Any) -> bool:
    """Whether ``value`` is the fake tensor that a trace put in the place of ``tensor``."""
    known = isinstance(value, FakeTensor) and isinstance(tensor, torch.Tensor)
    return known and value.fake_mode.fake_tensor_converter._get_memo(tensor) is value


def expression_of(size: Any) -> Any:
    """The sympy expression of a traced size."""
    import sympy  # Dynamo loads it

    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def origin_of(size: Any) -> tuple[Any, int]:
    """What tells traced sizes apart: the expression, and the trace that it belongs to."""
    return expression_of(size), id(size.node.shape_env) if isinstance(size, torch.SymInt) else 0


def storage_of(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common; fake ones have no address, and lazy ones are not loaded for it."""
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return int(torch.Tensor.untyped_storage(tensor)._cdata)


class Source(NamedTuple):
    """Where an input of a graph comes from.

    Parameters
    ----------
    name : str
        By which way Dynamo found it.
    example : object
        What it was when the graph was traced.
    in_module : bool
        Whether a module holds it.
    """

    name: str
    example: Any
    in_module: bool


def source_of(node: fx.Node) -> Source | None:
    """The source of a placeholder of Dynamo's graph, if it has one."""
    argument: Any = node.meta.get("grapharg")
    source = getattr(argument, "source", None)
    if source is None:
        return None
    # A number that is wrapped as a tensor is not kept as one.
    example = argument.example if getattr(argument, "is_tensor", True) else None
    guarded = source.guard_source
    kind = guarded() if callable(guarded) else guarded
    name = source.name if isinstance(source.name, str) else source.name()
    return Source(name, example, "UNSPECIALIZED" in getattr(kind, "name", ""))


def vary_rows() -> None:
    """Have Dynamo trace the first dimensions of the tensors that its frame was given as symbols.

    To be called while it traces. The tensors are the user's: ``fix_rows`` takes back what this notes on them.

    Raises
    ------
    RestartAnalysis
        For Dynamo, which then traces the frame again.
    """
    config = torch._dynamo.config
    if (tracer := _tracer()) is None:  # the frame could not be traced and runs as it is
        return
    output = tracer.output
    # Elsewhere torch.compile was told how to trace sizes, or another backend has no use for it.
    if not (config.automatic_dynamic_shapes and config.assume_static_by_default and _takes_rows(output.compiler_fn)):
        return
    given = [leaf for leaf in pytree.tree_leaves(dict(output.root_tx.f_locals)) if _is_fixed(leaf)]
    if not given:
        return
    # Of a tensor that Dynamo takes apart, what it consists of is traced with sizes of its own.
    wrappers = [leaf for leaf in given if is_traceable_wrapper_subclass(leaf)]
    inner = [getattr(leaf, name) for leaf in wrappers for name in leaf.__tensor_flatten__()[0]]
    leaves = {id(leaf): leaf for leaf in (*given, *filter(_is_fixed, inner))}
    for leaf in leaves.values():
        had = set(vars(leaf))
        torch._dynamo.maybe_mark_dynamic(leaf, 0)
        _varied.leaves = [*getattr(_varied, "leaves", ()), (leaf, set(vars(leaf)) - had)]
    # What comes before may take another path where sizes are symbols. All that Dynamo remembers of its path goes.
    tracer.speculation_log.clear()
    # Of all restarts only this kind keeps which numbers were found to be constants, and is not made time and again.
    raise torch._dynamo.exc.TensorifyScalarRestartAnalysis(restart_reason="torchcache: the number of rows varies")


def retrace_later() -> None:
    """Note, while a call is traced, that Dynamo's next try at the frame will take another path."""
    _varied.elsewhere = True


def retrace() -> None:
    """Have Dynamo forget the path that it took through the frame, where ``retrace_later`` was called.

    Raises
    ------
    UnspecializeRestartAnalysis
        For Dynamo, which then traces the frame from its beginning.
    """
    if vars(_varied).pop("elsewhere", False) and _tracer() is not None:
        raise torch._dynamo.exc.UnspecializeRestartAnalysis(restart_reason="torchcache: a call is traced as it runs")


def leave_graph(why: str) -> RuntimeError:
    """What to raise in a call that is traced and that no graph can hold: Dynamo then makes it between two graphs."""
    text = f"torchcache: {why}"
    return RuntimeError(text) if _tracer() is None else cast(RuntimeError, torch._dynamo.exc.Unsupported(text))


def names_parts() -> bool:
    """Whether the nodes of Dynamo's graphs say in which call they were traced: ``annotate`` notes it."""
    return hasattr(torch.fx.traceback, "annotate")


def passes_structures() -> bool:
    """Whether a call that Dynamo does not look into may return more than tensors in tuples."""
    from torch._higher_order_ops.flat_apply import FlatApply

    return "checked_output" in inspect.signature(FlatApply.__call__).parameters


@contextlib.contextmanager
def outside_dispatch() -> Iterator[None]:
    """Run a user's code as a thread that has just begun runs it, from wherever an operator called us.

    In an operator of a subclass this thread dispatches without autograd, functorch, conjugation and other subclasses,
    under the caller's modes.
    """
    with (
        unset_fake_temporarily(),
        torch._C._ForceDispatchKeyGuard(*_keys_of_a_thread()),
        torch._C._EnableTorchFunction(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


@functools.cache
def _keys_of_a_thread() -> tuple[Any, Any]:
    found: list[Any] = []

    def look() -> None:
        found.extend((torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0], found[1]


def pending_writes() -> tuple[set[int], set[str]]:
    """What the frame that is traced wrote so far and Dynamo makes good only after the graph has run.

    Returns
    -------
    objects : set of int
        The ``id`` of each object that was there before and has changed.
    names : set of str
        Names of globals, and of attributes of Python modules, that were set.
    """
    if (tracer := _tracer()) is None:
        return set(), set()
    effects = tracer.output.side_effects
    existing = effects.id_to_variable.items()
    objects = {key for key, held in existing if held.mutation_type is not None and effects.is_modified(held)}
    attributes = effects.store_attr_mutations
    misc = torch._dynamo.variables.misc
    scopes = (misc.NewGlobalVariable, misc.PythonModuleVariable)
    return objects, {name for held in attributes if isinstance(held, scopes) for name in attributes[held]}


def takes_rows(backend: F) -> F:
    """Say of a backend that its graphs are to run with any number of rows."""
    backend.torchcache_takes_rows = True  # type: ignore[attr-defined]
    return backend


def _takes_rows(backend: Any, further: int = 8) -> bool:
    """Whether a backend is one of ours, or passes graphs on to one."""
    ways = ("_torchdynamo_orig_backend", "compiler_fn", "func", "__self__", "backend_compile_fn")
    inner = next((found for way in ways if (found := getattr(backend, way, None)) is not None), None)
    beneath = inner is not None and further > 0 and _takes_rows(inner, further - 1)
    return beneath or hasattr(backend, "torchcache_takes_rows")


def is_ours() -> bool:
    """Whether the graph that Dynamo traces goes to a backend of ours, or to none."""
    tracer = _tracer()
    return tracer is None or _takes_rows(tracer.output.compiler_fn)


def guard(holds: Callable[[], bool], owner: object = None) -> None:
    """Have Dynamo run what it traces only as long as ``holds()``; asked before each run, and once when it is traced.

    What it traced is let go together with an ``owner``, which this does not keep alive.
    """
    if _tracer() is None:
        return
    held = weakref.ref(owner) if owner is not None else lambda: None

    def create(builder: Any, _: Any) -> None:
        _add(builder.guard_manager.root.add_lambda_guard, lambda _: holds(), ["torchcache: a call is looked up"])
        builder.id_ref(held(), "its owner")  # of ``None`` it takes no notice

    torch._dynamo.guards.install_guard(torch._guards.Guard(torch._dynamo.source.GlobalStateSource(), create))


def _add(how: Callable[..., None], *args: Any) -> None:
    """Add a guard; before torch 2.11 it is not asked for the place in the user's program, which is ``None``."""
    try:
        how(*args, None)
    except TypeError:
        how(*args)


def fix_rows() -> None:
    """Take back what ``vary_rows`` noted on this thread."""
    for leaf, noted in vars(_varied).pop("leaves", ()):
        leaf._dynamo_weak_dynamic_indices.discard(0)
        for name in noted:
            delattr(leaf, name)


def _tracer() -> Any:
    """The frame that Dynamo traces on this thread; ``None`` where it traces none."""
    return getattr(torch._dynamo.symbolic_convert.tls, "current_tx", None)


def is_whole() -> bool:
    """Whether the frame that Dynamo traces is to be one graph, as with ``fullgraph=True``."""
    return bool(getattr(_tracer(), "one_graph", False))


_varied = threading.local()


def _is_fixed(leaf: Any) -> bool:
    """Whether ``leaf`` is data with rows that are traced as a constant number; of one and of none they always are."""
    if not isinstance(leaf, torch.Tensor) or isinstance(leaf, nn.Parameter) or not leaf.ndim or leaf.shape[0] < 2:
        return False
    noted = [getattr(leaf, f"_dynamo_{kind}_indices", ()) for kind in ("weak_dynamic", "dynamic", "static")]
    return not any(0 in indices for indices in noted)


def has_global_hooks() -> bool:
    """Whether hooks run with the forward or backward of every module."""
    return bool(torch_module._has_any_global_hook())  # type: ignore[no-untyped-call]


def compile_with(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled by ``backend``, with a code object of its own, by which Dynamo keeps its caches."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    global _compiled
    _compiled += 1
    code = traced.__code__.replace(co_name=f"traced_{_compiled}")
    own = types.FunctionType(code, globals(), code.co_name, None, traced.__closure__)
    compiled, config = torch.compile(own, backend=backend, **_ISOLATED), cast(Any, torch._dynamo.config)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        # Traces of all models of a class count with its code: each model has as many as one alone would have.
        changed = {limit: getattr(config, limit) * _compiled for limit in _SHARED if hasattr(config, limit)}
        changed |= {name: value for name, value in _OWN.items() if hasattr(config, name)}
        with config.patch(changed):
            return compiled(*args, **kwargs)

    return guarded


# How often anything was compiled here.
_compiled = 0
# Newer releases of torch keep and count the traces of each apart, but for one limit to all of them.
_OPTIONS = inspect.signature(torch.compile).parameters
_ISOLATED: Any = {"isolate_recompiles": True} if "isolate_recompiles" in _OPTIONS else {}
_SHARED = ("accumulated_recompile_limit",) if _ISOLATED else ("recompile_limit", "accumulated_recompile_limit")
# Some releases ask no guard of a parameter where all that changed is its ``data``; all draw NumPy's numbers from torch.
_OWN = {"skip_tensor_guards_with_matching_dict_tags": False, "use_numpy_random_stream": True}

# Comparisons without stamps that take as long as to load Dynamo.
MOST_WITHOUT = 1000
_without = itertools.count()


def tracing_failed(error: BaseException) -> str | None:
    """Why Dynamo could not trace what it was given; ``None`` for an error of the program itself."""
    exc, where = torch._dynamo.exc, vars(torch._dynamo.convert_frame)
    if isinstance(error, exc.BackendCompilerFailed):
        error = error.inner_exception
    elif not isinstance(error, (exc.TorchRuntimeError, exc.InternalTorchDynamoError, exc.Unsupported)) and not any(
        frame.f_globals is where for frame, _ in walk_tb(error.__traceback__)
    ):
        return None
    said = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {said}"


def layout_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """Tells of as many tensors, in C, whether they are laid out as these: class, dtype, device, shape, strides, views.

    ``None`` where this release of torch has no such check, or it tells nothing: of one tensor that comes twice. It does
    not hold in another inference mode or with another autocast, and keeps no tensor alive.
    """
    shapes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    try:
        guards: Any = torch._C._dynamo.guards.TensorGuards
        check = guards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check
        return cast(Callable[..., bool], check) if check(*tensors) else None
    except Exception:
        return None


class Stamps:
    """The versions of many dicts and the classes of many objects at one time, compared in one call that runs in C.

    CPython gives a dict a new version when it is written to; Dynamo's guards compare versions. They take a lock, which
    a thread may have had when another one forked: a child takes stamps of its own.

    Parameters
    ----------
    dicts, objects : sequence
        Plain dicts, and anything.
    owner : object, optional
        Another object, which is watched together with its dict, and not kept.
    """

    def __init__(self, dicts: Sequence[dict[Any, Any]], objects: Sequence[Any], owner: Any = None) -> None:
        guards = _guards()
        self._watched, self._generation = [*dicts, *objects], forks.generation
        root: Any = guards.RootGuardManager()
        own = [] if owner is None else [owner, vars(owner)]
        for place, value in enumerate([*self._watched, *own]):
            item = root.list_getitem_manager(place, "", value, guards.GuardManagerType.GUARD_MANAGER)
            if len(dicts) <= place <= len(self._watched):
                _add(item.add_type_match_guard, id(type(value)), [""])
            else:
                _add(item.add_dict_version_guard, value, [""])
        self._check = root.check

    @classmethod
    def take(
        cls, dicts: Sequence[dict[Any, Any]], objects: Sequence[Any] = (), *, owner: Any = None, attributes: bool = True
    ) -> Stamps | None:
        """Stamps, where they can be had: ``None`` until Dynamo is loaded, as it is by optimizers, or it pays to.

        Those of dicts that hold no ``attributes`` can be had with every Python, and Dynamo is never loaded for them.
        """
        if "torch._dynamo.guards" not in sys.modules and (not attributes or next(_without) < MOST_WITHOUT):
            return None
        try:
            return cls(dicts, objects, owner) if not attributes or _seen_by_stamps() else None
        except Exception:  # another release of torch, or an object that will not tell its class
            return None

    def hold(self, owner: Any = None) -> bool:
        """Whether all versions and classes are what they were, ``owner``'s too, as far as this process can tell."""
        watched = self._watched if owner is None else [*self._watched, owner, vars(owner)]
        return self._generation == forks.generation and bool(self._check(watched))


@functools.cache
@forks.without_forks
def _guards() -> Any:
    """Dynamo's guards. No fork falls into their import, which the child would wait for."""
    return torch._dynamo.guards


@functools.cache
def _seen_by_stamps() -> bool:
    """Whether stamps see attributes that are set: those of Python 3.13.0 do not, and neither do Dynamo's guards."""
    held = types.SimpleNamespace(), nn.Module()
    for number in range(64):  # code that runs often sets attributes in another way
        for each in held:
            stamps = Stamps([vars(each)], [])
            each.torchcache = number
            if stamps.hold():
                return False
    return True
