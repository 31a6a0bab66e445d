"""What one gateway can be told, in the types that the code works with; see `_config` for files."""

from __future__ import annotations

from datetime import timedelta

import attrs

from ._policy import Busy, DeliveryRules, Limits, ResumeRules


@attrs.frozen(kw_only=True)
class Settings:
    """How a gateway behaves. Every field has a default that suits a bot on one machine."""

    limits: Limits = attrs.field(factory=Limits)
    busy: Busy = Busy.QUEUE
    """What happens to a message that arrives during a turn of its session."""
    time_limit: float | None = None
    """Seconds that one attempt of a turn may take; then it ends FAILED. None: no limit."""
    resume: ResumeRules = attrs.field(factory=ResumeRules)
    delivery: DeliveryRules = attrs.field(factory=DeliveryRules)
    grace: float | None = None
    """Seconds that open turns get to settle at a stop; see `plan_stop` for None."""
    budget: float | None = None
    """Seconds that a whole stop may take; see `plan_stop` for None."""
    keep: timedelta = timedelta(days=90)
    """How long the texts of settled messages are kept."""
    remember: timedelta = timedelta(days=400)
    """How long their ids are kept, to recognise them when they are sent again."""
    commands: bool = True
    """Whether /stop, /new, /retry, /status and /help are words to the gateway."""
    notices: bool = True
    """Whether people are told that the gateway restarts, on channels that want it."""
