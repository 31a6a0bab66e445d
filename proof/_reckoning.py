"""The account of a `Crowd`, when everything has ended: what became of each message, exactly.

    given up       refused, never sent again: nothing of it is in the store
    a command      answered once, by the gateway itself
    answered       by one final reply, of a turn that completed and took it
    failed         by one apology, of a turn whose agent fell over
    stopped        by one /stop, in the very transaction; nobody ever heard an answer to it

and besides: acknowledged as new once; taken in the order in which they were sent; answered in that
order; every reply of the store heard, in its order, and no other; no attempt twice, none after the
end, none that was not interrupted; one turn of a session at a time; no unsafe effect twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Final

import attrs

from trio_gateway.testing import check_invariants

from ._crowd import Crowd, Heard
from ._platform import effects, rows

STOPPED: Final = "Stopped."
NOTHING_TO_STOP: Final = "There is nothing to stop."
SORRY: Final = "Sorry, something went wrong"

COMMANDS: Final = {
    "/stop": (STOPPED, NOTHING_TO_STOP),
    "/status": ("No answer is in progress.", "Working on it"),
    "/new": ("A new conversation.",),
}
"""How the answer to each begins."""


@attrs.frozen
class Message:
    """One message, as the store has it in the end."""

    seq: int
    session: str
    state: str
    turn: int | None
    accepted_at: int
    ended_at: int


@attrs.frozen
class Turn:
    """One turn, as the store has it in the end."""

    state: str
    attempt: int
    error: str | None


@attrs.frozen
class Attempt:
    """One attempt, as the agent noted it."""

    life: int
    turn: int
    attempt: int
    session: str
    reason: str


@attrs.define(eq=False)
class Reckoning:
    """Adds up. Each method raises `AssertionError` with what does not add up."""

    crowd: Crowd
    open_before: dict[int, dict[int, str]]
    """By life: the turns that were open when it began, and why they were to resume."""
    last: int
    """The life that ended everything."""
    messages: dict[str, Message] = attrs.field(init=False)
    turns: dict[int, Turn] = attrs.field(init=False)
    finals: dict[str, list[tuple[str, Heard]]] = attrs.field(init=False)
    """By message: the final replies that name it, and their keys."""
    figures: Counter[str] = attrs.field(factory=Counter[str])

    def __attrs_post_init__(self) -> None:
        store = self.crowd.store
        self.messages = {
            id: Message(*rest)
            for id, *rest in rows(
                store,
                "SELECT message.id, seq, session.name, state, turn, accepted_at, ended_at"
                " FROM message JOIN session ON session.id = message.session ORDER BY seq",
            )
        }
        self.turns = {
            id: Turn(*rest)
            for id, *rest in rows(store, "SELECT id, state, attempt, error FROM turn")
        }
        self.finals = defaultdict(list)
        for key, heard in self.crowd.heard.items():
            if heard.final:
                for id in heard.about:
                    self.finals[id].append((key, heard))

    def check(self) -> Counter[str]:
        """All of it; the figures."""
        check_invariants(self.crowd.store, settled=True)
        assert not self.crowd.complaints, "\n".join(self.crowd.complaints[:5])
        self._accepted_once()
        self._taken_in_order()
        self._replies()
        self._ends()
        self._stops()
        self._answered_in_order()
        attempts = self._attempts()
        self._one_at_a_time(attempts)
        self._exactly_the_interrupted(attempts.values())
        self._effects()
        return self.figures

    # ----- what came in

    def _accepted_once(self) -> None:
        twice = [id for id, count in Counter(self.crowd.taken).items() if count > 1]
        assert not twice, f"acknowledged as new twice: {twice[:5]}"
        wanted = self.crowd.sent.keys() - self.crowd.given_up
        lost = wanted - self.messages.keys()
        assert not lost, f"lost: {sorted(lost)[:5]}"
        unasked = self.messages.keys() - wanted
        assert not unasked, f"refused, and stored all the same: {sorted(unasked)[:5]}"
        self.figures["messages"] = len(self.messages)
        self.figures["refused"] = len(self.crowd.given_up)
        self.figures["sent_again"] = self.crowd.sent_again

    def _taken_in_order(self) -> None:
        """The store's order is the order of the acknowledgements, and the order of sending, but for
        what may have been refused in between."""
        newest: dict[str, int] = {}
        for id in self.crowd.taken:
            message = self.messages[id]
            before = newest.get(message.session, 0)
            assert message.seq > before, f"{id} was acknowledged after a later one"
            newest[message.session] = message.seq
        newest.clear()
        for id in self.crowd.sent:
            if id in self.messages and id not in self.crowd.out_of_turn:
                message = self.messages[id]
                before = newest.get(message.session, 0)
                assert message.seq > before, f"{id} was overtaken on its way in"
                newest[message.session] = message.seq

    # ----- what came out

    def _replies(self) -> None:
        """Heard were the store's replies, all of them and no other, in order in each session."""
        stored = {
            key: (Heard(session, text, (), bool(final), attempt), state)
            for key, session, text, final, attempt, state in rows(
                self.crowd.store,
                "SELECT key, session.name, text, final, attempt, state"
                " FROM delivery JOIN session ON session.id = delivery.session ORDER BY delivery.id",
            )
        }
        unheard = stored.keys() - self.crowd.heard.keys()
        assert not unheard, f"committed, and never heard: {sorted(unheard)[:5]}"
        invented = self.crowd.heard.keys() - stored.keys()
        assert not invented, f"heard, and never committed: {sorted(invented)[:5]}"
        for key, (reply, state) in stored.items():
            heard = attrs.evolve(self.crowd.heard[key], about=())
            assert (heard, state) == (reply, "delivered"), f"{key}: {heard} is {state} {reply}"
        said = _by_session((key, reply.session) for key, (reply, _) in stored.items())
        heard_in = _by_session((key, heard.session) for key, heard in self.crowd.heard.items())
        for session, keys in said.items():
            assert heard_in[session] == keys, f"replies of {session} out of order"
        self.figures["replies"] = len(stored)
        self.figures["repeats"] = self.crowd.repeats

    def _ends(self) -> None:
        """Each message has reached one end, and was told so."""
        for id, message in self.messages.items():
            replies = self.finals.get(id, [])
            told = f"{id} ({self.crowd.sent[id]['text']}) is {message}, and was told {replies}"
            if self.crowd.sent[id]["text"] in COMMANDS:
                assert message.state == "answered", told
                assert len(replies) == 1, told
                key, heard = replies[0]
                assert key.endswith(f"-c-jsonl-{id}"), told
                assert heard.text.startswith(COMMANDS[self.crowd.sent[id]["text"]]), told
            elif message.state == "stopped":
                assert not replies, told
            else:
                assert len(replies) == 1, told
                self._answer(id, message, *replies[0])
            self.figures[message.state] += 1

    def _answer(self, id: str, message: Message, key: str, heard: Heard) -> None:
        told = f"{id} is {message}, and was told {key}: {heard}"
        assert message.turn is not None, told
        assert key.endswith(f"-{message.turn}-end"), told
        turn = self.turns[message.turn]
        assert heard.attempt == turn.attempt, f"{told} by {turn}"
        if message.state == "failed":
            assert turn.state == "FAILED", f"{told} by {turn}"
            assert heard.text.startswith(SORRY), told
            assert any(self.crowd.sent[one]["text"] == "fails" for one in heard.about), told
        else:
            assert (message.state, turn.state) == ("answered", "COMPLETED"), f"{told} by {turn}"
            doubt = heard.text.startswith("in doubt: ")
            kind = "in doubt" if doubt else "re"
            assert heard.text == f"{kind}: {' '.join(heard.about)}", told
            self.figures["in_doubt"] += doubt and heard.about[0] == id
            self.figures["answered_together"] += len(heard.about) > 1

    def _stops(self) -> None:
        """What a /stop says that it did, it did, in its own transaction; and nobody else did."""
        said: dict[tuple[str, int], list[str]] = defaultdict(list)
        for id, message in self.messages.items():
            if self.crowd.sent[id]["text"] == "/stop":
                ((_, heard),) = self.finals[id]
                said[message.session, message.accepted_at].append(heard.text)
        ended = Counter(
            (message.session, message.ended_at)
            for message in self.messages.values()
            if message.state == "stopped"
        )
        for moment, texts in said.items():
            told = f"in {moment} {ended[moment]} messages were stopped, and people told {texts}"
            assert (STOPPED in texts) == (ended[moment] > 0), told
        by_nobody = ended.keys() - said.keys()
        assert not by_nobody, f"stopped by nobody: {list(by_nobody)[:5]}"
        self.figures["stops"] = sum(STOPPED in texts for texts in said.values())
        self.figures["replaced"] = sum(
            turn.state == "STOPPED" and turn.error == "a newer message arrived"
            for turn in self.turns.values()
        )

    def _answered_in_order(self) -> None:
        """The answers of a session name its messages in the order in which it took them."""
        newest: dict[str, tuple[int, str]] = {}
        for key, heard in self.crowd.heard.items():
            if not heard.final or "-c-" in key:
                continue
            for id in heard.about:
                now = (self.messages[id].seq, id)
                before = newest.get(heard.session, (0, ""))
                assert now > before, f"{id} was answered after {before[1]}, which is newer"
                newest[heard.session] = now

    # ----- what the agent did

    def _attempts(self) -> dict[tuple[int, int], Attempt]:
        """No attempt began twice, and none after its turn had settled."""
        attempts: dict[tuple[int, int], Attempt] = {}
        newest: dict[int, int] = {}
        for word, *rest in map(str.split, effects(self.crowd.folder)):
            if word == "began":
                life, number, which, session, reason = rest
                attempt = Attempt(int(life), int(number), int(which), session, reason)
                who = (attempt.turn, attempt.attempt)
                assert who not in attempts, f"began twice: {attempts[who]}, {attempt}"
                attempts[who] = attempt
                newest[attempt.turn] = max(newest.get(attempt.turn, 0), attempt.attempt)
        for id, turn in self.turns.items():
            last = newest.get(id, 0)
            # One that is stopped just as it begins may never come to call the agent.
            fine = last <= turn.attempt if turn.state == "STOPPED" else last == turn.attempt
            assert fine, f"turn {id} is {turn}, but attempt {last} was the last one that began"
        self.figures["turns"] = len(self.turns)
        for attempt in attempts.values():
            if attempt.reason != "fresh":
                self.figures[f"resumed_{attempt.reason}"] += 1
        return attempts

    def _exactly_the_interrupted(self, attempts: Iterable[Attempt]) -> None:
        """A life resumed what was open before it, for the reason on disk, and nothing else; the
        last one, which nobody ended, all of it."""
        resumed: dict[int, dict[int, str]] = defaultdict(dict)
        for attempt in attempts:
            if attempt.reason != "fresh":
                resumed[attempt.life][attempt.turn] = attempt.reason
        for life, turns in resumed.items():
            unasked = turns.items() - self.open_before[life].items()
            assert not unasked, f"life {life} resumed {unasked}, which it did not find so"
        missing = self.open_before[self.last].items() - resumed[self.last].items()
        assert not missing, f"the last life did not resume {missing}"

    def _one_at_a_time(self, attempts: dict[tuple[int, int], Attempt]) -> None:
        """In one life, a session's next turn began only when the one before was over."""
        under_way: dict[tuple[str, str], str] = {}
        for word, *rest in map(str.split, effects(self.crowd.folder)):
            if word not in ("began", "over"):
                continue
            life, turn, _, session = rest[:4]
            if word == "over":
                under_way.pop((life, session), None)
                continue
            other = under_way.setdefault((life, session), turn)
            assert other == turn, f"life {life}: turn {turn} of {session} began during {other}"

    def _effects(self) -> None:
        """An unsafe effect of a turn happened once; what a turn said, it said once."""
        notes = effects(self.crowd.folder)
        shots = Counter(note for note in notes if note.startswith("shot "))
        twice = [note for note, count in shots.items() if count > 1]
        assert not twice, f"twice: {twice[:5]}"
        said = rows(
            self.crowd.store,
            "SELECT turn, text FROM delivery WHERE kind = 'say' GROUP BY turn, text"
            " HAVING count(*) > 1",
        )
        assert not said, f"said twice: {said[:5]}"
        self.figures["taken_by_steering"] = sum(note.startswith("took ") for note in notes)


def _by_session(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = defaultdict(list)
    for key, session in pairs:
        keys[session].append(key)
    return keys
