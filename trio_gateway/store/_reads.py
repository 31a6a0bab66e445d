"""Every read, over a connection of its own that cannot write. Used by the gateway (in a thread)
and by the command line beside a running gateway."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import apsw
import attrs

from .._clock import as_datetime
from .._errors import NotFound
from .._messages import HistoryItem, Reply, ReplyKind, SessionKey
from ._codec import (
    BadRow,
    dump_ids,
    load_draft,
    load_ids,
    load_message,
    load_text,
    load_why,
    when,
)
from ._database import Database, select, translate
from ._records import Draft
from ._sql import query

ALL: Final = 1 << 62
"""More rows than there can be; and what the database can still count to."""


@attrs.frozen(kw_only=True)
class SessionRow:
    """One session at a glance. `state` is its open turn's, or "idle"."""

    session: SessionKey
    state: str
    turn: int | None
    attempt: int | None
    reason: str | None
    waiting: int
    last_message_at: datetime | None


@attrs.frozen(kw_only=True)
class MessageRow:
    """One message and what became of it. `text` is None once forgotten or unreadable."""

    session: SessionKey
    id: str
    state: str
    text: str | None
    sender: str | None
    accepted_at: datetime
    ended_at: datetime | None
    error: str | None
    turn: int | None


@attrs.frozen(kw_only=True)
class TimelineEntry:
    """One thing that happened to a message, and when (aware UTC)."""

    at: datetime
    what: str
    detail: str = ""


@attrs.frozen(kw_only=True)
class Timeline:
    """The life of one message, oldest first."""

    message: MessageRow
    entries: tuple[TimelineEntry, ...]


@attrs.frozen(kw_only=True)
class QuarantineRow:
    """A turn that was put aside, and its messages."""

    turn: int
    session: SessionKey
    crashes: int
    interruptions: int
    attempts: int
    begun_at: datetime
    quarantined_at: datetime | None
    why: str | None
    messages: tuple[MessageRow, ...] = ()


@attrs.frozen(kw_only=True)
class DeadLetter:
    """A delivery that was given up."""

    delivery: int
    session: SessionKey
    key: str
    text: str | None
    tries: int
    error: str | None
    created_at: datetime
    turn: int | None


@attrs.frozen(kw_only=True)
class OutboxRow:
    """A delivery on its way. `not_before`: when it is tried again, if a try has failed."""

    delivery: int
    session: SessionKey
    key: str
    text: str | None
    tries: int
    error: str | None
    created_at: datetime
    not_before: datetime | None


@attrs.frozen(kw_only=True)
class OpenTurnRow:
    """An open turn and its marker."""

    turn: int
    session: SessionKey
    state: str
    attempt: int
    reason: str | None
    begun_at: datetime
    crashes: int
    interruptions: int


@attrs.frozen(kw_only=True)
class Counts:
    """What is open, in numbers."""

    running: int
    resume_pending: int
    waiting: int
    undelivered: int
    dead_letters: int
    quarantined: int


@attrs.frozen(kw_only=True)
class Gauges:
    """What is open, for whoever watches; each number counts no further than a limit.
    `oldest_undelivered` is when that delivery was committed."""

    running: int
    resume_pending: int
    waiting: int
    undelivered: int
    oldest_undelivered: datetime | None
    dead_letters: int
    quarantined: int


@attrs.frozen(kw_only=True)
class JournalEntry:
    """One thing that happened in a session of a channel whose readers fetch what is said.

    `seq` is its place, which never changes; later is greater. `what` is one of `accepted`,
    `requeued`, `settled` (about `message_id`; `detail` is the state it is in), `begun`, `resumed`,
    `interrupted` (about a turn; `detail` is the reason; `messages` are those that it answers),
    `reply` and `draft`. `text` is None once forgotten.
    """

    seq: int
    at: datetime
    what: str
    turn: int | None = None
    attempt: int | None = None
    message_id: str | None = None
    messages: tuple[str, ...] = ()
    text: str | None = None
    sender: str | None = None
    detail: str | None = None
    key: str | None = None
    kind: ReplyKind | None = None
    final: bool = False
    draft: Draft | None = None


