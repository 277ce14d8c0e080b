"""Whatever a marked module's output depends on can change: the next call is a miss, through every door."""

import array
import collections
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import enum
import functools
import importlib
import os
import sys
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from marked import counts, frozen, unmarked
from torch import nn

import torchcache

CASES = {}
SETTINGS = {"scale": 2.0}
FACTOR = 2.0


def case(function):
    CASES[function.__name__] = function
    return function


class Scaled(nn.Module):
    """Returns x times whatever ``get`` says."""

    def __init__(self, held=None):
        super().__init__()
        self.held = held

    def forward(self, x):
        return x * self.get()


def module_of(get, held=None):
    """A module of a class of its own, so that classes can be changed."""
    return type("Own", (Scaled,), {"get": get, "__module__": __name__})(held)


class Bag:
    def __init__(self, **values):
        self.__dict__.update(values)


@dataclasses.dataclass(slots=True)
class Slots:
    scale: float = 2.0


@dataclasses.dataclass
class NotCompared:
    scale: float = dataclasses.field(default=2.0, compare=False)


class SlotBesideDict:
    __slots__ = ("__dict__", "scale")


class Name(str):
    pass


class Numbers(dict):
    pass


@case
def class_attribute():
    module = module_of(lambda self: self.scale)
    type(module).scale = 2.0
    return module, lambda: setattr(type(module), "scale", 3.0)


@case
def class_method():
    module = module_of(lambda self: 2.0)
    return module, lambda: setattr(type(module), "get", lambda self: 3.0)


class Shown:
    def __init__(self, scale):
        self.scale = scale

    def __repr__(self):
        return f"{self.scale}"


class Formatted:
    def __init__(self, scale):
        self.scale = scale

    def __format__(self, spec):
        return str(self.scale)


@case
def text_of_what_a_loop_gives():
    def get(self):
        return sum(float(f"{each}") for _, each in self.held.items())

    held = {"one": Shown(2.0)}
    return module_of(get, held), lambda: setattr(held["one"], "scale", 3.0)


@case
def text_of_what_a_call_returns():
    held = [Shown(2.0)]
    module = module_of(lambda self: float(str(self.first())), held)
    type(module).first = lambda self: self.held[0]
    return module, lambda: setattr(held[0], "scale", 3.0)


@case
def text_of_a_closed_over_object():
    shown = Shown(2.0)
    return module_of(lambda self: float(repr(shown))), lambda: setattr(shown, "scale", 3.0)


@case
def formatted_item():
    held = {"one": Formatted(2.0)}
    return module_of(lambda self: float(f"{self.held['one']}"), held), lambda: setattr(held["one"], "scale", 3.0)


@case
def function_of_an_installed_module_that_is_closed_over(monkeypatch):
    import math as held

    module = module_of(lambda self: held.sqrt(4.0))
    return module, lambda: monkeypatch.setattr(held, "sqrt", lambda value: 3.0)


@case
def function_of_an_installed_module_that_is_an_attribute(monkeypatch):
    module = module_of(lambda self: self.held.norm(torch.ones(4)), torch.linalg)
    return module, lambda: monkeypatch.setattr(torch.linalg, "norm", lambda value: 3.0)


@case
def method_of_an_installed_class_that_is_no_module(monkeypatch):
    cauchy = torch.distributions.Cauchy
    module = module_of(lambda self: torch.distributions.Cauchy(2.0, 1.0, validate_args=False).mode)
    return module, lambda: monkeypatch.setattr(cauchy, "mode", property(lambda self: 3.0))


@case
def class_forward():
    module = module_of(lambda self: 2.0)
    return module, lambda: setattr(type(module), "forward", lambda self, x: x * 3.0)


@case
def forward_of_a_child_class():
    child = module_of(lambda self: 2.0)
    return nn.Sequential(child), lambda: setattr(type(child), "forward", lambda self, x: x * 3.0)


@case
def forward_of_an_installed_class(monkeypatch):
    module = nn.Sequential(nn.Hardshrink(0.0), module_of(lambda self: 2.0))
    return module, lambda: monkeypatch.setattr(nn.Hardshrink, "forward", lambda self, x: x * 1.5)


@case
def function_that_an_installed_class_calls(monkeypatch):
    module = nn.Sequential(nn.Hardshrink(0.0), module_of(lambda self: 2.0))
    return module, lambda: monkeypatch.setattr(nn.functional, "hardshrink", lambda x, bound: x * 1.5)


@case
def attribute_of_a_tensor():
    module = module_of(lambda self: self.table.scale)
    module.register_buffer("table", torch.zeros(2))
    module.table.scale = 2.0
    return module, lambda: setattr(module.table, "scale", 3.0)


@case
def forward_of_a_child_instance():
    child = module_of(lambda self: 2.0)
    return nn.Sequential(child), lambda: setattr(child, "forward", lambda x: x * 3.0)


@case
def class_of_the_module():
    module = module_of(lambda self: 2.0)
    other = module_of(lambda self: 3.0)
    return nn.Sequential(module), lambda: setattr(module, "__class__", type(other))


@case
def class_attribute_named_by_code():
    class Settings:
        scale = 2.0

    return module_of(lambda self: Settings.scale), lambda: setattr(Settings, "scale", 3.0)


@case
def attribute():
    module = module_of(lambda self: self.held, 2.0)
    return module, lambda: setattr(module, "held", 3.0)


@case
def attribute_named_like_one_of_ours():
    module = module_of(lambda self: self.held.train, Bag(train=2.0))
    return module, lambda: setattr(module.held, "train", 3.0)


