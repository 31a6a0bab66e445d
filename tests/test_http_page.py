"""The page, over real sockets: as a program without a script sees it, and in a real Chromium."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
import trio
from browser import ENTER, TAB, Browser, missing, open_browser
from doors import TOKEN, Door, client_of, free_port, open_door, read_until, stream_of
from helpers import Log, Script

from trio_gateway import Limits, Message, ResumeRules, Settings, Turn, Undeliverable, open_gateway
from trio_gateway._events import DeadLettered
from trio_gateway.channels import Channel
from trio_gateway.http import HttpChannel, HttpSettings
from trio_gateway.http._guard import COOKIE, COOKIE_LIFE, TRIES

HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
IN_CHROMIUM = pytest.mark.skipif(missing() is not None, reason=missing() or "")

HOSTILE = (
    "<script>window.hacked=1;alert(1)</script>",
    '"onmouseover="window.hacked=2;alert(2)" x="',
    "'><img src=x onerror=window.hacked=3>",
    "{{ 7 * 7 }}{% raw %}</textarea></title><svg onload=alert(4)>",
    "javascript:alert(5)//../../\u202egnp.exe\u2066",
)


async def echo(turn: Turn) -> str:
    return f"re: {turn.text}"


def stranger(door: Door) -> httpx2.AsyncClient:
    """Somebody with a browser, who has not signed in."""
    return httpx2.AsyncClient(base_url=door.url, headers=HTML, trust_env=False)


@asynccontextmanager
async def visitor(door: Door) -> AsyncGenerator[httpx2.AsyncClient, None]:
    """Somebody who has signed in, and has no token any more."""
    async with stranger(door) as client:
        answer = await client.post("/login", data={"token": TOKEN})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        yield client


@asynccontextmanager
async def in_quarantine(where: Path, agent: Any, text: str = "hi") -> AsyncGenerator[Door, None]:
    """A gateway with one turn in quarantine: interrupted as often as is allowed."""
    settings = Settings(resume=ResumeRules(max_interruptions=1))
    stuck = Script()
    async with open_door(where, stuck, settings=settings) as door:
        await door.post("ada", text, id="m1")
        await stuck.wait_begun(1)
        door.gateway.request_stop(now=True)
    async with open_door(where, agent, settings=settings) as door:
        yield door


class Other(Channel):
    """A platform that takes nothing."""

    name = "other"

    async def serve(self, intake: Any, *, task_status: Any) -> None:
        task_status.started()
        await trio.sleep_forever()

    async def send(self, delivery: Any) -> None:
        raise Undeliverable(f"nobody is there {HOSTILE[0]}")


# ----- signing in


async def test_who_has_not_signed_in_is_sent_to_do_so(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door:
        async with stranger(door) as client:
            for path in ("/", "/sessions/http:ada", "/messages/m1", "/nowhere"):
                answer = await client.get(path)
                assert (answer.status_code, answer.headers["location"]) == (303, "/login"), path
            for path in ("/", "/live", "/page.js"):
                answer = await client.get(path, headers={"accept": "*/*"})
                assert answer.status_code == 401, path
            assert (await client.get("/v1/sessions")).status_code == 401
            assert (await client.post("/pause")).headers["location"] == "/login"
        assert not door.gateway.paused


async def test_the_token_buys_a_cookie_that_scripts_and_other_sites_do_not_get(
    tmp_path: Path,
) -> None:
    async with open_door(tmp_path, echo) as door:
        async with stranger(door) as client:
            wrong = await client.post("/login", data={"token": "wrong"})
            assert wrong.status_code == 403
            assert "not the token" in wrong.text
            assert COOKIE not in client.cookies
            right = await client.post("/login", data={"token": f" {TOKEN}\n"})
            given = right.headers["set-cookie"].lower()
            for part in ("httponly", "samesite=strict", "path=/", f"max-age={COOKIE_LIFE}"):
                assert part in given
            assert "secure" not in given
            assert (await client.get("/")).status_code == 200
            behind = {"x-forwarded-proto": "https"}
            right = await client.post("/login", data={"token": TOKEN}, headers=behind)
            assert "secure" in right.headers["set-cookie"].lower()
        async with visitor(door) as client:
            assert (await client.get("/")).status_code == 200
            assert (await client.post("/logout")).headers["location"] == "/login"
            assert (await client.get("/")).status_code == 303


async def test_who_guesses_has_to_wait(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door, stranger(door) as client:
        for _ in range(TRIES):
            assert (await client.post("/login", data={"token": "?"})).status_code == 403
        answer = await client.post("/login", data={"token": "?"})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        assert "too many wrong tokens" in answer.text


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b'{"token": "x"}', "application/json", 415),
        (b"a=1&" * 50, "application/x-www-form-urlencoded", 422),
        (b"token=%ff", "application/x-www-form-urlencoded", 422),
        (b"token=\xff", "application/x-www-form-urlencoded", 422),
        (b"token=" + b"x" * 2_000_000, "application/x-www-form-urlencoded", 413),
    ],
)
async def test_p14_a_form_that_is_none_is_refused(
    tmp_path: Path, body: bytes, kind: str, status: int
) -> None:
    async with open_door(tmp_path, echo) as door:
        answer = await door.client.post("/login", content=body, headers={"content-type": kind})
        assert answer.status_code == status


# ----- what is sent along


async def all_pages(door: Door) -> list[str]:
    """Every page that there is now."""
    sessions = (await door.client.get("/v1/sessions")).json()["sessions"]
    pages = ["/", "/login", "/nowhere", "/sessions/?key=", "/messages/unheard-of"]
    for one in sessions:
        key = quote(one["session"], safe="")
        pages.append(f"/sessions/{key}")
        told = (await door.client.get(f"/v1/sessions/{key}/messages")).json()
        pages += [f"/messages/{quote(message['id'], safe='')}" for message in told["messages"]]
    return pages


async def test_every_page_tells_the_browser_what_it_may_do(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door:
        await door.post("ada", "hi", headers={"prefer": "wait=10"})
        pages = await all_pages(door)
        async with visitor(door) as client:
            for path in (*pages, "/style.css", "/page.js", "/icon.svg", "/sessions?key=x"):
                headers = (await client.get(path)).headers
                policy = headers["content-security-policy"]
                assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
                assert "unsafe" not in policy
                assert "frame-ancestors 'none'; base-uri 'none'" in policy
                assert headers["x-content-type-options"] == "nosniff"
                assert headers["referrer-policy"] == "same-origin"
                assert headers["cross-origin-opener-policy"] == "same-origin"
                assert "no-" in headers["cache-control"]


class _Tags(HTMLParser):
    """What a browser would see: tags, attributes, and the text between."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def check_harmless(html: str) -> _Tags:
    """Nothing of what people wrote has become markup, an address or an order to turn a line."""
    seen = _Tags(html)
    for tag, given in seen.tags:
        assert tag not in ("svg", "iframe", "object", "style", "base"), tag
        assert tag != "script" or given == {"src": "/page.js", "defer": None}
        assert tag != "img" or given["src"] == "/icon.svg"
        for attribute, value in given.items():
            assert not attribute.startswith("on"), (tag, given)
            assert attribute != "style"
            if attribute in ("href", "action", "src", "data-live", "data-api"):
                assert (value or "").startswith(("/", "#"))
    assert TOKEN not in html
    return seen


