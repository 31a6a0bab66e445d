"""A store whose database is whole, and in which a row says what no gateway ever wrote.

Such a row costs its own message at the most: every other is answered, its session goes on, and the
commands still show it all. Only who a store is, and the tables themselves, must be what they were:
else the boot refuses the file, in words that name it, and leaves it as it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Final

import apsw
import attrs
import trio

from trio_gateway import Message, StoreError
from trio_gateway.store import read_store

from ._bad_lives import Batch, clear, hosted, in_virtual_time, ours, rows, story
from ._bad_stores import (
    LONG_ENOUGH,
    SESSIONS,
    SESSIONS_HERE,
    SETTINGS,
    TABLES,
    Platform,
    agent_of,
    columns_of,
    connection,
    ends_in,
    look,
    read_files,
    stores,
    truth,
    write_files,
)
from ._inputs import NASTY

_BY_KEY: Final = ("cursor", "attempt", "step")
"""Tables whose rows have no number."""

_OPEN: Final = {
    "turn": "settled_at IS NULL",
    "message": "state IN ('queued', 'running')",
    "delivery": "state IN ('pending', 'sending')",
    "step": "turn IN (SELECT id FROM turn WHERE settled_at IS NULL)",
}
"""Rows that a boot reads, and so are damaged more often."""

LARGE: Final = (
    0, 1, -1, 2, 3, 255, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, -(2**31), -(2**63), 10**15,
    253_402_300_800_000_000, -62_135_596_800_000_001,
)  # fmt: skip
"""Numbers that are too large for something: an id, an attempt, a time (years 1 and 9999)."""

WORDS: Final = (
    "", "queued", "running", "answered", "failed", "stopped", "quarantined", "expired", "RUNNING",
    "RESUME_PENDING", "COMPLETED", "FAILED", "STOPPED", "QUARANTINED", "EXPIRED", "restart",
    "crash", "shutdown", "pending", "sending", "delivered", "dead", "dropped", "answer", "say",
    "apology", "command", "notice", "begun", "done", "safe", "unsafe", "idempotent", "local",
    "chat", "Chat", "virtual", "{}", "[]", "null", "[1]", '["m0-1"]', '{"text": "hi"}',
    '{"text": 5}', "1", "-1", "a newer message arrived", "dropped from quarantine", "running\0",
    " queued",
)  # fmt: skip
"""What is right in some column, and so wrong in another."""

BYTES: Final = (
    b"\xff\xfe", b"\x80", b'{"text": "\xff"}', b"ed\xa0\x80", b"\xed\xa0\x80", b'["\xff"]',
    b"m0-1\xff", b"\xf5\x80\x80\x80",
)  # fmt: skip
"""Texts that are none."""


@attrs.frozen
class Damage:
    """What was done to rows."""

    what: str
    sessions: frozenset[str]
    """Those to whom it was done: `channel:name`."""
    schema: bool = False
    """Whether it was done to the tables themselves."""


def insane_rows(batch: Batch) -> None:
    """Insane rows, one boot each."""
    for _ in range(batch.size):
        kind = batch.dice.choice(sorted(stores()))
        _one_damaged_row(batch, kind)
    clear(batch.folder)


def _one_damaged_row(batch: Batch, kind: str) -> None:
    damage = None
    while damage is None:
        write_files(batch.folder, stores()[kind])
        damage = _damage_rows(batch.store, batch.dice)
    what = f"{kind}: {damage.what}"
    try:
        _boot(batch, kind, damage)
    except Exception as error:
        raise AssertionError(f"{what}: {story(error)}") from error


def _damage_rows(store: Path, dice: random.Random) -> Damage | None:
    """Do something to one row, or to a few. None: the database itself did not let it happen."""
    with closing(connection(store)) as db:
        db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        before = _rows_of_sessions(db)
        told: list[str] = []
        try:
            for _ in range(dice.choice((1, 1, 1, 1, 2, 3))):
                told.append(dice.choice(_ROW_DAMAGES)(db, dice))
            schema = dice.random() < 0.04
            if schema:
                told.append(_damage_schema(db, dice))
        except (apsw.ConstraintError, apsw.MismatchError):
            return None
        after = None if schema else _rows_of_sessions(db)
    touched = _names(before) if after is None else _touched(before, after)
    return Damage(", ".join(told), touched, schema)


def _pick(db: Any, dice: random.Random) -> tuple[str, str, list[Any], list[tuple[str, str]]]:
    """A table, a condition that names one of its rows, the values for it, and its columns."""
    table = dice.choice((*TABLES, "message", "message", "turn", "turn", "turn", "delivery"))
    keys = [
        f"CAST({row[1]} AS BLOB)" if row[2] == "TEXT" else row[1]
        for row in db.execute(f"PRAGMA table_info({table})")
        if row[5]
    ] or ["rowid"]
    among = f" WHERE {_OPEN[table]}" if table in _OPEN and dice.random() < 0.6 else ""
    found = list(db.execute(f"SELECT {', '.join(keys)} FROM {table}{among}"))
    if not found:
        raise apsw.ConstraintError("no row")
    where = " AND ".join(f"{key} = ?" for key in keys)
    return table, where, list(dice.choice(found)), columns_of(db, table)


def _set_values(db: Any, dice: random.Random) -> str:
    table, where, key, columns = _pick(db, dice)
    column, kind = dice.choice(columns)
    value, given = _value(db, kind, dice)
    db.execute(f"UPDATE {table} SET {column} = {given} WHERE {where}", (value, *key))
    return f"{table}.{column} of {key} is {value!r:.80}"


def _value(db: Any, kind: str, dice: random.Random) -> tuple[Any, str]:
    """A value, and how it is bound."""
    if dice.random() < 0.15:
        return None, "?"
    if kind == "INTEGER":
        return dice.choice((*LARGE, dice.randrange(20), dice.randrange(-(2**63), 2**63))), "?"
    if dice.random() < 0.3:
        return dice.choice((*BYTES, dice.randbytes(dice.randrange(1, 9)))), "CAST(? AS TEXT)"
    fine = [text for text in NASTY if text.isascii() or text.isprintable()]
    return dice.choice((*WORDS, *WORDS, *fine, "x" * 100_000)), "?"


def _delete(db: Any, dice: random.Random) -> str:
    table, where, key, _ = _pick(db, dice)
    db.execute(f"DELETE FROM {table} WHERE {where}", key)
    return f"{table} {key} is gone"


def _copy(db: Any, dice: random.Random) -> str:
    """A row twice, under another key."""
    table, where, key, columns = _pick(db, dice)
    fresh = {"id": dice.randrange(10_000, 2**40), "seq": dice.randrange(10_000, 2**40)}
    chosen = {name: fresh[name] for name, kind in columns if name in fresh and kind == "INTEGER"}
    values = [
        str(chosen[name]) if name in chosen
        else "'copy'" if (table, name) in (("delivery", "key"), ("message", "id")) else name
        for name, _ in columns
    ]  # fmt: skip
    db.execute(f"INSERT INTO {table} SELECT {', '.join(values)} FROM {table} WHERE {where}", key)
    return f"{table} {key} is there twice, as {chosen}"


def _swap(db: Any, dice: random.Random) -> str:
    """A row has what another one should."""
    table, where, key, columns = _pick(db, dice)
    column, _ = dice.choice(columns)
    others = list(db.execute(f"SELECT rowid FROM {table}")) if table not in _BY_KEY else []
    if not others:
        raise apsw.ConstraintError("no other row")
    other = dice.choice(others)
    db.execute(
        f"UPDATE {table} SET {column} = (SELECT {column} FROM {table} WHERE rowid = ?)"
        f" WHERE {where}",
        (*other, *key),
    )
    return f"{table}.{column} of {key} is another row's"


_ROW_DAMAGES: Final[tuple[Callable[[Any, random.Random], str], ...]] = (
    _set_values, _set_values, _set_values, _set_values, _set_values, _set_values, _delete, _copy,
    _swap,
)  # fmt: skip


def _damage_schema(db: Any, dice: random.Random) -> str:
    """The tables are not those that a gateway makes."""
    statement = dice.choice(
        (
            "DROP INDEX turn_open", "DROP INDEX message_queued", "DROP INDEX delivery_loose",
            "DROP TABLE step", "DROP TABLE message", "DROP TABLE store", "DELETE FROM store",
            "ALTER TABLE turn RENAME COLUMN reason TO because", "DROP TABLE epoch",
            "ALTER TABLE delivery DROP COLUMN n", "ALTER TABLE turn RENAME TO turns",
            "CREATE TRIGGER t AFTER UPDATE ON turn BEGIN DELETE FROM message; END",
            "CREATE VIEW v AS SELECT * FROM nowhere", "PRAGMA user_version = 0",
            "PRAGMA user_version = -1", "PRAGMA user_version = 2",
            "PRAGMA user_version = 2147483647", "PRAGMA application_id = 1",
            "INSERT INTO store VALUES ('another', 1)",
        )
    )  # fmt: skip
    db.execute(statement)
    return statement


# ----- whose row it was


def _rows_of_sessions(db: Any) -> dict[tuple[str, bytes], frozenset[tuple[Any, ...]]]:
    """For each session, by name: all its rows."""
    found: dict[tuple[str, bytes], set[tuple[Any, ...]]] = {}
    of_session = {"session": "t.id", "message": "t.session", "turn": "t.session",
                  "delivery": "t.session", "step": "(SELECT session FROM turn WHERE id = t.turn)",
                  "attempt": "(SELECT session FROM turn WHERE id = t.turn)"}  # fmt: skip
    for table, owner in of_session.items():
        columns = ", ".join(
            f"CAST(t.{name} AS BLOB)" if kind == "TEXT" else f"t.{name}"
            for name, kind in columns_of(db, table)
        )
        for channel, name, *values in db.execute(
            f"SELECT CAST(s.channel AS BLOB), CAST(s.name AS BLOB), {columns} FROM {table} t"
            f" LEFT JOIN session s ON s.id = {owner}"
        ):
            key = ((channel or b"").decode(errors="replace"), name or b"")
            found.setdefault(key, set()).add((table, *values))
    return {key: frozenset(values) for key, values in found.items()}


def _names(found: Mapping[tuple[str, bytes], object]) -> frozenset[str]:
    return frozenset(f"{channel}:{name.decode(errors='replace')}" for channel, name in found)


def _touched(
    before: Mapping[tuple[str, bytes], frozenset[tuple[Any, ...]]],
    after: Mapping[tuple[str, bytes], frozenset[tuple[Any, ...]]],
) -> frozenset[str]:
    keys = before.keys() | after.keys()
    return _names({key: 0 for key in keys if before.get(key) != after.get(key)})


# ----- what comes of it


def _boot(batch: Batch, kind: str, damage: Damage) -> None:
    files = read_files(batch.folder)
    answers: dict[str, str] = {}
    refused = _live(batch, answers)
    if refused is not None:
        of_all = damage.schema or "store." in damage.what or "store [" in damage.what
        assert of_all, f"one row keeps all from being served: {refused!r}"
        assert str(batch.store) in str(refused), f"which file? {refused!r}"
        assert read_files(batch.folder) == files, f"changed by who refused it: {refused!r}"
        batch.input("refused")
        batch.seen["a store that is nobody's, refused"] += 1
        return
    if not damage.schema:
        _check_fates(batch, kind, damage, answers)
        _check_left(batch)
    look(batch)
    batch.input("served")


def _live(batch: Batch, answers: dict[str, str]) -> StoreError | None:
    """One life: None, or how the store was refused."""
    try:
        in_virtual_time(partial(_life, batch, answers))
    except StoreError as error:
        batch.error(ours(error))
        return error
    return None


async def _life(batch: Batch, answers: dict[str, str]) -> None:
    """A healthy message in every session that there was, and in one that is new."""
    platform = Platform(making=False)
    async with hosted(batch, agent_of(making=False), platform, settings=SETTINGS) as gateway:
        for session in SESSIONS:
            channel, _, name = session.partition(":")
            message = Message(session=name, id=_id(session), text="control", channel=channel)
            try:
                receipt = await gateway.accept(message)
            except StoreError as error:
                batch.error(ours(error))
                answers[session] = "error"
            else:
                answers[session] = str(receipt.status)
        with trio.move_on_after(LONG_ENOUGH):
            await gateway.wait_idle()


def _id(session: str) -> str:
    return f"control-{session}"


def _check_fates(batch: Batch, kind: str, damage: Damage, answers: Mapping[str, str]) -> None:
    """Whoever's rows were left alone notices nothing; and a damaged session goes on, too."""
    ends = ends_in(batch.store)
    for message, right in truth(kind).ends.items():
        if f"{message[0]}:{right[0]}" not in damage.sessions:
            found = ends.get(message)
            assert found == right, f"{message} should be {right}, and is {found}"
    for session, answer in answers.items():
        channel, _, name = session.partition(":")
        fate = ends.get((channel, _id(session)), (name, "nowhere"))[1]
        if session not in damage.sessions:
            right_fate = "failed" if name == "failed" else "answered"
            assert (answer, fate) == ("accepted", right_fate), f"in {session}: {answer}, {fate}"
        else:
            stays = answer == "accepted" and fate in ("queued", "running")
            assert not stays, f"{session}, which was damaged, does not go on: {fate}"
            batch.figures[f"rows_then_{fate}"] += 1
            batch.seen["a damaged session that goes on"] += fate == "answered"


