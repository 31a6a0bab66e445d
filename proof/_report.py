"""What a campaign is, and what it reports: one JSON line, and one line for each failure that
reproduces it.

A campaign is a module of this folder with

    CAMPAIGN = Campaign(name="lives", ...)
    def run(job: Job) -> None

`run` counts what it did (`job.report.count`), notes which interesting states it has come through
(`job.report.saw`), and reports what broke (`job.report.fail`). Where the machine cannot run it, it
raises `Skip` with the reason.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections import Counter
from enum import StrEnum
from typing import Any, Final

import apsw
import attrs
import trio

MOST_FAILURES: Final = 5
"""A campaign ends with its fifth failure: more of the same say nothing more."""


class Size(StrEnum):
    """How much of a campaign is run."""

    QUICK = "quick"
    """Seconds: enough to catch a mutant."""
    CI = "ci"
    """Minutes."""
    LONG = "long"


class Skip(Exception):
    """This machine cannot run the campaign; the text says why, and what would change that."""


class Enough(Exception):
    """So many failures that going on says nothing more."""


@attrs.frozen(kw_only=True)
class Campaign:
    """What a campaign is about, for whoever reads its figures."""

    name: str
    injects: str
    """What it injects, in one sentence."""
    short: str = ""
    """The same in a few words."""
    promises: tuple[int, ...]
    """The promises that it holds the gateway to."""
    counted: str
    """Which of its figures says how often it injected."""
    must_see: tuple[str, ...] = ()
    """Interesting states: unless it has come through each of them, it has proved nothing."""


@attrs.define
class Report:
    """What a campaign did and found."""

    campaign: Campaign
    size: Size
    seed: int
    only: str | None = None
    figures: Counter[str] = attrs.field(factory=Counter[str])
    seen: Counter[str] = attrs.field(factory=Counter[str])
    failures: list[dict[str, str]] = attrs.field(factory=list[dict[str, str]])
    skipped: str | None = None
    began: float = attrs.field(factory=time.monotonic)

    def count(self, **figures: int) -> None:
        """Add to the figures."""
        self.figures.update(figures)

    def saw(self, *states: str) -> None:
        """The campaign has come through these states."""
        self.seen.update(states)

    def fail(self, point: str, what: str) -> None:
        """Something broke. `point` alone reproduces it, given as `--only`."""
        again = f"python -m proof {self.campaign.name} --only {point!r}"
        if self.seed:
            again += f" --seed {self.seed}"
        self.failures.append({"again": again, "what": what[:4000]})
        print(f"FAILED  {again}\n{what}", file=sys.stderr, flush=True)
        if len(self.failures) >= MOST_FAILURES:
            raise Enough

    def broke(self, what: str) -> None:
        """The campaign itself fell over, and the rest of it was not run."""
        self.failures.append({"again": "", "what": what[-4000:]})
        print(f"BROKE   {self.campaign.name}\n{what}", file=sys.stderr, flush=True)

    def check_seen(self) -> None:
        """A campaign that never came where it matters has failed, too."""
        if self.skipped:
            return
        if not self.figures and not self.failures:
            self.broke(f"nothing was run; --only {self.only!r} is no point of it, perhaps")
        if self.only or self.size is Size.QUICK:
            return
        for state in self.campaign.must_see:
            if not self.seen[state]:
                self.failures.append({"again": "", "what": f"never came through: {state}"})

    @property
    def ok(self) -> bool:
        """Whether nothing broke."""
        return not self.failures

    def line(self) -> str:
        """All of it, as one line of JSON."""
        found: dict[str, Any] = {
            "campaign": self.campaign.name,
            "size": str(self.size),
            "seed": self.seed,
            "only": self.only,
            "seconds": round(time.monotonic() - self.began, 1),
            "figures": dict(self.figures),
            "seen": dict(sorted(self.seen.items())),
            "failures": self.failures,
            "skipped": self.skipped,
            "python": platform.python_version(),
            "trio": trio.__version__,
            "sqlite": apsw.sqlite_lib_version(),
        }
        return json.dumps(found)


@attrs.frozen
class Job:
    """One run of a campaign: how much, from which seed, or only one point of it."""

    report: Report
    size: Size
    seed: int = 0
    only: str | None = None
    jobs: int = 2
    """Processes at once, for a campaign that can use more than one."""

    def amount(self, quick: int, ci: int, long: int) -> int:
        """How many, by size."""
        return {Size.QUICK: quick, Size.CI: ci, Size.LONG: long}[self.size]
