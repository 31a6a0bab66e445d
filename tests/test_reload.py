"""Reading the configuration again: which keys count at once, what a bad file changes (nothing), and
when SIGHUP means that."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from helpers import Machine, Script, msg, settled_well
from processes import PATIENCE, GatewayProcess, launch, markers
from trio.testing import MockClock

from trio_gateway import Busy, Delivery, DeliveryRules, GatewayStopping, Limits, Settings
from trio_gateway._cli import main
from trio_gateway._config import (
    COLD,
    HOT,
    Config,
    Given,
    Sections,
    _keys,
    keys,
    load_config,
    value_of,
)
from trio_gateway._errors import ConfigError
from trio_gateway._events import TurnBegun, TurnSettled
from trio_gateway._markers import TurnState
from trio_gateway._reload import Reloader, compare
from trio_gateway._signals import hangs_up
from trio_gateway.testing import MemoryChannel

ROOT = Path(__file__).parents[1]

# ----- which keys


def test_every_key_is_hot_or_cold_and_none_is_both() -> None:
    assert HOT | COLD.keys() == set(keys())
    assert not HOT & COLD.keys()
    assert set(_keys(Sections)) < set(keys())


def test_the_page_says_of_every_key_whether_it_is_hot() -> None:
    """A whole section is written with a star."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = dict(re.findall(r"^\| (at once|at a restart) \| (.*) \|$", page, re.M))
    told = {
        kind: {
            key
            for name in re.findall(r"`([^`]+)`", row)
            for key in keys()
            if key == name or (name.endswith(".*") and key.startswith(name[:-1]))
        }
        for kind, row in rows.items()
    }
    assert told == {"at once": set(HOT), "at a restart": set(COLD)}


OTHER = {
    "store.path": "b.db", "store.keep": "1d", "store.remember": "500d", "drain.grace": "3s",
    "drain.budget": "77s", "limits.turns": 3, "limits.message_bytes": 99, "limits.key_length": 98,
    "limits.open_per_session": 97, "limits.open_messages": 96, "limits.deliveries": 95,
    "turns.busy": "steer", "turns.time_limit": "9s", "resume.within": "none",
    "resume.max_crashes": 7, "resume.max_interruptions": 8, "resume.concurrency": 9,
    "delivery.max_tries": 4, "delivery.first_delay": "2s", "delivery.max_delay": "6m",
    "delivery.timeout": "5s", "chat.commands": False, "chat.notices": False, "log.level": "error",
    "log.format": "console", "channels.console.session": "x", "channels.http.bind": "[::1]:1",
    "channels.http.hosts": ["a.example"], "channels.http.origins": ["https://a.example"],
    "channels.http.body_bytes": 1, "channels.http.header_time": "1s",
    "channels.http.body_time": "1s", "channels.http.send_time": "1s",
    "channels.http.longest_wait": "1s", "channels.http.heartbeat": "1s",
    "channels.http.connections": 1, "channels.http.per_peer": 1, "channels.http.token": "t",
    "channels.http.hook_secret": "h", "traces.endpoint": "http://[::1]:2",
}  # fmt: skip
"""Another value than the default, for each key that has one."""


def write(folder: Path, **values: Any) -> Path:
    """A `gateway.toml` with these keys, `section__key`."""
    sections: dict[str, list[str]] = {}
    for name, value in values.items():
        section, _, key = name.replace("__", ".").rpartition(".")
        sections.setdefault(section, []).append(f"{key} = {json.dumps(value)}")
    text = "\n".join(f"[{name}]\n" + "\n".join(lines) for name, lines in sections.items())
    (folder / "gateway.toml").write_text(text + "\n")
    return folder / "gateway.toml"


