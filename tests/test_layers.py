"""The layout: imports point downwards only, and files stay readable."""

import ast
from pathlib import Path

import pytest

import torchcache

PACKAGE = Path(torchcache.__file__).parent

# From the lowest layer to the highest; modules on one line may not import each other.
LAYERS = [
    {"errors", "logging", "options", "modes"},
    {"store.blob", "store.select"},
    {"store.slab", "store.disk", "store.writer"},
    {"store.tiers"},
    {"lookup.context", "lookup.digest", "lookup.constants", "lookup.code", "lookup.op"},
    {"lookup.encode", "lookup.key", "lookup.probe", "lookup.rows"},
    {"lookup.fingerprint"},
    {"lookup.cache_lookup"},
    {"graph.marked"},
    {"graph.frozen", "graph.region"},
    {"graph.partition", "graph.cut"},
    {"graph.rewrite"},
    {"tracing", "backend", "stats"},
    {"eager"},
    {"marks"},
    {"transform", "explain"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchcache"):
            base = node.module.removeprefix("torchcache").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in MODULES else base


def test_every_module_has_its_layer():
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_downwards(name):
    for other in imported(MODULES[name]):
        assert RANK[other] < RANK[name], f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_say_what_they_are_for_and_stay_readable(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), name
    assert text.count("\n") <= 420


def test_most_files_are_short():
    lengths = [path.read_text(encoding="utf-8").count("\n") for path in MODULES.values()]
    assert sum(length <= 300 for length in lengths) >= 0.8 * len(lengths)


@pytest.mark.parametrize("name", torchcache.__all__)
def test_public_names_are_documented(name):
    documented = getattr(torchcache, name).__doc__
    assert documented
    assert documented.splitlines()[0].rstrip().endswith((".", "parentheses."))
