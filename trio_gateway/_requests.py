"""What the requests over the control socket do, each in a few lines, with a running gateway.

What they change, a gateway could be told in other ways too: to stop by a signal, to stop a turn by
its user, to pause by its program. What they tell comes from the store where it is stored, and from
the gateway where it is not.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

import attrs
import trio

from ._config import LogFormat, LogLevel
from ._control import MOST_ROWS, UNREAD, BadRequest, Request
from ._control_address import Peer
from ._errors import GatewayStopping, NotFound
from ._events import (
    DrainReport,
    Event,
    StopRequested,
    TurnInterrupted,
    TurnSettled,
    TurnsMarked,
    TurnsPaused,
)
from ._gateway import Gateway, GatewayState
from ._jsonable import jsonable
from ._logs import Follower, Renderer, Told, render
from ._markers import ResumeReason
from ._reload import Change, Reloaded
from .store import StoreReader

Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Answer = Mapping[str, Any]

DONE: Final[Answer] = MappingProxyType({})


class FollowedLog(Protocol):
    """The log, as somebody follows it."""

    def recent(self) -> tuple[Told, ...]:
        """What was told last, oldest first."""
        ...

    def follow(self, follower: Follower) -> AbstractContextManager[None]:
        """Tell `follower` too while the block lasts."""
        ...


@attrs.frozen(kw_only=True)
class Premises:
    """The process that a gateway lives in, as far as requests are about it."""

    store: Path
    log: FollowedLog
    reload: Callable[[], Awaitable[Reloaded]]
    """Read the configuration again. Raises `ConfigError` and `GatewayStopping`."""
    pending: Callable[[], tuple[Change, ...]]
    """What a restart would change."""
    budget_left: Callable[[], float]
    """Seconds until a stop is over at the latest."""
    supervisor: str | None
    """What starts the process again, if anything is known to."""


@attrs.define(kw_only=True)
class _Stop:
    """A stop as it happens."""

    reason: str
    by: str
    since: datetime
    marked: int | None = None
    settled: int = 0
    interrupted: int = 0
    over: bool = False


class Requests:
    """Answers requests about one gateway. `hear` is told its events."""

    def __init__(self, premises: Premises) -> None:
        self._premises = premises
        self._gateway: Gateway | None = None
        self._since = datetime.now(UTC)
        self._stop: _Stop | None = None
        self._paused: TurnsPaused | None = None
        self._followers: set[LogQueue] = set()
        self._verbs: dict[str, Callable[[Gateway, Request, str], Awaitable[Answer]]] = {
            "status": self._status,
            "overview": self._overview,
            "turns": self._turns,
            "stop": self._request_stop,
            "drain": self._drain,
            "undrain": self._undrain,
            "stop-turn": self._stop_turn,
            "reload": self._reload,
            "quarantine-retry": self._retry_quarantined,
            "quarantine-drop": self._drop_quarantined,
            "dead-letter-retry": self._retry_dead,
            "dead-letter-drop": self._drop_dead,
        }

    def attend(self, gateway: Gateway) -> None:
        """This is the gateway that is asked about; its store is open."""
        self._gateway = gateway

    def hear(self, event: Event) -> None:
        """Note what an event says of the stop and of the drain."""
        match event:
            case StopRequested():
                now = datetime.now(UTC)
                self._stop = _Stop(reason=event.reason.value, by=event.by, since=now)
            case TurnsPaused():
                self._paused = event if event.paused else None
            case TurnsMarked() if self._stop is not None:
                self._stop.marked = event.count
            case TurnSettled() if self._stop is not None:
                self._stop.settled += 1
            case TurnInterrupted() if self._stop is not None:
                self._stop.interrupted += 1
            case DrainReport() if self._stop is not None:
                self._stop.over = True
            case _:
                pass

    async def answer(self, request: Request, peer: Peer, send: Send) -> Answer:
        """Do what is asked. Raises `GatewayError`; `send` tells what comes before the answer."""
        if request.do == "logs":
            return await self._logs(request, send)
        gateway = self._gateway
        if gateway is None:
            raise GatewayStopping("the gateway is only starting; ask again in a moment")
        starts = gateway.state.value is GatewayState.STARTING
        if starts and request.do not in ("status", "overview", "turns", "stop"):
            raise GatewayStopping("the gateway is only starting; ask again in a moment")
        return await self._verbs[request.do](gateway, request, _who(request, peer))

    def close(self) -> None:
        """The gateway has stopped: who follows is told the rest, and that it is the end."""
        for follower in self._followers:
            follower.end()

    # ----- looking

    async def _status(self, gateway: Gateway, request: Request, by: str) -> Answer:
        return {**await self._told(gateway), "not_ready": await _not_ready(gateway)}

    async def _told(self, gateway: Gateway) -> dict[str, Any]:
        counts = await gateway.inspect(lambda reader: reader.counts())
        starts = gateway.state.value is GatewayState.STARTING
        return {
            "pid": os.getpid(),
            "version": version("trio-gateway"),
            "store": str(self._premises.store),
            "since": jsonable(self._since),
            "up_for": (datetime.now(UTC) - self._since).total_seconds(),
            "epoch": gateway.epoch,
            "state": gateway.state.value.value,
            "paused": gateway.paused,
            "paused_by": self._paused.by if self._paused is not None else None,
            "stop": self._stop_told(),
            "channels": list(gateway.channels),
            "supervisor": self._premises.supervisor,
            "budget": gateway.plan.budget,
            "grace": gateway.plan.grace,
            "open": {} if starts else gateway.statistics(),
            "stored": jsonable(counts),
            "needs_restart": [str(change) for change in self._premises.pending()],
        }

    def _stop_told(self) -> Mapping[str, Any] | None:
        if self._stop is None:
            return None
        return {**jsonable(self._stop), "left": self._premises.budget_left()}

    async def _turns(self, gateway: Gateway, request: Request, by: str) -> Answer:
        return {"turns": await self._open_turns(gateway)}

    async def _open_turns(self, gateway: Gateway) -> list[dict[str, Any]]:
        """What runs, with its marker; and what is to resume, and does not yet."""
        rows = await gateway.inspect(lambda reader: reader.open_turns())
        # Asked after the store was: what has begun since is listed the next time.
        starts = gateway.state.value is GatewayState.STARTING
        running = {} if starts else {turn.id: turn for turn in gateway.turns()}
        told: list[dict[str, Any]] = []
        for row in rows:
            live = running.get(row.turn)
            told.append(
                {
                    "turn": row.turn,
                    "session": str(row.session),
                    "attempt": row.attempt,
                    "marker": row.state,
                    "reason": row.reason,
                    "begun_at": jsonable(row.begun_at),
                    "running_for": None if live is None else live.running_for,
                    "step": None if live is None else live.step,
                }
            )
        return told

    async def _overview(self, gateway: Gateway, request: Request, by: str) -> Answer:
        limit = min(request.number("rows", 20), MOST_ROWS)

        def read(reader: StoreReader) -> tuple[Any, Any]:
            return jsonable(reader.inbox(limit)), jsonable(reader.outbox(limit))

        inbox, outbox = await gateway.inspect(read)
        turns = await self._open_turns(gateway)
        return {**await self._told(gateway), "turns": turns, "inbox": inbox, "outbox": outbox}

    # ----- the log

    async def _logs(self, request: Request, send: Send) -> Answer:
        level = _level(request.text("level", LogLevel.INFO.value))
        follower = LogQueue(level)
        records = [told for told in self._premises.log.recent() if told.level.is_at_least(level)]
        self._followers.add(follower)
        try:
            with self._premises.log.follow(follower):
                for told in records[len(records) - min(request.number("last"), len(records)) :]:
                    await send(follower.shown(told))
                if request.flag("follow"):
                    await follower.tell(send)
        finally:
            self._followers.discard(follower)
        return {"end": "the gateway has stopped"} if request.flag("follow") else DONE

    # ----- changing

    async def _request_stop(self, gateway: Gateway, request: Request, by: str) -> Answer:
        await trio.lowlevel.checkpoint()
        reason = ResumeReason.RESTART if request.flag("restart") else ResumeReason.SHUTDOWN
        open_turns = 0 if gateway.state.value is GatewayState.STARTING else len(gateway.turns())
        asked = gateway.stop_reason
        gateway.request_stop(reason, by=by, now=request.flag("now"))
        return {
            "pid": os.getpid(),
            "turns": open_turns,
            "budget_left": self._premises.budget_left(),
            "grace": gateway.plan.grace,
            "reason": (asked or reason).value,
            "already": asked is not None,
        }

    async def _drain(self, gateway: Gateway, request: Request, by: str) -> Answer:
        await trio.lowlevel.checkpoint()
        if gateway.stop_reason is not None:
            raise GatewayStopping("the gateway stops already: no turn begins any more")
        already = gateway.paused
        gateway.pause(by=by)
        return {"already": already, "turns": len(gateway.turns())}

    async def _undrain(self, gateway: Gateway, request: Request, by: str) -> Answer:
        await trio.lowlevel.checkpoint()
        if gateway.stop_reason is not None:
            raise GatewayStopping("the gateway stops, and that cannot be taken back")
        already = not gateway.paused
        gateway.unpause(by=by)
        return {"already": already, "waiting": gateway.statistics()["messages_open"]}

    async def _stop_turn(self, gateway: Gateway, request: Request, by: str) -> Answer:
        named = request.text("session")
        session = await gateway.inspect(lambda reader: reader.find_session(named))
        return {"session": str(session), "stopped": await gateway.stop_turn(session)}

    async def _reload(self, gateway: Gateway, request: Request, by: str) -> Answer:
        reloaded = await self._premises.reload()
        return {
            "file": None if reloaded.told.file is None else str(reloaded.told.file),
            "changed": [str(change) for change in reloaded.hot],
            "needs_restart": [str(change) for change in reloaded.cold],
            "warnings": list(reloaded.told.warnings()),
        }

    async def _retry_quarantined(self, gateway: Gateway, request: Request, by: str) -> Answer:
        turn = request.number("turn")
        if not await gateway.retry_quarantined(turn):
            raise NotFound(f"no turn {turn} in quarantine; see trio-gateway quarantine list")
        return DONE

    async def _drop_quarantined(self, gateway: Gateway, request: Request, by: str) -> Answer:
        turn = request.number("turn")
        if not (ids := await gateway.drop_quarantined(turn)):
            raise NotFound(f"no turn {turn} in quarantine; see trio-gateway quarantine list")
        return {"ids": list(ids)}

    async def _retry_dead(self, gateway: Gateway, request: Request, by: str) -> Answer:
        delivery = request.number("delivery")
        if not await gateway.retry_dead_letter(delivery):
            raise NotFound(f"no dead letter {delivery}; see trio-gateway dead-letters list")
        return DONE

    async def _drop_dead(self, gateway: Gateway, request: Request, by: str) -> Answer:
        delivery = request.number("delivery")
        if not await gateway.drop_dead_letter(delivery):
            raise NotFound(f"no dead letter {delivery}; see trio-gateway dead-letters list")
        return DONE


def _who(request: Request, peer: Peer) -> str:
    """Who asks, in words for the log and for whoever looks; a process of another container has no
    number here."""
    command = "restart" if request.flag("restart") else request.do
    process = f"process {peer.pid} of " if peer.pid else ""
    return f"trio-gateway {command} ({process}user {peer.uid})"


async def _not_ready(gateway: Gateway) -> list[str]:
    return list(await gateway.check())


def _level(text: str) -> LogLevel:
    try:
        return LogLevel(text)
    except ValueError:
        raise BadRequest(f"logs: level: expected one of {', '.join(LogLevel)}") from None


class LogQueue:
    """What somebody who follows the log has not read yet: bounded, the oldest goes first."""

    def __init__(self, level: LogLevel) -> None:
        self.level = level
        self._records: deque[Told] = deque()
        self._dropped = 0
        self._ended = False
        self._news = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._renderer = Renderer(LogFormat.JSON)

    def hear(self, told: Told) -> None:
        """Keep a record; in any thread."""
        if len(self._records) >= UNREAD:
            with suppress(IndexError):  # it was read meanwhile
                self._records.popleft()
                self._dropped += 1
        self._records.append(told)
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._wake, idempotent=True)

    def _wake(self) -> None:
        self._news.set()

    def end(self) -> None:
        """There is nothing more to come."""
        self._ended = True
        self._news.set()

    def shown(self, told: Told) -> Mapping[str, Any]:
        """A record as it is sent: with no secret in it, and nothing that a terminal obeys."""
        self._renderer.look_for_secrets()
        return {"record": render(self._renderer, told).rstrip("\n")}

    async def tell(self, send: Send) -> None:
        """Send what comes, until the end."""
        while not self._ended or self._records or self._dropped:
            await self._news.wait()
            self._news = trio.Event()
            while self._records:
                if self._dropped:
                    dropped, self._dropped = self._dropped, 0
                    await send({"dropped": dropped})
                await send(self.shown(self._records.popleft()))
            if self._ended:
                return
