"""A real systemd, as number 1 of private namespaces, that runs the real command by the unit of
docs/operations.md, and everything that it does to a service.

Each point is one store under one systemd: `STORE:CYCLES`. A cycle is one thing that happens to the
service, under load; its name is a method here. What systemd says of it (`Result=`, `NRestarts=`,
exit codes) is asserted at once; what the turns came to, when the store's last life has ended.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess
from typing import Final

import attrs

from ._platform import PATIENCE
from ._process import scratch_folder
from ._report import Campaign, Job, Skip
from ._supervised import Outcome, Supervised, deal, lives, play
from ._systemd import Systemd, check_machine, gateway_below

CAMPAIGN: Final = Campaign(
    name="systemd",
    injects="what a real systemd does to a service: stops too short for the drain, kills, watchdog"
    " aborts, restarts, start limits, machines that die",
    short="stops, kills and restarts by a real systemd",
    promises=(1, 2, 4, 5, 6, 9, 11, 13, 14),
    counted="cycles",
    must_see=(
        "killed by TimeoutStopSec in the drain: some turns had settled in it, some not",
        "killed by TimeoutStopSec while nothing settled: every open turn was marked",
        "killed with -9 in the load, and restarted",
        "killed with -9 in the drain, and not restarted",
        "aborted by the watchdog, and restarted",
        "kept by the watchdog while it served",
        "ready only when it had recovered",
        "exit 75, and restarted",
        "a turn asked for a restart, and settled before it",
        "exit 78, and not restarted",
        "the stop was extended while turns settled",
        "start limit hit",
        "left by itself though a turn swallowed its cancellation",
        "left by itself though the event loop was blocked",
        "frozen in the drain",
        "the machine died",
        "the machine was switched off in order",
    ),
)

UNIT: Final = "gateway.service"
PAGE: Final = Path(__file__).parents[1] / "docs" / "operations.md"
CYCLES: Final = 10
"""Cycles of one store."""

SHORT: Final = (0.3, 3.0)
"""Grace and budget of an ordinary stop, in seconds."""

ROOMY: Final = (6.0, 9.0)
"""Grace and budget of a stop that is to be cut short, or extended."""

FACTS: Final = (
    "ActiveState", "SubState", "Result", "NRestarts", "ExecMainCode", "ExecMainStatus",
)  # fmt: skip

MISTAKES: Final = (
    ("gateway.toml", "[drain]\ngarce = '1s'\n", "garce"),
    ("gateway.toml", "[drain]\ngrace = \n", "gateway.toml"),
    ("agent.py", "agnet = None\n", "has no 'agent'"),
    ("agent.py", "agent = 3\n", "3"),
)
"""What cannot be used: a file, what is wrong in it, and what is told of it."""

END: Final = """
cd "${0%/*}"
printf '\\n#died %s %s %s\\n' "$SERVICE_RESULT" "$EXIT_CODE" "$EXIT_STATUS" >>out.jsonl
"""


def run(job: Job) -> None:
    """Play every store, each under a systemd of its own."""
    check_machine()
    try_boot()
    cycles = job.amount(3, 100, 500)
    points = [f"{store}:{min(CYCLES, cycles)}" for store in range(-(-cycles // CYCLES))]
    points = [job.only] if job.only is not None else points
    play(job, points, lambda outcome: play_store(outcome, job.seed))


def try_boot() -> None:
    """Boot a systemd with nothing to do. Raises `Skip` where that does not work."""
    with scratch_folder() as folder:
        try:
            with Systemd(folder):
                pass
        except AssertionError as error:
            raise Skip(f"no systemd of our own boots here: {error}") from error


def play_store(outcome: Outcome, seed: int) -> None:
    """One store through its cycles, and the account at the end."""
    store, cycles = map(int, outcome.point.split(":"))
    dice = random.Random(f"{seed}/{outcome.point}")
    load = random.Random(dice.random())
    with scratch_folder() as folder, Supervised(folder, load) as gateway:
        systemd = Systemd(folder)
        (folder / "end.sh").write_text(END)
        systemd.write_unit(UNIT, documented_unit())
        service = _Service(gateway, systemd, dice, outcome)
        try:
            with systemd:
                for cycle in deal(KINDS, seed, store * CYCLES, cycles):
                    service.play(cycle)
                service.finish()
            outcome.count(stores=1, **gateway.account())
        except Exception as error:
            error.add_note(f"cycles: {' '.join(service.story)}\nends: {gateway.deaths}")
            error.add_note(f"console: {systemd.console[-800:]}")
            error.add_note(f"log: {gateway.platform.log()[-1500:]}")
            raise


def documented_unit() -> str:
    """The unit that docs/operations.md recommends, as it stands there."""
    page = PAGE.read_text(encoding="utf-8")
    block = page[page.index("    [Unit]") : page.index("`READY=1`")]
    return "".join(f"{line.strip()}\n" for line in block.splitlines())


@attrs.define(eq=False)
class _Service:
    """The gateway as a service, in the hands of a systemd. Each cycle is one method."""

    gateway: Supervised
    systemd: Systemd
    dice: random.Random
    outcome: Outcome
    story: list[str] = attrs.field(factory=list[str])
    _limits: tuple[float, float] = SHORT

    def play(self, cycle: Callable[[_Service], None]) -> None:
        """One cycle, and what systemd made of it."""
        self.story.append(cycle.__name__)
        cycle(self)
        self.outcome.count(cycles=1)

    def finish(self) -> None:
        """Let the last lives end everything, and stop in order."""
        self.settle_all()
        self.stop_in_order()

    # ----- the cycles: stops

    def overrun(self) -> None:
        """A drain that TimeoutStopSec cuts: some turns settle in it, some do not. Such a unit is
        not told of by `notify`, or settling turns would extend the stop."""
        limit = f"{self.dice.randint(300, 800)}ms"
        deaf = {"Type": "exec", "NotifyAccess": "none", "WatchdogSec": "0"}
        self.up(ROOMY, **deaf, TimeoutStopSec=limit)
        self.load(hanging=2)
        before = self.deaths
        self.ctl("stop")
        self.expect_end(before, "timeout killed KILL")
        self.expect("failed", Result="timeout", ExecMainStatus="9")
        life = lives(self.gateway.folder)[-1]
        if life.marked and life.settled_in_drain and self.gateway.found():
            self.saw(
                "killed by TimeoutStopSec in the drain: some turns had settled in it, some not"
            )
        self.outcome.count(killed_in_drain=1)

    def hung(self) -> None:
        """A drain in which nothing settles is not extended: TimeoutStopSec cuts it."""
        self.settle_all()
        self.up(ROOMY, TimeoutStopSec=f"{self.dice.randint(400, 800)}ms")
        self.hang("long", 3)
        before = self.deaths
        self.ctl("stop")
        self.expect_end(before, "timeout killed KILL")
        self.expect("failed", Result="timeout", ExecMainStatus="9")
        found = self.gateway.found().values()
        assert len(found) == 3, found
        if all(marker.reason == "shutdown" for marker in found):
            self.saw("killed by TimeoutStopSec while nothing settled: every open turn was marked")
        self.outcome.count(killed_in_drain=1)

    def extended(self) -> None:
        """A drain longer than TimeoutStopSec, in which one turn settles after the other, ends by
        itself: nothing is interrupted."""
        self.settle_all()
        self.up(ROOMY, TimeoutStopSec="1500ms")
        texts = [f"sleep {0.4 + 0.35 * number:.2f}" for number in range(6)]
        self.gateway.wait_accepted(*(self.gateway.send(f"x{text}", text) for text in texts))
        before = self.deaths
        began = time.monotonic()
        self.ctl("stop")
        seconds = time.monotonic() - began
        self.expect_end(before, "success exited 0")
        self.expect("inactive", Result="success")
        drain = lives(self.gateway.folder)[-1].drain
        assert drain is not None, "the drain told nothing of itself"
        assert drain["interrupted"] == [], drain
        assert not drain["timed_out"], drain
        if seconds > 1.5:
            self.saw("the stop was extended while turns settled")

    def stubborn(self) -> None:
        """Turns swallow their cancellation: the process leaves by itself, long before systemd
        would kill it."""
        self.up()
        self.load()
        self.hang("stubborn", 2)
        before = self.deaths
        self.ctl("stop")
        self.expect_end(before, "success exited 0")
        self.expect("inactive", Result="success")
        self.saw("left by itself though a turn swallowed its cancellation")

    def blocked(self) -> None:
        """A turn blocks the event loop: the process leaves by itself, with 1, and is not started
        again, because somebody stopped it."""
        self.up()
        self.load()
        self.gateway.wait_begun(self.gateway.hang("block"))
        before = self.deaths
        self.ctl("stop")
        self.expect_end(before, "exit-code exited 1")
        self.expect("failed", Result="exit-code", ExecMainStatus="1")
        found = self.gateway.found()
        running = [turn for turn, marker in found.items() if marker.state == "RUNNING"]
        assert found, "nothing was open"
        assert not running, f"the watchdog thread left {running} running on disk"
        self.saw("left by itself though the event loop was blocked")

    def frozen(self) -> None:
        """The process is frozen inside its drain, so that nothing of it can act: systemd kills it
        when its time is over, which settling turns had extended to its budget at the most."""
        self.up(TimeoutStopSec="500ms")
        self.load(hanging=2)
        before = self.deaths
        self.ctl("stop", "--no-block")
        time.sleep(self.dice.uniform(0, 0.25))
        self.hit(signal.SIGSTOP)
        end = self.gateway.wait_death(before)
        self.ctl("stop")
        if end == "timeout killed KILL":
            self.expect("failed", Result="timeout", ExecMainStatus="9")
            self.saw("frozen in the drain")
            self.outcome.count(killed_in_drain=1)
        else:
            self.expect("inactive", Result="success")  # it was out already
            assert end == "success exited 0", end

    def restarted(self) -> None:
        """`systemctl restart`, and a second SIGTERM in the drain, which changes nothing: not the
        window that its turns have, either."""
        grace = 0.6
        self.up((grace, 3.0))
        self.load(hanging=2)
        before, boots = self.deaths, self.gateway.boots
        asked = time.monotonic()
        self.ctl("restart", "--no-block")
        time.sleep(self.dice.uniform(0, grace / 2))
        self.hit(signal.SIGTERM)
        self.expect_end(before, "success exited 0")
        took = time.monotonic() - asked
        assert took >= grace, f"it left {took:.2f} s after it was asked to, and had {grace:g} s"
        self.gateway.wait_boot(boots)
        self.ctl("start")
        self.expect("active", Result="success")

    # ----- the cycles: deaths

    def killed(self) -> None:
        """kill -9 somewhere in the load: systemd starts it again."""
        self.up()
        self.gateway.feed(self.dice.uniform(0, 0.3))
        before, boots = self.deaths, self.gateway.boots
        restarts = self.restarts()
        self.hit(signal.SIGKILL)
        self.expect_end(before, "signal killed KILL")
        self.gateway.wait_boot(boots)
        self.ctl("start")
        assert self.restarts() == restarts + 1
        self.saw("killed with -9 in the load, and restarted")
        self.outcome.count(kills=1, restarts=1)

    def killed_in_drain(self) -> None:
        """kill -9 somewhere in the drain: it was stopped, so it is not started again."""
        self.up()
        self.load(hanging=2)
        before = self.deaths
        self.ctl("stop", "--no-block")
        time.sleep(self.dice.uniform(0, 0.35))
        self.hit(signal.SIGKILL)
        end = self.gateway.wait_death(before)
        self.ctl("stop")
        if end == "signal killed KILL":
            self.expect("failed", Result="signal", ExecMainStatus="9")
            self.saw("killed with -9 in the drain, and not restarted")
            self.outcome.count(kills=1, killed_in_drain=1)
        else:
            self.expect("inactive", Result="success")
            assert end == "success exited 0", end

    def watchdog(self) -> None:
        """Under WatchdogSec a process that serves is kept. When its event loop is blocked, systemd
        aborts it and starts it again."""
        self.stop_in_order()
        self.up(WatchdogSec="1500ms")
        before = self.deaths
        self.gateway.feed(1.8)
        assert self.deaths == before, "aborted though it served"
        self.saw("kept by the watchdog while it served")
        # It may take more than one life to begin with it; that one ends like those before.
        life = self.gateway.wait_begun(self.gateway.hang("block"))
        self.gateway.wait_boot(life)
        assert self.restarts() > 0
        self.unit()
        self.ctl("stop")
        ends = self.gateway.deaths[before:]
        aborts = [end for end in ends if end in ("watchdog dumped ABRT", "watchdog killed ABRT")]
        assert aborts, ends
        # The life after it was stopped; if it had not taken signals yet, by the signal.
        assert set(ends) - set(aborts) <= {"success exited 0", "success killed TERM"}, ends
        self.saw("aborted by the watchdog, and restarted")
        self.outcome.count(aborts=len(aborts), restarts=len(aborts))

    def storm(self) -> None:
        """Killed again and again as soon as it is there, until systemd starts it no more; then a
        person clears the way and starts it."""
        self.stop_in_order()
        self.up(StartLimitBurst="4", StartLimitIntervalSec="120s", RestartSec="20ms")
        self.gateway.top_up()
        self.kill_until_refused()
        boots = self.gateway.boots
        assert self.ctl("start", check=False).returncode, "started beyond its limit"
        self.expect("failed")
        assert self.gateway.boots == boots
        assert "Start request repeated too quickly" in self.systemd.console
        self.saw("start limit hit")

    def kill_until_refused(self) -> None:
        """Kill each life, young, until there is none any more."""
        for _ in range(8):
            boots, before = self.gateway.boots, self.deaths
            time.sleep(self.dice.uniform(0, 0.4))
            self.hit(signal.SIGKILL, patiently=True)
            self.gateway.wait_death(before)
            self.outcome.count(kills=1)
            deadline = time.monotonic() + PATIENCE
            while self.gateway.boots == boots and time.monotonic() < deadline:
                if self.facts()["ActiveState"] == "failed":
                    return
                time.sleep(0.02)
        raise AssertionError(f"still started: {self.facts()}")

    def machine_dies(self) -> None:
        """Everything dies at once, systemd first."""
        self.up()
        self.load(hanging=1)
        self.gateway.feed(self.dice.uniform(0, 0.2))
        self.systemd.die()
        self.systemd.boot()
        self.saw("the machine died")
        self.outcome.count(kills=1)

    def switched_off(self) -> None:
        """The machine is switched off in order, and on again."""
        self.up()
        self.load(hanging=2)
        before = self.deaths
        self.systemd.power_off()
        self.expect_end(before, "success exited 0")
        self.systemd.boot()
        self.saw("the machine was switched off in order")

    # ----- the cycles: exit codes

    def asks_for_restart(self) -> None:
        """Somebody, or a turn, asks for a restart: exit 75, and systemd starts it again. The turn
        that asked settles before (promise 13)."""
        self.up()
        self.load(hanging=1)
        before, boots = self.deaths, self.gateway.boots
        restarts = self.restarts()
        asking = self.gateway.send("admin", "restart") if self.dice.random() < 0.5 else ""
        if not asking:
            self.hit(signal.SIGUSR1)
        self.expect_end(before, "success exited 75")
        self.gateway.wait_boot(boots)
        self.ctl("start")
        assert self.restarts() == restarts + 1
        if asking:
            assert self.gateway.attempt_of(asking) == 1, "a restart interrupted who asked for it"
            self.saw("a turn asked for a restart, and settled before it")
        self.saw("exit 75, and restarted")
        self.outcome.count(restarts=1)

    def misconfigured(self) -> None:
        """A configuration or an agent that cannot be used: exit 78, and it stays down, with
        everything that is in the store. Messages that come meanwhile wait."""
        self.up()
        self.load(hanging=1)
        self.stop_in_order()
        before = self.deaths
        name, text, told = self.dice.choice(MISTAKES)
        path = self.gateway.folder / name
        good = path.read_text()
        path.write_text(text)
        assert self.ctl("start", check=False).returncode
        self.gateway.send("ada", "plain")
        self.expect_end(before, "exit-code exited 78")
        self.expect("failed", Result="exit-code", ExecMainStatus="78", NRestarts="0")
        assert told in self.gateway.platform.log(), f"{told!r} is not told"
        path.write_text(good)
        self.saw("exit 78, and not restarted")

    # ----- their parts

    def up(self, limits: tuple[float, float] = SHORT, /, **settings: str) -> None:
        """Have the service serve, with these limits, by a unit with these settings."""
        if limits != self._limits:
            self.stop_in_order()
            self.gateway.set_limits(*limits)
            self._limits = limits
        self.unit(**settings)
        boots = self.gateway.boots
        if self.facts()["ActiveState"] != "active":
            self.ctl("reset-failed", check=False)
            before = self.gateway.recoveries
            self.ctl("start")
            if "Type" not in settings:  # else it returns before systemd has heard of READY=1
                assert self.gateway.recoveries > before, "ready before it had recovered"
                self.saw("ready only when it had recovered")
            self.gateway.wait_boot(boots)

    def unit(self, **settings: str) -> None:
        """Change the unit of the page in what a fast campaign needs, and in these settings."""
        folder = self.gateway.folder
        limits = {"StartLimitIntervalSec": "300", "StartLimitBurst": "10000"}
        unit = {name: settings.pop(name, limit) for name, limit in limits.items()}
        unit |= {"DefaultDependencies": "no", "Conflicts": "shutdown.target"}
        unit |= {"Before": "shutdown.target"}
        service = {
            "ExecStart": f"/bin/bash {self.gateway.start_script}",
            "ExecStopPost": f"/bin/bash {folder}/end.sh",
            "StateDirectory": "",  # the store is in the folder
            "RestartSec": "50ms",
            "TimeoutStopSec": "15s",
            "LimitCORE": "0",
            "StandardOutput": "null",
        }
        text = _section("Unit", unit) + _section("Service", service | settings)
        self.systemd.write_unit(f"{UNIT}.d/proof.conf", text)
        self.systemd.ctl("daemon-reload")

    def load(self, hanging: int = 0) -> None:
        """Give it work, and wait until it has it; `hanging` turns of it do not end by
        themselves."""
        self.gateway.top_up()
        if hanging:
            self.hang("long", hanging)

    def hang(self, kind: str, count: int) -> None:
        """Give it turns that do not end by themselves, and wait until they have begun on disk."""
        self.gateway.wait_accepted(*(self.gateway.hang(kind) for _ in range(count)))

    def settle_all(self) -> None:
        """Let everything be answered. What hangs ends in its second attempt, for which it may
        need one more stop."""
        self.up()
        self.gateway.wait_accepted()
        self.gateway.wait_answered(stuck=False)
        if self.gateway.unanswered():
            self.stop_in_order()
            self.up()
        self.gateway.wait_answered(stuck=True)

    def stop_in_order(self) -> None:
        """`systemctl stop`, if it is up; which ends well."""
        if self.facts()["ActiveState"] == "active":
            self.ctl("stop")
            self.expect("inactive", Result="success")

    def hit(self, number: signal.Signals, *, patiently: bool = False) -> None:
        """Send the gateway a signal, if it is there."""
        deadline = time.monotonic() + (PATIENCE if patiently else 0)
        while (pid := gateway_below(self.systemd.pid)) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    # ----- what systemd says

    @property
    def deaths(self) -> int:
        """How many lives have ended."""
        return len(self.gateway.deaths)

    def ctl(self, word: str, *more: str, check: bool = True) -> CompletedProcess[str]:
        """`systemctl`, about the service."""
        return self.systemd.ctl(word, *more, UNIT, check=check)

    def facts(self) -> Mapping[str, str]:
        """What systemd says of the service."""
        return self.systemd.show(UNIT, *FACTS)

    def restarts(self) -> int:
        """How often systemd has started it again by itself."""
        return int(self.facts()["NRestarts"])

    def expect(self, state: str, **facts: str) -> None:
        """It says this of the service. One that is to be started again is neither `failed` nor
        `inactive`, but `activating`."""
        said = self.facts()
        wanted = {"ActiveState": state, **facts}
        assert wanted.items() <= said.items(), f"{wanted} expected, but {said}"

    def expect_end(self, before: int, *ends: str) -> None:
        """The life after so many ends is over, in one of these ways."""
        self.gateway.wait_death(before)
        end = self.gateway.deaths[before]
        assert end in ends, f"{ends} expected, but {end}"

    def saw(self, state: str) -> None:
        """The campaign has come through this state."""
        self.outcome.seen.append(state)


def _section(name: str, settings: Mapping[str, str]) -> str:
    return "\n".join([f"[{name}]", *(f"{key}={value}" for key, value in settings.items()), ""])


KINDS: Final = (
    _Service.overrun,
    _Service.killed,
    _Service.asks_for_restart,
    _Service.hung,
    _Service.killed_in_drain,
    _Service.watchdog,
    _Service.extended,
    _Service.misconfigured,
    _Service.machine_dies,
    _Service.stubborn,
    _Service.frozen,
    _Service.storm,
    _Service.restarted,
    _Service.blocked,
    _Service.switched_off,
)
"""Every cycle; the first ones are those that tell most."""
