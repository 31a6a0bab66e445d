"""What the code of strangers (agents, channels, hooks) raises, and whose it is."""

from __future__ import annotations

import math

import trio

from ._errors import parted, unwrap


def theirs(error: BaseException) -> BaseException:
    """What the code of a stranger raised; `sys.exit()` is a failure of it like any other.

    Raises what is none of its own: the cancellation of whoever called it, an interrupt from the
    keyboard, the end of all coroutines.
    """
    cancelled, _ = parted(error, trio.Cancelled)
    if cancelled is not None and is_being_cancelled():
        raise cancelled
    for kind in (KeyboardInterrupt, GeneratorExit):
        found, _ = parted(error, kind)
        if found is not None:
            raise found
    return unwrap(error)


def is_being_cancelled() -> bool:
    """Whether the calling task is being cancelled.

    If it is not, a `Cancelled` that a stranger raises belongs to nobody: somebody has kept that of
    a call which was cancelled long ago (a cache of outcomes, say). Let through, it would cancel
    everything up to the next scope that it does not belong to, and say nothing.
    """
    return trio.current_effective_deadline() == -math.inf
