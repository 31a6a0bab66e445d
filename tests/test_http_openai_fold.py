"""A response as a fold over a journal: any journal that a gateway can write, however its drafts are
cut, whatever of them is lost, however often the turn was interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway import ReplyKind, SessionKey
from trio_gateway.http._fold import ChatFold, ResponseFold, turns_led
from trio_gateway.http._house import Streamed
from trio_gateway.store import Draft, JournalEntry

ID = "resp_1"
START = datetime(2026, 1, 1, tzinfo=UTC)


@attrs.define
class Journal:
    """Writes what a gateway would write."""

    entries: list[JournalEntry] = attrs.field(factory=list[JournalEntry])
    said: list[str] = attrs.field(factory=list[str])
    """The replies that are committed."""

    def put(self, what: str, **fields: Any) -> None:
        seq = len(self.entries) + 1
        self.entries.append(
            JournalEntry(seq=seq, at=START + timedelta(seconds=seq), what=what, **fields)
        )

    def begin(self, *messages: str, turn: int = 1) -> None:
        self.put("accepted", message_id=ID, text="hi")
        self.put("begun", turn=turn, attempt=1, messages=messages or (ID,))

    def draft(self, n: int, start: int, text: str, attempt: int = 1, turn: int = 1) -> None:
        self.put("draft", turn=turn, attempt=attempt, draft=Draft(turn, attempt, n, start, text))

    def reply(
        self, text: str, kind: ReplyKind = ReplyKind.SAY, attempt: int = 1, turn: int = 1
    ) -> None:
        about = (ID,)
        final = kind is not ReplyKind.SAY
        self.put("reply", turn=turn, attempt=attempt, text=text, kind=kind, final=final,
                 messages=about)  # fmt: skip
        self.said.append(text)

    def settle(self, state: str = "answered", turn: int = 1) -> None:
        self.put("settled", message_id=ID, turn=turn, detail=state)


def fold(entries: Sequence[JournalEntry], **known: Any) -> tuple[ResponseFold, list[Any]]:
    made = ResponseFold(ID, "ada", **known)
    return made, [event for entry in entries for event in made.feed(entry)]


def items_of(events: list[Any]) -> list[tuple[str, str]]:
    """What the deltas of each item make, and how it ended; checks that events fit together."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    texts: list[str] = []
    ends: list[str] = []
    for event in events:
        match event["type"]:
            case "response.output_item.added":
                assert event["output_index"] == len(texts) == len(ends)
                texts.append("")
            case "response.output_text.delta":
                assert event["output_index"] == len(texts) - 1 == len(ends)
                assert event["delta"]
                texts[-1] += event["delta"]
            case "response.output_text.done":
                assert event["text"] == texts[-1]
            case "response.output_item.done":
                assert event["item"]["content"][0]["text"] == texts[-1]
                ends.append(event["item"]["status"])
    return list(zip(texts, ends, strict=True))


def outputs(response: dict[str, Any]) -> list[str]:
    return [item["content"][0]["text"] for item in response["output"]]


TEXTS = st.text("ab ", min_size=1, max_size=6)


@attrs.define
class Writer:
    """An agent that writes replies over several attempts, and what becomes of its drafts."""

    data: st.DataObject
    journal: Journal

    def attempt(self, number: int, replies: list[str], cut: tuple[int, int] | None) -> None:
        """Write all replies, or up to a character of one of them."""
        n, kept = 0, ""
        for place, text in enumerate(replies):
            cut_here = cut is not None and cut[0] == place
            grown = text[: cut[1]] if cut is not None and cut_here else text
            kept = self._grow(number, n, kept, grown)
            if cut_here:
                return
            if place == len(replies) - 1:
                self.journal.reply(text, ReplyKind.ANSWER, number)
            elif self.journal.said[place : place + 1] != [text]:
                # Said the same at the same place before: not committed again, nor counted.
                self.journal.reply(text, ReplyKind.SAY, number)
                n, kept = n + 1, ""
                self._late(number, n, text)

    def _grow(self, attempt: int, n: int, kept: str, text: str) -> str:
        lengths = sorted(self.data.draw(st.sets(st.integers(1, max(1, len(text))), max_size=4)))
        for length in lengths:
            grown = text[:length]
            start = len(kept) if grown.startswith(kept) else 0
            kept = grown
            if self.data.draw(st.integers(0, 4)):
                self.journal.draft(n, start, grown[start:], attempt)
            else:
                kept = ""  # the disk was busy: the next one is written whole
        return kept

    def _late(self, attempt: int, n: int, text: str) -> None:
        """A draft that is written when its reply is there already."""
        if self.data.draw(st.booleans()):
            self.journal.draft(n - 1, 0, text[: self.data.draw(st.integers(1, 6))], attempt)


