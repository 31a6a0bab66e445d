"""Makes stores of any size, by the gateway's own statements."""

from __future__ import annotations

from pathlib import Path

from trio_gateway import Message, ReplyKind, SystemClock, TurnState
from trio_gateway.store import Arrival, Ledger, NewReply, Settlement
from trio_gateway.store._sqlite import connect


def make(path: Path, sessions: int, running: int) -> None:
    """A store with `sessions` settled sessions, and `running` turns that a crash left RUNNING."""
    clock = SystemClock()
    db = connect(path, clock)
    ledger = Ledger(db, clock)
    with db:
        ledger.recover()
    for start in range(0, sessions, 10_000):
        with db:
            for number in range(start, min(start + 10_000, sessions)):
                _settle(ledger, number)
        db.wal_checkpoint()
    with db:
        for number in range(sessions, sessions + running):
            ledger.accept([_arrival(number)], None)
    db.close()


def _arrival(number: int) -> Arrival:
    message = Message(session=f"s{number}", id=f"m{number}", text="hello")
    return Arrival(message, message.key, begin=True)


def _settle(ledger: Ledger, number: int) -> None:
    (admitted,) = ledger.accept([_arrival(number)], None)
    turn = admitted.turn
    assert turn is not None
    ledger.settle(
        Settlement(
            turn.id, 1, turn.session, turn.session_id, TurnState.COMPLETED,
            NewReply(0, ReplyKind.ANSWER, ("ok",), True, (turn.messages[0].id,), True),
        )
    )  # fmt: skip