@pytest.mark.parametrize("key", OTHER)
def test_a_change_of_a_key_is_told_and_counts_if_it_is_hot(tmp_path: Path, key: str) -> None:
    base = {"channels.http.bind": "127.0.0.1:1"} if key.startswith("channels.http") else {}
    base |= {"channels.console.session": "c"} if "console" in key else {}
    before = load_config(write(tmp_path, **_dunder(base)), {})
    after = load_config(write(tmp_path, **_dunder({**base, key: OTHER[key]})), {})
    told = compare(before, after)
    ((change,),) = [changes for changes in (told.hot, told.cold) if changes]
    assert change.key == key
    assert (change in told.hot) is (key in HOT)
    counts = value_of(told.told.sections, key)
    assert counts == value_of((after if key in HOT else before).sections, key)
    assert str(change).startswith(f"{key}: {change.before} -> {change.after}")
    assert ("needs a restart" in str(change)) is (key in COLD)


def _dunder(values: dict[str, Any]) -> dict[str, Any]:
    return {key.replace(".", "__"): value for key, value in values.items()}


def test_every_key_has_a_case() -> None:
    assert set(OTHER) == set(_keys(Sections))


def test_a_channel_that_comes_or_goes_is_one_change(tmp_path: Path) -> None:
    before = load_config(write(tmp_path), {})
    after = load_config(write(tmp_path, channels__http__bind="[::1]:1"), {})
    (change,) = compare(before, after).cold
    assert str(change) == (
        "channels.http: false -> true needs a restart (channels are opened at the start)"
    )
    assert [one.key for one in compare(after, before).cold] == ["channels.http"]


def test_what_is_pending_is_told_until_it_is_taken_back(tmp_path: Path) -> None:
    file = write(tmp_path)
    reloader = Reloader(load_config(file, {}), {})
    used: list[Config] = []
    write(tmp_path, log__format="json", chat__notices=False)
    told = reloader.apply(reloader.read(), used.append)
    assert [one.key for one in told.hot] == ["chat.notices"]
    for _ in range(2):
        assert [one.key for one in reloader.pending] == ["log.format"]
        assert reloader.apply(reloader.read(), used.append).hot == ()
    write(tmp_path, chat__notices=False)
    reloader.apply(reloader.read(), used.append)
    assert reloader.pending == ()
    assert used[-1].sections.chat.notices is False
    assert used[-1].origin("chat.notices") == str(file)


def test_the_command_line_and_the_environment_of_the_start_still_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path)
    environ = {"TRIO_GATEWAY_LIMITS__TURNS": "5"}
    options = [Given(key="drain.grace", text="4s", origin="--grace")]
    reloader = Reloader(load_config(file, environ, options), environ, options)
    write(tmp_path, limits__turns=9, drain__grace="9s", turns__busy="collect")
    environ["TRIO_GATEWAY_LIMITS__TURNS"] = "6"  # an agent does so
    monkeypatch.chdir("/")
    told = reloader.apply(reloader.read(), lambda _: None)
    assert [str(one) for one in told.hot] == ['turns.busy: "queue" -> "collect"']


def test_p14_a_file_that_is_gone_is_no_empty_one(tmp_path: Path) -> None:
    file = write(tmp_path, limits__turns=9)
    reloader = Reloader(load_config(file, {}), {})
    file.unlink()
    with pytest.raises(ConfigError, match="there is no such file"):
        reloader.read()


def test_what_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    file = write(tmp_path)
    reloader = Reloader(load_config(file, {}), {})
    before = reloader.told
    write(tmp_path, limits__turns=9)

    def refuse(_: Config) -> None:
        raise GatewayStopping("it stops")

    with pytest.raises(GatewayStopping):
        reloader.apply(reloader.read(), refuse)
    assert reloader.told is before
    assert reloader.pending == ()


# ----- a gateway goes on with other settings, on virtual time


async def test_fewer_slots_wait_for_their_turns_and_more_begin_at_once(
    machine: Machine, autojump_clock: MockClock
) -> None:
    script = Script()
    async with machine.boot(script, settings=Settings(limits=Limits(turns=3))) as gateway:
        await gateway.accept([msg(f"s{n}", f"m{n}") for n in range(8)])
        await script.wait_begun(3)
        gateway.reconfigure(Settings(limits=Limits(turns=1)))
        assert gateway.statistics()["slots_free"] == -2
        script.release("s0")
        script.release("s1")
        await machine.log.wait_for(TurnSettled, 2)
        await trio.testing.wait_all_tasks_blocked()
        assert len(script.turns) == 3, "no heir takes over a slot that is no more"
        gateway.reconfigure(Settings(limits=Limits(turns=5)))
        await script.wait_begun(7)
        assert gateway.statistics()["slots_free"] == 0
        script.release()
        await gateway.wait_idle()
        settled_well(gateway)


