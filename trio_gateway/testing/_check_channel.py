"""What every channel must do: the contract of `trio_gateway.channels`, as a suite.

Whoever writes a channel brings a bench: the channel, and the platform at its other end (a fake one,
on pipes or a local socket), as an async context manager.

    @asynccontextmanager
    async def my_bench():
        async with fake_platform() as platform:
            yield ChannelBench(
                channel=MyChannel(platform.address),
                say=platform.person_says,
                wait_heard=platform.wait_for_texts,
            )

    @pytest.mark.parametrize("check", CHANNEL_CHECKS, ids=lambda check: check.__name__)
    async def test_my_channel_keeps_the_contract(check):
        await check(my_bench)

or all of it at once: `await check_channel(my_bench)`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, TypeAlias

import attrs
import trio

from .. import (
    Channel,
    Delivery,
    HistoryItem,
    Message,
    Receipt,
    ReceiptStatus,
    ReplyKind,
    RetryLater,
    SessionKey,
    StoreFull,
    Undeliverable,
)
from ._rules import Check, plainly, rule

PATIENCE: Final = 10.0
"""Seconds that anything may take before a check fails."""


@attrs.frozen(kw_only=True)
class ChannelBench:
    """A channel, and the other end of it. The optional parts are for what a platform can do; a
    check that needs one that is None passes."""

    channel: Channel
    say: Callable[[str, str, str], Awaitable[object]]
    """Have a person send a message: session, id, text."""
    wait_heard: Callable[[int], Awaitable[Sequence[str]]]
    """Wait until so many texts have arrived in all; return them, in the order of arrival."""
    end_input: Callable[[], Awaitable[object]] | None = None
    """There will be no more input: `serve` is to return."""
    cut: Callable[[], Awaitable[object]] | None = None
    """Break the connection: `serve` is to raise."""
    be_busy: Callable[[float], Awaitable[object]] | None = None
    """Have the platform answer the next send with "come back in so many seconds"."""
    be_gone: Callable[[], Awaitable[object]] | None = None
    """Have the platform answer the next send with "that will never arrive"."""


MakeBench: TypeAlias = Callable[[], AbstractAsyncContextManager[ChannelBench]]
"""Makes a new bench for each check."""


async def check_channel(make_bench: MakeBench) -> None:
    """Hold a channel to the contract. Raises `AssertionError`, with the rule that it breaks."""
    for check in CHANNEL_CHECKS:
        await check(make_bench)


class MemoryIntake:
    """An inbox for tests of a channel: takes everything, and keeps it in `messages`.

    `refusal`, if set, is the reason with which it refuses; `failure` is what `accept` raises.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.cursors: list[str] = []
        self.bad_input: list[tuple[str, str]] = []
        self.refusal: str | None = None
        self.failure: Exception | None = None
        self._news = trio.Event()

    async def wait_asked(self, count: int) -> tuple[Message, ...]:
        """Wait until so many messages were handed in, accepted or not; return them."""
        while len(self.messages) < count:
            await self._news.wait()
        return tuple(self.messages)

    async def accept(self, *messages: Message, cursor: str | None = None) -> tuple[Receipt, ...]:
        """See `Intake.accept`."""
        await trio.lowlevel.checkpoint()
        self.messages += messages
        self._news.set()
        self._news = trio.Event()
        if self.failure is not None:
            raise self.failure
        if cursor is not None:
            self.cursors.append(cursor)
        return tuple(self._receipt(message) for message in messages)

    def _receipt(self, message: Message) -> Receipt:
        refused = self.refusal is not None
        return Receipt(
            status=ReceiptStatus.REFUSED if refused else ReceiptStatus.ACCEPTED,
            session=message.key,
            id=message.id,
            reason=self.refusal,
        )

    async def cursor(self) -> str | None:
        """See `Intake.cursor`."""
        await trio.lowlevel.checkpoint()
        return self.cursors[-1] if self.cursors else None

    async def history(self, session: str, limit: int) -> tuple[HistoryItem, ...]:
        """See `Intake.history`: nobody has said anything yet."""
        await trio.lowlevel.checkpoint()
        return ()

    def refused_input(self, where: str, error: str) -> None:
        """See `Intake.refused_input`."""
        self.bad_input.append((where, error))


