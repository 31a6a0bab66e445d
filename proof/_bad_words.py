"""What programs hand in: session names, ids, senders, texts, cursors; and odd things in their
places.

    names    wrong in every way: refused by a receipt that names the field, or accepted and kept
    texts    right, however odd: what was accepted reaches the agent as it was sent, and what the
             agent says arrives as it was said, in one piece or in parts
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import attrs
import trio
from hypothesis import strategies as st

from trio_gateway import (
    Cursor,
    Delivery,
    Gateway,
    InvalidInput,
    Message,
    Receipt,
    ReceiptStatus,
    SessionKey,
    StoreError,
    Turn,
)
from trio_gateway.testing import MemoryChannel

from ._bad_lives import (
    Batch,
    control,
    echo,
    hosted,
    in_virtual_time,
    ours,
    rows,
    sound,
    story,
    whole,
)
from ._inputs import (
    Strategy,
    any_text,
    drawn,
    message_fields,
    name_text,
    odd_text,
    odd_value,
    unicode_text,
)

LONGEST_KEY: Final = 1024

# ----- names


class StrangeText(str):
    """A text of somebody's own kind."""

    __slots__ = ()


class Unspeakable:
    """Cannot be shown, hashed or compared."""

    def _fail(self, *_: object) -> Any:
        raise RuntimeError("unspeakable")

    __repr__ = __str__ = __hash__ = __eq__ = __bool__ = __len__ = _fail


_strange: Final[Strategy[Any]] = st.one_of(
    odd_value, odd_value, odd_text.map(StrangeText), st.builds(Unspeakable)
)

_field: Final[Strategy[Any]] = st.one_of(name_text, name_text, name_text, _strange)

_channel: Final[Strategy[Any]] = st.one_of(
    st.sampled_from(["local", "local", "chat", "chat", "nowhere", "", "Local", "a b", "a\n"]),
    _field,
)

_sent: Final[Strategy[Any]] = st.builds(
    Message,
    session=_field,
    id=_field,
    text=st.one_of(odd_text, odd_text, _strange),
    sender=st.one_of(st.none(), _field),
    channel=_channel,
)
"""A message with something odd in its fields, or in none of them."""

_key: Final[Strategy[Any]] = st.one_of(
    st.builds("{}:{}".format, st.sampled_from(["local", "chat", "a-b_9", "Chat", ""]), name_text),
    _field,
    any_text,
)

_no_message: Final[Strategy[Any]] = st.one_of(
    _strange,
    st.just(Message),
    message_fields,
)


def fault_of(message: Message) -> str | None:
    """Which field is wrong, by what the class promises; None: it is to be accepted."""
    for name in ("session", "id"):
        if not _is_name(getattr(message, name)):
            return name
    if not _is_channel(message.channel):
        return "channel"
    if message.sender is not None and not _is_name(message.sender):
        return "sender"
    return None if _is_unicode(message.text) else "text"


def _is_name(value: object) -> bool:
    return _is_unicode(value) and 0 < len(str(value)) <= LONGEST_KEY


