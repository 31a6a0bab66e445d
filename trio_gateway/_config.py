"""Configuration: `gateway.toml` and the environment become frozen values, or one clear error.

    [drain]
    grace = "20s"        # a duration: 500ms, 30s, 5m, 1h, 90d
    budget = "30s"

Every key can be set in the environment too: `TRIO_GATEWAY_DRAIN__GRACE=20s`, the section and the
key in capitals with two underscores between them. The command line wins over the environment, that
over the file, that over the defaults. An unknown key is refused: a typo must not be a default.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from enum import Enum, StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NewType, cast
from urllib.parse import urlsplit

import attrs
import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError

from ._errors import ConfigError
from ._policy import Busy, DeliveryRules, Limits, ResumeRules, plan_stop
from ._settings import Settings
from .http._settings import HttpSettings

DEFAULT_FILE: Final = Path("gateway.toml")
ENV_PREFIX: Final = "TRIO_GATEWAY_"
DEFAULT: Final = "default"
"""The origin of a value that nobody set."""

Grace = NewType("Grace", float)
"""Seconds; zero gives open turns no time. Left out, derived from the budget; see `plan_stop`."""

Budget = NewType("Budget", float)
"""Seconds. Left out, derived from the grace; see `plan_stop`."""

Endpoint = NewType("Endpoint", str)
"""The address of a collector of traces: a URL."""

LONGEST: Final = timedelta(days=36_500)
LARGEST: Final = 2**31 - 1
DEEPEST: Final = 4
"""Levels of a file that are looked at: no key is so deep, but `a.a.a.a` can go on for ever."""


# ----- durations

_UNITS: Final = {
    "d": timedelta(days=1),
    "h": timedelta(hours=1),
    "m": timedelta(minutes=1),
    "s": timedelta(seconds=1),
    "ms": timedelta(milliseconds=1),
}
_DURATION: Final = re.compile(r"(?a:(\d{1,15}(?:\.\d{1,9})?)(d|h|m|s|ms))")


def parse_duration(text: str) -> timedelta:
    """Read a duration: `500ms`, `30s`, `5m`, `1h`, `90d`, `1.5s`; at most 36500d.

    Raises `ValueError`, which says what was expected.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError('expected a duration like "30s"')
    size = _UNITS[match[2]]
    if float(match[1]) > LONGEST / size:
        raise ValueError('expected a duration of at most "36500d"')
    return float(match[1]) * size


def format_duration(duration: timedelta) -> str:
    """Write a duration as `parse_duration` reads it, in the largest unit that leaves no rest."""
    if not duration:
        return "0s"
    for unit, size in _UNITS.items():
        if not duration % size and (unit != "ms" or duration < _UNITS["s"]):
            return f"{duration // size}{unit}"
    return f"{duration.total_seconds():.6f}".rstrip("0") + "s"


# ----- the values


@attrs.frozen(kw_only=True)
class StoreConfig:
    """[store]: where the state lives, and how long it is kept."""

    path: Path = Path("gateway.db")
    """Relative to the folder in which the command is given."""
    keep: timedelta = Settings().keep
    remember: timedelta = Settings().remember


@attrs.frozen(kw_only=True)
class DrainConfig:
    """[drain]: how long a stop may take."""

    grace: Grace | None = None
    budget: Budget | None = None


@attrs.frozen(kw_only=True)
class TurnsConfig:
    """[turns]: how turns run."""

    busy: Busy = Settings().busy
    time_limit: float | None = Settings().time_limit


@attrs.frozen(kw_only=True)
class ChatConfig:
    """[chat]: what the gateway itself says and hears."""

    commands: bool = Settings().commands
    notices: bool = Settings().notices


