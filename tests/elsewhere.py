"""A small cached run, for a process of its own, where torchcache finds a system like Windows.

What it imports lacks the names that are given, no file that is open is removed or replaced, and no file is made under a
name that Windows refuses.
"""

import errno
import gc
import importlib
import json
import os
import pathlib
import pkgutil
import re
import shutil
import sqlite3
import sys
import types

import torch
from torch import nn
from torch.utils import data


class Elsewhere(types.ModuleType):
    """A module without some names, and with others changed."""

    def __init__(self, module, lacking, **changed):
        super().__init__(module.__name__)
        self.__dict__.update({name: value for name, value in vars(module).items() if name not in lacking} | changed)


def refuse_open(*paths):
    held = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
    for path in map(os.path.realpath, paths):
        if any(one == path or one.startswith(path + os.sep) for one in held):
            raise PermissionError(errno.EACCES, "is open", path)


def careful(function):
    def checked(*paths, **options):
        refuse_open(*paths)
        return function(*paths, **options)

    return checked


def move_there(lacking):
    """Have torchcache, and none of what it uses, find another system."""
    import diskcache  # noqa: F401
    import numpy  # noqa: F401
    import rich.console  # noqa: F401
    import torch._inductor.config  # noqa: F401

    names = {module: Elsewhere(sys.modules[module], lacking["names"].get(module, ())) for module in lacking["names"]}
    changing = ("remove", "unlink", "rename", "replace", "rmdir")
    names["os"].__dict__.update({name: careful(getattr(os, name)) for name in changing}, name="nt")
    names["sys"] = Elsewhere(sys, (), platform="win32")
    real = {name: sys.modules.get(name) for name in [*names, *lacking["modules"]]}
    sys.modules.update(names, **dict.fromkeys(lacking["modules"]))
    import torchcache

    for module in pkgutil.walk_packages(torchcache.__path__, "torchcache."):
        if "integrations" not in module.name:  # other libraries would find that system too
            importlib.import_module(module.name)
    for name, module in real.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module
    pathlib.Path.unlink = careful(pathlib.Path.unlink)
    shutil.rmtree = careful(shutil.rmtree)


def refuse_names(directory):
    """Have the process end where a file below ``directory`` gets a name that Windows does not allow."""

    def watch(event, arguments):
        if event in ("open", "os.rename", "os.mkdir", "sqlite3.connect"):
            for path in arguments[:2]:
                name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
                inner = name.removeprefix("file://").partition("?mode=")[0].partition(str(directory))[2]
                if re.search(r'[<>:"|?*\\\0-\x1f]|[. ](/|$)|/(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)', inner.lower()):
                    print("no name for Windows:", name, file=sys.stderr, flush=True)
                    os._exit(1)

    sys.addaudithook(watch)


class Samples(data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.randn(400, generator=torch.Generator().manual_seed(index)), index % 3


def train(directory):
    """An epoch; hits and misses."""
    import torchcache

    torch.manual_seed(0)
    place = {"persistent": True, "persistent_cache_dir": directory}
    body = nn.Linear(400, 8)
    model = nn.Sequential(torchcache.mark(body, freeze=True, **place), nn.Linear(8, 3))
    for x, y in torchcache.DataLoader(Samples(), batch_size=10, **place):
        nn.functional.cross_entropy(model(x), y).backward()
    with torchcache.bypass(), torch.no_grad():
        wanted = body(torch.stack([Samples()[index][0] for index in range(40)]))
    with torch.no_grad():
        torch.testing.assert_close(model[0](torch.stack([Samples()[index][0] for index in range(40)])), wanted)
    torchcache.flush()
    counts = torchcache.stats(model).regions[0]
    return counts.misses, counts.disk_hits


def main(directory):
    from torchcache.cli.main import main as command
    from torchcache.store import disk

    refuse_names(directory)
    assert train(directory) == (40, 0)
    disk._tiers.clear()
    gc.collect()
    assert train(directory)[0] == 0
    misses, hits = train(directory)
    assert misses == 0
    assert hits > 0
    gc.collect()
    for arguments in (["info"], ["stats"], ["doctor"], ["verify"], ["prune", "--max-size", "1KB"], ["clear", "--yes"]):
        assert command([*arguments[:1], str(directory), *arguments[1:]]) == 0, arguments
    assert not [*directory.rglob("*.val"), *directory.rglob("*.tmp")]
    assert train(directory)[0] == 40
    with sqlite3.connect(directory / "rows-1" / "cache.db") as connection:
        connection.execute("CREATE INDEX more ON Cache (tag)")
    # Somebody has the damaged database open: it cannot be removed, and that is told.
    assert command(["clear", str(directory), "--yes"]) == 2


if __name__ == "__main__":
    move_there(json.loads(sys.argv[2]))
    main(pathlib.Path(sys.argv[1]) / "cache")
