"""How a conversation looks to whoever reads standard output: `console` has two such faces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from .._messages import Delivery, HistoryItem

_CONTROLS: Final = {
    **{n: 0x2400 + n for n in range(32) if chr(n) not in "\n\t"},
    **dict.fromkeys(range(0x7F, 0xA0), 0xFFFD),
}
"""Control characters become pictures of themselves: nobody who writes a text commands the
terminal of whoever reads it."""


def visible(text: str) -> str:
    """`text` without power over a terminal."""
    return text.translate(_CONTROLS)


def remarks(delivery: Delivery, session: str) -> list[str]:
    """What there is to know about a text besides the text."""
    said: list[str] = []
    if delivery.session.name != session:
        said.append(f"in session {visible(delivery.session.name)}:")
    if delivery.repeat:
        said.append("this may be a repeat:")
    return said


class Face(Protocol):
    """How a conversation looks."""

    async def greet(self, history: Sequence[HistoryItem]) -> None:
        """Begin, with the end of the conversation so far."""
        ...

    async def heard(self, text: str) -> None:
        """A line has been read."""
        ...

    async def show(self, delivery: Delivery) -> None:
        """Show what was said."""
        ...

    async def complain(self, error: str) -> None:
        """Say that something was not taken."""
        ...

    async def end_of_input(self) -> None:
        """Nobody will say anything any more; answers may still come."""
        ...

    def progress(self, text: str) -> None:
        """Show what is being done; empty: nothing any more."""
        ...

    def wait_for(self, message: str) -> None:
        """An answer to this message is expected."""
        ...

    def wait_no_more(self, messages: Sequence[str]) -> None:
        """No more answers to these messages are expected."""
        ...

    def leave(self) -> None:
        """Clean up. Cannot wait."""
        ...
