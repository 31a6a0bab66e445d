"""The HTTP door, over real sockets."""

from __future__ import annotations

import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
from doors import TOKEN, Door, client_of, events_of, free_port, open_door, read_until
from helpers import Log, Script, rows
from processes import launch

from trio_gateway import (
    ConfigError,
    Limits,
    Message,
    SessionKey,
    Settings,
    Turn,
    Undeliverable,
    open_gateway,
)
from trio_gateway._events import DeadLettered
from trio_gateway.channels import Channel
from trio_gateway.http import HttpChannel, HttpSettings, read_token, token_path
from trio_gateway.http._follow import Bells


async def echo(turn: Turn) -> str:
    return f"re: {turn.text}"


def error_of(response: httpx2.Response) -> tuple[int, str]:
    body = response.json()
    assert body["ok"] is False
    assert body["error"]["message"]
    return response.status_code, body["error"]["type"]


# ----- messages


async def test_p1_a_message_is_accepted_after_the_commit(tmp_path: Path) -> None:
    script = Script()
    async with open_door(tmp_path, script) as door:
        response = await door.post("ada", "hello", id="m1")
        assert response.status_code == 202
        receipt = {"status": "accepted", "session": "http:ada", "id": "m1"}
        assert response.json() == {"ok": True, "receipt": receipt}
        assert rows(tmp_path / "gateway.db", "SELECT id FROM message") == [("m1",)]
        again = await door.post("ada", "hello", id="m1")
        assert again.json()["receipt"]["status"] == "duplicate"
        script.release()


async def test_who_prefers_to_wait_gets_the_replies(tmp_path: Path) -> None:
    async def agent(turn: Turn) -> str:
        await turn.say("first")
        return "last"

    async with open_door(tmp_path, agent) as door:
        response = await door.post("ada", "hello", headers={"prefer": "wait=10"})
        assert response.status_code == 200
        body = response.json()
        assert body["state"] == "answered"
        assert [(one["text"], one["final"]) for one in body["replies"]] == [
            ("first", False),
            ("last", True),
        ]
        # Once more, with the same id: what was said is in the store.
        again = await door.post(
            "ada", "hello", id=body["receipt"]["id"], headers={"prefer": "wait=10"}
        )
        assert again.json()["replies"] == body["replies"]


async def test_who_waits_too_short_gets_the_receipt(tmp_path: Path) -> None:
    script = Script()
    async with open_door(tmp_path, script) as door:
        response = await door.post("ada", "hello", headers={"prefer": "respond-async, wait=0.05"})
        assert response.status_code == 202
        assert "replies" not in response.json()
        script.release()


