"""Whatever way code takes to a value, a change of that value is seen and gives another digest."""

import ast
import collections
import contextlib
import dataclasses
import enum
import functools
import types

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils import parametrize

from torchcache.identity.program import Program

CONFIG = {"k": 1}
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


class Base(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name, value in attributes.items():
            setattr(self, name, value)


def net(forward, **attributes):
    return type("Net", (Base,), {"forward": forward, "__module__": __name__})(**attributes)


def scaled(k=1):
    return net(lambda self, x: x * self.k, k=k)


def helper(x):
    return x * CONFIG["k"]


def configure():
    CONFIG["k"] += 1


@case
def attribute_of_a_parametrization():
    class Times(nn.Module):
        k = 1.0

        def forward(self, weight):
            return weight * self.k

    module = net(lambda self, x: self.layer(x))
    parametrize.register_parametrization(module.layer, "weight", Times())
    return module, lambda: setattr(module.layer.parametrizations.weight[0], "k", 2.0)


@case
def attribute_of_an_autograd_function():
    class Function(torch.autograd.Function):
        k = 1.0

        @staticmethod
        def forward(ctx, x):
            return x * Function.k

    return net(lambda self, x: Function.apply(x)), lambda: setattr(Function, "k", 2.0)


@case
def attribute_read_by_a_callback_of_unread_code():
    class Visitor(ast.NodeVisitor):
        scale = 1

        def visit_Name(self, node):
            return self.scale

        def generic_visit(self, node):
            return self.scale

    visitor = Visitor()
    return net(lambda self, x: visitor.visit(x)), lambda: setattr(visitor, "scale", 2)


@case
def global_behind_a_mapped_function():
    return net(lambda self, x: list(map(helper, x))), configure


@case
def global_behind_a_partial():
    return net(lambda self, x: functools.reduce(self.f, x), f=functools.partial(helper)), configure


@case
def attribute_behind_a_bound_method_as_key():
    class Net(Base):
        def key(self, x):
            return x * self.k

        def forward(self, x):
            return sorted(x, key=self.key)

    module = Net(k=1)
    return module, lambda: setattr(module, "k", 2)


@case
def attribute_of_a_checkpointed_block():
    module = net(lambda self, x: torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False), block=scaled())
    return module, lambda: setattr(module.block, "k", 2)


