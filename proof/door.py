"""The HTTP door under load, while its process is killed, stopped and started again at random, and
at the very moment of a request; with real sockets, and clients that share no code with it.

A point is the number of a world (one store, one process at a time, some twenty people), or `wrk`:
as many requests as it likes from a program of somebody else, which reads nothing but status lines.
`_door_people` and `_door_followers` are who talks and listens, `_door_account` what must have
become of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from signal import SIGTERM
from typing import Final

import attrs
import trio

from . import _door_wrk
from ._door_account import Account
from ._door_followers import Follower, Log, Talker
from ._door_openai import Chatter, Streamed, Streamer
from ._door_people import Hook, Person, Poster
from ._door_world import PATIENT, World, make_world, what_broke
from ._process import scratch_folder
from ._report import Campaign, Job, Skip

CAMPAIGN: Final = Campaign(
    name="door",
    injects="kills and stops of a gateway that is talked to over HTTP, at random and at the moment"
    " of a request: messages, event streams, WebSockets, webhooks, OpenAI's API",
    short="kills and stops under HTTP load",
    promises=(1, 2, 5, 6, 7, 8, 11, 12),
    counted="kills",
    must_see=(
        "killed at boot",
        "killed at a request",
        "killed in the load",
        "killed in the drain",
        "killed above a program",
        "stopped by TERM",
        "stopped by USR1",
        "stopped with a turn to finish",
        "accepted in the drain, and told so",
        "no answer, and kept all the same",
        "no answer, and not kept",
        "an id that was used twice, refused",
        "a webhook of an earlier life, recognised",
        "waited for, and answered",
        "a follower that left, and came back",
        "a stream that ended in order",
        "a WebSocket closed with 1012",
        "a response told in pieces",
    ),
)

ENDS: Final = (
    *("killed at boot",), *("killed at a request",) * 5, *("killed in the load",) * 3,
    *("killed in the drain",) * 3, "stopped by TERM", "stopped by TERM", "stopped by USR1",
    *("stopped with a turn to finish",) * 2,
)  # fmt: skip
"""How lives end, and how often."""


@attrs.define(eq=False)
class Crowd:
    """The people of one world."""

    world: World
    busy: int = 0
    """How many have not said all that they had to say."""
    people: list[Person] = attrs.field(factory=list[Person])
    talkers: list[Talker] = attrs.field(factory=list[Talker])
    followers: list[Follower] = attrs.field(factory=list[Follower])
    keeper: Poster = attrs.field(init=False)
    """Who sends what a life is told by; lives by our word."""

    def __attrs_post_init__(self) -> None:
        town = self.world.town
        kinds: dict[type[Person], int] = {Poster: 5, Hook: 2, Chatter: 1, Streamer: 3}
        for kind, count in kinds.items():
            for n in range(count):
                name = f"{kind.__name__.lower()}{n}"
                own = (f"{name}-a", f"{name}-b") if kind is Poster else (name,)
                self.people.append(kind(town, name, own))
        self.talkers = [Talker(town, "talker0", ("talker0-a", "talker0-b"))]
        self.keeper = Poster(town, "keeper", ("keeper",))
        sessions = [s for person in (*self.people, self.keeper) for s in person.sessions]
        # Some sessions have two who follow.
        self.followers = [Follower(town, session) for session in (*sessions, *sessions[:3])]

    @property
    def logs(self) -> Iterator[Log]:
        """What every listener was told."""
        for follower in self.followers:
            yield follower.log
        for talker in self.talkers:
            yield from talker.logs.values()

    @property
    def streams(self) -> Iterator[Streamed]:
        """What everybody was told of a response."""
        for person in self.people:
            if isinstance(person, Streamer):
                yield from person.streams

    def start(self, nursery: trio.Nursery) -> None:
        """All of them begin."""
        for follower in self.followers:
            nursery.start_soon(follower.live)
        for talker in self.talkers:
            nursery.start_soon(talker.live)
        for person in self.people:
            self.busy += 1
            nursery.start_soon(self._live, person)

    async def _live(self, person: Person) -> None:
        await person.live()
        self.busy -= 1

    def silent(self) -> bool:
        """Whether everybody has said all."""
        return not self.busy and all(sent.acknowledged for sent in self.world.town.sent.values())

    def all_heard(self) -> bool:
        """Whether everybody who listens has heard all."""
        newest = self.world.newest()
        return all(log.last == newest.get(log.session, 0) for log in self.logs)

    # ----- lives

    async def whole(self, seconds: float) -> None:
        """So many seconds of short lives, and a last one that ends everything."""
        town = self.world.town
        ends = list(dict.fromkeys(ENDS))  # each at least once, however few seconds there are
        town.dice.shuffle(ends)
        async with trio.open_nursery() as nursery:
            self.start(nursery)
            deadline = trio.current_time() + seconds
            while ends or trio.current_time() < deadline:
                if not ends:
                    ends = list(ENDS)
                    town.dice.shuffle(ends)
                await self._short_life(ends.pop())
                assert not town.complaints, "\n".join(town.complaints[:5])
            await self._last_life()
            nursery.cancel_scope.cancel()
        await self.keeper.hang_up()
        account = Account(town, self.world.store)
        account.check(self.logs, self.streams, self.world.folder)
        town.figures.update(account.figures)
        self.world.check_log()

    async def _short_life(self, end: str) -> None:
        if end == "stopped with a turn to finish":
            await self._finished()
        else:
            async with self.world.alive():
                word, _, _ = end.partition(" ")
                await (self.world.killed(end) if word == "killed" else self.world.stopped(end))
        self.world.town.seen[end] += 1

    async def _finished(self) -> None:
        """A stop waits for a turn; meanwhile the door is open, and says that it is late."""
        world, town = self.world, self.world.town
        hurry = world.folder / "be-quick"
        hurry.touch()
        async with world.alive(**PATIENT) as process:
            await world.serves()
            text = f"waits {self.keeper.name}-{town.life}"
            id = await self._keep(text, late=False)
            log = next(log for log in self.logs if log.session == "keeper")
            await world.until(lambda: _began(log, id), "the turn that the stop waits for")
            town.stopping = True
            process.send_signal(SIGTERM)
            await world.until_drains()
            await self._keep(f"plain {self.keeper.name}-{town.life}-late", late=True)
            (world.folder / f"gate-{text.partition(' ')[2]}").touch()
            await world.left(0)
        hurry.unlink()

    async def _keep(self, text: str, *, late: bool) -> str:
        town, id = self.world.town, text.partition(" ")[2]
        town.noted(id, "keeper", text)
        await self.keeper.hang_up()  # a connection of now, not one of an earlier life
        answer = await self.keeper.post(id, waits=False)
        assert answer is not None, f"nobody answers {id}, late: {late}\n{self.world.story}"
        self.keeper.take(id, answer, waits=False)
        assert answer.status == 202, f"{id}, late: {late}, was answered {answer}"
        assert ("note" in answer.json()) == late, f"{id}, late: {late}, was answered {answer}"
        town.seen["accepted in the drain, and told so"] += late
        return id

    async def _last_life(self) -> None:
        world, town = self.world, self.world.town
        town.closing_time = True
        (world.folder / "be-quick").touch()
        async with world.alive() as process:
            await world.serves()
            await world.until(self.silent, "a receipt for everything")
            await world.until(world.all_ended, "the end of every message")
            await world.until(self.all_heard, "all that happened, to everybody who follows")
            town.over = town.stopping = True
            process.send_signal(SIGTERM)
            await world.left(0)


def _began(log: Log, id: str) -> bool:
    return any(event == "begun" and id in data["messages"] for _, event, data in log.events)


# ----- the whole


def run(job: Job) -> None:
    """So many worlds beside each other, and then `wrk`."""
    seconds, asked = job.amount(8, 66, 540), job.amount(2, 10, 60)
    numbers = [n for n in range(job.jobs) if job.only in (None, str(n))]
    if job.only is not None and job.only.isdecimal():
        numbers = [int(job.only)]
    with ThreadPoolExecutor(max(1, len(numbers))) as pool:
        lived = list(pool.map(partial(_live, job.seed, seconds), numbers))
    for number, (world, failure) in zip(numbers, lived, strict=True):
        _report(job, world, str(number), failure)
    if job.only in (None, "wrk"):
        try:
            world, failure = _door_wrk.live(job.seed, asked)
        except Skip as skip:
            print(f"SKIPPED door wrk: {skip}", file=sys.stderr, flush=True)
            return
        _report(job, world, "wrk", failure)


def _report(job: Job, world: World, point: str, failure: str | None) -> None:
    job.report.count(**world.town.figures)
    job.report.seen.update(+world.town.seen)
    if failure is not None:
        job.report.fail(point, failure)


def _live(seed: int, seconds: float, number: int) -> tuple[World, str | None]:
    """One world from its beginning to its account; and what does not add up."""
    with scratch_folder() as folder:
        world = make_world(folder, seed, number, listens=bool(number % 2))
        try:
            trio.run(Crowd(world).whole, seconds)
        except Exception as error:
            return world, what_broke(world, error)
        finally:
            world.close()
    return world, None