async def test_the_inbox_refuses_by_the_new_limits(
    machine: Machine, autojump_clock: MockClock
) -> None:
    async with machine.boot(Script(open=True)) as gateway:
        assert (await gateway.accept(msg("a", "m1", "12345"))).accepted
        gateway.reconfigure(Settings(limits=Limits(message_bytes=4)))
        refused = await gateway.accept(msg("a", "m2", "12345"))
        assert "5 bytes, at most 4 are taken" in str(refused.reason)


async def test_the_busy_policy_and_the_commands_are_the_new_ones(
    machine: Machine, autojump_clock: MockClock
) -> None:
    script = Script()
    async with machine.boot(script) as gateway:
        await gateway.accept(msg("a", "m1"))
        await script.wait_begun(1)
        gateway.reconfigure(Settings(busy=Busy.REJECT, commands=False))
        assert not (await gateway.accept(msg("a", "m2"))).accepted
        gateway.reconfigure(Settings(busy=Busy.COLLECT, commands=False))
        await gateway.accept([msg("a", "m3", "/status"), msg("a", "m4", "four")])
        script.release()
        await gateway.wait_idle()
        # Both in one turn, and the word was none to the gateway.
        assert [len(turn.messages) for turn in script.turns] == [1, 2]


async def test_a_time_limit_counts_for_attempts_that_begin(
    machine: Machine, autojump_clock: MockClock
) -> None:
    script = Script()
    async with machine.boot(script) as gateway:
        await gateway.accept(msg("a", "m1"))
        await script.wait_begun(1)
        gateway.reconfigure(Settings(time_limit=5.0))
        await gateway.accept(msg("b", "m2"))
        (end,) = await machine.log.wait_for(TurnSettled)
        assert (end.session.name, end.state) == ("b", TurnState.FAILED)
        await trio.sleep(100)
        assert len(machine.log.of(TurnSettled)) == 1
        script.release()


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (3, 2)])
async def test_p07_replies_are_delivered_by_as_many_senders_as_there_are_now(
    machine: Machine, autojump_clock: MockClock, before: int, after: int
) -> None:
    chat = MemoryChannel("chat")
    at_once = most = 0
    gate = trio.Event()

    async def count(delivery: Delivery) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            await gate.wait()
            await trio.sleep(1)
        finally:
            at_once -= 1

    chat.before_send = count
    script = Script(open=True)
    settings = Settings(limits=Limits(deliveries=before))
    async with machine.boot(script, chat, settings=settings) as gateway:
        await gateway.accept([msg(f"s{n}", f"m{n}", channel="chat") for n in range(12)])
        await machine.log.wait_for(TurnSettled, 12)
        await trio.testing.wait_all_tasks_blocked()
        assert at_once == before
        gateway.reconfigure(Settings(limits=Limits(deliveries=after)))
        await trio.testing.wait_all_tasks_blocked()
        assert at_once == max(before, after), "what is being sent is not cut"
        gate.set()
        await trio.sleep(1.5)
        most = 0
        await gateway.wait_idle()
        assert 0 < most <= after
        # And once more from rest: none is left that would be one too many, and one is there.
        most = 0
        await gateway.accept([msg(f"t{n}", f"n{n}", channel="chat") for n in range(6)])
        await gateway.wait_idle()
        assert most == after
        assert len(chat.sent) == 18


async def test_p07_a_reply_is_tried_as_often_as_is_said_now(
    machine: Machine, autojump_clock: MockClock
) -> None:
    chat = MemoryChannel("chat")

    async def fail(delivery: Delivery) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError("away")

    chat.before_send = fail
    async with machine.boot(Script(open=True), chat) as gateway:
        await gateway.accept(msg("a", "m1", channel="chat"))
        await machine.log.wait_for(TurnBegun)
        gateway.reconfigure(Settings(delivery=DeliveryRules(max_tries=2)))
        await gateway.wait_idle()
        (letter,) = await gateway.inspect(lambda reader: reader.dead_letters())
        assert letter.tries <= 3