@case
def attribute_read_by_an_override_of_a_method_of_torch():
    class Layer(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return super()._ff_block(x) * self.k

    layer = Layer(4, 2)
    layer.k = 1
    module = net(lambda self, x: self.encoder(x), encoder=nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    return module, lambda: setattr(module.encoder.layers[0], "k", 2)


@case
def activation_given_to_a_module_of_torch():
    layer = nn.TransformerEncoderLayer(4, 2, activation=lambda x: x * CONFIG["k"])
    return net(lambda self, x: self.encoder(x), encoder=layer), configure


@case
def attribute_behind_a_property():
    class Net(Base):
        scale = property(lambda self: self.hidden)

        def forward(self, x):
            return x * self.scale

    module = Net(hidden=1)
    return module, lambda: setattr(module, "hidden", 2)


@case
def attribute_behind_a_delegate():
    class Delegate:
        def __init__(self, inner):
            self.__dict__["inner"] = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

    delegate = Delegate(types.SimpleNamespace(scale=1))
    return net(lambda self, x: x * self.d.scale, d=delegate), lambda: setattr(delegate.inner, "scale", 2)


@dataclasses.dataclass
class Point:
    a: int
    b: int


@case
def attribute_in_a_class_pattern():
    def forward(self, x):
        match self.point:
            case Point(a=1):
                return x
        return x * 3

    point = Point(1, 2)
    return net(forward, point=point), lambda: setattr(point, "a", 5)


@case
def attribute_at_a_place_in_a_class_pattern():
    def forward(self, x):
        match self.point:
            case Point(_, 2):
                return x
        return x * 3

    point = Point(1, 2)
    return net(forward, point=point), lambda: setattr(point, "b", 5)


@case
def variable_of_an_outer_function():
    def outer(k):
        def forward(self, x):
            def inner(y):
                return y * k["v"]

            return [inner(item) for item in x]

        return forward

    k = {"v": 1}
    return net(outer(k)), lambda: k.update(v=2)


@case
def class_attribute_behind_super():
    class Mixin:
        z = 1

        def forward(self, x):
            return x * self.z

    class Net(Mixin, Base):
        def forward(self, x):
            return super().forward(x)

    return Net(), lambda: setattr(Mixin, "z", 2)


@case
def attribute_behind_a_property_of_a_metaclass():
    class Meta(type):
        scale = property(lambda cls: cls.hidden)

    class Settings(metaclass=Meta):
        hidden = 1

    return net(lambda self, x: x * Settings.scale), lambda: setattr(Settings, "hidden", 2)


@case
def item_behind_a_class_method():
    class Settings:
        table = {"a": 1}  # noqa: RUF012

        @classmethod
        def get(cls):
            return cls.table["a"]

    return net(lambda self, x: x * Settings.get()), lambda: Settings.table.update(a=2)


@case
def attribute_of_the_type():
    module = net(lambda self, x: x * type(self).scale)
    type(module).scale = 1
    return module, lambda: setattr(type(module), "scale", 2)


@case
def value_in_globals():
    scope = {"__name__": "test_own_module", "SCALE": 1}
    exec("def forward(self, x): return x * globals()['SCALE']", scope)
    return net(scope["forward"]), lambda: scope.update(SCALE=2)


@case
def flags():
    flag = enum.IntFlag("Mode", "A B")
    module = net(lambda self, x: x * self.mode, mode=flag.A | flag.B)
    return module, lambda: setattr(module, "mode", flag.A)


@case
def order_of_an_ordered_dict():
    held = collections.OrderedDict(a=1, b=2)
    return net(lambda self, x: next(iter(self.held)), held=held), lambda: held.move_to_end("a")


@case
def attribute_of_a_child_under_a_constant_name():
    module = net(lambda self, x: [getattr(layer, "k") for layer in self.layers], layers=nn.ModuleList([scaled()]))  # noqa: B009
    return module, lambda: setattr(module.layers[0], "k", 2)


@case
def child_of_a_module_dict():
    module = net(lambda self, x: self.layers["a"](x), layers=nn.ModuleDict({"a": scaled()}))
    return module, lambda: setattr(module.layers["a"], "k", 2)


@case
def global_behind_a_hook():
    module = net(lambda self, x: self.layer(x))
    module.layer.register_forward_pre_hook(lambda owner, args: (args[0] * CONFIG["k"],))
    return module, configure


@case
def item_of_a_mutable_default():
    def forward(self, x, cache={"k": 1}):  # noqa: B006
        return x * cache["k"]

    return net(forward), lambda: forward.__defaults__[0].update(k=2)


@case
def variant_of_a_generic_function():
    generic = functools.singledispatch(lambda x: 1)
    return net(lambda self, x: generic(x)), lambda: generic.register(int, lambda x: 2)


@case
def attribute_in_a_format():
    module = net(lambda self, x: x * float("{.scale}".format(self)), scale=1)  # noqa: UP032
    return module, lambda: setattr(module, "scale", 2)


class Shown:
    def __init__(self):
        self.value = 1

    def __str__(self):
        return str(self.value)


@case
def object_in_a_formatted_text():
    shown = Shown()
    return net(lambda self, x: x * float(f"{self.shown}"), shown=shown), lambda: setattr(shown, "value", 2)


@case
def object_in_a_text_by_percent():
    shown = Shown()
    return net(lambda self, x: x * float("%s" % self.shown), shown=shown), lambda: setattr(shown, "value", 2)  # noqa: UP031


@case
def attribute_behind_an_operator():
    class Factor:
        def __init__(self):
            self.value = 1

        def __mul__(self, other):
            return other * self.value

    factor = Factor()
    return net(lambda self, x: self.factor * x, factor=factor), lambda: setattr(factor, "value", 2)


@case
def items_behind_an_iteration():
    class Group:
        def __init__(self):
            self.held = [1]

        def __iter__(self):
            return iter(self.held)

    group = Group()
    return net(lambda self, x: [x * item for item in self.group], group=group), lambda: group.held.append(2)


@case
def global_behind_a_context_manager():
    @contextlib.contextmanager
    def manager():
        yield CONFIG["k"]

    def forward(self, x):
        with manager() as k:
            return x * k

    return net(forward), configure


@case
def attribute_behind_a_decorator_of_torch():
    module = net(torch.no_grad()(lambda self, x: x * self.k), k=1)
    return module, lambda: setattr(module, "k", 2)


@case
def attribute_of_a_compiled_child():
    module = net(lambda self, x: self.inner(x), inner=torch.compile(scaled(), backend="eager"))
    return module, lambda: setattr(module.inner._orig_mod, "k", 2)


@case
def code_of_a_traced_child():
    module = net(lambda self, x: self.inner(x), inner=torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())))

    def change():
        for node in module.inner.graph.nodes:
            if node.op == "call_module":
                node.op, node.target = "call_function", torch.sigmoid
        module.inner.recompile()

    return module, change


@case
def global_behind_an_operator_of_ones_own():
    name = f"torchcache_test::thing{len(CASES)}"

    @torch.library.custom_op(name, mutates_args=())
    def thing(x: torch.Tensor) -> torch.Tensor:
        return x * CONFIG["k"]

    return net(lambda self, x: thing(x)), configure


@case
def bytes_that_print_alike():
    module = net(lambda self, x: (x, self.held), held=1)
    return module, lambda: setattr(module, "held", True)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_change_is_seen(name):
    module, change = CASES[name]()
    forward = type(module).forward
    program = Program((module, forward), "net")
    assert program.problem is None
    assert all(program.unchanged() for _ in range(4))
    assert Program((module, forward), "net").digest == program.digest
    change()
    assert not program.unchanged()
    assert Program((module, forward), "net").digest != program.digest


def test_a_class_that_is_only_asked_for_is_not_made():
    """The constructor of a class reads the learning rate; ``isinstance`` and ``super`` do not call it."""

    class Net(nn.Module):
        def __init__(self, args):
            super().__init__()
            self.args, self.lr = args, args.lr

        def forward(self, x):
            return x * self.args.scale if isinstance(self, Net) else super().forward(x)

    module = Net(types.SimpleNamespace(lr=1, scale=1))
    program = Program((module, Net.forward), "net")
    module.args.lr = module.lr = 2
    assert program.unchanged()
    assert Program((module, Net.forward), "net").digest == program.digest