class StoreReader:
    """Reads a store, also one that a gateway has open. Not for two threads at once."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def _all(self, name: str, *args: Any) -> list[tuple[Any, ...]]:
        try:
            return select(self._db, query(name), args)
        except UnicodeEncodeError:
            return []  # what has no place in UTF-8 is in no row
        except apsw.Error as error:
            raise translate(error) from error

    # ----- for agents and channels

    def history(self, session: SessionKey, turn: int | None, limit: int) -> tuple[HistoryItem, ...]:
        """The last `limit` lines before `turn` (None: before now) in its conversation."""
        limit = min(limit, ALL)
        if turn is None:
            place = [(*row, ALL) for row in self._all("place_of_session", *attrs.astuple(session))]
        else:
            place = self._all("place_of_turn", turn)
        if not place or place[0][0] is None or limit <= 0:
            return ()
        session_id, conversation, before = place[0]
        rows = self._all("history", session_id, before, conversation, limit)
        rows.reverse()
        return self._lines(session, rows)[-limit:]

    def _lines(
        self, session: SessionKey, rows: Sequence[tuple[Any, ...]]
    ) -> tuple[HistoryItem, ...]:
        lines: list[HistoryItem] = []
        for index, (_, message_id, body, accepted_at, turn) in enumerate(rows):
            try:
                text = load_message(session, message_id, body).text
            except BadRow:
                continue
            lines.append(
                HistoryItem(
                    role="user", text=text, at=as_datetime(accepted_at), message_id=message_id
                )
            )
            last_of_turn = index + 1 == len(rows) or rows[index + 1][4] != turn
            if last_of_turn:
                lines += [
                    HistoryItem(role="agent", text=load_text(said), at=as_datetime(at))
                    for _, said, at in self._all("said_in", turn)
                ]
        return tuple(lines)

    def replies_to(self, channel: str, message_id: str) -> tuple[str | None, tuple[Reply, ...]]:
        """How a message stands (None: never seen), and what was said to it."""
        fate = self._all("message_fate", channel, message_id)
        if not fate:
            return None, ()
        state, turn, seq = fate[0]
        if turn is not None:
            return state, _replies(self._session_of_turn(turn), self._all("replies_to_turn", turn))
        said = self._all("replies_about", seq, dump_ids((message_id,)))
        return state, _replies(self._session_of_message(seq), said)

    def _session_of_turn(self, turn: int) -> SessionKey:
        return SessionKey(*self._all("session_of_turn", turn)[0])

    def _session_of_message(self, seq: int) -> SessionKey:
        return SessionKey(*self._all("session_of_message", seq)[0])

    # ----- for those who fetch what is said

    def journal(
        self, session: SessionKey, after: int, limit: int, *, drafts: bool = False
    ) -> tuple[JournalEntry, ...]:
        """What happened in a session after a place in its journal, oldest first, at most `limit`
        entries. Empty for a session without a journal."""
        rows = self._all("journal_of", *attrs.astuple(session), after, drafts, min(limit, ALL))
        return tuple(self._journal_entry(session, row) for row in rows)

    def journal_since(
        self, channel: str, after: int, limit: int
    ) -> tuple[tuple[SessionKey, JournalEntry], ...]:
        """What happened in all sessions of a channel after a place, drafts included, oldest first,
        at most `limit` entries."""
        rows = self._all("journal_since", after, channel, min(limit, ALL))
        sessions = [SessionKey(channel, row[0]) for row in rows]
        return tuple(
            (session, self._journal_entry(session, row[1:]))
            for session, row in zip(sessions, rows, strict=True)
        )

    def journal_newest(self) -> int:
        """The newest place in any journal; zero for none."""
        return int(self._all("journal_newest")[0][0])

    def _journal_entry(self, session: SessionKey, row: tuple[Any, ...]) -> JournalEntry:
        (seq, at, what, message_id, body, turn, attempt, detail,
         key, text, kind, final, about, delivery) = row  # fmt: skip
        entry = JournalEntry(seq=seq, at=as_datetime(at), what=what, turn=turn, attempt=attempt)
        if what == "draft":
            draft = load_draft(turn, attempt, detail)
            return attrs.evolve(entry, draft=draft, text=draft.text)
        if delivery is not None:
            # A row that retention has taken away since: something was said, nobody knows what.
            return attrs.evolve(
                entry,
                key=key,
                text=None if text is None else load_text(text),
                kind=None if kind is None else ReplyKind(kind),
                final=bool(final),
                messages=() if about is None else load_ids(about),
            )
        if what in ("begun", "resumed", "interrupted"):
            ids = tuple(one[0] for one in self._all("message_ids_with", turn))
            return attrs.evolve(entry, messages=ids, detail=_optional_text(detail))
        said, sender = _body_of(session, message_id, body) if what == "accepted" else (None, None)
        return attrs.evolve(
            entry, message_id=message_id, text=said, sender=sender, detail=_optional_text(detail)
        )

    def message(self, channel: str, message_id: str) -> MessageRow | None:
        """One message, if it was ever seen (and is not forgotten)."""
        rows = self._all("one_message", channel, message_id)
        return _message_row(SessionKey(channel, rows[0][0]), *rows[0][1:]) if rows else None

    def journal_place(self, channel: str, message_id: str) -> tuple[SessionKey, int] | None:
        """The session of a message, and the place in its journal where the message was accepted.
        None: nobody knows (any more)."""
        rows = self._all("journal_place", channel, message_id)
        return (SessionKey(channel, rows[0][0]), rows[0][1]) if rows else None

    def journal_about(self, channel: str, message_id: str) -> tuple[JournalEntry, ...]:
        """What happened to one message: when it was accepted, queued once more, settled."""
        return tuple(
            JournalEntry(
                seq=seq,
                at=as_datetime(at),
                what=what,
                turn=turn,
                message_id=message_id,
                detail=_optional_text(detail),
            )
            for seq, at, what, turn, detail in self._all("journal_about", channel, message_id)
        )

    def journal_span(self, session: SessionKey) -> tuple[int, int]:
        """The oldest place in a session's journal that is left, zero if all of it is; and the
        newest, zero if there is none."""
        newest, oldest = self._all("journal_end", *attrs.astuple(session))[0]
        return oldest or 0, newest or 0

    # ----- for operators

    def counts(self) -> Counts:
        """What is open, in numbers."""
        running, pending, waiting, undelivered, dead, quarantined = self._all("counts")[0]
        return Counts(
            running=running,
            resume_pending=pending,
            waiting=waiting,
            undelivered=undelivered,
            dead_letters=dead,
            quarantined=quarantined,
        )

    def gauges(self, limit: int) -> Gauges:
        """The same, for whoever asks again and again: no number counts further than `limit`."""
        running, pending, waiting, undelivered, oldest, dead, aside = self._all("gauges", limit)[0]
        return Gauges(
            running=running,
            resume_pending=pending,
            waiting=waiting,
            undelivered=undelivered,
            oldest_undelivered=when(oldest),
            dead_letters=dead,
            quarantined=aside,
        )

    def open_turns(self) -> tuple[OpenTurnRow, ...]:
        """Every open turn and its marker."""
        return tuple(
            OpenTurnRow(
                turn=turn,
                session=SessionKey(channel, name),
                state=state,
                attempt=attempt,
                reason=reason,
                begun_at=as_datetime(begun_at),
                crashes=crashes,
                interruptions=interruptions,
            )
            for turn, channel, name, state, attempt, reason, begun_at, crashes, interruptions
            in self._all("open_turns")
        )  # fmt: skip

    def sessions(self, limit: int) -> tuple[SessionRow, ...]:
        """Sessions, the one with the newest message first."""
        return tuple(
            SessionRow(
                session=SessionKey(channel, name),
                state=state or "idle",
                turn=turn,
                attempt=attempt,
                reason=reason,
                waiting=waiting,
                last_message_at=when(at),
            )
            for channel, name, turn, state, attempt, reason, waiting, _, at in self._all(
                "list_sessions", min(limit, ALL)
            )
        )

    def find_session(self, text: str) -> SessionKey:
        """A session by `channel:name`, or by its bare name where only one channel has it.

        Raises `NotFound`.
        """
        channel, _, name = text.partition(":")
        if self._all("place_of_session", channel, name):
            return SessionKey(channel, name)
        named = [SessionKey(*row) for row in self._all("sessions_named", text)]
        if len(named) == 1:
            return named[0]
        if named:
            raise NotFound(f"{text!r} names several sessions: {', '.join(map(str, named))}")
        raise NotFound(f"no session {text!r} in this store")

    def messages_before(
        self, session: SessionKey, before: int | None, limit: int
    ) -> tuple[tuple[int, MessageRow], ...]:
        """A page of a session's messages, newest first, each with its place; `before` is the place
        at which the page before it ended (None: from the newest). Raises `NotFound`."""
        place = self._all("place_of_session", session.channel, session.name)
        if not place:
            raise NotFound(f"no session {str(session)!r} in this store")
        rows = self._all(
            "messages_page", place[0][0], ALL if before is None else before, min(limit, ALL)
        )
        return tuple((row[0], _message_row(session, *row[1:])) for row in rows)

    def messages(self, session: SessionKey, limit: int) -> tuple[MessageRow, ...]:
        """The last messages of a session, oldest first."""
        place = self._all("place_of_session", session.channel, session.name)
        if not place:
            raise NotFound(f"no session {str(session)!r} in this store")
        rows = self._all("session_messages", place[0][0], min(limit, ALL))
        return tuple(
            _message_row(session, message_id, state, body, accepted_at, ended_at, error, turn)
            for message_id, state, body, accepted_at, ended_at, error, turn in reversed(rows)
        )

    def explain(self, message_id: str) -> tuple[Timeline, ...]:
        """The timelines of the messages with this id: one in each channel that has it.

        Raises `NotFound`.
        """
        rows = self._all("find_message", message_id)
        if not rows:
            raise NotFound(f"no message {message_id!r} in this store")
        return tuple(self._timeline(row) for row in rows)

    def _timeline(self, row: tuple[Any, ...]) -> Timeline:
        seq, channel, name, message_id, state, body, accepted_at, ended_at, error, turn = row
        message = _message_row(
            SessionKey(channel, name), message_id, state, body, accepted_at, ended_at, error, turn
        )
        entries = [TimelineEntry(at=message.accepted_at, what="accepted")]
        if turn is not None:
            entries += self._turn_entries(turn)
        else:
            said = self._all("delivery_rows_about", seq, dump_ids((message_id,)))
            entries += [entry for row in said for entry in _delivery_entries(row)]
        if message.ended_at is not None:
            entries.append(
                TimelineEntry(at=message.ended_at, what=state, detail=load_why(error) or "")
            )
        order = sorted(range(len(entries)), key=lambda i: (entries[i].at, i))
        return Timeline(message=message, entries=tuple(entries[i] for i in order))

    def _turn_entries(self, turn: int, seen: tuple[int, ...] = ()) -> list[TimelineEntry]:
        rows = self._all("turn_row", turn)
        if not rows or turn in seen:
            return []
        (_, state, attempt, epoch, reason, crashes, _, _, attempt_at, marked_at, settled_at,
         retry_of, _, error) = rows[0]  # fmt: skip
        entries: list[TimelineEntry] = []
        if retry_of is not None:
            entries += self._turn_entries(retry_of, (*seen, turn))
        for n, in_epoch, began_at, interrupted_at, why in self._all("attempts_of", turn):
            entries.append(_attempt_entry(turn, n, in_epoch, began_at))
            entries.append(_marker_entry(interrupted_at, why))
        entries.append(_attempt_entry(turn, attempt, epoch, attempt_at))
        if state == "RESUME_PENDING":
            entries.append(_marker_entry(marked_at, reason))
        for name, step_state, effect, in_attempt, began_at, done_at in self._all("step_rows", turn):
            what = "step" if step_state == "done" else "step begun, not finished"
            entries.append(
                TimelineEntry(
                    at=as_datetime(done_at or began_at),
                    what=what,
                    detail=f"{name} ({effect}, attempt {in_attempt})",
                )
            )
        for row in self._all("delivery_rows_of_turn", turn):
            entries += _delivery_entries(row)
        if settled_at is not None:
            charged = f"; {crashes} crashes" if crashes else ""
            entries.append(
                TimelineEntry(
                    at=as_datetime(settled_at),
                    what=f"turn {state}",
                    detail=(load_why(error) or "") + charged,
                )
            )
        return entries

    def quarantine(self) -> tuple[QuarantineRow, ...]:
        """Turns that were put aside and wait for a person."""
        return tuple(self._quarantined(row) for row in self._all("list_quarantined"))

    def _quarantined(self, row: tuple[Any, ...]) -> QuarantineRow:
        turn, channel, name, crashes, interruptions, attempts, begun_at, at, why = row
        session = SessionKey(channel, name)
        return QuarantineRow(
            turn=turn,
            session=session,
            crashes=crashes,
            interruptions=interruptions,
            attempts=attempts,
            begun_at=as_datetime(begun_at),
            quarantined_at=when(at),
            why=why,
            messages=tuple(
                _message_row(session, message_id, state, body, begun_at, at, None, turn)
                for message_id, body, state in self._all("bodies_of", turn)
            ),
        )

    def dead_letters(self) -> tuple[DeadLetter, ...]:
        """Deliveries that were given up and wait for a person."""
        return tuple(
            DeadLetter(
                delivery=delivery,
                session=SessionKey(channel, name),
                key=key,
                text=None if text is None else load_text(text),
                tries=tries,
                error=load_why(error),
                created_at=as_datetime(created_at),
                turn=turn,
            )
            for delivery, channel, name, key, text, tries, error, created_at, turn in self._all(
                "list_dead"
            )
        )

    def inbox(self, limit: int) -> tuple[MessageRow, ...]:
        """Messages that wait for their turns, the oldest first."""
        return tuple(
            _message_row(SessionKey(channel, name), *rest)
            for channel, name, *rest in self._all("list_inbox", min(limit, ALL))
        )

    def outbox(self, limit: int) -> tuple[OutboxRow, ...]:
        """Deliveries that are on their way, the oldest first."""
        return tuple(
            OutboxRow(
                delivery=delivery,
                session=SessionKey(channel, name),
                key=key,
                text=None if text is None else load_text(text),
                tries=tries,
                error=load_why(error),
                created_at=as_datetime(created_at),
                not_before=when(again),
            )
            for delivery, channel, name, key, text, tries, error, created_at, again in self._all(
                "list_outbox", min(limit, ALL)
            )
        )

    def astray(self, limit: int = 10) -> tuple[str, ...]:
        """Ids of messages that no gateway will ever come to, because a row was damaged."""
        return tuple(row[0] for row in self._all("list_astray", limit))

    def check(self) -> tuple[str, ...]:
        """What SQLite's own check finds wrong with the file; empty: nothing."""
        found = [str(row[0]) for row in self._db.execute("PRAGMA quick_check(20)")]
        return () if found == ["ok"] else tuple(found)


