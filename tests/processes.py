"""Gateways as real processes: launched, talked to over `jsonl`, stopped by real signals.

    with launch(tmp_path, AGENT) as gateway:
        gateway.send("ada", "m1", "hello")
        gateway.expect("reply", text="hello")
        assert gateway.stop() == 0

Whatever happens in the block, the process is gone after it. Launched again on the same path, a
gateway finds the same store.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any

from trio_gateway.store import read_store

ECHO = """
async def agent(turn):
    return turn.text
"""

SLOW = """
import trio
async def agent(turn):
    turn.progress("begun")
    await trio.sleep(0 if turn.resumed else 60)
    return "resumed: " + turn.text
"""
"""Does not end by itself in its first attempt, and says so when it has begun."""

PATIENCE = 30.0
"""Seconds that anything may take on a busy machine before a test fails."""

COMPANY = 3.0
"""Seconds that others on the machine may add to what is measured from outside."""


class GatewayProcess:
    """One gateway process. All waiting is bounded; a failure shows what the process said."""

    def __init__(self, process: subprocess.Popen[bytes], errors: Path) -> None:
        self._process = process
        self._errors = errors
        self._unexpected: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._ended = False
        self._stop_reading = os.pipe()
        self.events: list[dict[str, Any]] = []
        """Everything that was read from its standard output, in order."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def stderr(self) -> str:
        """What it wrote to standard error so far."""
        return self._errors.read_text(errors="replace")

    @property
    def log(self) -> list[dict[str, Any]]:
        """The records of its log so far."""
        lines = self.stderr.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    # ----- talking

    def send(self, session: str, message_id: str, text: str = "hi", **more: str) -> None:
        """Hand in one message."""
        message = {"session": session, "id": message_id, "text": text} | more
        self.send_line(json.dumps(message).encode())

    def send_line(self, line: bytes) -> None:
        """Write one line of input, whatever it is."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()

    def end_input(self) -> None:
        """Close its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def close_output(self) -> None:
        """Close the reading end of its standard output."""
        os.write(self._stop_reading[1], b"x")
        self._reader.join(PATIENCE)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def expect(self, event: str, timeout: float = PATIENCE, **fields: Any) -> dict[str, Any]:
        """The first event of that name and with those fields that was not expected before."""
        wanted = {"event": event} | fields
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                for index, found in enumerate(self._unexpected):
                    if wanted.items() <= found.items():
                        return self._unexpected.pop(index)
                left = deadline - time.monotonic()
                assert left > 0, f"no {wanted} within {timeout} s{self._story()}"
                assert not self._ended, f"the output ended without {wanted}{self._story()}"
                self._news.wait(left)

    def expect_log(self, event: str, timeout: float = PATIENCE) -> dict[str, Any]:
        """The first record of that name in its log."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for record in self.log:
                if record.get("event") == event:
                    return record
            time.sleep(0.01)
        raise AssertionError(f"no {event} in the log within {timeout} s{self._story()}")

    def expect_stderr(self, text: str, timeout: float = PATIENCE) -> None:
        """Wait until `text` has been written to standard error."""
        deadline = time.monotonic() + timeout
        while text not in self.stderr:
            assert time.monotonic() < deadline, f"no {text!r} within {timeout} s{self._story()}"
            time.sleep(0.01)

    # ----- ending

    def signal(self, *numbers: Signals) -> None:
        """Send signals, with a moment between two so that they do not become one."""
        for number in numbers:
            self._process.send_signal(number)
            time.sleep(0.05)
            self._wait_taken(number)

    def _wait_taken(self, number: Signals) -> None:
        """Wait until the kernel has handed it over: one that is pending swallows the next."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                status = Path(f"/proc/{self._process.pid}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                return
            pending = re.search(r"^ShdPnd:\s*([0-9a-f]+)$", status, re.M)
            if pending is None or not int(pending[1], 16) >> (number - 1) & 1:
                return
            time.sleep(0.005)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the end; the exit code, or minus the signal that killed it."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {timeout} s{self._story()}") from None
        self._reader.join(PATIENCE)
        return code

    def stop(self, number: Signals = SIGTERM, timeout: float = PATIENCE) -> int:
        """Send one signal and wait for the end."""
        self.signal(number)
        return self.wait(timeout)

    def storm(self, number: Signals, every: float = 0.002) -> int:
        """Send one signal again and again until the process has gone."""
        deadline = time.monotonic() + PATIENCE
        while self._process.poll() is None and time.monotonic() < deadline:
            self._process.send_signal(number)
            time.sleep(every)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self._process.kill()
        self.wait()

    def close(self) -> None:
        """Leave nothing behind."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join(PATIENCE)
        for fd in self._stop_reading:
            os.close(fd)
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    def _read(self) -> None:
        rest = b""
        while data := self._read_some():
            *lines, rest = (rest + data).split(b"\n")
            with self._news:
                events = [json.loads(line) for line in lines]
                self.events += events
                self._unexpected += events
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _read_some(self) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        # A pipe that a thread is reading cannot be closed for good by another one.
        ready, _, _ = select.select([fd, self._stop_reading[0]], [], [])
        return os.read(fd, 1 << 20) if ready == [fd] else b""

    def _story(self) -> str:
        return f"\n--- events\n{self.events}\n--- stderr\n{self.stderr}"


@contextmanager
def launch(
    where: Path,
    agent: str,
    *,
    grace: float = 5.0,
    budget: float = 10.0,
    store: str = "gateway.db",
    env: Mapping[str, str] = os.environ,
    ready: bool = True,
    stderr: int | None = None,
    options: Sequence[str] = ("--jsonl",),
    log_level: str | None = None,
) -> Generator[GatewayProcess]:
    """A gateway that hosts `agent`, the source of a module that defines `agent`, on the store in
    the directory `where`. `ready`: wait until it has recovered and serves. `stderr`: a descriptor
    for its standard error, which otherwise goes to a file. `options`: of the command line; so is
    `log_level`."""
    number = len(list(where.glob("agent*.py")))
    source = where / f"agent{number}.py"
    source.write_text(textwrap.dedent(agent))
    errors = where / f"stderr{number}.txt"
    command = [sys.executable, "-m", "trio_gateway", "run", f"{source}:agent", *options]
    command += ["--store", str(where / store), "--grace", f"{grace}s", "--budget", f"{budget}s"]
    command += [] if log_level is None else ["--log-level", log_level]
    with errors.open("wb") as to_file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=to_file if stderr is None else stderr,
            env=dict(env),
            cwd=where,
            start_new_session=True,
        )
    gateway = GatewayProcess(process, errors)
    try:
        if ready and stderr is None:
            gateway.expect_log("gateway_started")
        yield gateway
    finally:
        gateway.close()


def markers(where: Path, store: str = "gateway.db") -> dict[str, tuple[str, str | None]]:
    """What the store says of each turn that is open: by session name, its state and reason."""
    with closing(read_store(where / store)) as reader:
        return {row.session.name: (row.state, row.reason) for row in reader.open_turns()}
