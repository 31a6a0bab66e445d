"""What goes wrong, as clients are told: one envelope for every error.

{"ok": false, "error": {"type": "too_large", "message": "text: 70000 bytes, ..."}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import orjson
from starlette.responses import Response

from .._errors import (
    GatewayError,
    GatewayStopping,
    InvalidInput,
    NotFound,
    StoreError,
    unwrap,
    words_of,
)

RETRY_SOON: Final = {"retry-after": "1"}


class Problem(Exception):
    """A request that is not served: `status` (HTTP), `kind` for programs, `message` for people."""

    def __init__(
        self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.headers: Mapping[str, str] = headers or {}

    def response(self) -> Response:
        """The answer that tells it."""
        error = {"type": self.kind, "message": self.message}
        return answer({"ok": False, "error": error}, self.status, self.headers)


def answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """One JSON document as a response. A text that is no Unicode is told as far as it is."""
    try:
        body = orjson.dumps(value)
    except TypeError:
        body = orjson.dumps(_representable(value))
    given = {"cache-control": "no-store", **(headers or {})}
    return Response(body, status, given, media_type="application/json")


def _representable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        table = cast("Mapping[Any, Any]", value)
        return {_representable(name): _representable(inner) for name, inner in table.items()}
    if isinstance(value, list | tuple):
        several = cast("Sequence[Any]", value)
        return [_representable(inner) for inner in several]
    return value


def problem_of(error: BaseException) -> Problem | None:
    """How an error is told; None for one that is our own fault, and nobody's business."""
    error = unwrap(error)
    if isinstance(error, Problem):
        return error
    if isinstance(error, NotFound):
        return Problem(404, "not_found", words_of(error))
    if isinstance(error, InvalidInput):
        return Problem(422, "invalid", words_of(error))
    if isinstance(error, GatewayStopping):
        return Problem(503, "stopping", words_of(error), RETRY_SOON)
    if isinstance(error, StoreError):
        return Problem(503, "store", "the store cannot do this now; try again", RETRY_SOON)
    if isinstance(error, GatewayError):
        return Problem(400, "refused", words_of(error))
    return None
