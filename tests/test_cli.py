"""The command line as a person or a script meets it. What hosts something is a real process; what
only reads is called here, too, to look at more of it in less time."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio

from trio_gateway import AgentNotUsable, Delivery, Message, Turn, Undeliverable, open_gateway
from trio_gateway._allowance import (
    SYSTEMCTL_PATIENCE,
    Unit,
    parse_timespan,
    unit_in,
    warnings_at_start,
)
from trio_gateway._cli import main
from trio_gateway._config import Config
from trio_gateway._doctor import examine
from trio_gateway._loader import AgentModuleFailed, load_agent
from trio_gateway.store._sqlite import lock_store
from trio_gateway.testing import MemoryChannel

PATIENCE = 30.0
"""Seconds that a process may take on a busy machine."""

ECHO = """
async def agent(turn):
    return turn.text

async def other(turn):
    return "other"
"""

KILLER = """
import os
async def agent(turn):
    os.abort()
"""

SLOW = """
import trio
async def agent(turn):
    if turn.resumed is None:
        await trio.sleep(60)
    return "resumed: " + turn.text
"""


# ----- a store to look at

LONG_TEXT = "a very long text " * 50
EVIL_TEXT = "first\nsecond \x1b[31mred\x1b[0m \u202eright to left [bold]x[/bold]"


async def think() -> None:
    """A step that returns nothing."""
    await trio.lowlevel.checkpoint()


async def talk(turn: Turn) -> str:
    """Answer; do a step for whoever asks for one; fail when told to."""
    if turn.text == "fail":
        raise RuntimeError("the reason is not for the sender")
    if turn.text == "step":
        await turn.step(think)
    return f"about {turn.text}"


async def refuse_blocked(delivery: Delivery) -> None:
    """The platform says no to one session."""
    await trio.lowlevel.checkpoint()
    if delivery.session.name == "blocked":
        raise Undeliverable("blocked by the user")


async def fill(path: Path) -> None:
    """Several sessions, one failed turn, one dead letter."""
    chat = MemoryChannel("chat")
    chat.before_send = refuse_blocked
    messages = [
        Message(channel="chat", session="ada", id="m1", text="hello"),
        Message(channel="chat", session="ada", id="m2", text="step"),
        Message(channel="chat", session="bob: /x", id="m3", text="fail"),
        Message(channel="chat", session="long", id="m4", text=LONG_TEXT),
        Message(channel="chat", session="evil", id="m5", text=EVIL_TEXT),
        Message(channel="chat", session="blocked", id="m6", text="hi"),
        Message(channel="local", session="ada", id="m7", text="same name, other channel"),
        Message(channel="local", session="only-here", id="m1", text="same id, other channel"),
    ]
    async with open_gateway(talk, store=path, channels=[chat]) as gateway:
        await gateway.accept(messages)
        await gateway.wait_idle()


@pytest.fixture(scope="module", name="filled")
def _filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("filled") / "bot.db"
    trio.run(fill, path)
    return path


class Shell:
    """Calls the command line in this process, in a folder of its own."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.err = ""

    def __call__(self, *words: str, code: int = 0) -> str:
        """What it wrote to standard output, after the exit code was checked."""
        got = main(words)
        told = self._capsys.readouterr()
        self.err = told.err
        assert got == code, told
        assert "Traceback" not in told.err
        return told.out

    def json(self, *words: str, code: int = 0) -> Any:
        """The one JSON document that it wrote."""
        return json.loads(self(*words, "--json", code=code))


