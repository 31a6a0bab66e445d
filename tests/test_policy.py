"""The decisions, as pure functions."""

from __future__ import annotations

import itertools
import re
import time
from datetime import timedelta
from typing import Any

import attrs
import pytest
import regex
from hypothesis import assume, given
from hypothesis import strategies as st

from trio_gateway import (
    Limits,
    Marker,
    Message,
    ResumeReason,
    ResumeRules,
    SessionKey,
    TurnState,
)
from trio_gateway._policy import (
    HELP_TEXT,
    Command,
    StopPlan,
    Verdict,
    admit,
    command_in,
    in_doubt_text,
    judge,
    lone_surrogate,
    malformed,
    may_begin,
    no_room,
    plan_stop,
    retry_delay,
    split_text,
    status_text,
    step_name,
    unicode_text,
)

ANY_TEXT = st.text(st.characters(exclude_categories=[]))
"""Any string of Python's, lone surrogates included."""


# ----- resuming


def marker(
    crashes: int = 0, interruptions: int = 0, reason: ResumeReason = ResumeReason.SHUTDOWN
) -> Marker:
    return Marker(TurnState.RESUME_PENDING, 1, reason, crashes, interruptions)


HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("crashes", "interruptions", "age", "verdict"),
    [
        (0, 0, timedelta(0), Verdict.RESUME),
        (1, 0, timedelta(0), Verdict.RESUME),
        (2, 0, timedelta(0), Verdict.RESUME_ALONE),
        (3, 0, timedelta(0), Verdict.QUARANTINE),
        (4, 0, timedelta(0), Verdict.QUARANTINE),
        (0, 9, timedelta(0), Verdict.RESUME),
        (0, 10, timedelta(0), Verdict.QUARANTINE),
        (0, 0, HOUR, Verdict.RESUME),
        (0, 0, HOUR + timedelta(microseconds=1), Verdict.EXPIRE),
        (2, 0, 2 * HOUR, Verdict.EXPIRE),
        (3, 0, 2 * HOUR, Verdict.QUARANTINE),
        (0, 10, 2 * HOUR, Verdict.QUARANTINE),
    ],
)
def test_judge_by_the_default_rules(
    crashes: int, interruptions: int, age: timedelta, verdict: Verdict
) -> None:
    assert judge(marker(crashes, interruptions), age, ResumeRules()).verdict is verdict


@given(
    crashes=st.integers(0, 20),
    interruptions=st.integers(0, 50),
    age=st.timedeltas(timedelta(0), timedelta(days=9999)),
    within=st.none() | st.timedeltas(timedelta(0), timedelta(days=9999)),
    max_crashes=st.integers(1, 20),
    max_interruptions=st.integers(1, 50),
)
def test_p09_judge_condemns_for_crimes_and_for_age_and_for_nothing_else(
    crashes: int,
    interruptions: int,
    age: timedelta,
    within: timedelta | None,
    max_crashes: int,
    max_interruptions: int,
) -> None:
    rules = ResumeRules(within=within, max_crashes=max_crashes, max_interruptions=max_interruptions)
    judgement = judge(marker(crashes, interruptions), age, rules)
    guilty = crashes >= max_crashes or interruptions >= max_interruptions
    assert (judgement.verdict is Verdict.QUARANTINE) == guilty
    stale = within is not None and age > within
    assert (judgement.verdict is Verdict.EXPIRE) == (stale and not guilty)
    if not guilty and not stale:
        assert (judgement.verdict is Verdict.RESUME_ALONE) == (crashes >= 2)
    assert judgement.why


def test_c22_none_disables_the_limit_and_zero_does_not() -> None:
    old = timedelta(days=3650)
    assert judge(marker(), old, ResumeRules(within=None)).verdict is Verdict.RESUME
    at_once = ResumeRules(within=timedelta(0))
    assert judge(marker(), timedelta(0), at_once).verdict is Verdict.RESUME
    assert judge(marker(), timedelta(microseconds=1), at_once).verdict is Verdict.EXPIRE


