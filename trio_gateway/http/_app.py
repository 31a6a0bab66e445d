"""Which request goes where. Behind the guard; whatever goes wrong is one envelope."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import trio
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.websockets import WebSocket

from .._errors import parted
from . import _events, _hooks, _live, _look, _messages, _metrics, _openai, _page, _socket
from ._guard import headers_of
from ._house import House
from ._problem import Problem, problem_of

Endpoint: TypeAlias = Callable[[House, Request], Awaitable[Response]]
Streaming: TypeAlias = Callable[[House, Request, Any], Awaitable[None]]


class _Action(Convertor[str]):
    regex = "retry|drop"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


class _Name(Convertor[str]):
    """Whatever a session, a message or a model is called: slashes, and also line breaks."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("action", _Action())
register_url_convertor("name", _Name())


class App:
    """The door as an ASGI application. `on_fault` is told of errors that are ours."""

    def __init__(self, house: House, on_fault: Callable[[BaseException], None]) -> None:
        self._house = house
        self._on_fault = on_fault
        self._router = Router(self._routes(), redirect_slashes=False)

    def _routes(self) -> list[Route]:
        at, session = self._at, "/v1/sessions/{key:name}"
        return [
            at("POST", f"{session}/messages", _messages.post_message),
            at("GET", f"{session}/messages", _look.get_messages),
            self._streaming("GET", f"{session}/events", _events.get_events),
            at("POST", f"{session}/stop", _look.post_stop),
            at("GET", "/v1/sessions", _look.get_sessions),
            at("GET", "/v1/messages/{id:name}", _look.get_message),
            at("GET", "/v1/quarantine", _look.get_quarantine),
            at("POST", "/v1/quarantine/{turn}/{what:action}", _look.post_quarantine),
            at("GET", "/v1/dead-letters", _look.get_dead_letters),
            at("POST", "/v1/dead-letters/{delivery}/{what:action}", _look.post_dead_letter),
            at("GET", "/v1/status", _look.get_status),
            at("POST", "/hooks/{session:name}", _hooks.post_hook),
            *self._openai_routes(),
            at("GET", "/healthz", _look.get_healthz),
            at("GET", "/startupz", _look.get_startupz),
            at("GET", "/readyz", _look.Readiness().get),
            at("GET", "/metrics", _metrics.get_metrics),
            *self._page_routes(),
        ]

    def _page_routes(self) -> list[Route]:
        at, session = self._at, "/sessions/{key:name}"
        return [
            at("GET", "/", _page.get_overview),
            self._streaming("GET", "/live", _live.Overview().get),
            self._streaming("GET", f"/live{session}", _live.get_live_session),
            at("GET", "/sessions", _page.get_sessions),
            at("GET", session, _page.get_session),
            at("POST", f"{session}/messages", _page.post_message),
            at("POST", f"{session}/stop", _page.post_stop),
            at("GET", "/messages", _page.get_message),
            at("GET", "/messages/{id:name}", _page.get_message),
            at("POST", "/quarantine/{turn}/{what:action}", _page.post_put_aside),
            at("POST", "/dead-letters/{delivery}/{what:action}", _page.post_letter),
            at("POST", "/pause", _page.post_pause),
            at("POST", "/unpause", _page.post_unpause),
            at("GET", "/login", _page.get_login),
            at("POST", "/login", _page.post_login),
            at("POST", "/logout", _page.post_logout),
            *(at("GET", path, _page.get_file) for path in _page.FILES),
        ]

    def _openai_routes(self) -> list[Route]:
        response = "/v1/responses/{id}"
        return [
            self._at("GET", "/v1/models", _openai.get_models),
            self._at("GET", "/v1/models/{name:name}", _openai.get_model),
            self._streaming("POST", "/v1/chat/completions", _openai.post_chat),
            self._streaming("POST", "/v1/responses", _openai.post_response),
            self._streaming("GET", response, _openai.get_response),
            self._at("DELETE", response, _openai.delete_response),
            self._at("POST", f"{response}/cancel", _openai.post_cancel),
        ]

    def _at(self, method: str, path: str, endpoint: Endpoint) -> Route:
        async def asked(request: Request) -> Response:
            return await endpoint(self._house, request)

        return Route(path, asked, methods=[method])

    def _streaming(self, method: str, path: str, endpoint: Streaming) -> Route:
        async def asked(request: Request) -> Response:
            await trio.lowlevel.checkpoint()
            return _Stream(self._house, request, endpoint)

        return Route(path, asked, methods=[method])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request or one WebSocket."""
        scope["app"] = self  # so that Starlette raises what is not found
        speaker = _Speaker(send, closing=self._house.closing.is_set)
        try:
            self._house.guard.admit(scope, headers_of(scope))
            if scope["type"] == "websocket":
                await self._converse(WebSocket(scope, receive, send))
            else:
                await self._router(scope, receive, speaker.send)
        except (Exception, BaseExceptionGroup) as error:
            cancelled, failed = parted(error, trio.Cancelled)
            if cancelled is not None:
                raise
        else:
            return
        if failed is not None:
            await self._tell(failed, scope, receive, speaker)

    async def _converse(self, socket: WebSocket) -> None:
        if socket.scope["path"] != "/v1/ws":
            raise Problem(404, "not_found", "WebSockets are at /v1/ws")
        await _socket.talk(self._house, socket)

    async def _tell(
        self, error: BaseException, scope: Any, receive: Any, speaker: _Speaker
    ) -> None:
        problem = _of_starlette(error) or problem_of(error)
        if problem is None:
            self._on_fault(error)
            problem = Problem(500, "failed", "this failed; the gateway's log says why")
        if speaker.begun:
            return  # the end of the connection tells it
        response = _told(problem, scope)
        if scope["type"] == "websocket":
            await _refuse_socket(response, speaker)
        else:
            await response(scope, receive, speaker.send)


def _told(problem: Problem, scope: Any) -> Response:
    """A problem as whoever asks expects it: OpenAI's clients, a browser, any other program."""
    if _openai.is_here(scope["path"]):
        return _openai.told(problem)
    return _page.told(problem, scope) or problem.response()


def _of_starlette(error: BaseException) -> Problem | None:
    if not isinstance(error, HTTPException):
        return None
    if error.status_code == 404:
        return Problem(404, "not_found", "there is nothing here; see docs/http.md")
    if error.status_code == 405:
        return Problem(405, "wrong_method", "not with this method", error.headers)
    return Problem(error.status_code, "invalid", error.detail)


async def _refuse_socket(response: Response, speaker: _Speaker) -> None:
    headers = [(name, value) for name, value in response.raw_headers]
    await speaker.send(
        {
            "type": "websocket.http.response.start",
            "status": response.status_code,
            "headers": headers,
        }
    )
    await speaker.send({"type": "websocket.http.response.body", "body": bytes(response.body)})


class _Speaker:
    """What is sent, and whether that has begun. While the gateway closes, the connection does."""

    def __init__(self, send: Any, closing: Callable[[], bool]) -> None:
        self._send = send
        self._closing = closing
        self.begun = False

    async def send(self, message: Any) -> None:
        if message["type"].endswith("response.start"):
            self.begun = True
            if self._closing():
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        await self._send(message)


class _Stream(Response):
    """A response that an endpoint writes by itself."""

    def __init__(self, house: House, request: Request, endpoint: Streaming) -> None:
        super().__init__()
        self._house = house
        self._request = request
        self._endpoint = endpoint

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._endpoint(self._house, self._request, send)
