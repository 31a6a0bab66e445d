"""The process around a gateway: signals, the supervisor, the exit code.

0    stopped in order, also when turns were interrupted: they resume at the next boot
1    failed: the gateway's own code, or a store that cannot be opened
75   stopped in order, and wants to be started again
78   cannot be used as it is configured; starting it again will not help
"""

from __future__ import annotations

import os
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, cast

import attrs
import trio

from ._allowance import is_supervised, supervisor_of, warnings_at_start
from ._collector import calm_collector
from ._config import Config, LogLevel
from ._control_socket import control_socket
from ._errors import (
    AgentNotUsable,
    ConfigError,
    GatewayError,
    GatewayStopping,
    StoreError,
    escape,
    shown,
    unwrap,
)
from ._events import DrainReport, Event, MarkingFailed, StopRequested, TurnsMarked
from ._gateway import Gateway, open_gateway
from ._markers import ResumeReason
from ._policy import plan_stop
from ._reload import Reloaded, Reloader
from ._requests import FollowedLog, Premises, Requests
from ._settings import Settings
from ._signals import EXIT_FAILURE, EXIT_RESTART, SignalDesk, Stop, write_some
from ._stall import Stall, watching_for_stalls
from ._supervisor import Supervisor, status_of
from ._tasktree import task_tree
from ._tracing import TracerProvider
from .channels import Channel

EXIT_OK: Final = 0
EXIT_CONFIG: Final = 78

FLUSH: Final = 1.0
"""Seconds that the log gets to be written at the end."""

TRACES: Final = 2.0
"""Seconds that spans get to leave at the end, if the budget has them."""

LINGER: Final = 3.0
"""Seconds that the process gets to end by itself after the gateway has, if the budget has them."""


class HostLog(FollowedLog, Protocol):
    """Where the host's log goes. No method may wait for a reader, but `flush`, so long."""

    def listener(self, event: Event) -> None:
        """Tell an event of the gateway."""
        ...

    def say(self, level: str, event: str, **fields: object) -> None:
        """Tell something that is no event of the gateway."""
        ...

    def flush(self, timeout: float) -> object:
        """Wait until all is written, at most `timeout` seconds."""
        ...

    def use_level(self, level: LogLevel) -> None:
        """Tell from this level on."""
        ...


class HostTraces(Protocol):
    """Where spans go, if anywhere."""

    @property
    def provider(self) -> TracerProvider:
        """Who makes them."""
        ...

    def close(self, timeout: float) -> None:
        """Let them leave, for at most `timeout` seconds."""
        ...


def host(
    agent: Any,
    *,
    store: str | Path,
    channels: Sequence[Channel],
    settings: Settings,
    log: HostLog,
    signals: SignalDesk,
    reloader: Reloader | None = None,
    traces: HostTraces | None = None,
) -> int:
    """Host an agent until somebody stops it; return the exit code for the process.

    A stop is asked for by a signal (`signals` is installed already), by the agent, by the end of
    all input (once everything accepted is answered and delivered), or by a channel whose other
    end is gone. Does not return when turns do not end although they were cancelled, or when the
    stop's budget is over: then the process leaves from here, with true markers.
    """
    calm_collector()
    signals.use_plan(plan_stop(settings.grace, settings.budget))
    if signals.asked is not None:
        # Nothing is open, and what is in the store says so by itself: do not even begin.
        log.say("info", "stopped_before_start", by=signals.asked.by)
        code = _code(signals.asked.reason)
    else:
        house = _House(agent, store, channels, settings, log, signals, reloader, traces)
        code = house.live_and_end()
        house.send_traces()
    log.flush(min(FLUSH, signals.time_left / 2))
    signals.leave_within(min(LINGER, signals.time_left / 2), code)
    signals.take_no_more()
    return code


def _code(reason: ResumeReason | None) -> int:
    return EXIT_RESTART if reason is ResumeReason.RESTART else EXIT_OK


