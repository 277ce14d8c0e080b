"""Builds wheel and sdist, checks what is in them, and installs the wheel where nothing else of torchcache is.

    python tools/package.py [--dist FOLDER]

Needs build, twine and check-wheel-contents. The fresh environment sees the packages of the one that runs this, so that
torch is neither downloaded nor replaced.
"""

import argparse
import email
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = ROOT / "torchcache"

IMPORT = """
import importlib.metadata, importlib.resources, pathlib, sys
import torch, torchcache
assert pathlib.Path(torchcache.__file__).is_relative_to(sys.prefix), torchcache.__file__
assert (importlib.resources.files(torchcache) / "py.typed").is_file()
assert torchcache.__version__ == importlib.metadata.version("torchcache")
model = torchcache.transform(torch.nn.Sequential(torchcache.mark(torch.nn.Linear(4, 4), freeze=True)))
x = torch.randn(3, 4)
assert torch.equal(model(x), model(x)) and torchcache.stats(model).hits == 3
assert "torchcache" in torch.compiler.list_backends()
print("imported", torchcache.__version__, "beside torch", torch.__version__)
"""


def run(*command, **options):
    """A command that must succeed."""
    return subprocess.run([str(part) for part in command], check=True, **options)


def build(folder):
    """The wheel and the sdist; the wheel from the sdist, as an installer would build it."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def check_contents(wheel, sdist):
    """Every source file is in both, and in the wheel there is nothing else."""
    sources = {f"torchcache/{path.relative_to(CODE)}" for path in CODE.rglob("*.py")}
    sources |= {"torchcache/py.typed", "torchcache/README.md"}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
        entries = {name.partition(".dist-info/")[2] for name in archive.namelist() if ".dist-info/" in name}
    assert names == sources, f"missing {sorted(sources - names)}, too much {sorted(names - sources)}"
    assert "entry_points.txt" in entries
    assert any("LICENSE" in name for name in entries)
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    texts = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE"}
    wanted = sources | texts | {"pyproject.toml", "tox.ini", "tests/conftest.py"}
    assert wanted <= held, f"missing in the sdist: {sorted(wanted - held)}"
    assert not [name for name in held if "__pycache__" in name or name.endswith((".pyc", ".db"))]
    assert fields["Name"] == "torchcache"
    assert fields["License-Expression"] == "MIT"
    assert fields["Description-Content-Type"] == "text/markdown"
    extras = set(fields.get_all("Provides-Extra"))
    assert extras >= {"blake3", "plot", "lightning", "transformers"}, extras


def check_installation(wheel, folder):
    """The wheel installs without touching torch, and works."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", capture_output=True, text=True
    ).stdout.strip()
    outer = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(packages) / "outer.pth").write_text("\n".join(outer))
    plan = folder / "plan.json"
    run(python, "-m", "pip", "install", "--quiet", "--dry-run", "--report", plan, wheel)
    planned = {item["metadata"]["name"] for item in json.loads(plan.read_text())["install"]}
    assert "torch" not in planned, "installing torchcache would replace torch"
    # A torchcache that the outer environment may have is neither used nor removed.
    run(python, "-m", "pip", "install", "--quiet", "--ignore-installed", "--no-deps", wheel)
    run(python, "-I", "-c", IMPORT, cwd=folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dist", type=Path, help="where the wheel and the sdist are kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.dist or Path(scratch) / "dist"
        wheel, sdist = build(folder)
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
        run(Path(sysconfig.get_path("scripts")) / "check-wheel-contents", wheel)
        check_contents(wheel, sdist)
        check_installation(wheel, Path(scratch) / "fresh")
    print(f"{wheel.name} and {sdist.name} are in order")


if __name__ == "__main__":
    main()