async def test_p11_the_stop_keeps_the_budget_that_counts_now(
    machine: Machine, autojump_clock: MockClock
) -> None:
    script = Script()
    async with machine.boot(script, settings=Settings(grace=1000, budget=2000)) as gateway:
        await gateway.accept(msg("a", "m1"))
        await script.wait_begun(1)
        gateway.reconfigure(Settings(grace=2, budget=10))
        began = trio.current_time()
        gateway.request_stop()
    assert trio.current_time() - began < 10
    assert gateway.report is not None
    assert gateway.report.timed_out
    with pytest.raises(GatewayStopping, match="its settings stay as they are"):
        gateway.reconfigure(Settings())


# ----- real processes


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@contextmanager
def configured(
    where: Path, agent: str = "async def agent(turn):\n    return turn.text\n", **values: Any
) -> Generator[GatewayProcess]:
    """A gateway with a configuration, whose log is at the level that this says."""
    write(where, **values)
    with launch(where, agent) as process:
        yield process


@pytest.fixture(name="reload")
def _reload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(code: int = 0) -> str:
        capsys.readouterr()
        assert main(["reload", "--store", str(tmp_path / "gateway.db")]) == code
        told = capsys.readouterr()
        return told.err if code else told.out

    return call


def test_reload_applies_what_is_hot_and_tells_what_is_not(
    tmp_path: Path, reload: Callable[..., str]
) -> None:
    with configured(tmp_path) as process:
        assert reload() == "gateway.toml: nothing has changed\n"
        write(tmp_path, limits__message_bytes=4, log__level="warning", resume__max_crashes=9)
        assert reload() == (
            "changed: limits.message_bytes: 1048576 -> 4\n"
            'changed: log.level: "info" -> "warning"\n'
            "not yet: resume.max_crashes: 3 -> 9 needs a restart (it is read when a gateway"
            " starts)\n"
        )
        process.send("a", "m1", "12345")
        process.expect("refused")
        process.send("a", "m2", "123")
        process.expect("reply", text="123")
        levels = [record["level"] for record in process.log if record["event"] != "reloaded"]
        assert levels[-1] == "warning"
        assert not [one for one in process.log if one["event"] == "turn_settled"]


def test_p14_a_bad_file_changes_nothing_and_says_why(
    tmp_path: Path, reload: Callable[..., str]
) -> None:
    with configured(tmp_path) as process:
        (tmp_path / "gateway.toml").write_text(
            '[limits]\nturns = "many"\nmessage_bytes = 4\n[log]\nlevel = "warning"\nlvl = 1\n'
        )
        told = reload(78)
        file = tmp_path / "gateway.toml"
        assert told == (
            f'trio-gateway: limits.turns: expected an integer, 1 or more, got "many" ({file})\n'
            f"trio-gateway: log.lvl: unknown key; did you mean level? ({file})\n"
        )
        failed = process.expect_log("reload_failed")
        assert len(failed["errors"]) == 2
        process.send("a", "m1", "12345")
        process.expect("reply", text="12345")
        process.expect_log("turn_settled")


def test_sighup_reloads_where_there_is_no_terminal(tmp_path: Path) -> None:
    with configured(tmp_path) as process:
        write(tmp_path, limits__message_bytes=4)
        process.signal(signal.SIGHUP)
        told = process.expect_log("reloaded")
        assert told["changed"] == ["limits.message_bytes: 1048576 -> 4"]
        write(tmp_path, limits__message_bytes="four")
        process.signal(signal.SIGHUP)
        process.expect_log("reload_failed")
        process.send("a", "m1", "123")
        process.expect("reply", text="123")
        assert process.stop() == 0


def test_a_sighup_during_the_start_is_obeyed_when_it_serves(tmp_path: Path) -> None:
    write(tmp_path)
    with launch(tmp_path, "import time; time.sleep(1)\nasync def agent(turn): pass\n",
                ready=False) as process:  # fmt: skip
        _wait_for_handler(process.pid)
        write(tmp_path, chat__notices=False)
        process.signal(signal.SIGHUP)
        process.expect_log("reloaded")
        assert process.stop() == 0