@case
def attribute_named_like_one_of_transformers():
    module = module_of(lambda self: self.held.name_or_path, Bag(name_or_path=2.0))
    return module, lambda: setattr(module.held, "name_or_path", 3.0)


@case
def integer_that_becomes_a_float():
    module = module_of(lambda self: 2.0 if isinstance(self.held, int) else 3.0, 1)
    return module, lambda: setattr(module, "held", 1.0)


@case
def integer_that_becomes_a_bool():
    module = module_of(lambda self: 3.0 if isinstance(self.held, bool) else 2.0, Bag(one=1))
    module.held = Bag(one=1)
    type(module).get = lambda self: 3.0 if isinstance(self.held.one, bool) else 2.0
    return module, lambda: setattr(module.held, "one", True)


@case
def zero_that_becomes_negative():
    module = module_of(lambda self: 2.0 + (torch.tensor(self.held).signbit()), Bag(zero=0.0))
    type(module).get = lambda self: 2.0 + torch.full((), self.held.zero).signbit()
    return module, lambda: setattr(module.held, "zero", -0.0)


@case
def text_of_a_subclass():
    module = module_of(lambda self: float(self.held), Name("2"))
    return module, lambda: setattr(module, "held", Name("3"))


@case
def attribute_of_a_text_of_a_subclass():
    name = Name("a")
    name.scale = 2.0
    return module_of(lambda self: self.held.scale, name), lambda: setattr(name, "scale", 3.0)


@case
def attribute_of_a_dict_of_a_subclass():
    numbers = Numbers()
    numbers.scale = 2.0
    return module_of(lambda self: self.held.scale, numbers), lambda: setattr(numbers, "scale", 3.0)


@case
def item_of_a_list():
    module = module_of(lambda self: self.held[0], [2.0])
    return module, lambda: module.held.__setitem__(0, 3.0)


@case
def item_of_a_dict_in_a_tuple():
    module = module_of(lambda self: self.held[0]["scale"], ({"scale": 2.0},))
    return module, lambda: module.held[0].update(scale=3.0)


@case
def item_of_a_deque():
    module = module_of(lambda self: self.held[0], collections.deque([2.0]))
    return module, lambda: module.held.__setitem__(0, 3.0)


@case
def factory_of_a_defaultdict():
    module = module_of(lambda self: 2.0 + self.held.copy()["missing"], collections.defaultdict(int))
    return module, lambda: setattr(module.held, "default_factory", lambda: 1)


@case
def item_of_a_user_dict():
    module = module_of(lambda self: self.held["scale"], collections.UserDict(scale=2.0))
    return module, lambda: module.held.update(scale=3.0)


@case
def item_of_a_set():
    module = module_of(lambda self: sum(self.held), {2.0})
    return module, lambda: (module.held.clear(), module.held.add(3.0))


@case
def attribute_of_a_member_of_a_set_that_leads_back_to_it():
    def first():
        return first.scale * len(plugins)

    def second():
        return second.scale * len(plugins)

    plugins, first.scale, second.scale = {first, second}, 0.25, 0.75
    return module_of(lambda self: sum(plugin() for plugin in plugins)), lambda: setattr(first, "scale", 0.75)


@case
def order_of_a_dict():
    module = module_of(lambda self: 2.0 if next(iter(self.held)) == "a" else 3.0, {"a": 1, "b": 2})
    return module, lambda: module.held.update(a=module.held.pop("a"))


@case
def order_of_children():
    module = nn.Sequential(module_of(lambda self: 2.0), nn.Hardtanh(-4.0, 4.0))
    module.append(module_of(lambda self: 1.0))
    module[0].get, module[2].get = (lambda: 2.0), (lambda: 1.0)

    def change():
        module._modules["0"].get = lambda: 3.0

    return module, change


@case
def bytes_of_a_bytearray():
    module = module_of(lambda self: float(self.held[0]), bytearray([2]))
    return module, lambda: module.held.__setitem__(0, 3)


@case
def item_of_an_array():
    module = module_of(lambda self: self.held[0], array.array("d", [2.0]))
    return module, lambda: module.held.__setitem__(0, 3.0)


@case
def item_of_a_numpy_array():
    module = module_of(lambda self: float(self.held[0]), np.array([2.0]))
    return module, lambda: module.held.__setitem__(0, 3.0)


@case
def item_of_an_array_of_objects():
    module = module_of(lambda self: self.held[0], np.array([2.0, "a"], dtype=object))
    return module, lambda: module.held.__setitem__(0, 3.0)


@case
def slot():
    module = module_of(lambda self: self.held.scale, Slots())
    return module, lambda: setattr(module.held, "scale", 3.0)


@case
def slot_beside_a_dict():
    held = SlotBesideDict()
    held.scale = 2.0
    return module_of(lambda self: self.held.scale, held), lambda: setattr(held, "scale", 3.0)


@case
def field_that_is_not_compared():
    module = module_of(lambda self: self.held.scale, NotCompared())
    return module, lambda: setattr(module, "held", NotCompared(3.0))


@case
def object_behind_a_weak_reference():
    held = Bag(scale=2.0)
    module = module_of(lambda self: self.held().scale, weakref.ref(held))
    module.keep = [held]
    return module, lambda: setattr(held, "scale", 3.0)


