"""docs/tutorial.md is followed from its first listing to its last, as a reader would: files are
written, commands are given, the gateway is killed where the page says so, and what the page shows
is compared. Times and ids differ; everything else must not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_readme import (
    PATIENCE,
    ROOT,
    assert_in_order,
    blocks,
    environment,
    shown,
    terminal,
    wait_delivered,
)

PAGE = (ROOT / "docs/tutorial.md").read_text()
BOT, SLOW_BOT, SHOP, TESTS = blocks("python", PAGE)
(ONE, KILLED, RESUMED, LOG, SESSIONS, SESSION, HELP, TESTED) = blocks("console", PAGE)
(PYTEST_INI,) = blocks("ini", PAGE)


def given(transcript: str) -> tuple[str, str]:
    """The command of a transcript, and what it shows."""
    command, _, output = transcript.removeprefix("$ ").partition("\n")
    return command, output


def typed(command: str, where: Path) -> str:
    """What a command writes that is given to a shell, by somebody whose environment is entered."""
    folder = Path(sys.executable).parent
    inherited = {k: v for k, v in environment().items() if not k.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=where,
        env=inherited | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def plain(text: str) -> str:
    """Without what is different each time: moments, ids, durations, and the room between things."""
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "SOMETIME", text)
    text = re.sub(r"\b[0-9a-f]{32}\b", "ID", text)
    text = re.sub(r"in \d+\.\d+s", "in A WHILE", text)
    return re.sub(r"[ \t]+", " ", re.sub(r" +$", "", text, flags=re.M))


def follow(transcript: str, where: Path) -> None:
    """Give the command of a transcript, and compare."""
    command, output = given(transcript)
    assert plain(typed(command, where)) == plain(output)


def wait_until(true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def written(file: Path) -> str:
    """What is in a file, if there is one."""
    return file.read_text() if file.exists() else ""


def test_the_install_is_the_one_of_the_readme() -> None:
    (install,) = blocks("sh", PAGE)

    assert 'python -m pip install ".[test]"' in install.splitlines()


def test_p05_the_tutorial_up_to_the_kill_and_after_it(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(BOT)
    follow(ONE, tmp_path)

    # The word that it is killed over takes a minute here: a busy machine must not be late for it.
    (tmp_path / "bot.py").write_text(SLOW_BOT.replace("sleep(3)", "sleep(60 * (word == 'and'))"))
    (question,) = re.findall(r"^> ((?!Killed).+)$", KILLED, re.M)
    with terminal(tmp_path) as first:
        first.wait_for("> ")
        first.type(f"{question}\n")
        first.wait_for("On it.")
        wait_delivered(tmp_path / "gateway.db")
        wait_until(lambda: "and\n" in written(tmp_path / "asked.log"))
        first.kill()
        assert_in_order(shown(KILLED.removesuffix("> Killed\n")), first.screen)

    (tmp_path / "bot.py").write_text(SLOW_BOT)
    *said, answer = shown(RESUMED)
    with terminal(tmp_path) as second:
        second.wait_for(answer)
        second.type("\x04")
        assert second.wait_end() == 0
        assert_in_order([*said, answer], second.screen)
        assert second.screen.count("On it.") == 1

    for transcript in (LOG, SESSIONS, SESSION, HELP):
        follow(transcript, tmp_path)


@pytest.mark.timeout(5 * PATIENCE)  # a whole pytest, twice
def test_the_tutorials_tests_pass_and_have_teeth(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(SLOW_BOT)
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "test_bot.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text(PYTEST_INI)

    follow(TESTED, tmp_path)

    (tmp_path / "shop.py").write_text(SHOP.replace(', effect="unsafe"', ""))
    with pytest.raises(AssertionError, match=r"CrashFailure: point=\d+ (before|after)"):
        typed(given(TESTED)[0], tmp_path)
