"""Docstrings as they are written here, made into what Sphinx reads.

    `name`          a link, where the name is public, or part of what is told about; else code
    an indented     paragraph stays as it is: code, or a table in letters
    `name`   text   a list, where the lines of a paragraph begin so

Types in signatures stand in private files; whoever reads is led to the public name.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from sphinx.pycode import ModuleAnalyzer

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

MODULES: Final = (
    "trio_gateway",
    "trio_gateway.agents",
    "trio_gateway.channels",
    "trio_gateway.channels.console",
    "trio_gateway.channels.jsonl",
    "trio_gateway.http",
    "trio_gateway.store",
    "trio_gateway.testing",
)
"""The front doors: what their `__all__` names is public, and is told about under the first one."""

NOT_CALLED: Final = (
    "trio_gateway._events.",
    "trio_gateway.Gateway",
    "trio_gateway.Question",
    "trio_gateway.Turn",
    "trio_gateway.store.Ledger",
    "trio_gateway.store.SqliteStore",
    "trio_gateway.store.StoreReader",
)
"""Classes whose objects come from elsewhere. (Of those that begin so, none is called.)"""

YIELDS: Final = re.compile(r"~?[\w.]*Generator\[(.+?)(?:, None)+\]")
CODE: Final = re.compile(r"(?<!`)`([^`]+)`(?!`)")
NAME: Final = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")
ENTRY: Final = re.compile(r"(`[\w.]+`)\s{2,}(\S.*)|(\w+\(\))\s{2,}(\S.*)")


def setup(app: Sphinx) -> dict[str, bool]:
    """Rewrite docstrings, and find public names."""
    app.connect("autodoc-process-docstring", _rewrite)
    app.connect("autodoc-process-signature", _as_it_is_used)
    app.connect("missing-reference", _find_public)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def public_names() -> dict[str, str]:
    """Where each public name is told about: `Turn` -> `trio_gateway.Turn`, and so is what its own
    file calls it, `trio_gateway._turns.Turn`."""
    found: dict[str, str] = {}
    for module in map(importlib.import_module, MODULES):
        for name in getattr(module, "__all__", ()):
            full = f"{module.__name__}.{name}"
            thing = getattr(module, name)
            home = _home(thing) or full
            told = found.get(home, full)
            for key in (home, full, name):
                found.setdefault(key, told)
    return found


def _home(thing: object) -> str | None:
    """Where a class or function of ours is written, by the name that signatures have for it."""
    module = str(getattr(thing, "__module__", ""))
    name = getattr(thing, "__qualname__", None)
    return f"{module}.{name}" if module.startswith("trio_gateway") and name else None


# ----- references


def _find_public(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, around: Element
) -> Element | None:
    if node.get("refdomain") != "py":
        return None
    target = str(node["reftarget"])
    public = _public(app)
    head, dot, tail = target, "", ""
    while head not in public and "." in head:
        head, _, last = head.rpartition(".")
        dot, tail = ".", f"{last}.{tail}".rstrip(".")
    if head not in public:
        return None
    domain = env.domains.python_domain
    told = f"{public[head]}{dot}{tail}"
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", told, node, around)


def _public(app: Sphinx) -> dict[str, str]:
    names: dict[str, str] | None = getattr(app, "_public_names", None)
    if names is None:
        names = public_names()
        app._public_names = names  # type: ignore[attr-defined]
    return names


# ----- docstrings


def _rewrite(
    app: Sphinx, what: str, name: str, _thing: object, _options: object, lines: list[str]
) -> None:
    public = _public(app)
    if what == "data":
        lines[:] = _told_where_it_is_written(name)

    def linked(found: re.Match[str]) -> str:
        target = _target(found[1], name, public) if NAME.fullmatch(found[1]) else None
        return f"``{found[1]}``" if target is None else f":py:obj:`{found[1]} <{target}>`"

    lines[:] = [line for block in _blocks(lines) for line in _told(block, linked)]


def _told_where_it_is_written(name: str) -> list[str]:
    """The docstring of a public value: it stands behind the value, in the private file that the
    front door imports it from. What its type says of itself is of no use to anybody."""
    module, _, short = name.rpartition(".")
    for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(module)))):
        if isinstance(node, ast.ImportFrom) and short in [alias.name for alias in node.names]:
            file = importlib.import_module("." * node.level + (node.module or ""), module)
            comments = ModuleAnalyzer.for_module(file.__name__).find_attr_docs()
            return list(comments.get(("", short), []))
    return list(ModuleAnalyzer.for_module(module).find_attr_docs().get(("", short), []))


def _as_it_is_used(
    _app: Sphinx, what: str, name: str, thing: object, _options: object, sig: str, ret: str | None
) -> tuple[str, str | None] | None:
    """Protocols, and classes whose objects are made by what their docstring names, are not called:
    their arguments are nobody's business. And a block is given what its function yields."""
    protocol = getattr(thing, "_is_protocol", False)
    if what == "class" and (name.startswith(NOT_CALLED) or protocol):
        return "", None
    yields = YIELDS.fullmatch(ret or "") if hasattr(thing, "__wrapped__") else None
    return None if yields is None else (sig, yields[1])


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def _told(block: list[str], linked: Any) -> list[str]:
    """One paragraph."""
    if all(line.startswith("  ") for line in block):
        flat = textwrap.dedent("\n".join(block)).splitlines()
        if ENTRY.fullmatch(flat[0]) is None:
            return ["::", "", *block, ""]
        block = flat
    text: list[str] = []
    for line in block:
        entry = ENTRY.fullmatch(line)
        if entry is not None:
            term, rest = entry[1] or f"`{entry[3]}`", entry[2] or entry[4]
            text += [term, f"    {rest}"]
        elif text and line.startswith("    ") and not text[-1].startswith("    "):
            text += ["", "::", "", line]
        else:
            text.append(f"    {line.strip()}" if _in_list(text) else line)
    return [*_code("\n".join(text), linked).split("\n"), ""]


def _in_list(text: list[str]) -> bool:
    return bool(text) and text[-1].startswith("    ")


def _code(text: str, linked: Any) -> str:
    return CODE.sub(linked, text)


def _target(text: str, told: str, public: dict[str, str]) -> str | None:
    """What `text` means in the docstring of `told`, if it is something public."""
    head = text.partition(".")[0]
    if head in public:
        return _existing(public[head], text)
    if told.rpartition(".")[2] == text:
        return None  # itself
    owner = told
    while owner.count(".") >= 1:
        if owner in public.values() and _existing(owner, f".{text}"):
            return f"{owner}.{text}"
        owner = owner.rpartition(".")[0]
    return None


def _existing(full: str, text: str) -> str | None:
    """`full` with what `text` says behind its first name, if there is such a thing and it has a
    docstring of its own, so that it is told about."""
    tail = text.partition(".")[2]
    module, _, name = full.rpartition(".")
    thing: Any = getattr(importlib.import_module(module), name, None)
    for part in filter(None, tail.split(".")):
        if not isinstance(thing, type) or part.startswith("_") or part not in vars(thing):
            return None
        thing = vars(thing)[part]
    return f"{full}.{tail}" if tail else full
