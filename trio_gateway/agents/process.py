"""`ProcessAgent`: an agent in any language, as a child process; one for each attempt of a turn.

    agent = ProcessAgent(["sh", "agent.sh"])

One JSON object per line, UTF-8, over the process's standard input and output: the mirror of the
`jsonl` channel. The format is a contract; new fields may come.

To the process, first of all:

    {"event":"turn","turn":7,"session":"a","channel":"jsonl","attempt":1,"text":"hi",
     "messages":[{"id":"m1","text":"hi","sender":null}],"resumed":null,"checkpoint":null,
     "idempotency_key":"5f0c2a1e-7-turn"}

It is one line. `text` is the texts of `messages`, joined by newlines. In a resumed turn `resumed`
is {"reason":"crash","at":"2026-01-31T12:00:00+00:00","attempt":1}, and `checkpoint` the last value
that was kept.

From the process, and what it is answered; both sides may write ahead, and answers come in order:

    {"event":"say","text"}            {"event":"ok","of":"say"}            it is on disk
    {"event":"progress","text"}       nothing                              ephemeral
    {"event":"checkpoint","value"}    {"event":"ok","of":"checkpoint"}     it is on disk
    {"event":"step","name","effect"}  {"event":"run","name",
                                       "idempotency_key"}                  do it, then say done
                                      {"event":"remembered","name",
                                       "result"}                           it was done before
                                      {"event":"in_doubt","name"}          it may have been done
    {"event":"done","name","result"}  {"event":"ok","of":"step","name"}    it is on disk
    {"event":"reply","text"}          the end of its input                 settles the turn
    {"event":"failed","error"}        the end of its input                 the turn fails

`effect` is "safe", "idempotent" (if it is left out) or "unsafe", as for `Turn.step`, and so is the
rule for names: asked for again in the same attempt, a name is the next step of that name, so the
order of one name must be the same in every attempt. A step that is not `done` before the reply is
not remembered. `result` may be left out, and a reply's `text` may be null. What comes after the
reply is not looked at. Once, while the gateway drains: {"event":"draining"}. Finish soon, or save a
checkpoint.

What is not in the contract (no JSON, an unknown event or field, a wrong type, a line longer than
`max_line`) fails the turn with one error that names the line. So does an end without a reply, with
the exit code or signal, and the last lines of standard error. Those lines go to the log
(`agent_wrote`), with control characters made visible, up to `LOGGED` lines of up to
`LONGEST_ERROR_LINE` bytes in one attempt.

No process is left behind. The program runs in a session and process group of its own, below a
guard: a small Python process whose only business is that it kills all of that session when the
gateway closes a socket, or when the kernel does that for a gateway that was killed (`kill -9`,
too). It asks no thread and no signal of the gateway, and covers children and grandchildren; where
the system has a /proc also those that made a process group of their own (`timeout`, a shell with
job control). Not covered: a program that calls `setsid` to become a daemon; gateway and guard
killed in one instant (then the end of its standard input is the sign); a host that forks without
`exec` and leaves such a child behind.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from select import POLLIN, poll
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, cast

import attrs
import trio

from .._errors import ChannelEnded, StepInDoubt, escape, parted, shown, unwrap
from .._events import AgentWrote
from .._steps import Effect
from ..channels._fds import FdWriter, Line, LineReader
from ._lines import ProcessFailed, broken, dump, opening, read_line, short
from ._program import LAST, Process, Spec, checked_spec, start

if TYPE_CHECKING:
    from .._turns import Turn

DEFAULT_ENV: Final = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR",
)  # fmt: skip
"""Variables of the gateway's environment that the program sees unless told otherwise."""

MAX_LINE: Final = 1024 * 1024
"""Bytes of one line of the program's standard output at the most, unless told otherwise."""

LOGGED: Final = 1000
"""Lines of standard error that are logged in one attempt."""

LONGEST_ERROR_LINE: Final = 4096
"""Bytes of one line of standard error; of a longer one only the length is told."""

BACKLOG: Final = 1024 * 1024
"""Bytes of answers that wait for a program that does not read them."""

HASTE: Final = 0.5
"""Seconds between SIGTERM and SIGKILL at the most, once the gateway drains: it has little time."""