@case
def other_object_behind_a_weak_reference():
    keep = [Bag(scale=2.0), Bag(scale=3.0)]
    module = module_of(lambda self: self.held().scale, weakref.ref(keep[0]))
    return module, lambda: setattr(module, "held", weakref.ref(keep[1]))


@case
def value_of_an_enum_member():
    def mode(value):
        return enum.Enum("Mode", {"S": value}).S

    module = module_of(lambda self: self.held.value, mode(2.0))
    return module, lambda: setattr(module, "held", mode(3.0))


@case
def tensor_in_a_set():
    tensor = torch.tensor(2.0)
    return module_of(lambda self: sum(self.held), {tensor}), lambda: tensor.fill_(3.0)


@case
def tensors_that_change_places():
    tensors = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    module = module_of(lambda self: self.held["a"], tensors)

    def change():
        first, second = tensors["a"], tensors["b"]
        tensors.clear()
        tensors.update(b=first, a=second)

    return module, change


@case
def tensor_replaced_by_an_equal_one_and_then_changed():
    module = module_of(lambda self: self.held["a"], {"a": torch.tensor(2.0)})

    def change():
        module.held["a"] = torch.tensor(2.0)
        module(torch.randn(3, 2))
        module.held["a"].fill_(3.0)

    return module, change


@case
def data_of_a_buffer_set_twice():
    module = module_of(lambda self: self.scale)
    module.register_buffer("scale", torch.full((3000,), 2.0)[:2].clone())

    def change():
        for value in (5.0, 3.0, 3.0):  # freed memory is used again: the second may be where the first was
            module.scale.data = torch.full((2,), value)

    return module, change


@case
def data_of_a_buffer_transposed():
    module = module_of(lambda self: self.scale[0, 1])
    module.register_buffer("scale", torch.tensor([[0.0, 2.0], [3.0, 0.0]]))

    def change():
        module.scale.data = module.scale.data.t()

    return module, change


@case
def closure_cell():
    scale = 2.0

    def change():
        nonlocal scale
        scale = 3.0

    return module_of(lambda self: scale), change


@case
def global_value(monkeypatch):
    return module_of(lambda self: FACTOR), lambda: monkeypatch.setitem(globals(), "FACTOR", 3.0)


@case
def item_of_a_global(monkeypatch):
    return module_of(lambda self: SETTINGS["scale"]), lambda: monkeypatch.setitem(SETTINGS, "scale", 3.0)


# One object for all: Dynamo goes on to read the module that it first met under a name.
OTHER_MODULE = types.ModuleType("other_module")


@case
def global_function_of_another_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "other_module", OTHER_MODULE)
    exec("scale = 2.0\ndef get(): return scale", sys.modules["other_module"].__dict__)

    def get(self):
        import other_module

        return other_module.get()

    return module_of(get), lambda: setattr(sys.modules["other_module"], "scale", 3.0)


@case
def name_imported_by_the_code(monkeypatch):
    monkeypatch.setitem(sys.modules, "other_module", OTHER_MODULE)
    exec("def get(): return 2.0", sys.modules["other_module"].__dict__)

    def get(self):
        from other_module import get as imported

        return imported()

    return module_of(get), lambda: exec("def get(): return 3.0", sys.modules["other_module"].__dict__)


@case
def module_held_as_an_attribute(monkeypatch):
    settings = types.ModuleType("settings_module")
    settings.scale = 2.0
    monkeypatch.setitem(sys.modules, "settings_module", settings)
    return module_of(lambda self: self.held.scale, settings), lambda: setattr(settings, "scale", 3.0)


def _function(k=2.0):
    return k


def _other_function(k=3.0):
    return k


def _fresh(function):
    return types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


@case
def default_of_a_function():
    function = _fresh(_function)
    return module_of(lambda self: self.held[0](), [function]), lambda: setattr(function, "__defaults__", (3.0,))


@case
def keyword_default_of_a_function():
    def function(*, k=2.0):
        return k

    return module_of(lambda self: function()), lambda: function.__kwdefaults__.update(k=3.0)


@case
def code_of_a_function():
    def function():
        return 2.0

    def other():
        return 3.0

    return module_of(lambda self: function()), lambda: setattr(function, "__code__", other.__code__)


@case
def attribute_of_a_function():
    function = _fresh(_function)
    function.scale = 2.0
    return module_of(lambda self: self.held[0].scale, [function]), lambda: setattr(function, "scale", 3.0)


@case
def keyword_of_a_partial():
    held = functools.partial(_function, k=2.0)
    return module_of(lambda self: self.held(), held), lambda: held.keywords.update(k=3.0)


@case
def function_behind_a_lru_cache():
    module = module_of(lambda self: self.held(), functools.lru_cache(_function))
    return module, lambda: setattr(module, "held", functools.lru_cache(_other_function))


@case
def whole_dict_of_an_object():
    held = Bag(scale=2.0)
    return module_of(lambda self: self.held.scale, held), lambda: setattr(held, "__dict__", {"scale": 3.0})


@case
def object_that_a_lru_cache_keeps():
    settings = functools.lru_cache(lambda: types.SimpleNamespace(scale=2.0))
    return module_of(lambda self: self.held().scale, settings), lambda: setattr(settings(), "scale", 3.0)


@case
def dict_that_a_cache_keeps():
    settings = functools.cache(lambda: {"scale": 2.0})
    return module_of(lambda self: self.held()["scale"], settings), lambda: settings().update(scale=3.0)


@case
def cache_that_is_cleared():
    box = [2.0]
    settings = functools.cache(lambda: types.SimpleNamespace(scale=box[0]))
    module = module_of(lambda self: self.held().scale, settings)

    def change():
        box[0] = 3.0
        settings.cache_clear()

    return module, change