# ----- small tools


@asynccontextmanager
async def _in_time(what: str, patience: float = PATIENCE) -> AsyncGenerator[None]:
    """The block ends within the suite's patience."""
    with trio.move_on_after(patience) as scope:  # noqa: ASYNC100 - the block has them
        yield
    rule(not scope.cancelled_caught, f"{what} takes no longer than {patience:g} s")


@asynccontextmanager
async def _served(bench: ChannelBench, intake: MemoryIntake) -> AsyncGenerator[None]:
    """The channel is served, and connected, for the length of the block; then cancelled."""
    async with trio.open_nursery() as nursery:
        async with _in_time("connecting (calling task_status.started)"):
            await nursery.start(bench.channel.serve, intake)
        yield
        nursery.cancel_scope.cancel()


def _delivery(bench: ChannelBench, text: str, session: str = "ada", number: int = 1) -> Delivery:
    return Delivery(
        id=number,
        session=SessionKey(bench.channel.name, session),
        key=f"key-{session}-{number}",
        text=text,
        in_reply_to=("m1",),
        attempt=1,
        final=True,
        repeat=False,
        kind=ReplyKind.ANSWER,
    )


async def _heard(bench: ChannelBench, count: int) -> list[str]:
    heard: list[str] = []
    async with _in_time(f"the arrival of {count} texts"):
        heard += await bench.wait_heard(count)
    return heard


# ----- the checks


async def check_attributes(make_bench: MakeBench) -> None:
    """A channel says who it is, and how it counts."""
    async with make_bench() as bench:
        channel = bench.channel
        name = channel.name
        rule(SessionKey.parse(f"{name}:x").channel == name, "its name can name a channel", name)
        limit = channel.text_limit
        rule(limit is None or limit > 0, "a text limit is None or positive", limit)
        lengths = [channel.text_length("ab" * n) for n in range(50)]
        rule(lengths == sorted(lengths), "a longer text is not shorter", lengths)


async def check_serving_and_cancelling(make_bench: MakeBench) -> None:
    """`serve` says that it is connected, and can be cancelled, and called again."""
    async with make_bench() as bench:
        for _ in range(3):
            async with _in_time("being cancelled", 2 * PATIENCE), _served(bench, MemoryIntake()):
                await trio.lowlevel.checkpoint()


async def check_cancelling_at_once(make_bench: MakeBench) -> None:
    """`serve` can be cancelled before it has begun, and harms nothing by it."""
    async with make_bench() as bench:
        async with _in_time("being cancelled"):
            with trio.CancelScope() as scope:
                scope.cancel()
                await bench.channel.serve(MemoryIntake(), task_status=trio.TASK_STATUS_IGNORED)
        async with _served(bench, MemoryIntake()):
            await bench.channel.send(_delivery(bench, "hello"))
            rule(await _heard(bench, 1) == ["hello"], "it can be served afterwards")


async def check_messages_come_in_whole(make_bench: MakeBench) -> None:
    """What a person sends reaches the inbox: session, id, text, and the channel's own name."""
    texts = ["hello", "naïve ☃ 日本 \U0001f642", 'quotes " and \\ and {}', "a  b\tc"]
    async with make_bench() as bench:
        intake = MemoryIntake()
        async with _served(bench, intake):
            for number, text in enumerate(texts):
                await bench.say("ada", f"m{number}", text)
            async with _in_time("handing messages in"):
                await intake.wait_asked(len(texts))
        found = [(m.channel, m.session, m.text) for m in intake.messages]
        expected = [(bench.channel.name, "ada", text) for text in texts]
        rule(found == expected, "messages come in whole, and in order", found)
        ids = [message.id for message in intake.messages]
        rule(len(set(ids)) == len(ids), "two messages have two ids", ids)


async def check_sessions_are_kept_apart(make_bench: MakeBench) -> None:
    """Two conversations are two sessions, and replies find theirs."""
    async with make_bench() as bench:
        intake = MemoryIntake()
        async with _served(bench, intake):
            await bench.say("ada", "m1", "from ada")
            await bench.say("bob", "m2", "from bob")
            async with _in_time("handing messages in"):
                await intake.wait_asked(2)
        found = sorted((m.session, m.text) for m in intake.messages)
        rule(found == [("ada", "from ada"), ("bob", "from bob")], "sessions are apart", found)