@pytest.fixture(name="shell")
def _shell(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Shell:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TRIO_GATEWAY_")]:
        monkeypatch.delenv(name)
    return Shell(capsys)


# ----- real processes


def trio_gateway(*words: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line as a process."""
    return subprocess.run(
        [sys.executable, "-m", "trio_gateway", *words],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def write(path: Path, source: str) -> Path:
    path.write_text(textwrap.dedent(source), "utf-8")
    return path


def line(session: str, message_id: str, text: str = "hi") -> str:
    return json.dumps({"session": session, "id": message_id, "text": text}) + "\n"


def events(output: str, event: str) -> list[dict[str, Any]]:
    return [one for one in map(json.loads, output.splitlines()) if one["event"] == event]


@contextmanager
def running(*words: str, cwd: Path) -> Generator[subprocess.Popen[str]]:
    """A gateway process that is gone after the block. Its log is JSON, on standard error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trio_gateway", "run", *words],
        cwd=cwd,
        env=os.environ | {"TRIO_GATEWAY_LOG__FORMAT": "json"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


def wait_for(process: subprocess.Popen[str], event: str) -> dict[str, Any]:
    """Read its log up to an event of that name."""
    assert process.stderr is not None
    for told in process.stderr:
        record: dict[str, Any] = json.loads(told)
        if record["event"] == event:
            return record
    raise AssertionError(f"the log ended without {event}")


# ----- run


def test_run_hosts_an_agent_over_jsonl(tmp_path: Path) -> None:
    write(tmp_path / "bot.py", ECHO)
    done = trio_gateway("run", "bot.py:agent", "--jsonl", cwd=tmp_path, stdin=line("a", "m1"))
    assert done.returncode == 0, done.stderr
    (reply,) = events(done.stdout, "reply")
    assert (reply["session"], reply["in_reply_to"], reply["text"]) == ("a", ["m1"], "hi")
    log = [json.loads(told) for told in done.stderr.splitlines()]
    assert {"gateway_started", "turn_begun", "turn_settled"} <= {one["event"] for one in log}
    assert "text" not in {field for one in log for field in one}
    assert (tmp_path / "gateway.db").exists()


def test_run_answers_a_line_that_is_piped_into_it(tmp_path: Path) -> None:
    write(tmp_path / "bot.py", ECHO)
    done = trio_gateway("run", "bot.py:agent", "--session", "ada", cwd=tmp_path, stdin="hello\n")
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    log = [json.loads(told) for told in done.stderr.splitlines()]
    assert {one["session"] for one in log if "session" in one} == {"console:ada"}


@pytest.mark.parametrize("target", ["./bot.py:agent", "package.inner:Things.agent"])
def test_run_finds_the_agent_by_file_or_module(tmp_path: Path, target: str) -> None:
    write(tmp_path / "bot.py", "from helper import agent\n")
    write(tmp_path / "helper.py", "from package.inner import Things\nagent = Things.agent\n")
    (tmp_path / "package").mkdir()
    write(
        tmp_path / "package" / "inner.py",
        "class Things:\n    @staticmethod\n    def agent(turn): return 'found'\n",
    )
    done = trio_gateway("run", target, "--jsonl", cwd=tmp_path, stdin=line("a", "m1"))
    assert done.returncode == 0, done.stderr
    assert events(done.stdout, "reply")[0]["text"] == "found"


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("bot.py:agnet", "bot.py has no 'agnet'; did you mean agent?"),
        (
            "bot.py:__name__",
            "'str' object is no agent: give an async function of one argument (the turn), a plain"
            " one, or an async context manager that yields one",
        ),
    ],
)
def test_p14_an_agent_that_is_not_there_is_exit_78(tmp_path: Path, target: str, told: str) -> None:
    write(tmp_path / "bot.py", ECHO)
    done = trio_gateway("run", target, "--jsonl", "--log-level", "error", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == f"trio-gateway: {told}\n"


@pytest.fixture(name="_own_imports")
def _own_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test imports is forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


UNUSABLE = {
    "bot.py": "'bot.py' names no agent; write the file or module, a colon, and the name in it:"
    " bot.py:agent",
    ":agent": "':agent' names no agent; write the file or module, a colon, and the name in it:"
    " bot.py:agent",
    "nope.py:agent": "nope.py does not exist; name the file that has the agent, as bot.py:agent",
    "./:agent": ". is no file; name the file that has the agent, as bot.py:agent",
    "nope.inner:agent": "there is no module 'nope' here or among the installed packages;"
    " for a file write nope/inner.py",
    "bot.py:xyz": "bot.py has no 'xyz'; it has agent, other",
    "bot.py:agent.inner": "bot.py has no 'agent.inner'; did you mean agent?",
    "empty.py:agent": "empty.py has no 'agent'; it defines nothing",
}


@pytest.mark.parametrize("target", UNUSABLE)
@pytest.mark.usefixtures("_own_imports")
def test_p14_an_agent_that_is_not_there_is_named(tmp_path: Path, target: str) -> None:
    write(tmp_path / "bot.py", ECHO)
    write(tmp_path / "empty.py", "")
    with pytest.raises(AgentNotUsable) as caught:
        load_agent(target)
    assert str(caught.value) == UNUSABLE[target]


@pytest.mark.parametrize("target", ["raising.py:agent", "raising:agent"])
@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def (", "SyntaxError: invalid syntax"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
@pytest.mark.usefixtures("_own_imports")
def test_p14_an_agent_module_that_raises_is_told_with_its_own_frames(
    tmp_path: Path, target: str, source: str, told: str
) -> None:
    write(tmp_path / "raising.py", source)
    with pytest.raises(AgentModuleFailed) as caught:
        load_agent(target)
    lines = str(caught.value).splitlines()
    assert lines[-1] == told
    assert any(f'File "{tmp_path}/raising.py", line 1' in one for one in lines)
    assert not any("importlib" in one or "_loader" in one for one in lines)


def test_p14_an_agent_module_that_raises_is_exit_1_and_tells_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOT_TOKEN", "hunter2-hunter2")
    write(tmp_path / "bot.py", "import os\nraise ValueError(os.environ['BOT_TOKEN'] + ' is bad')\n")
    done = trio_gateway("run", "bot.py:agent", "--jsonl", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("trio-gateway: ValueError: [secret] is bad\n")


def test_a_file_that_is_called_like_a_module_does_not_replace_it(tmp_path: Path) -> None:
    source = "import json\nassert json.loads('1') == 1\nasync def agent(turn): return 'fine'\n"
    write(tmp_path / "sub.py", "")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "trio.py", source)
    done = trio_gateway(
        "run", "folder/trio.py:agent", "--jsonl", cwd=tmp_path, stdin=line("a", "m")
    )
    assert done.returncode == 0, done.stderr
    assert events(done.stdout, "reply")[0]["text"] == "fine"


def test_p14_a_configuration_that_cannot_be_used_is_exit_78(tmp_path: Path) -> None:
    write(tmp_path / "bot.py", ECHO)
    write(tmp_path / "gateway.toml", "[drain]\ngrace = 30\nbudgte = 1\n")
    done = trio_gateway("run", "bot.py:agent", "--jsonl", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.splitlines() == [
        'trio-gateway: drain.grace: expected a duration like "30s", got 30 (gateway.toml)',
        "trio-gateway: drain.budgte: unknown key; did you mean budget? (gateway.toml)",
    ]


def test_run_takes_its_options_before_the_file(tmp_path: Path) -> None:
    write(tmp_path / "bot.py", ECHO)
    write(
        tmp_path / "other.toml",
        '[store]\npath = "from-the-file.db"\n[drain]\ngrace = "1s"\nbudget = "2s"\n[log]\n'
        'level = "debug"\n[limits]\nmessage_bytes = 10\n',
    )
    done = trio_gateway(
        *("run", "bot.py:agent", "--jsonl", "--config", "other.toml", "--store", "mine.db"),
        *("--grace", "9s", "--budget", "10s", "--log-level", "warning"),
        cwd=tmp_path,
        stdin=line("a", "m1", "more than ten bytes"),
    )
    assert done.returncode == 0, done.stderr
    assert len(events(done.stdout, "refused")) == 1
    assert (tmp_path / "mine.db").exists()
    assert not (tmp_path / "from-the-file.db").exists()
    log = [json.loads(told) for told in done.stderr.splitlines()]
    assert {one["level"] for one in log} <= {"warning", "error", "critical"}
    assert any("does not fit into drain.budget 10s" in one.get("warning", "") for one in log)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run"], "requires an argument"),
        (["run", "b:a", "--bogus"], "Unknown option"),
        (["run", "b:a", "--grace", "20"], 'expected a duration like "30s"'),
        (["run", "b:a", "--log-level", "loud"], "--log-level"),
        (["run", "b:a", "--jsonl", "--session", "ada"], "--session is for the terminal"),
    ],
)
def test_a_run_that_is_not_understood_is_exit_2(
    tmp_path: Path, words: list[str], told: str
) -> None:
    done = trio_gateway(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith("trio-gateway: see trio-gateway --help\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bogus"], 'Unknown command "bogus"'),
        (["sessions", "bogus"], 'Unknown command "bogus"'),
        (["sessions", "list", "--limit", "many"], "--limit"),
        (["quarantine", "retry"], "name one or more, or give --all"),
        (["quarantine", "drop", "1", "--all"], "name one or more, or give --all"),
        (["dead-letters", "retry"], "name one or more, or give --all"),
    ],
)
def test_what_is_not_understood_is_exit_2(
    shell: Shell, filled: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.setenv("TRIO_GATEWAY_STORE__PATH", str(filled))
    assert shell(*words, code=2) == ""
    assert told in shell.err
    assert shell.err.endswith("trio-gateway: see trio-gateway --help\n")


def test_help_and_version(shell: Shell, tmp_path: Path) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", shell("--version"))
    told = shell("--help")
    for command in ("run", "sessions", "explain", "quarantine", "dead-letters", "config", "doctor"):
        assert command in told
    assert "--grace" in trio_gateway("run", "--help", cwd=tmp_path).stdout


# ----- a gateway that runs


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 75)])
def test_c16_a_stop_and_a_restart_and_what_the_store_says_of_them(
    tmp_path: Path, shell: Shell, number: signal.Signals, code: int
) -> None:
    write(tmp_path / "bot.py", SLOW)
    words = ("bot.py:agent", "--jsonl", "--grace", "100ms")
    with running(*words, cwd=tmp_path) as process:
        assert process.stdin is not None
        process.stdin.write(line("a", "m1"))
        process.stdin.flush()
        wait_for(process, "turn_begun")
        assert shell("sessions", "list").splitlines()[1].split()[:2] == ["jsonl:a", "RUNNING"]
        process.send_signal(number)
        assert process.wait(PATIENCE) == code
    reason = "restart" if number is signal.SIGUSR1 else "shutdown"
    (session,) = shell.json("sessions", "list")
    assert (session["state"], session["reason"]) == ("RESUME_PENDING", reason)
    assert f"RESUME_PENDING ({reason}), attempt 1" in shell("sessions", "show", "a")
    done = trio_gateway("run", *words, cwd=tmp_path)
    assert events(done.stdout, "reply")[0]["text"] == "resumed: hi"
    whats = [entry["what"] for entry in shell.json("explain", "m1")["timelines"][0]["entries"]]
    assert [what for what in whats if what.startswith("turn ")] == [
        "turn RUNNING",
        "turn RESUME_PENDING",
        "turn RUNNING again",
        "turn COMPLETED",
    ]


