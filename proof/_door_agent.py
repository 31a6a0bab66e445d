"""The agent behind the HTTP door: does what the text of a message says, and notes every attempt and
every effect in a file, where no crash takes it back."""

from __future__ import annotations

from typing import Final

AGENT: Final = '''
import os
import random
from pathlib import Path

import trio

from trio_gateway import StepInDoubt
from trio_gateway.agents import ProcessAgent

NOTES = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
FOLDER = str(Path.cwd())
child = ProcessAgent(["sh", "child.sh"], extra_env={"DOOR_OF": FOLDER}, grace=0.5)


def note(*words):
    os.write(NOTES, " ".join(map(str, words)).encode() + b"\\n")


async def look(tag):
    await trio.sleep(random.random() * 0.01)
    return f"seen {tag}"


async def shoot(tag):
    note("shot", tag)
    await trio.sleep(random.random() * 0.01)
    return "hit"


async def write(turn):
    """A reply that grows; always the same one."""
    text = f"re: {turn.text}"
    for n in range(12):
        turn.progress(text, draft=True)
        await trio.sleep(random.random() * 0.02)
        text += f" word {n}."
    return text


async def agent(turn):
    note("began", turn.id, turn.attempt)
    kind, _, tag = turn.text.partition(" ")
    if kind == "slow":
        await trio.sleep(random.random() * 0.1)
    if kind == "nap":
        await trio.sleep(random.random())
    if kind == "says":
        await turn.say(f"on it: {tag}")
        await trio.sleep(random.random() * 0.02)
        await turn.say(f"nearly: {tag}")
    if kind == "writes":
        return await write(turn)
    if kind == "fails":
        raise RuntimeError(f"failed: {tag}")
    if kind == "child":
        return await child(turn)
    if kind == "waits":  # until somebody opens the gate
        while not Path(f"gate-{tag}").exists():
            await trio.sleep(0.02)
    if kind == "steps":
        assert await turn.step(look, tag) == f"seen {tag}"
        try:
            await turn.step(shoot, tag, effect="unsafe")
        except StepInDoubt:
            return f"in doubt: {turn.text}"
    return f"re: {turn.text}"
'''

CHILD: Final = r"""
read -r turn
text=${turn##*'"text":"'}
text=${text%%'"'*}
case "$turn" in
*'"resumed":null'*) [ -e be-quick ] || sleep 600 ;;
esac
printf '{"event":"reply","text":"re: %s"}\n' "$text"
"""
"""A program that does not end by itself in its first attempt: the process is killed above it."""
