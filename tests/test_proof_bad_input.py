"""The campaign `bad-input`, at its smallest: every door opens, and each notices what it is there to
notice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis.configuration import set_hypothesis_home_dir

import trio_gateway._inbox
import trio_gateway._policy
import trio_gateway.store._codec
from proof import _bad_lines, _bad_pages, _bad_stores, _bad_words, bad_input
from proof._bad_lives import Batch
from proof._inputs import drawn, json_value, toml_text
from proof._report import Job, Report, Size
from trio_gateway._policy import Refusal

SMALL = {"pages": 3, "rows": 4, "process": 20, "jsonl": 40}
"""Inputs of one batch; of every door that is not named here, 12."""


@pytest.fixture(autouse=True)
def home(memory_path: Path) -> Iterator[Path]:
    """What Hypothesis writes goes away with the test."""
    set_hypothesis_home_dir(memory_path)
    yield memory_path
    set_hypothesis_home_dir(None)


def tried(door: str, root: Path, number: int = 1, size: int | None = None) -> Any:
    """What comes of a small batch."""
    return bad_input.try_batch(door, number, 0, root, size or SMALL.get(door, 12))


@pytest.mark.parametrize("door", bad_input.DOORS)
def test_every_door_takes_a_small_batch(door: str, home: Path) -> None:
    outcome = tried(door, home)
    assert outcome.failure is None, outcome.failure
    assert outcome.figures["inputs"] >= SMALL.get(door, 12)
    assert list(home.glob("tmp*")) == [], "something was left behind"


@pytest.mark.parametrize("door", ["rows", "jsonl", "names"])
def test_a_point_is_the_same_each_time(door: str, home: Path) -> None:
    first, second = tried(door, home, 2), tried(door, home, 2)
    assert first.figures == second.figures
    assert first.point == second.point == f"{door}:2"


def test_what_is_drawn_hangs_on_the_seed_alone() -> None:
    assert drawn(toml_text(), 20, 5) == drawn(toml_text(), 20, 5)
    assert drawn(toml_text(), 20, 5) != drawn(toml_text(), 20, 6)
    assert len(drawn(json_value, 30, 1)) == 30


# ----- each notices


def test_a_broken_text_that_is_taken_is_noticed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(text: object, limit: int) -> Refusal | None:
        return None

    monkeypatch.setattr(trio_gateway._policy, "_bad_text", blind)
    assert tried("names", home, 0, 60).failure


def test_what_is_no_message_and_leaves_a_trace_is_noticed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trio_gateway._inbox, "_check_messages", lambda messages: None)
    assert tried("names", home, 0, 60).failure


def test_a_line_that_is_answered_otherwise_is_noticed(home: Path) -> None:
    batch = Batch("jsonl", 0, 1, 0, home)
    line = json.dumps({"session": "a", "id": "m1", "text": "hi"}).encode()
    right = {"event": "accepted", "session": "a", "id": "m1", "duplicate": False}
    reply = {
        "event": "reply", "session": "a", "in_reply_to": ["m1"], "text": "re: hi", "final": True,
        "repeat": False,
    }  # fmt: skip
    _bad_lines.Account(batch, line).check([right, reply])
    for wrong in (
        [right],
        [right, reply, reply],
        [{**right, "duplicate": True}, reply],
        [{"event": "error", "line": 1, "error": "no"}],
        [right, {**reply, "text": "re: ho"}],
        [right, right, reply],
    ):
        with pytest.raises(AssertionError):
            _bad_lines.Account(batch, line).check(wrong)


def test_a_row_that_stops_everybody_is_noticed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(text: str) -> object:
        raise ValueError(f"{text!r} is no kind")

    monkeypatch.setattr(trio_gateway.store._codec, "_kind", fail)
    outcome = tried("rows", home, 0, 40)
    assert "keeps all from being served" in str(outcome.failure) or "no kind" in str(
        outcome.failure
    )


def test_a_refused_file_that_was_changed_is_noticed() -> None:
    before = {_bad_stores.DB: b"a", _bad_stores.WAL: b"b"}
    assert _bad_pages._changed(before, dict(before)) == []
    assert _bad_pages._changed(before, {_bad_stores.DB: b"a"}) == [_bad_stores.WAL]
    assert _bad_pages._changed(before, {**before, _bad_stores.DB: b"x"}) == [_bad_stores.DB]


def test_the_store_that_is_damaged_has_something_of_everything() -> None:
    assert set(_bad_stores.stores()) == {"all in the WAL", "killed", "stopped"}
    ends = set(_bad_stores.truth("killed").ends.values())
    assert {state for _, state in ends} == {"answered", "failed", "quarantined"}
    assert _bad_stores.stores()["killed"][_bad_stores.WAL], "nothing is in the WAL"


def test_which_fields_are_wrong_is_known_without_the_gateway() -> None:
    message = trio_gateway.Message
    assert _bad_words.fault_of(message(session="a", id="m", text="\0")) is None
    assert _bad_words.fault_of(message(session="", id="m", text="hi")) == "session"
    assert _bad_words.fault_of(message(session="a", id="x" * 1025, text="hi")) == "id"
    assert _bad_words.fault_of(message(session="a", id="m", text="\ud800")) == "text"
    assert _bad_words.fault_of(message(session="a", id="m", text="", channel="A")) == "channel"


# ----- processes


def test_a_batch_that_kills_its_process_is_a_failure_and_the_next_one_goes_on(home: Path) -> None:
    """No such door: the process dies of it."""
    todo, done = SimpleQueue[tuple[str, int]](), SimpleQueue[Any]()
    todo.put(("nowhere", 0))
    todo.put(("process", 0))
    hand = bad_input._Hand(0, home, todo, done)
    try:
        first, second = done.get(timeout=60), done.get(timeout=60)
    finally:
        hand.stop()
    assert (first.point, first.failure) == ("nowhere:0", "the process died: 1")
    assert (second.point, second.failure) == ("process:0", None)


def test_a_point_that_there_is_not_is_said_to_be_none() -> None:
    report = Report(bad_input.CAMPAIGN, Size.QUICK, 0)
    with pytest.raises(ValueError, match="no point"):
        bad_input.run(Job(report, Size.QUICK, only="nowhere:0", jobs=1))
