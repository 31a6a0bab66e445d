"""Agents that are programs: real processes, real pipes, a real store, real time."""

from __future__ import annotations

import inspect
import json
import os
import re
import resource
import signal
import sys
import textwrap
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import Log, Script, msg
from processes import COMPANY, launch, markers

from trio_gateway import (
    LOCAL,
    AgentNotUsable,
    Gateway,
    SessionKey,
    Settings,
    TurnState,
    open_gateway,
)
from trio_gateway._events import (
    AgentWrote,
    ProgressShown,
    TurnInterrupted,
    TurnSettled,
)
from trio_gateway.agents import DEFAULT_ENV, ProcessAgent, ProcessFailed
from trio_gateway.agents import process as module
from trio_gateway.agents._lines import FIELDS

PATIENCE = 20.0
"""Seconds that anything may take on a busy machine before a test fails."""

LIBRARY = """
import json, os, signal, subprocess, sys, time
def tell(event, **fields): print(json.dumps({"event": event} | fields), flush=True)
def hear(): return json.loads(sys.stdin.readline())
def pid(where, number):
    open(where + ".new", "w").write(str(number))
    os.rename(where + ".new", where)
turn = hear()
"""


def program(source: str, **options: Any) -> ProcessAgent:
    """An agent in Python that has read its turn, and can `tell` and `hear`."""
    text = LIBRARY + textwrap.dedent(source)
    return ProcessAgent([sys.executable, "-I", "-S", "-c", text], **options)


def shell(script: str, **options: Any) -> ProcessAgent:
    """An agent in POSIX sh that has not read its turn."""
    return ProcessAgent(["sh", "-c", textwrap.dedent(script)], **options)


class Hosted:
    """A gateway with a program in it."""

    def __init__(self, gateway: Gateway, log: Log) -> None:
        self.gateway = gateway
        self.log = log

    async def ask(self, text: str = "hi", session: str = "a") -> list[str]:
        """What is said to a message."""
        replies = await self.gateway.ask(msg(session, f"m{time.monotonic_ns()}", text))
        return [reply.text for reply in replies]

    async def error(self, text: str = "hi") -> str:
        """The error with which a turn fails."""
        before = len(self.log.of(TurnSettled))
        await self.ask(text)
        settled = self.log.of(TurnSettled)[before]
        assert settled.state is TurnState.FAILED
        assert settled.error is not None
        return settled.error


@asynccontextmanager
async def hosted(agent: ProcessAgent, where: Path, **settings: Any) -> AsyncGenerator[Hosted]:
    """A gateway on the store in `where`; nothing in the block may take longer than `PATIENCE`."""
    log = Log()
    store = where / "gateway.db"
    with trio.fail_after(PATIENCE):
        async with open_gateway(
            agent, store=store, settings=Settings(**settings), listen=log
        ) as gateway:
            yield Hosted(gateway, log)


def is_there(pid: int) -> bool:
    """Whether a process lives. One that nobody has reaped yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


async def _until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 - other processes set no event
            await trio.sleep(0.01)


class Pids:
    """The numbers of processes that programs wrote into files. Kills what is left of them."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.found: list[int] = []

    async def of(self, name: str) -> int:
        """The number in a file, once it is there."""
        await _until((self.where / name).exists)
        pid = int((self.where / name).read_text())
        self.found.append(pid)
        return pid

    async def wait_gone(self, *pids: int) -> None:
        """Wait until they are no more."""
        await _until(lambda: not any(map(is_there, pids)))


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Pids]:
    """The processes of a test; none is left after it."""
    found = Pids(tmp_path)
    yield found
    left = [pid for pid in found.found if is_there(pid)]
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left


# ----- the contract