@case
def hook():
    module = nn.Sequential(module_of(lambda self: 2.0))
    return module, lambda: module[0].register_forward_hook(lambda module, args, output: output * 1.5)


@case
def hook_that_takes_keywords():
    module = nn.Sequential(module_of(lambda self: 2.0))

    def hook(module, args, *others):
        return None if len(others) == 1 else others[-1] * 1.5

    handle = module[0].register_forward_hook(hook)

    def change():
        handle.remove()
        module[0].register_forward_hook(hook, with_kwargs=True)

    return module, change


@case
def hook_of_all_modules(request):
    module = nn.Sequential(module_of(lambda self: 2.0))

    def change():
        def hook(found, args, output):
            return output * 1.5 if found is module[0] else None

        handle = nn.modules.module.register_module_forward_hook(hook)
        request.addfinalizer(handle.remove)

    return module, change


@case
def several_at_once_that_swap():
    module = module_of(lambda self: self.a * 2 - self.b)
    module.a, module.b = 2.0, 2.0

    def change():
        module.a, module.b = 2.5, 2.0

    return module, change


@case
def instance_forward_of_a_marked_child():
    child = module_of(lambda self: 1.0)
    child.forward = functools.partial(torch.mul, other=2.0) if False else (lambda x: x * 2.0)
    torchcache.mark(child)
    root = nn.Sequential(child)

    def change():
        torchcache.unmark(child)
        child.forward = lambda x: x * 3.0
        torchcache.mark(child)

    return root, change


@case
def event():
    module = module_of(lambda self: 3.0 if self.held.is_set() else 2.0, threading.Event())
    return module, module.held.set


@case
def future():
    def done(value):
        future = concurrent.futures.Future()
        future.set_result(value)
        return future

    module = module_of(lambda self: self.held.result(), done(2.0))
    return module, lambda: setattr(module, "held", done(3.0))


def settings_module(monkeypatch):
    settings = types.ModuleType("settings_of_a_test")
    settings.scale = 2.0
    monkeypatch.setitem(sys.modules, "settings_of_a_test", settings)
    return settings


@case
def import_module_by_function(monkeypatch):
    settings = settings_module(monkeypatch)
    module = module_of(lambda self: importlib.import_module("settings_of_a_test").scale)
    return module, lambda: setattr(settings, "scale", 3.0)


@case
def import_by_dunder(monkeypatch):
    settings = settings_module(monkeypatch)
    module = module_of(lambda self: __import__("settings_of_a_test").scale)
    return module, lambda: setattr(settings, "scale", 3.0)


@case
def module_by_sys_modules(monkeypatch):
    settings = settings_module(monkeypatch)
    module = module_of(lambda self: sys.modules["settings_of_a_test"].scale)
    return module, lambda: setattr(settings, "scale", 3.0)


@case
def module_by_sys_modules_get(monkeypatch):
    settings = settings_module(monkeypatch)
    module = module_of(lambda self: sys.modules.get("settings_of_a_test").scale)
    return module, lambda: setattr(settings, "scale", 3.0)


class Deep(nn.Module):
    """Its attributes are found in ways that no name in the code tells."""

    def __init__(self, get):
        super().__init__()
        self.get, self.paths, self.parts = get, ["bag.scale"], [Text()]
        self.bag, self.child = Bag(scale=2.0), nn.Module()
        self.child.register_buffer("table", torch.tensor(2.0))

    def forward(self, x):
        return x * self.get(self)


class Text:
    scale = 2.0

    def __str__(self):
        return f"{self.scale}"


@case
def attribute_by_getattr_that_is_passed_on():
    module = Deep(lambda self: functools.reduce(getattr, self.paths[0].split("."), self))
    return module, lambda: setattr(module.bag, "scale", 3.0)


@case
def attribute_by_a_partial_of_getattr():
    module = Deep(lambda self: sum(map(functools.partial(getattr, self.bag), ["sca" + "le"])))
    return module, lambda: setattr(module.bag, "scale", 3.0)


@case
def buffer_by_getattr_as_a_method():
    module = Deep(lambda self: self.child.__getattr__("tab" + "le"))
    return module, lambda: module.child.table.fill_(3.0)


@case
def attribute_by_str_that_is_passed_on():
    module = Deep(lambda self: float(next(map(str, self.parts))))
    return module, lambda: setattr(module.parts[0], "scale", 3.0)


VARIABLE = "TORCHCACHE_SCALE_OF_A_TEST"


def _with_variable(monkeypatch, get, name=VARIABLE):
    monkeypatch.setenv(name, "2")
    module = module_of(get)
    module.variable, module.variables, module.part = name, [name], "SCALE_OF_A_TEST"
    return module, lambda: monkeypatch.setenv(name, "3")


@case
def environment_by_a_global(monkeypatch):
    return _with_variable(monkeypatch, lambda self: float(os.environ.get(VARIABLE, "1")))


@case
def environment_by_an_attribute(monkeypatch):
    return _with_variable(monkeypatch, lambda self: float(os.getenv(self.variable, "1")))


@case
def environment_by_an_item_of_a_list(monkeypatch):
    return _with_variable(monkeypatch, lambda self: float(os.environ[self.variables[0]]))


@case
def environment_by_a_text_put_together(monkeypatch):
    return _with_variable(monkeypatch, lambda self: float(os.environ[f"TORCHCACHE_{self.part}"]))