def test_a_judgement_says_why() -> None:
    rules = ResumeRules()
    for_crashes = judge(marker(3), timedelta(0), rules).why
    assert "3 crashes" in for_crashes
    for_stops = judge(marker(0, 10), timedelta(0), rules).why
    assert "10 stops" in for_stops
    for_age = judge(marker(), timedelta(hours=2, seconds=5), rules).why
    assert "2:00:05" in for_age
    assert "resume.within" in for_age
    assert judge(marker(), timedelta(0), rules).why == "shutdown"


# ----- beginning


@pytest.mark.parametrize("slots", [-1, 0, 1, 100])
@pytest.mark.parametrize("truths", list(itertools.product([True, False], repeat=3)))
def test_p02_p03_a_turn_may_begin_only_if_nothing_speaks_against_it(
    truths: tuple[bool, bool, bool], slots: int
) -> None:
    door, connected, busy = truths
    may = may_begin(door_open=door, connected=connected, session_busy=busy, slots_free=slots)
    assert may == (truths == (True, True, False) and slots > 0)


# ----- stopping


def windows(plan: StopPlan) -> tuple[float, ...]:
    return (plan.mark, plan.grace, plan.unwind, plan.flush, plan.spare)


SECONDS = st.floats(1e-3, 1e6)


@given(grace=st.none() | st.floats(0, 1e6), budget=st.none() | SECONDS)
def test_p11_c15_the_windows_fit_into_the_budget(grace: float | None, budget: float | None) -> None:
    plan = plan_stop(grace, budget)
    assert all(window >= 0 for window in windows(plan))
    assert min(plan.mark, plan.unwind, plan.flush, plan.spare) > 0
    assert sum(windows(plan)) <= plan.budget * (1 + 1e-9)
    if budget is not None:
        assert plan.budget == budget
    if plan.clamped:
        # As much as there is room for, and nobody is told that more fits.
        assert sum(windows(plan)) == pytest.approx(plan.budget)
        assert grace is not None
        assert plan.grace < grace
    elif grace is not None:
        assert plan.grace == grace


@given(budget=st.none() | SECONDS)
def test_c15_the_window_is_never_zero_by_default(budget: float | None) -> None:
    plan = plan_stop(None, budget)
    assert not plan.clamped
    assert plan.grace >= min(20.0, plan.budget * 0.6)


@given(grace=st.floats(0, 1e6))
def test_c15_a_grace_alone_brings_a_budget_in_which_it_fits(grace: float) -> None:
    """No two timers that disagree: the window that was asked for is the window that there is."""
    plan = plan_stop(grace)
    assert plan.grace == grace
    assert not plan.clamped


# ----- trying again


@given(tries=st.integers(1, 10_000), dice=st.floats(0, 1, exclude_max=True))
def test_retries_wait_longer_and_longer_up_to_a_cap(tries: int, dice: float) -> None:
    whole = min(300.0, 2.0 ** min(tries - 1, 100))
    assert whole / 2 <= retry_delay(tries, dice) <= whole
    assert retry_delay(tries, 0.0) == whole
    assert retry_delay(tries, dice, first=0.5, cap=4.0) <= 4.0
    assert retry_delay(tries + 1, dice) >= retry_delay(tries, dice)


# ----- splitting


def utf16(text: str) -> int:
    """How Telegram counts."""
    return len(text.encode("utf-16-le")) // 2


def utf8(text: str) -> int:
    return len(text.encode())


GRAPHEMES = st.sampled_from(
    [
        "a", "word", " ", "  ", "\n", "\n\n", "\r\n", "\0", "é", "ﷺ", "𝄞", "z" * 20,
        "e\u0301", " \u0301", "a\u0301\u0302\u0303\u0304",
        "\U0001f44d\U0001f3fd",  # a thumb with a colour
        "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",  # a family
        "\U0001f1e9\U0001f1ea", "\U0001f1eb\U0001f1f7",  # two flags
        "\ud55c", "\u1112\u1161\u11ab",  # a syllable, whole and in letters
        "\u0915\u094d\u0937\u093f", "\u0ba8\u0bbf", "\u0600a", "\u200d",
    ]
)  # fmt: skip
TEXTS = st.lists(GRAPHEMES, max_size=60).map("".join) | st.text(max_size=80)