def test_c47_a_stop_while_the_agent_is_still_imported(tmp_path: Path) -> None:
    write(
        tmp_path / "bot.py",
        "import sys, time\nprint('importing', file=sys.stderr, flush=True)\ntime.sleep(1)\n"
        "async def agent(turn): return 'too late'\n",
    )
    with running("bot.py:agent", "--jsonl", cwd=tmp_path) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "importing\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def test_c30_a_quarantined_message_is_listed_shown_and_retried(
    tmp_path: Path, shell: Shell
) -> None:
    write(tmp_path / "gateway.toml", '[resume]\nmax_crashes = 1\n[log]\nlevel = "error"\n')
    write(tmp_path / "killer.py", KILLER)
    write(tmp_path / "good.py", ECHO)
    killed = trio_gateway(
        "run", "killer.py:agent", "--jsonl", cwd=tmp_path, stdin=line("ada", "m1", "poison")
    )
    assert killed.returncode == -signal.SIGABRT
    put_aside = trio_gateway("run", "killer.py:agent", "--jsonl", cwd=tmp_path)
    assert put_aside.returncode == 0, put_aside.stderr
    assert "put it aside" in events(put_aside.stdout, "reply")[0]["text"]

    (row,) = shell.json("quarantine", "list")
    assert (row["session"], row["crashes"]) == ("jsonl:ada", 1)
    assert [message["text"] for message in row["messages"]] == ["poison"]
    assert "jsonl:ada" in shell("quarantine", "list")
    shown = shell("quarantine", "show", "m1")
    assert "message m1  poison" in shown
    assert shown == shell("quarantine", "show", str(row["turn"]))
    assert shell.json("quarantine", "show", "m1") == row
    shell("quarantine", "show", "m9", code=1)
    assert shell.err == (
        "trio-gateway: no turn or message 'm9' in quarantine; see trio-gateway quarantine list\n"
    )

    told = shell("quarantine", "retry", str(row["turn"]), "m1")
    assert told == (
        f"turn {row['turn']} of jsonl:ada: messages m1 wait again: the next start answers them\n"
    )
    assert shell("quarantine", "list") == "nothing is in quarantine\n"
    done = trio_gateway("run", "good.py:agent", "--jsonl", cwd=tmp_path)
    assert [reply["text"] for reply in events(done.stdout, "reply")] == ["poison"]
    assert shell.json("explain", "m1")["timelines"][0]["message"]["state"] == "answered"