def written(data: st.DataObject, attempts: list[list[str]]) -> Journal:
    journal = Journal()
    journal.begin()
    writer = Writer(data, journal)
    for number, replies in enumerate(attempts, 1):
        if number > 1:
            journal.put("interrupted", turn=1, attempt=number - 1, messages=(ID,))
            journal.put("resumed", turn=1, attempt=number, messages=(ID,))
        last = number == len(attempts)
        place = data.draw(st.integers(0, len(replies) - 1))
        cut = None if last else (place, data.draw(st.integers(0, len(replies[place]))))
        writer.attempt(number, replies, cut)
    journal.settle()
    return journal


@given(st.data(), st.lists(TEXTS, min_size=1, max_size=4), st.integers(1, 4))
def test_what_is_written_again_is_told_once(
    data: st.DataObject, replies: list[str], attempts: int
) -> None:
    journal = written(data, [replies] * attempts)
    whole, events = fold(journal.entries)

    assert items_of(events) == [(text, "completed") for text in replies]
    assert outputs(events[-1]["response"]) == replies
    assert events[-1]["type"] == "response.completed"
    assert whole.response() == events[-1]["response"]


@given(st.data(), st.lists(st.lists(TEXTS, min_size=1, max_size=3), min_size=1, max_size=4))
def test_whatever_is_written_the_replies_are_told(
    data: st.DataObject, attempts: list[list[str]]
) -> None:
    """Every attempt may say something else: what was begun ends incomplete, and is no output."""
    journal = written(data, attempts)
    _, events = fold(journal.entries)

    assert [text for text, how in items_of(events) if how == "completed"] == journal.said
    assert outputs(events[-1]["response"]) == journal.said


@given(st.data(), st.lists(st.lists(TEXTS, min_size=1, max_size=3), min_size=1, max_size=3))
def test_whoever_comes_back_is_told_the_rest(
    data: st.DataObject, attempts: list[list[str]]
) -> None:
    entries = written(data, attempts).entries
    _, events = fold(entries)
    for known in range(len(entries) + 1):
        reader = ResponseFold(ID, "ada")
        seen = [event for entry in entries[:known] for event in reader.feed(entry)]
        _, again = fold(entries)
        assert seen + again[len(seen) :] == events


