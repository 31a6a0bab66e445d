"""One life of the real command, with pipes, at the other end of a `Platform`.

    with started(platform) as gateway:
        gateway.send(platform.new("ada", "plain"))
        platform.wait_answered()
        assert gateway.stop() == 0

Whatever happens in the block, the process is gone after it. Every wait is bounded, also the one
for a process that takes no input.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Final

import attrs

from ._platform import PATIENCE, Platform, environment, wait_until
from ._sweeps import same_gateway

COMMAND: Final = (sys.executable, "-m", "trio_gateway", "run", "agent.py:agent", "--jsonl")

MEMORY: Final = Path("/dev/shm")


@contextmanager
def scratch_folder() -> Generator[Path]:
    """A folder for a while; in memory where the machine has such a place and nobody wants another,
    because a process that is killed has no use for a disk that syncs."""
    where = MEMORY if os.access(MEMORY, os.W_OK) and "TMPDIR" not in os.environ else None
    with tempfile.TemporaryDirectory(prefix="proof-", dir=where) as folder:
        yield Path(folder)


def told(error: BaseException) -> str:
    """What went wrong, and where: an assertion without words is told by its line."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at {last.name}, {last.line}\n{error}"


@attrs.define(eq=False)
class Process:
    """A gateway process. What it writes goes to its platform."""

    platform: Platform
    popen: subprocess.Popen[bytes]
    log_from: int
    """Where in `log.txt` the lines of this life begin."""
    reader: threading.Thread = attrs.field(init=False)
    broken: BaseException | None = None
    """What the platform could not make sense of."""

    def __attrs_post_init__(self) -> None:
        assert self.popen.stdin is not None
        # A process that takes no input, stopped or stuck, must not keep its campaign.
        os.set_blocking(self.popen.stdin.fileno(), False)
        self.reader = threading.Thread(target=self._hear_all, daemon=True)
        self.reader.start()

    def _hear_all(self) -> None:
        assert self.popen.stdout is not None
        try:
            self.platform.hear_all(self.popen.stdout)
        except BaseException as error:
            self.broken = error

    @property
    def pid(self) -> int:
        """The process's number."""
        return self.popen.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.popen.poll() is None

    # ----- talking

    def send(self, *lines: bytes) -> bool:
        """Write lines. False: it is gone, or has closed its input."""
        assert self.popen.stdin is not None
        fd, data = self.popen.stdin.fileno(), memoryview(b"".join(lines))
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        while data:
            if not poll.poll(PATIENCE * 1000):
                raise AssertionError(f"took no input for {PATIENCE:g} s\n{self.story}")
            try:
                data = data[os.write(fd, data[: select.PIPE_BUF]) :]
            except BrokenPipeError:
                return False
            except BlockingIOError:
                continue
        return True

    def end_input(self) -> None:
        """Close its standard input."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()

    def log(self) -> str:
        """What this life has logged."""
        with (self.platform.folder / "log.txt").open("rb") as file:
            file.seek(self.log_from)
            return file.read().decode(errors="replace")

    @property
    def story(self) -> str:
        """The end of it."""
        return self.log()[-3000:]

    def wait_log(self, text: str, patience: float = PATIENCE) -> None:
        """Wait until it has logged something."""
        wait_until(lambda: text in self.log() or not self.alive, text, patience)
        assert text in self.log(), f"ended with {self.popen.returncode} before {text}\n{self.story}"

    # ----- ending

    def signal(self, *numbers: Signals) -> None:
        """Send signals, with a moment between two so that they do not become one."""
        for index, number in enumerate(numbers):
            if index:
                time.sleep(0.02)
            self.popen.send_signal(number)

    def wait(self, patience: float = PATIENCE) -> int:
        """Wait for the end; the exit code, or minus the signal that killed it."""
        try:
            code = self.popen.wait(patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {patience:g} s\n{self.story}") from None
        self.reader.join(PATIENCE)
        if self.broken is not None:
            raise AssertionError(f"wrote what makes no sense: {self.broken!r}") from self.broken
        return code

    def stop(self, number: Signals = SIGTERM) -> int:
        """Send one signal and wait for the end."""
        self.signal(number)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.popen.kill()
        self.wait()

    def close(self) -> None:
        """Leave nothing behind."""
        if self.alive:
            self.popen.kill()
        self.popen.wait(PATIENCE)
        self.reader.join(PATIENCE)
        for pipe in (self.popen.stdin, self.popen.stdout):
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


@contextmanager
def started(
    platform: Platform,
    *,
    inside: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    again: float | None = 0.0,
) -> Generator[Process]:
    """A gateway on the platform's store.

    `inside`: what starts it, `prlimit` for one, and is replaced by it. `again`: send first what
    nobody acknowledged, and what somebody did with that chance; None: send nothing.
    """
    log_path = platform.folder / "log.txt"
    with log_path.open("ab") as log:
        log_from = log.tell()
        popen = subprocess.Popen(
            [*inside, *COMMAND, "--store", str(platform.store)],
            cwd=platform.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**same_gateway(), **environment(platform.folder), **(env or {})},
            start_new_session=True,
        )
        gateway = Process(platform, popen, log_from)
    try:
        if again is not None:
            gateway.send(*platform.again(again))
        yield gateway
    finally:
        gateway.close()
