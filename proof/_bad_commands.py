"""What an operator writes: `gateway.toml`, the environment, and words on a command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Final, cast
from unittest import mock

import attrs
import trio

from trio_gateway import ConfigError, Settings, Turn, Undeliverable
from trio_gateway._config import ENV_PREFIX, Config, load_config
from trio_gateway._policy import DeliveryRules, ResumeRules, plan_stop
from trio_gateway._views import config_as_toml
from trio_gateway.testing import MemoryChannel

from ._bad_lives import PLAIN, Batch, command, control, hosted, in_virtual_time, ours, story
from ._inputs import (
    as_table,
    broken,
    config_keys,
    drawn,
    environments,
    long_paths,
    name_text,
    odd_text,
    toml_text,
)

LIVES_EVERY: Final = 25
"""Of so many configurations that are accepted, a gateway lives under one."""

COMMANDS_EVERY: Final = 10
"""Of so many configurations, one is given to the command, too."""

PATIENCE: Final = 30.0

# ----- gateway.toml and the environment


def config(batch: Batch) -> None:
    """Hundreds of configurations: each is used, or refused with one clear line for each fault."""
    dice = batch.dice
    texts = drawn(toml_text(), max(4, batch.size // 3), batch.draw_seed())
    settings = drawn(environments(), max(4, batch.size // 6), batch.draw_seed())
    extremes = long_paths() if batch.number == 0 else []
    lived = 0
    for n in range(batch.size):
        text = extremes.pop() if extremes else dice.choice(texts).encode()
        if n % 3 == 0 and not extremes:
            text = broken(text, dice)
        environ = dice.choice(settings) if dice.random() < 0.3 else {}
        told = _one_config(batch, text, environ)
        if n % COMMANDS_EVERY == 0:
            _as_command(batch, text, environ, told is not None)
        if told is not None:
            lived += 1
            if lived % LIVES_EVERY == 0:
                _live_under(batch, told)
    if batch.number == 0:
        _as_process(batch)


def _one_config(batch: Batch, text: bytes, environ: Mapping[str, str]) -> Config | None:
    file = batch.folder / "gateway.toml"
    file.write_bytes(text)
    where = f"{text[:600]!r} with {dict(environ)}"
    try:
        told = load_config(file, environ)
    except ConfigError as error:
        _check_refusal(file, environ, error, where)
        if "unknown" in str(error) and _unknown(text, environ) == []:
            raise AssertionError(f"{where}: nothing is unknown, and yet {error}") from error
        batch.error(error)
        batch.input("refused")
        return None
    except Exception as error:
        raise AssertionError(f"{where}: {story(error)}") from error
    unknown = _unknown(text, environ)
    assert not unknown, f"{where}: {unknown} means nothing, and was taken"
    try:
        _check_accepted(batch, told)
    except Exception as error:
        raise AssertionError(f"{where}: {story(error)}") from error
    batch.input("accepted")
    return told


def _unknown(text: bytes, environ: Mapping[str, str]) -> list[str] | None:
    """Keys and variables that nobody knows, by the page that describes them; None: it is no TOML,
    and nobody can tell."""
    known = config_keys()
    paths = [f"{name}__{key}" for name, keys in known.items() if name != "channels" for key in keys]
    variables = {path.upper() for path in (*paths, "channels__console__session")}
    odd = [name for name in environ if name.removeprefix(ENV_PREFIX) not in variables]
    try:
        table = as_table(tomllib.loads(text.decode("utf-8-sig"))) or {}
    except (ValueError, RecursionError):
        return None
    for name, value in table.items():
        if name not in known:
            odd.append(name)
        else:
            inner = as_table(value) or {}
            odd += [key for key in inner if key not in known[name]]
            # The only tables within tables are the channels', and one of them has a key.
            deeper = {key: as_table(one) or {} for key, one in inner.items()}
            odd += [key for here, one in deeper.items() for key in one
                    if (name, here, key) != ("channels", "console", "session")]  # fmt: skip
    return odd


def _check_refusal(file: Path, environ: Mapping[str, str], error: ConfigError, where: str) -> None:
    """Every line of it names the file or the variable, and says something about it."""
    lines = str(ours(error)).split("\n")
    assert len(lines) < 100, f"{where}: {len(lines)} lines"
    for line in lines:
        named = [name for name in (str(file), *environ, "environment", "(default)") if name in line]
        assert named, f"{where}: what is {line!r} about?"
        assert line.isprintable() or "\\" in line, f"{where}: {line!r} commands a terminal"
        assert len(line) < 2000, f"{where}: {line[:300]!r}... is {len(line)} characters long"


def _check_accepted(batch: Batch, told: Config) -> None:
    """What was accepted can be shown, and reads back as the same."""
    settings = told.settings()
    plan = plan_stop(settings.grace, settings.budget)
    windows = (plan.mark, plan.grace, plan.unwind, plan.flush, plan.spare)
    assert all(window >= 0 for window in windows), plan
    assert sum(windows) <= plan.budget * 1.000001, plan
    told.warnings()
    shown = [line for line in config_as_toml(told) if not line.startswith("# warning")]
    if told.sections.channels.console is not None or told.sections.channels.jsonl is not None:
        return  # a channel without keys has no value that could be shown
    again = batch.folder / "shown.toml"
    again.write_text("\n".join(shown), encoding="utf-8", errors="surrogateescape")
    same = load_config(again, {})
    for section in attrs.fields(type(told.sections)):
        if section.name != "drain":  # what was left out of it is shown as it was derived
            before = getattr(told.sections, section.name)
            after = getattr(same.sections, section.name)
            assert before == after, f"{before} is shown as {after}"


def _as_command(batch: Batch, text: bytes, environ: Mapping[str, str], good: bool) -> None:
    """The command says the same, in words and as JSON."""
    if not all(_can_be_set(name, value) for name, value in environ.items()):
        return
    file = batch.folder / "gateway.toml"
    file.write_bytes(text)
    with _environ(environ):
        codes = (0,) if good else (78,)
        command(batch, "config", "check", "--config", str(file), codes=codes)
        answer = command(batch, "config", "check", "--json", "--config", str(file), codes=codes)
        told = json.loads(answer.out)
        assert told["ok"] is good, told
        assert bool(told["errors"]) is not good, told
        command(batch, "config", "show", "--config", str(file), codes=codes)
    batch.figures["config_commands"] += 3


def _environ(environ: Mapping[str, str]) -> AbstractContextManager[object]:
    """The environment with these variables, for a while."""
    return cast("AbstractContextManager[object]", mock.patch.dict(os.environ, environ))


def _can_be_set(name: str, value: str) -> bool:
    try:
        return b"\0" not in os.fsencode(name + value) and "=" not in name
    except UnicodeEncodeError:
        return False


def _live_under(batch: Batch, told: Config) -> None:
    """However odd its durations and limits: a gateway that may use it answers."""
    settings = told.settings()
    channel = MemoryChannel("chat")

    async def agent(turn: Turn) -> str:
        await turn.say("on it")
        return "done"

    async def life() -> None:
        async with hosted(batch, agent, channel, settings=settings) as gateway:
            if settings.limits.message_bytes < 40 or settings.limits.key_length < 10:
                return  # so little that not even the healthy message is taken
            await control(gateway, "one")
            await channel.receive("a", "m1", "hi")
            await gateway.wait_idle()

    try:
        in_virtual_time(life)
    except Exception as error:
        raise AssertionError(f"under {settings}: {story(error)}") from error
    finally:
        for file in batch.folder.glob("gateway.db*"):
            file.unlink()
    batch.seen["a life under an odd configuration"] += 1


def _as_process(batch: Batch) -> None:
    """The real command, with a file and an environment that are wrong in a way only it meets."""
    file = batch.folder / "gateway.toml"
    file.write_bytes(b'[store]\npath = "x"\n')
    raw = dict(os.environb)
    raw[ENV_PREFIX.encode() + b"STORE__PATH"] = b"a\xff\xfeb"
    raw[ENV_PREFIX.encode() + b"TURNS__BUSY"] = b"\xff\x1b[2J"
    done = subprocess.run(
        [sys.executable, "-m", "trio_gateway", "config", "check", "--config", str(file)],
        env=raw,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    told = done.stderr.decode("utf-8", "replace")
    assert done.returncode == 78, (done.returncode, told)
    assert "TURNS__BUSY" in told, told
    assert "Traceback" not in told, told
    assert "\x1b" not in told, told
    batch.seen["the real command"] += 1


# ----- words on a command line

_SHORT: Final = Settings(
    limits=PLAIN.limits,
    commands=False,
    grace=1.0,
    budget=5.0,
    delivery=DeliveryRules(max_tries=1),
    resume=ResumeRules(max_interruptions=1),
)


def commands(batch: Batch) -> None:
    """Listings, explanations and repairs, by names that exist and names that nobody has."""
    names = drawn(name_text, max(8, batch.size // 3), batch.draw_seed())
    words = drawn(odd_text, max(8, batch.size // 3), batch.draw_seed())
    real = in_store(batch, [name for name in names if _is_fine(name)])
    with mock.patch.dict(os.environ):
        for _ in range(batch.size):
            _one_command(batch, [*names, *words], real)


def _is_fine(name: str) -> bool:
    return 0 < len(name) <= 1024 and not any("\ud800" <= char <= "\udfff" for char in name)


def in_store(batch: Batch, names: Sequence[str]) -> list[str]:
    """Make a store with something of everything that a command can show; return its sessions."""
    fates = {name: n % 4 for n, name in enumerate(dict.fromkeys(names))}
    in_virtual_time(partial(_make, batch, fates))
    in_virtual_time(partial(_boot_again, batch))
    return [f"chat:{name}" for name in fates]


async def _make(batch: Batch, fates: Mapping[str, int]) -> None:
    async def agent(turn: Turn) -> str:
        if fates[turn.session.name] == 1:
            await trio.sleep_forever()
        if fates[turn.session.name] == 2:
            raise ValueError(turn.text)
        await turn.checkpoint(turn.text)
        return turn.text

    channel = MemoryChannel("chat")

    async def lose(delivery: object) -> None:
        await trio.lowlevel.checkpoint()
        if batch.dice.random() < 0.3:
            raise Undeliverable(f"gone: {delivery}"[:200])

    channel.before_send = lose
    async with hosted(batch, agent, channel, settings=_SHORT) as gateway:
        await channel.wait_ready()
        batch_of = [channel.message(name, name, name, sender=name) for name in fates]
        if batch_of:
            await channel.receive_all(*batch_of)
        await trio.testing.wait_all_tasks_blocked()
        gateway.request_stop(now=True)


async def _boot_again(batch: Batch) -> None:
    """So that what was cut is put into quarantine."""

    async def agent(turn: Turn) -> str:
        await trio.lowlevel.checkpoint()
        return "ok"

    async with hosted(batch, agent, MemoryChannel("chat"), settings=_SHORT) as gateway:
        await gateway.wait_idle()


def _one_command(batch: Batch, words: Sequence[str], real: Sequence[str]) -> None:
    dice = batch.dice
    session = dice.choice(real) if real and dice.random() < 0.4 else dice.choice(words)
    word = session.partition(":")[2] if dice.random() < 0.5 else dice.choice(words)
    given = dice.choice(
        (
            ("sessions", "list"),
            ("sessions", "list", "--limit", dice.choice(("0", "-1", "9" * 30, "1e3", word))),
            ("sessions", "show", session),
            ("sessions", "show", session, "--limit", dice.choice(("0", "5", "9" * 30, word))),
            ("explain", word),
            ("quarantine", "list"),
            ("quarantine", "show", word),
            ("quarantine", dice.choice(("retry", "drop")), word, word),
            ("dead-letters", "list"),
            ("dead-letters", "show", dice.choice((word, "1", "9" * 30, "-1"))),
            ("dead-letters", dice.choice(("retry", "drop")), dice.choice((word, "1", "--all"))),
            ("doctor",),
            (word,),
            (dice.choice(("sessions", "config", "--version")), word, session),
        )
    )
    as_json = ("--json",) if dice.random() < 0.3 else ()
    if given[0] == word:
        answer = command(batch, *given[:1], *as_json)
    else:
        answer = command(batch, *given, *as_json, "--store", str(batch.store))
    if as_json and not answer.code and answer.out.startswith(("{", "[")):
        json.loads(answer.out)
    if given[:2] == ("sessions", "show") and session in real and len(given) == 3:
        assert answer.code == 0, f"{session!r} is there, and not found: {answer}"
        batch.seen["a session of an odd name, shown"] += 1
    batch.input(f"exit {answer.code}")