async def hostile_door(door: Door, log: Log) -> None:
    """Fill a gateway with what nobody should write."""
    for n, text in enumerate(HOSTILE):
        key = quote(text, safe="")
        await door.post(key, text, id=f"{n}{text}", sender=text, headers={"prefer": "wait=10"})
    await door.gateway.accept(
        Message(session=HOSTILE[0], id="other", text=HOSTILE[1], channel="other")
    )
    await log.wait_for(DeadLettered)


@asynccontextmanager
async def open_hostile(where: Path) -> AsyncGenerator[Door, None]:
    """A gateway whose guests, and whose agent, are hostile."""

    async def agent(turn: Turn) -> str:
        turn.progress(turn.text)
        await turn.say(turn.text)
        if turn.text == HOSTILE[2]:
            raise RuntimeError(turn.text)
        return turn.text

    log = Log()
    channel = HttpChannel(HttpSettings(bind="127.0.0.1:0"), token=TOKEN)
    async with open_gateway(
        agent, store=where / "gateway.db", channels=[channel, Other()], listen=log
    ) as gateway:
        await channel.serving.wait()
        async with client_of(channel.addresses[0]) as client:
            door = Door(gateway, channel, client)
            await hostile_door(door, log)
            yield door


async def test_every_text_from_outside_is_text(tmp_path: Path) -> None:
    async with open_hostile(tmp_path) as door, visitor(door) as client:
        whole = ""
        for path in await all_pages(door):
            answer = await client.get(path)
            seen = check_harmless(answer.text)
            whole += seen.text
            assert "\u202e" not in answer.text  # nothing is shown in another order than it has
        for text in (*HOSTILE[:4], "\\u202egnp.exe"):
            assert text in whole
        assert "49" not in whole.split("7 * 7")[1][:10]
        assert "nobody is there <script>" in whole  # an error is told, too


