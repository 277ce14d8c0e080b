"""The public names: complete docstrings that match the signatures, and signatures that survive decoration."""

import importlib
import inspect
import re

import pytest
import torch
from torch import nn

import torchcache
from torchcache import cached

PAGES = ("reports.stats", "reports.summary", "reports.explain", "loading.warm", "loading.prefetch", "options")
INTEGRATIONS = ("lightning", "transformers")
OPTIONS = set(inspect.signature(torchcache.CacheOptions).parameters)


def public():
    """Every public function and class, and the classes of what they return."""
    for name in torchcache.__all__:
        yield pytest.param(getattr(torchcache, name), id=name)
    for page in PAGES:
        module = importlib.import_module(f"torchcache.{page}")
        for name in module.__all__:
            found = vars(module)[name]
            if isinstance(found, type) and name not in torchcache.__all__:
                yield pytest.param(found, id=f"{page}.{name}")


def section(text, title):
    """The names that a numpydoc section lists, each with its description; ``None`` without the section."""
    found = re.search(rf"^{title}\n-+\n(.*?)(?=^\S[^\n]*\n---|\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        return None
    entries = re.findall(r"^(\S[^\n]*)\n((?:(?:[ ][^\n]*)?\n)*)", found[1] + "\n", re.MULTILINE)
    return {
        name.strip(): described.strip() for names, described in entries for name in names.split(" : ")[0].split(",")
    }


def check(subject, text):
    parameters = {
        {p.VAR_KEYWORD: "**", p.VAR_POSITIONAL: "*"}.get(p.kind, "") + name: p
        for name, p in inspect.signature(subject).parameters.items()
        if not name.startswith("_")
    }
    documented = section(text, "Parameters") or {}
    if "**options" in documented and parameters.keys() >= OPTIONS:
        parameters = {name: p for name, p in parameters.items() if name not in OPTIONS} | {"**options": None}
    assert documented.keys() == parameters.keys()
    assert all(documented.values()), "a parameter without a description"


def returns_something(function):
    returned = inspect.signature(function).return_annotation
    return returned not in (None, "None", inspect.Signature.empty) and "Iterator" not in str(returned)


@pytest.mark.parametrize("subject", public())
def test_docstrings_are_complete_and_match_the_signatures(subject):
    text = inspect.getdoc(subject)
    first, *_ = text.split("\n\n")
    assert "\n" not in first
    assert first.endswith(".")
    if isinstance(subject, type) and issubclass(subject, BaseException):
        return
    check(subject, text)
    if isinstance(subject, type):
        for name, member in vars(subject).items():
            if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, (property, classmethod))):
                assert inspect.getdoc(member), f"{name} says nothing"
    elif returns_something(subject):
        assert section(text, "Returns") or "with" in text, "says nothing of what it returns"


@pytest.mark.parametrize("framework", INTEGRATIONS)
def test_callbacks_are_documented(framework):
    pytest.importorskip(framework)
    module = importlib.import_module(f"torchcache.integrations.{framework}")
    check(module.TorchCacheCallback, inspect.getdoc(module.TorchCacheCallback))


def test_completion_shows_the_public_names_and_no_others():
    assert [name for name in dir(torchcache) if not name.startswith("_")] == sorted(torchcache.__all__)
    assert "__version__" in dir(torchcache)
    for name in torchcache.__all__:
        assert getattr(torchcache, name).__name__ in (name, "torchcache_backend", "torchcache")
    assert torchcache.cached is torchcache.torchcache


class Plain(nn.Module):
    """Adds."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """Scaled."""
        return self.linear(x) * scale


@cached
class Decorated(Plain):
    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """Scaled."""
        return super().forward(x, scale=scale)


def plain_function(x: torch.Tensor, /, power: int = 2) -> torch.Tensor:
    """Powers."""
    return x**power


SIGNATURE = inspect.signature(Plain().forward)


@pytest.mark.parametrize(
    "change",
    [
        torchcache.mark,
        lambda module: torchcache.transform(torchcache.mark(module)),
        lambda module: torchcache.mark(torchcache.transform(torchcache.mark(module))),
    ],
    ids=["mark", "transform", "mark again"],
)
def test_instances_keep_their_signature_name_and_documentation(change):
    module = change(Plain().requires_grad_(False))
    assert inspect.signature(module.forward) == SIGNATURE
    assert inspect.signature(module) == inspect.signature(Plain())
    assert inspect.getdoc(module.forward) == "Scaled."
    assert module.forward.__name__ == "forward"
    assert module.forward.__annotations__ == Plain.forward.__annotations__
    assert inspect.signature(torchcache.unmark(module).forward) == SIGNATURE


def test_decorated_classes_and_functions_keep_their_signature_name_and_documentation():
    assert Decorated.__name__ == "Decorated"
    assert inspect.signature(Decorated) == inspect.signature(Plain)
    assert inspect.signature(Decorated.forward) == inspect.signature(Plain.forward)
    assert inspect.signature(Decorated().forward) == SIGNATURE
    assert inspect.getdoc(Decorated.forward) == "Scaled."
    assert set(dir(Decorated)) == set(dir(Plain))
    function = cached(plain_function)
    assert inspect.signature(function) == inspect.signature(plain_function)
    assert (function.__name__, inspect.getdoc(function)) == ("plain_function", "Powers.")
    assert set(OPTIONS) < set(inspect.signature(cached).parameters)
