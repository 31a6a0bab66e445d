"""What whoever supervises a gateway really allows it, compared with what a stop may take.

systemd is asked what it knows of the unit (`systemctl show`); of a container only its environment
can tell, by TRIO_GATEWAY_STOP_LIMIT. Each finding that is not fine names the fix.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final

import attrs

from ._config import format_duration, parse_duration

STOP_LIMIT: Final = "TRIO_GATEWAY_STOP_LIMIT"
"""Tells how long whoever runs the container waits before it kills, like 30s."""

SYSTEMCTL_PATIENCE: Final = 3.0
"""Seconds that systemctl gets to answer."""

MARGIN: Final = 1.0
"""Seconds between the end of the budget and the kill that is not worth a warning."""

LEAST_WATCHDOG: Final = 5.0
"""Seconds; within half of it a write to a busy disk must succeed."""

EXIT_CODES: Final = (("RestartForceExitStatus", 75), ("RestartPreventExitStatus", 78))
"""Properties of a unit, and the exit code of ours that belongs there."""

FACTS: Final = (
    "LoadState", "Type", "TimeoutStopUSec", "WatchdogUSec", "KillMode", "Restart",
    *(name for name, _ in EXIT_CODES),
)  # fmt: skip


class Status(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@attrs.frozen
class Finding:
    """What one check found. The text names the next step where there is one."""

    status: Status
    check: str
    found: str


@attrs.frozen
class Unit:
    """A systemd service, and whether it belongs to a user's own systemd."""

    name: str
    user: bool


