"""The program that an agent is: what is to be run, and the process that it becomes, with its guard.

See `process` for what the two talk about.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast

import attrs
import trio

from .._errors import AgentNotUsable, shown
from ._lines import ProcessFailed

LAST: Final = 2.0
"""Seconds that the kernel may take to end what was killed."""

_GUARD: Final = Path(__file__).with_name("_guard.py")


@attrs.frozen
class Spec:
    """What a `ProcessAgent` runs, and how."""

    command: tuple[str, ...]
    env: tuple[str, ...]
    extra_env: Mapping[str, str]
    cwd: str | None
    grace: float
    max_line: int

    def environment(self) -> dict[str, str]:
        """The program's environment, as of now."""
        return {k: os.environ[k] for k in self.env if k in os.environ} | dict(self.extra_env)


# ----- what was given


def checked_spec(
    command: object,
    env: object,
    extra_env: object,
    cwd: object,
    grace: object,
    max_line: object,
) -> Spec:
    """What was given, if it has a meaning, and the command is there. Raises `AgentNotUsable`."""
    spec = Spec(
        command=_checked_texts("command", command, "['sh', 'agent.sh']"),
        env=tuple(_checked_name("env", name) for name in _checked_texts("env", env, "['PATH']")),
        extra_env=_checked_variables(extra_env),
        cwd=_checked_folder(cwd),
        grace=_checked_number("grace", grace, "seconds"),
        max_line=math.ceil(_checked_number("max_line", max_line, "bytes")),
    )
    _check_startable(spec)
    return spec


def _checked_texts(what: str, given: object, example: str) -> tuple[str, ...]:
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise AgentNotUsable(
            f"ProcessAgent: {what}: expected a sequence of strings such as {example},"
            f" got {type(given).__name__} {shown(given)}"
        )
    texts = tuple(cast("Sequence[object]", given))
    for text in texts:
        _check_text(what, text)
    if what == "command" and not (texts and texts[0]):
        raise AgentNotUsable(f"ProcessAgent: command: names no program; write it as {example}")
    return cast("tuple[str, ...]", texts)


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str) or "\0" in text or not _has_bytes(text):
        raise AgentNotUsable(
            f"ProcessAgent: {what}: expected a string without NUL, got {shown(text)}"
        )