class _House:
    """One gateway, as its host serves it."""

    def __init__(
        self,
        agent: Any,
        store: str | Path,
        channels: Sequence[Channel],
        settings: Settings,
        log: HostLog,
        signals: SignalDesk,
        reloader: Reloader | None,
        traces: HostTraces | None,
    ) -> None:
        self._open: Callable[[], Any] = lambda: open_gateway(
            agent,
            store=store,
            channels=channels,
            settings=settings,
            listen=self._hear,
            tracer_provider=None if traces is None else traces.provider,
            beside=self._beside,
        )
        self._traces = traces
        self._store = Path(store).absolute()
        self._reloader = reloader
        self._reload_lock = trio.Lock()
        self._reload_wanted = trio.Event()
        self._requests = Requests(self._premises(log))
        self._plan = plan_stop(settings.grace, settings.budget)
        self._log = log
        self._signals = signals
        self._supervisor = Supervisor()
        self._gateway: Gateway | None = None
        self._asked = False
        """Whether somebody has asked for the stop; else Trio itself has fallen over."""

    def _premises(self, log: HostLog) -> Premises:
        return Premises(
            store=self._store,
            log=log,
            reload=self._reload,
            pending=lambda: self._reloader.pending if self._reloader is not None else (),
            budget_left=lambda: self._signals.time_left,
            supervisor=supervisor_of(),
        )

    @asynccontextmanager
    async def _beside(self, gateway: Gateway) -> AsyncGenerator[None]:
        """Whoever looks after the gateway is answered, as long as it has its store."""
        self._requests.attend(gateway)
        async with control_socket(self._store, self._requests, self._log.say):
            yield

    def live_and_end(self) -> int:
        """The whole life of the gateway; the exit code."""
        try:
            self._signals.run(self, self._live)
        except (Exception, BaseExceptionGroup) as error:
            return self._failed(unwrap(error))
        return self._code()

    async def _live(self) -> None:
        self._supervisor.starting()
        with watching_for_stalls(self._stalled, self._goes_on):
            async with trio.open_nursery() as attendants:
                async with self._open() as gateway:
                    gateway.on_unresponsive = self._leave
                    self._gateway = gateway
                    self._supervisor.ready()
                    self._attend(gateway, attendants)
                    self._signals.obey()
                    await self._until_stop(gateway)
                attendants.cancel_scope.cancel(reason="the gateway has stopped")

    def _attend(self, gateway: Gateway, attendants: trio.Nursery) -> None:
        """Start what looks after the supervisor, also while the gateway drains."""
        self._attendants = attendants
        alive = partial(self._supervisor.keep_alive, gateway.touch, self._silent)
        status = partial(self._supervisor.keep_status, partial(_status_of, gateway))
        for service in (alive, status, self._compare_limits, self._reload_when_wanted):
            attendants.start_soon(self._guard, service)

    async def _guard(self, service: Callable[[], Awaitable[None]]) -> None:
        """What fails here is told, and costs no turn its window."""
        try:
            await service()
        except Exception as error:
            self._log.say("error", "supervisor_failed", error=shown(error))

    async def _compare_limits(self) -> None:
        """Compare our budget with what the supervisor really allows; it is asked in a thread."""
        if is_supervised():
            ask = partial(warnings_at_start, self._plan.budget)
            for warning in await trio.to_thread.run_sync(ask, abandon_on_cancel=True):
                self._log.say("warning", "supervisor", warning=warning)

    # ----- the configuration, read again

    async def _reload_when_wanted(self) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted = trio.Event()
            with suppress(GatewayError):  # which the log tells
                await self._reload()

    async def _reload(self) -> Reloaded:
        """Read the configuration again, and let what can count at once. Raises `ConfigError` and
        `GatewayStopping`, having changed nothing."""
        async with self._reload_lock:
            self._supervisor.reloading()
            try:
                reloaded = await self._read_and_use()
            except GatewayError as error:
                self._log.say("error", "reload_failed", errors=str(error).splitlines())
                raise
            finally:
                self._supervisor.reloaded()
        self._tell_reloaded(reloaded)
        return reloaded

    async def _read_and_use(self) -> Reloaded:
        if self._reloader is None:
            raise ConfigError("this gateway was started with no configuration to read again")
        if self._gateway is None:
            raise GatewayStopping("the gateway is only starting; ask again in a moment")
        read = await trio.to_thread.run_sync(self._reloader.read, abandon_on_cancel=True)
        return self._reloader.apply(read, self._use)

    def _use(self, told: Config) -> None:
        assert self._gateway is not None
        assert self._reloader is not None
        self._gateway.reconfigure(told.settings())
        self._plan = self._gateway.plan
        self._signals.use_plan(self._plan)
        self._log.use_level(self._reloader.level(told))

    def _tell_reloaded(self, reloaded: Reloaded) -> None:
        changed, cold = [str(one) for one in reloaded.hot], [str(one) for one in reloaded.cold]
        self._log.say("info", "reloaded", changed=changed, needs_restart=cold)
        for warning in reloaded.told.warnings():
            self._log.say("warning", "configuration", warning=warning)
        if any(change.key.startswith("drain.") for change in reloaded.hot):
            self._attendants.start_soon(self._guard, self._compare_limits)

    def _silent(self, error: StoreError) -> None:
        self._log.say("error", "watchdog_not_pinged", error=str(error))

    # ----- for the watch on the event loop, on its thread

    def _stalled(self, stall: Stall) -> None:
        self._log.say("error", "loop_stalled", **attrs.asdict(stall))
        self._supervisor.interject(escape(f"blocked by {stall.turn or stall.task or 'something'}"))

    def _goes_on(self, seconds: float) -> None:
        self._log.say("warning", "loop_goes_on", blocked_for=seconds)
        self._supervisor.go_on()

    # ----- until the stop

    async def _until_stop(self, gateway: Gateway) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_at_end_of_input, gateway)
                await gateway.wait_stop_requested()
                self._asked = True
                nursery.cancel_scope.cancel()
        finally:
            # The time of a stop is kept also where nobody could say that it was asked for: a log
            # that fell over hears of no event, and a Trio that fell over of none at all.
            self._signals.arm(gateway.stop_reason or ResumeReason.SHUTDOWN, "the host")

    async def _stop_at_end_of_input(self, gateway: Gateway) -> None:
        await gateway.wait_input_ended()
        await gateway.wait_idle()
        gateway.request_stop(by="the end of the input")

    def _hear(self, event: Event) -> None:
        if isinstance(event, StopRequested):
            self._signals.arm(event.reason, event.by)
        self._log.listener(event)
        if isinstance(event, TurnsMarked | MarkingFailed):
            self._signals.marked()
        self._requests.hear(event)
        self._supervisor.hear(event, lambda: self._signals.time_left)

    # ----- for the signal desk

    def stop(self, stop: Stop) -> None:
        """Stop the gateway; before there is one, the stop waits (see `live`)."""
        if self._gateway is not None:
            self._gateway.request_stop(stop.reason, by=stop.by, now=stop.now)

    def reload(self) -> None:
        """Read the configuration again, now or when the gateway serves."""
        self._reload_wanted.set()

    def show(self) -> str:
        """The open turns and Trio's tasks."""
        turns = self._gateway.turns() if self._gateway is not None else ()
        lines = [
            f"  turn {turn.id} of {str(turn.session)!r}, attempt {turn.attempt},"
            f" running for {turn.running_for:.1f} s"
            for turn in turns
        ]
        return "\n".join([f"{len(turns)} open turns", *lines, "tasks:", task_tree(), ""])

    def mark(self, reason: ResumeReason, timeout: float) -> int | None:
        """Mark the open turns from the desk's thread."""
        gateway = self._gateway
        if gateway is None:
            return None
        try:
            return gateway.mark_from_thread(reason, timeout)
        except GatewayError:
            return None  # they are RUNNING on disk, and resume all the same

    def flush(self, timeout: float) -> None:
        """Get the log out."""
        self._log.flush(timeout)

    # ----- the end

    def send_traces(self) -> None:
        """Let spans leave, in a part of the time that is left."""
        if self._traces is not None:
            self._traces.close(min(TRACES, self._signals.time_left / 3))

    def _code(self) -> int:
        """A stop that nobody asked for, or that a failure asked for, was not served."""
        if self._gateway is None:
            return EXIT_OK
        if self._gateway.failure is not None or not self._asked:
            return EXIT_FAILURE
        return _code(self._gateway.stop_reason)

    def _failed(self, error: BaseException) -> int:
        """Tell what went wrong, once and clearly; return the exit code."""
        if self._gateway is not None and self._gateway.failure is not None:
            return EXIT_FAILURE  # told already, with its traceback
        causes = list(_leaves(error))
        if not all(isinstance(cause, GatewayError) for cause in causes):
            trace = "".join(traceback.format_exception(error))
            self._log.say("critical", "host_failed", error=shown(error), traceback=trace)
            return EXIT_FAILURE
        self._log.flush(FLUSH)
        for cause in causes:
            write_some(2, f"trio-gateway: {cause}\n".encode(errors="backslashreplace"))
        usable = not any(isinstance(cause, ConfigError | AgentNotUsable) for cause in causes)
        return EXIT_FAILURE if usable else EXIT_CONFIG

    def _leave(self, report: DrainReport) -> None:
        """Leave turns behind that swallow their cancellation: the stop was served, they resume."""
        self.send_traces()
        self._log.flush(min(FLUSH, self._signals.time_left / 2))
        os._exit(self._code())


def _status_of(gateway: Gateway) -> str:
    return status_of(gateway.state.value.value, gateway.statistics())


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield from _leaves(inner)
    else:
        yield error
