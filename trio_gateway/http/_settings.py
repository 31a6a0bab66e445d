"""How the HTTP door is set up. Values; `gateway.toml` calls them `[channels.http]`."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class HttpSettings:
    """The HTTP channel. Times are seconds, sizes are bytes.

    `bind`: host:port, [::1]:port, or unix:/path. `hosts`: names by which it is reached, besides
    `localhost` and addresses; any other Host header is refused (DNS rebinding). `origins`: web
    sites whose pages may call it, like "https://chat.example"; its own page always may.
    """

    bind: str = "127.0.0.1:8080"
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    body_bytes: int = 4 * 1024 * 1024
    header_time: float = 10.0
    """How long a connection may take to send the head of a request, or be idle before one."""
    body_time: float = 20.0
    """How long a request may take to send its body."""
    send_time: float = 30.0
    """How long a client may leave what it is sent unread."""
    longest_wait: float = 300.0
    """How long `Prefer: wait` waits at the most."""
    heartbeat: float = 15.0
    """How often a silent event stream says that it lives."""
    connections: int = 4096
    """Open at once."""
    per_peer: int = 1024
    """Of these, from one address."""
