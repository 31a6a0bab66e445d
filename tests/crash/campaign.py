"""A gateway process under load, killed again and again, and an exact account of what came out.

A campaign is a client that speaks `jsonl` to `trio-gateway run`. It does what a platform does: it
sends a message again until it is told that it was accepted, now and then once more after that, and
never sends a new one under an old id. It kills the process at random moments (in the load, at boot,
in the drain), starts it again, and at the end lets it finish and adds up.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM
from typing import Any, Final

import attrs

from trio_gateway.testing import check_invariants

AGENT: Final = """
import os
import random

import trio

from trio_gateway import StepInDoubt


def note(text):
    fd = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, text.encode() + b"\\n")
    os.close(fd)


async def look(id):
    await trio.sleep(random.random() * 0.01)
    return f"seen {id}"


async def shoot(id):
    note(f"shot {id}")
    await trio.sleep(random.random() * 0.01)
    return "hit"


async def agent(turn):
    id = turn.message.id
    note(f"began {turn.id} {turn.attempt}")
    if turn.text == "slow":
        await trio.sleep(random.random() * 0.1)
    if turn.text == "says":
        await turn.say(f"on it: {id}")
    if turn.text == "steps":
        assert await turn.step(look, id) == f"seen {id}"
        try:
            await turn.step(shoot, id, effect="unsafe")
        except StepInDoubt:
            return f"in doubt: {id}"
    return f"re: {id}"
"""

CONFIG: Final = """
[resume]
max_crashes = 100000

