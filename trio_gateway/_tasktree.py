"""Trio's tasks as a tree, each with the place where it waits."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType

import trio


def task_tree(root: trio.lowlevel.Task | None = None) -> str:
    """All tasks below `root` (default: all there are), one line each. In the event loop."""
    root = root or trio.lowlevel.current_root_task()
    return "\n".join(_lines(root, "")) if root is not None else "no task"


def _lines(task: trio.lowlevel.Task, indent: str) -> Iterator[str]:
    yield f"{indent}{_short(task.name)}  {_place(task)}".rstrip()
    for nursery in task.child_nurseries:
        for child in sorted(nursery.child_tasks, key=lambda child: child.name):
            yield from _lines(child, indent + "  ")


def _short(name: str) -> str:
    return name.replace(".<locals>", "")


def _place(task: trio.lowlevel.Task) -> str:
    """Where the task waits: the innermost line that is not Trio's own."""
    place = ""
    for frame, line in task.iter_await_frames():
        if not is_trios(frame):
            code = frame.f_code
            place = f"{code.co_name} ({code.co_filename}:{line})"
    return place


def is_trios(frame: FrameType) -> bool:
    """Whether it runs code of Trio itself."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "trio"
