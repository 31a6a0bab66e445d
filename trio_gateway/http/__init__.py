"""The HTTP door: an API for programs, event streams that survive a crash, a page for people.

    channels = [HttpChannel(HttpSettings(bind="127.0.0.1:8080"), token=read_token(path))]

Needs the extra `http`. The API is told in docs/http.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._errors import needs_extra
from ._settings import HttpSettings
from ._token import read_token, token_path

if TYPE_CHECKING:
    from ._channel import HttpChannel

__all__ = ["HttpChannel", "HttpSettings", "read_token", "token_path"]


def __getattr__(name: str) -> object:
    # Not at once: its libraries are an extra, and whoever only reads a configuration needs none.
    if name != "HttpChannel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs_extra("http", "the HTTP channel"):
        from ._channel import HttpChannel
    return HttpChannel