def _replies(session: SessionKey, rows: Sequence[tuple[Any, ...]]) -> tuple[Reply, ...]:
    """Replies from the rows of their deliveries, parts joined."""
    replies: list[Reply] = []
    for _, kind, attempt, part, parts, key, text, final, about in rows:
        if part > 1 and replies:
            joined = replies[-1].text + load_text(text)
            replies[-1] = attrs.evolve(replies[-1], text=joined, final=bool(final))
            continue
        replies.append(
            Reply(
                session=session,
                key=key if parts == 1 else key.rpartition(".")[0],
                text=load_text(text),
                in_reply_to=load_ids(about),
                attempt=attempt,
                final=bool(final),
                kind=ReplyKind(kind),
            )
        )
    return tuple(replies)


def _optional_text(text: bytes | None) -> str | None:
    return None if text is None else load_text(text)


def _body_of(
    session: SessionKey, message_id: str | None, body: bytes | None
) -> tuple[str | None, str | None]:
    """Text and sender of a message, as far as they are there and can be read."""
    if message_id is None or body is None:
        return None, None
    try:
        message = load_message(session, message_id, body)
    except BadRow:
        return None, None
    return message.text, message.sender


def _message_row(
    session: SessionKey,
    message_id: str,
    state: str,
    body: bytes | None,
    accepted_at: int,
    ended_at: int | None,
    error: str | None,
    turn: int | None,
) -> MessageRow:
    try:
        message = load_message(session, message_id, body)
        text, sender = message.text, message.sender
    except BadRow as bad:
        text, sender, error = None, None, error or str(bad)
    return MessageRow(
        session=session,
        id=message_id,
        state=state,
        text=text,
        sender=sender,
        accepted_at=as_datetime(accepted_at),
        ended_at=when(ended_at),
        error=load_why(error),
        turn=turn,
    )


