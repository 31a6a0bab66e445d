"""Channels: the adapters between a chat platform and the gateway. The contract, for whoever writes
one; `testing.check_channel` holds an implementation to it.

A channel is one object with one long-lived method and one short one:

    serve()   connects, calls `task_status.started()`, hands messages to the inbox, and runs until
              it is cancelled. Returning means: there is no more input, but `send` still works.
              Raising means: the connection is gone; the gateway waits (with backoff) and calls
              `serve` again. What it owns (sockets, clients) lives inside this call.
    send()    delivers one text to one session, while `serve` is connected (or has returned).

Acknowledge to the platform only after `accept` returned, and hand it the cursor (poll offset, sync
token) that covers the messages, so that both are one transaction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import trio

from .._messages import Delivery, Intake

if TYPE_CHECKING:
    from .._gateway import Gateway


class Channel(ABC):
    """One chat platform. Subclass it, and pass instances to `open_gateway`.

    Class attributes that a subclass may set:

    `name`        how sessions of this channel are called: small letters, digits, `_`, `-`.
    `idempotent`  whether the platform recognises a repeated send by `delivery.key`, and shows it
                  once. Where it does not, a repeat whose first outcome is unknown is labelled
                  (`delivery.repeat`).
    `text_limit`  the longest text that one send takes, measured by `text_length`; None: any.
    `shows_work`  whether it shows by itself that a turn is at work, from the message on; it is then
                  told the end of every turn by `progress(session, "")`, not only of those that
                  showed progress.
    `pulled`      whether its readers fetch what is said from the store, by their place in the
                  session's journal, and so miss nothing: a reply has arrived when it is committed,
                  and `send` is not asked for it.
    `notices`     whether the people behind it want news of the gateway itself (restarts).
    """

    name: str = ""
    idempotent: bool = False
    text_limit: int | None = None
    notices: bool = True
    shows_work: bool = False
    pulled: bool = False

    def attach(self, gateway: Gateway) -> None:  # noqa: B027 - optional, not forgotten
        """Called once, before the gateway lives, with the gateway that has this channel: for one
        that also shows the gateway itself."""

    @abstractmethod
    async def serve(self, intake: Intake, *, task_status: trio.TaskStatus[None]) -> None:
        """Connect, report `task_status.started()`, and hand in messages until cancelled."""

    @abstractmethod
    async def send(self, delivery: Delivery) -> None:
        """Deliver one text. Return when the platform has it.

        Called for one delivery of a session at a time, in order; for different sessions at once.
        Raises `RetryLater(after)` when the platform asks to wait, `Undeliverable` when it never
        will arrive. Any other exception means: outcome unknown, to be tried again. Cancelled when
        it takes longer than `delivery.timeout`, and when the gateway leaves.
        """

    def progress(self, session: str, text: str) -> None:  # noqa: B027 - optional, not forgotten
        """Show what a turn is doing: `text` replaces what was shown before. Must not block, may
        drop it. An empty text means: the turn has ended, show nothing any more."""

    def text_length(self, text: str) -> int:
        """How the platform counts the length of a text; characters, unless overridden."""
        return len(text)


__all__ = ["Channel"]
