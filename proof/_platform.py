"""The other end of `jsonl`: a chat platform that speaks to a gateway process, outlives it, and
keeps an exact account.

It does what a platform does: it sends a message again until it is told that it was accepted, now
and then once more after that, and never sends a new one under an old id. How its lines reach the
process (a pipe, a fifo behind a supervisor) is the campaign's affair: `new` and `again` make lines,
and every line that the process writes goes to `hear`.

The agent behind the gateway does what the text of a message says (see `AGENT`), and notes every
attempt and every effect in a file, where no crash takes it back.
"""

from __future__ import annotations

import json
import os
import random
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import apsw
import attrs

from trio_gateway.testing import check_invariants

AGENT: Final = """
import os
import random

import trio

from trio_gateway import StepInDoubt


def note(text):
    fd = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, text.encode() + b"\\n")
    os.close(fd)


async def look(id):
    await trio.sleep(random.random() * 0.01)
    return f"seen {id}"


async def shoot(id):
    note(f"shot {id}")
    await trio.sleep(random.random() * 0.01)
    return "hit"


async def agent(turn):
    id = turn.message.id
    note(f"began {turn.id} {turn.attempt} {turn.resumed.reason if turn.resumed else 'fresh'}")
    kind, _, more = turn.text.partition(" ")
    if kind == "slow":
        await trio.sleep(random.random() * 0.1)
    if kind == "sleep":  # so many seconds, in every attempt
        await trio.sleep(float(more))
    if kind == "long" and turn.resumed is None:  # does not end by itself in its first attempt
        await trio.sleep(600)
    if kind == "stubborn" and turn.resumed is None:  # swallows its cancellation
        while True:
            with trio.CancelScope(shield=True):
                await trio.sleep(600)
    if kind == "block" and turn.resumed is None:  # blocks the event loop
        import time
        time.sleep(float(more or 600))
    if kind == "restart":
        turn.request_restart()
    if kind == "says":
        await turn.say(f"on it: {id}")
    if kind == "steps":
        assert await turn.step(look, id) == f"seen {id}"
        try:
            await turn.step(shoot, id, effect="unsafe")
        except StepInDoubt:
            return f"in doubt: {id}"
    return f"re: {id}"
"""

PATIENCE: Final = 60.0
"""Seconds that anything may take on a busy machine before a campaign calls it a failure."""


def furnish(folder: Path, config: str = "", agent: str = AGENT) -> None:
    """Put the agent and its configuration into a folder. `EFFECTS` names the file of its notes."""
    (folder / "agent.py").write_text(textwrap.dedent(agent))
    (folder / "gateway.toml").write_text(textwrap.dedent(config))


def environment(folder: Path) -> dict[str, str]:
    """What a gateway process in that folder is started with."""
    return {**os.environ, "EFFECTS": str(folder / "effects.txt")}


