"""`wrk` at the HTTP door, while its process is killed again and again: a program that somebody else
has written, that knows nothing of chat, and that notes the id of each 202 that it reads.

What it was told is kept must be answered, once. What it sent and heard nothing of is sent again
here, under the same id.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Final

import trio

from ._door_account import Account
from ._door_followers import Follower
from ._door_people import Poster
from ._door_world import TOKEN, World, make_world, what_broke
from ._platform import rows
from ._process import scratch_folder
from ._report import Skip

SESSIONS: Final = 20
CONNECTIONS: Final = 16
PAUSE_MS: Final = 20
"""Between two requests of one connection: what is accepted has to be answered, too."""

SCRIPT: Final = """
local threads, count = 0, 0

function setup(thread)
   thread:set("number", threads)
   threads = threads + 1
end

function init(args)
   heard = io.open(args[1] .. "/wrk-" .. number .. ".txt", "w")
   heard:setvbuf("line")
   headers = { authorization = "Bearer " .. args[2] }
end

function delay()
   return PAUSE
end

function request()
   count = count + 1
   local id = "wrk" .. number .. "-" .. count
   local body = '{"id":"' .. id .. '","text":"plain ' .. id .. '"}'
   local path = "/v1/sessions/wrk" .. (count % SESSIONS) .. "/messages"
   return wrk.format("POST", path, headers, body)
end

function response(status, headers, body)
   heard:write(status, " ", string.match(body, '"id":"([^"]+)"') or body, "\\n")
end
"""


def live(seed: int, seconds: int) -> tuple[World, str | None]:
    """A world of its own; and what does not add up. Raises `Skip` where there is no wrk."""
    if shutil.which("wrk") is None:
        raise Skip("wrk is not installed; apt install wrk")
    with scratch_folder() as folder:
        # The port outlives the process: wrk tries again without a pause where nobody listens.
        world = make_world(folder, seed, 99, listens=True)
        try:
            trio.run(_Run(world).whole, seconds)
        except Exception as error:
            return world, what_broke(world, error)
        finally:
            world.close()
    return world, None


class _Run:
    def __init__(self, world: World) -> None:
        self._world = world
        self._followers = [Follower(world.town, f"wrk{n}") for n in range(SESSIONS)]

    async def whole(self, seconds: int) -> None:
        world, town = self._world, self._world.town
        async with trio.open_nursery() as nursery:
            for follower in self._followers:
                nursery.start_soon(follower.live)
            asking = await trio.lowlevel.open_process(
                self._command(seconds), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                while asking.poll() is None:
                    async with world.alive() as process:
                        await world.serves()
                        await trio.sleep(0.3 + world.dice.random() * 1.2)
                        process.kill()
                        town.figures["kills"] += 1
            finally:
                with trio.CancelScope(shield=True):
                    asking.kill()
                    await asking.wait()
            assert asking.returncode == 0, f"wrk left with {asking.returncode}"
            town.closing_time = True
            await self._last_life()
            nursery.cancel_scope.cancel()
        account = Account(town, world.store, ordered=False)
        account.check([follower.log for follower in self._followers], [], world.folder)
        # Beside those of the worlds: their messages are other ones.
        town.figures.update({f"wrk_{name}": n for name, n in account.figures.items()})

    def _command(self, seconds: int) -> list[str]:
        script, (host, port) = self._world.folder / "wrk.lua", self._world.town.address
        text = SCRIPT.replace("PAUSE", str(PAUSE_MS)).replace("SESSIONS", str(SESSIONS))
        script.write_text(text)
        return [
            "wrk", "--threads", "2", "--connections", str(CONNECTIONS), "--duration",
            f"{seconds}s", "--timeout", "60s", "--script", str(script), f"http://{host}:{port}",
            "--", str(self._world.folder), TOKEN,
        ]  # fmt: skip

    def _heard(self) -> dict[str, str]:
        """What was answered: by id, the status."""
        lines = [
            line.partition(" ")
            for path in sorted(self._world.folder.glob("wrk-*.txt"))
            for line in path.read_text().splitlines()
        ]
        odd = [line for line in lines if line[0] != "202"]
        assert not odd, f"wrk was answered {odd[:3]}"
        ids = [id for _, _, id in lines]
        assert len(ids) == len(set(ids)), "two answers for one id"
        return {id: status for status, _, id in lines}

    async def _last_life(self) -> None:
        world, town = self._world, self._world.town
        heard = self._heard()
        async with world.alive() as process:
            await world.serves()
            for id in self._sent(heard):
                number = int(id.partition("-")[2]) % SESSIONS
                sent = town.noted(id, f"wrk{number}", f"plain {id}")
                if id in heard:
                    town.acknowledge(id, "accepted")
                else:
                    sent.unanswered += 1
            await self._send_again()
            await world.until(world.all_ended, "the end of every message")
            await world.until(self._all_heard, "all that happened, to everybody who follows")
            town.over = town.stopping = True
            process.terminate()
            await world.left(0)
        town.figures["wrk_answers"] = len(heard)
        town.figures["wrk_unanswered"] = sum(one.unanswered > 0 for one in town.sent.values())

    def _sent(self, heard: dict[str, str]) -> list[str]:
        """Every id that wrk has given, as far as anybody can know."""
        known = {*heard, *(id for (id,) in rows(self._world.store, "SELECT id FROM message"))}
        most: dict[str, int] = {}
        for id in known:
            thread, _, count = id.partition("-")
            most[thread] = max(most.get(thread, 0), int(count))
        return [f"{thread}-{n}" for thread, count in most.items() for n in range(1, count + 1)]

    async def _send_again(self) -> None:
        town = self._world.town
        poster = Poster(town, "again", ())
        for id, sent in town.sent.items():
            while not sent.acknowledged:
                poster.take(id, await poster.post(id, waits=False), waits=False)
        await poster.hang_up()

    def _all_heard(self) -> bool:
        newest = self._world.newest()
        return all(one.log.last == newest.get(one.session, 0) for one in self._followers)
