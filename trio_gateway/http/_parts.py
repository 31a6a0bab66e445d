"""The parts of the page that change while somebody looks: read from the store, drawn as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import attrs

from .._errors import NotFound
from .._messages import Reply, SessionKey
from ..store import MessageRow, OpenTurnRow, StoreReader
from ._house import House
from ._html import render

ROWS: Final = 50
"""Rows of a table on the overview; the command line lists the rest."""

LINES: Final = 50
"""Messages of a conversation on one page."""


@attrs.frozen
class Exchange:
    """A message and what was said to it. Of those that share a turn, the last has them."""

    message: MessageRow
    replies: tuple[Reply, ...]


@attrs.frozen
class Conversation:
    """A page of a conversation, oldest first. `older`: the place before which there is more."""

    session: SessionKey
    exchanges: tuple[Exchange, ...]
    older: int | None
    turn: OpenTurnRow | None


async def overview_part(house: House) -> str:
    """The overview, as HTML."""
    gateway, board = house.gateway, house.board
    stored = await house.ask(_read_overview)
    return render(
        "overview.part.html",
        **stored,
        state=gateway.state.value.value,
        paused=gateway.paused,
        epoch=gateway.epoch,
        channels=gateway.channels,
        running={one.id for one in gateway.turns()},
        said=board.said,
        drain=board.drain,
        rows=ROWS,
    )


def _read_overview(reader: StoreReader) -> dict[str, Any]:
    return {
        "counts": reader.counts(),
        "turns": reader.open_turns(),
        "sessions": reader.sessions(ROWS),
        "quarantine": reader.quarantine(),
        "dead_letters": reader.dead_letters(),
        "inbox": reader.inbox(ROWS),
        "outbox": reader.outbox(ROWS),
    }


async def conversation_parts(house: House, session: SessionKey) -> dict[str, str]:
    """The newest page of a conversation, and its open turn, as HTML. Raises `NotFound`."""
    read = await read_conversation(house, session, None)
    return {
        "conversation": render("conversation.part.html", conversation=read),
        "turn": turn_part(house, read),
    }


def turn_part(house: House, conversation: Conversation) -> str:
    """The open turn of a conversation, and what it says, as HTML."""
    turn = conversation.turn
    said = None if turn is None else house.board.said.get(turn.turn)
    return render(
        "turn.part.html",
        turn=turn,
        said=said,
        waiting=sum(one.message.state == "queued" for one in conversation.exchanges),
        session=conversation.session,
        draining=house.draining,
        paused=house.gateway.paused,
    )


async def read_conversation(house: House, session: SessionKey, before: int | None) -> Conversation:
    """A page of a conversation. One of our own channel begins when it is first looked at; raises
    `NotFound` for one of another that there is not."""

    def read(reader: StoreReader) -> Conversation:
        try:
            found = reader.messages_before(session, before, LINES)
        except NotFound:
            if session.channel != house.channel:
                raise
            found = ()
        rows = [row for _, row in reversed(found)]
        turn = next((one for one in reader.open_turns() if one.session == session), None)
        older = found[-1][0] if len(found) == LINES else None
        return Conversation(session, _exchanges(reader, rows), older, turn)

    return await house.ask(read)


def _exchanges(reader: StoreReader, rows: Sequence[MessageRow]) -> tuple[Exchange, ...]:
    exchanges: list[Exchange] = []
    for n, row in enumerate(rows):
        shared = row.turn is not None and n + 1 < len(rows) and rows[n + 1].turn == row.turn
        replies = () if shared else reader.replies_to(row.session.channel, row.id)[1]
        exchanges.append(Exchange(row, replies))
    return tuple(exchanges)
