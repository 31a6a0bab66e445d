"""An agent that asks a person first, and waits for days without holding anything.

Try:

    trio-gateway run examples/approval.py:agent

and write "pay 20 to bob": that is little, and is paid at once. On "pay 500 to bob" it asks you. Now
kill it, have a weekend, start it again, and write "yes 2" (the number that it said). Or kill it
while it pays: it goes on, and the bank's book (`bank.log`, in the folder that you are in) has the
payment once.

A question ends the turn: with that it is on disk and delivered, and neither a slot nor a task nor a
process waits for the answer. The answer, whenever it comes, is a turn of its own, which finds the
question in the history of the conversation. So nothing is kept anywhere else, and what the agent
has asked and what it can be told are the same thing. `/new` begins a new conversation, and voids
what is open in the old one.

BANK_PACE is how many seconds the bank takes (1 by default), APPROVAL_DAYS how long an answer may
take (7).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import attrs

from trio_gateway import HistoryItem, Turn

LITTLE = 100
"""What is paid without asking anybody."""
LINES = 1000
"""How far back a question is looked for, in lines of the conversation."""
WITHIN = timedelta(days=float(os.environ.get("APPROVAL_DAYS", "7")))
PACE = float(os.environ.get("BANK_PACE", "1"))
BANK = Path("bank.log")

ORDER = re.compile(r"pay (\d{1,9}) to (\w{1,40})")
ANSWER = re.compile(r"(yes|no) (\d{1,9})", re.IGNORECASE)
ASKED = re.compile(r"Number (\d+): shall I pay (\d+) to (\w+)\?")
HELP = 'Write "pay 20 to bob", or answer what I have asked.'


@attrs.frozen
class Payment:
    """What is to be paid. `number` is that of the turn in which it was ordered."""

    number: int
    amount: int
    payee: str
    asked: datetime | None = None


def pay(key: str, amount: int, payee: str) -> None:
    """The bank. It books a payment once for each key, however often it is asked."""
    booked = BANK.read_text().splitlines() if BANK.exists() else []
    if not any(line.startswith(f"{key} ") for line in booked):
        with BANK.open("a") as book:
            book.write(f"{key} {amount} {payee}\n")
    time.sleep(PACE)  # it takes its time to say that it has done so


def now() -> str:
    """What time it is. A step, so that a turn that resumes does not think otherwise."""
    return datetime.now(UTC).isoformat()


async def agent(turn: Turn) -> str:
    """Take an order, or an answer."""
    text = turn.text.strip()
    if order := ORDER.fullmatch(text):
        return await take_order(turn, Payment(turn.id, int(order[1]), order[2]))
    if answer := ANSWER.fullmatch(text):
        return await take_answer(turn, int(answer[2]), yes=answer[1].lower() == "yes")
    return HELP


async def take_order(turn: Turn, payment: Payment) -> str:
    """Pay what is little, ask about the rest. What is returned here ends the turn."""
    if payment.amount <= LITTLE:
        return await settle(turn, payment)
    number = payment.number
    return (
        f"Number {number}: shall I pay {payment.amount} to {payment.payee}?"
        f' Answer "yes {number}" or "no {number}".'
    )


async def take_answer(turn: Turn, number: int, *, yes: bool) -> str:
    """Do what a person has decided, once."""
    lines = await turn.history(LINES)
    if decided := decision_on(number, lines):
        return f"That is decided. {decided}"
    payment = question(number, lines)
    if payment is None or payment.asked is None:
        return f"There is no question with the number {number}."
    if not yes:
        return f"Number {number} is refused; nothing is paid."
    if datetime.fromisoformat(await turn.step(now, effect="safe")) - payment.asked > WITHIN:
        return f"Number {number} is too old; nothing is paid. Order it again."
    return await settle(turn, payment)


async def settle(turn: Turn, payment: Payment) -> str:
    """Pay, in a step: not again once it is done, and under the same key if it was cut. The key is
    the payment's, not the turn's: another turn that says yes has another one."""
    key = f"{turn.session}#{payment.number}"
    await turn.step(pay, key, payment.amount, payment.payee, effect="idempotent")
    return f"Number {payment.number} is paid: {payment.amount} to {payment.payee}."


def question(number: int, lines: Iterable[HistoryItem]) -> Payment | None:
    """What was asked under a number, as it stands in the conversation."""
    for line in lines:
        found = ASKED.match(line.text) if line.role == "agent" else None
        if found and int(found[1]) == number:
            return Payment(number, int(found[2]), found[3], asked=line.at)
    return None


def decision_on(number: int, lines: Iterable[HistoryItem]) -> str | None:
    """What the agent has said to an answer before, if that is decided."""
    said = (line.text for line in lines if line.role == "agent")
    return next((text for text in said if text.startswith(f"Number {number} is ")), None)
