"""Pages that stand elsewhere, copied into `files/` with links that lead within the site.

    README.md            files/promises.md: what is promised, what is not, how it stops
    ARCHITECTURE.md ...  files/architecture.md ...
    examples/, deploy/   a page for each file
    --help               files/command-line.md: what the command itself says, of every command

A page of this folder is not copied; its links that leave the folder are led to the copies.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from cyclopts import App
    from sphinx.application import Sphinx

DOCS: Final = Path(__file__).parents[1]
ROOT: Final = DOCS.parent
COPIES: Final = DOCS / "files"

WHOLE: Final = {"ARCHITECTURE.md": "architecture", "CHANGELOG.md": "changelog",
                "CONTRIBUTING.md": "contributing"}  # fmt: skip
LANGUAGES: Final = {".py": "python", ".sh": "sh", ".yaml": "yaml", ".yml": "yaml", "": "docker"}
LINK: Final = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")

TERM: Final = re.compile(r"\[([^\]]+)\]\((?:[\w./-]*glossary\.md)?#term-([\w-]+)\)")


def setup(app: Sphinx) -> dict[str, bool]:
    """Copy before anything is read; mend links while it is read."""
    app.connect("builder-inited", lambda _: copy_all())
    app.connect("source-read", _mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def copy_all() -> None:
    """Write every page of `files/`; one that has not changed is left alone, and not read again."""
    pages = dict(_pages())
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    for path in COPIES.rglob("*.md"):
        if path not in pages:
            path.unlink()


def _pages() -> Iterator[tuple[Path, str]]:
    for name, page in WHOLE.items():
        yield COPIES / f"{page}.md", led_home((ROOT / name).read_text(), ROOT)
    yield COPIES / "promises.md", led_home(_promises(), ROOT)
    for folder in ("examples", "deploy"):
        for file in sorted((ROOT / folder).iterdir()):
            if file.is_file():
                yield _page_of(file), _listing(file)
    yield COPIES / "examples.md", _list_of_examples()
    yield COPIES / "command-line.md", _command_line()


# ----- README and its like


def _promises() -> str:
    """What README promises, as a page of its own."""
    readme = (ROOT / "README.md").read_text()
    begin, end = readme.index("## What is promised"), readme.index("## In your own program")
    return f"# The promises\n\n{readme[begin:end].removeprefix('## What is promised')}"


def led_home(text: str, folder: Path) -> str:
    """`text`, which stands in `folder`, with every relative link made one within the site."""

    def mended(found: re.Match[str]) -> str:
        if (found[1].endswith("README.md"), found[2]) == (True, "#what-is-promised"):
            return "](/files/promises.md)"
        page = _home_of((folder / found[1]).resolve())
        return found[0] if page is None else f"](/{page}{found[2] or ''})"

    return LINK.sub(mended, TERM.sub(_as_term, text))


def _as_term(found: re.Match[str]) -> str:
    """What leads to a word of the glossary, as what Sphinx checks: there is such a word."""
    return f"{{term}}`{found[1]} <{found[2].replace('-', ' ')}>`"


def _home_of(target: Path) -> str | None:
    """The page of the site for a file of the repository."""
    if target.is_relative_to(DOCS):
        return str(target.relative_to(DOCS))
    name = str(target.relative_to(ROOT)) if target.is_relative_to(ROOT) else ""
    if name in WHOLE:
        return f"files/{WHOLE[name]}.md"
    if target.parent.name in ("examples", "deploy") and target.is_file():
        return str(_page_of(target).relative_to(DOCS))
    return {"README.md": "index.md", "examples": "files/examples.md"}.get(name)


def _mend(_app: Sphinx, docname: str, source: list[str]) -> None:
    if not docname.startswith("files/"):
        source[0] = led_home(source[0], (DOCS / docname).parent)


# ----- examples/ and deploy/


def _page_of(file: Path) -> Path:
    name = file.name.replace(".", "-").lower() if file.parent.name == "deploy" else file.name
    return COPIES / file.parent.name / f"{name.removesuffix('.py')}.md"


def _list_of_examples() -> str:
    files = sorted((ROOT / "examples").iterdir())
    lines = [f"- [{file.name}](/{_page_of(file).relative_to(DOCS)}): {_summary(file)}"
             for file in files if file.is_file()]  # fmt: skip
    return (
        "# Examples\n\nPrograms to read and to run; a test runs each as its reader would.\n\n"
        + "\n".join(lines)
        + "\n\n```{toctree}\n:hidden:\n:glob:\n\nexamples/*\n```\n"
    )


def _summary(file: Path) -> str:
    text = file.read_text()
    if file.suffix == ".py":
        return text.split('"""')[1].partition("\n")[0]
    said = " ".join(line.lstrip("# ") for line in text.splitlines()[1:] if line.startswith("# "))
    return f"{said.partition('. ')[0]}."


def _listing(file: Path) -> str:
    """A page with one file on it. The docstring of a program is its text."""
    text, intro = file.read_text(), ""
    if file.suffix == ".py":
        intro = f"{_summary(file)}\n\n"
    head = "---\norphan: true\n---\n" if file.parent.name == "deploy" else ""
    fence = f"````{LANGUAGES[file.suffix]}\n{text.rstrip()}\n````\n"
    return f"{head}# {file.parent.name}/{file.name}\n\n{intro}{fence}"


# ----- the command line


def _command_line() -> str:
    from trio_gateway._commands import app

    parts = ["# The command line", "What each command says of itself, asked while this was built."]
    for words in [(), *_commands(app)]:
        title = " ".join(("trio-gateway", *words))
        parts += [f"## `{title}`", f"```text\n{_help(words)}\n```"]
    return "\n\n".join(parts) + "\n"


def _commands(app: App, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name in app:
        if not name.startswith("-"):
            yield (*before, name)
            yield from _commands(app[name], (*before, name))


def _help(words: tuple[str, ...]) -> str:
    command = [sys.executable, "-m", "trio_gateway", *words, "--help"]
    plain = {"COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command, env=os.environ | plain, capture_output=True, text=True, check=True, timeout=60
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


if __name__ == "__main__":
    shutil.rmtree(COPIES, ignore_errors=True)
    copy_all()