def test_c50_what_changes_a_store_refuses_while_a_process_has_it_that_cannot_be_asked(
    filled: Path, shell: Shell
) -> None:
    letter = shell.json("dead-letters", "list", "--store", str(filled))[0]
    refused = f"trio-gateway: {filled} is in use by process {os.getpid()}"
    with lock_store(filled):
        for words in (["dead-letters", "retry", letter["key"]], ["dead-letters", "drop", "--all"]):
            assert shell(*words, "--store", str(filled), code=1) == ""
            assert shell.err.startswith(refused)
    assert shell.json("dead-letters", "list", "--store", str(filled)) == [letter]


def test_c50_a_second_gateway_refuses_and_names_the_first(
    tmp_path: Path, filled: Path, shell: Shell
) -> None:
    write(tmp_path / "bot.py", ECHO)
    with running("bot.py:agent", "--jsonl", "--store", str(filled), cwd=tmp_path) as process:
        wait_for(process, "gateway_started")
        refused = f"trio-gateway: {filled} is in use by process {process.pid}"
        told = shell("doctor", "--store", str(filled))
        assert f"a gateway has the store open: process {process.pid}" in told
        second = trio_gateway(
            "run", "bot.py:agent", "--jsonl", "--store", str(filled), cwd=tmp_path
        )
        assert second.returncode == 1
        assert refused in second.stderr


# ----- dead letters


def test_c44_a_dead_letter_is_listed_shown_retried_and_dropped(
    tmp_path: Path, shell: Shell
) -> None:
    path = tmp_path / "gateway.db"
    trio.run(fill, path)
    (letter,) = shell.json("dead-letters", "list")
    assert (letter["session"], letter["error"]) == ("chat:blocked", "blocked by the user")
    assert "blocked by the user" in shell("dead-letters", "list")
    shown = shell("dead-letters", "show", letter["key"])
    assert re.search(r"^text +about hi$", shown, re.MULTILINE)
    assert shell.json("dead-letters", "show", str(letter["delivery"])) == letter
    shell("dead-letters", "show", "nope", code=1)
    assert shell.err == "trio-gateway: no dead letter 'nope'; see trio-gateway dead-letters list\n"

    told = shell("dead-letters", "retry", "--all")
    assert told.startswith(f"delivery {letter['delivery']} to chat:blocked waits again")
    assert shell("dead-letters", "list") == "there are no dead letters\n"
    trio.run(_serve_until_idle, path)
    (again,) = shell.json("dead-letters", "list")
    assert again["key"] == letter["key"]
    assert shell("dead-letters", "drop", again["key"]).endswith("is given up\n")
    assert shell.json("dead-letters", "list") == []


