"""One gateway on a machine that runs out of something: what a scenario has at hand, and how it
ends.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Final

import attrs

from ._platform import Platform, rows
from ._process import Process, started
from ._report import Size

EXTRA: Final = '''

_notes = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(text):
    """Into a file that is open already: there may be no other."""
    os.write(_notes, text.encode() + b"\\n")


def eat(room):
    hoard = []
    while True:
        hoard.append(b"x" * room)


async def hoard(seconds):
    pieces = []
    try:
        for room in (1 << 20, 1 << 16, 1 << 10):
            try:
                while True:
                    pieces.append(b"x" * room)
            except MemoryError:
                pass
        await trio.sleep(seconds)
    finally:
        pieces.clear()
    raise MemoryError


_ordinary = agent


async def agent(turn):
    kind, _, more = turn.text.partition(" ")
    if kind == "eat" and turn.attempt <= int(more):
        note(f"began {turn.id} {turn.attempt} {turn.resumed.reason if turn.resumed else 'fresh'}")
        eat(4 << 20)
    if kind == "hoard" and turn.resumed is None:
        note(f"began {turn.id} {turn.attempt} fresh")
        await hoard(float(more))
    if kind == "opens":  # expects that it soon cannot, and keeps all there is while it works
        held = []
        try:
            while len(held) < 20:
                held.append(os.open(os.devnull, os.O_RDONLY))
            raise AssertionError("could open 20 files")
        except OSError:
            return await _ordinary(turn)
        finally:
            for fd in held:
                os.close(fd)
    return await _ordinary(turn)
'''
"""Besides what `AGENT` can do: eat all memory in the first so many attempts; hoard all that there
is, so that nobody finds any for so long, and fall over it."""

KINDS: Final = ("plain", "plain", "slow", "says", "steps")


@attrs.define
class Scene:
    """One scenario under way: a store, its platform, and what was seen."""

    folder: Path
    size: Size
    dice: random.Random
    platform: Platform
    figures: Counter[str] = attrs.field(factory=Counter[str])
    seen: list[str] = attrs.field(factory=list[str])
    excused: dict[str, str] = attrs.field(factory=dict[str, str])

    def feed(self, gateway: Process, count: int, *, apart: bool = False) -> None:
        """Send messages of all kinds; `apart`: each in a session of its own, where some may be
        refused and others not, so that no order is at stake."""
        for _ in range(count):
            name = f"apart-{len(self.platform.sent)}" if apart else f"s{self.dice.randrange(20)}"
            gateway.send(self.platform.new(name, self.dice.choice(KINDS)))

    def open_long_turns(self, gateway: Process, count: int, text: str = "long") -> None:
        """Let turns begin that do not end by themselves in their first attempt."""
        before = set(self.platform.sent)
        for number in range(count):
            gateway.send(self.platform.new(f"{text}-{len(before)}-{number}", text))
        new = self.platform.sent.keys() - before
        self.platform.wait_for(lambda: self.platform.accepted >= new, "acceptance of long turns")

    def heard(self, event: str, text: str, since: int = 0) -> bool:
        """Whether the gateway has said so, since that many events."""
        return any(
            e["event"] == event and text in e.get("error", "") for e in self.platform.events[since:]
        )

    def excuse(self, id: str, text: str) -> None:
        """This message is to be answered with an apology that says so."""
        self.excused[id] = text

    def finish(self) -> None:
        """A last life, on a machine that has everything, and the account."""
        with started(self.platform) as gateway:
            self.platform.wait_accepted()
            gateway.end_input()
            code = gateway.wait()
            assert code == 0, f"the last life left with {code}\n{gateway.story}"
        for id, text in self.excused.items():
            (said,) = self._take_out(id)
            assert text in said, f"{id} is told {said!r}"
        self.figures.update(self.platform.account(forgiving=True))

    def _take_out(self, id: str) -> set[str]:
        """What a message was answered with; the account then goes without it."""
        events = self.platform.events
        replies = [e for e in events if e["event"] == "reply" and id in e["in_reply_to"]]
        self.platform.events[:] = [e for e in events if e not in replies]
        del self.platform.sent[id]
        return {reply["text"] for reply in replies}

    def state_of(self, id: str) -> str:
        """How a message stands in the store."""
        ((state,),) = rows(self.platform.store, "SELECT state FROM message WHERE id = ?", id)
        return str(state)
