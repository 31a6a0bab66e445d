"""How what a running gateway tells of itself is shown: facts, tables, one line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from ._config import format_duration
from ._views import Listing, cell, moment, short

Told = Mapping[str, Any]

_WORDS: Final = (
    ("running", "turns running"),
    ("resume_pending", "turns to resume"),
    ("waiting", "messages waiting"),
    ("undelivered", "replies on their way"),
    ("quarantined", "turns in quarantine"),
    ("dead_letters", "dead letters"),
)


def span(seconds: float) -> str:
    """A stretch of time as people read it: `4s`, `3m 20s`, `2h 5m`, `3d 4h`."""
    whole = max(0, int(seconds))
    for size, unit, small_size, small in (
        (86_400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // small_size}{small}"
    return f"{whole}s"


def duration(seconds: float) -> str:
    """Seconds as a duration of the configuration."""
    return format_duration(timedelta(milliseconds=round(seconds * 1000)))


def when(text: str | None) -> datetime | None:
    """A time out of an answer."""
    try:
        return None if text is None else datetime.fromisoformat(text)
    except ValueError:
        return None


def state_line(told: Told) -> str:
    """What goes on, in one line."""
    stop = told.get("stop")
    if stop is not None:
        left = f"at most {span(stop['left'])} left"
        return f"{told['state']} ({stop['reason']}): {_fates(stop)}{left}; by {cell(stop['by'])}"
    if told.get("paused"):
        return f"{told['state']}, paused by {cell(told.get('paused_by') or 'somebody')}"
    return str(told["state"])


def _fates(stop: Told) -> str:
    if stop.get("marked") is None:
        return ""
    told = f"{stop['marked']} turns marked, {stop['settled']} settled"
    more = f", {stop['interrupted']} to resume" if stop["interrupted"] else ""
    return f"{told}{more}; "


def status_facts(told: Told) -> Iterator[tuple[str, object]]:
    """Everything that a status tells, name and value."""
    yield "gateway", f"process {told['pid']}, version {told['version']}, epoch {told['epoch']}"
    yield "since", f"{moment(when(told['since']))} ({span(told['up_for'])})"
    yield "store", told["store"]
    yield "channels", ", ".join(told["channels"]) or "none"
    yield "supervisor", told["supervisor"] or "none that is known"
    yield "state", state_line(told)
    for reason in told.get("not_ready", ()):
        yield "not ready", reason
    for name, words in _WORDS:
        yield words, told["stored"].get(name, 0)
    for change in told["needs_restart"]:
        yield "needs a restart", change


def turns(rows: Sequence[Told]) -> Listing:
    """Open turns, the oldest first."""
    return Listing(
        columns=("turn", "session", "attempt", "age", "marker", "step"),
        rows=tuple(
            (
                cell(row["turn"]),
                cell(row["session"]),
                cell(row["attempt"]),
                "-" if row["running_for"] is None else span(row["running_for"]),
                cell(f"{row['marker']} ({row['reason']})" if row["reason"] else row["marker"]),
                short(row["step"], 40),
            )
            for row in rows
        ),
        empty="no turn is open",
    )


def inbox(rows: Sequence[Told]) -> Listing:
    """Messages that wait, the oldest first."""
    return Listing(
        columns=("accepted", "session", "message", "text"),
        rows=tuple(
            (
                moment(when(row["accepted_at"])),
                cell(row["session"]),
                short(row["id"], 24),
                short(row["text"], 40),
            )
            for row in rows
        ),
        empty="no message waits",
    )


def outbox(rows: Sequence[Told]) -> Listing:
    """Deliveries on their way, the oldest first."""
    return Listing(
        columns=("said", "session", "tries", "next try", "error"),
        rows=tuple(
            (
                moment(when(row["created_at"])),
                cell(row["session"]),
                cell(row["tries"]),
                moment(when(row["not_before"])),
                short(row["error"], 40),
            )
            for row in rows
        ),
        empty="no reply is on its way",
    )


def reloaded(told: Told) -> Iterator[str]:
    """What a reload came to."""
    for change in told["changed"]:
        yield f"changed: {cell(change)}"
    for change in told["needs_restart"]:
        yield f"not yet: {cell(change)}"
    for warning in told["warnings"]:
        yield f"warning: {cell(warning)}"
    if not told["changed"] and not told["needs_restart"]:
        yield f"{cell(told['file'] or 'no gateway.toml')}: nothing has changed"
