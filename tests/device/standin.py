"""Builds and opens the device of ``standin.cpp``."""

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_suffix(".cpp")


def compiler():
    return shutil.which(os.environ.get("CXX", "c++"))


def load():
    """Build the library, which takes some seconds, and load it."""
    libraries = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "standin.so"
        subprocess.run(
            [compiler(), "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(library), f"-L{libraries}"]
            + [f"-I{path}" for path in cpp_extension.include_paths()]
            + ["-lc10", "-ltorch_cpu", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"],
            check=True,
        )
        torch.ops.load_library(library)


_room = 1 << 40


@contextlib.contextmanager
def room(more):
    """Have the devices of the process together so many bytes beyond those that are in use, for a block."""
    global _room
    before, _room = _room, torch.ops.standin.count("held") + more
    torch.ops.standin.set_room(_room)
    try:
        yield
    finally:
        _room = before
        torch.ops.standin.set_room(before)


@functools.cache
def open_device():
    """Make ``torch.device("standin")`` a device of this process."""
    load()
    torch.utils.rename_privateuse1_backend("standin")
    module = types.ModuleType("torch.standin")
    module.is_available = lambda: True
    module.device_count = lambda: 2
    module.current_device = lambda: 0
    module.mem_get_info = lambda device=None: (_room - torch.ops.standin.count("held"), _room)
    module._is_in_bad_fork = lambda: False
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.manual_seed_all = lambda seed: None
    module.memory_stats = lambda device=None: {"num_ooms": torch.ops.standin.count("failures")}
    module.synchronize = torch.accelerator.synchronize
    module.device = lambda index: contextlib.nullcontext()
    torch._register_device_module("standin", module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return torch.device("standin", 0)


class Counted:
    """What crossed while a block ran: bytes to the host and to the device, and how often the host waited."""

    def __enter__(self):
        torch.ops.standin.begin()
        return self

    def __exit__(self, *error):
        self.to_host, self.to_device, self.waits = map(torch.ops.standin.count, ("to_host", "to_device", "waits"))