@case
def environment_in_lower_case(monkeypatch):
    name = "scale_of_a_test"
    return _with_variable(monkeypatch, lambda self: float(os.environ.get("scale_of_a_test", "1")), name)  # noqa: SIM112


@case
def elements_of_a_large_numpy_table():
    module = module_of(lambda self: float(self.held[7, 5]), np.full((4096, 16), 2.0))
    return module, lambda: module.held[:, 1:].fill(3.0)


@case
def elements_of_a_large_table_by_columns():
    module = module_of(lambda self: float(self.held[7, 5]), np.asfortranarray(np.full((4096, 16), 2.0)))
    return module, lambda: module.held[:, 1:].fill(3.0)


KERNEL = {"scale": 2.0}


def _operator(request, kernel):
    """A library with an operator of its own, and the operator."""
    library = torch.library.Library(f"torchcache_{os.urandom(8).hex()}", "FRAGMENT")
    request.addfinalizer(library._destroy)
    library.define("scaled(Tensor x) -> Tensor")
    library.impl("scaled", kernel, "CPU")
    torch.library.register_fake(f"{library.ns}::scaled", torch.empty_like, lib=library)
    return library, getattr(torch.ops, library.ns).scaled.default


@case
def what_a_registered_kernel_reads(request, monkeypatch):
    monkeypatch.setitem(KERNEL, "scale", 2.0)
    _, operator = _operator(request, lambda x: x * KERNEL["scale"])
    return module_of(lambda self: self.held(torch.ones(())), operator), lambda: KERNEL.__setitem__("scale", 3.0)


@case
def kernel_that_is_registered_anew(request):
    library, operator = _operator(request, lambda x: x * 2.0)
    module = module_of(lambda self: self.held(torch.ones(())), operator)

    def register():
        try:
            library.impl("scaled", lambda x: x * 3.0, "CPU")
        except RuntimeError as error:
            pytest.skip(f"this torch has one kernel and no other: {error}")

    return module, register


@case
def operator_by_a_name_that_is_not_known(monkeypatch):
    monkeypatch.setitem(KERNEL, "scale", 2.0)

    @torch.library.custom_op("torchcache_by_name::scaled", mutates_args=())
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * KERNEL["scale"]

    scaled.register_fake(torch.empty_like)
    module = module_of(lambda self: getattr(torch.ops.torchcache_by_name, self.held)(torch.ones(())), "scaled")
    return module, lambda: KERNEL.__setitem__("scale", 3.0)


@case
def operator_of_a_namespace_that_is_held(request, monkeypatch):
    monkeypatch.setitem(KERNEL, "scale", 2.0)
    library, _ = _operator(request, lambda x: x * KERNEL["scale"])
    module = module_of(lambda self: self.held.scaled(torch.ones(())), getattr(torch.ops, library.ns))
    return module, lambda: KERNEL.__setitem__("scale", 3.0)


@case
def patch_of_torch_by_a_name_that_is_not_known(monkeypatch):
    original = torch.fft.fft
    module = module_of(lambda self: 2.0 * getattr(torch.fft, self.held)(torch.ones(1)).real, "fft")
    return module, lambda: monkeypatch.setattr(torch.fft, "fft", lambda x: original(x) + 0.5)


@case
def seed_of_the_run(request):
    request.addfinalizer(functools.partial(torch.manual_seed, torch.initial_seed()))
    torch.manual_seed(2)
    return module_of(lambda self: float(torch.initial_seed())), lambda: torch.manual_seed(3)


ROLE = contextvars.ContextVar("role", default=2.0)


@case
def default_of_a_context_variable(monkeypatch):
    return module_of(lambda self: ROLE.get()), lambda: monkeypatch.setitem(
        globals(), "ROLE", contextvars.ContextVar("role", default=3.0)
    )


@case
def item_of_a_default_of_a_context_variable():
    module = module_of(lambda self: self.held.get()[0], contextvars.ContextVar("roles", default=[2.0]))  # noqa: B039
    return module, lambda: module.held.get().__setitem__(0, 3.0)


@case
def flag_of_a_backend(request):
    put = torch.backends.cudnn.set_flags  # torch's own tests forbid to assign flags
    request.addfinalizer(functools.partial(put, _benchmark=torch.backends.cudnn.benchmark))
    put(_benchmark=False)
    module = module_of(lambda self: 3.0 if torch.backends.cudnn.benchmark else 2.0)
    return module, lambda: put(_benchmark=True)


@case
def flag_of_a_backend_by_a_variable(request):
    def get(self):
        backend = torch.backends.mkldnn
        return 2.0 if backend.enabled else 3.0

    request.addfinalizer(functools.partial(torch.backends.mkldnn.set_flags, torch.backends.mkldnn.enabled))
    torch.backends.mkldnn.set_flags(True)
    return module_of(get), lambda: torch.backends.mkldnn.set_flags(False)


@case
def switch_that_a_function_tells(request):
    request.addfinalizer(functools.partial(torch.autograd.set_detect_anomaly, torch.is_anomaly_enabled()))
    torch.autograd.set_detect_anomaly(False)
    return module_of(lambda self: 2.0 + torch.is_anomaly_enabled()), lambda: torch.autograd.set_detect_anomaly(True)


@case
def switch_that_a_function_of_a_held_module_tells(request):
    request.addfinalizer(functools.partial(torch.autograd.set_detect_anomaly, torch.is_anomaly_enabled()))
    torch.autograd.set_detect_anomaly(False)
    model = module_of(lambda self: 2.0 + self.held.is_anomaly_enabled(), torch)
    return model, lambda: torch.autograd.set_detect_anomaly(True)