def _wait_for_handler(pid: int) -> None:
    """Wait until SIGHUP is caught: before that it would kill."""
    mask = 1 << (signal.SIGHUP - 1)
    for _ in range(int(PATIENCE / 0.01)):
        status = Path(f"/proc/{pid}/status").read_text()
        if int(status.partition("SigCgt:")[2].split()[0], 16) & mask:
            return
        signal.sigtimedwait([], 0.01)
    raise AssertionError("SIGHUP is not caught")


def test_c47_a_terminal_that_is_gone_stops_the_gateway(tmp_path: Path) -> None:
    """As the kernel does for whoever closes a window, with a turn open."""
    agent = "import trio\nasync def agent(turn):\n    await trio.sleep(0 if turn.resumed else 60)\n"
    (tmp_path / "bot.py").write_text(agent)
    master, slave = os.openpty()
    with (tmp_path / "err.txt").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "trio_gateway", "run", "bot.py:agent", "--grace", "200ms"],
            stdin=slave, stdout=slave, stderr=errors, cwd=tmp_path, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm", "TRIO_GATEWAY_LOG__LEVEL": "info"},
        )  # fmt: skip
    try:
        os.close(slave)
        _wait_for(tmp_path / "err.txt", "gateway_started")
        os.write(master, b"hello\n")
        _wait_for(tmp_path / "err.txt", "turn_begun")
        process.send_signal(signal.SIGHUP)
        assert process.wait(PATIENCE) == 0
        os.close(master)
        told = (tmp_path / "err.txt").read_text()
        assert re.search(r"stop_requested.*SIGHUP", told)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait(PATIENCE)
    assert markers(tmp_path) == {"console": ("RESUME_PENDING", "shutdown")}


def _wait_for(file: Path, text: str) -> None:
    for _ in range(int(PATIENCE / 0.01)):
        if text in file.read_text():
            return
        signal.sigtimedwait([], 0.01)
    raise AssertionError(f"no {text} in {file.read_text()}")


def test_a_supervisor_makes_a_terminal_mean_nothing() -> None:
    assert not hangs_up({"NOTIFY_SOCKET": "/run/systemd/notify"})


@contextmanager
def notified(where: Path) -> Generator[socket.socket]:
    """The socket at which a supervisor hears."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as made:
        made.bind(str(where / "notify"))
        made.settimeout(PATIENCE)
        yield made


def _hears(heard: socket.socket, wanted: str) -> dict[str, str]:
    """The next datagram with an assignment of that name."""
    while True:
        told = dict(line.split("=", 1) for line in heard.recv(4096).decode().splitlines())
        if wanted in told:
            return told


@pytest.mark.parametrize("good", [True, False])
def test_a_supervisor_is_told_when_a_reload_begins_and_when_it_is_over(
    tmp_path: Path, good: bool
) -> None:
    with notified(tmp_path) as heard:
        write(tmp_path)
        environ = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        with launch(tmp_path, "async def agent(turn): pass\n", env=environ) as process:
            assert _hears(heard, "READY")["READY"] == "1"
            before = _monotonic()
            write(tmp_path, limits__turns=5 if good else "five")
            process.signal(signal.SIGHUP)
            told = _hears(heard, "RELOADING")
            assert told["RELOADING"] == "1"
            assert before <= int(told["MONOTONIC_USEC"]) <= _monotonic()
            assert _hears(heard, "READY")["STATUS"].startswith("serving")
            process.expect_log("reloaded" if good else "reload_failed")
            assert process.stop() == 0
            assert _hears(heard, "STOPPING")["STOPPING"] == "1"


def _monotonic() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_settings_of_a_reload_are_those_of_a_start(tmp_path: Path) -> None:
    """What a gateway goes on with is what it would have been started with."""
    values = {key: OTHER[key] for key in HOT}
    before = load_config(write(tmp_path), {})
    after = load_config(write(tmp_path, **_dunder(values)), {})
    running = compare(before, after).told
    assert attrs.asdict(running.settings(), recurse=False) == attrs.asdict(
        after.settings(), recurse=False
    )