@attrs.define(eq=False)
class Platform:
    """One platform, for all lives of one store."""

    folder: Path
    dice: random.Random = attrs.field(factory=random.Random)
    sent: dict[str, dict[str, str]] = attrs.field(factory=dict[str, dict[str, str]])
    """Every message, in the order in which they were sent first."""
    accepted: set[str] = attrs.field(factory=set[str])
    finals: dict[str, str] = attrs.field(factory=dict[str, str])
    """What each message was answered with."""
    events: list[dict[str, Any]] = attrs.field(factory=list[dict[str, Any]])
    """Every line that a process wrote, in all lives."""
    news: threading.Condition = attrs.field(factory=threading.Condition)
    sent_again: int = 0

    @property
    def store(self) -> Path:
        """Where the store is."""
        return self.folder / "gateway.db"

    # ----- talking

    def new(self, session: str, text: str) -> bytes:
        """A new message, as a line."""
        id = f"m{len(self.sent)}"
        self.sent[id] = {"session": session, "id": id, "text": text}
        return self.line(id)

    def line(self, id: str) -> bytes:
        """A message as a line."""
        return json.dumps(self.sent[id]).encode() + b"\n"

    def again(self, chance: float = 0.02) -> list[bytes]:
        """What a platform sends first on a new connection: what nobody acknowledged, in order, and
        now and then what somebody did."""
        lines: list[bytes] = []
        for id in self.sent:
            if id not in self.accepted or self.dice.random() < chance:
                lines.append(self.line(id))
        self.sent_again += len(lines)
        return lines

    def hear(self, line: bytes) -> None:
        """One line that the process wrote."""
        event = json.loads(line)
        with self.news:
            self.events.append(event)
            if event["event"] == "accepted":
                self.accepted.add(event["id"])
            elif event["event"] == "reply" and event["final"]:
                for id in event["in_reply_to"]:
                    self.finals[id] = event["text"]
            self.news.notify_all()

    def hear_all(self, lines: Iterable[bytes]) -> None:
        """Every line of a stream, until it ends. A last line that a death cut short is dropped."""
        for line in lines:
            if line.endswith(b"\n"):
                self.hear(line)

    def wait_for(self, met: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
        """Wait until something is so. Raises `AssertionError`, with `what` never came."""
        with self.news:
            if not self.news.wait_for(met, patience):
                raise AssertionError(f"never came: {what}\n{self.log()}")

    def wait_accepted(self, patience: float = PATIENCE) -> None:
        """Wait until everything that was sent is acknowledged."""
        self.wait_for(lambda: self.accepted >= self.sent.keys(), "acceptance of all", patience)

    def wait_answered(self, patience: float = PATIENCE) -> None:
        """Wait until everything that was sent is answered."""
        self.wait_for(lambda: self.finals.keys() >= self.sent.keys(), "all answers", patience)

    def log(self) -> str:
        """The end of what the processes logged, if they log to `log.txt`."""
        path = self.folder / "log.txt"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    # ----- adding up

    def account(self, *, forgiving: bool = False) -> dict[str, int]:
        """Add up, after a last life that ended everything. Raises `AssertionError` for whatever is
        lost, doubled, out of order, or resumed though it had settled; returns figures.

        `forgiving`: refusals and errors on the way are no failure (a full disk says so).
        """
        check_invariants(self.store, settled=True)
        figures = self._replies(forgiving)
        self._order()
        return figures | self._attempts()

    def _replies(self, forgiving: bool) -> dict[str, int]:
        """Everything that was sent is answered exactly once, by key; repeats say so."""
        bad = [e for e in self.events if e["event"] in ("refused", "error")]
        assert forgiving or not bad, f"refused: {bad[:3]}"
        replies = [event for event in self.events if event["event"] == "reply"]
        first: dict[str, dict[str, Any]] = {}
        for reply in replies:
            before = first.setdefault(reply["key"], reply)
            assert before["text"] == reply["text"], f"{before} became {reply}"
            assert reply is before or reply["repeat"], f"doubled, and does not say so: {reply}"
        finals = [reply for reply in first.values() if reply["final"]]
        answers = Counter(id for reply in finals for id in reply["in_reply_to"])
        unanswered = self.sent.keys() - answers.keys()
        assert not unanswered, f"never answered: {sorted(unanswered)}"
        assert answers.total() == len(self.sent), f"answered twice: {answers.most_common(3)}"
        for reply in finals:
            (id,) = reply["in_reply_to"]
            assert reply["text"] in (f"re: {id}", f"in doubt: {id}"), reply
        return {
            "messages": len(self.sent),
            "sent_again": self.sent_again,
            "replies": len(first),
            "repeats": len(replies) - len(first),
            "in_doubt": sum(reply["text"].startswith("in doubt") for reply in finals),
        }

    def _order(self) -> None:
        """Each session was answered in the order in which its messages were sent."""
        sent: dict[str, list[str]] = {}
        for id, message in self.sent.items():
            sent.setdefault(message["session"], []).append(id)
        answered: dict[str, list[str]] = {session: [] for session in sent}
        seen: set[str] = set()
        for event in self.events:
            if event["event"] == "reply" and event["final"] and event["key"] not in seen:
                seen.add(event["key"])
                answered[event["session"]] += event["in_reply_to"]
        assert answered == sent, "answered out of order"

    def _attempts(self) -> dict[str, int]:
        """No attempt began twice, no unsafe effect happened twice, and no attempt began after its
        turn had settled: the last one that began is the one that settled it."""
        notes = effects(self.folder)
        twice = [note for note, count in Counter(notes).items() if count > 1]
        assert not twice, f"twice: {twice}"
        began = [note.split()[1:] for note in notes if note.startswith("began")]
        last: dict[int, int] = {}
        for turn, attempt, _ in began:
            last[int(turn)] = max(last.get(int(turn), 0), int(attempt))
        settled = settled_in(self.store)
        for number, newest in last.items():
            assert settled[number] == newest, (
                f"turn {number} settled in attempt {settled[number]}, but attempt {newest} began"
            )
        reasons = Counter(reason for _, _, reason in began)
        return {f"resumed_{reason}": reasons[reason] for reason in ("crash", "shutdown", "restart")}


def effects(folder: Path) -> list[str]:
    """What the agent noted, in order."""
    path = folder / "effects.txt"
    return path.read_text().splitlines() if path.exists() else []


def rows(store: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    """What another process reads in the store."""
    connection: Any = apsw.Connection(str(store), flags=apsw.SQLITE_OPEN_READONLY)
    with closing(connection) as db:
        db.set_busy_timeout(5000)
        return list(db.execute(sql, values))


def settled_in(store: Path) -> Mapping[int, int]:
    """The attempt in which each turn has settled. Read off its reply, which is written once: a turn
    that was run again after its end would have moved its own number on."""
    return dict(
        rows(
            store,
            "SELECT turn.id, coalesce(delivery.attempt, turn.attempt) FROM turn"
            " LEFT JOIN delivery ON delivery.turn = turn.id AND delivery.final"
            " WHERE turn.settled_at IS NOT NULL",
        )
    )


def open_turns(store: Path) -> dict[int, str]:
    """The turns that are open on disk, and why they will resume."""
    found = rows(
        store,
        "SELECT id, CASE state WHEN 'RUNNING' THEN 'crash' ELSE reason END FROM turn"
        " WHERE settled_at IS NULL",
    )
    return dict(found)


def wait_until(met: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Look again and again, for what only another process can change and nobody announces."""
    deadline = time.monotonic() + patience
    while not met():
        if time.monotonic() > deadline:
            raise AssertionError(f"never came: {what}")
        time.sleep(0.01)
