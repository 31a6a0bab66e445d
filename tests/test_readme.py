"""README and the pages in docs/ say what is so: their code is run, the transcript is replayed, the
tables are compared."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from trio_gateway.store import read_store

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PATIENCE = 40.0
"""Seconds that anything may take on a busy machine before a test fails."""

RUN = [sys.executable, "-m", "trio_gateway", "run", "bot.py:agent"]


def blocks(language: str, page: str = README) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


BOT, PROGRAM = blocks("python")
(TRANSCRIPT,) = blocks("console")


def environment() -> dict[str, str]:
    """The environment of a user who has configured nothing."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRIO_GATEWAY_")}
    return inherited | {"TERM": "xterm"}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder with README's bot in it."""
    (tmp_path / "bot.py").write_text(BOT)
    return tmp_path


# ----- the first screen


def test_the_code_comes_within_120_words_and_the_first_screen() -> None:
    before = README.partition("```python")[0]

    assert len(before.split()) <= 120
    assert before.count("\n") + BOT.count("\n") < 30
    assert BOT.count("\n") <= 12


def test_there_are_two_commands_and_ci_gives_the_one_for_the_tests() -> None:
    run, test = (block.strip() for block in blocks("sh"))

    assert run.startswith("python -m pip install")
    assert "trio-gateway run examples/echo.py:agent" in run
    assert test.endswith("python -m pytest")
    assert f"\n{test}\n" in (ROOT / ".ci/run").read_text()


# ----- the transcript


class Terminal:
    """A gateway on a terminal of 80 columns. What it shows is `screen`, without colours."""

    def __init__(self, where: Path) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
        self._process = subprocess.Popen(
            RUN, cwd=where, env=environment(), stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        self._raw = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # what a terminal says whose other side is gone
                return
            self._raw += data

    @property
    def screen(self) -> str:
        """Everything that was written so far, without escape sequences."""
        text = self._raw.decode(errors="replace").replace("\r\n", "\n")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[78]|\r", "", text)

    def wait_for(self, text: str) -> None:
        """Wait until `text` is on the screen."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.screen:
            assert time.monotonic() < deadline, f"no {text!r} on the screen:\n{self.screen}"
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Type."""
        os.write(self._master, text.encode())

    def kill(self) -> None:
        """`kill -9`."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(PATIENCE)

    def wait_end(self) -> int:
        """Wait for the end; the exit code."""
        return self._process.wait(PATIENCE)

    def close(self) -> None:
        """Leave nothing behind."""
        self.kill()
        self._reader.join(PATIENCE)
        os.close(self._master)


@contextmanager
def terminal(where: Path) -> Generator[Terminal, None, None]:
    """A terminal for the length of the block."""
    opened = Terminal(where)
    try:
        yield opened
    finally:
        opened.close()


def shown(life: str) -> list[str]:
    """The lines of one life in the transcript that the gateway wrote."""
    lines = (line.strip() for line in life.splitlines())
    return [line for line in lines if line and not line.startswith(("$", ">", "⋯"))]


def assert_in_order(lines: list[str], screen: str) -> None:
    """Each line is on the screen, after the one before it."""
    at = 0
    for line in lines:
        found = screen.find(line, at)
        assert found >= 0, f"no {line!r} where the transcript has it:\n{screen}"
        at = found + len(line)


def wait_delivered(store: Path) -> None:
    """Wait until the store knows that everything which was said has arrived. Killed before that,
    the gateway shows it again, and says that it may be a repeat."""
    deadline = time.monotonic() + PATIENCE
    with closing(read_store(store)) as reader:
        while reader.counts().undelivered:
            assert time.monotonic() < deadline, "the store does not know"
            time.sleep(0.02)


def test_p01_p05_p07_the_transcript_of_the_kill_is_what_happens(house: Path) -> None:
    before, after = re.split(r"^.*\bKilled\n", TRANSCRIPT, flags=re.M)
    (asked,) = re.findall(r"^> (\w+)$", before, re.M)
    *said, answer = shown(after)

    with terminal(house) as first:
        first.wait_for("> ")
        first.type(f"{asked}\n")
        first.wait_for(shown(before)[-1])
        wait_delivered(house / "gateway.db")
        first.kill()
        assert_in_order(shown(before), first.screen)
        assert answer not in first.screen

    with terminal(house) as second:
        second.wait_for(answer)
        second.type("\x04")
        assert second.wait_end() == 0
        assert_in_order([*said, answer], second.screen)
        assert second.screen.count(answer) == 1
        # Shown once, as the past: it was said before the kill, and is not said again.
        assert second.screen.count(shown(before)[-1]) == 1


# ----- the other code


def test_the_program_runs(house: Path) -> None:
    (house / "program.py").write_text(BOT + PROGRAM)

    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=house,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("There are 5 letters in honey.")
    assert "DrainReport" in done.stdout


def test_the_page_on_testing_tests(tmp_path: Path) -> None:
    agent, crash, seeded, _ = blocks("python", (ROOT / "docs/testing.md").read_text())
    (tmp_path / "test_agent.py").write_text(agent)
    (tmp_path / "test_crash.py").write_text(crash)
    (tmp_path / "test_seeded.py").write_text(seeded)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={k: v for k, v in environment().items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )

    assert "4 passed" in done.stdout, done.stdout


# ----- links, and the pages behind them


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())

    for target in targets:
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_page_is_reached_from_the_readme() -> None:
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name})" in README


def test_the_architecture_can_be_read_at_a_sitting() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 200


def test_the_architecture_names_files_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()

    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|sql))`", text):
        found = (ROOT / "trio_gateway" / name).exists() or list(ROOT.rglob(f"store/{name}"))
        assert found, name


def test_every_key_of_the_configuration_is_on_its_page(tmp_path: Path) -> None:
    documented = dict(_documented_keys((ROOT / "docs/configuration.md").read_text()))

    effective = _effective_keys(tmp_path)

    assert {key: documented.get(key) for key in effective} == effective


def _documented_keys(page: str) -> Iterator[tuple[str, Any]]:
    for section, table in re.findall(r"^## \[(\w+)\]\n(.*?)(?=^## |\Z)", page, re.M | re.S):
        for key, default in re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", table, re.M):
            yield f"{section}.{key}", json.loads(default)


def _effective_keys(where: Path) -> dict[str, Any]:
    shown = subprocess.run(
        [sys.executable, "-m", "trio_gateway", "config", "show"],
        cwd=where,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    ).stdout
    section, effective = "", dict[str, Any]()
    for line in shown.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line:
            key, _, value = line.partition(" = ")
            effective[f"{section}.{key}"] = json.loads(value.partition("#")[0])
    return effective


def test_jsonl_writes_what_its_page_says(house: Path) -> None:
    page = (ROOT / "docs/jsonl.md").read_text()
    documented = {
        event: set(re.findall(r"`(\w+)`", fields))
        for event, fields in re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|", page, re.M)
    }

    lines = ['{"session": "a", "id": "m1", "text": "hi"}', '{"session": "a"}']
    done = subprocess.run(
        [*RUN, "--jsonl"],
        cwd=house,
        env=environment(),
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]

    assert {"accepted", "error", "reply"} <= {event["event"] for event in events}
    for event in events:
        assert event.keys() - {"event"} == documented[event["event"]]
