"""What must be true of a world whose gateways were killed.

Whoever runs the lives notes in the world, where no crash takes it back, which turns the store has
open just before each boot (`boot {...}`), and the agent notes each attempt (`began TURN ATTEMPT
REASON`). So afterwards the two can be compared: what resumed must be exactly what was interrupted.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import apsw
import attrs

from trio_gateway.testing import World, check_invariants

REAL: Final = apsw.vfs_names()[0]
"""SQLite's own file layer: what looks from outside looks past a faulty one."""


def open_turns(world: World) -> dict[str, str]:
    """The turns that are open on disk: their ids, and why they will resume."""
    if not is_made(world.store):
        return {}
    found = rows(
        world.store,
        "SELECT id, CASE state WHEN 'RUNNING' THEN 'crash' ELSE reason END FROM turn"
        " WHERE state IN ('RUNNING', 'RESUME_PENDING')",
    )
    return {str(turn): reason for turn, reason in found}


def is_made(store: Path) -> bool:
    """Whether the store was made; its maker may have died before it was."""
    try:
        return store.exists() and bool(rows(store, "SELECT 1 FROM sqlite_schema"))
    except apsw.ReadOnlyError:
        return False  # half made: only somebody who may write can tell


def rows(store: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    """What a process would read that looks from outside, on a disk without faults."""
    with closing(_connection(store)) as db:
        return list(db.execute(sql, values))


def read(store: Path, *queries: str) -> list[list[tuple[Any, ...]]]:
    """The same, for several queries at one moment."""
    with closing(_connection(store)) as db:
        db.execute("BEGIN")
        return [list(db.execute(sql)) for sql in queries]


def _connection(store: Path) -> Any:
    return apsw.Connection(str(store), flags=apsw.SQLITE_OPEN_READONLY, vfs=REAL)


def noted(world: World, first_word: str) -> list[str]:
    """The notes that begin with a word, without it."""
    return [note.partition(" ")[2] for note in world.notes if note.split()[0] == first_word]


@attrs.define
class Boot:
    """What one boot found open, and what it resumed."""

    open: dict[str, str]
    resumed: dict[str, str] = attrs.field(factory=dict[str, str])


def boots(world: World) -> list[Boot]:
    """Every boot of the world, in order."""
    found: list[Boot] = []
    for note in world.notes:
        word, _, rest = note.partition(" ")
        if word == "boot":
            found.append(Boot(json.loads(rest)))
        elif word == "began":
            turn, _, reason = rest.split()
            if reason != "fresh":
                found[-1].resumed[turn] = reason
    return found


def sound_at_death(world: World) -> None:
    """At the instant of a death, too, everything in the store fits together (promise 6)."""
    if is_made(world.store):
        check_invariants(world.store)


# ----- afterwards


def exactly_the_interrupted_resumed(world: World, *, ended_instead: tuple[str, ...] = ()) -> None:
    """Promise 5: a boot resumes what was open on disk before it, once each, for the reason on disk,
    and nothing else. A boot that died may not have come to all of it; the last one has.

    `ended_instead`: ends that a boot may give to a turn instead of resuming it.
    """
    began = Counter(noted(world, "began"))
    assert all(count == 1 for count in began.values()), f"an attempt began twice: {began}"
    for number, found in enumerate(boots(world), 1):
        unasked = found.resumed.items() - found.open.items()
        assert not unasked, f"boot {number} resumed {unasked}; open were {found.open}"
    last = boots(world)[-1]
    for turn in last.open.keys() - last.resumed.keys():
        ((state,),) = rows(world.store, "SELECT state FROM turn WHERE id = ?", int(turn))
        assert state in ended_instead, f"turn {turn} was interrupted, did not resume, is {state}"


def all_ended(world: World, **ends: str) -> None:
    """Promise 1: every message has reached its one end: `answered`, but for those that are named.
    Nothing is open."""
    check_invariants(world.store, settled=True)
    found = dict(rows(world.store, "SELECT id, state FROM message WHERE state != 'answered'"))
    assert found == ends, f"what was not answered: {found}"


def answered_once(world: World, *ids: str, forgetful: bool = False) -> None:
    """Promises 6 and 7: each message has one final reply. What the platform was sent twice is the
    same text under the same key; a platform that is `forgetful` of keys is told that it repeats."""
    finals = [text for text in world.shown() if text.final]
    answers = Counter(id for text in finals for id in text.in_reply_to)
    assert answers == Counter(ids), f"answered were {answers}"
    first: dict[str, str] = {}
    for text in world.arrived():
        is_repeat = text.key in first
        assert first.setdefault(text.key, text.text) == text.text
        assert not is_repeat or text.repeat or not forgetful, f"{text.key} repeats, unsaid"
        assert forgetful or not text.repeat, f"{text.key} is said to repeat"


def shown_to(world: World, session: str) -> list[str]:
    """What the people of one session see, from top to bottom."""
    return [text.text for text in world.shown() if text.session == session]
