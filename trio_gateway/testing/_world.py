"""What is still there when the process is gone: the store, and what the world outside got."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import attrs

from .. import Delivery
from ._memory import MemoryChannel


@attrs.frozen
class World:
    """A folder that outlives every process of a test: the store, and a record of what happened
    outside of it (cards charged, texts received), which no crash takes back."""

    folder: Path

    @property
    def store(self) -> Path:
        """Where the store is."""
        return self.folder / "gateway.db"

    def note(self, text: str) -> None:
        """Something happens in the world outside, for good: a card is charged, a letter is sent.

        Written at once, with one system call: it counts, even if the process dies on the next line.
        """
        _append(self.folder / "notes.jsonl", text)

    @property
    def notes(self) -> tuple[str, ...]:
        """What happened outside, in order, in all lives."""
        return tuple(_read(self.folder / "notes.jsonl"))

    def platform(
        self,
        name: str = "memory",
        *,
        idempotent: bool = True,
        text_limit: int | None = None,
        notices: bool = False,
    ) -> SurvivingChannel:
        """A channel whose platform is in this world: what arrived there is in `arrived`."""
        return SurvivingChannel(
            self.folder / f"arrived-{name}.jsonl",
            name,
            idempotent=idempotent,
            text_limit=text_limit,
            notices=notices,
        )

    def arrived(self, channel: str = "memory") -> tuple[Arrived, ...]:
        """Everything that the platform behind a channel was sent, repeats and all, in order."""
        return tuple(Arrived(**row) for row in _read(self.folder / f"arrived-{channel}.jsonl"))

    def shown(self, channel: str = "memory") -> tuple[Arrived, ...]:
        """What a platform that knows its keys shows of it: the first text under each key."""
        first: dict[str, Arrived] = {}
        for text in self.arrived(channel):
            first.setdefault(text.key, text)
        return tuple(first.values())


@attrs.frozen(kw_only=True)
class Arrived:
    """One text that a platform was sent; see `Delivery`."""

    session: str
    key: str
    text: str
    in_reply_to: list[str]
    attempt: int
    final: bool
    repeat: bool
    kind: str


class SurvivingChannel(MemoryChannel):
    """A `MemoryChannel` whose platform outlives the process; made by `World.platform`."""

    def __init__(self, record: Path, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        self._record = record

    async def send(self, delivery: Delivery) -> None:
        """See `Channel.send`."""
        await super().send(delivery)
        _append(
            self._record,
            {
                "session": delivery.session.name,
                "key": delivery.key,
                "text": delivery.text,
                "in_reply_to": list(delivery.in_reply_to),
                "attempt": delivery.attempt,
                "final": delivery.final,
                "repeat": delivery.repeat,
                "kind": str(delivery.kind),
            },
        )


def _append(path: Path, value: object) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, json.dumps(value).encode() + b"\n")
    finally:
        os.close(fd)


def _read(path: Path) -> list[Any]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