async def test_a_program_is_told_its_turn_and_replies(tmp_path: Path) -> None:
    agent = program('tell("reply", text=json.dumps(turn))')
    async with hosted(agent, tmp_path) as house:
        (said,) = await house.ask("hello\0 \u2028é")
    told = json.loads(said)
    (message,) = told.pop("messages")
    assert message["id"].startswith("m")
    assert (message["text"], message["sender"]) == ("hello\0 \u2028é", None)
    assert told.pop("idempotency_key").endswith("-1-turn")
    assert told == {
        "event": "turn", "turn": 1, "session": "a", "channel": "local", "attempt": 1,
        "text": "hello\0 \u2028é", "resumed": None, "checkpoint": None,
    }  # fmt: skip


async def test_a_reply_may_be_null(tmp_path: Path) -> None:
    async with hosted(shell("""echo '{"event":"reply","text":null}'"""), tmp_path) as house:
        assert await house.ask() == []
        assert house.log.of(TurnSettled)[0].state is TurnState.COMPLETED


async def test_what_is_said_and_kept_is_acknowledged_after_the_commit(tmp_path: Path) -> None:
    agent = program("""
        tell("progress", text="thinking")
        tell("say", text="one")
        first = hear()
        tell("checkpoint", value={"at": 1})
        second = hear()
        tell("reply", text=json.dumps([first, second]))
    """)
    async with hosted(agent, tmp_path) as house:
        said, answers = await house.ask()
        assert house.log.of(ProgressShown)[0].text == "thinking"
    assert said == "one"
    assert json.loads(answers) == [
        {"event": "ok", "of": "say"},
        {"event": "ok", "of": "checkpoint"},
    ]


async def test_a_program_may_write_ahead_and_read_nothing(tmp_path: Path) -> None:
    agent = shell("""
        exec <&-
        n=0
        while [ $n -lt 20 ]; do echo '{"event":"say","text":"x"}'; n=$((n + 1)); done
        echo '{"event":"reply","text":"end"}'
    """)
    async with hosted(agent, tmp_path) as house:
        assert await house.ask("x" * 200_000) == ["x"] * 20 + ["end"]


async def test_a_step_is_run_by_the_program_and_remembered(tmp_path: Path) -> None:
    agent = program("""
        tell("step", name="buy")
        first = hear()
        tell("done", name="buy", result=[1, None])
        second = hear()
        tell("step", name="buy", effect="safe")    # the second of that name: another step
        third = hear()
        tell("done", name="buy")
        tell("reply", text=json.dumps([first, second, third, hear()]))
    """)
    async with hosted(agent, tmp_path) as house:
        (said,) = await house.ask()
    run, ok, again, ok_again = json.loads(said)
    assert run.pop("idempotency_key").endswith("-1-buy")
    assert run == {"event": "run", "name": "buy"}
    assert again["event"] == "run"
    assert ok == ok_again == {"event": "ok", "of": "step", "name": "buy"}


async def test_failed_fails_the_turn_with_its_words(tmp_path: Path) -> None:
    agent = program("""tell("failed", error="no \\x1b[31mmodel\\n today")""")
    async with hosted(agent, tmp_path) as house:
        error = await house.error()
    assert error == r"ProcessFailed: the program says that it failed: no \x1b[31mmodel\n today"


# ----- resuming


RESUMABLE = """
if turn["resumed"] is None:
    tell("step", name="think"); hear(); tell("done", name="think", result={"plan": 7}); hear()
    tell("step", name="charge", effect="unsafe"); hear()
    tell("checkpoint", value=["kept"]); hear()
    pid("ready", os.getpid())
    time.sleep(60)
tell("step", name="think")
thought = hear()
tell("step", name="charge", effect="unsafe")
charged = hear()
tell("reply", text=json.dumps([turn, thought, charged]))
"""