@given(text=TEXTS, limit=st.integers(1, 40), length=st.sampled_from([len, utf16, utf8]))
def test_c40_parts_joined_are_the_text_and_none_is_too_long(
    text: str, limit: int, length: Any
) -> None:
    parts = split_text(text, limit, length)
    assert "".join(parts) == text
    assert all(parts) or text == ""
    for part in parts:
        # Shorter than one character there is nothing.
        assert length(part) <= limit or len(part) == 1


@given(text=TEXTS, limit=st.integers(1, 40), length=st.sampled_from([len, utf16, utf8]))
def test_c40_no_grapheme_is_cut_unless_it_is_too_long_alone(
    text: str, limit: int, length: Any
) -> None:
    parts = split_text(text, limit, length)
    cuts = set(itertools.accumulate(map(len, parts[:-1])))
    for match in regex.finditer(r"\X", text):
        inside = range(match.start() + 1, match.end())
        if cuts.intersection(inside):
            assert length(match[0]) > limit


@given(text=st.text(), limit=st.none() | st.integers(1, 1000))
def test_a_text_that_fits_is_left_alone(text: str, limit: int | None) -> None:
    assume(limit is None or len(text) <= limit)
    assert split_text(text, limit) == (text,)


@pytest.mark.parametrize(
    ("text", "limit", "parts"),
    [
        ("one two three", 8, ("one two ", "three")),
        ("one\ntwo three", 11, ("one\n", "two three")),
        ("one\n\ntwo\nthree four", 14, ("one\n\n", "two\nthree four")),
        ("aaaaaaaaaa", 4, ("aaaa", "aaaa", "aa")),
        # A break near the beginning makes more parts, not better ones.
        ("a\n\nbbbbbbbbb ccccccccc", 18, ("a\n\nbbbbbbbbb ", "ccccccccc")),
        ("", 5, ("",)),
        # A space that carries a mark is not the end of a word.
        ("aaaa \u0301bbbb", 5, ("aaaa", " \u0301bbb", "b")),
    ],
)
def test_a_cut_is_after_a_paragraph_else_a_line_else_a_word(
    text: str, limit: int, parts: tuple[str, ...]
) -> None:
    assert split_text(text, limit) == parts


def test_a_long_text_is_split_in_a_moment() -> None:
    """A megabyte, also one without a break: the loop stands still for a moment, not for minutes."""
    for text in ("word " * 200_000, "x" * 1_000_000):
        began = time.perf_counter()
        parts = split_text(text, 4096, utf16)
        assert time.perf_counter() - began < 10
        assert "".join(parts) == text
        assert len(parts) < 260


# ----- the inbox


def message(**changes: Any) -> Message:
    return attrs.evolve(Message(session="ada", id="m1", text="hello"), **changes)


def test_a_message_that_is_whole_is_taken() -> None:
    assert malformed(message(), Limits()) is None
    assert malformed(message(text=""), Limits()) is None
    assert malformed(message(sender="u1", text="\0"), Limits()) is None
    assert admit(message(), Limits(), open_in_session=99, open_in_all=99_999) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"session": ""}, "session: must not be empty"),
        ({"id": ""}, "id: must not be empty"),
        ({"sender": ""}, "sender: must not be empty"),
        ({"session": 7}, "session: expected a string, got int"),
        ({"id": None}, "id: expected a string, got NoneType"),
        ({"sender": b"u1"}, "sender: expected a string, got bytes"),
        ({"text": None}, "text: expected a string, got NoneType"),
        ({"text": ["hi"]}, "text: expected a string, got list"),
        ({"session": "s" * 1025}, "session: 1025 characters, at most 1024 are taken"),
        ({"id": "i" * 5000}, "id: 5000 characters, at most 1024 are taken"),
        ({"session": "a\ud800"}, "session: not Unicode text (a lone surrogate at character 1)"),
        ({"id": "\udfff"}, "id: not Unicode text (a lone surrogate at character 0)"),
        ({"text": "ab\udc80"}, "text: not Unicode text (a lone surrogate at character 2)"),
        ({"channel": "Big"}, "channel 'Big': expected small letters, digits, _ and -"),
        ({"channel": None}, "channel None: expected small letters, digits, _ and -"),
        ({"text": "x" * (1024 * 1024 + 1)}, "text: 1048577 bytes, at most 1048576 are taken"),
        ({"text": "é" * (512 * 1024 + 1)}, "text: 1048578 bytes, at most 1048576 are taken"),
    ],
)
def test_p14_c38_a_malformed_message_is_named(changes: dict[str, Any], reason: str) -> None:
    refusal = malformed(message(**changes), Limits())
    assert refusal is not None
    assert refusal.reason == reason
    assert not refusal.retryable


