"""The marker's table and its invariants, without a store."""

from __future__ import annotations

from itertools import product

import attrs
import pytest

from trio_gateway._markers import (
    ENDED_BY,
    ENDS,
    OPEN,
    TRANSITIONS,
    Action,
    IllegalTransition,
    Marker,
    ResumeReason,
    TurnState,
    advance,
    begin,
    progressed,
)

PENDING = TurnState.RESUME_PENDING


def marker(
    state: TurnState, *, attempt: int = 3, crashes: int = 2, interruptions: int = 4
) -> Marker:
    """A marker in a state, with everything in it that a state can have."""
    return Marker(
        state,
        attempt,
        ResumeReason.SHUTDOWN if state is PENDING else None,
        crashes,
        interruptions,
    )


def reason_for(action: Action) -> ResumeReason | None:
    return ResumeReason.RESTART if action is Action.MARK else None


@pytest.mark.parametrize(("state", "action"), list(product(TurnState, Action)))
def test_every_pair_is_in_the_table_or_illegal(state: TurnState, action: Action) -> None:
    if (state, action) in TRANSITIONS:
        after = advance(marker(state), action, reason_for(action))
        assert after.state is TRANSITIONS[state, action]
    else:
        with pytest.raises(IllegalTransition, match=f"{state} has no {action}"):
            advance(marker(state), action, reason_for(action))


def test_nothing_leads_to_a_first_attempt_but_begin() -> None:
    assert [key for key in TRANSITIONS if key[0] is None] == [(None, Action.BEGIN)]
    assert [key for key in TRANSITIONS if key[1] is Action.BEGIN] == [(None, Action.BEGIN)]
    assert begin() == Marker(TurnState.RUNNING, attempt=1)


def test_the_drawing_and_the_table_have_the_same_arrows() -> None:
    to_ends = {Action.COMPLETE, Action.FAIL, Action.STOP}
    out_of = {state: {a for s, a in TRANSITIONS if s is state} for state in TurnState}
    assert out_of[TurnState.RUNNING] == {Action.MARK, *to_ends}
    assert out_of[PENDING] == {Action.RESUME, Action.QUARANTINE, Action.EXPIRE, *to_ends}


def test_open_and_ended_states_are_all_states_and_every_end_has_its_action() -> None:
    assert set(TurnState) == OPEN | ENDS
    assert not OPEN & ENDS
    assert ENDED_BY.keys() == ENDS
    for end, action in ENDED_BY.items():
        assert TRANSITIONS[PENDING, action] is end


# ----- the invariants, by their numbers


def test_i1_only_resume_adds_an_attempt() -> None:
    for state, action in TRANSITIONS:
        if state is not None:
            after = advance(marker(state), action, reason_for(action))
            assert after.attempt == 3 + (action is Action.RESUME)


@pytest.mark.parametrize("reason", ResumeReason)
def test_i2_i3_p09_a_crash_is_charged_and_a_planned_stop_is_not(reason: ResumeReason) -> None:
    after = advance(marker(TurnState.RUNNING), Action.MARK, reason)
    charged = reason is ResumeReason.CRASH
    assert (after.crashes, after.interruptions) == (2 + charged, 4 + (not charged))
    assert reason.planned is not charged


def test_i2_i3_nothing_else_counts() -> None:
    for state, action in TRANSITIONS:
        if state is not None and action is not Action.MARK:
            after = advance(marker(state), action)
            assert (after.crashes, after.interruptions) == (2, 4)


@pytest.mark.parametrize("state", TurnState)
def test_i3_progress_forgives_interruptions_and_no_crash(state: TurnState) -> None:
    if state in ENDS:
        with pytest.raises(IllegalTransition):
            progressed(marker(state))
    else:
        assert progressed(marker(state)) == attrs.evolve(marker(state), interruptions=0)


@pytest.mark.parametrize(("state", "action"), list(product(sorted(ENDS), Action)))
def test_i4_p10_an_end_has_no_way_out(state: TurnState, action: Action) -> None:
    assert (state, action) not in TRANSITIONS


@pytest.mark.parametrize("state", TurnState)
def test_i5_a_reason_is_there_exactly_while_resume_is_pending(state: TurnState) -> None:
    wrong = None if state is PENDING else ResumeReason.CRASH
    with pytest.raises(IllegalTransition, match="I5"):
        Marker(state, reason=wrong)


def test_i5_mark_needs_a_reason_and_nothing_else_takes_one() -> None:
    with pytest.raises(IllegalTransition):
        advance(begin(), Action.MARK)
    for action in (Action.COMPLETE, Action.FAIL, Action.STOP):
        with pytest.raises(IllegalTransition):
            advance(begin(), action, ResumeReason.CRASH)


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[None, Action.BEGIN] = TurnState.FAILED  # type: ignore[index]