def _attempt_entry(turn: int, attempt: int, epoch: int, at: int) -> TimelineEntry:
    what = "turn RUNNING" if attempt == 1 else "turn RUNNING again"
    return TimelineEntry(
        at=as_datetime(at), what=what, detail=f"turn {turn}, attempt {attempt}, epoch {epoch}"
    )


def _marker_entry(at: int, reason: str) -> TimelineEntry:
    return TimelineEntry(at=as_datetime(at), what="turn RESUME_PENDING", detail=reason)


def _delivery_entries(row: tuple[Any, ...]) -> list[TimelineEntry]:
    _, key, kind, part, parts, _, state, tries, error, repeat, created_at, delivered_at, attempt = (
        row
    )
    of = f" part {part}/{parts}" if parts > 1 else ""
    entries = [
        TimelineEntry(
            at=as_datetime(created_at),
            what=f"{kind}{of} committed",
            detail=f"{key} (attempt {attempt})",
        )
    ]
    if delivered_at is not None:
        again = ", possibly a repeat" if repeat else ""
        entries.append(
            TimelineEntry(
                at=as_datetime(delivered_at), what=f"{kind}{of} delivered", detail=f"{key}{again}"
            )
        )
    elif state != "pending" or tries:
        entries.append(
            TimelineEntry(
                at=as_datetime(created_at),
                what=f"{kind}{of} {state}",
                detail=f"{tries} tries" + (f": {error}" if error else ""),
            )
        )
    return entries