@given(text=ANY_TEXT, limit=st.integers(0, 50))
def test_c38_a_text_is_taken_exactly_if_it_is_unicode_and_fits(text: str, limit: int) -> None:
    refusal = malformed(message(text=text), Limits(message_bytes=limit))
    broken = any("\ud800" <= c <= "\udfff" for c in text)
    assert (refusal is None) == (not broken and len(text.encode(errors="replace")) <= limit)
    if refusal is not None:
        refusal.reason.encode()  # it can be told


def test_c35_a_full_inbox_refuses_for_now() -> None:
    limits = Limits(open_per_session=3, open_messages=10)
    assert no_room(limits, 2, 9) is None
    for refusal in (no_room(limits, 3, 3), no_room(limits, 0, 10), no_room(limits, 4, 11)):
        assert refusal is not None
        assert refusal.retryable
        assert "again" in refusal.reason
    bad = admit(message(id=""), limits, open_in_session=3, open_in_all=10)
    assert bad is not None
    assert not bad.retryable


# ----- texts


@given(text=ANY_TEXT)
def test_c38_unicode_text_keeps_all_that_is_unicode(text: str) -> None:
    whole = unicode_text(text)
    whole.encode()
    assert lone_surrogate(whole) is None
    if lone_surrogate(text) is None:
        assert whole == text
    # Pairs become the character that they are; each half that is alone becomes one mark.
    pairs = re.sub(
        "[\ud800-\udbff][\udc00-\udfff]",
        lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"),
        text,
    )
    assert whole == re.sub("[\ud800-\udfff]", "\ufffd", pairs)


def test_c38_halves_that_belong_together_are_joined() -> None:
    assert unicode_text("a\ud83d\ude00b") == "a😀b"
    assert unicode_text("\ufeffx\ud83d") == "\ufeffx\ufffd"


@given(text=ANY_TEXT)
def test_c38_a_lone_surrogate_is_found_where_it_is(text: str) -> None:
    at = lone_surrogate(text)
    if at is None:
        text.encode()
    else:
        assert "\ud800" <= text[at] <= "\udfff"
        assert lone_surrogate(text[:at]) is None


# ----- keys


@given(channel=st.from_regex(r"[a-z][a-z0-9_-]{0,31}", fullmatch=True), name=ANY_TEXT.filter(bool))
def test_c37_a_key_reads_back_as_it_was_written(channel: str, name: str) -> None:
    """So two keys that are written the same are the same."""
    key = SessionKey(channel, name)
    assert SessionKey.parse(str(key)) == key


# ----- names of steps


def test_names_of_steps_count_from_the_second_on() -> None:
    assert [step_name("think", n) for n in (1, 2, 3)] == ["think", "think#2", "think#3"]


# ----- chat commands


@pytest.mark.parametrize("command", list(Command))
def test_a_command_stands_alone(command: Command) -> None:
    word = command.value
    for text in (word, word.upper(), f"{word} ", f"{word}\r\n"):
        assert command_in(text) is command
    for text in (f"{word} it", f" {word}", word[1:], f"{word}x"):
        assert command_in(text) is None
    assert word in HELP_TEXT


@given(text=ANY_TEXT)
def test_nothing_else_is_a_command(text: str) -> None:
    known = text[:1] == "/" and text.strip().lower() in {c.value for c in Command}
    assert (command_in(text) is not None) == known


# ----- what the gateway says itself


def test_status_tells_what_is_going_on() -> None:
    assert status_text(None, 0, 0) == "No answer is in progress. Messages waiting: 0."
    assert status_text("RUNNING", 3, 2) == "Working on it (attempt 3). Messages waiting: 2."


def test_p08_a_doubt_names_the_step() -> None:
    assert "'charge_card'" in in_doubt_text("charge_card")
