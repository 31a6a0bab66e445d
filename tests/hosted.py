"""A gateway process for tests: `python hosted.py AGENT_FILE STORE GRACE BUDGET`, over `jsonl`."""

from __future__ import annotations

import runpy
import sys

from trio_gateway._config import LogFormat, LogLevel
from trio_gateway._host import host
from trio_gateway._logs import logging_to_stderr
from trio_gateway._settings import Settings
from trio_gateway._signals import SignalDesk
from trio_gateway.channels.jsonl import JsonlChannel


def main() -> int:
    agent_file, store, grace, budget = sys.argv[1:]
    desk = SignalDesk()
    desk.install()
    agent = runpy.run_path(agent_file)["agent"]
    with logging_to_stderr(LogLevel.INFO, LogFormat.JSON) as log:
        return host(
            agent,
            store=store,
            channels=[JsonlChannel()],
            settings=Settings(grace=float(grace), budget=float(budget)),
            log=log,
            signals=desk,
        )


if __name__ == "__main__":
    sys.exit(main())
