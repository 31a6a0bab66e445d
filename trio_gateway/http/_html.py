"""Pages as text. Every value is escaped by the templates; what people wrote is set apart from the
rest of its line, so that no character in it can turn the line around."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import Response

from .._errors import escape
from .._messages import SessionKey

HEADERS: Final[Mapping[str, str]] = {
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        " img-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Not "no-referrer": with that, browsers send "Origin: null" with our own forms.
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}

SHORT: Final = 160
"""Characters of a text in a table; the message's own page has all of it."""

_OVERRIDES: Final = re.compile("[\u202a-\u202e]")

_TONES: Final[Mapping[str, str]] = {
    "serving": "good",
    "answered": "good",
    "COMPLETED": "good",
    "settled": "good",
    "delivered": "good",
    "RUNNING": "busy",
    "running": "busy",
    "open": "busy",
    "failed": "bad",
    "FAILED": "bad",
    "quarantined": "bad",
    "QUARANTINED": "bad",
    "expired": "bad",
    "EXPIRED": "bad",
    "dead": "bad",
    "idle": "calm",
}


def page(template: str, status: int = 200, **values: Any) -> Response:
    """A whole page as a response."""
    return Response(render(template, **values), status, HEADERS, media_type="text/html")


def render(template: str, **values: Any) -> str:
    """A template as HTML. A text that is no Unicode is shown as far as it is."""
    html = _ENVIRONMENT.get_template(template).render(values, now=datetime.now(UTC))
    return html.encode("utf-8", "replace").decode()


# ----- what templates say


def ago(at: datetime | None) -> Markup:
    """How long ago, with the time itself behind it."""
    if at is None:
        return Markup("&ndash;")
    exact = at.astimezone(UTC)
    seconds = (datetime.now(UTC) - exact).total_seconds()
    return Markup('<time datetime="{}" title="{}" data-{}>{}</time>').format(
        exact.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        exact.strftime("%Y-%m-%d %H:%M:%S UTC"),
        "until" if seconds < -1 else "ago",
        f"in {span(-seconds)}" if seconds < -1 else f"{span(seconds)} ago",
    )


def span(seconds: float) -> str:
    """A length of time for people: 12 s, 3 min, 5 h, 2 d."""
    whole = max(0, int(seconds))
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if whole >= size:
            return f"{whole // size} {unit}"
    return f"{whole} s"


def exactly(at: datetime) -> Markup:
    """A time, to the millisecond."""
    exact = at.astimezone(UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        exact.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        f"{exact:%Y-%m-%d %H:%M:%S}.{exact.microsecond // 1000:03d}",
    )


def name(text: object) -> Markup:
    """A name, an id or an error: on one line, with nothing in it that is not seen."""
    return Markup("<bdi>{}</bdi>").format(escape(str(text)))


def line(text: object) -> str:
    """The same where no markup can be: in a title, in an attribute."""
    return escape(str(text))


def short(text: str | None) -> Markup:
    """The beginning of a text, on one line."""
    if text is None:
        return Markup('<em class="muted">forgotten, or cannot be read</em>')
    line = escape(" ".join(text[: SHORT * 4].split()))
    return Markup("<bdi>{}</bdi>").format(line if len(line) <= SHORT else line[: SHORT - 1] + "…")


def said(text: str) -> str:
    """What somebody said, as it is; but for orders that would show it in another order."""
    return _OVERRIDES.sub(lambda found: escape(found[0]), text)


def tone(state: str) -> str:
    """What a state feels like, as a class of the style sheet."""
    return _TONES.get(state, "wait")


def session_url(session: SessionKey) -> str:
    """Where a session is looked at."""
    return f"/sessions/{quote(str(session), safe=':', errors='replace')}"


def message_url(message_id: str) -> str:
    """Where a message is looked at. Browsers take a path of dots for something else."""
    if set(message_id) <= {"."}:
        return f"/messages?id={message_id}"
    return f"/messages/{quote(message_id, safe=':', errors='replace')}"


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader(__package__ or "", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= {"ago": ago, "exactly": exactly, "name": name, "line": line}
    made.filters |= {"short": short, "said": said, "tone": tone}
    made.filters |= {"session_url": session_url, "message_url": message_url, "span": span}
    return made


_ENVIRONMENT: Final = _environment()
