"""What was put aside is set right: by the gateway that runs, else in the store itself.

A running gateway does it at once, one after the other; without one, all of it is one transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs

from ._control import ControlError, NoGateway
from ._control_client import Control, connected
from .store import DeadLetter, Ledger, QuarantineRow, edit_store


@attrs.frozen(kw_only=True)
class Mending:
    """One way to set something right: what a gateway is asked, and what comes of it with a running
    gateway (`now`) and without one (`later`)."""

    request: str
    now: str
    later: str


RETRY_TURN: Final = Mending(
    request="quarantine-retry",
    now="wait again, and are answered now",
    later="wait again: the next start answers them",
)
DROP_TURN: Final = Mending(request="quarantine-drop", now="are given up", later="are given up")
RETRY_LETTER: Final = Mending(
    request="dead-letter-retry",
    now="is sent again when its channel is connected, marked as a possible repeat",
    later="waits again: the next start sends it, marked as a possible repeat",
)
DROP_LETTER: Final = Mending(request="dead-letter-drop", now="is given up", later="is given up")

_TURNS: Final[dict[str, Callable[[Ledger, int], tuple[str, ...]]]] = {
    RETRY_TURN.request: Ledger.retry_quarantined,
    DROP_TURN.request: Ledger.drop_quarantined,
}
_LETTERS: Final[dict[str, Callable[[Ledger, int], bool]]] = {
    RETRY_LETTER.request: Ledger.retry_dead,
    DROP_LETTER.request: Ledger.drop_dead,
}


def mend_turns(
    path: Path, rows: Sequence[QuarantineRow], how: Mending
) -> Iterator[tuple[QuarantineRow, tuple[str, ...], str]]:
    """Each turn, the ids of its messages, and what came of it; as soon as it is so.

    Raises `StoreInUse` where a process has the store that cannot be asked, and `NotFound` where
    somebody was quicker.
    """
    with ExitStack() as stack:
        control = _enter(stack, path)
        if control is not None:
            for row in rows:
                control.ask(how.request, turn=row.turn)
                yield row, tuple(message.id for message in row.messages), how.now
            return
    change = _TURNS[how.request]
    # One transaction for all of them: a store that is in use refuses all, not some.
    done = edit_store(path, lambda ledger: [(row, change(ledger, row.turn)) for row in rows])
    yield from ((row, ids, how.later) for row, ids in done)


def mend_letters(
    path: Path, rows: Sequence[DeadLetter], how: Mending
) -> Iterator[tuple[DeadLetter, str]]:
    """Each dead letter, and what came of it; as `mend_turns`."""
    with ExitStack() as stack:
        control = _enter(stack, path)
        if control is not None:
            for row in rows:
                control.ask(how.request, delivery=row.delivery)
                yield row, how.now
            return
    change = _LETTERS[how.request]
    edit_store(path, lambda ledger: [change(ledger, row.delivery) for row in rows])
    yield from ((row, how.later) for row in rows)


def _enter(stack: ExitStack, path: Path) -> Control | None:
    """The gateway that has the store; None where none can be asked: then the lock decides."""
    try:
        return stack.enter_context(connected(path))
    except (NoGateway, ControlError):
        return None
