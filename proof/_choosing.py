"""Hypothesis chooses the moves of `machine`: one rule for each kind, one example for each story.

Hypothesis is asked for its way of choosing only (among what is possible, and with some kinds left
out of each story, so that the others come up more often). It is not asked to make a failing story
shorter: leaving out moves, which is most of it, is done faster on the moves themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import attrs
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.reporting import with_reporter
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ._moves import KINDS, SETTINGS, Choices, Kind, Move, Story
from ._spread import Tally

# Their arguments are known only when they are made.
_RULE: Final = cast("Any", rule)
_INITIALIZE: Final = cast("Any", initialize)


@attrs.define(eq=False)
class _Audience:
    """Whom the stories are told: counts them, until the first that breaks."""

    tally: Tally
    moves: int
    broken: list[Move] | None = None

    def hear(self, story: Story) -> None:
        """A story has come to its end."""
        if self.broken is None:
            model, tally = story.world.model, self.tally
            # Hypothesis looks around with a few short ones first.
            tally.count(**{"examples" if story.moves >= self.moves else "short_examples": 1})
            tally.count(moves=story.moves, moves_that_did_something=story.acted)
            tally.count(**story.world.figures, **model.figures)
            tally.saw(*[state for state, count in model.seen.items() if count])


class _Chooser(RuleBasedStateMachine):
    """One story. Its rules are added below."""

    def __init__(self, audience: _Audience) -> None:
        super().__init__()
        self.audience = audience
        self.story: Story | None = None
        self.is_over = False

    def begin(self, **chosen: Any) -> None:
        """What kind of gateway it is."""
        self.story = Story(chosen)
        self._watch(self.story.begin)

    def play(self, name: str, arguments: dict[str, Any]) -> None:
        """Make a move; after the last one, everything comes to its end."""
        story = self.story
        assert story is not None
        self._watch(lambda: story.play(name, arguments))
        if story.moves >= self.audience.moves:
            self._end(story)

    def _end(self, story: Story) -> None:
        self.is_over = True
        self._watch(story.end)
        self.audience.hear(story)

    def _watch(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            if self.audience.broken is None and self.story is not None:
                self.audience.broken = self.story.told
            raise

    def teardown(self) -> None:
        """Leave nothing behind."""
        if self.story is None:
            return
        try:
            if not self.is_over and sys.exc_info()[0] is None:
                self._end(self.story)
        finally:
            self.story.close()


def _strategies(choices: Choices) -> dict[str, st.SearchStrategy[Any]]:
    return {name: st.sampled_from(_listed(values)) for name, values in choices.items()}


def _listed(values: Sequence[Any]) -> Sequence[Any]:
    return values if isinstance(values, range) else list(values)


def _rule(label: str, name: str, kind: Kind) -> Any:
    def play(self: _Chooser, **arguments: Any) -> None:
        self.play(name, arguments)

    def possible(self: _Chooser) -> bool:
        return not self.is_over and self.story is not None and kind.possible(self.story)

    play.__name__ = label
    return precondition(possible)(_RULE(**_strategies(kind.choices))(play))


def _machine() -> Any:
    rules = {
        label: _rule(label, name, kind)
        for name, kind in KINDS.items()
        for label in (f"{name}_{number}" for number in range(kind.weight))
    }
    begin = _INITIALIZE(**_strategies(SETTINGS))(_Chooser.begin)
    return type("Chooser", (_Chooser,), {**rules, "begin": begin})


_MACHINE: Final = _machine()


def explore(tally: Tally, seed: int, examples: int, moves: int) -> list[Move] | None:
    """Play so many stories of so many moves: the first that breaks, if any does."""
    audience = _Audience(tally, moves)

    @seeded(seed)
    def chooser() -> Any:
        return _MACHINE(audience)

    try:
        with with_reporter(lambda _: None):
            run_state_machine_as_test(chooser, settings=_settings(examples, moves))  # type: ignore[arg-type]
    except Exception:
        if audience.broken is None:
            raise
    return audience.broken


def _settings(examples: int, moves: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=moves + 1,  # with its beginning
        phases=[Phase.generate],
        suppress_health_check=cast("list[HealthCheck]", list(HealthCheck)),
        report_multiple_bugs=False,
        deadline=None,
        database=None,
    )
