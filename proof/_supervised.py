"""A gateway that somebody else starts, stops and kills, and the platform that it talks to.

Whatever supervises it starts `start.sh` in its folder, once for each life. That script numbers
the life, keeps a copy of the store as this life finds it, makes a fifo for what this life is told,
notes all of this in the files that lives write to, and becomes the gateway. So these files tell,
in the order in which it happened, what every life found, did and said, also of lives that nobody
here began: the supervisor's restarts.

    out.jsonl     #boot 1   {"event": ...}   {"event": ...}   #died timeout killed KILL   #boot 2
    log.txt       #boot 1   ...
    effects.txt   boot 1    began 7 1 fresh  ...
    boot.2/       the store as the second life found it

A fifo of its own for each life is what a connection is: what a life did not read is lost with it,
and the platform begins the next one with what nobody acknowledged, in order.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw
import attrs

from ._platform import AGENT, PATIENCE, Platform, effects, furnish, rows, wait_until
from ._report import Job

T = TypeVar("T")

CONFIG: Final = """
[resume]
max_crashes = 100000
max_interruptions = 100000
"""
"""Killed again and again, an innocent turn may well be open at three crashes in a row."""

START: Final = """
cd {folder}
set -- boot.*
n=$#
mkdir boot.$n && mkfifo in.$n || exit 1
for part in gateway.db gateway.db-wal; do
    if [ -e $part ]; then cp $part boot.$n/ || exit 1; fi
done
. ./env
echo "boot $n" >>effects.txt
printf '\\n#boot %s\\n' $n >>log.txt
printf '\\n#boot %s\\n' $n >>out.jsonl
exec {python} -m trio_gateway run agent.py:agent --jsonl --store gateway.db \\
    <>in.$n >>out.jsonl 2>>log.txt
