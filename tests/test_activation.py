"""Sockets that were opened for us by whoever started the process: real ones, inherited."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

import pytest

from trio_gateway import ConfigError
from trio_gateway._activation import listen_fds

CHILD = """
import json, os, socket, subprocess, sys
from trio_gateway._activation import listen_fds
found = listen_fds()
left = [name for name in os.environ if name.startswith("LISTEN_")]
told = {name: [one.getsockname()[1] for one in sockets] for name, sockets in found.items()}
inheritable = [one.get_inheritable() for sockets in found.values() for one in sockets]
again = len(listen_fds())
print(json.dumps([told, left, inheritable, again]), flush=True)
for sockets in found.values():
    for one in sockets:
        connection, _ = one.accept()
        connection.sendall(b"served")
        connection.close()
"""


def start(fds: Sequence[int], names: str, **environ: str) -> subprocess.Popen[str]:
    """A child that inherits these as 3, 4, ..., as systemd would pass them."""
    # First up, out of the way of 3 and 4, then down.
    moves = [f"exec {60 + n}<&{fd}" for n, fd in enumerate(fds)]
    moves += [f"exec {3 + n}<&{60 + n} {60 + n}<&-" for n in range(len(fds))]
    script = "; ".join([*moves, "export LISTEN_PID=${PID:-$$}", 'exec "$0" -c "$1"'])
    given = {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names} | environ
    return subprocess.Popen(
        ["bash", "-c", script, sys.executable, CHILD],
        pass_fds=fds,
        env=os.environ | given,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def listener() -> socket.socket:
    """A listening socket on a free port."""
    return socket.create_server(("127.0.0.1", 0))


def test_inherited_sockets_are_found_by_name_and_serve() -> None:
    with listener() as one, listener() as two:
        ports = [one.getsockname()[1], two.getsockname()[1]]
        # The connection comes before anybody serves, and waits.
        with socket.create_connection(one.getsockname(), timeout=20) as early:
            process = start([one.fileno(), two.fileno()], "http:other")
            with process, socket.create_connection(two.getsockname(), timeout=20) as late:
                assert process.stdout is not None
                assert process.stdout.readline() == (
                    f'[{{"http": [{ports[0]}], "other": [{ports[1]}]}}, [], [false, false], 0]\n'
                )
                early.settimeout(20)
                assert early.recv(100) == late.recv(100) == b"served"
                assert process.wait(20) == 0


def test_sockets_without_names_go_by_one() -> None:
    with listener() as one, listener() as two, start([one.fileno(), two.fileno()], "") as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith('[{"unknown": [')
        finally:
            process.kill()


def test_what_is_meant_for_another_process_is_left_alone() -> None:
    with listener() as one, start([one.fileno()], "http", PID="1") as process:
        assert process.communicate(timeout=20)[0] == "[{}, [], [], 0]\n"


@pytest.mark.parametrize(
    ("count", "names", "told"),
    [
        ("three", "", "LISTEN_FDS: expected a number of sockets, got 'three'"),
        ("-1", "", "LISTEN_FDS"),
        ("99999", "", "LISTEN_FDS"),
        ("2", "http", "LISTEN_FDNAMES: 1 names for 2 sockets"),
    ],
)
def test_bad_news_is_one_clear_error(count: str, names: str, told: str) -> None:
    environ = {"LISTEN_FDS": count, "LISTEN_FDNAMES": names, "LISTEN_PID": str(os.getpid())}
    with pytest.raises(ConfigError, match=told):
        listen_fds(environ)
    assert environ == {}


@pytest.mark.parametrize("kind", ["a file", "a connection", "nothing"])
def test_what_is_no_listening_socket_is_refused(kind: str) -> None:
    left, right = socket.socketpair()
    with left, right, open(os.devnull) as file:  # noqa: PTH123
        fds = {"a file": [file.fileno()], "a connection": [left.fileno()], "nothing": []}[kind]
        # A LISTEN_FDS of one, though nothing may be there.
        with start(fds, "http", LISTEN_FDS="1") as process:
            _, complaint = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "ConfigError: the socket 'http' that was passed as descriptor 3" in complaint
    assert "the .socket unit" in complaint


def test_without_any_there_are_none() -> None:
    assert listen_fds({}) == {}
