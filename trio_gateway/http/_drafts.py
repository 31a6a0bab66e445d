"""Keeps how replies grow, for clients that stream them: a client that comes back after a crash is
told again what it was told, and goes on.

One write at a time, of whatever has grown meanwhile: a model that writes faster than the disk gets
longer pieces, not a queue.
"""

from __future__ import annotations

import attrs
import trio

from .._errors import StoreError
from .._events import Event, ProgressShown, ReplyCommitted, TurnInterrupted, TurnSettled
from .._messages import SessionKey
from .._policy import unicode_text
from ..store import Draft
from ._house import House


@attrs.define(eq=False)
class _Growing:
    """The reply that a turn writes: as it is (`text`), as it is on disk (`kept`), and how many
    replies of this attempt came before it."""

    session: SessionKey
    turn: int
    attempt: int
    n: int = 0
    text: str = ""
    kept: str = ""


class Drafts:
    """Hears drafts and puts them into the journal."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._growing: dict[int, _Growing] = {}
        self._dirty: set[int] = set()
        self._woken = trio.Event()

    def hear(self, event: Event) -> None:
        """Note what an event says about a reply that grows."""
        if isinstance(event, ProgressShown):
            if event.draft and event.session in self._house.streaming:
                self._grow(event)
        elif isinstance(event, ReplyCommitted):
            self._said(event)
        elif isinstance(event, TurnSettled | TurnInterrupted):
            self._growing.pop(event.turn, None)
            self._dirty.discard(event.turn)

    def _of(self, event: ProgressShown | ReplyCommitted) -> _Growing:
        found = self._growing.get(event.turn)
        if found is None or found.attempt != event.attempt:
            found = _Growing(event.session, event.turn, event.attempt)
            self._growing[event.turn] = found
        return found

    def _grow(self, event: ProgressShown) -> None:
        self._of(event).text = unicode_text(event.text)
        self._dirty.add(event.turn)
        self._woken.set()

    def _said(self, event: ReplyCommitted) -> None:
        if event.session.channel != self._house.channel or event.final:
            return
        growing = self._of(event)
        growing.n += 1
        growing.text = growing.kept = ""
        self._dirty.discard(event.turn)

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._woken.wait()
            self._woken = trio.Event()
            await self._write([self._growing[turn] for turn in self._dirty])

    async def _write(self, growing: list[_Growing]) -> None:
        self._dirty.clear()
        drafts = [draft for one in growing if (draft := _piece(one)) is not None]
        if not drafts:
            return
        try:
            await self._house.gateway.note_drafts(drafts)
        except StoreError:
            # Nobody is told what is not kept, or may not be: the next one is written whole.
            for one in growing:
                one.kept = ""
            return
        self._house.bells.news.set()


def _piece(growing: _Growing) -> Draft | None:
    """What has been added since the last write, or the whole if it goes another way now."""
    text, kept = growing.text, growing.kept
    if text == kept:
        return None
    start = len(kept) if text.startswith(kept) else 0
    growing.kept = text
    return Draft(growing.turn, growing.attempt, growing.n, start, text[start:])
