"""The account of a `Town`, when everything has ended: what the store says, read by SQL of its own,
beside what everybody was told.

    who sent         what was acknowledged is there, once, and nothing else; answered in order
    who waited       was told the replies that the store has
    who followed     was told the session's journal: all of it, in its order, nothing twice
    who streamed     was told events without a gap, that add up to the reply
    the journal      tells each message, turn, attempt and reply once, and in an order that can be
    the agent        began no attempt twice, and none after its turn had settled
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import attrs

from trio_gateway.testing import check_invariants

from ._door_followers import Log
from ._door_openai import LAST_EVENTS, Streamed
from ._door_people import Sent, Town
from ._platform import effects, rows

LIFE_OF_A_TURN: Final = re.compile(r"begun( interrupted resumed)*( interrupted)?")
SORRY: Final = "Sorry, something went wrong"


@attrs.frozen
class Entry:
    """One thing that happened, as the journal has it."""

    seq: int
    session: str
    what: str
    message: str | None
    turn: int | None
    attempt: int | None
    key: str | None
    text: str | None
    detail: str | None

    @property
    def told(self) -> tuple[Any, ...]:
        """What whoever follows is to be told of it."""
        return self.seq, self.what, self.message, self.turn, self.attempt, self.key, self.text


@attrs.frozen
class Row:
    """One message, as the store has it."""

    seq: int
    session: str
    state: str
    text: str
    turn: int | None


class Account:
    """Adds up. Each method raises `AssertionError` with what does not add up."""

    def __init__(self, town: Town, store: Path, *, ordered: bool = True) -> None:
        self.town = town
        self.ordered = ordered
        """Whether everybody waits for a receipt before they write the next message."""
        self.store = store
        self.figures: Counter[str] = Counter()
        self.messages = {
            id: Row(seq, session, state, json.loads(body)["text"], turn)
            for id, seq, session, state, body, turn in rows(
                store,
                "SELECT message.id, seq, session.name, state, body, turn FROM message"
                " JOIN session ON session.id = message.session"
                " WHERE message.channel = 'http' ORDER BY seq",
            )
        }
        self.journal = [
            Entry(*row)
            for row in rows(
                store,
                "SELECT journal.seq, session.name, what, message.id, journal.turn,"
                " journal.attempt, delivery.key, delivery.text, detail FROM journal"
                " JOIN session ON session.id = journal.session"
                " LEFT JOIN message ON message.seq = journal.message"
                " LEFT JOIN delivery ON delivery.id = journal.delivery"
                " WHERE what != 'draft' ORDER BY journal.seq",
            )
        ]
        self.replies: dict[str, list[tuple[str, bool]]] = defaultdict(list)
        """By message: what was said to it, and whether that was the end."""
        for about, text, final in rows(
            store, "SELECT about, text, final FROM delivery WHERE part = parts ORDER BY id"
        ):
            for id in json.loads(about):
                self.replies[id].append((text, bool(final)))

    def check(self, logs: Iterable[Log], streams: Iterable[Streamed], folder: Path) -> None:
        """All of it."""
        check_invariants(self.store, settled=True)
        assert not self.town.complaints, "\n".join(self.town.complaints[:5])
        self._kept()
        if self.ordered:
            self._in_order()
        self._answered_once()
        self._journal_of_messages()
        self._journal_of_turns()
        self._journal_of_replies()
        for log in logs:
            self._followed(log)
        for stream in streams:
            self._streamed(stream)
        self._attempts(folder)

    # ----- what came in

    def _kept(self) -> None:
        lost = [id for id in self.town.sent if id not in self.messages]
        assert not lost, f"acknowledged, and lost: {[(id, self.town.sent[id]) for id in lost[:3]]}"
        unasked = self.messages.keys() - self.town.sent.keys()
        assert not unasked, f"nobody sent: {sorted(unasked)[:5]}"
        silent = [id for id, sent in self.town.sent.items() if not sent.acknowledged]
        assert not silent, f"never acknowledged: {silent[:5]}"
        for id, sent in self.town.sent.items():
            row = self.messages[id]
            assert (row.session, row.text) == (sent.session, sent.text), f"{id}: {row} for {sent}"
        self.figures["messages"] = len(self.messages)

    def _in_order(self) -> None:
        """A session is one person's, who waits for each receipt: its order is theirs."""
        newest: dict[str, tuple[int, str]] = {}
        for id, sent in self.town.sent.items():
            here, before = self.messages[id].seq, newest.get(sent.session, (0, ""))
            assert here > before[0], f"{id} was overtaken by {before[1]}"
            newest[sent.session] = here, id

    # ----- what came out

    def _answered_once(self) -> None:
        for id, row in self.messages.items():
            said, sent = self.replies[id], self.town.sent[id]
            story = f"{id} is {row}, and was told {said}"
            finals = [text for text, final in said if final]
            assert len(finals) == 1, story
            assert said[-1][1], story
            if row.state == "failed":
                assert row.text.startswith("fails"), story
                assert finals[0].startswith(SORRY), story
            else:
                assert row.state == "answered", story
                assert finals[0].startswith((f"re: {row.text}", f"in doubt: {row.text}")), story
            self.figures[row.state] += 1
            self._told_who_waited(id, sent, [text for text, _ in said])

    def _told_who_waited(self, id: str, sent: Sent, said: list[str]) -> None:
        if sent.replies is None:
            return
        whole = ["\n\n".join(said)] if id.startswith("chatcmpl_") else said
        assert sent.replies == whole, f"{id}: who waited was told {sent.replies}, not {whole}"
        self.figures["waited_for"] += 1

    # ----- the journal

    def _journal_of_messages(self) -> None:
        """Accepted, then settled, once each."""
        told: dict[str, list[str]] = defaultdict(list)
        for entry in self.journal:
            if entry.message is not None:
                told[entry.message].append(entry.what)
        for id in self.messages:
            assert told[id] == ["accepted", "settled"], f"the journal tells of {id}: {told[id]}"

    def _journal_of_turns(self) -> None:
        told: dict[int, list[str]] = defaultdict(list)
        for entry in self.journal:
            if entry.turn is not None and entry.what in ("begun", "interrupted", "resumed"):
                told[entry.turn].append(entry.what)
        for turn, attempt in rows(self.store, "SELECT id, attempt FROM turn"):
            story = f"the journal tells of turn {turn}, attempt {attempt}: {told[turn]}"
            assert LIFE_OF_A_TURN.fullmatch(" ".join(told[turn])), story
            assert told[turn].count("resumed") == attempt - 1, story
            self.figures["turns"] += 1
            self.figures["resumed"] += attempt - 1

    def _journal_of_replies(self) -> None:
        """Each once, after its message was accepted, and the last before it is settled."""
        place = {(e.message, e.what): e.seq for e in self.journal if e.message is not None}
        told = Counter(entry.key for entry in self.journal if entry.what == "reply")
        keys = [key for (key,) in rows(self.store, "SELECT key FROM delivery")]
        assert told == Counter(keys), f"replies in the journal: {(told - Counter(keys))} too many"
        about = dict(rows(self.store, "SELECT key, about FROM delivery"))
        for entry in self.journal:
            if entry.what == "reply":
                for id in json.loads(about[entry.key]):
                    first, last = place[id, "accepted"], place[id, "settled"]
                    assert first < entry.seq < last, f"{entry} is not between {first} and {last}"

    # ----- who listened

    def _followed(self, log: Log) -> None:
        wanted = [entry.told for entry in self.journal if entry.session == log.session]
        heard = [(seq, event, *_fields(event, data)) for seq, event, data in log.events]
        if heard != wanted:
            at = next(
                (n for n, (a, b) in enumerate(zip(heard, wanted, strict=False)) if a != b),
                min(len(heard), len(wanted)),
            )
            raise AssertionError(
                f"{log.session}: told {len(heard)} events of {len(wanted)};"
                f" the first that differs: {heard[at : at + 1]}, not {wanted[at : at + 1]}"
            )
        self.figures["events_followed"] += len(heard)

    def _streamed(self, stream: Streamed) -> None:
        numbers = [event["sequence_number"] for event in stream.events]
        assert numbers == list(range(len(numbers))), f"{stream.id}: {numbers}"
        assert stream.events[-1]["type"] in LAST_EVENTS, f"{stream.id}: {stream.events[-1]}"
        kept = [text for text in _added_up(stream) if text is not None]
        said = [text for text, _ in self.replies[stream.id]]
        assert kept == said, f"{stream.id} was told {kept}, and said was {said}"
        self.figures["responses"] += 1
        self.figures["response_pieces"] += stream.pieces
        self.figures["response_events"] += len(numbers)
        self.town.seen["a response told in pieces"] += stream.pieces > 1

    # ----- the agent

    def _attempts(self, folder: Path) -> None:
        began = [note.split()[1:] for note in effects(folder) if note.startswith("began ")]
        twice = [note for note, count in Counter(map(tuple, began)).items() if count > 1]
        assert not twice, f"began twice: {twice[:3]}"
        newest: dict[int, int] = defaultdict(int)
        for turn, attempt in began:
            newest[int(turn)] = max(newest[int(turn)], int(attempt))
        for turn, attempt in rows(self.store, "SELECT id, attempt FROM turn"):
            story = f"turn {turn} settled in attempt {attempt}, and {newest[turn]} began"
            assert newest[turn] == attempt, story
        shots = Counter(note for note in effects(folder) if note.startswith("shot "))
        assert not (shots - Counter(set(shots))), f"twice: {shots.most_common(3)}"


def _fields(event: str, data: dict[str, Any]) -> tuple[Any, ...]:
    """Of what was told, what the store says of it, too."""
    text = data.get("text") if event == "reply" else None
    return data.get("id"), data.get("turn"), data.get("attempt"), data.get("key"), text


def _added_up(stream: Streamed) -> list[str | None]:
    """The text of each item, added up from its pieces; None for one that another replaced."""
    texts: dict[int, str] = defaultdict(str)
    last: dict[int, str] = {}
    for event in stream.events:
        index = int(event.get("output_index", -1))
        if event["type"] == "response.output_text.delta":
            texts[index] += event["delta"]
        elif event["type"] == "response.output_text.done":
            whole = event["text"]
            assert texts[index] == whole, f"{stream.id}: {texts[index]!r} is called {whole!r}"
        elif event["type"] == "response.output_item.done":
            last[index] = event["item"]["status"]
    return [texts[index] if last[index] == "completed" else None for index in sorted(last)]
