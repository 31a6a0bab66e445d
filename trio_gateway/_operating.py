"""The commands that look after a gateway while it runs. They ask it over its control socket.

Exit codes: 0 done, 1 it failed, 3 no gateway runs on that store, 78 (`reload`) the configuration
cannot be used.
"""

from __future__ import annotations

import json as jsons
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import Parameter

from . import _operating_views as views
from . import _views
from ._allowance import Unit, ask_systemctl, unit_in
from ._commands import ConfigOption, JsonOption, StoreOption, app, reading, store_path
from ._config import LogFormat, LogLevel
from ._control import ControlError
from ._control_client import Control, Process, connected, wait_for_another
from ._errors import StoreError, words_of
from ._logs import Renderer

SPARE: Final = 5.0
"""Seconds beyond its budget that a stop is waited for: by then, it has ended by itself."""

START: Final = 60.0
"""Seconds that another process gets to serve, when a supervisor starts one."""

FollowOption = Annotated[bool, Parameter(["--follow", "-f"], help="Go on with what comes.")]


@contextmanager
def asked(store: Path | None, config: Path | None) -> Generator[Control]:
    """The gateway that has the store which the options name. Raises `NoGateway`."""
    with connected(store_path(store, config)) as control:
        yield control


# ----- looking


@app.command
def status(
    *,
    deep: Annotated[
        bool, Parameter(help="Check the whole store, too; it may take a while.")
    ] = False,
    json: JsonOption = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> int:
    """Tell how the running gateway is. Exit code 3 if none runs, 1 if `--deep` finds damage."""
    with asked(store, config) as control:
        told = control.ask("status")
    wrong = _damage(store, config) if deep else []
    screen = _views.Screen()
    if json:
        screen.json({**told, **({"damage": wrong} if deep else {})})
        return int(bool(wrong))
    facts = list(views.status_facts(told))
    if deep:
        facts += [("store check", one) for one in wrong or ["sound"]]
    for line in _views.facts(facts):
        screen.line(line)
    return int(bool(wrong))


def _damage(store: Path | None, config: Path | None) -> list[str]:
    """What is wrong with the file. Read here, so that no turn waits behind it."""
    try:
        with reading(store, config) as reader:
            astray = [f"no start will answer message {name}" for name in reader.astray()]
            return [*reader.check(), *astray]
    except StoreError as error:
        return [words_of(error)]


@app.command
def turns(
    *, json: JsonOption = False, store: StoreOption = None, config: ConfigOption = None
) -> None:
    """List the open turns: how old, under which marker, in which step."""
    with asked(store, config) as control:
        rows = control.ask("turns")["turns"]
    screen = _views.Screen()
    screen.json(rows) if json else screen.listing(views.turns(rows))


@app.command
def top(
    *,
    every: Annotated[float, Parameter(help="Seconds between two looks.")] = 1.0,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> int:
    """Watch turns, inbox, outbox and drain; q leaves. One look, where this is no terminal."""
    from ._top import watch

    return watch(store_path(store, config), max(0.1, every), _views.Screen())


@app.command
def logs(
    *,
    follow: FollowOption = False,
    last: Annotated[int, Parameter(["--last", "-n"], help="How many to begin with.")] = 20,
    level: Annotated[LogLevel, Parameter(help="From which level on.")] = LogLevel.INFO,
    json: JsonOption = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> int:
    """Show the last lines of the running gateway's log, and with `-f` what comes.

    Who follows can ask for more than standard error gets, `debug` with the texts of messages. What
    is read too slowly is dropped, and counted.
    """
    screen = _views.Screen()
    render = Renderer(LogFormat.CONSOLE if screen.terminal and not json else LogFormat.JSON)
    with asked(store, config) as control:
        stream = control.stream(
            "logs", patience=None, follow=follow, level=level.value, last=max(0, last)
        )
        for told in stream:
            for line in _log_lines(told, render):
                screen.line(line)
    return 0


def _log_lines(told: dict[str, Any], render: Renderer) -> list[str]:
    if "record" in told:
        return render.line(jsons.loads(told["record"])).splitlines()
    if "dropped" in told:
        sys.stderr.write(f"trio-gateway: {told['dropped']} lines were dropped: read too slowly\n")
    if "end" in told:
        sys.stderr.write(f"trio-gateway: {told['end']}\n")
    return []


# ----- stopping


@app.command
def stop(
    *,
    now: Annotated[
        bool, Parameter(help="Give open turns no more time, like a second Ctrl-C.")
    ] = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> int:
    """Stop the running gateway, and wait until its process has gone.

    Open turns may finish, and what does not is resumed at the next start.
    """
    with asked(store, config) as control:
        _stop(control, store_path(store, config), now=now, restart=False)
    return 0


@app.command
def restart(
    *,
    now: Annotated[bool, Parameter(help="Give open turns no more time.")] = False,
    anyway: Annotated[
        bool, Parameter(help="Also where nothing is known to start it again.")
    ] = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> int:
    """Stop the running gateway so that its supervisor starts it again (exit code 75), and wait for
    that.

    Where nothing supervises it, nothing is stopped, unless you say `--anyway`.
    """
    path = store_path(store, config)
    screen = _views.Screen()
    with asked(store, config) as control:
        told = control.ask("status")
        supervisor = told["supervisor"]
        doubt = _doubt(supervisor, control.peer.pid or int(told["pid"]))
        if doubt is not None and not anyway:
            raise ControlError(doubt)
        pid = _stop(control, path, now=now, restart=True)
    if doubt is not None:
        screen.line("it ended with exit code 75: start it again")
        return 0
    again = wait_for_another(path, pid, START)
    if again is None:
        raise ControlError(
            f"{supervisor} has started no other process within {views.duration(START)}: look there"
        )
    screen.line(f"process {again['pid']} serves, epoch {again['epoch']}")
    return 0


def _doubt(supervisor: str | None, pid: int) -> str | None:
    """Why nobody would start the process again; None: somebody does."""
    if supervisor is None:
        return (
            f"nothing that is known here supervises process {pid}, so nobody would start it again:"
            " trio-gateway stop, and start it yourself; or give --anyway, to let it end with exit"
            " code 75"
        )
    unit = unit_in(Path(f"/proc/{pid}/cgroup")) if supervisor == "systemd" else None
    return None if unit is None else _doubt_of(unit)


def _doubt_of(unit: Unit) -> str | None:
    facts = ask_systemctl(unit)
    forced = "75" in facts.get("RestartForceExitStatus", "75").split()
    if forced or facts.get("Restart") == "always":
        return None
    return (
        f"{unit.name} does not start again after exit code 75: set RestartForceExitStatus=75 and"
        " SuccessExitStatus=75 (trio-gateway install systemd writes such a unit), use systemctl"
        " restart, or give --anyway"
    )


def _stop(control: Control, path: Path, *, now: bool, restart: bool) -> int:
    """Ask for the stop and wait for the end; the number that the process gives itself, which is
    another one than ours for it where it is in a container."""
    process = Process(control.peer.pid, path)
    screen = _views.Screen()
    try:
        told = control.ask("stop", now=now, restart=restart)
        pid = control.peer.pid or int(told["pid"])
        screen.line(_stopping(pid, told, now=now))
        patience = float(told["budget_left"]) + SPARE
        if not process.wait_gone(patience):
            raise ControlError(
                f"process {pid} is still there after {views.duration(round(patience))}: kill -9"
                f" {pid} loses nothing, the next start resumes what was open"
            )
        screen.line(f"process {pid} has stopped")
    finally:
        process.close()
    return int(told["pid"])


def _stopping(pid: int, told: dict[str, Any], *, now: bool) -> str:
    turns = int(told["turns"])
    grace = "no more time" if now else f"up to {views.duration(told['grace'])}"
    which = f"{turns} open turns get {grace}" if turns else "no turn is open"
    again = " (it was stopping already)" if told["already"] else ""
    return f"stopping process {pid}{again}: {which}"


# ----- changing


@app.command
def drain(*, store: StoreOption = None, config: ConfigOption = None) -> None:
    """Let no turn begin, until `undrain`. Messages are accepted and wait; open turns go on.

    It is nothing that a start would know of: it ends with the process.
    """
    with asked(store, config) as control:
        told = control.ask("drain")
    paused = "was paused already" if told["already"] else "is paused"
    _views.Screen().line(f"the gateway {paused}: no turn begins, {told['turns']} open turns go on")


@app.command
def undrain(*, store: StoreOption = None, config: ConfigOption = None) -> None:
    """Let turns begin again."""
    with asked(store, config) as control:
        told = control.ask("undrain")
    paused = "was not paused" if told["already"] else "goes on"
    _views.Screen().line(f"the gateway {paused}: {told['waiting']} messages are open")


@app.command(name="stop-turn")
def stop_turn(key: str, /, *, store: StoreOption = None, config: ConfigOption = None) -> int:
    """End the open turn of a conversation for good, like /stop in it. Exit code 1 if it has none.

    Parameters
    ----------
    key
        channel:name, or the name alone.
    """
    with asked(store, config) as control:
        told = control.ask("stop-turn", session=key)
    session = _views.cell(told["session"])
    done = f"the turn of {session} is stopped, and does not come back"
    _views.Screen().line(done if told["stopped"] else f"{session} has no open turn")
    return int(not told["stopped"])


@app.command
def reload(
    *, json: JsonOption = False, store: StoreOption = None, config: ConfigOption = None
) -> None:
    """Let the running gateway read its configuration again, as kill -HUP does.

    It reads the file that it was started with. Exit code 78 if that cannot be used: then nothing
    has changed.
    """
    with asked(store, config) as control:
        told = control.ask("reload")
    screen = _views.Screen()
    if json:
        screen.json(told)
        return
    for line in views.reloaded(told):
        screen.line(line)
