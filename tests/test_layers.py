"""The layout: folders and files in order, imports that point downwards only, private names in one file, short files."""

import ast
import graphlib
from pathlib import Path

import pytest

import torchcache

PACKAGE = Path(torchcache.__file__).parent

# From the lowest layer to the highest: folders, and files beside them. Those on one line may not import each other.
LAYERS = [
    {"forks"},
    {"printable", "quantity", "version", "threads", "dynamo", "kernels", "counters", "streams"},
    {"errors", "logging"},
    {"address", "namesake", "switching", "trainable"},
    {"options"},
    {"context", "mark", "store"},
    {"lazy"},
    {"digest", "values"},
    {"identity", "speed"},
    {"batch", "modes"},
    {"checks"},
    {"looked", "usefulness", "foresight", "padded", "stand_in"},
    {"padding"},
    {"call"},
    {"regions"},
    {"returned", "unreal"},
    {"op"},
    {"graph"},
    {"doors"},
    {"marked_class"},
    {"marks"},
    {"transform", "backend"},
    {"reports"},
    {"loading"},
    {"integrations", "cli"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}
LONGEST = {"dynamo": 680}  # all names of torch that are not public
LONG = 420
SHORT = 300

# Names of torch that are not public and are used outside of ``dynamo.py``, each with why.
PRIVATE = {
    "torch.utils._pytree": "what torch.compile and functorch take containers apart with; the public one needs optree",
    "torch.nn.modules.batchnorm._BatchNorm": "the documented base class of BatchNorm in isinstance checks",
    "torch.nn.modules.dropout._DropoutNd": "the base class of all dropouts",
    "torch.Tensor._make_wrapper_subclass": "how PyTorch's notes on extending it make a tensor without data",
    "torch.utils.data._utils": "the table that `collate` documents for classes of one's own, and the loader's pinning",
    "torch.library._impls": "which kernels were registered in Python, before anybody could note them",
    "torch.library.Library._destroy": "how libraries take their kernels back; noted beside their registration",
}


def parsed(name):
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imported(tree):
    """The modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ImportFrom) and node.level), "relative imports hide the layer"
        if isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.partition(".")[0] == "torchcache"]
            yield from (name.removeprefix("torchcache").lstrip(".") for name in ours)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torchcache":
            base = node.module.removeprefix("torchcache").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in MODULES else base


def private(tree):
    """The names of torch with a private part that a file uses, as far as they are reached from what it imports."""
    names, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                names[alias.asname or whole] = whole
                found.add(alias.name)
        if isinstance(node, ast.ImportFrom):
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in names:
            found.add(".".join([names[node.id], *reversed(parts)]))
    for name in found:
        first, *rest = name.split(".")
        hidden = [part.startswith("_") and not part.endswith("__") for part in rest]
        if first == "torch" and any(hidden):
            yield ".".join([first, *rest[: hidden.index(True) + 1]])


def unit(name):
    return name.partition(".")[0]


def test_every_folder_and_file_has_its_layer():
    assert {unit(name) for name in MODULES} <= set(RANK)
    assert sum(map(len, LAYERS)) == len(RANK), "a name on two lines"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_downwards(name):
    for other in imported(parsed(name)):
        assert unit(other) == unit(name) or RANK[unit(other)] < RANK[unit(name)], (
            f"{name} imports {other}, not below it"
        )


def test_no_file_needs_itself():
    order = graphlib.TopologicalSorter({name: set(imported(parsed(name))) & MODULES.keys() for name in MODULES})
    assert set(order.static_order()) == set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"dynamo"}))
def test_private_names_of_torch_are_in_one_file(name):
    assert set(private(parsed(name))) <= PRIVATE.keys()


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
    assert list(imported(ast.parse(text))) == names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import torch\ntorch._C._functorch.x()", {"torch._C"}),
        ("import torch._dynamo", {"torch._dynamo"}),
        ("from torch._guards import detect_fake_mode", {"torch._guards"}),
        ("from torch import _guards", {"torch._guards"}),
        ("from torch import nn\nnn.modules.dropout._DropoutNd", {"torch.nn.modules.dropout._DropoutNd"}),
        ("from torch.utils import _pytree as tree\ntree.tree_map(f, x)", {"torch.utils._pytree"}),
        ("import torch\ntorch.__version__, torch.nn.Linear, x._private", set()),
    ],
)
def test_every_private_name_is_seen(text, names):
    assert set(private(ast.parse(text))) == names


@pytest.mark.parametrize("package", sorted({name.rpartition(".")[0] for name in MODULES} - {""}))
def test_packages_import_nothing_of_their_own(package):
    assert not list(imported(parsed(package)))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_say_what_they_are_for_and_stay_readable(name):
    described = ast.get_docstring(parsed(name))
    assert described, name
    assert described.splitlines()[0].endswith("."), "the first line is one sentence"
    assert MODULES[name].read_text(encoding="utf-8").count("\n") <= LONGEST.get(name, LONG)


def test_most_files_are_short():
    lengths = [path.read_text(encoding="utf-8").count("\n") for path in MODULES.values()]
    assert sum(length <= SHORT for length in lengths) >= 0.8 * len(lengths)


@pytest.mark.parametrize("name", torchcache.__all__)
def test_public_names_are_documented(name):
    documented = getattr(torchcache, name).__doc__
    assert documented
    assert documented.splitlines()[0].rstrip().endswith((".", "parentheses."))