async def _serve_until_idle(path: Path) -> None:
    chat = MemoryChannel("chat")
    chat.before_send = refuse_blocked
    async with open_gateway(talk, store=path, channels=[chat]) as gateway:
        await gateway.wait_idle()


# ----- listings


def test_sessions_are_listed_newest_first(shell: Shell, filled: Path) -> None:
    rows = shell.json("sessions", "list", "--store", str(filled))
    assert [row["session"] for row in rows] == [
        "local:only-here", "local:ada", "chat:blocked", "chat:evil", "chat:long", "chat:bob: /x",
        "chat:ada",
    ]  # fmt: skip
    assert {row["state"] for row in rows} == {"idle"}
    assert len(shell.json("sessions", "list", "--store", str(filled), "--limit", "2")) == 2


def test_times_are_utc_for_programs_and_local_for_people(shell: Shell, filled: Path) -> None:
    row = shell.json("sessions", "list", "--store", str(filled), "--limit", "1")[0]
    assert row["last_message_at"].endswith("Z")
    moment = datetime.fromisoformat(row["last_message_at"])
    assert moment.utcoffset() == timedelta(0)
    local = moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    assert local in shell("sessions", "list", "--store", str(filled))


def test_a_session_is_shown_by_its_key_or_its_name(shell: Shell, filled: Path) -> None:
    store = ("--store", str(filled))
    told = shell.json("sessions", "show", "chat:ada", *store)
    assert [message["id"] for message in told["messages"]] == ["m1", "m2"]
    assert [(said["role"], said["text"]) for said in told["history"]] == [
        ("user", "hello"),
        ("agent", "about hello"),
        ("user", "step"),
        ("agent", "about step"),
    ]
    assert told["turn"] is None
    assert shell.json("sessions", "show", "bob: /x", *store)["session"] == "chat:bob: /x"
    assert "chat:evil: idle, 0 messages waiting" in shell("sessions", "show", "evil", *store)
    shell("sessions", "show", "ada", *store, code=1)
    assert shell.err == ("trio-gateway: 'ada' names several sessions: chat:ada, local:ada\n")
    shell("sessions", "show", "nobody", *store, code=1)
    assert shell.err == "trio-gateway: no session 'nobody' in this store\n"


def test_explain_tells_one_life_in_order(shell: Shell, filled: Path) -> None:
    (life,) = shell.json("explain", "m2", "--store", str(filled))["timelines"]
    assert life["message"]["state"] == "answered"
    whats = [entry["what"] for entry in life["entries"]]
    for what in ("accepted", "turn RUNNING", "step", "turn COMPLETED", "answer delivered"):
        assert what in whats
    assert whats.index("accepted") < whats.index("turn RUNNING") < whats.index("turn COMPLETED")
    times = [entry["at"] for entry in life["entries"]]
    assert times == sorted(times)
    told = shell("explain", "m2", "--store", str(filled))
    assert told.startswith("message m2 of chat:ada: answered\nstep\n")
    assert "think (idempotent, attempt 1)" in told


def test_explain_tells_of_every_channel_that_has_the_id(shell: Shell, filled: Path) -> None:
    lives = shell.json("explain", "m1", "--store", str(filled))["timelines"]
    assert [life["message"]["session"] for life in lives] == ["chat:ada", "local:only-here"]
    told = shell("explain", "m1", "--store", str(filled))
    assert told.count("message m1 of ") == 2
    shell("explain", "nope", "--store", str(filled), code=1)
    assert shell.err == "trio-gateway: no message 'nope' in this store\n"


def test_explain_tells_of_a_failure_what_the_sender_was_not_told(
    shell: Shell, filled: Path
) -> None:
    told = shell("explain", "m3", "--store", str(filled))
    assert "turn FAILED" in told
    assert "the reason is not for the sender" in told
    (life,) = shell.json("explain", "m3", "--store", str(filled))["timelines"]
    assert life["message"]["state"] == "failed"


def test_piped_tables_have_one_row_a_line_whatever_was_written(shell: Shell, filled: Path) -> None:
    told = shell("sessions", "show", "evil", "--store", str(filled))
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert r"first\nsecond \x1b[31mred\x1b[0m" in told
    assert shell.json("sessions", "show", "evil", "--store", str(filled))["messages"][0][
        "text"
    ] == (EVIL_TEXT)
    told = shell("sessions", "show", "long", "--store", str(filled))
    assert max(map(len, told.splitlines())) < 160
    listed = shell("sessions", "list", "--store", str(filled)).splitlines()
    assert len(listed) == 1 + 7
    column = listed[0].index("STATE")
    assert all(one[column:].startswith("idle") for one in listed[1:])