def _is_unicode(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def brief(value: object) -> str:
    """A value for a report, if it can be shown at all."""
    try:
        return repr(value)[:500]
    except RuntimeError:
        return f"<{type(value).__name__}>"


def _is_channel(value: object) -> bool:
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789_-")
    return (
        isinstance(value, str)
        and 0 < len(value) <= 32
        and value[0] in allowed - set("0123456789_-")
        and set(value) <= allowed
    )


def names(batch: Batch) -> None:
    """Hundreds of messages and other things, one by one and in batches, into one life."""
    in_virtual_time(partial(_names_life, batch))
    sound(batch, settled=False)


async def _names_life(batch: Batch) -> None:
    dice = batch.dice
    away = Message(session="a", id="away", text="hi", channel="nowhere")
    things = [away, *drawn(_sent, max(4, batch.size // 2), batch.draw_seed())]
    others = drawn(_no_message, max(4, batch.size // 10), batch.draw_seed())
    keys = drawn(_key, max(4, batch.size // 10), batch.draw_seed())
    heard: list[Message] = []

    async def agent(turn: Turn) -> str:
        heard.append(turn.message)
        return await echo(turn)

    async with hosted(batch, agent, MemoryChannel("chat")) as gateway:
        clerk = _Clerk(batch, gateway)
        while things:
            count = dice.choice((1, 1, 2, 5))
            chosen, things = things[:count], things[count:]
            await clerk.hand_in(chosen)
            if others and dice.random() < 0.2:
                await clerk.hand_in_no_message(others.pop())
            if keys and dice.random() < 0.3:
                await clerk.ask_about(keys.pop())
        await clerk.close()
    _check_heard(clerk, heard)


@attrs.define
class _Clerk:
    """Hands things in, and knows what should become of them."""

    batch: Batch
    gateway: Gateway
    accepted: dict[tuple[str, str], Message] = attrs.field(factory=dict[tuple[str, str], Message])
    controls: int = 0

    async def hand_in(self, messages: Sequence[Message]) -> None:
        """A batch, with one healthy message in the midst of it."""
        good = Message(session="control", id=f"control-{self.controls}", text="control")
        self.controls += 1
        sent = [*messages, good]
        self.batch.dice.shuffle(sent)
        receipts = await self.gateway.accept(sent)
        assert len(receipts) == len(sent), receipts
        for message, receipt in zip(sent, receipts, strict=True):
            self._check(message, receipt)

    def _check(self, message: Message, receipt: Receipt) -> None:
        fault = fault_of(message)
        where = f"{brief(message)} was answered with {brief(receipt)}"
        if fault is not None:
            assert receipt.status is ReceiptStatus.REFUSED, where
            assert (receipt.reason or "").startswith(fault), f"{where}; wrong is its {fault}"
            assert not receipt.retryable, where
            assert len(receipt.reason or "") < 2000, where
            self.batch.input("refused")
            return
        name = (str(message.channel), str(message.id))
        known = ReceiptStatus.DUPLICATE if name in self.accepted else ReceiptStatus.ACCEPTED
        assert receipt.status is known, where
        assert (receipt.session, receipt.id) == (message.key, message.id), where
        self.accepted.setdefault(name, message)
        self.batch.input(known.value)

    async def hand_in_no_message(self, thing: Any) -> None:
        """Something that is no message, with one that is: nothing is taken, and that is said."""
        good = Message(session="control", id=f"never-{self.controls}", text="control")
        before = self.gateway.statistics()
        calls: tuple[Callable[[], Awaitable[object]], ...] = (
            partial(self.gateway.accept, [good, thing]),
            partial(self.gateway.accept, thing),
            partial(self.gateway.ask, thing),
        )
        for call in calls:
            await self._refuses(call, brief(thing))
        assert self.gateway.statistics() == before, f"{brief(thing)} has left something behind"
        assert not rows(self.batch.store, "SELECT 1 FROM message WHERE id = ?", good.id)

    async def _refuses(self, call: Callable[[], Awaitable[object]], what: str) -> None:
        try:
            answer = await call()
        except InvalidInput as error:
            self.batch.error(ours(error))
        except Exception as error:
            raise AssertionError(f"{what}: {story(error)}") from error
        else:
            assert answer == (), f"{what} was taken: {answer}"
        self.batch.input("no message")

    async def ask_about(self, thing: Any) -> None:
        """Ask for sessions by odd names, and hand in odd cursors."""
        gateway = self.gateway
        key, fine = SessionKey("local", thing), SessionKey("local", "control")
        good = Message(session="control", id=f"cursor-{self.controls}", text="control")
        await self._answers(lambda: gateway.history(key), "history")
        await self._answers(lambda: gateway.history(SessionKey(thing, "a")), "history")
        await self._answers(lambda: gateway.history(fine, thing), "history")
        await self._answers(lambda: gateway.stop_turn(key), "stop_turn")
        await self._answers(
            lambda: gateway.accept(good, cursor=Cursor(channel="chat", value=thing)), "cursor"
        )
        await self._answers(lambda: gateway.accept(good, cursor=thing), "cursor")
        self._parse(thing)

    async def _answers(self, call: Callable[[], Awaitable[object]], what: str) -> None:
        """It has an answer, or is refused in words of ours."""
        try:
            await call()
        except (InvalidInput, StoreError) as error:
            self.batch.error(ours(error))
            self.batch.input(f"{what} refused")
        except Exception as error:
            raise AssertionError(f"{what}: {story(error)}") from error
        else:
            self.batch.input(f"{what} answered")

    def _parse(self, thing: Any) -> None:
        try:
            key = SessionKey.parse(thing)
        except InvalidInput as error:
            self.batch.error(ours(error))
            self.batch.input("key refused")
        except Exception as error:
            raise AssertionError(f"SessionKey.parse({brief(thing)}): {story(error)}") from error
        else:
            assert str(key) == thing, f"{brief(thing)} became {key!r}"
            self.batch.input("key parsed")

    async def close(self) -> None:
        """Everything that can be answered here is answered."""
        await control(self.gateway, "last")
        there = ("local", "chat")
        away = sum(message.channel not in there for message in self.accepted.values())
        # Messages of channels that this gateway has not wait for one that has them.
        with trio.move_on_after(3600):
            await self.gateway.wait_idle()
        assert self.gateway.statistics()["messages_open"] == away
        self.batch.seen["messages of a channel that is not there"] += bool(away)


def _check_heard(clerk: _Clerk, heard: Iterable[Message]) -> None:
    told = {(message.channel, message.id): message for message in heard}
    for name, message in clerk.accepted.items():
        if message.channel in ("local", "chat"):
            assert told[name] == message, f"the agent was asked {told[name]}, sent was {message}"


# ----- texts


@attrs.frozen
class _Talk:
    """One message to one channel, and what the agent says to it."""

    channel: MemoryChannel
    id: str
    text: str
    says: list[str]
    answer: str

    @property
    def said(self) -> list[str]:
        """What should arrive, in order. An agent that returns nothing says nothing at its end."""
        return [_as_unicode(text) for text in (*self.says, *([self.answer] if self.answer else []))]

    @property
    def sent(self) -> list[Delivery]:
        """What did arrive, in order, and in parts."""
        return [d for d in self.channel.sent if d.in_reply_to == (self.id,)]


class _Utf16Channel(MemoryChannel):
    """Counts as some platforms do: in units of UTF-16."""

    def text_length(self, text: str) -> int:
        """See `Channel.text_length`."""
        return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _channels(batch: Batch) -> list[MemoryChannel]:
    """One that takes all, one that takes little, one that counts otherwise."""
    return [
        MemoryChannel("whole"),
        MemoryChannel("short", text_limit=batch.dice.choice((1, 2, 10, 100))),
        _Utf16Channel("utf16", text_limit=batch.dice.choice((2, 3, 50, 4096))),
    ]


def _talks(batch: Batch) -> list[_Talk]:
    texts = drawn(unicode_text, batch.size, batch.draw_seed())
    said = drawn(st.lists(odd_text, max_size=2), batch.size, batch.draw_seed())
    answers = drawn(odd_text, batch.size, batch.draw_seed())
    dice, channels = batch.dice, _channels(batch)
    return [
        _Talk(
            dice.choice(channels), f"m{n}", _grown(dice.choice(texts), batch), dice.choice(said),
            _grown(dice.choice(answers), batch),
        )
        for n in range(batch.size)
    ]  # fmt: skip


def _grown(text: str, batch: Batch) -> str:
    """Now and then a text is long."""
    if not text or batch.dice.random() > 0.03:
        return text
    return text * (batch.dice.choice((200, 2_000)) // len(text) + 1)


def texts(batch: Batch) -> None:
    """Odd texts there and back, in one piece or in parts."""
    talks = _talks(batch)
    in_virtual_time(partial(_texts_life, batch, talks))
    fates = dict(rows(batch.store, "SELECT id, state FROM message"))
    for talk in talks:
        assert fates[talk.id] == "answered", f"{talk.text!r:.300} is {fates[talk.id]}"
        parts = _check_talk(talk)
        batch.input("in parts" if parts > 1 else "whole")
        batch.seen["a text in parts"] += parts > 1
    sound(batch)


async def _texts_life(batch: Batch, talks: Sequence[_Talk]) -> None:
    scripts = {talk.id: talk for talk in talks}

    async def agent(turn: Turn) -> str:
        talk = scripts[turn.message.id]
        assert turn.text == talk.text, f"sent {talk.text!r:.300}, asked {turn.text!r:.300}"
        for text in talk.says:
            await turn.say(text)
        return talk.answer

    channels = list(dict.fromkeys(talk.channel for talk in talks))
    async with hosted(batch, agent, *channels) as gateway:
        for talk in talks:
            receipt = await talk.channel.receive("s", talk.id, talk.text)
            assert receipt.status is ReceiptStatus.ACCEPTED, receipt
        await whole(batch, gateway)
        for channel in channels:
            await _check_history(gateway, channel, talks)


async def _check_history(gateway: Gateway, channel: MemoryChannel, talks: Sequence[_Talk]) -> None:
    """The past is told as it was."""
    told = [item.text for item in await gateway.history(SessionKey(channel.name, "s"), 10_000)]
    right = [text for talk in talks if talk.channel is channel for text in (talk.text, *talk.said)]
    assert told == right, f"the history of {channel.name} is another"


def _check_talk(talk: _Talk) -> int:
    """All that was said arrived, whole and in order; no part is longer than the channel takes."""
    channel, told = talk.channel, dict[str, str]()
    for delivery in talk.sent:
        name = delivery.key if delivery.parts == 1 else delivery.key.rpartition(".")[0]
        told[name] = told.get(name, "") + delivery.text
        size = channel.text_length(delivery.text)
        fits = channel.text_limit is None or size <= channel.text_limit or len(delivery.text) == 1
        assert fits, f"{delivery.text!r:.300} is longer than {channel.text_limit}"
    arrived = list(told.values())
    assert arrived == talk.said, f"said {talk.said!r:.800}, arrived {arrived!r:.800}"
    return max((delivery.parts for delivery in talk.sent), default=1)


def _as_unicode(text: str) -> str:
    """Halves of a character that belong together are joined, lone ones replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