AFTERWARDS: Final = 1.0
"""Seconds that a line may take to be complete whose program has ended."""

_TAIL: Final = 5
"""Lines of standard error that an error ends with."""


class ProcessAgent:
    """An agent that is a program: give an instance to `open_gateway`, or to `trio-gateway run`.

    `command`: the program and its arguments; no shell is involved. `env`: names of variables that
    are passed on from the gateway's environment, where they are set; nothing else is. `extra_env`:
    variables of the program's own. `cwd`: the folder that it starts in; None: the gateway's.
    `grace`: seconds that it has to end, after its reply, and between SIGTERM and SIGKILL.
    `max_line`: bytes of one line of its output at the most.

    Raises `AgentNotUsable` for an argument that has no meaning, and for a command that is not
    there. Called with a turn, it returns the reply, or raises `ProcessFailed`. Cancelled, it closes
    the program's standard input, sends SIGTERM to its process group, and SIGKILL after `grace`
    seconds (`HASTE` in a stop); only then does the cancellation go on. The turn settles when the
    process has ended; once there is a reply, waiting for that cannot be cancelled: it counts.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Sequence[str] = DEFAULT_ENV,
        extra_env: Mapping[str, str] = MappingProxyType({}),
        cwd: str | os.PathLike[str] | None = None,
        grace: float = 5.0,
        max_line: int = MAX_LINE,
    ) -> None:
        self._spec = checked_spec(command, env, extra_env, cwd, grace, max_line)

    def __repr__(self) -> str:
        return f"ProcessAgent({list(self._spec.command)!r})"

    async def __call__(self, turn: Turn) -> str | None:
        """Run the program once for this attempt; return its reply."""
        process = await start(self._spec)
        conversation = _Conversation(self._spec, process, turn)
        try:
            return await conversation.hold()
        finally:
            with trio.move_on_after(2 * self._spec.grace + 3 * LAST, shield=True):
                await conversation.end()


class _Source:
    """Lines from one of the program's pipes, until it is closed, or the program has ended and what
    it wrote was read: somebody else may have inherited the pipe, and keep it open."""

    def __init__(self, fd: int, max_line: int, exited: trio.Event) -> None:
        self._reader = LineReader(fd, max_line)
        self._exited = exited
        self._scope = trio.CancelScope()
        self._poll = poll()
        self._poll.register(fd, POLLIN)

    async def next_lines(self) -> tuple[Line, ...]:
        """All lines that are there, at least one; none at the end."""
        while not self._exited.is_set():
            with trio.CancelScope() as self._scope:
                return await self._reader.receive()
        if self._poll.poll(0):
            with trio.move_on_after(AFTERWARDS):  # it may be half a line, and the rest never come
                return await self._reader.receive()
        return ()

    def program_has_ended(self) -> None:
        """Wait for nothing more than what is there."""
        self._scope.cancel(reason="the program has ended")

    async def discard(self) -> None:
        """Read to the end, so that the program need not wait for room."""
        while await self.next_lines():
            pass


class _Answers:
    """Lines on their way to the program. One that does not read them makes nobody wait."""

    def __init__(self, process: Process, opening: dict[str, Any]) -> None:
        self._process = process
        self._writer = FdWriter(process.stdin, "the program's standard input")
        self._lines: deque[bytes] = deque()
        self._news = trio.Event()
        self._closed = False
        self._finished = False
        self._put(first := dump(opening))
        self._room = len(first) + BACKLOG

    def put(self, **answer: Any) -> None:
        """Send one. Raises `ProcessFailed` when too much of what was sent is not read."""
        self._put(line := dump(answer))
        self._room = self._room - len(line) if self._lines else BACKLOG
        if self._room < 0:
            raise ProcessFailed(
                f"the program does not read its standard input, where {BACKLOG} bytes wait"
            )

    def _put(self, line: bytes) -> None:
        if not self._closed and (self._lines or not self._writer.write_nowait(line)):
            self._lines.append(line)
        self._news.set()  # also for the rest of a line that had not room enough

    def finish(self) -> None:
        """Nothing more will come: close the program's standard input when it has all."""
        self._finished = True
        self._news.set()

    async def write(self) -> None:
        """Write what has to wait, until there is nothing more."""
        while True:
            self._news = trio.Event()
            try:
                await self._writer.write(b"")
                while self._lines:
                    await self._writer.write(self._lines.popleft())
            except (ChannelEnded, OSError):
                self._closed = True  # it does not want to know: what it says counts all the same
                self._lines.clear()
            if self._finished:
                self._process.closing_stdin.close()
                return
            await self._news.wait()


