"""What goes in at the doors: drawn by Hypothesis, then broken further by dice.

Everything is decided by one seed, so that a point can be repeated; what the gateway's own code
contains plays no part, so that a point stays the same point when that code is changed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar, cast
from unittest import mock

import attrs
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

from trio_gateway._config import ENV_PREFIX, Config, LogFormat, LogLevel, Sections
from trio_gateway._policy import Busy

T = TypeVar("T")
Strategy = st.SearchStrategy

# ----- drawing


def drawn(strategy: Strategy[T], count: int, by: int) -> list[T]:
    """`count` examples of a strategy (a few less, if it has not so many), decided by a seed."""
    found: list[T] = []

    @seed(by)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=cast("list[HealthCheck]", list(HealthCheck)),
    )
    @given(strategy)
    def draw(example: T) -> None:
        found.append(example)

    with _without_constants():
        draw()
    return found


@contextmanager
def _without_constants() -> Generator[None]:
    """Hypothesis likes to draw what stands in the code under test: then every change of that code
    would change every point. Where this Hypothesis does not, there is nothing to switch off."""
    if not hasattr(providers, "_get_local_constants"):
        yield
        return
    with mock.patch.object(providers, "_get_local_constants", return_value=Constants()):
        yield


def endless(examples: Sequence[T], dice: random.Random) -> Iterator[T]:
    """The examples again and again, in an order of the dice."""
    while True:
        yield from dice.sample(examples, len(examples))


# ----- texts

NASTY: Final = (
    "", " ", "\0", "a\0b", "\n", "\r\n", "\t", "\x1b[2J", "\x7f", "\x85", "\u2028", "\ufeff",
    "\ufffd", "\uffff", "\u202eabc", "\U0010ffff", "e\u0301", "\U0001f469\u200d\U0001f680",
    "\ud800", "\udfff", "a\ud83d", "\ude00\ud83d", "a" * 1024, "a" * 1025, "\xe9" * 1024,
    "\U0001f600" * 300, "/stop", "/stop ", "/STOP", "/new", "/retry", "/status", "/help", "/no",
    "local:a", "a:b:c", ":", "a:", ":a", "../../etc/passwd", "/", "~", "-", "--", "--help", "-x",
    "%s%n", "{}", "{0}", "$HOME", "`id`", "'; DROP TABLE turn; --", '"', "\\", "\\u0000", "null",
    "None", "true", "0", "-1", "1e999", "NaN", "9" * 400, "queued", "RUNNING", "[", "[" * 500,
)  # fmt: skip
"""Texts that some program somewhere has tripped over."""

any_text: Final[Strategy[str]] = st.text(st.characters(), max_size=30)
"""Lone surrogates are among it."""

odd_text: Final[Strategy[str]] = st.one_of(st.sampled_from(NASTY), any_text)

unicode_text: Final[Strategy[str]] = st.one_of(
    st.sampled_from([text for text in NASTY if not any("\ud800" <= c <= "\udfff" for c in text)]),
    st.text(max_size=60),
)
"""Whatever has a place in UTF-8."""

name_text: Final[Strategy[str]] = st.one_of(
    st.sampled_from(["ada", "bob", "eve", "\u00e9t\u00e9", "a b", "\U0001f600"]), odd_text
)
"""A name that may well be a usable one."""

number: Final[Strategy[Any]] = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400]),
)

json_value: Final[Strategy[Any]] = st.recursive(
    st.one_of(st.none(), st.booleans(), number, odd_text),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(odd_text, inner, max_size=4)
    ),
    max_leaves=6,
)

odd_value: Final[Strategy[Any]] = st.one_of(
    st.none(),
    st.booleans(),
    number,
    st.binary(max_size=20),
    json_value,
    st.tuples(odd_text, number),
    st.frozensets(st.integers(), max_size=3),
    st.decimals(),
    st.datetimes(),
    st.timedeltas(),
    st.builds(object),
    st.just(Exception),
)
"""Python values that are no text."""


# ----- lines of JSON

message_fields: Final[Strategy[dict[str, Any]]] = st.fixed_dictionaries(
    {"session": name_text, "id": name_text, "text": odd_text},
    optional={"sender": st.one_of(st.none(), name_text)},
)
"""What a line should say, with odd texts."""


def _united(fields: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    return {**fields, **extra}


odd_fields: Final[Strategy[Any]] = st.one_of(
    message_fields,
    message_fields,
    st.builds(
        _united,
        message_fields,
        st.dictionaries(
            st.sampled_from(["session", "id", "text", "sender", "Text", "channel", ""]),
            json_value,
            max_size=2,
        ),
    ),
    st.dictionaries(odd_text, json_value, max_size=4),
    json_value,
)
"""What a line does say."""


def as_table(value: object) -> dict[str, Any] | None:
    """A JSON value, if it is an object."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def as_line(fields: Any, dice: random.Random) -> bytes:
    """A JSON value as one of the ways to write it."""
    ascii_only = dice.random() < 0.5
    text = json.dumps(fields, ensure_ascii=ascii_only, indent=None)
    return text.encode("utf-8", "surrogatepass")


