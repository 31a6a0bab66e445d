"""examples/approval.py: a question holds nothing, and what it is about is done once, in spite of
kills."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from processes import launch
from test_examples import EXAMPLES, PATIENCE, environment

from trio_gateway.store import read_store

APPROVING = f"""
import runpy
agent = runpy.run_path({str(EXAMPLES / "approval.py")!r})["agent"]
"""
ONE_SLOT = {"TRIO_GATEWAY_LIMITS__TURNS": "1", "BANK_PACE": "0"}
"""With a single slot, a question that held one would keep everybody waiting."""


def booked(where: Path) -> list[str]:
    """What the bank has booked, without the keys."""
    book = where / "bank.log"
    return (
        [line.partition(" ")[2] for line in book.read_text().splitlines()] if book.exists() else []
    )


def ask_for_500(where: Path) -> int:
    """Order a payment that has to be asked about, and be killed over the question: its number."""
    with launch(where, APPROVING, env=environment(**ONE_SLOT)) as gateway:
        gateway.send("ada", "m1", "pay 500 to bob")
        asked = gateway.expect("reply", session="ada", final=True)
        found = re.fullmatch(r'Number (\d+): .* Answer "yes \1" or "no \1"\.', asked["text"])
        assert found
        # The question holds nothing: bob is served, in the one slot that there is.
        gateway.send("bob", "m2", "pay 20 to ada")
        gateway.expect("reply", session="bob", final=True)
        gateway.kill()
    assert booked(where) == ["20 ada"]
    return int(found[1])


def test_approval_is_waited_for_by_nobody_and_paid_once_through_two_kills(tmp_path: Path) -> None:
    number = ask_for_500(tmp_path)
    with closing(read_store(tmp_path / "gateway.db")) as reader:
        assert reader.open_turns() == ()

    with launch(tmp_path, APPROVING, env=environment(**(ONE_SLOT | {"BANK_PACE": "60"}))) as second:
        second.send("ada", "m3", f"Yes {number}")
        wait_until(lambda: booked(tmp_path) == ["20 ada", "500 bob"])
        second.kill()

    with launch(tmp_path, APPROVING, env=environment(**ONE_SLOT)) as third:
        paid = third.expect("reply", session="ada", final=True, in_reply_to=["m3"])
        assert paid["text"] == f"Number {number} is paid: 500 to bob."
        assert paid["attempt"] == 2
        third.send("ada", "m4", f"yes {number}")
        again = third.expect("reply", session="ada", final=True, in_reply_to=["m4"])
        assert again["text"] == f"That is decided. Number {number} is paid: 500 to bob."
        assert third.stop() == 0

    assert booked(tmp_path) == ["20 ada", "500 bob"]


@pytest.mark.parametrize(
    ("answer", "days", "said"),
    [
        ("no {}", "7", "Number {} is refused; nothing is paid."),
        ("yes {}", "0", "Number {} is too old; nothing is paid. Order it again."),
        ("yes 9{}", "7", "There is no question with the number 9{}."),
    ],
)
def test_approval_that_is_not_given_pays_nothing(
    tmp_path: Path, answer: str, days: str, said: str
) -> None:
    number = ask_for_500(tmp_path)

    given = environment(**ONE_SLOT, APPROVAL_DAYS=days)
    with launch(tmp_path, APPROVING, env=given) as second:
        second.send("ada", "m3", answer.format(number))
        reply = second.expect("reply", session="ada", final=True, in_reply_to=["m3"])
        assert reply["text"] == said.format(number)
        # Another person's question is not theirs to answer.
        second.send("bob", "m4", f"yes {number}")
        reply = second.expect("reply", session="bob", final=True, in_reply_to=["m4"])
        assert reply["text"] == f"There is no question with the number {number}."

    assert booked(tmp_path) == ["20 ada"]


def wait_until(true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
