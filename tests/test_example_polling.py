"""examples/polling_channel.py: nothing is lost, and what may be a repeat says so."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from test_examples import EXAMPLES, output_of

from trio_gateway import Channel
from trio_gateway.testing import CHANNEL_CHECKS, ChannelBench, MemoryIntake


def test_polling_channel_loses_nothing_and_labels_what_may_be_a_repeat(tmp_path: Path) -> None:
    lines = output_of([sys.executable, str(EXAMPLES / "polling_channel.py")], tmp_path)

    for line in (
        "too fast: come back later",
        "bob reads 'GOOD MORNING'",
        "bob reads 'DO YOU HEAR ME?'",
        "bob reads '(You may have seen this before.)\\nDO YOU HEAR ME?'",
        "ada reads 'STILL THERE?'",
    ):
        assert line in lines
    assert lines.index("the gateway is gone") < lines.index("ada reads 'STILL THERE?'")
    assert lines[-1] == "5 texts were shown"


POLLING = runpy.run_path(str(EXAMPLES / "polling_channel.py"))


@asynccontextmanager
async def bot_bench() -> AsyncGenerator[ChannelBench, None]:
    """The polling channel, with its example's platform at its other end."""
    platform = POLLING["Platform"]()
    async with platform.serving():
        channel = POLLING["BotChannel"](platform.url, platform.token)
        yield bench_of_bot(platform, channel)


def bench_of_bot(platform: Any, channel: Channel) -> ChannelBench:
    """What that platform can do, in the words of the suite."""

    async def say(session: str, id: str, text: str) -> None:
        platform.say(session, text)

    async def wait_heard(count: int) -> list[str]:
        await platform.wait_shown(count)
        return [text for _, text in platform.shown]

    async def cut() -> None:
        platform.cut()

    async def be_busy(seconds: float) -> None:
        platform.next_answer, platform.retry_after = "busy", seconds

    async def be_gone() -> None:
        platform.next_answer = "gone"

    return ChannelBench(
        channel=channel,
        say=say,
        wait_heard=wait_heard,
        cut=cut,
        be_busy=be_busy,
        be_gone=be_gone,
    )


@pytest.mark.parametrize("check", CHANNEL_CHECKS, ids=lambda check: check.__name__)
async def test_polling_channel_keeps_the_contract(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    await check(bot_bench)


async def test_the_polling_channels_errors_do_not_tell_its_token() -> None:
    platform = POLLING["Platform"]()
    channel = POLLING["BotChannel"]("http://127.0.0.1:9", platform.token)

    with pytest.raises(ConnectionError) as caught:
        await channel.serve(MemoryIntake(), task_status=trio.TASK_STATUS_IGNORED)

    trace = "".join(traceback.format_exception(caught.value))
    assert platform.token not in trace
    assert "getMe: ConnectError" in trace
