"""Finds the agent that `trio-gateway run` is to host: `bot.py:agent`, `package.module:agent`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from ._errors import AgentNotUsable, GatewayError


class AgentModuleFailed(GatewayError):
    """The module of the agent raised while it was imported; the text is its traceback."""


def load_agent(target: str) -> Any:
    """The object that `target` names. Its file's folder, or the current one, goes on `sys.path`.

    Raises `AgentNotUsable` when there is no such file, module or attribute, and
    `AgentModuleFailed` when the module itself raises.
    """
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise AgentNotUsable(
            f"{target!r} names no agent; write the file or module, a colon, and the name in it:"
            " bot.py:agent"
        )
    module = _load_file(Path(where)) if _is_file(where) else _load_module(where)
    return _find(module, where, name)


def _is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise AgentNotUsable(f"{path} {what}; name the file that has the agent, as bot.py:agent")
    file = path.resolve()
    sys.path.insert(0, str(file.parent))
    # Under its own name, so that what the file defines can be found again by module and name;
    # but a file called json.py must not become everybody's json.
    name = file.stem if file.stem not in sys.modules else f"agent_in_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise AgentNotUsable(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise AgentModuleFailed(_told(error, str(file))) from error
    return module


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise AgentNotUsable(
                f"there is no module {error.name!r} here or among the installed packages;"
                f" for a file write {name.replace('.', '/')}.py"
            ) from None
        raise AgentModuleFailed(_told(error, name)) from error
    except (Exception, SystemExit) as error:
        raise AgentModuleFailed(_told(error, name)) from error


def _told(error: BaseException, where: str) -> str:
    """The traceback from the agent's own module on, without the way to it."""
    trace = "".join(traceback.format_exception(type(error), error, _below(error.__traceback__)))
    return f"{where} cannot be imported\n{trace.rstrip()}"


def _below(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and _is_way(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace


def _is_way(filename: str) -> bool:
    return filename.startswith("<frozen importlib") or filename in (
        __file__,
        importlib.__file__,
    )


def _find(module: ModuleType, where: str, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise AgentNotUsable(f"{where} has no {name!r}; {_near(module, name)}")
        found = getattr(found, part)
    return found


def _near(module: ModuleType, name: str) -> str:
    own = [
        known
        for known, value in vars(module).items()
        if not known.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    near = difflib.get_close_matches(name, own, n=3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"it has {', '.join(own)}" if own else "it defines nothing"