def make_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def leave_process_group():
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@case
def process_group_that_is_made_later(request):
    leave_process_group()
    request.addfinalizer(leave_process_group)
    return module_of(lambda self: 2.0 + torch.distributed.is_initialized()), make_process_group


@case
def size_of_a_process_group_that_is_made_later(request):
    def get(self):
        return 2.0 + self.held.get_world_size() if self.held.is_initialized() else 2.0

    leave_process_group()
    request.addfinalizer(leave_process_group)
    return module_of(get, torch.distributed), make_process_group


class Plugin:
    scale = 1.0


class Double(Plugin):
    scale = 2.0


@case
def attribute_of_a_subclass(monkeypatch):
    module = module_of(lambda self: next(plugin.scale for plugin in Plugin.__subclasses__()))
    return module, lambda: monkeypatch.setattr(Double, "scale", 3.0)


@case
def subclass_that_is_made_later():
    base, made = type("Base", (), {"scale": 2.0}), []
    module = module_of(lambda self: self.held.scale + len(type(self.held).__subclasses__()), base())
    return module, lambda: made.append(type("Child", (base,), {}))


def build(name, request, monkeypatch):
    given = {"request": request, "monkeypatch": monkeypatch}
    function = CASES[name]
    return function(**{key: given[key] for key in function.__code__.co_varnames[: function.__code__.co_argcount]})


class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        features = self.backbone(x)
        return features, self.head(features)


def features_of(backbone, door):
    if door == "eager":
        return torchcache.mark(backbone, freeze=True)
    model = Model(torchcache.mark(backbone, freeze=True))
    if door == "transform":
        torchcache.transform(model)
        return lambda x: model(x)[0]
    compiled = torch.compile(model, backend=torchcache.torchcache_backend, options={"inner": "eager"})
    return lambda x: compiled(x)[0]