async def check_refusals_are_survived(make_bench: MakeBench) -> None:
    """A refusal is told or dropped, and is no reason to end."""
    async with make_bench() as bench:
        intake = MemoryIntake()
        async with _served(bench, intake):
            intake.refusal = "the inbox is full; try again later"
            await bench.say("ada", "m1", "too much")
            async with _in_time("handing a message in"):
                await intake.wait_asked(1)
            intake.refusal = None
            await bench.say("ada", "m2", "again")
            async with _in_time("handing a message in after a refusal"):
                await intake.wait_asked(2)


async def check_a_failing_store_is_survived(make_bench: MakeBench) -> None:
    """When nothing can be written, `serve` goes on or raises; served again, it takes messages."""
    async with make_bench() as bench:
        intake = MemoryIntake()
        intake.failure = StoreFull("the disk is full")
        try:
            async with _served(bench, intake):
                await bench.say("ada", "m1", "lost for now")
                async with _in_time("handing a message in"):
                    await intake.wait_asked(1)
                await trio.lowlevel.checkpoint()
        except* Exception:
            await trio.lowlevel.checkpoint()
        intake = MemoryIntake()
        async with _served(bench, intake):
            await bench.say("ada", "m2", "hello again")
            async with _in_time("handing a message in after a failure of the store"):
                while "hello again" not in [message.text for message in intake.messages]:
                    await intake.wait_asked(len(intake.messages) + 1)


async def check_sends_arrive_in_order(make_bench: MakeBench) -> None:
    """One session's deliveries arrive in the order in which they were sent, whole."""
    async with make_bench() as bench:
        texts = [f"number {number} ☃" for number in range(20)]
        async with _served(bench, MemoryIntake()):
            for number, text in enumerate(texts):
                await bench.channel.send(_delivery(bench, text, number=number))
            heard = await _heard(bench, len(texts))
        rule(heard == texts, "one session's texts arrive in order", heard)


async def check_sends_to_many_at_once(make_bench: MakeBench) -> None:
    """Deliveries to different sessions can be sent at the same time, and each arrives once."""
    async with make_bench() as bench:
        texts = [f"for number {number}" for number in range(20)]
        async with _served(bench, MemoryIntake()):
            async with trio.open_nursery() as nursery:
                for number, text in enumerate(texts):
                    delivery = _delivery(bench, text, f"session {number}", number)
                    nursery.start_soon(bench.channel.send, delivery)
            heard = await _heard(bench, len(texts))
        rule(sorted(heard) == sorted(texts), "each text arrives, once", heard)