async def test_an_idempotency_key_is_the_id(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door:
        key = {"idempotency-key": "k1"}
        first = await door.post("ada", "hello", headers=key)
        again = await door.post("ada", "hello", headers=key)
        assert first.json()["receipt"]["id"] == "k1"
        assert again.json()["receipt"]["status"] == "duplicate"
        other = await door.post("ada", "hello", id="k2", headers=key)
        assert error_of(other) == (422, "invalid")


async def test_the_same_id_with_another_text_is_a_conflict(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door:
        await door.post("ada", "hello", id="m1")
        assert error_of(await door.post("ada", "other", id="m1")) == (409, "conflict")
        assert error_of(await door.post("bob", "hello", id="m1")) == (409, "conflict")


BAD_BODIES = {
    b"{": (422, "not_json"),
    b"[]": (422, "invalid"),
    b"{}": (422, "invalid"),
    b'{"text": 1}': (422, "invalid"),
    b'{"text": "hi", "txet": "hi"}': (422, "invalid"),
    b'{"text": "hi", "id": ""}': (422, "malformed"),
    b'{"text": "' + b"x" * 1_500_000 + b'"}': (413, "too_large"),
    b'{"text": "' + b"x" * 5_000_000 + b'"}': (413, "too_large"),
}


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: body[:28].decode())
async def test_p14_a_bad_body_costs_one_error(tmp_path: Path, body: bytes) -> None:
    async with open_door(tmp_path, echo) as door:
        response = await door.client.post("/v1/sessions/ada/messages", content=body)
        assert error_of(response) == BAD_BODIES[body]
        assert (await door.post("ada", "hi")).status_code == 202


async def test_a_full_inbox_is_429_with_a_time(tmp_path: Path) -> None:
    script = Script()
    settings = Settings(limits=Limits(open_per_session=1))
    async with open_door(tmp_path, script, settings=settings) as door:
        await door.post("ada", "one")
        response = await door.post("ada", "two")
        assert error_of(response) == (429, "full")
        assert int(response.headers["retry-after"]) > 0
        script.release()


async def test_who_is_not_allowed_is_403(tmp_path: Path) -> None:
    async def authorize(message: object) -> bool:
        return False

    async with open_door(tmp_path, echo, authorize=authorize) as door:
        assert error_of(await door.post("ada", "hi")) == (403, "not_allowed")


async def test_there_is_nothing_there(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door:
        assert error_of(await door.client.get("/v1/nothing")) == (404, "not_found")
        assert error_of(await door.client.get("/v1/messages/none")) == (404, "not_found")
        assert error_of(await door.client.delete("/v1/sessions")) == (405, "wrong_method")


# ----- what happened


async def test_p7_a_follower_hears_all_in_order(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door, events_of(door.client, "ada", 0) as events:
        await door.post("ada", "hello", id="m1")
        seen = await read_until(events, "settled")
        assert [one.event for one in seen] == ["hello", "accepted", "begun", "reply", "settled"]
        assert [one.id for one in seen] == sorted(one.id or 0 for one in seen)
        assert seen[1].data["text"] == "hello"
        assert seen[2].data["messages"] == ["m1"]
        assert seen[3].data["text"] == "re: hello"
        assert seen[4].data["state"] == "answered"


async def test_p7_what_happens_while_somebody_begins_to_follow_is_heard() -> None:
    """Asked the store, and then: before the one who reads for all has begun, something happens."""
    bells = Bells()
    with bells.following(SessionKey("http", "ada")) as bell:
        assert bell.at_hand(4) is None
        heard = bell.rung
        bells.begin(5)
        with trio.fail_after(5):
            await bell.wait(heard)
        assert bell.at_hand(4) is None
        assert bell.at_hand(5) == []


async def test_p7_followers_that_fall_behind_ask_the_store(tmp_path: Path) -> None:
    settings = Settings(limits=Limits(open_per_session=1000))
    async with (
        open_door(tmp_path, echo, settings=settings) as door,
        events_of(door.client, "ada", 0) as events,
    ):
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for n in range(300):  # 1,200 entries, while nobody reads
                    nursery.start_soon(partial(door.post, "ada", "hello", id=f"m{n}"))
        places: list[int] = []
        settled = 0
        async for one in events:
            if one.id is not None and one.event != "hello":
                places.append(one.id)
            settled += one.event == "settled"
            if settled == 300:
                break
        assert places == list(range(1, 1201))


async def test_who_follows_from_now_hears_nothing_old(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door:
        await door.post("ada", "old", headers={"prefer": "wait=10"})
        async with events_of(door.client, "ada") as events:
            await door.post("ada", "new", id="m2")
            seen = await read_until(events, "settled")
        assert seen[1].data["text"] == "new"


async def test_progress_is_told_and_has_no_place(tmp_path: Path) -> None:
    shown = trio.Event()

    async def agent(turn: Turn) -> str:
        turn.progress("thinking", draft=True)
        await shown.wait()
        return "done"

    async with open_door(tmp_path, agent) as door, events_of(door.client, "ada") as events:
        await door.post("ada", "hello")
        async for one in events:
            if one.event == "progress":
                assert one.id is None
                assert (one.data["text"], one.data["draft"]) == ("thinking", True)
                break
        shown.set()
        await read_until(events, "settled")


async def test_a_session_of_another_channel_has_no_journal(tmp_path: Path) -> None:
    class Other(Channel):
        name = "other"

        async def serve(self, intake: Any, *, task_status: Any) -> None:
            task_status.started()
            await trio.sleep_forever()

        async def send(self, delivery: Any) -> None:
            raise Undeliverable("nobody is there")

    log = Log()
    channel = HttpChannel(HttpSettings(bind="127.0.0.1:0"), token=TOKEN)
    async with open_gateway(
        echo, store=tmp_path / "gateway.db", channels=[channel, Other()], listen=log
    ) as gateway:
        await channel.serving.wait()
        await gateway.accept(_from("other", "ada"))
        await log.wait_for(DeadLettered)
        letters = await gateway.inspect(lambda reader: reader.dead_letters())
        async with client_of(channel.addresses[0]) as client:
            door = Door(gateway, channel, client)
            response = await client.get("/v1/sessions/other:ada/events")
            assert error_of(response) == (404, "not_found")
            assert error_of(await door.post("other:ada", "hi")) == (422, "invalid")
            told = (await client.get("/v1/dead-letters")).json()["dead_letters"]
            assert [one["delivery"] for one in told] == [letters[0].delivery]
            url = f"/v1/dead-letters/{letters[0].delivery}"
            assert (await client.post(f"{url}/retry")).status_code == 200
            await log.wait_for(DeadLettered, 2)
            assert (await client.post(f"{url}/drop")).status_code == 200
            assert error_of(await client.post(f"{url}/drop")) == (404, "not_found")


def _from(channel: str, session: str) -> Any:
    return Message(session=session, id="o1", text="hi", channel=channel)


async def test_the_history_comes_in_pages(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door:
        for n in range(5):
            await door.post("ada/b c", f"t{n}", id=f"m{n}", headers={"prefer": "wait=10"})
        url = "/v1/sessions/ada%2Fb%20c/messages"
        first = (await door.client.get(url, params={"limit": 2})).json()
        assert [one["id"] for one in first["messages"]] == ["m4", "m3"]
        assert first["messages"][0]["replies"][0]["text"] == "re: t4"
        more = {"limit": 4, "before": first["before"]}
        second = (await door.client.get(url, params=more)).json()
        assert [one["id"] for one in second["messages"]] == ["m2", "m1", "m0"]
        assert second["before"] is None
        sessions = (await door.client.get("/v1/sessions")).json()["sessions"]
        assert [one["session"] for one in sessions] == ["http:ada/b c"]
        life = (await door.client.get("/v1/messages/m0")).json()["timelines"][0]
        assert life["entries"][0]["what"] == "accepted"


async def test_p10_a_turn_is_stopped(tmp_path: Path) -> None:
    script = Script()
    async with open_door(tmp_path, script) as door:
        await door.post("ada", "hello", id="m1")
        await script.wait_begun(1)
        assert (await door.client.post("/v1/sessions/ada/stop")).json()["stopped"] is True
        assert (await door.client.post("/v1/sessions/ada/stop")).json()["stopped"] is False
        life = (await door.client.get("/v1/messages/m1")).json()["timelines"][0]
        assert life["message"]["state"] == "stopped"


# ----- draining


async def test_p12_while_draining_messages_are_accepted_and_streams_end(tmp_path: Path) -> None:
    script = Script()
    async with open_door(tmp_path, script) as door, events_of(door.client, "ada", 0) as events:
        await door.post("ada", "hello", id="m1")
        await script.wait_begun(1)
        assert (await door.client.get("/readyz")).status_code == 200
        door.gateway.request_stop()
        await door.gateway.draining.wait_value(True)
        ready = await door.client.get("/readyz")
        assert ready.status_code == 503
        assert any("draining" in reason for reason in ready.json()["reasons"])
        late = await door.post("ada", "late", id="m2", headers={"prefer": "wait=30"})
        assert late.status_code == 202
        assert "after the restart" in late.json()["note"]
        script.release()
        seen = await read_until(events, "end")
        kinds = [one.event for one in seen]
        assert kinds[:3] == ["hello", "accepted", "begun"]
        assert kinds[-2:] == ["settled", "end"]
        with pytest.raises(StopAsyncIteration):
            await anext(events)
    script = Script(open=True)
    async with open_door(tmp_path, script) as door:
        answer = await door.post("ada", "late", id="m2", headers={"prefer": "wait=10"})
        assert answer.json()["state"] == "answered"


async def test_p11_a_client_that_does_not_read_does_not_keep_the_gateway(tmp_path: Path) -> None:
    async def agent(turn: Turn) -> str:
        return "x" * 100_000

    settings = Settings(budget=4.0, grace=1.0)
    with trio.fail_after(30):
        async with open_door(tmp_path, agent, settings=settings) as door:
            deaf = socket.create_connection(door.address)
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = "GET /v1/sessions/ada/events?after=0 HTTP/1.1\r\nhost: x\r\n"
            head = head.replace("host: x", f"host: {door.address[0]}")
            deaf.sendall(f"{head}authorization: Bearer {TOKEN}\r\n\r\n".encode())
            for n in range(60):
                await door.post("ada", "hello", id=f"m{n}", headers={"prefer": "wait=10"})
            since = time.monotonic()
        took = time.monotonic() - since
        deaf.close()
        assert took < 5.0


# ----- after a crash


STREAMING = """
import trio
async def agent(turn):
    await turn.say(f"one of {turn.text}")
    await trio.sleep(0 if turn.resumed else 60)
    return f"two of {turn.text}"
"""


async def test_p7_a_follower_misses_nothing_across_a_kill(tmp_path: Path) -> None:
    """kill -9 in the middle of a turn; the stream goes on where it was."""
    port = free_port()
    url, options = f"http://127.0.0.1:{port}", ["--http", f"127.0.0.1:{port}"]
    seen: list[Any] = []
    with launch(tmp_path, STREAMING, options=options) as process:
        process.expect_log("channel_connected")
        token = read_token(token_path(tmp_path / "gateway.db"))
        async with client_of(url, token) as client, events_of(client, "ada", 0) as events:
            body = {"id": "m1", "text": "m1"}
            await client.post("/v1/sessions/ada/messages", json=body)
            seen += await read_until(events, "reply")
        process.kill()
    with launch(tmp_path, STREAMING, options=options) as process:
        process.expect_log("channel_connected")
        client = client_of(url, token)
        async with client, events_of(client, "ada", seen[-1].id) as events:
            seen += await read_until(events, "settled")
        assert process.stop() == 0
    kinds = [one.event for one in seen]
    assert kinds == [
        *("hello", "accepted", "begun", "reply"),
        *("hello", "interrupted", "resumed", "reply", "settled"),
    ]
    texts = [one.data["text"] for one in seen if one.event == "reply"]
    assert texts == ["one of m1", "two of m1"]
    places = [one.id for one in seen if one.event != "hello"]
    assert places == sorted(set(places))


async def test_who_comes_back_too_late_is_told_of_the_gap(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door:
        for n in range(3):
            await door.post("ada", "hello", id=f"m{n}", headers={"prefer": "wait=10"})
        # What retention does.
        await door.gateway._store.forget(0, 2**62, 0)
        async with events_of(door.client, "ada", 1) as events:
            assert (await anext(events)).event == "hello"
            gap = await anext(events)
        assert (gap.event, gap.data["from"]) == ("gap", 2)


async def test_who_begins_at_the_beginning_is_told_of_no_gap(tmp_path: Path) -> None:
    """Places are counted through the whole store: that a session's first one is not 1 says
    nothing."""
    async with open_door(tmp_path, echo) as door:
        for session in ("ada", "bob"):
            await door.post(session, "hello", headers={"prefer": "wait=10"})
        async with events_of(door.client, "bob", 0) as events:
            seen = await read_until(events, "settled")
        assert [one.event for one in seen] == ["hello", "accepted", "begun", "reply", "settled"]
        assert seen[1].id == 5


# ----- the command


def test_a_port_that_is_taken_is_a_configuration_that_is_wrong(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = ["--http", f"127.0.0.1:{taken.getsockname()[1]}"]
        with launch(tmp_path, STREAMING, options=options, ready=False) as process:
            assert process.wait() == 78
            assert "channels.http.bind" in process.stderr


def test_without_its_libraries_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import trio_gateway.http as door

    for name in ("trio_gateway.http._channel", "trio_gateway.http._app"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "starlette.exceptions", None)
    monkeypatch.setitem(sys.modules, "hypercorn.config", None)
    with pytest.raises(ConfigError, match=r'pip install "trio-gateway\[http\]"'):
        door.__getattr__("HttpChannel")
