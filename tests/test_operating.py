"""The commands that look after a running gateway: real processes, asked over real sockets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
from processes import GatewayProcess, launch, markers

from trio_gateway import Delivery, Message, Turn, Undeliverable, open_gateway
from trio_gateway._allowance import supervisor_of
from trio_gateway._cli import main
from trio_gateway._control_client import connected
from trio_gateway._operating_views import span, state_line
from trio_gateway.testing import MemoryChannel

PATIENCE = 20.0

AGENT = """
import trio

async def think():
    await trio.sleep(60)

async def agent(turn):
    turn.progress("begun")
    if turn.text == "wait" and not turn.resumed:
        await turn.step(think)
    if turn.text == "block" and not turn.resumed:
        import time
        time.sleep(60)
    return f"re: {turn.text}"
"""


class Operator:
    """Somebody at a shell, who gives commands about one store."""

    def __init__(self, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._store = store
        self._capsys = capsys
        self.err = ""

    def __call__(self, *words: str, code: int = 0) -> str:
        """What a command wrote to standard output, after the exit code was checked."""
        got = main([*words, "--store", str(self._store)])
        told = self._capsys.readouterr()
        self.err = told.err
        assert got == code, told
        assert "Traceback" not in told.err
        return told.out

    def json(self, *words: str, code: int = 0) -> Any:
        """The same as a value."""
        return json.loads(self(*words, "--json", code=code))

    def wait_for(self, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The status, once it fits."""
        deadline = time.monotonic() + PATIENCE
        while not fits(told := self.json("status")):
            assert time.monotonic() < deadline, told
        return dict(told)