async def check_long_texts(make_bench: MakeBench) -> None:
    """A text of exactly the limit arrives whole; where there is no limit, a long one does."""
    async with make_bench() as bench:
        limit = bench.channel.text_limit
        text = "x" * 100_000
        while limit is not None and bench.channel.text_length(text) > limit:
            text = text[: len(text) * 9 // 10]
        heard: list[str] = []
        async with _served(bench, MemoryIntake()), trio.open_nursery() as nursery:
            nursery.start_soon(bench.channel.send, _delivery(bench, text))
            heard += await _heard(bench, 1)
        rule(heard == [text], "a text within the limit arrives whole", [len(t) for t in heard])


async def check_a_cancelled_send_harms_no_other(make_bench: MakeBench) -> None:
    """A send that is cancelled may have arrived, whole, or not at all; the next one arrives."""
    async with make_bench() as bench, _served(bench, MemoryIntake()):
        with trio.CancelScope() as scope:
            scope.cancel()
            await bench.channel.send(_delivery(bench, "cancelled", number=1))
        await bench.channel.send(_delivery(bench, "next", number=2))
        heard = await _heard(bench, 1)
        if heard == ["cancelled"]:
            heard = await _heard(bench, 2)
        rule(heard in (["next"], ["cancelled", "next"]), "the next text arrives", heard)


async def check_progress_never_waits_or_fails(make_bench: MakeBench) -> None:
    """`progress` may drop what it is given, connected or not, and never gets in anybody's way."""
    async with make_bench() as bench:
        began = trio.current_time()
        bench.channel.progress("ada", "before it is connected")
        async with _served(bench, MemoryIntake()):
            for number in range(200):
                bench.channel.progress("ada", f"working, {number}")
            bench.channel.progress("ada", "☃ and a\nnew line")
            bench.channel.progress("ada", "")
            bench.channel.progress("nobody", "")
            await bench.channel.send(_delivery(bench, "done"))
            rule((await _heard(bench, 1))[-1] == "done", "a reply comes after its progress")
        bench.channel.progress("ada", "after it was served")
        rule(trio.current_time() - began < PATIENCE, "progress does not wait")


async def check_the_end_of_input(make_bench: MakeBench) -> None:
    """When there is no more input, `serve` returns, and `send` still works."""
    async with make_bench() as bench:
        if bench.end_input is None:
            return
        intake = MemoryIntake()
        await bench.say("ada", "m1", "the last one")
        await bench.end_input()
        async with _in_time("returning at the end of the input"):
            await bench.channel.serve(intake, task_status=trio.TASK_STATUS_IGNORED)
        rule([m.text for m in intake.messages] == ["the last one"], "nothing is left behind")
        await bench.channel.send(_delivery(bench, "an answer"))
        rule(await _heard(bench, 1) == ["an answer"], "send works after the end of the input")


async def check_a_cut_connection(make_bench: MakeBench) -> None:
    """When the connection breaks, `serve` raises an ordinary exception, and can be called again."""
    async with make_bench() as bench:
        if bench.cut is None:
            return
        raised: list[BaseException] = []
        try:
            async with _in_time("noticing that the connection is cut"), trio.open_nursery() as it:
                await it.start(bench.channel.serve, MemoryIntake())
                await bench.cut()
        except* Exception as errors:
            raised += errors.exceptions
        rule(len(raised) == 1, "a cut connection raises", raised)
        intake = MemoryIntake()
        async with _served(bench, intake):
            await bench.say("ada", "m1", "hello again")
            async with _in_time("handing a message in after a cut"):
                await intake.wait_asked(1)


async def check_a_busy_platform(make_bench: MakeBench) -> None:
    """A platform that asks to wait is `RetryLater`, with its own number of seconds."""
    async with make_bench() as bench:
        if bench.be_busy is None:
            return
        async with _served(bench, MemoryIntake()):
            await bench.be_busy(30.0)
            after: list[float] = []
            try:
                await bench.channel.send(_delivery(bench, "too soon"))
            except RetryLater as error:
                after.append(error.after)
            rule(after == [30.0], "a busy platform is RetryLater(30)", after)
            await bench.channel.send(_delivery(bench, "in time"))
            rule((await _heard(bench, 1))[-1] == "in time", "and takes the next one")


async def check_somebody_who_is_gone(make_bench: MakeBench) -> None:
    """What will never arrive is `Undeliverable`, and nothing else is the worse for it."""
    async with make_bench() as bench:
        if bench.be_gone is None:
            return
        async with _served(bench, MemoryIntake()):
            await bench.be_gone()
            undeliverable = False
            try:
                await bench.channel.send(_delivery(bench, "to nobody"))
            except Undeliverable:
                undeliverable = True
            rule(undeliverable, "what never arrives is Undeliverable")
            await bench.channel.send(_delivery(bench, "to somebody", "bob"))
            rule((await _heard(bench, 1))[-1] == "to somebody", "others are served")


CHANNEL_CHECKS: Final[tuple[Check[MakeBench], ...]] = tuple(
    plainly(check)
    for check in (
        check_attributes,
        check_serving_and_cancelling,
        check_cancelling_at_once,
        check_messages_come_in_whole,
        check_sessions_are_kept_apart,
        check_refusals_are_survived,
        check_a_failing_store_is_survived,
        check_sends_arrive_in_order,
        check_sends_to_many_at_once,
        check_long_texts,
        check_a_cancelled_send_harms_no_other,
        check_progress_never_waits_or_fails,
        check_the_end_of_input,
        check_a_cut_connection,
        check_a_busy_platform,
        check_somebody_who_is_gone,
    )
)
"""Each check by itself, for a parametrised test."""