async def test_p08_a_stopped_turn_goes_on_with_what_its_program_has_done(
    tmp_path: Path, pids: Pids
) -> None:
    agent = program(RESUMABLE.replace('"ready"', repr(str(tmp_path / "ready"))))
    async with hosted(agent, tmp_path, grace=0.2, budget=8.0) as house:
        await house.gateway.accept(msg("a", "m1", "hi"))
        first = await pids.of("ready")
    assert len(house.log.of(TurnInterrupted)) == 1
    assert not is_there(first)

    async with hosted(agent, tmp_path) as house:
        (settled,) = await house.log.wait_for(TurnSettled)
        (reply,) = await house.gateway.ask(msg("a", "m1", "hi"))
    assert settled.state is TurnState.COMPLETED
    told, thought, charged = json.loads(reply.text)
    assert told["attempt"] == 2
    assert told["checkpoint"] == ["kept"]
    assert told["resumed"].keys() == {"reason", "at", "attempt"}
    assert (told["resumed"]["reason"], told["resumed"]["attempt"]) == ("shutdown", 1)
    assert thought == {"event": "remembered", "name": "think", "result": {"plan": 7}}
    assert charged == {"event": "in_doubt", "name": "charge"}


async def test_a_program_hears_that_the_gateway_drains_and_can_reply(
    tmp_path: Path, pids: Pids
) -> None:
    ready = str(tmp_path / "ready")
    agent = program(f"""
        pid({ready!r}, os.getpid())
        tell("reply", text=hear()["event"])
    """)
    async with hosted(agent, tmp_path) as house:
        await house.gateway.accept(msg("a", "m1"))
        await pids.of("ready")
    (settled,) = house.log.of(TurnSettled)
    assert settled.state is TurnState.COMPLETED
    async with open_gateway(Script(), store=tmp_path / "gateway.db") as gateway:
        (reply,) = await gateway.ask(msg("a", "m1"))
    assert reply.text == "draining"


# ----- the end of a process


STUBBORN = """
signal.signal(signal.SIGTERM, lambda *_: pid({where!r} + "/terminated", os.getpid()))
inner = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 60 & echo $! > {where}/sleep.new;"
    " mv {where}/sleep.new {where}/sleep; wait; sleep 60"])
pid({where!r} + "/inner", inner.pid)
pid({where!r} + "/own", os.getpid())
while True: time.sleep(60)
"""


async def test_cancelled_it_gets_sigterm_then_sigkill_and_its_children_too(
    tmp_path: Path, pids: Pids
) -> None:
    agent = program(STUBBORN.format(where=str(tmp_path)), grace=0.3)
    async with hosted(agent, tmp_path) as house:
        await house.gateway.accept(msg("a", "m1"))
        family = [await pids.of(name) for name in ("own", "inner", "sleep")]
        await house.gateway.stop_turn(SessionKey(LOCAL, "a"))
        await pids.of("terminated")
        await pids.wait_gone(*family)
        await _until(lambda: not house.gateway.turns())
    (settled,) = house.log.of(TurnSettled)
    assert settled.state is TurnState.STOPPED


async def test_the_time_limit_ends_the_process(tmp_path: Path, pids: Pids) -> None:
    agent = program(f"pid({str(tmp_path / 'own')!r}, os.getpid()); time.sleep(60)")
    async with hosted(agent, tmp_path, time_limit=2.0) as house:
        error = await house.error()
        assert error == "took longer than its time limit"
    await pids.wait_gone(await pids.of("own"))


async def test_a_cancellation_passes_through(tmp_path: Path, pids: Pids) -> None:
    """Whoever cancels the agent's call is the one who catches it: nothing else comes out of it."""
    agent = program(STUBBORN.format(where=str(tmp_path)), grace=0.2)
    outcome: list[str] = []

    async def wrapped(turn: Any) -> str:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def cancel() -> None:
                    for name in ("own", "inner", "sleep"):
                        await pids.of(name)
                    scope.cancel()

                nursery.start_soon(cancel)
                try:
                    await agent(turn)
                    outcome.append("returned")
                except trio.Cancelled:
                    outcome.append("cancelled")
                    raise
        return f"{outcome} {scope.cancelled_caught}"

    with trio.fail_after(PATIENCE):
        async with open_gateway(wrapped, store=tmp_path / "gateway.db") as gateway:
            (reply,) = await gateway.ask(msg("a", "m1"))
    assert reply.text == "['cancelled'] True"
    await pids.wait_gone(*[await pids.of(name) for name in ("own", "inner", "sleep")])