def on_a_terminal(words: Sequence[str], cwd: Path) -> str:
    """What the command line draws on a terminal of 80 columns."""
    leader, follower = os.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "trio_gateway", *words],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=follower,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": ""},
        )
        os.close(follower)
        drawn = b""
        try:
            while data := os.read(leader, 65536):
                drawn += data
        except OSError:  # Linux says EIO when the other side has gone
            assert process.wait(PATIENCE) == 0
        return drawn.decode()
    finally:
        os.close(leader)


def test_a_terminal_gets_a_table_that_fits(tmp_path: Path, filled: Path) -> None:
    drawn = on_a_terminal(["sessions", "show", "evil", "--store", str(filled)], tmp_path)
    text = re.sub(r"\x1b\[[0-9;]*m", "", drawn)
    assert "\x1b" not in text
    assert "─" in text
    assert "answered" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "[bold]" in text.replace("\r\n", "").replace(" ", "")


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path, filled: Path) -> None:
    words = [sys.executable, "-m", "trio_gateway", "sessions", "list", "--store", str(filled)]
    process = subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (1, "")


def test_p14_a_store_that_is_not_there_or_none_is_named(shell: Shell, tmp_path: Path) -> None:
    for words in (["sessions", "list"], ["explain", "m1"], ["quarantine", "retry", "1"]):
        shell(*words, code=1)
        assert shell.err == (
            f"trio-gateway: {tmp_path}/gateway.db: there is no store; name one with --store\n"
        )
    (tmp_path / "gateway.db").write_bytes(b"not a database at all, but long enough" * 100)
    shell("sessions", "list", code=1)
    assert f"{tmp_path}/gateway.db is damaged or no database" in shell.err
    assert len(shell.err.splitlines()) == 1


def test_c53_a_store_with_a_damaged_page_is_one_error(shell: Shell, tmp_path: Path) -> None:
    damage(tmp_path / "gateway.db")
    shell("sessions", "list", code=1)
    assert shell.err.startswith(f"trio-gateway: {tmp_path}/gateway.db: ")
    assert shell.err.endswith("; see trio-gateway doctor\n")


def damage(path: Path) -> None:
    """Write nonsense over the page where each table and each index begins, but the schema's."""
    trio.run(fill, path)
    db: Any = apsw.Connection(str(path))
    with closing(db):
        pages = {row[0] for row in db.execute("SELECT rootpage FROM sqlite_schema")}
        ((size,),) = db.execute("PRAGMA page_size")
    with path.open("r+b") as file:
        for page in pages - {0, None}:
            file.seek((page - 1) * size)
            file.write(b"\x5a" * size)


# ----- the configuration


def test_config_show_says_where_each_value_came_from(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "gateway.toml", '[limits]\nturns = 3\n[drain]\ngrace = "9s"\nbudget = "10s"\n')
    monkeypatch.setenv("TRIO_GATEWAY_TURNS__BUSY", "collect")
    told = shell("config", "show")
    assert re.search(r"^turns = 3 +# gateway.toml$", told, re.MULTILINE)
    assert re.search(r'^busy = "collect" +# TRIO_GATEWAY_TURNS__BUSY$', told, re.MULTILINE)
    assert re.search(r'^keep = "90d" +# default$', told, re.MULTILINE)
    assert "# warning: drain.grace: 9s does not fit into drain.budget 10s" in told
    values = shell.json("config", "show")["values"]
    assert values["limits.turns"] == {"value": 3, "from": "gateway.toml"}
    assert values["resume.within"] == {"value": "1h", "from": "default"}
    # What is shown is a gateway.toml itself.
    monkeypatch.delenv("TRIO_GATEWAY_TURNS__BUSY")
    write(tmp_path / "gateway.toml", told)
    again = shell.json("config", "show")["values"]
    assert {key: one["value"] for key, one in again.items()} == {
        key: one["value"] for key, one in values.items()
    }


def test_config_check(shell: Shell, tmp_path: Path) -> None:
    assert shell("config", "check") == "no gateway.toml here, so every default: ok\n"
    write(tmp_path / "gateway.toml", '[drain]\ngrace = "9s"\nbudget = "10s"\n')
    warning, fine = shell("config", "check").splitlines()
    assert warning.startswith("warning: drain.grace: 9s does not fit")
    assert fine == "gateway.toml: ok"
    write(tmp_path / "gateway.toml", "[drain]\ngrace = 30\n")
    problem = 'drain.grace: expected a duration like "30s", got 30 (gateway.toml)'
    assert shell("config", "check", code=78) == ""
    assert shell.err == f"trio-gateway: {problem}\n"
    assert shell.json("config", "check", code=78) == {
        "ok": False,
        "errors": [problem],
        "warnings": [],
    }
    shell("config", "check", "--config", "nope.toml", code=78)
    assert shell.err == (
        "trio-gateway: nope.toml: there is no such file; name another with --config\n"
    )


# ----- doctor


def found(report: dict[str, Any], check: str) -> dict[str, str]:
    """The finding of a check, the worst if it has several."""
    rank = ["ok", "warn", "fail"]
    return max(
        (one for one in report["checks"] if one["check"] == check),
        key=lambda one: rank.index(one["status"]),
    )


