"""What must be true of a store at every instant, whatever happened to those who wrote it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import apsw

_SETTLED: Final = (
    (
        "a message has not reached its end",
        "SELECT id, state FROM message WHERE state IN ('queued', 'running')",
    ),
    (
        "a reply has not left",
        "SELECT key, state FROM delivery WHERE state IN ('pending', 'sending')",
    ),
)


def check_invariants(store: str | os.PathLike[str], *, settled: bool = False) -> None:
    """Raise `AssertionError`, with one line for each violation, unless the store is sound.

    Call it after every scenario, however that ended. With `settled`, nothing may be open either:
    every message has reached its end, every reply has left. See `violations`.
    """
    found = violations(store, settled=settled)
    if found:
        raise AssertionError("\n".join([f"{store}:", *found]))


def violations(store: str | os.PathLike[str], *, settled: bool = False) -> tuple[str, ...]:
    """What is wrong with the store at this path, in words; empty if nothing is.

    Reads one snapshot, and only reads: a gateway may have the store open. It looks at every row,
    and so is for tests. The rules stand in `invariants.sql`, beside this file.
    """
    db: Any = apsw.Connection(str(Path(store).absolute()), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        db.set_busy_timeout(5000)
        db.execute("BEGIN")
        return tuple(_look(db, (*_rules(), *(_SETTLED if settled else ()))))
    finally:
        db.close()


def _look(db: Any, rules: tuple[tuple[str, str], ...]) -> Iterator[str]:
    for (found,) in list(db.execute("PRAGMA integrity_check")):
        if found != "ok":
            yield f"the database is intact: {found}"
    if not list(db.execute("SELECT 1 FROM sqlite_schema")):
        return  # its maker died before it was one
    for sentence, query in rules:
        for row in list(db.execute(query)):
            yield f"{sentence}: {_shown(row)}"


def _rules() -> tuple[tuple[str, str], ...]:
    """Sentence and query of each rule, from the file."""
    text = files(__name__.rpartition(".")[0]).joinpath("invariants.sql").read_text("utf-8")
    _, *blocks = text.split("\n\n")
    return tuple(_rule(block) for block in blocks)


def _rule(block: str) -> tuple[str, str]:
    sentence, _, query = block.strip().partition("\n")
    return sentence.removeprefix("-- "), query


def _shown(row: tuple[Any, ...]) -> str:
    return ", ".join(repr(value) for value in row)