@pytest.mark.parametrize("door", ["eager", "transform"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_a_change_is_a_miss(name, door, request, monkeypatch):
    module, change = build(name, request, monkeypatch)
    x = torch.randn(3, 2).clamp(-1, 1)
    features = features_of(module, door)
    for _ in range(2):
        torch.testing.assert_close(features(x), x * 2)
    change()
    for _ in range(2):
        torch.testing.assert_close(features(x), x * 3)


@pytest.mark.parametrize("name", sorted(CASES))
def test_compiled_it_is_a_miss_wherever_torch_compile_sees_it(name, request, monkeypatch):
    x = torch.randn(3, 2).clamp(-1, 1)
    with monkeypatch.context() as patches:
        module, change = build(name, request, patches)
        uncached = torch.compile(Model(torchcache.unmark(module)), backend="eager")
        try:
            uncached(x)
            change()
            expected = uncached(x)[0]
        except torch._dynamo.exc.InternalTorchDynamoError:  # torch 2.14 traces no text of an object of one's own
            expected = x * 3
    torch._dynamo.reset()
    module, change = build(name, request, monkeypatch)
    features = features_of(module, "compile")
    for _ in range(2):
        torch.testing.assert_close(features(x), x * 2)
    change()
    for _ in range(2):
        found = features(x)
        torch.testing.assert_close(found, expected if torch.allclose(found, expected) else x * 3)


@pytest.mark.filterwarnings("ignore")  # torch names newer ways to do the same
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_what_hooks_of_torch_read_is_a_part_though_forward_is_pure(wrap):
    module = torchcache.mark(wrap(nn.Linear(4, 4)), freeze=True, pure=True, audit=0)
    x = torch.randn(5, 4)
    for _ in range(3):
        before = module(x).clone()
    assert torchcache.stats(module).hits
    with torch.no_grad():
        getattr(module, "weight_g", module.bias).mul_(-3)
    with torchcache.bypass():
        expected = module(x)
    assert not torch.equal(before, expected)
    torch.testing.assert_close(module(x), expected)


def test_tensors_of_a_cached_module_can_be_swapped():
    module = torchcache.mark(nn.Linear(4, 4), freeze=True)
    x = torch.randn(5, 4)
    for factor in (1, 2, 3):
        weight = nn.Parameter(factor * torch.eye(4), requires_grad=False)
        torch.utils.swap_tensors(module.weight, weight)
        for _ in range(2):
            torch.testing.assert_close(module(x), factor * x + module.bias)


@torch.no_grad()
def _tripled(*arguments, **settings):
    return 3 * arguments[-1]


class Tripling:
    def __call__(self, x, approximate="none"):
        return 3 * x


class Tempered(nn.Module):
    def forward(self, x):
        return x * self.temper * x.temper


PATCHES = {
    "a partial function": (nn.GELU, nn.functional, "gelu", functools.partial(lambda x, approximate, k: x * k, k=3)),
    "a callable object": (nn.GELU, nn.functional, "gelu", Tripling()),
    "a function that torch decorated": (nn.GELU, nn.functional, "gelu", _tripled),
    "another function of torch": (nn.LogSigmoid, nn.functional, "logsigmoid", torch.tanh),
    "a method of another module of torch": (nn.GELU, nn.GELU, "forward", nn.Tanh.forward),
    "a method that torch decorated": (nn.GELU, nn.GELU, "forward", _tripled),
    "a partial method": (nn.GELU, nn.GELU, "forward", functools.partialmethod(lambda self, x, k: x * k, k=3)),
    "a number of all modules": (Tempered, nn.Module, "temper", 3.0),
    "a number of all tensors": (Tempered, torch.Tensor, "temper", 3.0),
}


@pytest.mark.parametrize("name", PATCHES)
def test_what_is_put_into_torch_is_a_miss(name, monkeypatch):
    kind, owner, attribute, value = PATCHES[name]
    for everything in (nn.Module, torch.Tensor):
        monkeypatch.setattr(everything, "temper", 2.0, raising=False)
    twin, module, x = kind(), torchcache.mark(kind(), audit=0), torch.randn(3, 2)
    for _ in range(3):
        torch.testing.assert_close(module(x), twin(x))
    assert torchcache.stats(module).hits
    before = twin(x)
    monkeypatch.setattr(owner, attribute, value)
    assert not torch.allclose(twin(x), before)
    for _ in range(2):
        torch.testing.assert_close(module(x), twin(x))
    monkeypatch.undo()


def test_the_memory_format_of_a_weight_of_one_channel_is_seen():
    module = frozen(lambda self, x: self.parts[0](x), nn.Conv2d(4, 4, 3, groups=4))
    x, twin = torch.randn(5, 4, 6, 6), unmarked(module)
    for order in (torch.contiguous_format, torch.channels_last) * 2:
        for net in (module, twin):
            net.to(memory_format=order)
        for _ in range(2):
            assert module(x).stride() == twin(x).stride()
    assert counts(module)[1] >= 10


def test_the_order_of_a_weight_in_memory_is_seen():
    """Code may ask for it, and kernels round otherwise."""
    module = frozen(lambda self, x: self.parts[0](x) * (1 + self.parts[0].weight.is_contiguous()), nn.Linear(3, 3))
    twin, x = unmarked(module), torch.randn(4, 3)
    for each in (module, twin):
        each(x)
        weight = each.parts[0].weight
        weight.data = weight.data.t().contiguous().t()
    torch.testing.assert_close(module(x), twin(x))


class Factor:
    """What computes by itself, for classes of arguments."""

    shift = torch.zeros(2)

    def factor(self):
        return 2.0

    def unread(self):
        return 2.0


class Kind(Factor, enum.Enum):
    A = 1


@dataclasses.dataclass
class Settings(Factor):
    k: int = 1


class Pair(Factor, collections.namedtuple("Pair", "left right")):
    pass


GIVEN = {"a member of an enum": Kind.A, "a dataclass": Settings(), "a named tuple": Pair(1, 2), "a key": {Kind.A: 1}}
PATCHES_OF_FACTORS = {
    "factor": lambda self: 3.0,
    "shift": torch.ones(2),
    "__getattribute__": lambda self, name: (lambda: 3.0) if name == "factor" else object.__getattribute__(self, name),
}


@pytest.mark.parametrize("patch", PATCHES_OF_FACTORS)
@pytest.mark.parametrize("name", GIVEN)
def test_what_the_class_of_an_argument_computes_is_a_part(name, patch, monkeypatch):
    def forward(self, x, given):
        given = next(iter(given)) if isinstance(given, dict) else given
        return x * given.factor() + given.shift

    module, given, x = frozen(forward), GIVEN[name], torch.randn(3, 2)
    for _ in range(3):
        module(x, given)
    hits = torchcache.stats(module).hits
    assert hits == 6
    monkeypatch.setattr(Factor, "unread", lambda self: 3.0)
    module(x, given)
    assert torchcache.stats(module).hits == hits + 3
    before = forward(module, x, given)
    monkeypatch.setattr(Factor, patch, PATCHES_OF_FACTORS[patch], raising=False)
    assert not torch.allclose(forward(module, x, given), before)
    for _ in range(2):
        torch.testing.assert_close(module(x, given), forward(module, x, given))
    monkeypatch.undo()
    torch.testing.assert_close(module(x, given), before)
    Factor.shift.add_(1)
    torch.testing.assert_close(module(x, given), before + 1)
    Factor.shift.sub_(1)


def test_fields_of_named_tuples_of_one_name_are_told_apart():
    module, x = frozen(lambda self, x, pair: x * pair.left), torch.randn(3, 2)
    for fields in ("left right", "right left"):
        pair = collections.namedtuple("Pair", fields)(2, 3)
        torch.testing.assert_close(module(x, pair), x * pair.left)


GRADIENTS = {
    "written": lambda weight: weight.grad.mul_(3),
    "replaced": lambda weight: setattr(weight, "grad", torch.full_like(weight, 7)),
    "freed": lambda weight: setattr(weight, "grad", None),
}


@pytest.mark.parametrize("change", GRADIENTS)
def test_a_gradient_that_is_read_is_a_part(change):
    def forward(self, x):
        gradient = self.parts[0].weight.grad
        return self.parts[0](x) + (0 if gradient is None else gradient.sum())

    module = frozen(forward, nn.Linear(4, 4))
    weight, x = module.parts[0].weight, torch.randn(6, 4)
    for begin in (lambda _: None, lambda weight: setattr(weight, "grad", torch.ones(4, 4)), GRADIENTS[change]):
        begin(weight)
        for _ in range(2):
            torch.testing.assert_close(module(x), forward(module, x))
    assert torchcache.stats(module).hits >= 18


def test_a_change_is_seen_beside_one_that_matters_to_nobody():
    module = torchcache.mark(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), freeze=True, audit=0)
    twin, x = unmarked(module), torch.randn(4, 6)
    for number in range(3):
        for _ in range(3):
            torch.testing.assert_close(module(x), twin(x))
        for net in (module, twin):
            [*net.parameters()][number].note = 1  # as Dynamo does
            net[2].forward = lambda x, number=number: x[:, :3] + number


NOTED = {}


def test_what_changes_to_and_fro_is_seen_each_time():
    module = frozen(lambda self, x: self.parts[0](x) * NOTED.get("by", 1.0), nn.Linear(6, 3))
    twin, x = unmarked(module), torch.randn(4, 6)
    try:
        for by in (None, 3.0, None, 3.0, 5.0, 3.0, None, 5.0):
            NOTED.clear()
            NOTED.update({} if by is None else {"by": by})
            for _ in range(3):
                torch.testing.assert_close(module(x), twin(x))
    finally:
        NOTED.clear()
    assert counts(module)[0] <= 4 * 4  # three programs, and a first call that may set one up


def test_a_hook_that_comes_late_and_notes_what_it_sees_is_called_each_time():
    module = torchcache.mark(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), freeze=True, audit=0)
    twin, data = unmarked(module), [torch.randn(5, 6) for _ in range(2)]
    module(data[0])
    module[1].register_forward_hook(lambda module, args, output: NOTED.update(seen=output))
    try:
        for x in data * 3:
            NOTED.clear()
            module(x)
            torch.testing.assert_close(NOTED["seen"], twin[1](twin[0](x)))
    finally:
        NOTED.clear()