class LogLevel(StrEnum):
    """From which level on the log tells something. Texts of messages are told at debug only."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"

    def is_at_least(self, other: LogLevel) -> bool:
        """Whether this one is as bad as `other`, or worse."""
        order = list(LogLevel)
        return order.index(self) >= order.index(other)


class LogFormat(StrEnum):
    """How log lines look."""

    AUTO = "auto"
    """`console` on a terminal, else `json`."""
    CONSOLE = "console"
    JSON = "json"


@attrs.frozen(kw_only=True)
class LogConfig:
    """[log]: what is written to standard error."""

    level: LogLevel = LogLevel.INFO
    format: LogFormat = LogFormat.AUTO


@attrs.frozen(kw_only=True)
class TracesConfig:
    """[traces]: where spans are sent, by OpenTelemetry."""

    endpoint: Endpoint | None = None
    """Of an OTLP collector, over HTTP; None: what OTEL_* says, and nowhere if it says nothing."""


@attrs.frozen(kw_only=True)
class ConsoleConfig:
    """[channels.console]: a person at a terminal."""

    session: str | None = None
    """The session to talk in; None: the channel's own default."""


@attrs.frozen(kw_only=True)
class JsonlConfig:
    """[channels.jsonl]: another program on standard input and output. It has no keys."""


@attrs.frozen(kw_only=True)
class HttpConfig:
    """[channels.http]: programs and browsers, over HTTP. See `trio_gateway.http.HttpSettings`."""

    bind: str = HttpSettings().bind
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    body_bytes: int = HttpSettings().body_bytes
    header_time: float = HttpSettings().header_time
    body_time: float = HttpSettings().body_time
    send_time: float = HttpSettings().send_time
    longest_wait: float = HttpSettings().longest_wait
    heartbeat: float = HttpSettings().heartbeat
    connections: int = HttpSettings().connections
    per_peer: int = HttpSettings().per_peer
    token: Path | None = None
    """Where the token is; None: beside the store."""
    hook_secret: Path | None = None
    """Where the secret of webhooks is; None: there are none."""

    def settings(self) -> HttpSettings:
        """As the channel takes them."""
        fields = attrs.asdict(self)
        del fields["token"], fields["hook_secret"]
        return HttpSettings(**fields)


@attrs.frozen(kw_only=True)
class ChannelsConfig:
    """[channels]: which channels to open; none named: the command line decides."""

    console: ConsoleConfig | None = None
    jsonl: JsonlConfig | None = None
    http: HttpConfig | None = None


@attrs.frozen(kw_only=True)
class Sections:
    """Everything that can be said in `gateway.toml`: a field is a table, its fields are keys."""

    store: StoreConfig = StoreConfig()
    drain: DrainConfig = DrainConfig()
    limits: Limits = Settings().limits
    turns: TurnsConfig = TurnsConfig()
    resume: ResumeRules = Settings().resume
    delivery: DeliveryRules = Settings().delivery
    chat: ChatConfig = ChatConfig()
    log: LogConfig = LogConfig()
    traces: TracesConfig = TracesConfig()
    channels: ChannelsConfig = ChannelsConfig()


@attrs.frozen(kw_only=True)
class Shown:
    """One effective value as `gateway.toml` would say it, and where it came from."""

    key: str
    value: str | int | bool
    origin: str