def test_doctor_of_a_healthy_house(shell: Shell, tmp_path: Path) -> None:
    trio.run(fill, tmp_path / "gateway.db")
    report = shell.json("doctor")
    assert report["ok"] is True
    assert {one["status"] for one in report["checks"]} <= {"ok", "warn"}
    assert found(report, "store")["found"].endswith("is readable and sound")
    assert found(report, "dead letters") == {
        "status": "warn",
        "check": "dead letters",
        "found": "1 wait for somebody: trio-gateway dead-letters list",
    }
    assert "no gateway has the store open" in shell("doctor")


def test_doctor_before_the_first_start(shell: Shell, tmp_path: Path) -> None:
    assert "the first start makes it" in found(shell.json("doctor"), "store")["found"]
    assert list(tmp_path.iterdir()) == []


def test_doctor_finds_files_that_others_can_read(shell: Shell, tmp_path: Path) -> None:
    trio.run(fill, tmp_path / "gateway.db")
    (tmp_path / "gateway.db").chmod(0o644)
    finding = found(shell.json("doctor", code=1), "permissions")
    assert finding["status"] == "fail"
    assert finding["found"] == (
        f"{tmp_path}/gateway.db is 0644, so others can read conversations:"
        f" chmod 600 {tmp_path}/gateway.db"
    )
    assert stat.S_IMODE((tmp_path / "gateway.db").stat().st_mode) == 0o644


def test_doctor_finds_a_damaged_store(shell: Shell, tmp_path: Path) -> None:
    damage(tmp_path / "gateway.db")
    report = shell.json("doctor", code=1)
    assert report["ok"] is False
    assert found(report, "store")["status"] == "fail"
    assert shell("doctor", code=1).count("fail") >= 1


@pytest.mark.parametrize(
    ("limit", "status", "told"),
    [
        ("60s", "ok", "allows 1m for a stop, drain.budget is 30s"),
        ("30s", "warn", "leave a second between them"),
        ("10s", "fail", "it would be killed before"),
        ("10", "fail", 'expected a duration like "30s", got "10"'),
    ],
)
def test_doctor_compares_the_budget_with_the_containers_limit(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, limit: str, status: str, told: str
) -> None:
    monkeypatch.setenv("TRIO_GATEWAY_STOP_LIMIT", limit)
    finding = found(shell.json("doctor", code=int(status == "fail")), "supervisor")
    assert finding["status"] == status
    assert told in finding["found"]


def test_doctor_warns_about_a_grace_that_does_not_fit(shell: Shell, tmp_path: Path) -> None:
    write(tmp_path / "gateway.toml", '[drain]\ngrace = "30s"\nbudget = "30s"\n')
    finding = found(shell.json("doctor"), "deadlines")
    assert finding["status"] == "warn"
    assert "drain.grace: 30s does not fit into drain.budget 30s" in finding["found"]


def test_doctor_finds_turns_that_wait_for_their_channel(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    trio.run(_leave_a_turn_of_another_channel, path)
    write(tmp_path / "bot.py", ECHO)
    with running("bot.py:agent", "--jsonl", cwd=tmp_path) as process:
        wait_for(process, "gateway_started")
        finding = found(shell.json("doctor"), "channels")
    assert finding["status"] == "warn"
    assert finding["found"].endswith("until their channel connects: chat (1)")


async def _leave_a_turn_of_another_channel(path: Path) -> None:
    begun = trio.Event()

    async def for_ever(turn: Turn) -> str:
        begun.set()
        await trio.sleep_forever()
        return turn.text

    async with open_gateway(for_ever, store=path, channels=[MemoryChannel("chat")]) as gateway:
        await gateway.accept(Message(channel="chat", session="ada", id="m1", text="hi"))
        await begun.wait()
        gateway.request_stop(now=True)


SERVICE = "0::/system.slice/system-bots.slice/bot.service\n"


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        (SERVICE, Unit("bot.service", user=False)),
        ("1:name=systemd:/system.slice/bot.service/payload\n", Unit("bot.service", user=False)),
        (
            "0::/user.slice/user-1.slice/user@1.service/app.slice/bot.service\n",
            Unit("bot.service", user=True),
        ),
        ("0::/user.slice/user-1.slice/user@1.service/app.slice/vte-spawn-1.scope\n", None),
        ("0::/user.slice/user-1.slice/session-3.scope\n", None),
        ("0::/user.slice/user-1.slice/user@1.service/init.scope\n", None),
        ("0::/\n", None),
    ],
)
def test_doctor_knows_its_unit(tmp_path: Path, cgroup: str, unit: Unit | None) -> None:
    assert unit_in(write(tmp_path / "cgroup", cgroup)) == unit


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1min 30s", 90.0),
        ("500ms", 0.5),
        ("1h 2.5s", 3602.5),
        ("infinity", float("inf")),
        ("0", 0.0),
        ("", None),
        ("soon", None),
        ("5 apples", None),
    ],
)
def test_doctor_reads_what_systemd_writes(text: str, seconds: float | None) -> None:
    assert parse_timespan(text) == seconds


