"""What stands on disk, read by a stranger: plain SQL, none of the library's own reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import apsw
import attrs


class TurnRow(NamedTuple):
    """A turn and its marker."""

    id: int
    session: int
    state: str
    attempt: int
    epoch: int
    reason: str | None
    crashes: int
    interruptions: int
    retry_of: int | None
    restart_asked: int

    @property
    def open(self) -> bool:
        """Whether it has not settled."""
        return self.state in ("RUNNING", "RESUME_PENDING")


class MessageRow(NamedTuple):
    """A message and how it stands."""

    seq: int
    channel: str
    id: str
    session: int
    state: str
    turn: int | None

    @property
    def ended(self) -> bool:
        """Whether it has reached an end."""
        return self.state not in ("queued", "running")


class DeliveryRow(NamedTuple):
    """A delivery and how far it is."""

    id: int
    key: str
    session: int
    state: str
    kind: str
    text: str
    turn: int | None
    final: int


class StepRow(NamedTuple):
    """A remembered step."""

    turn: int
    name: str
    state: str
    effect: str
    result: str | None


@attrs.frozen(kw_only=True)
class Snapshot:
    """The turns and messages of a store at one instant; the rest when it was asked for."""

    epoch: int = 0
    turns: dict[int, TurnRow] = attrs.field(factory=dict[int, TurnRow])
    messages: dict[tuple[str, str], MessageRow] = attrs.field(
        factory=dict[tuple[str, str], MessageRow]
    )
    cursors: dict[str, str] = attrs.field(factory=dict[str, str])
    stop_notices: int = 0
    """How many people were told of a stop of this epoch."""


@attrs.frozen(kw_only=True)
class Record(Snapshot):
    """A whole store at one instant."""

    sessions: dict[int, tuple[str, str]] = attrs.field(factory=dict[int, tuple[str, str]])
    bodies: dict[tuple[str, str], str] = attrs.field(factory=dict[tuple[str, str], str])
    deliveries: dict[str, DeliveryRow] = attrs.field(factory=dict[str, DeliveryRow])
    steps: dict[tuple[int, str], StepRow] = attrs.field(factory=dict[tuple[int, str], StepRow])


class Eye:
    """Looks at a store again and again, over a connection of its own, which only reads."""

    def __init__(self, store: Path) -> None:
        self._db: Any = apsw.Connection(str(store), flags=apsw.SQLITE_OPEN_READONLY)
        self._db.set_busy_timeout(5000)
        self._is_made = False

    def close(self) -> None:
        """Look no more."""
        self._db.close()

    def glance(self) -> Snapshot:
        """The turns, the messages, the cursors. Cheap: it is done after every commit."""
        with self._db:
            return Snapshot(**self._basics()) if self._made() else Snapshot()

    def read(self) -> Record:
        """Everything."""
        with self._db:
            return Record(**self._basics(), **self._rest()) if self._made() else Record()

    def _made(self) -> bool:
        """Its maker may have died before it was a store."""
        self._is_made = self._is_made or bool(self._rows("SELECT 1 FROM sqlite_schema LIMIT 1"))
        return self._is_made

    def _basics(self) -> dict[str, Any]:
        turns = map(
            TurnRow._make,
            self._rows(
                "SELECT id, session, state, attempt, epoch, reason, crashes, interruptions,"
                " retry_of, restart_asked FROM turn"
            ),
        )
        messages = map(
            MessageRow._make,
            self._rows("SELECT seq, channel, id, session, state, turn FROM message ORDER BY seq"),
        )
        return {
            "epoch": self._rows("SELECT coalesce(max(id), 0) FROM epoch")[0][0],
            "turns": {turn.id: turn for turn in turns},
            "messages": {(message.channel, message.id): message for message in messages},
            "cursors": dict(self._rows("SELECT channel, value FROM cursor")),
            "stop_notices": self._rows(
                "SELECT count(*) FROM delivery WHERE turn IS NULL AND kind = 'notice'"
                " AND key LIKE '%-n-stopping-%' AND epoch = (SELECT max(id) FROM epoch)"
            )[0][0],
        }

    def _rest(self) -> dict[str, Any]:
        deliveries = map(
            DeliveryRow._make,
            self._rows(
                "SELECT id, key, session, state, kind, text, turn, final FROM delivery ORDER BY id"
            ),
        )
        steps = map(StepRow._make, self._rows("SELECT turn, name, state, effect, result FROM step"))
        bodies = self._rows("SELECT channel, id, body FROM message")
        return {
            "sessions": {
                id: (channel, name)
                for id, channel, name in self._rows("SELECT id, channel, name FROM session")
            },
            "bodies": {(channel, id): body for channel, id, body in bodies},
            "deliveries": {delivery.key: delivery for delivery in deliveries},
            "steps": {(step.turn, step.name): step for step in steps},
        }

    def _rows(self, sql: str) -> list[tuple[Any, ...]]:
        return list(self._db.execute(sql))