def _has_bytes(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _checked_name(what: str, name: str) -> str:
    if not name or "=" in name:
        raise AgentNotUsable(
            f"ProcessAgent: {what}: {shown(name)} names no variable; values go into extra_env"
        )
    return name


def _checked_variables(given: object) -> Mapping[str, str]:
    if not isinstance(given, Mapping):
        raise AgentNotUsable(
            "ProcessAgent: extra_env: expected a mapping such as {'MODE': 'fast'},"
            f" got {type(given).__name__}"
        )
    variables: dict[Any, Any] = dict(cast("Mapping[object, object]", given))
    for name, value in variables.items():
        _check_text("extra_env", name)
        _checked_name("extra_env", name)
        _check_text(f"extra_env {name!r}", value)
    return MappingProxyType(variables)


def _checked_folder(given: object) -> str | None:
    if given is None:
        return None
    told = shown(given)
    folder = os.fspath(cast("str", given)) if isinstance(given, str | os.PathLike) else None
    if folder is None or "\0" in folder or not Path(folder).is_dir():
        raise AgentNotUsable(f"ProcessAgent: cwd: {told} is no folder; create it first")
    return folder


def _checked_number(what: str, given: object, unit: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
        raise AgentNotUsable(
            f"ProcessAgent: {what}: expected a number of {unit} above 0, got {shown(given)}"
        )
    return given


def _check_startable(spec: Spec) -> None:
    name = spec.command[0]
    if "/" in name:
        path = Path(spec.cwd or ".", name)
        if not path.is_file():
            raise AgentNotUsable(f"ProcessAgent: command: there is no file {path}")
        if not os.access(path, os.X_OK):
            raise AgentNotUsable(
                f"ProcessAgent: command: {path} is not executable; chmod +x it, or put its"
                " interpreter before it"
            )
    elif shutil.which(name, path=spec.environment().get("PATH", os.defpath)) is None:
        raise AgentNotUsable(
            f"ProcessAgent: command: {name!r} is not on the PATH; install it, or write its path"
        )
    if not sys.executable:
        raise AgentNotUsable("ProcessAgent: needs a Python interpreter: sys.executable is empty")


# ----- the process


@attrs.define(eq=False)
class Process:
    """A program and its guard, with our ends of their pipes. `closing` closes all that are open."""

    guard: trio.Process
    lifeline: trio.socket.SocketType
    stdin: int
    stdout: int
    stderr: int
    closing: ExitStack
    closing_stdin: ExitStack
    exited: trio.Event = attrs.field(factory=trio.Event)
    code: int | None = None
    """The program's exit code, or minus the signal that killed it; None: the guard did not tell."""
    not_started: int | None = None
    _told: bytes = b""

    async def watch(self) -> None:
        """Listen to the guard until the program has ended."""
        while not self.exited.is_set():
            try:
                data = await self.lifeline.recv(100)
            except OSError:
                data = b""
            self._told += data
            if not data or (b"x" in self._told and self._told.endswith(b"\n")):
                self._note_end()

    def _note_end(self) -> None:
        for line in self._told.decode("ascii", "replace").splitlines():
            if line.startswith("e"):
                self.not_started = int(line[1:])
            elif line.startswith("x"):
                self.code = int(line[1:])
        self.exited.set()

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the program's group. The guard, which hears it too, is not reaped before
        the end, so that the group's number cannot be somebody else's."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.guard.pid, number)

    async def kill(self) -> None:
        """Kill all that is left, and wait until the guard is gone, twice `LAST` at the most."""
        if self._guard_is_dead():
            self.signal_group(signal.SIGKILL)  # somebody has killed it, and it nobody
        self.lifeline.close()
        with trio.move_on_after(LAST):
            await self.guard.wait()
            return
        self.signal_group(signal.SIGKILL)  # somebody has stopped it
        with trio.move_on_after(LAST):
            await self.guard.wait()

    def _guard_is_dead(self) -> bool:
        """Whether it is, or about to be, without reaping it: until then its group's number is
        taken."""
        if self.exited.is_set() and self.code is None:
            return True  # it has closed the lifeline, which comes before it is seen to be dead
        with suppress(ChildProcessError):
            how = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.guard.pid, how) is not None
        return False

    def how_it_ended(self) -> str:
        """In words, after `exited`."""
        if self.code is None:
            return "was killed together with its guard"
        if self.code >= 0:
            return f"ended with exit code {self.code}"
        try:
            return f"was killed by {signal.Signals(-self.code).name}"
        except ValueError:
            return f"was killed by signal {-self.code}"


async def start(spec: Spec) -> Process:
    """Start the guard, and it the program. Raises `ProcessFailed`."""
    await trio.lowlevel.checkpoint()
    with ExitStack() as ours, ExitStack() as theirs:
        try:
            pipes = _Pipes.make(ours, theirs)
            guard = await _start_guard(spec, pipes)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise ProcessFailed(
                f"{shown(spec.command[0])} cannot be started: {error.strerror}{where}"
            ) from error
        return Process(
            guard, trio.socket.from_stdlib_socket(pipes.lifeline),
            pipes.stdin, pipes.stdout, pipes.stderr,
            closing=ours.pop_all(), closing_stdin=pipes.closing_stdin,
        )  # fmt: skip


async def _start_guard(spec: Spec, pipes: _Pipes) -> trio.Process:
    lifeline = pipes.their_lifeline.fileno()
    # A cancellation comes before the kernel is asked, or not at all: what is started is returned.
    return await trio.lowlevel.open_process(
        _guarded(spec, lifeline),
        stdin=pipes.their_stdin,
        stdout=pipes.their_stdout,
        stderr=pipes.their_stderr,
        pass_fds=[lifeline],
        env=spec.environment(),
        cwd=spec.cwd,
        start_new_session=True,
    )


def _guarded(spec: Spec, lifeline: int) -> list[str]:
    locale = spec.environment().get("LC_CTYPE", "")
    return [sys.executable, "-I", "-S", str(_GUARD), str(lifeline), locale, *spec.command]


@attrs.frozen
class _Pipes:
    """Both ends of all pipes. None is inherited by any other process that is started meanwhile."""

    lifeline: socket.socket
    their_lifeline: socket.socket
    stdin: int
    closing_stdin: ExitStack
    their_stdin: int
    stdout: int
    their_stdout: int
    stderr: int
    their_stderr: int

    @classmethod
    def make(cls, ours: ExitStack, theirs: ExitStack) -> _Pipes:
        """Make them, and let the two stacks close them."""
        lifeline, their_lifeline = socket.socketpair()
        ours.enter_context(lifeline)
        theirs.enter_context(their_lifeline)
        closing_stdin = ours.enter_context(ExitStack())
        their_stdin, stdin = _pipe(theirs, closing_stdin)
        stdout, their_stdout = _pipe(ours, theirs)
        stderr, their_stderr = _pipe(ours, theirs)
        return cls(
            lifeline, their_lifeline,
            stdin, closing_stdin, their_stdin, stdout, their_stdout, stderr, their_stderr,
        )  # fmt: skip


def _pipe(reading: ExitStack, writing: ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for stack, fd in zip((reading, writing), ends, strict=True):
        stack.callback(os.close, fd)
    return ends