@attrs.frozen
class Config:
    """A configuration that was checked. `origins` has the keys that somebody set, and where."""

    sections: Sections = Sections()
    origins: Mapping[str, str] = {}
    file: Path | None = None
    """The file that was read, if any."""

    def settings(self) -> Settings:
        """The same, in the types that the gateway works with."""
        told = self.sections
        return Settings(
            limits=told.limits,
            busy=told.turns.busy,
            time_limit=told.turns.time_limit,
            resume=told.resume,
            delivery=told.delivery,
            grace=told.drain.grace,
            budget=told.drain.budget,
            keep=told.store.keep,
            remember=told.store.remember,
            commands=told.chat.commands,
            notices=told.chat.notices,
        )

    def origin(self, key: str) -> str:
        """Where `section.key` was set: a file, a variable, an option, or "default"."""
        return self.origins.get(key, DEFAULT)

    def shown(self) -> tuple[Shown, ...]:
        """Every effective value, in the order of the sections."""
        told = _CONVERTER.unstructure(self.sections)
        plan = plan_stop(self.sections.drain.grace, self.sections.drain.budget)
        for key in ("grace", "budget"):
            if told["drain"][key] is None:
                told["drain"][key] = format_duration(_seconds(getattr(plan, key)))
        return tuple(self._show(key, value) for key, value in _leaves(told))

    def _show(self, key: str, value: Any) -> Shown:
        derived = key.startswith("drain.") and key not in self.origins
        if derived and any(name.startswith("drain.") for name in self.origins):
            other = "drain.budget" if key == "drain.grace" else "drain.grace"
            return Shown(key=key, value=value, origin=f"derived from {other}")
        return Shown(key=key, value="none" if value is None else value, origin=self.origin(key))

    def warnings(self) -> tuple[str, ...]:
        """What is allowed and yet not what somebody meant."""
        drain = self.sections.drain
        plan = plan_stop(drain.grace, drain.budget)
        if not plan.clamped or drain.grace is None:
            return ()
        asked, fits = (format_duration(_seconds(span)) for span in (drain.grace, plan.grace))
        budget = format_duration(_seconds(plan.budget))
        return (
            f"drain.grace: {asked} does not fit into drain.budget {budget} and is shortened to"
            f" {fits}; raise the budget, or lower the grace",
        )


def _seconds(seconds: float) -> timedelta:
    return timedelta(milliseconds=round(seconds * 1000))


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if (inner := _as_table(value)) is not None:
            yield from _leaves(inner, f"{prefix}{name}.")
        elif value is not None or not prefix.startswith("channels."):
            # A channel that is not named, and its keys, have no value to show.
            yield f"{prefix}{name}", value


def _as_table(value: object) -> dict[str, Any] | None:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


# ----- what a running gateway can change

HOT: Final = frozenset(
    {
        "store.keep", "store.remember", "drain.grace", "drain.budget", "limits.turns",
        "limits.message_bytes", "limits.key_length", "limits.open_per_session",
        "limits.open_messages", "limits.deliveries", "turns.busy", "turns.time_limit",
        "delivery.max_tries", "delivery.first_delay", "delivery.max_delay", "delivery.timeout",
        "chat.commands", "chat.notices", "log.level",
    }
)  # fmt: skip
"""Keys that a reload applies at once."""

_AT_START: Final = "it is read when a gateway starts"
_LISTENS: Final = "the channel has it from the start"

COLD: Final = MappingProxyType(
    {
        "store.path": "the store is open",
        "resume.within": _AT_START,
        "resume.max_crashes": _AT_START,
        "resume.max_interruptions": _AT_START,
        "resume.concurrency": _AT_START,
        "log.format": "the log has begun",
        "traces.endpoint": "spans have a way already",
        "channels.console": "channels are opened at the start",
        "channels.console.session": _LISTENS,
        "channels.jsonl": "channels are opened at the start",
        "channels.http": "channels are opened at the start",
        "channels.http.bind": _LISTENS,
        "channels.http.hosts": _LISTENS,
        "channels.http.origins": _LISTENS,
        "channels.http.body_bytes": _LISTENS,
        "channels.http.header_time": _LISTENS,
        "channels.http.body_time": _LISTENS,
        "channels.http.send_time": _LISTENS,
        "channels.http.longest_wait": _LISTENS,
        "channels.http.heartbeat": _LISTENS,
        "channels.http.connections": _LISTENS,
        "channels.http.per_peer": _LISTENS,
        "channels.http.token": _LISTENS,
        "channels.http.hook_secret": _LISTENS,
    }
)
"""Keys that need a restart, and why. Every key is here or in `HOT`; a test compares."""


# ----- reading


@attrs.frozen(kw_only=True)
class Given:
    """A value that was set outside the file: under which key, as which text, and where."""

    key: str
    text: str
    origin: str


