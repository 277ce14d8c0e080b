"""The layout: imports point downwards only, and files stay readable."""

import ast
from pathlib import Path

import pytest

import torchcache

PACKAGE = Path(torchcache.__file__).parent

# From the lowest layer to the highest; modules on one line may not import each other.
LAYERS = [
    {"errors", "forks", "logging", "options", "modes", "openmp", "table", "sharing", "version"},
    {"threads"},
    {
        "store.select",
        "store.buffers",
        "store.file",
        "store.pause",
        "store.vet",
        "store.catalogue",
        "store.connections",
        "store.place",
        "feeding",
    },
    {"store.blob", "store.blob_disk"},
    {"store.reader", "store.connect"},
    {
        "store.slab",
        "store.disk",
        "store.writer",
        "store.scan",
        "store.header",
        "store.safetensors",
    },
    {"store.tiers", "store.records"},
    {"store.survey", "store.verify", "store.deposit"},
    {"store.prune", "store.transfer"},
    {
        "lookup.context",
        "lookup.digest",
        "lookup.constants",
        "lookup.code",
        "lookup.op",
        "lookup.stamps",
        "lookup.history",
        "lookup.place",
    },
    {"lookup.culprit", "lookup.watch"},
    {"lookup.parts", "lookup.key", "lookup.probe", "lookup.rows"},
    {"lookup.code_parts", "lookup.module_parts"},
    {"lookup.encode"},
    {"lookup.fingerprint"},
    {"lookup.ahead"},
    {"lookup.cache_lookup"},
    {"graph.batches", "graph.guards", "graph.pending", "graph.sizes"},
    {"graph.marked"},
    {"graph.frozen", "graph.region"},
    {"graph.partition", "graph.cut", "graph.feed"},
    {"graph.direct", "graph.rewrite", "graph.trust"},
    {"tracing", "backend", "stats", "prefetch", "audit"},
    {"eager", "warm", "summary", "plot"},
    {"integrations.progress"},
    {"marks"},
    {"transform", "explain"},
    {"integrations.lightning", "integrations.transformers"},
    {"speed", "cli.quantity", "cli.screen"},
    {"cli.command"},
    {"cli.look", "cli.remove", "cli.fill", "cli.move", "cli.machine"},
    {"cli.main"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imported(text):
    for node in ast.walk(ast.parse(text)):
        assert not (isinstance(node, ast.ImportFrom) and node.level), "relative imports hide the layer"
        if isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.partition(".")[0] == "torchcache"]
            yield from (name.removeprefix("torchcache").lstrip(".") for name in ours)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torchcache":
            base = node.module.removeprefix("torchcache").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in MODULES else base


def test_every_module_has_its_layer():
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_downwards(name):
    for other in imported(MODULES[name].read_text(encoding="utf-8")):
        assert RANK[other] < RANK[name], f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import torchcache.store.disk", ["store.disk"]),
        ("def late():\n    from torchcache.store import tiers, blob", ["store.tiers", "store.blob"]),
        ("from torchcache.store.blob import RowSpec", ["store.blob"]),
        ("import os, torch\nfrom torchcachelike import x", []),
    ],
)
def test_every_way_to_import_is_seen(text, names):
    assert list(imported(text)) == names


@pytest.mark.parametrize("package", ["graph", "lookup", "store"])
def test_packages_import_nothing_of_their_own(package):
    text = (PACKAGE / package / "__init__.py").read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert not list(imported(text))


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