def _flip(data: bytearray, dice: random.Random) -> None:
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _cut(data: bytearray, dice: random.Random) -> None:
    del data[dice.randrange(len(data)) :]


def _drop(data: bytearray, dice: random.Random) -> None:
    at = dice.randrange(len(data))
    del data[at : at + dice.randrange(1, 8)]


def _again(data: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(data))
    data[start:start] = data[start : start + dice.randrange(1, 40)]


def _insert(data: bytearray, dice: random.Random) -> None:
    at = dice.randrange(len(data) + 1)
    data[at:at] = dice.choice(_FRAGMENTS)


def _noise(data: bytearray, dice: random.Random) -> None:
    at = dice.randrange(len(data))
    data[at : at + dice.randrange(1, 6)] = dice.randbytes(dice.randrange(1, 6))


_FRAGMENTS: Final = (
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\0", b"\n", b"\r", b"\xff", b"\xc0\x80",
    b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xef\xbb\xbf", b"\\ud800", b"\\u0000", b"1e999",
    b"-0", b"NaN", b"-Infinity", b"9" * 5000, b'"id":"again",', b'"text":7,', b'"session":[],',
    b" " * 50, b"[" * 100_000, b"null", b"\x1b[0m", b"=", b"#", b"'''", b'"""', b"0x" + b"f" * 5000,
)  # fmt: skip

_BREAKS: Final[tuple[Callable[[bytearray, random.Random], None], ...]] = (
    _flip, _flip, _cut, _drop, _again, _insert, _insert, _noise,
)  # fmt: skip


def broken(data: bytes, dice: random.Random) -> bytes:
    """The same bytes, with one to four things wrong."""
    made = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        if made:
            dice.choice(_BREAKS)(made, dice)
    return bytes(made)


# ----- gateway.toml


def config_keys() -> dict[str, list[str]]:
    """Every section, and the keys that it has."""
    sections = attrs.fields(attrs.resolve_types(Sections))
    return {section.name: _fields_of(section.type) for section in sections}


def _fields_of(kind: Any) -> list[str]:
    return [field.name for field in attrs.fields(kind)]


DURATIONS: Final = (
    "30s", "5m", "1h", "90d", "500ms", "1.5s", "0s", "0ms", "36500d", "36501d", "36500.5d",
    "0.0000001s", "999999999999999d", "1e5s", "-1s", "1 s", "s", "", "1S", "\u0661s", "1d1h",
    "none", "0.000001ms", "123456789012345.123456789s", "4380000h", "inf", "1.s", ".5s", "00030s",
)  # fmt: skip

_WORDS: Final = (
    '"queue"', '"collect"', '"steer"', '"nope"', "true", "false", "1", "0", "-1", "2147483647",
    "2147483648", "1e3", "inf", "nan", "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "[]",
    "[1, 2]", "{}", "{a = 1}", '"info"', '"DEBUG"', '"json"', '"~nobody-here/x"', '"a\\u0000b"',
    '"none"', "0x7f", "0b1", "1_000", "'''\nx'''", '"gateway.db"', '"/"', '"."', '"\\u202e"',
)  # fmt: skip