def load_config(
    path: Path | None, environ: Mapping[str, str], options: Sequence[Given] = ()
) -> Config:
    """Read the configuration: `path`, or ./gateway.toml where there is one, then `environ`, then
    `options` of the command line.

    Raises `ConfigError` with everything that is wrong, one line each.
    """
    file = path if path is not None else _default_file()
    table = {} if file is None else _read_toml(file)
    origins = {key: str(file) for key, _ in _paths(table)}
    given, problems = _from_environment(environ)
    for one in (*given, *options):
        _put(table, one)
        origins[one.key] = one.origin
    sections, found = _structure(table, origins, str(file))
    problems += found
    if sections is not None:
        problems += _contradictions(sections, origins)
    if problems or sections is None:
        raise ConfigError("\n".join(problems))
    return Config(sections, origins, file)


def _default_file() -> Path | None:
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file; name another with --config") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        # Not only TOMLDecodeError: Python itself refuses to read a number of 5,000 digits.
        raise ConfigError(f"{file}: not TOML: {error}") from error


def _paths(
    table: Mapping[str, Any], prefix: str = "", levels: int = DEEPEST
) -> Iterator[tuple[str, Any]]:
    """Every key in a table, and in the tables within it, with dots between."""
    for name, value in table.items():
        yield f"{prefix}{name}", value
        if levels > 1 and (inner := _as_table(value)) is not None:
            yield from _paths(inner, f"{prefix}{name}.", levels - 1)


class _Text(str):
    """A value from outside the file: text that may stand for a number or a truth."""

    __slots__ = ()


def _put(table: dict[str, Any], given: Given) -> None:
    *sections, name = given.key.split(".")
    for section in sections:
        inner = _as_table(table.setdefault(section, {}))
        if inner is None:
            return  # the file has no table there, and will be told so
        table = inner
    table[name] = _Text(given.text)


def _from_environment(environ: Mapping[str, str]) -> tuple[list[Given], list[str]]:
    """What the environment sets, and what it sets that nobody knows."""
    known = {variable_of(key): key for key in _keys(Sections)}
    given: list[Given] = []
    problems: list[str] = []
    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENV_PREFIX) or "__" not in variable:
            continue
        if variable in known:
            given.append(Given(key=known[variable], text=text, origin=variable))
        else:
            hint = _did_you_mean_variable(variable, known)
            problems.append(f"{_on_one_line(variable)}: unknown variable; {hint} (environment)")
    return given, problems


_CHANNELS: Final = tuple(f"channels.{field.name}" for field in attrs.fields(ChannelsConfig))


def keys() -> tuple[str, ...]:
    """Every key, as `section.key`; a channel is one itself, which is there or not."""
    return (*_keys(Sections), *_CHANNELS)


def value_of(sections: Sections, key: str) -> object:
    """The value of a key; None beneath a channel that is not there. Of a channel: is it there?"""
    told: object = sections
    for name in key.split("."):
        told = None if told is None else getattr(told, name)
    return told is not None if key in _CHANNELS else told


def as_toml(value: object) -> str:
    """A value as `gateway.toml` would say it."""
    told = "none" if value is None else _CONVERTER.unstructure(value)
    return json.dumps(told, ensure_ascii=False)


def variables_in(environ: Mapping[str, str]) -> list[str]:
    """The variables that set a key."""
    return sorted({variable_of(key) for key in _keys(Sections)} & environ.keys())


def _did_you_mean_variable(variable: str, known: Mapping[str, str]) -> str:
    # Without the prefix: it is the same in all of them, and would make everything look near.
    names = [name.removeprefix(ENV_PREFIX) for name in known]
    near = difflib.get_close_matches(variable.removeprefix(ENV_PREFIX).upper(), names, n=1)
    return f"did you mean {ENV_PREFIX}{near[0]}?" if near else "see trio-gateway config show"


def variable_of(key: str) -> str:
    """The environment variable that sets `section.key`."""
    return ENV_PREFIX + key.upper().replace(".", "__")


