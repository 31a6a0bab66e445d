"""The site: what is public is in the reference, what is a page is in the map, what is a listing is
run by some test. That it can be built is `nox -s docs`'s affair."""

from __future__ import annotations

import importlib
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from test_readme import BOT, ROOT, blocks

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
COPIED = ("files/", "reference/index")
MODULES = (
    "trio_gateway",
    "trio_gateway.agents",
    "trio_gateway.channels",
    "trio_gateway.http",
    "trio_gateway.store",
    "trio_gateway.testing",
)
ELSEWHERE = {"trio_gateway.channels.Channel", "trio_gateway.store.Resumed"}
"""Names of two doors: the reference has them under the first one."""
RUN = {
    "approval.md": "test_docs_run.py",
    "index.md": "test_docs.py",
    "openai-agent.md": "test_docs_run.py",
    "openai-api.md": "test_docs_run.py",
    "process-agent.md": "test_docs_run.py",
    "testing.md": "test_docs_run.py",
    "traces.md": "test_docs_run.py",
    "tutorial.md": "test_tutorial.py",
    "writing-a-channel.md": "test_docs_run.py",
}
"""Who runs the Python of a page. A page that is not here has none."""


def told() -> set[str]:
    """What the pages of the reference tell about, by its full name."""
    found: set[str] = set()
    for page in (DOCS / "reference").glob("*.md"):
        module = ""
        for kind, name in re.findall(r"^\.\. ([\w-]+):: (\S+)$", page.read_text(), re.M):
            if kind == "currentmodule":
                module = name
            elif kind.startswith("auto") and kind != "automodule":
                found.add(f"{module}.{name}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    names = importlib.import_module(module).__all__
    public = {f"{module}.{name}" for name in names} - ELSEWHERE

    assert public - told() == set()


def test_the_reference_tells_of_nothing_that_is_not_there() -> None:
    for full in told():
        module, _, name = full.rpartition(".")
        assert hasattr(importlib.import_module(module), name), full


# ----- the map


def entries(page: Path) -> list[str]:
    """What the toctrees of a page lead to; patterns are patterns."""
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = [line for tree in trees for line in tree.splitlines() if line and line[0] != ":"]
    return [re.sub(r".*<(.*)>", r"\1", line) for line in lines]


def test_every_page_is_in_the_map_once() -> None:
    leads = entries(DOCS / "index.md")

    for page in PAGES:
        if page.stem != "index":
            assert [fnmatch(page.stem, lead) for lead in leads].count(True) == 1, page.name


@pytest.mark.parametrize("name", ["operating", "operations", "metrics", "traces"])
def test_pages_on_operations_find_their_section(name: str) -> None:
    assert [fnmatch(name, lead) for lead in entries(DOCS / "index.md")].count(True) == 1


def test_every_page_of_the_reference_is_in_its_map() -> None:
    pages = {page.stem for page in (DOCS / "reference").glob("*.md")} - {"index"}

    assert set(entries(DOCS / "reference/index.md")) == pages


def test_the_map_leads_somewhere() -> None:
    for lead in entries(DOCS / "index.md"):
        assert lead.startswith(COPIED) or list(DOCS.glob(f"{lead}.md")), lead


# ----- listings


def test_a_page_with_python_on_it_is_run() -> None:
    with_python = {page.name for page in PAGES if blocks("python", page.read_text())}

    assert with_python == set(RUN)
    for page, test in RUN.items():
        assert page in (ROOT / "tests" / test).read_text()


def test_the_index_has_readmes_bot_and_commands() -> None:
    page = (DOCS / "index.md").read_text()

    assert blocks("python", page) == [BOT]
    assert blocks("sh", page) == blocks("sh")