@pytest.mark.parametrize("after", [0.0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05])
async def test_cancelled_while_it_starts_it_leaves_nothing(
    after: float, tmp_path: Path, pids: Pids
) -> None:
    agent = program(f"pid({str(tmp_path / 'own')!r}, os.getpid()); time.sleep(60)")

    async def hasty(turn: Any) -> str:
        with trio.move_on_after(after) as scope:
            await agent(turn)
        return f"{scope.cancelled_caught}"

    with trio.fail_after(PATIENCE):
        async with open_gateway(hasty, store=tmp_path / "gateway.db") as gateway:
            (reply,) = await gateway.ask(msg("a", "m1"))
    assert reply.text == "True"
    assert not _children()
    if (tmp_path / "own").exists():
        assert not is_there(await pids.of("own"))


def _children() -> list[str]:
    """Guards that this process has not reaped."""
    found: list[str] = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            found += (task / "children").read_text().split()
    return [pid for pid in found if "_guard" in _command_of(pid)]


def _command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


async def test_a_program_that_lingers_after_its_reply_is_ended_and_the_reply_counts(
    tmp_path: Path, pids: Pids
) -> None:
    where = str(tmp_path)
    agent = program(
        f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pid({where!r} + "/own", os.getpid())
        tell("reply", text="done")
        print("this is not looked at", flush=True)
        time.sleep(60)
        """,
        grace=0.2,
    )
    async with hosted(agent, tmp_path) as house:
        assert await house.ask() == ["done"]
        assert not is_there(await pids.of("own"))


async def test_a_reply_counts_also_if_the_drain_ends_while_its_program_lingers(
    tmp_path: Path, pids: Pids
) -> None:
    agent = program(
        f"""
        tell("reply", text="done")
        sys.stdin.readline()
        pid({str(tmp_path / "own")!r}, os.getpid())
        time.sleep(60)
        """,
        grace=30.0,
    )
    async with hosted(agent, tmp_path, grace=0.1, budget=20.0) as house:
        await house.gateway.accept(msg("a", "m1"))
        own = await pids.of("own")
    assert not is_there(own)
    (settled,) = house.log.of(TurnSettled)
    assert settled.state is TurnState.COMPLETED


async def test_a_daemon_of_the_program_does_not_keep_the_turn_and_is_killed(
    tmp_path: Path, pids: Pids
) -> None:
    """It holds the pipes open, and (by `timeout`) is in a process group of its own."""
    agent = shell(f"""
        timeout 60 sleep 60 &
        echo $! > {tmp_path}/own.new; mv {tmp_path}/own.new {tmp_path}/own
        echo '{{"event":"reply","text":"done"}}'
    """)
    async with hosted(agent, tmp_path) as house:
        assert await house.ask() == ["done"]
    await pids.wait_gone(await pids.of("own"))


@pytest.mark.parametrize("blow", ["kill -KILL $PPID", "kill -STOP $PPID"])
async def test_whoever_does_away_with_the_guard_is_ended_all_the_same(
    blow: str, tmp_path: Path, pids: Pids, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAST", 0.3)
    agent = shell(
        f"""
        trap '' TERM
        echo $$ > {tmp_path}/own.new; mv {tmp_path}/own.new {tmp_path}/own
        {blow}
        echo '{{"event":"failed","error":"on purpose"}}'
        sleep 60
        """,
        grace=0.2,
    )
    async with hosted(agent, tmp_path) as house:
        assert "ProcessFailed" in await house.error()
        await pids.wait_gone(await pids.of("own"))


GATEWAY = """
from trio_gateway.agents import ProcessAgent
agent = ProcessAgent({command!r}, grace=60.0)
"""


def test_killed_with_9_a_gateway_leaves_no_process(tmp_path: Path) -> None:
    source = LIBRARY + STUBBORN.format(where=str(tmp_path))
    command = [sys.executable, "-I", "-S", "-c", source]
    with launch(tmp_path, GATEWAY.format(command=command)) as gateway:
        gateway.send("ada", "m1", "hello")
        family = [_pid_in(tmp_path / name) for name in ("own", "inner", "sleep")]
        assert all(map(is_there, family))
        gateway.kill()
        _wait(lambda: not any(map(is_there, family)))
    assert not (tmp_path / "terminated").exists()
    assert markers(tmp_path) == {"ada": ("RUNNING", None)}


def test_p11_a_stubborn_program_does_not_prolong_a_stop(tmp_path: Path) -> None:
    source = LIBRARY + STUBBORN.format(where=str(tmp_path))
    command = [sys.executable, "-I", "-S", "-c", source]
    with launch(tmp_path, GATEWAY.format(command=command), grace=0.2, budget=6.0) as gateway:
        gateway.send("ada", "m1", "hello")
        family = [_pid_in(tmp_path / name) for name in ("own", "inner", "sleep")]
        began = time.monotonic()
        assert gateway.stop() == 0
        assert time.monotonic() - began < 6.0 + COMPANY
        _wait(lambda: not any(map(is_there, family)))
    assert markers(tmp_path) == {"ada": ("RESUME_PENDING", "shutdown")}


def _pid_in(path: Path) -> int:
    _wait(path.exists)
    return int(path.read_text())


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ----- what goes wrong


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exit 3", "the program ended with exit code 3, without a reply; it wrote nothing to"),
        ("exit 0", "the program ended with exit code 0, without a reply"),
        ("kill -9 $$", "the program was killed by SIGKILL, without a reply"),
        ("kill -KILL $PPID; sleep 60", "was killed together with its guard, without a reply"),
        ("kill -9 0", "was killed together with its guard, without a reply"),
        (
            r"printf 'a\033[1mb\n\377 last\n' >&2; exit 1",
            r"the end of its standard error: a\x1b[1mb | \xff last",
        ),
        ("exec >&-; sleep 60", "closed its standard output without a reply, and did not end"),
        ("sleep 60 & exit 4", "the program ended with exit code 4, without a reply"),
    ],
)
async def test_an_end_without_a_reply_says_how(script: str, why: str, tmp_path: Path) -> None:
    async with hosted(shell(script, grace=1.5), tmp_path) as house:
        assert why in await house.error()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"hello", "line 2 of the program's output: not JSON: "),
        (b"\x00\xff\xfe\x80", "line 2 of the program's output: not JSON: "),
        (b"[1]", "expected an object such as"),
        (b"{}", "event: expected one of say, progress, checkpoint, step, done, reply, failed,"),
        (b'{"event":"shout","text":"x"}', 'got "shout"'),
        (b'{"event":["say"],"text":"x"}', 'got ["say"]'),
        (b'{"event":"say"}', "say: missing: text"),
        (b'{"event":"say","text":1}', "say: text: expected a string, got 1"),
        (b'{"event":"say","text":null}', "say: text: expected a string, got null"),
        (b'{"event":"say","text":"x","txet":"y"}', 'say: unknown: "txet"'),
        (b'{"event":"say","text":"\\ud800"}', "not JSON"),
        (b'{"event":"reply"}', "reply: missing: text"),
        (b'{"event":"step","name":"s","effect":"odd"}', "'safe', 'idempotent' or 'unsafe'"),
        (b'{"event":"step","name":""}', "name: must not be empty"),
        (b'{"event":"done","name":"s"}', "no step 's' is open: ask for it first"),
        (b'{"event":"step","name":"s"}\n{"event":"step","name":"s"}', "is not done yet"),
        (b"[" * 100_000, "not JSON"),
        (b"", "not JSON"),
    ],
)
async def test_p14_a_line_that_is_not_in_the_contract_costs_one_error(
    line: bytes, why: str, tmp_path: Path
) -> None:
    (tmp_path / "line").write_bytes(b'{"event":"progress","text":"x"}\n' + line + b"\n")
    agent = shell(f"read turn; cat {tmp_path}/line; sleep 60", grace=0.2)
    async with hosted(agent, tmp_path) as house:
        error = await house.error()
        assert why in error
        assert "of the program's output: " in error
        assert len(error) < 700
        assert error.isprintable()


async def test_a_line_without_an_end_costs_no_memory(tmp_path: Path) -> None:
    agent = shell("head -c 30000000 /dev/zero; echo", max_line=1000)
    async with hosted(agent, tmp_path) as house:
        error = await house.error()
    assert error.endswith("line 1 of the program's output: it is too long: 30000000 bytes")


async def test_a_flood_of_standard_error_is_bounded(tmp_path: Path) -> None:
    agent = shell("""
        read turn
        head -c 3000000 /dev/zero >&2
        yes noise | head -n 200000 >&2
        echo '{"event":"reply","text":"done"}'
    """)
    async with hosted(agent, tmp_path) as house:
        assert await house.ask() == ["done"]
        lines = [event.line for event in house.log.of(AgentWrote)]
    assert lines[0] == "(a line of 3000005 bytes)"
    assert len(lines) == module.LOGGED
    assert lines[-1] == f"(its lines from the {module.LOGGED}th on are not logged)"


async def test_answers_that_nobody_reads_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BACKLOG", 2000)
    agent = shell("""
        n=0
        while :; do echo '{"event":"checkpoint","value":1}'; done
    """, grace=0.2)  # fmt: skip
    async with hosted(agent, tmp_path) as house:
        assert "does not read its standard input, where 2000 bytes wait" in await house.error()


async def test_a_command_that_is_gone_fails_the_turn_with_one_line(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text('#!/bin/sh\necho \'{"event":"reply","text":"ok"}\'\n')
    tool.chmod(0o755)
    (tmp_path / "folder").mkdir()
    agent = ProcessAgent([str(tool)], cwd=tmp_path / "folder")
    async with hosted(agent, tmp_path) as house:
        assert await house.ask() == ["ok"]
        tool.write_text("no program at all\n")
        assert await house.error() == (
            f"ProcessFailed: {str(tool)!r} cannot be started: Exec format error"
        )
        tool.unlink()
        assert "cannot be started: No such file or directory" in await house.error()
        (tmp_path / "folder").rmdir()
        assert f"No such file or directory ({tmp_path}/folder)" in await house.error()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"command": "sh agent.sh"}, "command: expected a sequence of strings such as ['sh',"),
        ({"command": []}, "command: names no program"),
        ({"command": ["sh", 1]}, "command: expected a string without NUL, got 1"),
        ({"command": ["sh", "a\0"]}, "command: expected a string without NUL"),
        ({"command": ["no-such-program-here"]}, "'no-such-program-here' is not on the PATH"),
        ({"command": ["/no/such"]}, "command: there is no file /no/such"),
        ({"command": ["/etc/passwd"]}, "/etc/passwd is not executable"),
        ({"command": ["sh", "\ud800"]}, "command: expected a string without NUL"),
        ({"env": "PATH"}, "env: expected a sequence of strings"),
        ({"env": ["A=1"]}, "env: 'A=1' names no variable; values go into extra_env"),
        ({"extra_env": ["A"]}, "extra_env: expected a mapping"),
        ({"extra_env": {"A": 1}}, "extra_env 'A': expected a string without NUL, got 1"),
        ({"extra_env": {"": "1"}}, "extra_env: '' names no variable"),
        ({"cwd": "/no/such"}, "cwd: '/no/such' is no folder"),
        ({"cwd": 1}, "cwd: 1 is no folder"),
        ({"grace": 0}, "grace: expected a number of seconds above 0, got 0"),
        ({"grace": float("nan")}, "grace: expected a number of seconds above 0"),
        ({"grace": "5s"}, "grace: expected a number of seconds above 0, got '5s'"),
        ({"max_line": True}, "max_line: expected a number of bytes above 0, got True"),
    ],
)
def test_p14_an_argument_without_meaning_is_named(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(AgentNotUsable) as caught:
        ProcessAgent(**({"command": ["sh"]} | arguments))
    assert str(caught.value).startswith("ProcessAgent: ")
    assert why in str(caught.value)


# ----- what it sees of its host


async def test_only_what_is_allowed_of_the_environment_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOT_TOKEN", "secret")
    monkeypatch.setenv("SHARED", "yes")
    monkeypatch.delenv("TZ", raising=False)
    monkeypatch.setenv("LC_ALL", "C")
    agent = program(
        'tell("reply", text=open("/proc/self/environ", "rb").read().hex())',
        env=["PATH", "SHARED", "TZ"],
        extra_env={"MODE": "é"},
    )
    async with hosted(agent, tmp_path) as house:
        (said,) = await house.ask()
    seen = bytes.fromhex(said).decode().rstrip("\0").split("\0")
    assert sorted(seen) == ["MODE=é", f"PATH={os.environ['PATH']}", "SHARED=yes"]


async def test_it_has_no_descriptor_and_no_strange_signal_of_its_host(tmp_path: Path) -> None:
    agent = program("""
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        fds = sorted(int(name) for name in os.listdir("/proc/self/fd"))
        shell = subprocess.run(["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"],
            capture_output=True, text=True).stdout.split()
        tell("reply", text=json.dumps([fds, os.getcwd(), status["SigBlk"].strip(), shell]))
    """, cwd=tmp_path)  # fmt: skip
    async with hosted(agent, tmp_path) as house:
        (said,) = await house.ask()
    fds, cwd, blocked, shell_sees = json.loads(said)
    assert fds == [0, 1, 2, 3]  # the last is the one that lists them
    assert cwd == str(tmp_path)
    assert int(blocked, 16) == 0
    # Of the signals that have a name: the C library keeps one of those above them to itself.
    assert int(shell_sees[3], 16) & 0x7FFF_FFFF == 0


async def test_many_at_once_leave_no_descriptor_behind(tmp_path: Path) -> None:
    agent = program('tell("say", text="x"); hear(); tell("reply", text=turn["text"])')
    async with hosted(agent, tmp_path) as house:
        await house.ask()
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        async with trio.open_nursery() as nursery:
            for n in range(8):
                nursery.start_soon(house.ask, "hi", f"s{n}")
        assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208
    assert len(house.log.of(TurnSettled)) == 9
    assert {event.state for event in house.log.of(TurnSettled)} == {TurnState.COMPLETED}


async def test_a_host_with_many_descriptors_can_still_start_one(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1300
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip("the machine allows fewer")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        async with hosted(shell("""echo '{"event":"reply","text":"ok"}'"""), tmp_path) as house:
            with ExitStack() as stack:
                for _ in range(1100):
                    stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
                assert await house.ask() == ["ok"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_its_page_has_all_of_the_contract() -> None:
    page = (Path(__file__).parents[1] / "docs/process-agent.md").read_text()
    tables = re.findall(r"^\| `(\w+)` \|([^|]*)\|", page, re.M)
    rows = {name: re.findall(r"`(\w+)`", fields) for name, fields in tables}

    for event, fields in FIELDS.items():
        assert rows[event] == list(fields), event
        assert f'{{"event":"{event}",' in (module.__doc__ or "")
    assert rows["env"] == list(DEFAULT_ENV)
    arguments = inspect.signature(ProcessAgent).parameters
    assert list(arguments) == [name for name in rows if name in arguments]


def test_it_shows_its_command() -> None:
    assert repr(ProcessAgent(["sh", "x"])) == "ProcessAgent(['sh', 'x'])"
    assert issubclass(ProcessFailed, Exception)
