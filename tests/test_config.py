"""`gateway.toml` and the environment: what is read, and that each mistake is named."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway._config import (
    Config,
    Given,
    LogFormat,
    LogLevel,
    format_duration,
    load_config,
    parse_duration,
    variable_of,
)
from trio_gateway._errors import ConfigError
from trio_gateway._policy import Busy, Limits, ResumeRules
from trio_gateway._settings import Settings
from trio_gateway._views import config_as_toml


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(toml: str = "", environ: Mapping[str, str] | None = None, *options: Given) -> Config:
    if toml:
        Path("gateway.toml").write_text(toml, "utf-8")
    return load_config(None, environ or {}, options)


def problems(toml: str = "", environ: Mapping[str, str] | None = None, *options: Given) -> str:
    with pytest.raises(ConfigError) as caught:
        read(toml, environ, *options)
    return str(caught.value)


# ----- what is read


def test_nothing_said_is_every_default() -> None:
    config = read()
    assert config.settings() == Settings()
    assert config.file is None
    assert config.warnings() == ()
    assert {shown.origin for shown in config.shown()} == {"default"}


def test_every_key_reaches_the_settings() -> None:
    config = read(
        """
        [store]
        path = "data/bot.db"
        keep = "30d"
        remember = "60d"
        [drain]
        grace = "5s"
        budget = "12s"
        [limits]
        turns = 7
        message_bytes = 1000
        key_length = 64
        open_per_session = 8
        open_messages = 9
        deliveries = 10
        [turns]
        busy = "collect"
        time_limit = "90s"
        [resume]
        within = "2h"
        max_crashes = 2
        max_interruptions = 4
        concurrency = 5
        [delivery]
        max_tries = 3
        first_delay = "500ms"
        max_delay = "1m"
        timeout = "1.5s"
        [chat]
        commands = false
        notices = false
        [log]
        level = "debug"
        format = "json"
        [traces]
        endpoint = "http://localhost:4318"
        [channels.console]
        session = "ada"
        """
    )
    settings = config.settings()
    assert config.sections.store.path == Path("data/bot.db")
    assert (settings.keep, settings.remember) == (timedelta(days=30), timedelta(days=60))
    assert (settings.grace, settings.budget) == (5.0, 12.0)
    assert settings.limits == Limits(
        turns=7,
        message_bytes=1000,
        key_length=64,
        open_per_session=8,
        open_messages=9,
        deliveries=10,
    )
    assert (settings.busy, settings.time_limit) == (Busy.COLLECT, 90.0)
    assert settings.resume == ResumeRules(
        within=timedelta(hours=2), max_crashes=2, max_interruptions=4, concurrency=5
    )
    assert (settings.delivery.max_tries, settings.delivery.first_delay) == (3, 0.5)
    assert (settings.delivery.max_delay, settings.delivery.timeout) == (60.0, 1.5)
    assert (settings.commands, settings.notices) == (False, False)
    log = config.sections.log
    assert (log.level, log.format) == (LogLevel.DEBUG, LogFormat.JSON)
    assert config.sections.traces.endpoint == "http://localhost:4318"
    assert config.sections.channels.console is not None
    assert config.sections.channels.console.session == "ada"
    assert {shown.origin for shown in config.shown()} == {"gateway.toml"}


def test_none_lifts_a_limit() -> None:
    settings = read('[resume]\nwithin = "none"\n[turns]\ntime_limit = "none"').settings()
    assert settings.resume.within is None
    assert settings.time_limit is None


def test_the_command_line_wins_over_the_environment_over_the_file() -> None:
    toml = '[drain]\ngrace = "1s"\nbudget = "60s"\n[limits]\nturns = 1'
    environ = {"TRIO_GATEWAY_DRAIN__GRACE": "2s", "TRIO_GATEWAY_LIMITS__TURNS": "2"}
    option = Given(key="drain.grace", text="3s", origin="--grace")
    config = read(toml, environ, option)
    assert (config.settings().grace, config.settings().limits.turns) == (3.0, 2)
    assert config.origin("drain.grace") == "--grace"
    assert config.origin("limits.turns") == "TRIO_GATEWAY_LIMITS__TURNS"
    assert config.origin("drain.budget") == "gateway.toml"
    assert config.origin("store.keep") == "default"


def test_the_environment_can_say_numbers_truths_and_choices() -> None:
    config = read(
        "",
        {
            "TRIO_GATEWAY_CHAT__COMMANDS": "false",
            "TRIO_GATEWAY_TURNS__BUSY": "steer",
            "TRIO_GATEWAY_RESUME__MAX_CRASHES": "5",
            "TRIO_GATEWAY_RESUME__WITHIN": "none",
            "TRIO_GATEWAY_CHANNELS__CONSOLE__SESSION": "12",
            "TRIO_GATEWAY_STOP_LIMIT": "not a section's key",
            "OTHER__THING": "not ours",
        },
    )
    settings = config.settings()
    assert (settings.commands, settings.busy) == (False, Busy.STEER)
    assert (settings.resume.max_crashes, settings.resume.within) == (5, None)
    assert config.sections.channels.console is not None
    assert config.sections.channels.console.session == "12"


def test_a_named_file_is_read_and_named_in_errors(tmp_path: Path) -> None:
    named = tmp_path / "other.toml"
    named.write_text("[limits]\nturns = 3")
    assert load_config(named, {}).origin("limits.turns") == str(named)
    named.write_text("[limits]\nturns = -3")
    with pytest.raises(ConfigError, match=r"got -3 \(.*other\.toml\)"):
        load_config(named, {})


@pytest.mark.parametrize(
    "name", ["\U0001f600.db", "\\\U0001f600", "\\ud83d\\ude00", "a\x7fb", "\u202e", 'a"b\n', "\xe9"]
)
def test_p14_a_value_of_any_letters_is_shown_as_toml(tmp_path: Path, name: str) -> None:
    config = load_config(None, {"TRIO_GATEWAY_STORE__PATH": name})
    shown = [line for line in config_as_toml(config) if not line.startswith("#")]
    assert all(line.isascii() and line.isprintable() for line in shown)
    assert tomllib.loads("\n".join(shown))["store"]["path"] == name


def test_what_is_shown_is_itself_a_configuration() -> None:
    shown = read('[drain]\nbudget = "9s"\n[resume]\nwithin = "none"').shown()
    environ = {variable_of(one.key): str(one.value).lower() for one in shown}
    again = load_config(None, environ).shown()
    assert [(one.key, one.value) for one in again] == [(one.key, one.value) for one in shown]


def test_one_window_of_a_stop_is_derived_from_the_other() -> None:
    shown = {one.key: one for one in read('[drain]\nbudget = "9s"').shown()}
    assert (shown["drain.grace"].value, shown["drain.grace"].origin) == (
        "6s",
        "derived from drain.budget",
    )
    shown = {one.key: one for one in read('[drain]\ngrace = "40s"').shown()}
    assert (shown["drain.budget"].value, shown["drain.budget"].origin) == (
        "55s",
        "derived from drain.grace",
    )


def test_a_grace_that_does_not_fit_is_warned_about() -> None:
    config = read('[drain]\ngrace = "30s"\nbudget = "10s"')
    assert config.warnings() == (
        "drain.grace: 30s does not fit into drain.budget 10s and is shortened to 6.7s;"
        " raise the budget, or lower the grace",
    )


# ----- what is refused

ONE_MISTAKE = {
    "[drain]\ngrace = 30": 'drain.grace: expected a duration like "30s", got 30 (gateway.toml)',
    '[drain]\ngrace = "30"': 'drain.grace: expected a duration like "30s", got "30" (gateway.toml)',
    '[drain]\nbudget = "0s"': (
        'drain.budget: expected a duration longer than nothing, like "30s", got "0s" (gateway.toml)'
    ),
    '[drain]\ngrace = "-5s"': (
        'drain.grace: expected a duration like "30s", got "-5s" (gateway.toml)'
    ),
    '[drain]\ngrace = "none"': (
        'drain.grace: expected a duration like "30s", got "none" (gateway.toml)'
    ),
    '[store]\nkeep = "999999999d"': (
        'store.keep: expected a duration of at most "36500d", got "999999999d" (gateway.toml)'
    ),
    '[store]\npath = ""': 'store.path: expected a path like "gateway.db", got "" (gateway.toml)',
    '[store]\npath = "~nobody-of-that-name/x"': (
        "store.path: expected a path whose ~ names somebody's home,"
        ' got "~nobody-of-that-name/x" (gateway.toml)'
    ),
    '[resume]\nwithin = "0s"': (
        'resume.within: expected a duration longer than nothing, like "30s", or "none",'
        ' got "0s" (gateway.toml)'
    ),
    "[resume]\nmax_crashes = 0": (
        "resume.max_crashes: expected an integer, 1 or more, got 0 (gateway.toml)"
    ),
    '[limits]\nturns = "7"': 'limits.turns: expected an integer, 1 or more, got "7" (gateway.toml)',
    "[limits]\nturns = true": (
        "limits.turns: expected an integer, 1 or more, got true (gateway.toml)"
    ),
    "[limits]\nturns = 1.5": "limits.turns: expected an integer, 1 or more, got 1.5 (gateway.toml)",
    "[limits]\nturns = 99999999999": (
        "limits.turns: expected an integer, at most 2147483647, got 99999999999 (gateway.toml)"
    ),
    '[chat]\ncommands = "yes"': ('chat.commands: expected true or false, got "yes" (gateway.toml)'),
    "[chat]\ncommands = 1": "chat.commands: expected true or false, got 1 (gateway.toml)",
    '[turns]\nbusy = "queu"': (
        'turns.busy: expected one of "queue", "collect", "interrupt", "steer", "reject",'
        ' got "queu" (gateway.toml)'
    ),
    "[turns]\ntime_limit = 5": (
        'turns.time_limit: expected a duration like "30s", or "none", got 5 (gateway.toml)'
    ),
    "[delivery]\ntimeout = 2026-01-01": (
        'delivery.timeout: expected a duration like "30s", got 2026-01-01 (gateway.toml)'
    ),
    "[channels.console]\nsession = 5": (
        "channels.console.session: expected a string that is not empty, got 5 (gateway.toml)"
    ),
    "drain = 5": "drain: expected a table, got 5 (gateway.toml)",
    "[[drain]]\n[[drain]]": "drain: expected a table, got an array (gateway.toml)",
    "[drain.grace]\nx = 1": (
        'drain.grace: expected a duration like "30s", got a table (gateway.toml)'
    ),
    '[drain]\ngrase = "5s"': "drain.grase: unknown key; did you mean grace? (gateway.toml)",
    "[drain]\nzzz = 1": "drain.zzz: unknown key; known here: grace, budget (gateway.toml)",
    "[channels.jsonl]\nfile = 1": (
        "channels.jsonl.file: unknown key; known here: none (gateway.toml)"
    ),
    "[channels.telegram]": "channels.telegram: unknown key; known here: console, jsonl, http"
    " (gateway.toml)",
    "[drian]": "drian: unknown key; did you mean drain? (gateway.toml)",
    '[store]\nkeep = "500d"': (
        'store.remember: expected at least store.keep ("500d"), got "400d" (default)'
    ),
    '[delivery]\nfirst_delay = "10m"': (
        'delivery.max_delay: expected at least delivery.first_delay ("10m"), got "5m" (default)'
    ),
    "[channels.console]\n[channels.jsonl]": (
        "channels: expected console or jsonl, got both, and both read standard input (gateway.toml)"
    ),
}


@pytest.mark.parametrize("toml", ONE_MISTAKE, ids=lambda toml: toml.replace("\n", " "))
def test_p14_a_mistake_costs_one_line_that_names_it(toml: str) -> None:
    assert problems(toml) == ONE_MISTAKE[toml]


def test_p14_every_mistake_is_told_at_once() -> None:
    told = problems(
        "[drain]\ngrace = 30\nbudget = 5\n[limits]\nturns = 0\nbogus = 1\n[typo]\n"
        '[chat]\nnotices = ""',
        {"TRIO_GATEWAY_RESUME__MAX_CRASHES": "many", "TRIO_GATEWAY_DRAIN__GRASE": "1s"},
    )
    assert told.splitlines() == [
        "TRIO_GATEWAY_DRAIN__GRASE: unknown variable; did you mean TRIO_GATEWAY_DRAIN__GRACE?"
        " (environment)",
        'drain.grace: expected a duration like "30s", got 30 (gateway.toml)',
        'drain.budget: expected a duration like "30s", got 5 (gateway.toml)',
        "limits.turns: expected an integer, 1 or more, got 0 (gateway.toml)",
        "limits.bogus: unknown key; known here: turns, message_bytes, key_length,"
        " open_per_session, open_messages, deliveries (gateway.toml)",
        "resume.max_crashes: expected an integer, 1 or more, got "
        '"many" (TRIO_GATEWAY_RESUME__MAX_CRASHES)',
        'chat.notices: expected true or false, got "" (gateway.toml)',
        "typo: unknown key; known here: store, drain, limits, turns, resume, delivery, chat, log,"
        " traces, channels (gateway.toml)",
    ]


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        (
            "TRIO_GATEWAY_DRAIN__GRACE",
            "30",
            'drain.grace: expected a duration like "30s", got "30" (TRIO_GATEWAY_DRAIN__GRACE)',
        ),
        (
            "TRIO_GATEWAY_LIMITS__TURNS",
            "0",
            'limits.turns: expected an integer, 1 or more, got "0" (TRIO_GATEWAY_LIMITS__TURNS)',
        ),
        (
            "TRIO_GATEWAY_CHAT__NOTICES",
            "True",
            'chat.notices: expected true or false, got "True" (TRIO_GATEWAY_CHAT__NOTICES)',
        ),
        (
            "TRIO_GATEWAY_drain__grace",
            "1s",
            "TRIO_GATEWAY_drain__grace: unknown variable; did you mean"
            " TRIO_GATEWAY_DRAIN__GRACE? (environment)",
        ),
        (
            "TRIO_GATEWAY_QUUX__ZZZ",
            "1",
            "TRIO_GATEWAY_QUUX__ZZZ: unknown variable; see trio-gateway config show (environment)",
        ),
    ],
)
def test_p14_a_mistake_in_the_environment_names_the_variable(
    variable: str, value: str, told: str
) -> None:
    assert problems("", {variable: value}) == told


def test_p14_a_mistake_on_the_command_line_names_the_option() -> None:
    option = Given(key="log.level", text="loud", origin="--log-level")
    assert problems("", {}, option) == (
        'log.level: expected one of "debug", "info", "warning", "error", "critical",'
        ' got "loud" (--log-level)'
    )


def test_p14_a_file_that_is_no_toml_is_named_with_the_place() -> None:
    told = problems('[drain]\ngrace = "1s\n')
    assert told.startswith("gateway.toml: not TOML: ")
    assert "line 2" in told


def test_p14_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    def told(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(path, {})
        return str(caught.value)

    assert told(Path("no.toml")) == ("no.toml: there is no such file; name another with --config")
    assert told(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"# \xff")
    assert told(binary) == f"{binary}: not UTF-8 (byte 2)"
    deep = tmp_path / "deep.toml"
    deep.write_text("x = " + "[" * 5000)
    assert told(deep).startswith(f"{deep}: not TOML: ")


# ----- durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30), ("5m", 300), ("1h", 3600), ("90d", 7776000), ("1.5s", 1.5)],
)
def test_durations_as_written(text: str, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "s", "5", "5 s", "5S", "-1s", "+1s", "1e3s", "٣s", "5s\n"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match='expected a duration like "30s"'):
        parse_duration(text)


@given(st.integers(0, 36_500 * 86_400_000).map(lambda ms: timedelta(milliseconds=ms)))
def test_a_duration_survives_being_written(duration: timedelta) -> None:
    assert parse_duration(format_duration(duration)) == duration
