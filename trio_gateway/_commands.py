"""The commands. Each reads, or changes, or hosts; what it shows comes from `_views`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

from cyclopts import App, CycloptsError, Parameter

from . import _views
from ._activation import listen_fds
from ._allowance import named_unit
from ._cli import EXIT_CONFIG, UsageError
from ._config import DEFAULT, Config, Given, HttpConfig, LogLevel, load_config, parse_duration
from ._errors import (
    ConfigError,
    GatewayError,
    NotFound,
    StoreCorrupt,
    StoreError,
    needs_extra,
)
from ._mending import (
    DROP_LETTER,
    DROP_TURN,
    RETRY_LETTER,
    RETRY_TURN,
    Mending,
    mend_letters,
    mend_turns,
)
from ._reload import Reloader
from ._signals import SignalDesk
from ._tracing import is_wanted
from .channels import Channel
from .http import read_token, token_path
from .store import (
    SENSELESS,
    DeadLetter,
    QuarantineRow,
    StoreReader,
    read_store,
)

if TYPE_CHECKING:
    from ._host import HostLog, HostTraces

T = TypeVar("T")

# ----- what several commands take


def _is_duration(_: object, text: str | None) -> None:
    if text is not None:
        parse_duration(text)


ConfigOption = Annotated[
    Path | None, Parameter("--config", help="The configuration; without it, ./gateway.toml.")
]
StoreOption = Annotated[
    Path | None, Parameter("--store", help="The store; without it, the configuration's.")
]
JsonOption = Annotated[bool, Parameter("--json", help="One JSON document instead.")]
LimitOption = Annotated[int, Parameter("--limit", help="How many at the most, newest first.")]
AllOption = Annotated[bool, Parameter("--all", help="All of them.")]
UserOption = Annotated[
    bool, Parameter("--user", help="Of your own systemd, instead of the machine's.")
]
DurationOption = Annotated[str | None, Parameter(validator=_is_duration)]

app: Final = App(
    name="trio-gateway",
    help="Hosts chat agents on Trio and never loses a turn.",
    version=version("trio-gateway"),
    default_parameter=Parameter(negative="", show_default=False),
    help_format="markdown",
)
sessions_app: Final = App(name="sessions", help="Look at conversations.")
quarantine_app: Final = App(name="quarantine", help="Turns that kept killing the process.")
letters_app: Final = App(name="dead-letters", help="Replies that could not be delivered.")
config_app: Final = App(name="config", help="Look at the configuration.")
install_app: Final = App(name="install", help="Make a gateway a service of this machine.")
for _group in (sessions_app, quarantine_app, letters_app, config_app, install_app):
    app.command(_group)


def call(words: Sequence[str], signals: SignalDesk | None) -> int:
    """Run the command that `words` name; return the exit code. Raises `UsageError`."""
    # Its commands join these.
    from . import _operating  # noqa: F401 # pyright: ignore[reportUnusedImport]

    try:
        command, bound, ignored = app.parse_args(words, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        raise UsageError(str(error)) from None
    if "signals" in ignored:
        bound.arguments["signals"] = signals or SignalDesk()
    result = command(*bound.args, **bound.kwargs)
    return result if isinstance(result, int) else 0


def store_path(store: Path | None, config: Path | None) -> Path:
    """The store that the options name."""
    return (store or load_config(config, os.environ).sections.store.path).absolute()


@contextmanager
def reading(store: Path | None, config: Path | None) -> Generator[StoreReader]:
    """What reads that store, for the length of the block; what is wrong with it names it."""
    path = store_path(store, config)
    reader = read_store(path)
    try:
        yield reader
    except StoreError as error:
        raise type(error)(f"{path}: {error}; see trio-gateway doctor") from error
    except SENSELESS as error:
        if isinstance(error, GatewayError):
            raise
        raise StoreCorrupt(f"{path}: a row makes no sense ({error})") from error
    finally:
        reader.close()


# ----- run


@app.command
def run(
    agent: str,
    /,
    *,
    config: ConfigOption = None,
    store: StoreOption = None,
    jsonl: bool = False,
    http: str | None = None,
    session: str | None = None,
    grace: DurationOption = None,
    budget: DurationOption = None,
    log_level: LogLevel | None = None,
    signals: Annotated[SignalDesk, Parameter(parse=False)],
) -> int:
    """Host an agent, in this terminal or for another program.

    Stop it with Ctrl-C or SIGTERM: open turns may finish, and what does not is resumed at the next
    start. Exit codes: 0 stopped in order, 1 failed, 75 start it again, 78 cannot be used as it is
    configured.

    Parameters
    ----------
    agent
        Where the agent is: bot.py:agent, or package.module:agent.
    jsonl
        Speak JSON lines on standard input and output.
    http
        Serve HTTP at host:port, like 127.0.0.1:8080.
    session
        The conversation to open in the terminal.
    grace
        How long open turns may go on when the gateway is stopped, like 20s.
    budget
        How long a stop may take in all, like 30s.
    log_level
        From which level on the log tells something.
    """
    options = {
        "store.path": None if store is None else str(store),
        "drain.grace": grace,
        "drain.budget": budget,
        "log.level": log_level,
        "channels.http.bind": http,
    }
    told = load_config(config, os.environ, _given(options))
    channels = _channels(told, jsonl=jsonl, session=session)
    level = partial(_log_level, channels=channels)
    return _host(agent, channels, signals, Reloader(told, os.environ, _given(options), level))


def _host(agent: str, channels: Sequence[Channel], signals: SignalDesk, reloader: Reloader) -> int:
    from ._host import host
    from ._loader import load_agent
    from ._logs import logging_to_stderr

    told = reloader.told
    with logging_to_stderr(reloader.level(told), told.sections.log.format) as log:
        for warning in told.warnings():
            log.say("warning", "configuration", warning=warning)
        loaded = load_agent(agent)
        return host(
            loaded,
            store=told.sections.store.path,
            channels=channels,
            settings=told.settings(),
            log=log,
            signals=signals,
            traces=_traces(told, log),
            reloader=reloader,
        )


def _traces(told: Config, log: HostLog) -> HostTraces | None:
    """Where spans go, if anywhere. After the agent was loaded: it may have a provider of its own.
    OTEL_* may be meant for other programs: they turn traces on, and keep no gateway from starting.
    """
    endpoint = told.sections.traces.endpoint
    if not is_wanted(endpoint, os.environ):
        return None
    try:
        with needs_extra("otel", "[traces]"):
            from ._traces import open_export
        return open_export(endpoint, os.environ, log)
    except ConfigError as error:
        if endpoint is not None:
            raise
        log.say("warning", "traces", message=f"no traces: {error}")
        return None


_OPTIONS: Final = {
    "store.path": "--store",
    "drain.grace": "--grace",
    "drain.budget": "--budget",
    "log.level": "--log-level",
    "channels.http.bind": "--http",
}


def _given(options: dict[str, str | None]) -> list[Given]:
    return [
        Given(key=key, text=text, origin=_OPTIONS[key])
        for key, text in options.items()
        if text is not None
    ]


def _channels(config: Config, *, jsonl: bool, session: str | None) -> Sequence[Channel]:
    """What the command line asks for, else what the configuration does, else the console."""
    told = config.sections.channels
    if told.http is None:
        return [_channel(config, jsonl=jsonl, session=session)]
    talks = jsonl or session is not None or told.jsonl is not None or told.console is not None
    door = _http_channel(config, told.http)
    return [door, _channel(config, jsonl=jsonl, session=session)] if talks else [door]


def _http_channel(config: Config, told: HttpConfig) -> Channel:
    from .http import HttpChannel
    from .http._hooks import read_secret
    from .http._wire import open_sockets

    token = read_token(told.token or token_path(config.sections.store.path.absolute()))
    # Here, and not when it serves: what cannot be listened at is a configuration that is wrong.
    passed = [one for several in listen_fds().values() for one in several]
    sockets = passed or open_sockets(told.bind)
    secret = None if told.hook_secret is None else read_secret(told.hook_secret)
    return HttpChannel(told.settings(), token=token, hook_secret=secret, sockets=sockets)


def _channel(config: Config, *, jsonl: bool, session: str | None) -> Channel:
    """The channel on standard input and output."""
    told = config.sections.channels
    if jsonl or (told.jsonl is not None and session is None):
        if session is not None:
            raise UsageError(
                "--session is for the terminal; with --jsonl each message names its own"
            )
        from .channels.jsonl import JsonlChannel

        return JsonlChannel()
    from .channels.console import ConsoleChannel

    named = session or (told.console.session if told.console is not None else None)
    if named is None:
        return ConsoleChannel()
    return ConsoleChannel(session=named.removeprefix(f"{ConsoleChannel.name}:"))


def _log_level(config: Config, channels: Sequence[Channel]) -> LogLevel:
    level = config.sections.log.level
    names = [channel.name for channel in channels]
    talks = "console" in names and sys.stderr is not None and sys.stderr.isatty()
    # Nobody wants the gateway's diary between the lines of a conversation, unless they say so.
    quiet = talks and config.origin("log.level") == DEFAULT
    return LogLevel.WARNING if quiet else level


@app.command
def token(*, store: StoreOption = None, config: ConfigOption = None) -> None:
    """Print the token that lets in over HTTP; it is made if there is none yet."""
    told = load_config(config, os.environ)
    http = told.sections.channels.http
    named = None if http is None or store is not None else http.token
    path = named or token_path((store or told.sections.store.path).absolute())
    _views.Screen().line(read_token(path))


# ----- sessions


@sessions_app.command(name="list")
def sessions_list(
    *,
    limit: LimitOption = 50,
    json: JsonOption = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """List conversations, the one with the newest message first."""
    with reading(store, config) as reader:
        rows = reader.sessions(max(limit, 0))
    screen = _views.Screen()
    screen.json(rows) if json else screen.listing(_views.sessions(rows))


@sessions_app.command(name="show")
def sessions_show(
    key: str,
    /,
    *,
    limit: LimitOption = 20,
    json: JsonOption = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Show one conversation: its open turn, its messages, and what was said.

    Parameters
    ----------
    key
        channel:name, or the name alone.
    """
    with reading(store, config) as reader:
        session = reader.find_session(key)
        rows = reader.messages(session, max(limit, 0))
        said = reader.history(session, None, max(limit, 0))
        turn = next((one for one in reader.open_turns() if one.session == session), None)
    screen = _views.Screen()
    if json:
        screen.json({"session": session, "turn": turn, "messages": rows, "history": said})
        return
    screen.line(_views.session_heading(session, turn, rows))
    screen.line()
    screen.listing(_views.messages(rows))
    screen.line()
    screen.listing(_views.conversation(said))