def _check_left(batch: Batch) -> None:
    """What is still open belongs to a channel that this gateway does not have, and waits for it; or
    it is a message that the damage took out of every hand, and the doctor names it."""
    with closing(read_store(batch.store)) as reader:
        astray = set(reader.astray(1000))
        turns = [turn for turn in reader.open_turns() if turn.session.channel in SESSIONS_HERE]
    assert not turns, f"still open: {turns}"
    for raw_channel, raw_id in rows(batch.store, _LEFT):
        channel, id = (raw.decode(errors="backslashreplace") for raw in (raw_channel, raw_id))
        assert id in astray or channel not in SESSIONS_HERE, f"{id} will never end, and nobody says"
        batch.figures["rows_astray" if id in astray else "rows_elsewhere"] += 1
    unsent = rows(batch.store, _UNSENT)
    assert not unsent, f"neither sent nor given up: {unsent}"


_LEFT: Final = """
SELECT CAST(coalesce(session.channel, '') AS BLOB), CAST(message.id AS BLOB) FROM message
LEFT JOIN session ON session.id = message.session
WHERE message.state NOT IN ('answered', 'failed', 'stopped', 'quarantined', 'expired')
"""

_UNSENT: Final = """
SELECT delivery.id FROM delivery JOIN session ON session.id = delivery.session
WHERE delivery.state IN ('pending', 'sending') AND session.channel = 'chat'
"""