class Settings:
    """Shows all that it holds, as configurations of one's own do."""

    def __init__(self):
        self.rate, self.scale = 0.1, 2.0

    def __repr__(self):
        return f"Settings({self.__dict__})"


class Asserts(nn.Module):
    def __init__(self):
        super().__init__()
        self.settings = Settings()

    def forward(self, x):
        length = x.shape[1]
        if length % 2:
            raise ValueError(f"{length} is odd")
        if length > 7:
            raise ValueError("%s is more than 7" % repr(length))  # noqa: UP031
        return x * self.settings.scale


def test_what_an_object_shows_of_itself_in_messages_is_no_part():
    module, x = torchcache.mark(Asserts(), audit=0), torch.randn(3, 4)
    for _ in range(6):
        torch.testing.assert_close(module(x), 2 * x)
        module.settings.rate *= 0.9
    assert torchcache.stats(module).hits >= 12
    module.settings.scale = 3.0
    torch.testing.assert_close(module(x), 3 * x)


class Adapted(nn.Module):
    """A body with several heads, of which an attribute says which is used."""

    def __init__(self, heads=2):
        super().__init__()
        self.body, self.heads = nn.Linear(6, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(heads))
        self.task = 0

    def forward(self, x):
        return self.heads[self.task](self.body(x))


@contextlib.contextmanager
def _other_task(module):
    module.task = 1
    yield
    module.task = 0


@contextlib.contextmanager
def _steered(module):
    hook = module.body.register_forward_hook(lambda module, args, out: out + 1)
    yield
    hook.remove()


@contextlib.contextmanager
def _averaged(module):
    kept = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.data.mul_(0.5)
    yield
    for name, parameter in module.named_parameters():
        parameter.data.copy_(kept[name])


@contextlib.contextmanager
def _doubled(module):
    module.double()
    yield
    module.float()


@pytest.mark.parametrize("other", [_other_task, _steered, _averaged, _doubled])
def test_what_is_switched_to_and_fro_in_each_step_finds_its_rows(other):
    module = torchcache.mark(Adapted(), freeze=True, audit=0)
    twin, data = unmarked(module), torch.randn(240, 6)
    for epoch in range(3):
        before = torchcache.stats(module).hits
        for rows in data[torch.randperm(240)].split(8):
            torch.testing.assert_close(module(rows), twin(rows))
            with other(module), other(twin):
                rows = rows.to(module.body.weight.dtype)
                torch.testing.assert_close(module(rows), twin(rows))
        assert torchcache.stats(module).hits - before == (480 if epoch else 0)


@pytest.mark.parametrize("by", ["setting", "batch"])
def test_each_of_several_settings_finds_its_rows_though_none_did_in_the_first_epoch(by):
    module = torchcache.mark(Adapted(8), freeze=True, audit=0)
    twin, data = unmarked(module), torch.randn(32, 6)
    for epoch in range(3):
        before, batches = torchcache.stats(module).hits, data[torch.randperm(32)].split(8)
        calls = [(task, rows) for task in range(8) for rows in batches]
        if by == "batch":
            calls = [(task, rows) for rows in batches for task in range(8)]
        for task, rows in calls:
            module.task = twin.task = task
            torch.testing.assert_close(module(rows), twin(rows))
        assert torchcache.stats(module).hits - before == (256 if epoch else 0)


class SlottedModule(nn.Module):
    __slots__ = ("scale",)

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 6), 1.0

    def forward(self, x):
        return self.linear(x) * self.scale


@pytest.mark.parametrize("within", [False, True])
def test_a_module_with_slots_is_computed(within, warnings):
    inner = SlottedModule()
    module, x = torchcache.mark(nn.Sequential(inner) if within else inner, freeze=True), torch.randn(64, 6)
    for inner.scale in (1.0, 1.0, 1.0, 1.0, 2.0):
        torch.testing.assert_close(module(x), inner.linear(x) * inner.scale)
    assert torchcache.stats(module).hits == 0
    assert any("keeps scale in __slots__" in text for text in warnings)
