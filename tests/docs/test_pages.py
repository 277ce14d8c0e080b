"""The pages are true: Python blocks run and print what they say, options, commands and links exist."""

import argparse
import configparser
import dataclasses
import re
from pathlib import Path

import pytest
import torch

import torchcache
from torchcache.cli.main import _parser

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "tools").rglob("*.md"), *(ROOT / "torchcache").rglob("*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
OPTION = r"^\| `(\w+)` \| `([^`]*)` \| (.*) \|"
WITH_CODE = {"README.md", "tools/docs/training.md", "tools/docs/switching.md"}
NEEDS = {"README.md": ["transformers"], "tools/docs/training.md": ["redis"]}
SAID = re.compile(r"^print\(.*\)  # (True|False|\d+|torch\.Size\(\[[\d, ]*\]\))", re.MULTILINE)


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", text(page), re.DOTALL)


def test_pages_with_code_are_known():
    assert {page for page in NAMES if blocks(page, "python")} == WITH_CODE


@pytest.mark.parametrize("page", sorted(WITH_CODE))
def test_python_blocks_run_as_one_session_and_print_what_they_say(page, tmp_path, monkeypatch, capsys):
    for needed in NEEDS.get(page, ()):
        pytest.importorskip(needed)
    monkeypatch.setenv("TORCHCACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    scope = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), scope)
    printed = iter(capsys.readouterr().out.splitlines())
    expected = [said for block in blocks(page, "python") for said in SAID.findall(block)]
    assert expected
    for said in expected:
        assert said in printed, f"{page} says that {said} is printed"
    torchcache.flush()
    assert any(tmp_path.rglob("*.db"))


def test_the_options_table_is_complete_and_its_defaults_are_true():
    fields = {field.name: field.default for field in dataclasses.fields(torchcache.CacheOptions)}
    all_of_them, some = (
        re.findall(OPTION, text(page), re.MULTILINE) for page in ("tools/docs/options.md", "README.md")
    )
    assert {name: eval(default) for name, default, _ in all_of_them} == fields
    assert some
    assert set(some) <= set(all_of_them)


def test_the_readme_is_short_and_starts_with_an_installation_and_the_demo():
    assert text("README.md").count("\n") <= 120
    commands = "\n".join(blocks("README.md", "bash"))
    assert re.search(r"^pip install \. ", commands, re.MULTILINE)
    assert "tox run -e demo" in commands


@pytest.mark.parametrize("page", NAMES)
def test_environments_of_tox_and_commands_exist(page):
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "tox.ini", encoding="utf-8")
    sections = [section.removeprefix("testenv:").strip("{}") for section in settings]
    environments = {name for section in sections for name in section.split(",")}
    for named in re.findall(r"\btox (?:run )?-e ([\w,-]+)", text(page)):
        for name in named.split(","):
            assert name in environments, f"{page} names {name}"
    (commands,) = (a.choices for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    shown = [*blocks(page, "bash"), *re.findall(r"`(torchcache [^`]+)`", text(page))]
    for name in re.findall(r"^torchcache (\w+)", "\n".join(shown), re.MULTILINE):
        assert name in commands or name == "COMMAND" or page == "CHANGELOG.md", f"{page} names torchcache {name}"


def test_every_promise_of_security_names_tests_that_exist():
    defined = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        defined |= {path.name, *re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)}
    named = {name.rpartition("/")[2] for name in re.findall(r"`((?:[\w/]+/)?test_\w+(?:\.py)?)`", text("SECURITY.md"))}
    assert named
    assert named <= defined
    promises = re.findall(r"^\| [A-Z].*\|$", text("SECURITY.md"), re.MULTILINE)
    assert promises
    assert all("`test_" in promise or "`tests/" in promise for promise in promises)


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text(page), flags=re.DOTALL)):
        if re.match(r"\w+:", target):
            continue
        place, _, heading = target.partition("#")
        found = ((ROOT / page).parent / place).resolve() if place else ROOT / page
        assert found.exists(), f"{page} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert heading in anchors, f"{page} links to {target}"