@pytest.fixture(name="operator")
def _operator(
    memory_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Operator:
    monkeypatch.chdir(memory_path)
    return Operator(memory_path / "gateway.db", capsys)


@contextmanager
def gateway(where: Path, *sessions: str, grace: float = 5.0) -> Generator[GatewayProcess]:
    """A gateway with an open turn in each of these sessions."""
    with launch(where, AGENT, grace=grace) as process:
        for name in sessions:
            process.send(name, f"m-{name}", "wait")
        for name in sessions:
            process.expect("progress", session=name)
        yield process


LOOKING = [["status"], ["turns"], ["top"], ["logs"], ["logs", "-f"]]
DOING = [["stop"], ["stop", "--now"], ["restart"], ["drain"], ["undrain"], ["reload"],
         ["stop-turn", "ada"]]  # fmt: skip


@pytest.mark.parametrize("words", [*LOOKING, *DOING], ids=" ".join)
def test_where_no_gateway_runs_it_is_said_with_a_code_of_its_own(
    operator: Operator, words: list[str]
) -> None:
    assert operator(*words, code=3) == ""
    assert operator.err.startswith("trio-gateway: no gateway runs on ")
    assert operator.err.count("\n") == 1


def test_a_store_can_be_named_by_the_configuration_too(
    memory_path: Path, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    (memory_path / "other.toml").write_text('[store]\npath = "gateway.db"\n')
    with gateway(memory_path) as process:
        capsys.readouterr()
        assert main(["status", "--json", "--config", "other.toml"]) == 0
        assert json.loads(capsys.readouterr().out)["pid"] == process.pid


# ----- looking


def test_status_tells_how_the_gateway_is(memory_path: Path, operator: Operator) -> None:
    with gateway(memory_path, "ada") as process:
        told = operator.json("status", "--deep")
        assert (told["pid"], told["epoch"], told["state"]) == (process.pid, 1, "serving")
        assert told["channels"] == ["jsonl"]
        assert told["store"] == str(memory_path / "gateway.db")
        assert told["stored"]["running"] == 1
        assert (told["paused"], told["stop"], told["not_ready"]) == (False, None, [])
        assert told["damage"] == []
        shown = operator("status", "--deep")
        assert f"process {process.pid}, version " in shown
        assert "store check           sound" in shown


def test_p14_status_deep_finds_damage(memory_path: Path, operator: Operator) -> None:
    with gateway(memory_path) as process:
        process.send("ada", "m1", "hello")
        process.expect("reply", text="re: hello")
    store = apsw.Connection(str(memory_path / "gateway.db"))
    store.execute("UPDATE message SET state = 'running'")
    store.close()
    with gateway(memory_path):
        told = operator.json("status", "--deep", code=1)
        assert told["damage"] != []


def test_turns_are_told_with_marker_age_and_step(memory_path: Path, operator: Operator) -> None:
    with gateway(memory_path, "ada", "bob"):
        rows = operator.json("turns")
        assert [(row["session"], row["attempt"]) for row in rows] == [
            ("jsonl:ada", 1),
            ("jsonl:bob", 1),
        ]
        assert {(row["marker"], row["step"]) for row in rows} == {("RUNNING", "think")}
        assert all(0 <= row["running_for"] < 60 for row in rows)
        assert "jsonl:ada  1        " in operator("turns")
        assert operator("stop-turn", "ada").startswith("the turn of jsonl:ada is stopped")
        assert operator("stop-turn", "ada", code=1) == "jsonl:ada has no open turn\n"
        operator("stop-turn", "nobody", code=1)
        assert operator.err == "trio-gateway: no session 'nobody' in this store\n"


def test_c06_what_an_operator_stopped_does_not_come_back(
    memory_path: Path, operator: Operator
) -> None:
    with gateway(memory_path, "ada", "bob", grace=0.2) as process:
        operator("stop-turn", "ada")
        process.kill()
    with launch(memory_path, AGENT) as process:
        process.expect("reply", text="re: wait", session="bob")
        assert operator("turns") == "no turn is open\n"
        assert not [e for e in process.events if e.get("session") == "ada" and "text" in e]


def test_top_is_one_look_where_there_is_no_terminal(memory_path: Path, operator: Operator) -> None:
    with gateway(memory_path, "ada"):
        told = operator("top")
        assert "jsonl:ada" in told
        assert "think" in told
        assert "no message waits" in told
        assert "q leaves" not in told


@pytest.mark.parametrize(
    ("options", "channel"),
    [((), "console"), (("--jsonl",), "jsonl"), (("--http", "127.0.0.1:0"), "http")],
)
def test_whatever_its_channel_a_gateway_is_asked_and_stopped(
    memory_path: Path, operator: Operator, options: tuple[str, ...], channel: str
) -> None:
    with launch(memory_path, AGENT, options=options, ready=False, log_level="info") as process:
        process.expect_log("gateway_started")
        assert operator.json("status")["channels"] == [channel]
        assert f"process {process.pid} has stopped" in operator("stop")
        assert process.wait() == 0


# ----- stopping


def test_stop_waits_until_the_process_has_gone(memory_path: Path, operator: Operator) -> None:
    with gateway(memory_path, "ada", grace=0.3) as process:
        told = operator("stop")
        assert told == (
            f"stopping process {process.pid}: 1 open turns get up to 300ms\n"
            f"process {process.pid} has stopped\n"
        )
        assert not (memory_path / "gateway.db.sock").exists()
        assert process.wait() == 0
    assert markers(memory_path) == {"ada": ("RESUME_PENDING", "shutdown")}


def test_p05_stop_now_gives_turns_no_time_and_loses_none(
    memory_path: Path, operator: Operator
) -> None:
    with launch(memory_path, AGENT, grace=60, budget=90) as process:
        process.send("ada", "m1", "wait")
        process.expect("progress")
        assert "1 open turns get no more time" in operator("stop", "--now")
        assert process.wait() == 0
    with launch(memory_path, AGENT) as process:
        process.expect("reply", text="re: wait", attempt=2)


def test_c09_stop_now_ends_a_drain_that_is_under_way(memory_path: Path, operator: Operator) -> None:
    with launch(memory_path, AGENT, grace=60, budget=90) as process:
        process.send("ada", "m1", "wait")
        process.expect("progress")
        process.signal(signal.SIGTERM)
        told = operator.wait_for(lambda told: told["stop"] and told["stop"]["marked"] == 1)
        assert (told["state"], told["stop"]["by"]) == ("draining", "SIGTERM")
        assert "(it was stopping already)" in operator("stop", "--now")
        assert process.wait() == 0
    assert markers(memory_path) == {"ada": ("RESUME_PENDING", "shutdown")}


def test_p12_it_answers_during_the_whole_drain(memory_path: Path, operator: Operator) -> None:
    with launch(memory_path, AGENT, grace=60, budget=90) as process:
        process.send("ada", "m1", "wait")
        process.send("bob", "m2", "wait")
        process.expect("progress", session="ada")
        process.expect("progress", session="bob")
        process.signal(signal.SIGTERM)
        operator.wait_for(lambda told: told["stop"] and told["stop"]["marked"] == 2)
        rows = operator.json("turns")
        assert {(row["marker"], row["reason"]) for row in rows} == {("RESUME_PENDING", "shutdown")}
        process.send("eve", "m3", "hello")  # the door to the inbox stays open
        operator.wait_for(lambda told: told["stored"]["waiting"] == 1)
        assert "draining (shutdown): 2 turns marked, 0 settled; at most " in operator("status")
        operator("drain", code=1)
        assert "stops already: no turn begins any more" in operator.err
        operator("undrain", code=1)
        operator("reload", code=1)
        assert "its settings stay as they are" in operator.err
        operator("stop-turn", "bob")
        operator.wait_for(lambda told: told["stop"]["settled"] == 1)
        operator("stop", "--now")
        assert process.wait() == 0
    assert markers(memory_path) == {"ada": ("RESUME_PENDING", "shutdown")}


def test_a_restart_that_nobody_would_follow_is_refused(
    memory_path: Path, operator: Operator
) -> None:
    with gateway(memory_path, "ada", grace=0.2) as process:
        assert operator("restart", code=1) == ""
        assert operator.err.startswith(
            f"trio-gateway: nothing that is known here supervises process {process.pid}"
        )
        assert operator.json("status")["stop"] is None
        told = operator("restart", "--anyway")
        assert told.endswith("it ended with exit code 75: start it again\n")
        assert process.wait() == 75
    assert markers(memory_path) == {"ada": ("RESUME_PENDING", "restart")}


def test_a_restart_is_waited_for_until_the_next_process_serves(
    memory_path: Path, operator: Operator
) -> None:
    """Told that it is supervised, and supervised by this test."""
    environ = {**os.environ, "TRIO_GATEWAY_STOP_LIMIT": "60s"}
    with launch(memory_path, AGENT, grace=0.2, env=environ) as first:
        first.send("ada", "m1", "wait")
        first.expect("progress")
        told: list[str] = []
        asking = threading.Thread(target=lambda: told.append(operator("restart")))
        asking.start()
        assert first.wait() == 75
        with launch(memory_path, AGENT, env=environ) as second:
            asking.join(PATIENCE)
            assert not asking.is_alive()
            assert told[0].endswith(f"process {second.pid} serves, epoch 2\n")
            second.expect("reply", text="re: wait", attempt=2)


@pytest.mark.parametrize(
    ("environ", "parent", "cgroup", "told"),
    [
        ({"NOTIFY_SOCKET": "/run/systemd/notify"}, "sh", "0::/", "systemd"),
        ({"TRIO_GATEWAY_STOP_LIMIT": "30s"}, "sh", "0::/", "a container"),
        ({}, "systemd", "0::/system.slice/bot.service", "systemd"),
        ({}, "systemd", "0::/user.slice/session-3.scope", None),
        ({}, "runsv", "0::/", "runit"),
        ({}, "s6-supervise", "0::/", "s6"),
        ({}, "supervisord", "0::/", "supervisord"),
        ({}, "bash", "0::/system.slice/ssh.service", None),
        ({}, None, "0::/", None),
    ],
)
def test_what_would_start_it_again_is_known_by_what_can_be_seen(
    tmp_path: Path, environ: dict[str, str], parent: str | None, cgroup: str, told: str | None
) -> None:
    for name, file, text in ((os.getppid(), "comm", parent), ("self", "cgroup", cgroup)):
        (tmp_path / str(name)).mkdir()
        if text is not None:
            (tmp_path / str(name) / file).write_text(f"{text}\n")
    assert supervisor_of(environ, tmp_path) == told


def test_c46_a_gateway_that_is_blocked_is_said_to_be(
    memory_path: Path, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_gateway._control_client.ANSWERED", 0.5)
    with gateway(memory_path, grace=0.2) as process:
        process.send("ada", "m1", "block")
        process.expect_log("loop_stalled")
        with connected(memory_path / "gateway.db") as control:
            stream = control.stream("status", patience=0.5)
            with pytest.raises(Exception, match="its event loop is blocked"):
                next(stream)
        process.kill()


# ----- draining


def test_a_drain_can_be_taken_back(memory_path: Path, operator: Operator) -> None:
    with gateway(memory_path, "ada") as process:
        assert operator("drain") == "the gateway is paused: no turn begins, 1 open turns go on\n"
        assert operator("drain").startswith("the gateway was paused already")
        process.send("bob", "m1", "hello")
        operator.wait_for(lambda told: told["stored"]["waiting"] == 1)
        told = operator.json("status")
        assert told["paused_by"].startswith("trio-gateway drain (process ")
        assert told["not_ready"] == ["turns are paused: trio-gateway undrain"]
        assert "paused by trio-gateway drain" in operator("status")
        assert operator("undrain") == "the gateway goes on: 2 messages are open\n"
        process.expect("reply", text="re: hello", session="bob")
        assert operator("undrain").startswith("the gateway was not paused")


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_forgotten_drain_does_not_outlive_the_process(
    memory_path: Path, operator: Operator, how: str
) -> None:
    with gateway(memory_path) as process:
        operator("drain")
        process.send("bob", "m1", "hello")
        operator.wait_for(lambda told: told["stored"]["waiting"] == 1)
        process.kill() if how == "kill" else operator("stop")
    with launch(memory_path, AGENT) as process:
        process.expect("reply", text="re: hello")
        assert operator.json("status")["paused"] is False


def test_c50_after_a_kill_the_next_gateway_is_asked_at_the_same_socket(
    memory_path: Path, operator: Operator
) -> None:
    with gateway(memory_path, "ada") as process:
        process.kill()
        assert (memory_path / "gateway.db.sock").exists()
        operator("status", code=3)
    with launch(memory_path, AGENT) as process:
        told = operator.json("status")
        assert (told["pid"], told["epoch"]) == (process.pid, 2)


# ----- the log


def test_logs_begin_with_the_last_lines(memory_path: Path, operator: Operator) -> None:
    with gateway(memory_path) as process:
        process.send("ada", "m1", "hello")
        process.expect("reply", text="re: hello")
        process.expect_log("turn_settled")
        names = [json.loads(line)["event"] for line in operator("logs").splitlines()]
        assert names[0] == "gateway_started"
        assert "turn_settled" in names
        assert len(operator("logs", "-n", "1").splitlines()) == 1
        assert operator("logs", "--level", "error") == ""


@contextmanager
def following(where: Path, *options: str) -> Generator[tuple[subprocess.Popen[str], list[str]]]:
    """`trio-gateway logs -f` in a process of its own, and the lines that it has written."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trio_gateway", "logs", "-f", *options, "--store",
         str(where / "gateway.db")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines: list[str] = []

    def collect() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)

    reader = threading.Thread(target=collect, daemon=True)
    reader.start()
    try:
        yield process, lines
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)
        reader.join(PATIENCE)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def wait_until(fits: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not fits():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_logs_follow_the_gateway_to_its_end(memory_path: Path) -> None:
    with gateway(memory_path, "ada", grace=0.2) as process, following(memory_path) as (tail, lines):
        wait_until(lambda: any('"gateway_started"' in line for line in lines))
        assert process.stop() == 0
        assert tail.wait(PATIENCE) == 0
        wait_until(lambda: any('"drain_report"' in line for line in lines))
        assert tail.stderr is not None
        assert tail.stderr.read() == "trio-gateway: the gateway has stopped\n"


def test_who_follows_can_ask_for_more_than_standard_error_gets(memory_path: Path) -> None:
    with gateway(memory_path) as process, following(memory_path, "--level", "debug") as (_, lines):
        wait_until(lambda: any('"gateway_started"' in line for line in lines))
        process.send("ada", "m1", "the text")
        wait_until(lambda: any("the text" in line for line in lines))
        assert "the text" not in process.stderr


def test_who_reads_too_slowly_is_told_how_much_was_dropped(memory_path: Path) -> None:
    """A follower that reads nothing while thousands of lines are logged: the gateway goes on, and
    every line is either read or counted."""
    with gateway(memory_path) as process, connected(memory_path / "gateway.db") as control:
        stream = control.stream("logs", patience=PATIENCE, follow=True, level="debug")
        process.send("ada", "m0", "first")
        assert "record" in next(stream)
        for n in range(3000):
            process.send("ada", f"n{n}", "x" * 500)
        process.send("eve", "m-end", "hello")
        process.expect("reply", session="eve", timeout=60)
        dropped = read = 0
        for told in stream:
            dropped += told.get("dropped", 0)
            read += "record" in told
            if '"session": "jsonl:eve"' in told.get("record", "") and "delivered" in told["record"]:
                break
        assert dropped > 0
        assert read > 0


# ----- setting right


async def _fill(path: Path) -> None:
    """One dead letter in the session jsonl:ada, and one turn in quarantine."""

    async def refuse(delivery: Delivery) -> None:
        await trio.lowlevel.checkpoint()
        raise Undeliverable("blocked")

    async def talk(turn: Turn) -> str:
        return "about " + turn.text

    channel = MemoryChannel("jsonl")
    channel.before_send = refuse
    async with open_gateway(talk, store=path, channels=[channel]) as made:
        await made.accept(Message(channel="jsonl", session="ada", id="m1", text="hello"))
        await made.accept(Message(channel="jsonl", session="bob", id="m2", text="poison"))
        await made.wait_idle()


def _quarantine(path: Path, message: str) -> None:
    store = apsw.Connection(str(path))
    store.execute(
        "UPDATE turn SET state = 'QUARANTINED' WHERE id = (SELECT turn FROM message WHERE id = ?)",
        (message,),
    )
    store.execute("UPDATE message SET state = 'quarantined' WHERE id = ?", (message,))
    store.close()


def test_c30_what_was_put_aside_is_set_right_while_the_gateway_runs(
    memory_path: Path, operator: Operator
) -> None:
    trio.run(_fill, memory_path / "gateway.db")
    _quarantine(memory_path / "gateway.db", "m2")
    with gateway(memory_path) as process:
        told = operator("quarantine", "retry", "m2")
        assert told.endswith("jsonl:bob: messages m2 wait again, and are answered now\n")
        process.expect("reply", session="bob", text="re: poison")
        assert operator("quarantine", "list") == "nothing is in quarantine\n"
        operator("quarantine", "drop", "m2", code=1)
        assert "no turn or message 'm2' in quarantine" in operator.err


def test_c44_a_dead_letter_is_sent_again_while_the_gateway_runs(
    memory_path: Path, operator: Operator
) -> None:
    trio.run(_fill, memory_path / "gateway.db")
    letters = operator.json("dead-letters", "list")
    with gateway(memory_path) as process:
        for letter in letters:
            operator("dead-letters", "retry", letter["key"])
        process.expect("reply", session="ada", text="about hello")
        assert operator.json("dead-letters", "list") == []


def test_c44_a_dead_letter_is_given_up_while_the_gateway_runs(
    memory_path: Path, operator: Operator
) -> None:
    trio.run(_fill, memory_path / "gateway.db")
    with gateway(memory_path) as process:
        assert operator("dead-letters", "drop", "--all").count("is given up") == 2
        assert operator.json("dead-letters", "list") == []
        asked = [record for record in process.log if record["event"] == "control"]
        assert [record["do"] for record in asked] == ["dead-letter-drop"] * 2
        assert {record["uid"] for record in asked} == {os.getuid()}


# ----- words


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0s"), (4.9, "4s"), (61, "1m 1s"), (3600, "1h 0m"), (90_000, "1d 1h"), (-3, "0s")],
)
def test_stretches_of_time_are_told_in_two_units(seconds: float, told: str) -> None:
    assert span(seconds) == told


def test_a_stop_that_has_not_marked_yet_is_told_all_the_same() -> None:
    stop = {"reason": "shutdown", "by": "SIGTERM", "marked": None, "left": 3.0}
    told = state_line({"state": "draining", "stop": stop, "paused": False})
    assert told == "draining (shutdown): at most 3s left; by SIGTERM"