toml_value: Final[Strategy[str]] = st.one_of(
    st.sampled_from([json.dumps(text) for text in DURATIONS]),
    st.sampled_from([json.dumps(text) for text in DURATIONS]),
    st.sampled_from(_WORDS),
    st.integers().map(str),
    st.text(max_size=12).map(json.dumps),
)

_KEYS: Final = config_keys()

_FITTING: Final = ("30s", "5m", "1h", "90d", "500ms", "1.5s", "36500d", "1ms")


def _fitting(key: str, value: object) -> list[str]:
    """Values that a key takes, told from its default."""
    choices: dict[str, list[Any]] = {
        "turns.busy": list(Busy),
        "log.level": list(LogLevel),
        "log.format": list(LogFormat),
    }
    if key in choices:
        return [json.dumps(str(one.value)) for one in choices[key]]
    if isinstance(value, bool):
        return ["true", "false"]
    if isinstance(value, int):
        return ["1", "2", "100", "1_000", "0x7fff", "2147483647"]
    if key == "store.path":
        return ['"bot.db"', '"a/b.db"', '"~/x.db"', '"\u00e9 \\"\u2028.db"']
    return [json.dumps(text) for text in _FITTING]


_FITS: Final = {one.key: _fitting(one.key, one.value) for one in Config().shown()}

_known_section: Final[Strategy[str]] = st.sampled_from(sorted(_KEYS.keys() - {"channels"}))

_section: Final[Strategy[str]] = st.one_of(
    _known_section,
    st.sampled_from(["channels.console", "channels.jsonl", "channels.x", "Store", "a.b.c", '""']),
)


@st.composite
def toml_text(draw: st.DrawFn) -> str:
    """A configuration. Every other one is tidy: keys that exist, with values that they take."""
    tidy = draw(st.booleans())
    lines: list[str] = []
    for section in draw(st.lists(_known_section if tidy else _section, max_size=4, unique=True)):
        lines.append(f"[{section}]")
        known = [key for key in _KEYS.get(section, ["session"]) if section != "channels"]
        if not tidy:
            known.append("typo")
        for key in draw(st.lists(st.sampled_from(known or ["typo"]), max_size=3, unique=True)):
            fits = st.sampled_from(_FITS.get(f"{section}.{key}", ['"x"']))
            lines.append(f"{key} = {draw(fits if tidy else st.one_of(fits, toml_value))}")
    return "\n".join(lines) + "\n"


@st.composite
def environments(draw: st.DrawFn) -> dict[str, str]:
    """What the environment may set, now and then something that nobody knows."""
    known = [f"{section}__{key}" for section, keys in _KEYS.items() for key in keys]
    names = st.one_of(st.sampled_from(known), st.sampled_from(["DRAIN__GRAC", "X__Y", "__", "A__"]))
    values = st.one_of(st.sampled_from(DURATIONS), st.sampled_from(["1", "true", "x"]), odd_text)
    found = draw(st.dictionaries(names, values, max_size=2))
    return {f"{ENV_PREFIX}{name.upper()}": value for name, value in found.items()}


def long_paths() -> list[bytes]:
    """Configurations that are too much of one thing."""
    return [
        b".".join([b"a"] * 3000) + b" = 1",
        b"[" + b".".join([b"store"] * 3000) + b"]",
        b"x = " + b"[" * 100_000,
        b"x = " + b"{a=" * 3000 + b"1" + b"}" * 3000,
        b"[limits]\nturns = " + b"9" * 5000,
        b"[limits]\nturns = 0x" + b"f" * 5000,
        b"[limits]\nturns = 1e99999",
        b"\xef\xbb\xbf[store]\n",
        b'"a\\nb" = 1',
        b'[store]\n"pa\\u001b[2Jth" = 1',
        b'"store.path" = "x"',
        b"[store]\npath = '" + b"x" * 70_000 + b"'",
        b"[[store]]\n",
        b"store = 1\n[drain]\ngrace = '1s'",
        b"\0",
        b"\xff\xfe[\0",
    ]