[drain]
grace = "300ms"
budget = "2s"
"""
"""Killed at random, an innocent turn may well be open at three crashes in a row."""

SESSIONS: Final = ("ada", "bob", "cy", "dan")
KINDS: Final = ("plain", "plain", "slow", "says", "steps")
OPEN_PER_SESSION: Final = 4
PATIENCE: Final = 60.0


@attrs.define
class Figures:
    """What a campaign counted."""

    kills: int = 0
    at_boot: int = 0
    in_load: int = 0
    in_drain: int = 0
    messages: int = 0
    sent_again: int = 0
    replies: int = 0
    repeats: int = 0
    resumed: int = 0
    in_doubt: int = 0
    seconds: float = 0.0


@attrs.define(eq=False)
class Campaign:
    """One store, one client, one process at a time."""

    folder: Path
    seed: int
    figures: Figures = attrs.field(factory=Figures)
    sent: dict[str, dict[str, str]] = attrs.field(factory=dict)
    accepted: set[str] = attrs.field(factory=set)
    finals: dict[str, str] = attrs.field(factory=dict)
    events: list[dict[str, Any]] = attrs.field(factory=list)
    news: threading.Condition = attrs.field(factory=threading.Condition)
    dice: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        (self.folder / "agent.py").write_text(textwrap.dedent(AGENT))
        (self.folder / "gateway.toml").write_text(CONFIG)

    @property
    def store(self) -> Path:
        return self.folder / "gateway.db"

    # ----- the whole

    def run(self, kills: int) -> Figures:
        """Kill that often, let it finish, check everything."""
        began = time.monotonic()
        for number in range(kills):
            self._life_with_death()
            if number % 10 == 0 and self.store.exists():
                check_invariants(self.store)
        self._last_life()
        self.figures.seconds = time.monotonic() - began
        (self.folder / "heard.jsonl").write_text("\n".join(map(json.dumps, self.events)))
        self._check()
        return self.figures

    # ----- one life

    def _life_with_death(self) -> None:
        mode = self.dice.choices(("boot", "load", "drain"), (2, 6, 2))[0]
        seen = len(self.events)
        with self._process() as process:
            reader = self._listen(process)
            self._greet(process)
            if mode == "boot":
                self._feed(process, self.dice.random() * 1.0)
            else:
                self._top_up(process)
                self._wait_for(lambda: len(self.events) > seen)
                self._feed(process, self.dice.random() * 0.3)
            if mode == "drain":
                process.send_signal(SIGTERM)
                time.sleep(self.dice.random() * 0.2)
            process.kill()
            reader.join(PATIENCE)
        self.figures.kills += 1
        self.figures.at_boot += mode == "boot"
        self.figures.in_load += mode == "load"
        self.figures.in_drain += mode == "drain"

    def _last_life(self) -> None:
        with self._process() as process:
            reader = self._listen(process)
            self._greet(process)
            self._wait_for(lambda: self.accepted >= self.sent.keys())
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(PATIENCE) == 0, self._log()
            reader.join(PATIENCE)

    def _process(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "trio_gateway", "run", "agent.py:agent", "--jsonl"]
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [*command, "--store", self.store.name],
                cwd=self.folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "EFFECTS": str(self.folder / "effects.txt")},
                start_new_session=True,
            )

    # ----- talking

    def _greet(self, process: subprocess.Popen[bytes]) -> None:
        """Send again what nobody acknowledged, in order, and now and then what somebody did."""
        for id, message in self.sent.items():
            known = id in self.accepted
            if not known or self.dice.random() < 0.02:
                self.figures.sent_again += 1
                self._write(process, message)

    def _feed(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        """Keep every session busy for so long."""
        deadline = time.monotonic() + seconds
        with self.news:
            while (left := deadline - time.monotonic()) > 0:
                self._top_up(process)
                self.news.wait(left)

    def _top_up(self, process: subprocess.Popen[bytes]) -> None:
        unanswered = [m for id, m in self.sent.items() if id not in self.finals]
        for session in SESSIONS:
            count = sum(message["session"] == session for message in unanswered)
            for _ in range(OPEN_PER_SESSION - count):
                id = f"m{len(self.sent)}"
                message = {"session": session, "id": id, "text": self.dice.choice(KINDS)}
                self.sent[id] = message
                self._write(process, message)

    def _write(self, process: subprocess.Popen[bytes], message: dict[str, str]) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()

    def _listen(self, process: subprocess.Popen[bytes]) -> threading.Thread:
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        return reader

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with self.news:
                self._hear(json.loads(line))
                self.news.notify_all()

    def _hear(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["event"] == "accepted":
            self.accepted.add(event["id"])
        elif event["event"] == "reply" and event["final"]:
            for id in event["in_reply_to"]:
                self.finals[id] = event["text"]

    def _wait_for(self, met: Callable[[], bool]) -> None:
        with self.news:
            assert self.news.wait_for(met, PATIENCE), f"never came\n{self._log()}"

    def _log(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")[-5000:]

    # ----- adding up

    def _check(self) -> None:
        check_invariants(self.store, settled=True)
        self._check_replies()
        self._check_order()
        self._check_effects()
        self.figures.messages = len(self.sent)

    def _check_replies(self) -> None:
        """Everything that was accepted is answered exactly once, by key; repeats say so."""
        assert not [e for e in self.events if e["event"] in ("refused", "error")]
        replies = [event for event in self.events if event["event"] == "reply"]
        first: dict[str, dict[str, Any]] = {}
        for reply in replies:
            before = first.setdefault(reply["key"], reply)
            assert before["text"] == reply["text"], f"{before} became {reply}"
            assert reply is before or reply["repeat"], f"doubled, and does not say so: {reply}"
        finals = [reply for reply in first.values() if reply["final"]]
        answers = Counter(id for reply in finals for id in reply["in_reply_to"])
        unanswered = self.sent.keys() - answers.keys()
        assert not unanswered, f"never answered: {unanswered}"
        assert answers.total() == len(self.sent), f"answered twice: {answers.most_common(3)}"
        for reply in finals:
            (id,) = reply["in_reply_to"]
            assert reply["text"] in (f"re: {id}", f"in doubt: {id}")
        self.figures.replies = len(first)
        self.figures.repeats = len(replies) - len(first)
        self.figures.in_doubt = sum(r["text"].startswith("in doubt") for r in finals)

    def _check_order(self) -> None:
        """Each session was answered in the order in which its messages were accepted."""
        finals: dict[str, list[str]] = {session: [] for session in SESSIONS}
        seen: set[str] = set()
        for event in self.events:
            if event["event"] == "reply" and event["final"] and event["key"] not in seen:
                seen.add(event["key"])
                finals[event["session"]] += event["in_reply_to"]
        for session, ids in finals.items():
            # This client sends a session's messages in order, and again in the same order.
            assert ids == [id for id, m in self.sent.items() if m["session"] == session]

    def _check_effects(self) -> None:
        """No attempt began twice; no unsafe step was done twice."""
        effects = Counter((self.folder / "effects.txt").read_text().splitlines())
        twice = [effect for effect, count in effects.items() if count > 1]
        assert not twice, twice
        began = [effect.split() for effect in effects if effect.startswith("began")]
        self.figures.resumed = sum(int(attempt) > 1 for _, _, attempt in began)
