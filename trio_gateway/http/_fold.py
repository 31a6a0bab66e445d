"""A response of the OpenAI API, as a fold over the journal of its message's session.

    fold = ResponseFold("resp_1f", "ada")
    for entry in entries:              # from the message's `accepted` on, drafts included
        events += fold.feed(entry)
    fold.response()                    # the response as it stands

Pure: the same entries give the same events under the same numbers, in every process. So whoever
comes back with the number of the last event that it has seen is told the rest, also after a crash.

Drafts show how a reply grows. A turn that was interrupted writes its reply again: what was sent
before is not sent twice, and where the new text goes another way, the item ends "incomplete" and
another one begins. A turn that answers several messages shows its drafts to whoever sent the
first, its replies to all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import attrs

from .._messages import ReplyKind
from ..store import Draft, JournalEntry

MODEL: Final = "trio-gateway"
"""What the agent is called as a model."""

Event = dict[str, Any]

_STATUS: Final[Mapping[str, str]] = {"answered": "completed", "stopped": "cancelled"}
_LAST: Final[Mapping[str, str]] = {
    "completed": "response.completed",
    "cancelled": "response.incomplete",
    "failed": "response.failed",
}
_WHY: Final[Mapping[str, str]] = {
    "failed": "the agent failed",
    "quarantined": "the turn was put aside: it had ended the gateway too often",
    "expired": "the turn was interrupted for too long",
}


@attrs.define(eq=False)
class _Item:
    """One reply, as far as it is told. `dropped`: another one has taken its place."""

    id: str
    index: int
    text: str = ""
    status: str = "in_progress"
    dropped: bool = False

    def told(self) -> dict[str, Any]:
        content = [] if self.status == "in_progress" and not self.text else [_part(self.text)]
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "status": self.status,
            "content": content,
        }

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


@attrs.define(eq=False)
class _Growth:
    """What one attempt of a turn writes: the draft (`text`, after `n` replies), the replies that
    it has committed (`replies`), and those of earlier attempts, which it may say again."""

    turn: int
    attempt: int
    earlier: tuple[str, ...] = ()
    n: int = 0
    text: str = ""
    said: list[str] = attrs.field(factory=list[str])
    heard: int = 0

    def next(self, attempt: int) -> _Growth:
        """The attempt that takes its place."""
        return _Growth(self.turn, attempt, (*self.earlier, *self.said))

    def grow(self, draft: Draft) -> bool:
        """Take a draft. False: it tells nothing new (it is late, or the one before is missing)."""
        if draft.n < len(self.said):
            return False
        if draft.n != self.n:
            self.n, self.text = draft.n, ""
        if draft.start > len(self.text):
            return False
        self.text = self.text[: draft.start] + draft.text
        return True

    def repeats(self) -> bool:
        """Whether this can be the beginning of a reply that an earlier attempt has committed: said
        again, it is not committed again."""
        for place in range(self.heard, len(self.earlier)):
            if self.earlier[place].startswith(self.text):
                self.heard = place
                return True
        return False


class ResponseFold:
    """Folds the journal of one message. `id` is the message's, and the response's; `session` is
    the name of its session.

    `led` and `requeued` are what `history_of` tells of a message that was queued more than once.
    """

    def __init__(
        self, id: str, session: str, *, led: Iterable[int] = (), requeued: int = 0
    ) -> None:
        self.id = id
        self.session = session
        self.state: str | None = None
        """How the message ended; None: it has not."""
        self.created: float = 0.0
        self.begun = False
        self._led = set(led)
        self._requeued = requeued
        self._growth: _Growth | None = None
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._number = 0

    @property
    def ended(self) -> bool:
        """Whether its last event was told."""
        return self.state is not None

    def lead(self, turns: Iterable[int]) -> None:
        """Note turns of which the message was the first."""
        self._led.update(turns)

    # ----- what happens

    def feed(self, entry: JournalEntry) -> list[Event]:
        """Take the next entry; return the events that it makes, with their numbers."""
        if self.ended:
            return []
        about_this = entry.message_id == self.id or self.id in entry.messages
        match entry.what:
            case "accepted" if about_this:
                return self._accepted(entry)
            case "begun" | "resumed":
                self._begun(entry, about_this)
            case "draft" if entry.turn in self._led and entry.draft is not None:
                return self._drafted(entry.draft)
            case "reply" if about_this:
                return self._replied(entry)
            case "settled" if about_this and entry.seq > self._requeued:
                return self._end(entry.detail or "failed")
            case _:
                return []
        return []

    def _accepted(self, entry: JournalEntry) -> list[Event]:
        self.created = entry.at.timestamp()
        told = self.response("in_progress")
        return [
            self._event("response.created", response=told),
            self._event("response.in_progress", response=told),
        ]

    def _begun(self, entry: JournalEntry, about_this: bool) -> None:
        if about_this:
            self.begun = True
        # Not the turns that it joins later: nobody could tell afterwards since when.
        if entry.what == "begun" and entry.turn is not None and entry.messages[:1] == (self.id,):
            self._led.add(entry.turn)

    def _drafted(self, draft: Draft) -> list[Event]:
        growth = self._growth_of(draft.turn, draft.attempt)
        if draft.attempt < growth.attempt or not growth.grow(draft) or growth.repeats():
            return []
        return self._show(growth.text)

    def _growth_of(self, turn: int, attempt: int) -> _Growth:
        growth = self._growth
        if growth is None or growth.turn != turn:
            growth = _Growth(turn, attempt)
        elif growth.attempt < attempt:
            growth = growth.next(attempt)
        self._growth = growth
        return growth

    def _replied(self, entry: JournalEntry) -> list[Event]:
        text = entry.text or ""
        if entry.kind is ReplyKind.SAY and entry.turn is not None and entry.attempt is not None:
            self._growth_of(entry.turn, entry.attempt).said.append(text)
        events: list[Event] = []
        if self._open is not None and not text.startswith(self._open.text):
            events += self._drop(self._open)
        if self._open is None:
            events += self._add()
        events += self._show(text) + self._close("completed")
        if entry.kind is ReplyKind.COMMAND:
            # A word to the gateway is answered as it is accepted: it has no end of its own.
            events += self._end("answered")
        return events

    def _end(self, state: str) -> list[Event]:
        events = self._close("incomplete")
        self.state = state
        status = self.status
        return [*events, self._event(_LAST[status], response=self.response(status))]

    # ----- items

    def _show(self, text: str) -> list[Event]:
        """Tell a text as far as it is not told."""
        events: list[Event] = []
        item = self._open
        if item is not None and item.text.startswith(text):
            return events
        if item is not None and not text.startswith(item.text):
            events += self._drop(item)
        if self._open is None:
            if not text:
                return events
            events += self._add()
        item = self._items[-1]
        delta = text[len(item.text) :]
        item.text = text
        told = self._event("response.output_text.delta", **item.place, delta=delta, logprobs=[])
        return [*events, told]

    def _add(self) -> list[Event]:
        index = len(self._items)
        item = _Item(f"msg_{self.id.partition('_')[2]}_{index}", index)
        self._items.append(item)
        self._open = item
        return [
            self._event("response.output_item.added", output_index=index, item=item.told()),
            self._event("response.content_part.added", **item.place, part=_part("")),
        ]

    def _drop(self, item: _Item) -> list[Event]:
        item.dropped = True
        return self._close("incomplete")

    def _close(self, status: str) -> list[Event]:
        item, self._open = self._open, None
        if item is None:
            return []
        item.status = status
        place, text = item.place, item.text
        return [
            self._event("response.output_text.done", **place, text=text, logprobs=[]),
            self._event("response.content_part.done", **place, part=_part(text)),
            self._event("response.output_item.done", output_index=item.index, item=item.told()),
        ]

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}

    # ----- as it stands

    @property
    def status(self) -> str:
        """The response's status in the words of the API."""
        if self.state is None:
            return "in_progress" if self.begun else "queued"
        return _STATUS.get(self.state, "failed")

    @property
    def texts(self) -> tuple[str, ...]:
        """What was said, one text a reply; without what another text has replaced."""
        return tuple(item.text for item in self._items if not item.dropped)

    def response(self, status: str | None = None) -> dict[str, Any]:
        """The response as it stands. What another text has replaced is not in its output."""
        status = status or self.status
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": self._error() if status == "failed" else None,
            "incomplete_details": None,
            "instructions": None,
            "max_output_tokens": None,
            "metadata": {},
            "model": MODEL,
            "output": [item.told() for item in self._items if not item.dropped],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "conversation": {"id": self.session},
            "temperature": None,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": None,
            "truncation": "disabled",
            "usage": None,
        }

    def _error(self) -> dict[str, Any]:
        said = self.texts[-1:] or (_WHY.get(self.state or "", "it failed"),)
        return {"code": "server_error", "message": said[0]}


class ChatFold:
    """The text of a chat completion: a response's replies as one text, with blank lines between."""

    def __init__(self) -> None:
        self._apart = False

    def feed(self, events: Iterable[Event]) -> str:
        """What the events of a response add to the text."""
        added: list[str] = []
        for event in events:
            if event["type"] == "response.output_item.added":
                self._apart = event["output_index"] > 0
            elif event["type"] == "response.output_text.delta":
                added += ["\n\n"] if self._apart else []
                added.append(event["delta"])
                self._apart = False
        return "".join(added)


def turns_led(message_id: str, entries: Sequence[JournalEntry]) -> frozenset[int]:
    """The turns of which a message was the first and that it does not belong to any more, because
    it was queued once more. `entries`: the journal from the message's `accepted` on."""
    not_before = {entry.message_id for entry in entries if entry.what == "accepted"}
    left = [entry for entry in entries if entry.what == "requeued" and entry.turn is not None]
    own = {entry.turn for entry in left if entry.message_id == message_id}
    others = {entry.turn for entry in left if entry.message_id not in not_before}
    return frozenset(turn for turn in own - others if turn is not None)