def _keys(cls: type[attrs.AttrsInstance], prefix: str = "") -> Iterator[str]:
    """Every key that has a value, as `section.key`."""
    for field in attrs.fields(attrs.resolve_types(cls)):
        inner = _table_in(field.type)
        if inner is None:
            yield f"{prefix}{field.name}"
        else:
            yield from _keys(inner, f"{prefix}{field.name}.")


def _table_in(kind: Any) -> type[attrs.AttrsInstance] | None:
    """The attrs class in a field's type, past an `| None`."""
    return next((one for one in (kind, *getattr(kind, "__args__", ())) if attrs.has(one)), None)


# ----- checking


def _structure(
    table: Mapping[str, Any], origins: Mapping[str, str], file: str
) -> tuple[Sections | None, list[str]]:
    try:
        return _CONVERTER.structure(table, Sections), []
    except ClassValidationError as group:
        values = dict(_paths(table))
        return None, [
            f"{_on_one_line(path)}: {_explain(error, values.get(path))} ({origins.get(path, file)})"
            for path, error in _problems(group, "")
        ]


def _on_one_line(key: str) -> str:
    """A key as it is told: whatever stands in it, one problem is one short line."""
    told = key if len(key) <= 120 else f"{key[:119]}…"
    return told if told.isprintable() else json.dumps(told)


def _problems(group: ClassValidationError, prefix: str) -> Iterator[tuple[str, Exception]]:
    """Every single problem inside cattrs' nested groups, with the key it is about."""
    noted, loose = group.group_exceptions()
    for error, note in noted:
        if isinstance(error, ClassValidationError):
            yield from _problems(error, f"{prefix}{note.name}.")
        else:
            yield f"{prefix}{note.name}", error
    for error in loose:
        if isinstance(error, ForbiddenExtraKeysError):
            for key in sorted(error.extra_fields):
                yield f"{prefix}{key}", _Unknown(key, [a.name for a in attrs.fields(error.cl)])
        else:
            yield prefix.rstrip("."), error


class _Unknown(ValueError):
    """A key that means nothing here."""

    def __init__(self, key: str, known: Sequence[str]) -> None:
        super().__init__(key)
        self.key = key
        self.known = known


def _explain(error: Exception, got: object) -> str:
    if isinstance(error, _Unknown):
        here = ", ".join(error.known) or "none"
        return f"unknown key; {_did_you_mean(error.key, error.known, f'known here: {here}')}"
    return f"{error}, got {_as_toml(got)}"