"""

_given_up: Final = threading.Event()

SESSIONS: Final = ("ada", "bob", "cy", "dan", "eve", "fay")
OPEN_PER_SESSION: Final = 3


@attrs.define
class Outcome:
    """What came of one point of a campaign."""

    point: str
    figures: Counter[str] = attrs.field(factory=Counter[str])
    seen: list[str] = attrs.field(factory=list[str])
    failure: str | None = None

    def count(self, **figures: int) -> None:
        """Add to the figures."""
        self.figures.update(figures)


def play(job: Job, points: Sequence[str], one: Callable[[Outcome], None]) -> None:
    """Play every point, several at once, and report what came of each."""
    pool = ThreadPoolExecutor(job.jobs)
    _given_up.clear()
    try:
        playing = [pool.submit(played, point, one) for point in points]
        for future in as_completed(playing):
            outcome = future.result()
            job.report.count(**outcome.figures)
            job.report.saw(*outcome.seen)
            if outcome.failure is not None:
                job.report.fail(outcome.point, outcome.failure)
    except BaseException:
        _given_up.set()  # what is being played ends, and cleans up, instead of being waited for
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def played(point: str, one: Callable[[Outcome], None]) -> Outcome:
    """Play one point; a failure is part of what came of it."""
    outcome = Outcome(point)
    try:
        one(outcome)
    except Exception:
        outcome.failure = traceback.format_exc()
    return outcome


def deal(kinds: Sequence[T], seed: int, first: int, count: int) -> list[T]:
    """`count` of an endless row of kinds, from the `first` on: deck after deck, each shuffled but
    for the very first, so that few cycles are the telling ones and many are fair."""
    dealt: list[T] = []
    for number in range(first, first + count):
        deck = list(kinds)
        if seed or number >= len(kinds):
            random.Random(f"{seed}/{number // len(kinds)}").shuffle(deck)
        dealt.append(deck[number % len(kinds)])
    return dealt


@attrs.define(eq=False)
class Supervised:
    """The folder of a gateway, the platform at its other end, and what was heard of its lives."""

    folder: Path
    dice: random.Random
    """For the load: how often it is thrown depends on how fast everything is."""
    platform: Platform = attrs.field(init=False)
    boots: int = 0
    """Lives that have begun."""
    deaths: list[str] = attrs.field(factory=list[str])
    """How lives have ended, in the words of a supervisor that tells."""
    _stuck: set[str] = attrs.field(factory=set[str])
    _broken: BaseException | None = None
    _cut: bytes = b""
    _fd: int = -1
    _over: threading.Event = attrs.field(factory=threading.Event)
    _follower: threading.Thread = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.platform = Platform(self.folder, random.Random(self.dice.random()))
        self._follower = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Supervised:
        furnish(self.folder, CONFIG, AGENT)
        start = START.format(folder=shlex.quote(str(self.folder)), python=sys.executable)
        self.start_script.write_text(start)
        (self.folder / "boot.0").mkdir()
        (self.folder / "out.jsonl").touch()
        self.set_limits(0.3, 3.0)
        self._follower.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._follower.join(PATIENCE)
        self._hang_up()

    @property
    def start_script(self) -> Path:
        """What a supervisor is to start, with bash."""
        return self.folder / "start.sh"

    def set_limits(self, grace: float, budget: float) -> None:
        """What the next lives are given for a stop, in seconds."""
        kept = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
        kept |= {
            "EFFECTS": str(self.folder / "effects.txt"),
            "PATH": os.environ.get("PATH", os.defpath),
            "TRIO_GATEWAY_DRAIN__GRACE": f"{round(grace * 1000)}ms",
            "TRIO_GATEWAY_DRAIN__BUDGET": f"{round(budget * 1000)}ms",
        }
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in kept.items()]
        (self.folder / "env").write_text("".join(lines))

    # ----- talking

    def send(self, session: str, text: str) -> str:
        """Send a new message; its id. Without a life to hear it, it waits for the next one."""
        with self.platform.news:
            line = self.platform.new(session, text)
            self._write(line)
            return next(reversed(self.platform.sent))

    def hang(self, kind: str) -> str:
        """Send a message whose turn does not end by itself in its first attempt; its id. Each has
        a session of its own, so that nothing waits behind it."""
        id = self.send(f"{kind}-{len(self.platform.sent)}", kind)
        self._stuck.add(id)
        return id

    def top_up(self) -> None:
        """Give every session something to do."""
        with self.platform.news:
            unanswered = self.unanswered()
            for session in SESSIONS:
                count = sum(self.platform.sent[id]["session"] == session for id in unanswered)
                for _ in range(OPEN_PER_SESSION - count):
                    self.send(session, self._some_text())

    def feed(self, seconds: float) -> None:
        """Keep every session busy for so long."""
        deadline = time.monotonic() + seconds
        with self.platform.news:
            while (left := deadline - time.monotonic()) > 0:
                self.top_up()
                self.platform.news.wait(left)

    def _some_text(self) -> str:
        kind = self.dice.choice(("plain", "slow", "says", "steps", "sleep"))
        return f"sleep {self.dice.uniform(0.05, 0.6):.2f}" if kind == "sleep" else kind

    def unanswered(self) -> set[str]:
        """The messages that have no answer yet."""
        with self.platform.news:
            return self.platform.sent.keys() - self.platform.finals.keys()

    # ----- waiting

    def wait(self, met: Callable[[], bool], what: str) -> None:
        """Wait for what the lives' output changes. Raises `AssertionError` if it never comes."""
        self.platform.wait_for(lambda: self._broken is not None or met(), what)
        if self._broken is not None:
            raise AssertionError(f"nothing is heard any more: {self._broken!r}")

    def wait_boot(self, after: int) -> None:
        """Wait for a life after that one."""
        self.wait(lambda: self.boots > after, f"a life after number {after}")

    def wait_death(self, after: int) -> str:
        """Wait for the end of a life, after so many; how it ended."""
        self.wait(lambda: len(self.deaths) > after, f"an end after {after} of them")
        return self.deaths[-1]

    def wait_accepted(self, *ids: str) -> None:
        """Wait until these messages, or all of them, are acknowledged."""
        wanted = set(ids) or set(self.platform.sent)
        self.wait(lambda: self.platform.accepted >= wanted, "acceptance")

    def wait_answered(self, *, stuck: bool) -> None:
        """Wait until everything is answered; or all but what does not end by itself."""
        self.wait(lambda: not self.unanswered() - (set() if stuck else self._stuck), "all answers")

    def attempt_of(self, id: str) -> int:
        """Wait for the answer to a message; which attempt gave it."""

        def answers() -> list[int]:
            return [
                event["attempt"]
                for event in self.platform.events
                if event["event"] == "reply" and event["final"] and id in event["in_reply_to"]
            ]

        self.wait(lambda: bool(answers()), f"an answer to {id}")
        return answers()[0]

    def wait_begun(self, id: str) -> int:
        """Wait until the agent works at a message; in which life it began to."""
        wait_until(lambda: self._begun_in(id) > 0, f"the beginning of {id}")
        return self._begun_in(id)

    def _begun_in(self, id: str) -> int:
        sql = "SELECT turn FROM message WHERE id = ? AND turn IS NOT NULL"
        with suppress(apsw.Error):  # no store yet, or only just
            for (turn,) in rows(self.platform.store, sql, id):
                notes = effects(self.folder)
                begins = [note.startswith(f"began {turn} ") for note in notes]
                if any(begins):
                    before = notes[: begins.index(True)]
                    return sum(note.startswith("boot ") for note in before)
        return 0

    # ----- hearing

    def _follow(self) -> None:
        try:
            with (self.folder / "out.jsonl").open("rb") as out:
                rest = b""
                while not self._over.is_set():
                    assert not _given_up.is_set(), "given up"
                    data = out.read()
                    if not data:
                        time.sleep(0.003)
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        self._hear(line)
        except Exception as error:
            with self.platform.news:
                self._broken = error
                self.platform.news.notify_all()

    def _hear(self, line: bytes) -> None:
        if line.startswith(b"#"):
            self._mark(*line.decode()[1:].split(" ", 1))
        elif line and self._cut:
            raise AssertionError(f"neither JSON nor cut off by a death: {self._cut!r}")
        elif line:
            try:
                self.platform.hear(line)
            except json.JSONDecodeError:
                self._cut = line  # a death may cut a line; then a mark comes next

    def _mark(self, what: str, more: str) -> None:
        self._cut = b""
        with self.platform.news:
            if what == "boot":
                self._connect(int(more))
            else:
                self.deaths.append(more)
            self.platform.news.notify_all()

    def _connect(self, number: int) -> None:
        self._hang_up()
        # For reading, too: so the fifo never ends, and is there before and after its reader.
        self._fd = os.open(self.folder / f"in.{number}", os.O_RDWR | os.O_NONBLOCK)
        self.boots = number
        for line in self.platform.again():
            self._write(line)

    def _write(self, line: bytes) -> None:
        if self._fd < 0:
            return
        try:
            os.write(self._fd, line)
        except BlockingIOError:
            self._hang_up()  # full: what comes later must not overtake this

    def _hang_up(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    # ----- adding up

    @property
    def recoveries(self) -> int:
        """How many lives have recovered, as the store says: each adds itself as it does."""
        if not _is_store(self.platform.store):
            return 0
        return int(rows(self.platform.store, "SELECT count(*) FROM epoch")[0][0])

    def found(self) -> dict[int, Marker]:
        """The open turns in the store, while no life has it."""
        return _markers(self.platform.store)

    def account(self) -> dict[str, int]:
        """Add up, after a last life that ended everything. Raises `AssertionError`."""
        return self.platform.account() | check_lives(lives(self.folder), whole=True)


# ----- what the lives found and did


@attrs.frozen(kw_only=True)
class Marker:
    """An open turn, as a life found it."""

    state: str
    reason: str
    attempt: int
    crashes: int


@attrs.frozen(kw_only=True)
class Life:
    """One life of a gateway, from what it left behind."""

    number: int
    found: Mapping[int, Marker]
    """The open turns in the store when it began."""
    began: Mapping[int, tuple[int, str]]
    """The turns that its agent worked at: the attempt, and why it was one."""
    log: Sequence[Mapping[str, Any]]

    @property
    def resumed(self) -> dict[int, tuple[int, str]]:
        """The turns that it went on with."""
        return {turn: how for turn, how in self.began.items() if how[1] != "fresh"}

    @property
    def served(self) -> bool:
        """Whether it got as far as recovering."""
        return any(record["event"] == "gateway_started" for record in self.log)

    @property
    def asked(self) -> bool:
        """Whether it has heard of a stop."""
        return any(record["event"] == "stop_requested" for record in self.log)

    @property
    def marked(self) -> bool:
        """Whether it has marked its open turns, at a stop."""
        return any(record["event"] == "turns_marked" for record in self.log)

    @property
    def settled_in_drain(self) -> int:
        """How many turns settled after it was asked to stop."""
        events = [record["event"] for record in self.log]
        asked = events.index("stop_requested") if "stop_requested" in events else len(events)
        return events[asked:].count("turn_settled")

    @property
    def drain(self) -> Mapping[str, Any] | None:
        """What it reported of its drain, if it got so far."""
        return next((r for r in self.log if r["event"] == "drain_report"), None)


def lives(folder: Path) -> list[Life]:
    """All lives that became a gateway, in order."""
    notes = _by_life(effects(folder), "boot ")
    logs = _by_life((folder / "log.txt").read_text(errors="replace").splitlines(), "#boot ")
    return [
        Life(
            number=number,
            found=_markers(folder / f"boot.{number}" / "gateway.db"),
            began=_began(notes[number]),
            log=list(_records(logs[number])),
        )
        for number in notes
        if number in logs
    ]


def check_lives(all_lives: Sequence[Life], *, whole: bool) -> dict[str, int]:
    """Raise `AssertionError` where a life did not do exactly what it found to do; figures.

    `whole`: the last life had the time to resume everything, and must have.
    """
    for before, life in zip([None, *all_lives[:-1]], all_lives, strict=True):
        _check_resumed(life)
        if before is not None:
            _check_marked(before, life)
    if whole and all_lives:
        last = all_lives[-1]
        assert last.resumed.keys() == last.found.keys(), (
            f"life {last.number} found {sorted(last.found)} open, resumed {sorted(last.resumed)}"
        )
    return {
        "lives": len(all_lives),
        "lives_marked": sum(life.marked for life in all_lives),
        "settled_in_drains": sum(life.settled_in_drain for life in all_lives),
        "found_open": sum(len(life.found) for life in all_lives),
    }


def _check_resumed(life: Life) -> None:
    """What it resumed was open, with the attempt after the one that was cut, for the reason that
    stood there; and what was open did not begin afresh (promise 5)."""
    for turn, (attempt, reason) in life.began.items():
        marker = life.found.get(turn)
        if marker is None:
            assert reason == "fresh", f"life {life.number} resumed turn {turn}, which was not open"
        else:
            assert (attempt, reason) == (marker.attempt + 1, marker.reason), (
                f"life {life.number} found turn {turn} as {marker},"
                f" and began attempt {attempt} of it: {reason}"
            )


def _check_marked(life: Life, after: Life) -> None:
    """Once it had marked its open turns, none was found running (promise 4); only what was found
    running is charged with a crash (promise 9)."""
    running = [turn for turn, marker in after.found.items() if marker.state == "RUNNING"]
    assert not (life.marked and running), (
        f"life {life.number} had marked its open turns; {running} were found running"
    )
    for turn in life.found.keys() & after.found.keys():
        was, now = life.found[turn], after.found[turn]
        charge = int(was.state == "RUNNING")
        # A life that died young may have charged it already, or not.
        fair = (charge,) if life.served else (0, charge)
        assert now.crashes - was.crashes in fair, (
            f"turn {turn} was found {was} by life {life.number}, then {now}"
        )


def _by_life(lines: Sequence[str], mark: str) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    current: list[str] = []
    for line in lines:
        if line.startswith(mark):
            current = found.setdefault(int(line.removeprefix(mark)), [])
        else:
            current.append(line)
    return found


def _is_store(store: Path) -> bool:
    """Whether it is one; whoever made it may have died before."""
    sql = "SELECT 1 FROM sqlite_schema WHERE name = 'turn'"
    return store.exists() and bool(rows(store, sql))


def _markers(store: Path) -> dict[int, Marker]:
    """The open turns in a store."""
    if not _is_store(store):
        return {}
    sql = "SELECT id, state, reason, attempt, crashes FROM turn WHERE settled_at IS NULL"
    return {
        id: Marker(
            state=state,
            reason="crash" if state == "RUNNING" else reason,
            attempt=attempt,
            crashes=crashes,
        )
        for id, state, reason, attempt, crashes in rows(store, sql)
    }


def _began(notes: Sequence[str]) -> dict[int, tuple[int, str]]:
    began: dict[int, tuple[int, str]] = {}
    for note in notes:
        if note.startswith("began "):
            _, turn, attempt, reason = note.split()
            assert int(turn) not in began, f"two attempts in one life: {note}"
            began[int(turn)] = int(attempt), reason
    return began


def _records(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the gateway logged. Other lines are for people; a last one may be cut off."""
    for line in lines:
        if line.startswith("{"):
            with suppress(json.JSONDecodeError):
                yield json.loads(line)