# ----- the conversation


@attrs.define(eq=False)
class _OpenStep:
    """A step that the program was asked to do."""

    answered: trio.Event = attrs.field(factory=trio.Event)
    done: trio.Event = attrs.field(factory=trio.Event)
    over: trio.Event = attrs.field(factory=trio.Event)
    asked: bool = False
    result: object = None


class _Conversation:
    """One attempt: what the program says is done in the order in which it was said."""

    def __init__(self, spec: Spec, process: Process, turn: Turn) -> None:
        self._spec = spec
        self._process = process
        self._turn = turn
        self._out = _Source(process.stdout, spec.max_line, process.exited)
        self._err = _Source(process.stderr, LONGEST_ERROR_LINE, process.exited)
        self._err_over = trio.Event()
        self._logged = 0
        self._tail: deque[str] = deque(maxlen=_TAIL)
        self._steps: dict[str, _OpenStep] = {}
        self._replied = False
        self._reply: str | None = None

    async def hold(self) -> str | None:
        """Talk until the reply, and return it. Raises `ProcessFailed`."""
        self._answers = _Answers(self._process, opening(self._turn))
        try:
            async with trio.open_nursery() as nursery:
                self._attend(nursery)
                nursery.start_soon(self._answers.write)
                nursery.start_soon(self._tell_draining)
                await self._listen(nursery)
                nursery.cancel_scope.cancel(reason="the program has replied")
        except BaseExceptionGroup as group:
            raise _only(group) from None
        return self._reply

    def _attend(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._process.watch)
        nursery.start_soon(self._note_exit)
        nursery.start_soon(self._log_errors)

    async def _note_exit(self) -> None:
        await self._process.exited.wait()
        self._out.program_has_ended()
        self._err.program_has_ended()

    async def _tell_draining(self) -> None:
        await self._turn.draining.wait_value(True)
        self._answers.put(event="draining")

    async def _listen(self, nursery: trio.Nursery) -> None:
        while lines := await self._out.next_lines():
            for line in lines:
                await self._obey(line, nursery)
                if self._replied:
                    return
        raise await self._no_reply()

    async def _no_reply(self) -> ProcessFailed:
        """What to say of a program that has said all that it will."""
        with trio.move_on_after(self._spec.grace):
            await self._process.exited.wait()
            await self._err_over.wait()
        if self._process.not_started is not None:
            why = os.strerror(self._process.not_started)
            return ProcessFailed(f"{shown(self._spec.command[0])} cannot be started: {why}")
        if self._process.exited.is_set():
            how = f"the program {self._process.how_it_ended()}, without a reply"
        else:
            how = "the program closed its standard output without a reply, and did not end"
        return ProcessFailed(f"{how}; {self._last_words()}")

    def _last_words(self) -> str:
        if not self._tail:
            return "it wrote nothing to standard error"
        return "the end of its standard error: " + " | ".join(self._tail)

    # ----- what the program says

    async def _obey(self, line: Line, nursery: trio.Nursery) -> None:
        event, fields = read_line(line)
        match event:
            case "say":
                await self._turn.say(fields["text"])
                self._answers.put(event="ok", of="say")
            case "progress":
                self._turn.progress(fields["text"])
            case "checkpoint":
                await self._turn.checkpoint(fields["value"])
                self._answers.put(event="ok", of="checkpoint")
            case "step":
                await self._begin_step(line, fields, nursery)
            case "done":
                await self._end_step(line, fields)
            case "reply":
                self._replied, self._reply = True, fields["text"]
            case _:
                raise ProcessFailed(f"the program says that it failed: {escape(fields['error'])}")

    async def _begin_step(self, line: Line, fields: dict[str, Any], nursery: trio.Nursery) -> None:
        name, effect = fields["name"], fields.get("effect", Effect.IDEMPOTENT)
        if not name or effect not in set(Effect):
            raise broken(line, "name: must not be empty, effect: 'safe', 'idempotent' or 'unsafe'")
        if name in self._steps:
            raise broken(line, f"step {escape(name)!r} is not done yet: say done first")
        step = self._steps[name] = _OpenStep()
        nursery.start_soon(self._step, step, name, effect)
        await step.answered.wait()

    async def _step(self, step: _OpenStep, name: str, effect: str) -> None:
        """One step, as long as it takes."""

        async def by_the_program() -> Any:
            step.asked = True
            key = self._turn.idempotency_key(name)
            self._answers.put(event="run", name=name, idempotency_key=key)
            step.answered.set()
            await step.done.wait()
            return step.result

        try:
            result = await self._turn.step(by_the_program, name=name, effect=effect)
        except StepInDoubt:
            self._answers.put(event="in_doubt", name=name)
        else:
            if step.asked:
                self._answers.put(event="ok", of="step", name=name)
            else:
                self._answers.put(event="remembered", name=name, result=result)
        del self._steps[name]
        step.answered.set()
        step.over.set()

    async def _end_step(self, line: Line, fields: dict[str, Any]) -> None:
        step = self._steps.get(fields["name"])
        if step is None:
            raise broken(line, f"no step {escape(fields['name'])!r} is open: ask for it first")
        step.result = fields.get("result")
        step.done.set()
        await step.over.wait()

    # ----- what it writes to standard error

    async def _log_errors(self) -> None:
        while lines := await self._err.next_lines():
            for line in lines:
                self._log(line)
        self._err_over.set()

    def _log(self, line: Line) -> None:
        text = f"(a line of {line.size} bytes)"
        if line.data is not None:
            text = escape(line.data.decode(errors="backslashreplace"))
        self._tail.append(short(text))
        self._logged += 1
        if self._logged == LOGGED:
            text = f"(its lines from the {LOGGED}th on are not logged)"
        turn, events = self._turn, self._turn._desk.events
        if self._logged <= LOGGED and events.heard:
            events.emit(
                AgentWrote(session=turn.session, turn=turn.id, attempt=turn.attempt, line=text)
            )

    # ----- the end

    async def end(self) -> None:
        """Leave nothing of the program behind. Takes `grace` seconds twice at the most (after a
        reply, and after SIGTERM), and `LAST` twice; cannot be cancelled."""
        process = self._process
        try:
            with trio.CancelScope(shield=True):  # each wait inside has its own bound
                if not process.exited.is_set():
                    await self._wind_down()
                await process.kill()
        finally:
            process.closing.close()

    async def _wind_down(self) -> None:
        async with trio.open_nursery() as nursery:
            self._attend(nursery)
            nursery.start_soon(self._out.discard)
            if self._replied:
                self._answers.finish()
                nursery.start_soon(self._answers.write)
                await self._wait_exit()
            else:
                self._process.closing_stdin.close()
            if not self._process.exited.is_set():
                self._process.signal_group(signal.SIGTERM)
                await self._wait_exit()
            nursery.cancel_scope.cancel(reason="the program has ended, or is killed")

    async def _wait_exit(self) -> None:
        """Wait for the program's end, `grace` seconds at the most; less once the gateway drains."""
        with trio.move_on_after(self._spec.grace) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hurry, scope)
                await self._process.exited.wait()
                nursery.cancel_scope.cancel()

    async def _hurry(self, scope: trio.CancelScope) -> None:
        await self._turn.draining.wait_value(True)
        scope.deadline = min(scope.deadline, trio.current_time() + HASTE)


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What came out of a nursery, as one error where it is one. Several tasks were cancelled: one
    cancellation, which counts more than an error that they met on the way."""
    cancelled, rest = parted(group, trio.Cancelled)
    if cancelled is None or not (rest is None or isinstance(rest, Exception)):
        return unwrap(group)
    while isinstance(cancelled, BaseExceptionGroup):
        cancelled = cast("BaseExceptionGroup[BaseException]", cancelled).exceptions[0]
    return cancelled