GOOD_UNIT = {
    "LoadState": "loaded",
    "Type": "notify",
    "TimeoutStopUSec": "40s",
    "WatchdogUSec": "30s",
    "KillMode": "mixed",
    "Restart": "on-failure",
    "RestartForceExitStatus": "75",
    "RestartPreventExitStatus": "78",
}
"""What systemctl says of a unit that `trio-gateway install systemd` wrote."""


def systemctl_says(where: Path, monkeypatch: pytest.MonkeyPatch, unit: str, **facts: str) -> None:
    """Put a systemctl of our own on the PATH, which answers when it is asked for that unit."""
    lines = "".join(f"echo '{name}={value}'\n" for name, value in facts.items())
    write(
        where / "systemctl",
        f'#!/bin/sh\ncase "$*" in "show -p "*" -- {unit}") ;; *) exit 1;; esac\n{lines}',
    ).chmod(0o755)
    monkeypatch.setenv("PATH", f"{where}:{os.environ['PATH']}")


def supervisor_findings(where: Path, **options: Any) -> list[tuple[str, str]]:
    """What doctor finds out about the supervisor of a process in bot.service."""
    (where / "self").mkdir()
    write(where / "self" / "cgroup", SERVICE)
    findings = examine(Config(), where / "gateway.db", {}, processes=where, **options)
    return [(one.status, one.found) for one in findings if one.check == "supervisor"]


@pytest.mark.parametrize(
    ("limit", "status", "told"),
    [
        ("1min 30s", "ok", "bot.service allows 90s for a stop"),
        ("30s", "warn", "leave a second between them; raise its TimeoutStopSec above 30s"),
        ("20s", "fail", "raise its TimeoutStopSec above 30s"),
        ("infinity", "ok", "any time to stop"),
        ("", "warn", "compare its TimeoutStopSec with drain.budget (30s) yourself"),
    ],
)
def test_doctor_compares_the_budget_with_systemds_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, status: str, told: str
) -> None:
    """With a systemctl of our own: it is asked for the unit in the process's cgroup."""
    systemctl_says(tmp_path, monkeypatch, "bot.service", **GOOD_UNIT | {"TimeoutStopUSec": limit})
    ((found_status, found_text),) = supervisor_findings(tmp_path)
    assert found_status == status
    assert told in found_text


@pytest.mark.parametrize(
    ("fact", "value", "fix"),
    [
        ("Type", "simple", "set Type=notify"),
        ("KillMode", "control-group", "set KillMode=mixed"),
        ("KillMode", "process", "set KillMode=mixed"),
        ("WatchdogUSec", "1s", "set at least 5s"),
        ("RestartForceExitStatus", "", "set RestartForceExitStatus=75"),
        ("RestartPreventExitStatus", "1 2", "set RestartPreventExitStatus=78"),
    ],
)
def test_doctor_says_what_a_unit_should_rather_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fact: str, value: str, fix: str
) -> None:
    systemctl_says(tmp_path, monkeypatch, "bot.service", **GOOD_UNIT | {fact: value})
    good, doubt = supervisor_findings(tmp_path)
    assert good[0] == "ok"
    assert doubt[0] == "warn"
    assert doubt[1].startswith("bot.service: ")
    assert doubt[1].endswith(fix)


def test_doctor_compares_with_the_unit_that_is_named(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemctl_says(tmp_path, monkeypatch, "x.service", **GOOD_UNIT | {"TimeoutStopUSec": "5s"})
    finding = found(shell.json("doctor", "--unit", "x", code=1), "supervisor")
    assert finding["found"].startswith("x.service allows 5s for a stop, drain.budget is 30s")
    systemctl_says(tmp_path, monkeypatch, "x.service", **GOOD_UNIT | {"LoadState": "not-found"})
    finding = found(shell.json("doctor", "--unit", "x.service", code=1), "supervisor")
    assert "there is no unit x.service: trio-gateway install systemd" in finding["found"]


def test_a_start_hears_of_a_limit_that_is_too_short() -> None:
    limit = {"TRIO_GATEWAY_STOP_LIMIT": "10s"}
    (warning,) = warnings_at_start(30.0, limit)
    assert "it would be killed before; raise terminationGracePeriodSeconds" in warning
    assert warnings_at_start(5.0, limit) == warnings_at_start(30.0, {}) == []


def test_doctor_does_not_wait_for_a_systemctl_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "systemctl", "#!/bin/sh\nexec sleep 60\n").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "self").mkdir()
    write(tmp_path / "self" / "cgroup", SERVICE)
    began = time.monotonic()
    findings = examine(Config(), tmp_path / "gateway.db", {}, processes=tmp_path)
    assert [one.status for one in findings if one.check == "supervisor"] == ["warn"]
    assert time.monotonic() - began < SYSTEMCTL_PATIENCE + 5
