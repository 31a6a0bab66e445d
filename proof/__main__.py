"""Runs campaigns: `python -m proof lives`, or one point of it, `python -m proof lives --only 17`.

Prints one JSON line for each; a failure also prints, on standard error, the line that repeats it.
Exit code 1 if anything broke. What a machine cannot run is skipped, and says so.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from ._report import Campaign, Enough, Job, Report, Size, Skip

NAMES: Final = (
    "lives", "machine", "kill-io", "kill-syscalls", "disk", "power", "systemd", "supervisors",
    "resources", "bad-input", "soak", "door", "contract",
)  # fmt: skip
"""In the order of the page."""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m proof", description=__doc__)
    parser.add_argument("campaigns", nargs="+", choices=[*NAMES, "all", "list"])
    parser.add_argument("--size", type=Size, choices=list(Size), default=Size.CI)
    parser.add_argument("--seed", type=int, default=0, help="another one finds other things")
    parser.add_argument("--only", help="one point, as a failure named it")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument(
        "--at-once", type=int, default=1, help="campaigns beside each other, a process each"
    )
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file, too")
    given = parser.parse_args()
    # Whoever starts this may ignore them (nohup): what is started here would inherit that.
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    names = NAMES if "all" in given.campaigns else tuple(given.campaigns)
    if "list" in names:
        for name in NAMES:
            print(f"{name:15}{campaign(name).injects}")
        return 0
    if given.at_once > 1:
        return beside_each_other(names, options_of(given), given.at_once)
    reports: list[Report] = []
    for name in names:
        report = run(name, given.size, given.seed, given.only, given.jobs)
        reports.append(report)
        if given.out is not None:
            with given.out.open("a", encoding="utf-8") as out:
                out.write(report.line() + "\n")
    return 0 if all(report.ok for report in reports) else 1


def beside_each_other(names: Sequence[str], options: Sequence[str], at_once: int) -> int:
    """Each campaign in a process of its own, so many at once: some of them mostly wait."""
    command = [sys.executable, "-m", __package__ or "proof"]

    def one(name: str) -> int:
        return subprocess.run([*command, name, *options, "--at-once", "1"], check=False).returncode

    with ThreadPoolExecutor(at_once) as pool:
        codes = dict(zip(names, pool.map(one, names), strict=True))
    for name, code in codes.items():
        if code not in (0, 1):  # killed by a signal, say: nothing else would tell
            print(f"BROKE   {name}: exit code {code}", file=sys.stderr, flush=True)
    return int(any(codes.values()))


def options_of(given: argparse.Namespace) -> list[str]:
    """The command line for a process that runs one of several campaigns."""
    options = ["--size", given.size, "--seed", str(given.seed), "--jobs", str(given.jobs)]
    if given.only is not None:
        options += ["--only", given.only]
    if given.out is not None:
        options += ["--out", str(given.out)]
    return options


def campaign(name: str) -> Campaign:
    """What a campaign says of itself."""
    found: Campaign = _module(name).CAMPAIGN
    return found


def run(name: str, size: Size, seed: int, only: str | None, jobs: int) -> Report:
    """Run one campaign, and print its line."""
    module = _module(name)
    report = Report(module.CAMPAIGN, size, seed, only)
    try:
        module.run(Job(report, size, seed, only, jobs))
    except Skip as skip:
        report.skipped = str(skip)
        print(f"SKIPPED {name}: {skip}", file=sys.stderr, flush=True)
    except Enough:
        print(f"{name}: {len(report.failures)} failures are enough", file=sys.stderr, flush=True)
    except Exception:
        report.broke(traceback.format_exc())
    report.check_seen()
    print(report.line(), flush=True)
    return report


def _module(name: str) -> Any:
    return importlib.import_module(f".{name.replace('-', '_')}", __package__)


if __name__ == "__main__":
    sys.exit(main())