def links_in(html: str, start: str) -> list[str]:
    """Where the links of a page lead, as far as they begin so."""
    found = [given.get("href") or "" for tag, given in _Tags(html).tags if tag == "a"]
    return [link for link in found if link.startswith(start)]


async def test_names_of_any_kind_have_their_pages(tmp_path: Path) -> None:
    names = ["..", "a/../b", "x/messages", "?q=1#f", "100%", "a b", "ü\u202e", "other:x", "/"]
    async with open_door(tmp_path, echo) as door:
        for name in names:
            given = await door.post(f"http:{quote(name, safe='')}", "hi", id=name)
            assert given.status_code == 202, name
        await door.gateway.wait_idle()
        async with visitor(door) as client:
            links = links_in((await client.get("/")).text, "/sessions/")
            assert len(links) == len(names)
            for link in links:
                (message,) = links_in((await client.get(link)).text, "/messages")
                assert (await client.get(message)).status_code == 200, message
            found = await client.get("/sessions", params={"key": "a/../b"})
            assert found.headers["location"] == "/sessions/http:a%2F..%2Fb"


async def test_other_sites_cannot_use_the_forms(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door, visitor(door) as client:
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
            for path in ("/pause", "/sessions/http:ada/messages", "/login", "/logout"):
                answer = await client.post(path, data={"text": "x"}, headers={"origin": origin})
                assert answer.status_code == 403, (origin, path)
        assert not door.gateway.paused
        assert (await client.post("/pause", headers={"origin": door.url})).status_code == 303
        assert door.gateway.paused
        assert (await client.get("/pause")).status_code == 405


# ----- plain links and forms


async def test_a_message_is_sent_by_a_plain_form(tmp_path: Path) -> None:
    settings = Settings(limits=Limits(message_bytes=100))
    async with open_door(tmp_path, echo, settings=settings) as door, visitor(door) as client:
        form = {"text": "two\r\nlines"}
        answer = await client.post("/sessions/http:ada/messages", data=form)
        assert (answer.status_code, answer.headers["location"]) == (303, "/sessions/http:ada")
        await door.gateway.wait_idle()
        assert "re: two\nlines" in (await client.get("/sessions/http:ada")).text
        long = await client.post("/sessions/http:ada/messages", data={"text": "x" * 101})
        assert long.status_code == 413
        assert "To the overview" in long.text


async def test_old_messages_come_in_pages(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door, visitor(door) as client:
        for n in range(53):
            await door.post("ada", f"number {n:02}.")
        await door.gateway.wait_idle()
        newest = (await client.get("/sessions/http:ada")).text
        assert "number 52." in newest
        assert "number 02." not in newest
        (older,) = links_in(newest, "/sessions/http:ada?before=")
        page = (await client.get(older)).text
        assert "number 02." in page
        assert "number 03." not in page
        assert 'id="chat"' not in page


async def test_turns_are_paused_and_stopped_by_plain_forms(tmp_path: Path) -> None:
    script = Script()
    async with open_door(tmp_path, script) as door, visitor(door) as client:
        await door.post("ada", "hello", id="m1")
        await script.wait_begun(1)
        paused = await client.post("/pause")
        assert "Let turns begin" in (await client.get(paused.headers["location"])).text
        await door.post("bert", "waits", id="m2")
        page = (await client.get("/")).text
        assert "Messages that wait for their turns" in page
        stopped = await client.post("/sessions/http:ada/stop")
        assert stopped.headers["location"] == "/sessions/http:ada?done=stopped"
        assert (await client.post("/sessions/http:ada/stop")).headers["location"].endswith("idle")
        assert "stopped" in (await client.get("/messages/m1")).text
        await client.post("/unpause")
        await script.wait_begun(2)
        script.release()
        await door.gateway.wait_idle()


async def test_quarantine_by_plain_forms(tmp_path: Path) -> None:
    async with in_quarantine(tmp_path, echo) as door, visitor(door) as client:
        assert 'action="/quarantine/1/retry"' in (await client.get("/")).text
        again = await client.post("/quarantine/1/retry")
        assert "once more" in (await client.get(again.headers["location"])).text
        await door.gateway.wait_idle()
        assert "re: hi" in (await client.get("/sessions/http:ada")).text
        gone = await client.post("/quarantine/99/retry")
        assert gone.status_code == 404
        assert "no turn 99 in quarantine" in gone.text
        assert (await client.post("/quarantine/x/drop")).status_code == 422


async def test_dead_letters_by_plain_forms(tmp_path: Path) -> None:
    async with open_hostile(tmp_path) as door, visitor(door) as client:
        (letter, *_) = await door.gateway.inspect(lambda reader: reader.dead_letters())
        url = f"/dead-letters/{letter.delivery}"
        assert f'action="{url}/drop"' in (await client.get("/")).text
        assert (await client.post(f"{url}/drop")).headers["location"] == "/?done=discarded"
        assert f'action="{url}/drop"' not in (await client.get("/")).text
        (letter, *_) = await door.gateway.inspect(lambda reader: reader.dead_letters())
        again = await client.post(f"/dead-letters/{letter.delivery}/retry")
        assert again.headers["location"] == "/?done=resent"


async def test_sessions_of_other_channels_are_for_reading(tmp_path: Path) -> None:
    async with open_hostile(tmp_path) as door, visitor(door) as client:
        url = f"/sessions/other:{quote(HOSTILE[0], safe='')}"
        page = (await client.get(url)).text
        assert "only be read" in page
        assert 'id="chat"' not in page
        assert (await client.post(f"{url}/messages", data={"text": "x"})).status_code == 422
        for path in ("/sessions/other:nobody", "/live/sessions/other:nobody"):
            assert (await client.get(path)).status_code == 404


# ----- live


async def test_the_overview_is_drawn_again_when_something_happens(tmp_path: Path) -> None:
    script = Script()
    async with open_door(tmp_path, script) as door:
        async with stream_of(door.client, "/live") as one, stream_of(door.client, "/live") as other:
            assert "Nobody has said anything" in (await anext(one)).data
            await door.post("ada", "hello", id="m1")
            await script.wait_begun(1)
            for events in (one, other):
                while "http:ada" not in (await anext(events)).data:
                    assert door.gateway.state  # what was drawn before comes first
            door.gateway.request_stop()
            script.release()
            seen = await read_until(one, "end")
            with pytest.raises(StopAsyncIteration):
                await anext(one)
        last = seen[-2].data
        assert "The drain is over" in last
        assert "COMPLETED" in last


async def test_a_drain_shows_who_has_settled_and_who_will_resume(tmp_path: Path) -> None:
    script = Script()
    async with open_door(tmp_path, script) as door, stream_of(door.client, "/live") as events:
        for name in ("ada", "bert"):
            await door.post(name, "hello")
        await script.wait_begun(2)
        door.gateway.request_stop(by="the test")
        await door.gateway.draining.wait_value(True)
        script.release("ada")
        told = ""
        while "1</strong> settled" not in told:
            told = (await anext(events)).data
        assert "asked by <bdi>the test</bdi>" in told
        assert "2 open turns marked" in told
        assert "1</strong> still open" in told
        door.gateway.request_stop(now=True)
        last = (await read_until(events, "end"))[-2].data
        assert "1</strong> will resume" in last
        assert "The window ended before all turns did" in last


async def test_a_conversation_is_drawn_again_part_by_part(tmp_path: Path) -> None:
    begun, go = trio.Event(), trio.Event()

    async def agent(turn: Turn) -> str:
        turn.progress("It grows", draft=True)
        begun.set()
        await go.wait()
        return "It grows & ends"

    async with open_door(tmp_path, agent) as door:
        await door.post("ada", "hello", id="m1")
        await begun.wait()
        async with stream_of(door.client, "/live/sessions/http:ada") as events:
            first, second = await anext(events), await anext(events)
            assert (first.event, second.event) == ("conversation", "turn")
            assert "hello" in first.data
            # Whoever comes in the middle sees what was written before.
            assert "It grows" in second.data
            go.set()
            while "It grows &amp; ends" not in (told := (await anext(events))).data:
                assert told.event in ("conversation", "turn")


async def test_a_session_of_another_channel_is_live_too(tmp_path: Path) -> None:
    async with open_hostile(tmp_path) as door:
        url = f"/live/sessions/other:{quote(HOSTILE[0], safe='')}"
        async with stream_of(door.client, url) as events:
            assert "late and" not in (await anext(events)).data
            more = Message(session=HOSTILE[0], id="m2", text="late and harmless", channel="other")
            await door.gateway.accept(more)
            told = await anext(events)
            while not (told.event == "conversation" and told.data.count("late and") == 3):
                told = await anext(events)  # the message, what is said to it, and the answer
            door.gateway.pause()
            while "Turns are paused" not in (await anext(events)).data:
                assert door.gateway.paused


# ----- in a real browser


async def sign_in(browser: Browser, door: Door) -> None:
    """As a person does, with the keyboard."""
    await browser.go(door.url)
    await browser.wait_for("location.pathname === '/login'")
    await browser.keys(TOKEN + ENTER)
    await browser.wait_for("document.querySelector('#overview') !== null")


async def check_peaceful(browser: Browser) -> None:
    """No script ran that is not ours, and the policy had nothing to refuse."""
    assert not await browser.has_dialog()
    assert await browser.eval("return window.hacked === undefined")
    assert await browser.complaints() == []


@IN_CHROMIUM
async def test_a_message_is_sent_by_keyboard_and_the_answer_streams(tmp_path: Path) -> None:
    steps = [trio.Event() for _ in range(2)]

    async def agent(turn: Turn) -> str:
        turn.progress("Let me", draft=True)
        await steps[0].wait()
        turn.progress("Let me see: <b>", draft=True)
        await steps[1].wait()
        return f"Let me see: <b> {turn.text}"

    async with open_browser() as browser, open_door(tmp_path, agent) as door:
        await sign_in(browser, door)
        await browser.keys(TAB)
        assert await browser.eval("return document.activeElement.className") == "skip"
        for _ in range(12):
            if await browser.eval("return document.activeElement.id") == "key":
                break
            await browser.keys(TAB)
        await browser.keys("ada" + ENTER)
        await browser.wait_for("document.activeElement.id === 'text'")
        await browser.keys("hello")
        await browser.keys(ENTER)
        draft = "document.querySelector('#draft .text')?.innerText"
        await browser.wait_for(f"{draft} === 'Let me'")
        assert await browser.eval("return document.querySelector('#text').value") == ""
        steps[0].set()
        await browser.wait_for(f"{draft} === 'Let me see: <b>'")
        await browser.keys("next")  # while the answer grows
        steps[1].set()
        said = "document.querySelector('#conversation .agent .text')?.innerText"
        await browser.wait_for(f"{said} === 'Let me see: <b> hello'")
        await browser.wait_for("!document.querySelector('#draft')")
        # What is drawn anew takes nothing from who types.
        assert await browser.eval("return document.activeElement.id") == "text"
        assert await browser.eval("return document.querySelector('#text').value") == "next"
        await check_peaceful(browser)


@IN_CHROMIUM
async def test_a_drain_is_watched_and_the_page_goes_on_after_the_restart(tmp_path: Path) -> None:
    settings = HttpSettings(bind=f"127.0.0.1:{free_port()}")

    @asynccontextmanager
    async def boot(agent: Any) -> AsyncGenerator[Door, None]:
        channel = HttpChannel(settings, token=TOKEN)
        async with open_gateway(
            agent, store=tmp_path / "gateway.db", channels=[channel]
        ) as gateway:
            await channel.serving.wait()
            async with client_of(channel.addresses[0]) as client:
                yield Door(gateway, channel, client)

    fates = "[...document.querySelectorAll('#drain tbody tr')].map((r) => r.innerText).join('|')"
    script = Script()
    async with open_browser() as browser:
        async with boot(script) as door:
            await sign_in(browser, door)
            for name in ("ada", "bert"):
                await door.post(name, "hello")
            await browser.wait_for("document.querySelectorAll('#turns tbody tr').length === 2")
            door.gateway.request_stop()
            await browser.wait_for("document.querySelector('#state-h').innerText === 'Draining'")
            script.release("ada")
            await browser.wait_for(f"/ada.*settled.*bert.*still open/s.test({fates})")
            heard = await browser.eval("return document.querySelector('#news').innerText")
            assert "draining" in heard
            door.gateway.request_stop(now=True)
            await browser.wait_for(f"/ada.*settled.*bert.*will resume/s.test({fates})")
            await browser.wait_for("!document.querySelector('#link').hidden")
        script.release()
        async with boot(script) as door:
            await browser.wait_for("document.querySelector('#link').hidden")
            await browser.wait_for("document.querySelector('#state-h').innerText === 'Serving'")
            await door.gateway.wait_idle()
            await browser.wait_for("document.querySelector('#turns').innerText.includes('No turn')")
            await check_peaceful(browser)


@IN_CHROMIUM
async def test_a_quarantined_turn_is_tried_again(tmp_path: Path) -> None:
    async with open_browser() as browser, in_quarantine(tmp_path, echo) as door:
        await sign_in(browser, door)
        # What asks for a person's decision is drawn in place: an opened "Give up" stays open.
        await browser.click("#quarantine summary")
        await door.post("bert", "something happens")
        await browser.wait_for("document.querySelector('#sessions').innerText.includes('bert')")
        assert await browser.eval("return document.querySelector('#quarantine details').open")
        await browser.eval("document.querySelector('#quarantine-1-retry').focus()")
        await browser.keys(ENTER)
        await browser.wait_for("document.activeElement.innerText.includes('once more')")
        await browser.wait_for("!document.querySelector('#quarantine')")
        await browser.go(f"{door.url}/sessions/http:ada")
        await browser.wait_for(
            "document.querySelector('#conversation').innerText.includes('re: hi')"
        )
        await check_peaceful(browser)


@IN_CHROMIUM
async def test_hostile_texts_run_no_script(tmp_path: Path) -> None:
    async with open_browser() as browser, open_hostile(tmp_path) as door:
        await sign_in(browser, door)
        for path in await all_pages(door):
            if path.startswith(("/login", "/nowhere", "/sessions/?", "/messages/unheard")):
                continue
            await browser.go(door.url + path)
            if await browser.eval("return document.querySelector('[data-live]') !== null"):
                # Once more, as the stream draws it.
                await browser.wait_for("performance.getEntriesByType('resource').length >= 2")
                await door.gateway.accept(_late(HOSTILE[0]))
            await check_peaceful(browser)
        # The policy is at work: a script in the page itself is refused, and we would have seen it.
        await browser.eval(
            "const s = document.createElement('script'); s.textContent = 'window.hacked = 9';"
            "document.body.append(s)"
        )
        assert await browser.eval("return window.hacked === undefined")
        assert any("Content Security Policy" in one for one in await browser.complaints())


def _late(text: str) -> Message:
    return Message(session=text, id=text, text=text, channel="http")


CONTRAST = """
const luminance = (rgb) => {
  const [r, g, b] = rgb.match(/[\\d.]+/g).map((x) => {
    x /= 255;
    return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (one) => {
  for (; one; one = one.parentElement) {
    const back = getComputedStyle(one).backgroundColor;
    if (!back.includes("rgba(0, 0, 0, 0)")) return back;
  }
  return "rgb(255, 255, 255)";
};
return [...document.querySelectorAll("body *")]
  .filter((one) => [...one.childNodes].some((n) => n.nodeType === 3 && n.nodeValue.trim()))
  .filter((one) => one.getClientRects().length)
  .map((one) => {
    const [a, b] = [luminance(getComputedStyle(one).color), luminance(behind(one))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.className, one.innerText];
  })
  .filter(([ratio]) => ratio < 4.5);
"""


@IN_CHROMIUM
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_it_can_be_read_and_fits_a_phone(tmp_path: Path, dark: bool) -> None:
    async with open_browser() as browser, open_hostile(tmp_path) as door:
        await sign_in(browser, door)
        await browser.look(width=360, dark=dark)
        for path in await all_pages(door):
            await browser.go(door.url + path)
            back = await browser.eval("return getComputedStyle(document.body).backgroundColor")
            assert (back == "rgb(18, 23, 26)") is dark
            assert await browser.eval(CONTRAST) == [], path
            width = await browser.eval("return document.documentElement.scrollWidth")
            assert width <= 360, path
            unnamed = await browser.eval(
                "return [...document.querySelectorAll('button, a, summary')].filter((one) =>"
                " !(one.textContent.trim() || one.getAttribute('aria-label'))).length"
            )
            assert unnamed == 0
            assert await browser.eval("return document.querySelectorAll('h1, main').length") == 2