def _did_you_mean(name: str, known: Sequence[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def _as_toml(value: object) -> str:
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, str | bool):
        text = json.dumps(value)
        return text if len(text) <= 80 else f"{text[:76]}..."
    try:
        return str(value)[:80]
    except ValueError:
        return "a number that is too long to be shown"


def _contradictions(sections: Sections, origins: Mapping[str, str]) -> list[str]:
    """Values that are fine alone, and not together."""
    store, delivery, channels = sections.store, sections.delivery, sections.channels
    checks = (
        (store.remember >= store.keep, "store.remember", "store.keep", store),
        (
            delivery.max_delay >= delivery.first_delay,
            "delivery.max_delay",
            "delivery.first_delay",
            delivery,
        ),
    )
    problems = [
        f"{key}: expected at least {other} ({_value(owner, other)}), got {_value(owner, key)}"
        f" ({origins.get(key, DEFAULT)})"
        for fits, key, other, owner in checks
        if not fits
    ]
    if channels.console is not None and channels.jsonl is not None:
        problems.append(
            "channels: expected console or jsonl, got both, and both read standard input"
            f" ({origins.get('channels.jsonl', DEFAULT)})"
        )
    return problems


def _value(owner: object, key: str) -> str:
    value = getattr(owner, key.rpartition(".")[2])
    return json.dumps(_CONVERTER.unstructure(value))


# ----- the converter: one strict hook for each type; cattrs' own would make 80 of "80"


def _positive(value: object, _: object) -> timedelta:
    duration = _duration(value)
    if not duration:
        raise ValueError('expected a duration longer than nothing, like "30s"')
    return duration


def _duration(value: object) -> timedelta:
    if not isinstance(value, str):
        raise ValueError('expected a duration like "30s"')
    return parse_duration(value)


def _positive_seconds(value: object, cls: object) -> float:
    return _positive(value, cls).total_seconds()


def _grace(value: object, _: object) -> Grace:
    return Grace(_duration(value).total_seconds())


def _budget(value: object, cls: object) -> Budget:
    return Budget(_positive(value, cls).total_seconds())


def _or_none(hook: Callable[[object, object], object]) -> Callable[[object, object], object]:
    def structure(value: object, cls: object) -> object:
        if value == "none":
            return None
        try:
            return hook(value, cls)
        except ValueError as error:
            raise ValueError(f'{error}, or "none"') from None

    return structure


def _integer(value: object, _: object) -> int:
    number = value
    if isinstance(value, _Text) and re.fullmatch(r"(?a:-?\d{1,30})", value):
        number = int(value)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError("expected an integer, 1 or more")
    if number > LARGEST:
        raise ValueError(f"expected an integer, at most {LARGEST}")
    return number


def _truth(value: object, _: object) -> bool:
    if isinstance(value, _Text) and value in ("true", "false"):
        return value == "true"
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _string(value: object, _: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a string that is not empty")
    return str(value)


def _endpoint(value: object, _: object) -> Endpoint:
    expected = 'expected a URL like "http://localhost:4318"'
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(expected)
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        raise ValueError(expected) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(expected)
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{expected} without a password (that is for OTEL_EXPORTER_OTLP_HEADERS)")
    return Endpoint(str(value))


def _strings(value: object, _: object) -> tuple[str, ...]:
    if isinstance(value, _Text):
        value = [part for part in value.split(",") if part]
    given = cast("list[object]", value) if isinstance(value, list) else [None]
    if not all(isinstance(one, str) and one for one in given):
        raise ValueError('expected an array of strings, like ["chat.example"]')
    return tuple(str(one) for one in given)


def _path(value: object, _: object) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError('expected a path like "gateway.db"')
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ValueError("expected a path whose ~ names somebody's home") from None


def _choice(value: object, cls: type[Enum]) -> Enum:
    names = [str(one.value) for one in cls]
    if not isinstance(value, str) or value not in names:
        raise ValueError("expected one of " + ", ".join(json.dumps(name) for name in names))
    return cls(value)


def _table(cls: type[Any], converter: cattrs.Converter) -> Callable[[object, Any], object]:
    structure: Callable[[Any, Any], object] = converter.gen_structure_attrs_fromdict(cls)

    def checked(value: object, kind: Any) -> object:
        if not isinstance(value, dict):
            raise ValueError("expected a table")
        return structure(value, kind)

    return checked


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    converter.register_structure_hook_factory(attrs.has, _table)
    hooks: tuple[tuple[Any, Callable[[Any, Any], object]], ...] = (
        (int, _integer),
        (bool, _truth),
        (str, _string),
        (Path, _path),
        (Path | None, _path),
        (Busy, _choice),
        (LogLevel, _choice),
        (LogFormat, _choice),
        # Every number of seconds is written as a duration; one that may be missing, as "none".
        (float, _positive_seconds),
        (float | None, _or_none(_positive_seconds)),
        (timedelta, _positive),
        (timedelta | None, _or_none(_positive)),
        (Grace | None, _grace),
        (Budget | None, _budget),
        (Endpoint | None, _or_none(_endpoint)),
    )
    for kind, hook in hooks:
        converter.register_structure_hook(kind, hook)
    converter.register_structure_hook_func(lambda kind: kind == tuple[str, ...], _strings)
    converter.register_unstructure_hook(float, lambda value: format_duration(_seconds(value)))
    converter.register_unstructure_hook(timedelta, format_duration)
    converter.register_unstructure_hook(Path, str)
    return converter


_CONVERTER: Final = _make_converter()