@app.command
def explain(
    message_id: str,
    /,
    *,
    json: JsonOption = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Tell the life of one message: accepted, attempts, markers, steps, replies, deliveries.

    Parameters
    ----------
    message_id
        The id that the platform gave it.
    """
    with reading(store, config) as reader:
        lives = reader.explain(message_id)
    screen = _views.Screen()
    if json:
        screen.json({"id": message_id, "timelines": lives})
        return
    for n, life in enumerate(lives):
        if n:
            screen.line()
        screen.listing(_views.timeline(life))


# ----- quarantine


@quarantine_app.command(name="list")
def quarantine_list(
    *, json: JsonOption = False, store: StoreOption = None, config: ConfigOption = None
) -> None:
    """List the turns that were put aside."""
    with reading(store, config) as reader:
        rows = reader.quarantine()
    screen = _views.Screen()
    screen.json(rows) if json else screen.listing(_views.quarantine(rows))


@quarantine_app.command(name="show")
def quarantine_show(
    name: str,
    /,
    *,
    json: JsonOption = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Show one turn that was put aside, and its messages.

    Parameters
    ----------
    name
        The turn's number, or the id of one of its messages.
    """
    with reading(store, config) as reader:
        row = _one_turn(reader.quarantine(), name)
    screen = _views.Screen()
    if json:
        screen.json(row)
        return
    for line in _views.facts(
        (
            ("turn", row.turn),
            ("session", row.session),
            ("begun", row.begun_at),
            ("put aside", row.quarantined_at),
            ("why", row.why),
            ("attempts", row.attempts),
            ("crashes", row.crashes),
            ("stops", row.interruptions),
            *((f"message {message.id}", message.text) for message in row.messages),
        )
    ):
        screen.line(line)


@quarantine_app.command(name="retry")
def quarantine_retry(
    *names: str,
    everything: AllOption = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Let the messages of turns that were put aside wait for an answer once more.

    Parameters
    ----------
    names
        Numbers of turns, or ids of their messages.
    """
    _change_turns(
        store_path(store, config),
        lambda rows: _chosen(rows, names, _one_turn, everything),
        RETRY_TURN,
    )


@quarantine_app.command(name="drop")
def quarantine_drop(
    *names: str,
    everything: AllOption = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Give the messages of turns that were put aside up for good.

    Parameters
    ----------
    names
        Numbers of turns, or ids of their messages.
    """
    _change_turns(
        store_path(store, config),
        lambda rows: _chosen(rows, names, _one_turn, everything),
        DROP_TURN,
    )


def _change_turns(
    path: Path,
    choose: Callable[[Sequence[QuarantineRow]], Sequence[QuarantineRow]],
    how: Mending,
) -> None:
    with reading(path, None) as reader:
        rows = choose(reader.quarantine())
    screen = _views.Screen()
    if not rows:
        screen.listing(_views.quarantine(rows))
    for row, ids, outcome in mend_turns(path, rows, how):
        names = ", ".join(map(_views.cell, ids)) or "none"
        screen.line(f"turn {row.turn} of {_views.cell(row.session)}: messages {names} {outcome}")


def _one_turn(rows: Sequence[QuarantineRow], name: str) -> QuarantineRow:
    found = [
        row
        for row in rows
        if str(row.turn) == name or any(message.id == name for message in row.messages)
    ]
    if len(found) > 1:
        turns = " and ".join(str(row.turn) for row in found)
        raise NotFound(f"{name!r} could be of turns {turns} in quarantine; name one by another id")
    if not found:
        raise NotFound(
            f"no turn or message {name!r} in quarantine; see trio-gateway quarantine list"
        )
    return found[0]


def _chosen(
    rows: Sequence[T],
    names: Sequence[str],
    find: Callable[[Sequence[T], str], T],
    everything: bool,
) -> Sequence[T]:
    if bool(names) == everything:
        raise UsageError("name one or more, or give --all")
    # Named twice is named once.
    return rows if everything else [*dict.fromkeys(find(rows, name) for name in names)]


# ----- dead letters


@letters_app.command(name="list")
def letters_list(
    *, json: JsonOption = False, store: StoreOption = None, config: ConfigOption = None
) -> None:
    """List the replies that could not be delivered."""
    with reading(store, config) as reader:
        rows = reader.dead_letters()
    screen = _views.Screen()
    screen.json(rows) if json else screen.listing(_views.dead_letters(rows))


@letters_app.command(name="show")
def letters_show(
    name: str,
    /,
    *,
    json: JsonOption = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Show one reply that could not be delivered.

    Parameters
    ----------
    name
        The delivery's number, or its key.
    """
    with reading(store, config) as reader:
        row = _one_letter(reader.dead_letters(), name)
    screen = _views.Screen()
    if json:
        screen.json(row)
        return
    for line in _views.facts(
        (
            ("delivery", row.delivery),
            ("session", row.session),
            ("turn", row.turn),
            ("key", row.key),
            ("said", row.created_at),
            ("tries", row.tries),
            ("error", row.error),
            ("text", row.text),
        )
    ):
        screen.line(line)


@letters_app.command(name="retry")
def letters_retry(
    *names: str,
    everything: AllOption = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Send replies that could not be delivered once more.

    Parameters
    ----------
    names
        Numbers of deliveries, or their keys.
    """
    _change_letters(
        store_path(store, config),
        lambda rows: _chosen(rows, names, _one_letter, everything),
        RETRY_LETTER,
    )


@letters_app.command(name="drop")
def letters_drop(
    *names: str,
    everything: AllOption = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Give replies that could not be delivered up for good.

    Parameters
    ----------
    names
        Numbers of deliveries, or their keys.
    """
    _change_letters(
        store_path(store, config),
        lambda rows: _chosen(rows, names, _one_letter, everything),
        DROP_LETTER,
    )


def _change_letters(
    path: Path,
    choose: Callable[[Sequence[DeadLetter]], Sequence[DeadLetter]],
    how: Mending,
) -> None:
    with reading(path, None) as reader:
        rows = choose(reader.dead_letters())
    screen = _views.Screen()
    if not rows:
        screen.listing(_views.dead_letters(rows))
    for row, outcome in mend_letters(path, rows, how):
        screen.line(f"delivery {row.delivery} to {_views.cell(row.session)} {outcome}")


def _one_letter(rows: Sequence[DeadLetter], name: str) -> DeadLetter:
    found = [row for row in rows if name in (str(row.delivery), row.key)]
    if not found:
        raise NotFound(f"no dead letter {name!r}; see trio-gateway dead-letters list")
    return found[0]


# ----- the configuration


@config_app.command(name="show")
def config_show(*, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Show every effective value, and where it came from."""
    told = load_config(config, os.environ)
    screen = _views.Screen()
    if json:
        screen.json(_views.config_as_json(told))
        return
    for line in _views.config_as_toml(told):
        screen.line(line)


@config_app.command(name="check")
def config_check(*, json: JsonOption = False, config: ConfigOption = None) -> int:
    """Check the configuration; exit code 78 if it cannot be used."""
    screen = _views.Screen()
    try:
        told = load_config(config, os.environ)
    except ConfigError as error:
        if not json:
            raise
        screen.json({"ok": False, "errors": str(error).splitlines(), "warnings": []})
        return EXIT_CONFIG
    if json:
        screen.json({"ok": True, "errors": [], "warnings": told.warnings()})
        return 0
    for warning in told.warnings():
        screen.line(f"warning: {warning}")
    screen.line(f"{told.file or 'no gateway.toml here, so every default'}: ok")
    return 0


# ----- looking after it


@app.command
def doctor(
    *,
    unit: str | None = None,
    user: UserOption = False,
    json: JsonOption = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> int:
    """Check the store, its lock, the disk, the permissions, and what a stop may take.

    Exit code 1 if anything fails.

    Parameters
    ----------
    unit
        The systemd service to compare with; without it, that of the gateway that has the store.
    """
    from ._doctor import examine

    told = load_config(config, os.environ)
    findings = examine(
        told,
        store or told.sections.store.path,
        unit=None if unit is None else named_unit(unit, user=user),
    )
    screen = _views.Screen()
    sick = any(finding.status == "fail" for finding in findings)
    if json:
        screen.json({"ok": not sick, "checks": findings})
    else:
        screen.listing(_views.findings(findings))
    return int(sick)


@install_app.command(name="systemd")
def install_systemd(
    agent: str,
    /,
    *,
    name: str | None = None,
    user: UserOption = False,
    account: Annotated[str | None, Parameter("--as")] = None,
    http: str | None = None,
    socket: bool = False,
    credential: Annotated[list[str] | None, Parameter("--credential")] = None,
    show: Annotated[bool, Parameter("--print", help="Print the units; write nothing.")] = False,
    force: Annotated[bool, Parameter("--force", help="Overwrite what others wrote.")] = False,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Write a systemd unit that hosts an agent, its deadlines derived from the configuration.

    It is written as the machine's, for a user that systemd makes for it; the store is in /var/lib.

    Parameters
    ----------
    agent
        Where the agent is: bot.py:agent, or package.module:agent.
    name
        What the service is called; without it, like the agent's file.
    account
        The account whose rights it has, instead of a user that is made for it.
    http
        The address of the HTTP channel, like 127.0.0.1:8080.
    socket
        Let systemd open that address, so that a restart refuses no connection.
    credential
        A secret to hand to the service, as NAME:/path/of/file. May be repeated.
    """
    from . import _install

    given = {"store.path": None if store is None else str(store)}
    # The variables of this shell are not those of the service.
    told = load_config(config, {}, _given(given))
    service = _install.plan_service(
        agent,
        told,
        name=name,
        account=account,
        user=user,
        http=http or _http_address(told),
        socket=socket,
        credentials=credential or (),
    )
    units = service.units()
    screen = _views.Screen()
    if show:
        screen.line("\n".join(units.values()).rstrip())
        return
    for path in _install.write_units(_install.unit_folder(user=user), units, force=force):
        screen.line(f"wrote {path}")
    for doubt in _install.doubts(service):
        screen.line(f"warning: {doubt}")
    screen.line("next:")
    for line in _install.next_commands(service):
        screen.line(f"  {line}")


def _http_address(told: Config) -> str | None:
    """Where the configuration has the HTTP channel listen, if it has one."""
    bind = getattr(getattr(told.sections.channels, "http", None), "bind", None)
    return None if bind is None else str(bind)


@app.command
def demo() -> int:
    """Kill a gateway in the middle of its stop, and see that nothing is lost.

    Three turns; a stop; the kill; a second start: who settled, who was marked, who resumed. With
    real processes and real signals, in about ten seconds, in a folder of its own.
    """
    from ._demo import demonstrate

    return demonstrate(_views.Screen())
