"""The rules of the house that can be read off the source: what may import what, and how long a
function may be. ARCHITECTURE.md says why."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

import trio_gateway

PACKAGE = Path(trio_gateway.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

LAYERS = (
    # From the top down. An import leads to a later layer, or stays in its own.
    ("__main__",),
    ("_cli", "_commands", "_operating", "_demo", "_demo_agent"),
    ("_top",),
    ("_operating_views", "_mending"),
    ("_views", "_doctor", "_install", "_host", "_loader"),
    ("_requests", "_control_socket", "_control_client"),
    ("_reload",),
    (
        "_allowance",
        "_logs",
        "_config",
        "_signals",
        "_supervisor",
        "_stall",
        "_tasktree",
        "_collector",
        "_activation",
    ),
    ("agents", "agents.*", "http", "http.*"),
    ("channels.*",),
    ("_gateway",),
    ("_recovery", "_shutdown", "_inbox"),
    ("_turns",),
    ("_agents", "_steps", "_outbox", "_waiters"),
    ("_links", "_sessions", "_stream", "_settings", "_tally", "_tracing", "_traces"),
    ("channels",),
    ("store",),
    ("_clock", "_policy", "_events", "_strangers", "_jsonable"),
    ("_markers", "_messages"),
    ("_control_address",),
    ("_control",),
    ("_errors",),
)
PURE = ("_markers", "_policy", "_messages", "_events", "_errors", "_control")
FLOW = ("_gateway", "_inbox", "_turns", "_steps", "_outbox", "_sessions", "_links", "_waiters",
        "_recovery", "_shutdown", "_agents", "_stream")  # fmt: skip
PROCESS = ("__main__", "_cli", "_commands", "_demo", "_demo_agent", "_views", "_doctor", "_host")


def name_of(source: Path) -> str:
    """The module's name within the package: `_turns`, `channels.jsonl`, `store`."""
    parts = source.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(source: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What a module imports when it runs: (module, names). Those of the package are written as
    within it, and the door itself as ""; what is there for type checkers only is left out."""
    tree = ast.parse(source.read_text())
    for_types = {id(node) for check in ast.walk(tree) if _is_type_checking(check)
                 for node in ast.walk(check)}  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _from(node, source)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _from(node: ast.ImportFrom, source: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    names = tuple(alias.name for alias in node.names)
    if not node.level:
        yield node.module or "", names
        return
    folder = source.relative_to(PACKAGE).parts[: -node.level]
    module = ".".join([*folder, *([node.module] if node.module else [])])
    for name in names:
        inner = f"{module}.{name}" if module else name
        is_module = any(name_of(other) == inner for other in SOURCES)
        yield (inner, ()) if is_module else (module, (name,))


def layer_of(module: str) -> int:
    """How far down a module is. All of the store is one layer, and so are all single channels."""
    folder, dot, _ = module.partition(".")
    if dot:
        module = "store" if folder == "store" else f"{folder}.*"
    (layer,) = (n for n, names in enumerate(LAYERS) if module in names)
    return layer


def own(source: Path) -> list[str]:
    """The modules of the package that a module imports."""
    known = {name_of(other) for other in SOURCES}
    return [module for module, _ in imports(source) if module in known or not module]


def in_house(source: Path) -> bool:
    """Whether a file has a layer: all but the door and the test bench."""
    return name_of(source) != "__init__" and not name_of(source).startswith("testing")


@pytest.mark.parametrize("source", [s for s in SOURCES if in_house(s)], ids=name_of)
def test_imports_point_down(source: Path) -> None:
    """A new file fails here until it is given its place in `LAYERS`."""
    module = name_of(source)

    for imported in own(source):
        assert layer_of(imported) >= layer_of(module), f"{module} imports {imported}"


@pytest.mark.parametrize("module", PURE)
def test_the_rules_are_pure(module: str) -> None:
    imported = {name.partition(".")[0] for name, _ in imports(PACKAGE / f"{module}.py")}

    assert not imported & {"trio", "trio_util", "apsw", "sqlite3", "time", "random", "os", "store"}


@pytest.mark.parametrize("source", sorted((PACKAGE / "channels").glob("*.py")), ids=name_of)
def test_channels_know_values_only(source: Path) -> None:
    known = [name for name in own(source) if not name.startswith("channels")]

    assert set(known) <= {"_messages", "_errors"}


@pytest.mark.parametrize("module", ["_shutdown", "_recovery"])
def test_the_story_knows_the_store_and_the_rules(module: str) -> None:
    rules = {
        "_errors",
        "_events",
        "_markers",
        "_messages",
        "_policy",
        "_settings",
        "_strangers",
        "store",
    }

    assert set(own(PACKAGE / f"{module}.py")) <= rules


@pytest.mark.parametrize("module", PROCESS)
def test_the_process_uses_what_any_host_could(module: str) -> None:
    for imported, names in imports(PACKAGE / f"{module}.py"):
        if imported in FLOW:
            assert set(names) <= set(trio_gateway.__all__), f"{module} imports {imported}: {names}"


@pytest.mark.parametrize("source", sorted((PACKAGE / "testing").glob("*.py")), ids=name_of)
def test_the_test_bench_uses_the_front_door(source: Path) -> None:
    for imported, names in imports(source):
        if imported in FLOW:
            raise AssertionError(f"imports {imported}")
        if not imported:
            assert set(names) <= set(trio_gateway.__all__)


def test_functions_are_small() -> None:
    lengths = {f"{name_of(source)}.{node.name}": _length(node)
               for source in SOURCES for node in ast.walk(ast.parse(source.read_text()))
               if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}  # fmt: skip

    assert {name: length for name, length in lengths.items() if length > 50} == {}
    assert statistics.median(lengths.values()) <= 7


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    body = function.body
    doc = ast.get_docstring(function, clean=False)
    lines = (function.end_lineno or 0) - function.lineno + 1
    return lines - (doc.count("\n") + 1 if doc is not None and body else 0)