@given(st.data(), st.lists(st.lists(TEXTS, min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_chat_is_told_the_same_however_it_is_cut(
    data: st.DataObject, attempts: list[list[str]]
) -> None:
    entries = written(data, attempts).entries
    _, events = fold(entries)
    chat = ChatFold()
    text = "".join(chat.feed([event]) for event in events)

    assert text == ChatFold().feed(events)
    assert text == "\n\n".join(said for said, _ in items_of(events))


# ----- one by one


def test_another_text_ends_the_item_and_begins_one() -> None:
    journal = Journal()
    journal.begin()
    journal.draft(0, 0, "Hello wor")
    journal.put("resumed", turn=1, attempt=2, messages=(ID,))
    journal.draft(0, 0, "Hel", 2)
    journal.draft(0, 3, "p", 2)
    journal.reply("Help!", ReplyKind.ANSWER, 2)
    journal.settle()
    _, events = fold(journal.entries)

    assert items_of(events) == [("Hello wor", "incomplete"), ("Help!", "completed")]
    assert outputs(events[-1]["response"]) == ["Help!"]
    assert ChatFold().feed(events) == "Hello wor\n\nHelp!"


def test_a_reply_that_is_shorter_than_its_draft_is_told_whole() -> None:
    journal = Journal()
    journal.begin()
    journal.draft(0, 0, "Well, no")
    journal.reply("Well", ReplyKind.ANSWER)
    journal.settle()

    assert items_of(fold(journal.entries)[1]) == [("Well, no", "incomplete"), ("Well", "completed")]


def test_what_was_written_when_it_was_stopped_stays() -> None:
    journal = Journal()
    journal.begin()
    journal.reply("On it.")
    journal.draft(1, 0, "Half")
    journal.settle("stopped")
    _, events = fold(journal.entries)

    assert items_of(events) == [("On it.", "completed"), ("Half", "incomplete")]
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["status"] == "cancelled"
    assert outputs(events[-1]["response"]) == ["On it.", "Half"]


def test_an_end_without_an_answer_says_why() -> None:
    for state in ("failed", "quarantined", "expired"):
        journal = Journal()
        journal.begin()
        journal.settle(state)
        told = fold(journal.entries)[1][-1]
        assert (told["type"], told["response"]["status"]) == ("response.failed", "failed")
        assert told["response"]["error"]["message"]


def test_status_goes_on_with_the_journal() -> None:
    journal = Journal()
    journal.begin()
    journal.reply("Done.", ReplyKind.ANSWER)
    journal.settle()
    made = ResponseFold(ID, "ada")
    seen = [made.status]
    for entry in journal.entries:
        made.feed(entry)
        seen.append(made.status)

    assert seen == ["queued", "queued", "in_progress", "in_progress", "completed"]


def test_a_word_to_the_gateway_ends_with_its_answer() -> None:
    journal = Journal()
    journal.put("accepted", message_id=ID, text="/status")
    journal.put("reply", text="idle", kind=ReplyKind.COMMAND, final=True, messages=(ID,))
    made, events = fold(journal.entries)

    assert made.state == "answered"
    assert items_of(events) == [("idle", "completed")]
    assert events[-1]["type"] == "response.completed"


def test_a_piece_whose_beginning_is_missing_tells_nothing() -> None:
    journal = Journal()
    journal.begin()
    journal.draft(0, 5, "wor")
    assert len(fold(journal.entries)[1]) == 2
    journal.draft(0, 0, "Hello wor")
    assert fold(journal.entries)[0].texts == ("Hello wor",)


def test_a_session_is_streamed_as_long_as_anybody_reads() -> None:
    streamed, ada = Streamed(), SessionKey("http", "ada")
    with streamed.reading(ada):
        with streamed.reading(ada):
            assert ada in streamed
        assert ada in streamed
        assert SessionKey("http", "bob") not in streamed
    assert ada not in streamed


def test_what_others_in_the_session_do_is_not_told() -> None:
    journal = Journal()
    journal.begin()
    journal.put("accepted", message_id="other", text="me too")
    journal.put("begun", turn=2, attempt=1, messages=("other",))
    journal.draft(0, 0, "For the other", turn=2)
    journal.put("reply", turn=2, attempt=1, text="For the other", kind=ReplyKind.ANSWER,
                final=True, messages=("other",))  # fmt: skip
    journal.put("settled", message_id="other", turn=2, detail="answered")
    made, events = fold(journal.entries)

    assert len(events) == 2
    assert not made.ended


def test_who_joins_a_turn_is_told_its_replies_and_no_drafts() -> None:
    """Since when it belongs to the turn is in no journal: drafts would differ when told again."""
    journal = Journal()
    journal.begin("first", ID)
    journal.draft(0, 0, "Both")
    journal.reply("Both of you: yes", ReplyKind.ANSWER)
    journal.settle()
    _, events = fold(journal.entries)

    assert items_of(events) == [("Both of you: yes", "completed")]
    assert len([event for event in events if event["type"].endswith(".delta")]) == 1


def test_a_turn_that_was_led_is_told_also_when_it_names_the_message_no_more() -> None:
    journal = Journal()
    journal.begin()
    journal.draft(0, 0, "First try")
    live, _ = fold(journal.entries)
    assert live.texts == ("First try",)
    journal.put("requeued", message_id=ID, turn=1)
    journal.put("begun", turn=2, attempt=1, messages=(ID,))
    journal.reply("Second try", ReplyKind.ANSWER, turn=2)
    journal.settle(turn=2)
    # What a reader finds afterwards: the first turn has no messages.
    later = [
        attrs.evolve(entry, messages=()) if entry.what == "begun" and entry.turn == 1 else entry
        for entry in journal.entries
    ]

    assert turns_led(ID, later) == {1}
    assert fold(later, led={1}, requeued=5)[1] == fold(journal.entries)[1]


def test_a_turn_of_somebody_else_was_not_led() -> None:
    journal = Journal()
    journal.begin("first", ID)
    journal.put("requeued", message_id="first", turn=1)
    journal.put("requeued", message_id=ID, turn=1)

    assert turns_led(ID, journal.entries) == frozenset()


def test_an_end_that_was_none_is_not_told() -> None:
    journal = Journal()
    journal.begin()
    journal.reply("Sorry", ReplyKind.APOLOGY)
    journal.settle("failed")
    before = fold(journal.entries)[1]
    journal.put("requeued", message_id=ID, turn=1)
    journal.put("begun", turn=2, attempt=1, messages=(ID,))
    journal.reply("Done", ReplyKind.ANSWER, turn=2)
    journal.settle(turn=2)
    made, events = fold(journal.entries, led={1}, requeued=5)

    assert made.status == "completed"
    assert events[: len(before) - 1] == before[:-1]
    assert [text for text, _ in items_of(events)] == ["Sorry", "Done"]