def warnings_at_start(budget: float, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What somebody who starts a gateway should know of its supervisor. May take as long as
    systemctl does; without an answer there is nothing to tell."""
    findings = list(_of_container(environ, budget))
    unit = unit_in(Path("/proc/self/cgroup")) if environ.get("NOTIFY_SOCKET") else None
    if unit is not None and (facts := ask_systemctl(unit)):
        findings += _of_unit(unit, facts, budget)
    return [finding.found for finding in findings if finding.status is not Status.OK]


def is_supervised(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether there is anything that `warnings_at_start` could compare with."""
    return bool(environ.get("NOTIFY_SOCKET")) or STOP_LIMIT in environ


def supervisor_of(
    environ: Mapping[str, str] = os.environ, processes: Path = Path("/proc")
) -> str | None:
    """What would start this process again, as far as can be known; None: nothing that is known."""
    if environ.get("NOTIFY_SOCKET"):
        return "systemd"
    if os.getpid() == 1 or STOP_LIMIT in environ:
        return "a container"
    try:
        parent = (processes / str(os.getppid()) / "comm").read_text("utf-8", "replace").strip()
    except OSError:
        return None
    if parent == "systemd" and unit_in(processes / "self" / "cgroup") is None:
        return None  # it is an orphan
    return _SUPERVISORS.get(parent)


_SUPERVISORS: Final = MappingProxyType(
    {
        "systemd": "systemd",
        "supervisord": "supervisord",
        "runsv": "runit",
        "s6-supervise": "s6",
        "circusd": "circus",
    }
)


def compare(budget: float, environ: Mapping[str, str], unit: Unit | None) -> Iterator[Finding]:
    """All that can be found out: of the container, and of a unit if there is one."""
    yield from _of_container(environ, budget)
    if unit is None:
        return
    if facts := ask_systemctl(unit):
        yield from _of_unit(unit, facts, budget)
    else:
        yield Finding(
            Status.WARN,
            "supervisor",
            f"systemd does not tell how long {unit.name} may take to stop; compare its"
            f" TimeoutStopSec with drain.budget ({written(budget)}) yourself",
        )


def written(seconds: float) -> str:
    """Seconds as a duration of the configuration."""
    return format_duration(timedelta(milliseconds=round(seconds * 1000)))


# ----- containers


def _of_container(environ: Mapping[str, str], budget: float) -> Iterator[Finding]:
    if (text := environ.get(STOP_LIMIT)) is None:
        return
    try:
        limit = parse_duration(text).total_seconds()
    except ValueError as error:
        yield Finding(Status.FAIL, "supervisor", f'{STOP_LIMIT}: {error}, got "{text}"')
        return
    advice = (
        f"raise terminationGracePeriodSeconds, stop_grace_period or docker stop -t above"
        f" {written(budget)} (and {STOP_LIMIT} with it), or lower drain.budget below {text}"
    )
    yield _compare_stop(STOP_LIMIT, limit, budget, advice)


def _compare_stop(who: str, limit: float, budget: float, advice: str) -> Finding:
    if limit == float("inf"):
        return Finding(Status.OK, "supervisor", f"{who} may take any time to stop")
    told = f"{who} allows {written(limit)} for a stop, drain.budget is {written(budget)}"
    if budget > limit:
        return Finding(Status.FAIL, "supervisor", f"{told}: it would be killed before; {advice}")
    if limit < budget + MARGIN:
        return Finding(Status.WARN, "supervisor", f"{told}: leave a second between them; {advice}")
    return Finding(Status.OK, "supervisor", told)


# ----- systemd


def unit_in(cgroup: Path) -> Unit | None:
    """The service that a process belongs to, from its /proc/PID/cgroup; None for a login shell."""
    try:
        path = cgroup.read_text("utf-8", "replace")
    except OSError:
        return None
    names = re.findall(r"/([^/\n]+\.(?:service|scope))(?=/|\n|$)", path)
    if not names or names[-1].endswith(".scope") or names[-1].startswith("user@"):
        return None
    return Unit(names[-1], user="/user@" in path)


def named_unit(name: str, *, user: bool) -> Unit:
    """The service of that name, with or without `.service`."""
    return Unit(name if "." in name else f"{name}.service", user)


def ask_systemctl(unit: Unit) -> Mapping[str, str]:
    """What systemd says of a unit, by property; empty where there is no answer."""
    systemctl = shutil.which("systemctl")
    if systemctl is None:
        return {}
    where = ["--user"] if unit.user else []
    command = [systemctl, *where, "show", "-p", ",".join(FACTS), "--", unit.name]
    # It would tell our supervisor how it fared itself.
    environ = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=SYSTEMCTL_PATIENCE,
            check=False,
            stdin=subprocess.DEVNULL,
            env=environ,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = [line.partition("=") for line in done.stdout.decode("utf-8", "replace").splitlines()]
    facts = {name: value for name, _, value in pairs}
    return facts if parse_timespan(facts.get("TimeoutStopUSec", "")) is not None else {}


def _of_unit(unit: Unit, facts: Mapping[str, str], budget: float) -> Iterator[Finding]:
    if facts.get("LoadState") == "not-found":
        told = f"there is no unit {unit.name}: trio-gateway install systemd writes one"
        yield Finding(Status.FAIL, "supervisor", told)
        return
    limit = parse_timespan(facts["TimeoutStopUSec"]) or 0.0
    advice = f"raise its TimeoutStopSec above {written(budget)}, or lower drain.budget"
    yield _compare_stop(unit.name, limit, budget, advice)
    doubts = (_kind(facts), _kill_mode(facts), _watchdog(facts), _exit_codes(facts))
    for doubt in doubts:
        if doubt is not None:
            yield Finding(Status.WARN, "supervisor", f"{unit.name}: {doubt}")


def _kind(facts: Mapping[str, str]) -> str | None:
    if facts.get("Type", "notify").startswith("notify"):
        return None
    return (
        f"Type={facts['Type']} does not hear that the gateway is ready, and gives a drain no more"
        " time while turns settle: set Type=notify"
    )


_KILL_MODES: Final = MappingProxyType(
    {
        "control-group": "a stop ends what agents have started together with the gateway",
        "process": "what agents have started outlives a gateway that is killed",
        "none": "nothing ends a gateway that hangs",
    }
)


def _kill_mode(facts: Mapping[str, str]) -> str | None:
    mode = facts.get("KillMode", "mixed")
    said = _KILL_MODES.get(mode)
    return None if said is None else f"KillMode={mode}: {said}; set KillMode=mixed"


def _watchdog(facts: Mapping[str, str]) -> str | None:
    limit = parse_timespan(facts.get("WatchdogUSec", ""))
    if not limit or limit >= LEAST_WATCHDOG:
        return None
    return (
        f"WatchdogSec={written(limit)} can be too short for one write to a busy disk:"
        f" set at least {written(LEAST_WATCHDOG)}"
    )


def _exit_codes(facts: Mapping[str, str]) -> str | None:
    if facts.get("Restart") == "no":
        return None  # somebody's decision
    lacking = [
        f"{name}={code}"
        for name, code in EXIT_CODES
        if name in facts and str(code) not in facts[name].split()
    ]
    if not lacking:
        return None
    return f"75 asks to be started again, 78 not to be: set {' and '.join(lacking)}"


_SPANS: Final = {
    "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0,
    "w": 604800.0, "month": 2629800.0, "y": 31557600.0,
}  # fmt: skip


def parse_timespan(text: str) -> float | None:
    """Seconds of a span as systemd writes it: `1min 30s`, `500ms`, `0`, `infinity`; else None."""
    if text in ("infinity", "0"):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)([a-z]+)", text)
    if not parts or "".join(n + unit for n, unit in parts) != text.replace(" ", ""):
        return None
    if any(unit not in _SPANS for _, unit in parts):
        return None
    return sum(float(n) * _SPANS[unit] for n, unit in parts)
