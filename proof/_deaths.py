"""What a death may not take with it: the store as a killed process left it, held against what that
process had already told the world outside.

Only looking at the end would miss much: a platform sends again what was not acknowledged, and so
mends what was lost. So everything is looked at after each death, in a copy: the next boot is to
find the files, a WAL without its index too, exactly as the dead left them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import attrs

from trio_gateway._policy import SUSPECT_AT
from trio_gateway.testing import World, check_invariants

from ._worlds import is_made, read


@attrs.frozen
class Marked:
    """The marker of one turn."""

    state: str
    attempt: int
    crashes: int
    settled: bool
    epoch: int = 1
    """The life that has run it last."""

    @property
    def is_suspect(self) -> bool:
        """Whether the next boot holds the turn to be one that may kill its process."""
        return not self.settled and self.crashes + (self.state == "RUNNING") >= SUSPECT_AT


@attrs.frozen
class Look:
    """What the store says, at one moment."""

    made: bool = False
    epochs: int = 0
    ended: bool = False
    """The newest of them noted its end."""
    turns: dict[int, Marked] = attrs.field(factory=dict[int, Marked])
    open: dict[str, str] = attrs.field(factory=dict[str, str])
    """The turns that are open: why each will resume."""
    messages: frozenset[str] = frozenset()
    finished: frozenset[str] = frozenset()
    """The steps that are remembered: `TURN NAME`."""
    deliveries: frozenset[str] = frozenset()
    """The keys of all texts for the outside."""


def copied(world: World) -> World:
    """The world's store, to look at: the database and its WAL."""
    copy = World(world.folder / "look")
    shutil.rmtree(copy.folder, ignore_errors=True)
    copy.folder.mkdir()
    for suffix in ("", "-wal"):
        file = world.store.with_name(world.store.name + suffix)
        if file.exists():
            shutil.copy(file, copy.folder)
    return copy


def look(world: World) -> Look:
    """Look at the store, which nobody has open. Raises `AssertionError` if it is not sound."""
    copy = copied(world)
    if not is_made(copy.store):
        return Look()
    check_invariants(copy.store)
    turns, epochs, messages, finished, deliveries = read(
        copy.store,
        "SELECT id, state, attempt, crashes, settled_at IS NOT NULL, epoch, reason FROM turn",
        "SELECT ending FROM epoch ORDER BY id",
        "SELECT id FROM message",
        "SELECT turn || ' ' || name FROM step WHERE state = 'done'",
        "SELECT key FROM delivery",
    )
    return Look(
        made=True,
        epochs=len(epochs),
        ended=bool(epochs) and epochs[-1] != (None,),
        turns={
            turn: Marked(state, attempt, crashes, bool(settled), epoch)
            for turn, state, attempt, crashes, settled, epoch, _ in turns
        },
        open={
            str(turn): "crash" if state == "RUNNING" else reason
            for turn, state, _, _, settled, _, reason in turns
            if not settled
        },
        messages=frozenset(id for (id,) in messages),
        finished=frozenset(step for (step,) in finished),
        deliveries=frozenset(key for (key,) in deliveries),
    )


def check_kept(
    before: Look, now: Look, notes: Sequence[str], life: Sequence[str], arrived: AbstractSet[str]
) -> None:
    """What the world was told is on disk, and this life has charged nobody wrongly.

    `before` is what the life found, `now` what it left; `notes` are those of all lives, `life`
    those of this one, `arrived` the keys of the texts that are at the platform. The notes are
    `accepted ID`, `settled TURN`, `remembered TURN STEP`, `marked COUNT`, `draining TURN`,
    `began TURN ...`, `bad ...`.
    """
    _nothing_bad(life)
    _acknowledged_is_on_disk(now, notes, arrived)
    _marked_is_marked(now, life)
    _charged(before, now)
    _suspects_alone(before, life)


def told(notes: Sequence[str], word: str) -> list[str]:
    """The notes that begin with a word, without it."""
    return [note.partition(" ")[2] for note in notes if note.partition(" ")[0] == word]


def _nothing_bad(life: Sequence[str]) -> None:
    bad = told(life, "bad")
    assert not bad, f"a gateway that is merely killed had trouble: {bad}"


def _acknowledged_is_on_disk(now: Look, notes: Sequence[str], arrived: AbstractSet[str]) -> None:
    """Promises 1, 6, 7 and 8. Nothing is forgotten within the time of a campaign, so this holds for
    what any life was told."""
    lost = set(told(notes, "accepted")) - now.messages
    assert not lost, f"accepted, and not on disk: {lost}"
    settled = {str(turn) for turn, marked in now.turns.items() if marked.settled}
    undone = set(told(notes, "settled")) - settled
    assert not undone, f"told to be settled, and open or gone on disk: turns {undone}"
    forgotten = set(told(notes, "remembered")) - now.finished
    assert not forgotten, f"told to be remembered, and not on disk: steps {forgotten}"
    premature = arrived - now.deliveries
    assert not premature, f"delivered, and not committed: {premature}"


def _marked_is_marked(now: Look, life: Sequence[str]) -> None:
    """Promise 4: once the stop says that all are marked, or an agent sees the drain, none is only
    RUNNING. And whenever one is marked, all are."""
    states: dict[int, set[str]] = {}
    for marked in now.turns.values():
        if not marked.settled:
            states.setdefault(marked.epoch, set()).add(marked.state)
    partly = [epoch for epoch, found in states.items() if len(found) > 1]
    assert not partly, f"of epoch {partly} some turns are marked, and some are not"
    if told(life, "marked") or told(life, "draining"):
        running = [turn for turn, marked in now.turns.items() if marked.state == "RUNNING"]
        assert not running, f"told to be marked, and RUNNING on disk: turns {running}"


def _charged(before: Look, now: Look) -> None:
    """Promise 9: each boot that came so far charged a crash to each turn that it found RUNNING, and
    to nobody else; and a boot begins at most one attempt of a turn."""
    booted = now.epochs - before.epochs
    assert booted in (0, 1), f"one life, but {booted} epochs"
    for turn, was in before.turns.items():
        marked = now.turns[turn]
        if was.settled:
            assert marked == was, f"turn {turn} had settled as {was}, and became {marked}"
            continue
        assert marked.attempt - was.attempt in (0, booted), f"turn {turn}: {was}, then {marked}"
        crashes = was.crashes + (booted if was.state == "RUNNING" else 0)
        if not marked.settled:
            assert marked.crashes == crashes, f"turn {turn}: {was}, then {marked}"


def _suspects_alone(before: Look, life: Sequence[str]) -> None:
    """Promise 9: of the turns that may be what kills the process, one runs at a time."""
    suspects = {str(turn) for turn, marked in before.turns.items() if marked.is_suspect}
    running: set[str] = set()
    for note in life:
        word, *about = note.split()
        if word == "began" and about[0] in suspects:
            running.add(about[0])
            assert len(running) == 1, f"suspects beside each other: turns {running}"
        elif word == "settled":
            running.discard(about[0])
