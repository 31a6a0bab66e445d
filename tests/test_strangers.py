"""A cancellation that belongs to nobody: somebody has kept the `Cancelled` of a call that was
cancelled long ago, and raises it again. It is a failure of whoever raises it, of nobody else."""

from __future__ import annotations

from contextlib import suppress

import outcome
import trio
from helpers import Log, Script, msg
from trio.testing import MockClock

from trio_gateway import Delivery, Message, Turn
from trio_gateway._events import ChannelFailed, DeliveryDelayed, TurnSettled
from trio_gateway.testing import GatewayOpener, MemoryChannel


async def kept() -> BaseException:
    """The `Cancelled` of a call that is over."""
    found: list[BaseException] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        result = await outcome.acapture(trio.sleep_forever)
        assert isinstance(result, outcome.Error)
        found.append(result.error)
    assert isinstance(found[0], trio.Cancelled)
    return found[0]


async def test_p14_a_cancellation_that_an_agent_has_kept_fails_its_turn_alone(
    open_test_gateway: GatewayOpener, autojump_clock: MockClock
) -> None:
    old = await kept()

    async def agent(turn: Turn) -> str:
        if turn.text == "old":
            raise old
        await trio.sleep(5)
        return "done"

    log = Log()
    async with open_test_gateway(agent, listen=log) as gateway:
        await gateway.accept([msg("innocent", "m1"), msg("a", "m2", "old")])
        await gateway.wait_idle()
        ends = {event.session.name: str(event.state) for event in log.of(TurnSettled)}
        assert ends == {"innocent": "COMPLETED", "a": "FAILED"}
        assert gateway.stop_reason is None


async def test_p14_a_cancellation_that_a_channel_has_kept_costs_one_sending(
    open_test_gateway: GatewayOpener, autojump_clock: MockClock
) -> None:
    old, channel, log = await kept(), MemoryChannel(), Log()
    raised: list[BaseException] = []

    async def once(delivery: Delivery) -> None:
        if not raised:
            raised.append(old)
            raise old

    channel.before_send = once
    async with open_test_gateway(Script(open=True), channels=[channel], listen=log) as gateway:
        await channel.receive("a", "m1", "hi")
        await channel.receive("b", "m2", "hi")
        await gateway.wait_idle()
        assert len(channel.sent) == 2
        assert len(log.of(DeliveryDelayed)) == 1


async def test_p14_a_cancellation_that_a_channel_has_kept_ends_no_other_channel(
    open_test_gateway: GatewayOpener, autojump_clock: MockClock
) -> None:
    old, channel, other, log = await kept(), MemoryChannel("one"), MemoryChannel("other"), Log()
    async with open_test_gateway(
        Script(open=True), channels=[channel, other], listen=log
    ) as gateway:
        await other.receive("a", "m1", "hi")
        channel.break_down(old)  # type: ignore[arg-type]
        await trio.sleep(60)
        assert [event.channel for event in log.of(ChannelFailed)] == ["one"]
        await other.receive("a", "m2", "hi")
        await channel.receive("a", "m3", "hi")
        await gateway.wait_idle()
        assert (len(channel.sent), len(other.sent)) == (1, 2)


async def test_p14_a_cancellation_that_a_hook_has_kept_is_a_refusal(
    open_test_gateway: GatewayOpener, autojump_clock: MockClock
) -> None:
    old = await kept()

    async def authorize(message: Message) -> bool:
        raise old

    async with open_test_gateway(Script(open=True), authorize=authorize) as gateway:
        receipt = await gateway.accept(msg("a", "m1"))
        assert not receipt.accepted
        assert gateway.stop_reason is None


async def test_p05_a_cancellation_from_outside_is_still_the_hosts(
    open_test_gateway: GatewayOpener, autojump_clock: MockClock
) -> None:
    """While somebody is being cancelled, what comes out is let through, as it was."""
    log = Log()
    with trio.CancelScope() as scope, suppress(trio.Cancelled):
        async with open_test_gateway(Script(), listen=log) as gateway:
            await gateway.accept(msg("a", "m1"))
            await trio.sleep(1)
            scope.cancel()
            await trio.sleep_forever()
    assert not log.of(TurnSettled)
    assert gateway.report is not None
    assert gateway.report.interrupted == (1,)
