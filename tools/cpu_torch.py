"""Installs one release of torch so that it imports on a machine without a GPU, without its gigabytes of GPU libraries.

``python tools/cpu_torch.py 2.8.0``, or ``newest``. PyPI has no CPU wheel of torch for Linux on x86: its wheel links to
libraries of NVIDIA. Where these are missing, each is replaced by a small one in which every function fails.
"""

from __future__ import annotations

import collections
import ctypes
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
GPU = re.compile(r"(nvidia|cuda|triton|pytorch-triton)\b", re.IGNORECASE)
NO_DEVICE = 100  # cudaErrorNoDevice
Library = dict[str, set[str]]  # names of functions by the version that the linker asks for, "" for none


def main() -> None:
    """Install the release that the command line names, what it needs, and stand-ins."""
    release = sys.argv[1] if len(sys.argv) > 1 else "newest"
    wanted = "torch" if release == "newest" else f"torch=={release}"
    subprocess.run([*PIP, "--upgrade", "--no-deps", wanted], check=True)
    torch = importlib.metadata.distribution("torch")
    needed = [text for text in torch.requires or [] if "extra ==" not in text and not GPU.match(text)]
    subprocess.run([*PIP, *needed], check=True)
    folder = Path(str(torch.locate_file("torch"))) / "lib"
    for name, versions in missing_libraries(folder).items():
        build(folder / name, versions)
    check = "import torch; assert not torch.cuda.is_available(); print('torch', torch.__version__)"
    subprocess.run([sys.executable, "-c", check], check=True)


def missing_libraries(folder: Path) -> dict[str, Library]:
    """The libraries that those in ``folder`` link to and that this machine has not, with what is used of each."""
    missing: dict[str, Library] = {}
    unversioned: dict[str, set[str]] = {}  # by a missing library that the file with the call links to
    defined: set[str] = set()
    here: set[str] = set()
    for path in sorted(folder.glob("*.so*")):
        linked = re.findall(r"\(NEEDED\).*\[(.+)\]", read("--dynamic", path))
        foreign = [name for name in linked if not (folder / name).exists()]
        lacks = [name for name in foreign if not loads(name)]
        here.update(set(foreign) - set(lacks))
        for name in lacks:
            missing.setdefault(name, collections.defaultdict(set))
        owners = version_owners(read("--version-info", path))
        for version, library in owners.items():
            if library in missing:
                missing[library][version]  # the linker asks for the version even where nothing of it is used
        for line in read("--dyn-syms", path).splitlines():
            fields = line.split()
            if len(fields) < 8 or fields[4] == "LOCAL":
                continue
            name, _, version = fields[7].partition("@")
            version = version.strip("@")
            if fields[6] != "UND":
                defined.add(name)
            elif owners.get(version) in missing:
                missing[owners[version]][version].add(name)
            elif lacks and not version and fields[4] == "GLOBAL":
                unversioned.setdefault(lacks[0], set()).add(name)
    system = [ctypes.CDLL(name) for name in [None, *here]]  # None is Python itself
    for library, functions in unversioned.items():
        missing[library][""] |= {name for name in functions - defined if not any(hasattr(one, name) for one in system)}
    return missing


def read(what: str, path: Path) -> str:
    """What ``readelf`` of the GNU binutils tells."""
    return subprocess.run(["readelf", "--wide", what, str(path)], check=True, capture_output=True, text=True).stdout


def version_owners(text: str) -> dict[str, str]:
    """The library of each version of functions that is asked for."""
    owners: dict[str, str] = {}
    library = ""
    for line in text.splitlines():
        if found := re.search(r"File: (\S+)", line):
            library = found[1]
        elif library and (found := re.search(r"Name: (\S+)\s+Flags", line)):
            owners[found[1]] = library
    return owners


def loads(name: str) -> bool:
    """Whether this machine has a library."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def build(target: Path, versions: Library) -> None:
    """Make a library whose functions say that there is no device."""
    texts = [f'const char *{name}() {{ return "no device"; }}' for name in names(versions) if is_text(name)]
    codes = [f"long {name}() {{ return {result(name)}; }}" for name in names(versions) if not is_text(name)]
    script = [
        f"{version} {{ {'global: ' + '; '.join(sorted(functions)) + ';' if functions else ''} }};"
        for version, functions in versions.items()
        if version
    ]
    with tempfile.TemporaryDirectory() as made:
        source, exported = Path(made) / "source.c", Path(made) / "exported.map"
        source.write_text("\n".join([*texts, *codes, ""]), encoding="utf-8")
        exported.write_text("\n".join([*script, ""]), encoding="utf-8")
        how = [f"-Wl,--version-script={exported}"] if script else []
        subprocess.run(
            ["cc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{target.name}", *how, "-o", str(target), str(source)],
            check=True,
        )


def names(versions: Library) -> list[str]:
    """All functions of a library."""
    return sorted(set().union(*versions.values()))


def is_text(name: str) -> bool:
    """Whether a function returns a string, which torch prints."""
    return name.startswith("cudaGetError") and name != "cudaGetLastError"


def result(name: str) -> int:
    """What a function returns: an error, but for those that run while libraries are loaded."""
    if name.startswith("__cuda"):
        return 0
    return NO_DEVICE if re.match("cuda[A-Z]", name) else 1


if __name__ == "__main__":
    main()
