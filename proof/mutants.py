"""Whether the proof has teeth: breaks the library on purpose, and lets the campaigns find it.

    python -m proof.mutants [--only NAME] [--jobs 2] [--out FILE]

A mutant is a patch in the folder `mutants`, one plausible mistake each. Its first lines say what
is broken, which promise that breaks, and (if they know) which campaigns are to be asked first, and
in which size (else the quick one):

    Breaks: A stop tells people first, and marks the open turns afterwards.
    Promise: 4
    Caught-by: lives, kill-io
    Size: ci

Each is applied to a copy of the library. Beside an untouched copy of `proof`, one campaign after
the other is run on it, until one catches it: reports a failure, or hangs. A campaign that does not
pass on a copy without a patch tells nothing, and is not asked.

Prints one JSON line for each mutant and one for all. Exit code 1 if any survives, or if a campaign
does not pass on the library as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeAlias

import attrs

from ._report import Size

ROOT: Final = Path(__file__).resolve().parents[1]
FOLDER: Final = Path(__file__).resolve().with_suffix("")

ORDER: Final = (
    "lives", "contract", "machine", "disk", "power", "kill-io", "kill-syscalls", "bad-input",
    "resources", "soak", "door", "systemd", "supervisors",
)  # fmt: skip
"""The campaigns in the order in which they are asked: the cheap ones first."""

PATIENCE: Final = 420.0
"""Seconds after which a campaign hangs: more than five failures take, each of which waits."""

GOODBYE: Final = 15.0
"""Seconds that a campaign gets to clean up after it was interrupted."""

MEMORY: Final = Path("/dev/shm")


Asked: TypeAlias = tuple[str, Size]
"""A campaign, and how much of it."""


class Outcome(StrEnum):
    """How a campaign ended on a copy."""

    PASSED = "passed"
    FAILED = "failed"
    """It reported failures: whatever is broken was caught."""
    HUNG = "hung"
    SKIPPED = "skipped"
    BROKE = "broke"
    """It fell over itself, and reports nothing that anybody could repeat."""


class Unfit(Exception):
    """A patch that is none: it has no head, does not apply, or leaves nothing that can run."""


@attrs.frozen(kw_only=True)
class Mutant:
    """One deliberate break."""

    name: str
    breaks: str
    promise: int
    caught_by: tuple[str, ...]
    """Campaigns to ask first."""
    size: Size
    """In which size those are asked."""
    patch: Path

    @property
    def order(self) -> tuple[Asked, ...]:
        """The campaigns in the order in which they are asked about it, and their sizes."""
        others = [name for name in ORDER if name not in self.caught_by]
        return (
            *((name, self.size) for name in self.caught_by),
            *((name, Size.QUICK) for name in others),
        )


@attrs.frozen(kw_only=True)
class Finding:
    """What one campaign said of one copy."""

    campaign: str
    outcome: Outcome
    size: Size = Size.QUICK
    again: str = ""
    what: str = ""
    seconds: float = 0.0

    @property
    def caught(self) -> bool:
        """Whether the campaign has noticed the break."""
        return self.outcome in (Outcome.FAILED, Outcome.HUNG)


# ----- patches


def all_mutants(folder: Path = FOLDER) -> tuple[Mutant, ...]:
    """Every mutant, by name."""
    return tuple(read_mutant(path) for path in sorted(folder.glob("*.patch")))


def read_mutant(path: Path) -> Mutant:
    """A mutant from its patch. Raises `Unfit`, naming what its head lacks."""
    head: dict[str, str] = {}
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("--- "):
            break
        key, _, value = line.partition(":")
        head[key] = value.strip()
    try:
        return Mutant(
            name=path.stem,
            breaks=head["Breaks"],
            promise=int(head["Promise"]),
            caught_by=_names(head.get("Caught-by", "")),
            size=Size(head.get("Size", "quick")),
            patch=path,
        )
    except (KeyError, ValueError) as error:
        raise Unfit(f"{path.name}: its first lines lack or garble {error}") from None


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := set(names) - set(ORDER):
        raise ValueError(f"Caught-by: {unknown}")
    return names


def apply(mutant: Mutant, copy: Path) -> None:
    """Break a copy. Raises `Unfit` if the patch does not fit the library any more."""
    command = ["patch", "--strip=1", "--fuzz=0", "--forward", "--batch", "--reject-file=-"]
    with mutant.patch.open("rb") as patch:
        done = subprocess.run(
            command, check=False, cwd=copy, stdin=patch, capture_output=True, text=True
        )
    if done.returncode:
        raise Unfit(f"{mutant.patch.name} does not apply any more:\n{done.stdout}{done.stderr}")


# ----- copies


def copy_of(source: Path, where: Path) -> Path:
    """A copy of the library and of the proof, and of the pages whose words the proof tries."""
    for name in ("trio_gateway", "proof", "docs"):
        if (source / name).exists():
            ignored = shutil.ignore_patterns("__pycache__", "*.patch")
            shutil.copytree(source / name, where / name, ignore=ignored)
    (where / "tmp").mkdir()
    return where


def environment(copy: Path) -> dict[str, str]:
    """What every process that works on a copy is started with: the copy comes before whatever is
    installed."""
    return {**os.environ, "PYTHONPATH": str(copy), "TMPDIR": str(copy / "tmp")}


def check_imported(copy: Path) -> None:
    """The copy is what is imported: where the campaign runs, and where a gateway runs that it
    starts. Raises `Unfit`."""
    ask = "import proof, trio_gateway as t; print(proof.__file__); print(t.__file__)"
    for folder in (copy, copy / "tmp"):
        command = [sys.executable, "-c", ask]
        done = subprocess.run(
            command,
            check=False,
            cwd=folder,
            env=environment(copy),
            capture_output=True,
            text=True,
            timeout=60,
        )
        files = done.stdout.split()
        wanted = [str(copy / name / "__init__.py") for name in ("proof", "trio_gateway")]
        if files != wanted:
            raise Unfit(f"imported {files}, and not {wanted}\n{done.stderr}")


# ----- campaigns


@attrs.define(eq=False)
class Bench:
    """Runs campaigns on copies; knows what they say of the library as it is."""

    root: Path
    where: Path
    patience: float = PATIENCE
    mutants_folder: Path = FOLDER
    _baselines: dict[Asked, Finding] = attrs.field(factory=dict[Asked, Finding], init=False)
    _locks: dict[Asked, threading.Lock] = attrs.field(
        factory=dict[Asked, threading.Lock], init=False
    )
    _running: set[subprocess.Popen[bytes]] = attrs.field(
        factory=set[subprocess.Popen[bytes]], init=False
    )
    _over: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        copy_of(self.root, self.where / "untouched")
        check_imported(self.where / "untouched")

    @property
    def baselines(self) -> tuple[Finding, ...]:
        """What was asked of the library as it is."""
        return tuple(sorted(self._baselines.values(), key=lambda f: ORDER.index(f.campaign)))

    def present(self, campaign: str) -> bool:
        """Whether there is such a campaign."""
        return (self.root / "proof" / f"{campaign.replace('-', '_')}.py").exists()

    def findings(self, mutant: Mutant, campaigns: Sequence[str], *, every: bool) -> list[Finding]:
        """Ask one campaign after the other, until one catches the mutant (or all, if `every`)."""
        copy = copy_of(self.where / "untouched", self.where / mutant.name)
        try:
            apply(mutant, copy)
            check_imported(copy)
            findings: list[Finding] = []
            for name, size in mutant.order:
                if name in campaigns and self.baseline(name, size).outcome is Outcome.PASSED:
                    findings.append(self.ask(name, size, copy))
                    if findings[-1].caught and not every:
                        break
            return findings
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def baseline(self, campaign: str, size: Size) -> Finding:
        """What a campaign says of the library as it is; asked once."""
        asked = campaign, size
        with self._locks.setdefault(asked, threading.Lock()):
            if asked not in self._baselines:
                name = f"as-it-is-{campaign}-{size}"
                copy = copy_of(self.where / "untouched", self.where / name)
                self._baselines[asked] = self.ask(campaign, size, copy)
            return self._baselines[asked]

    def ask(self, campaign: str, size: Size, copy: Path) -> Finding:
        """Run a campaign on a copy."""
        began = time.monotonic()
        out, err = copy / "tmp-out.txt", copy / "tmp-err.txt"
        command = [sys.executable, "-m", "proof", campaign, "--size", size, "--jobs", "1"]
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                cwd=copy,
                env=environment(copy),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            ended = self._wait(process)
        kill_left_behind(copy)
        seconds = round(time.monotonic() - began, 1)
        if not ended:
            what = f"did not end within {self.patience:g} s"
            found = Finding(campaign=campaign, outcome=Outcome.HUNG, what=what)
        else:
            found = _reported(campaign, process.returncode, out, err)
        return attrs.evolve(found, size=size, seconds=seconds)

    def _wait(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait for a campaign; one that hangs is interrupted, then killed. Whether it ended."""
        self._running.add(process)
        try:
            if self._over:
                process.send_signal(signal.SIGINT)
            process.wait(self.patience)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GOODBYE)
            process.kill()
            process.wait()
            return False
        finally:
            self._running.discard(process)
        return True

    def close(self) -> None:
        """Interrupt what runs, and let nothing begin."""
        self._over = True
        for process in list(self._running):
            process.send_signal(signal.SIGINT)


def _reported(campaign: str, code: int, out: Path, err: Path) -> Finding:
    """What a campaign reported, that has ended."""
    lines = out.read_text("utf-8", "replace").splitlines()
    report: dict[str, Any] = {}
    if lines:
        with suppress(ValueError):
            report = json.loads(lines[-1])
    failures = report.get("failures", [])
    if code == 1 and failures and failures[0]["again"]:
        first = failures[0]
        return Finding(
            campaign=campaign, outcome=Outcome.FAILED, again=first["again"], what=first["what"]
        )
    if code == 0 and report.get("skipped"):
        return Finding(campaign=campaign, outcome=Outcome.SKIPPED, what=report["skipped"])
    if code == 0 and report.get("campaign") == campaign:
        return Finding(campaign=campaign, outcome=Outcome.PASSED)
    told = err.read_text("utf-8", "replace")[-4000:]
    return Finding(campaign=campaign, outcome=Outcome.BROKE, what=f"exit code {code}\n{told}")


def kill_left_behind(copy: Path) -> None:
    """Kill the processes that a campaign on this copy has left behind, each by its number: what
    was started with the copy in its environment is ours."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for variable in (entry / "environ").read_bytes().split(b"\0"):
                name, _, value = variable.partition(b"=")
                if name == b"PYTHONPATH" and str(copy).encode() in value.split(b":"):
                    os.kill(int(entry.name), signal.SIGKILL)


# ----- the whole


def told(mutant: Mutant, findings: Sequence[Finding], seconds: float) -> dict[str, Any]:
    """What is said of one mutant."""
    caught = [finding for finding in findings if finding.caught]
    first = caught[0] if caught else Finding(campaign="", outcome=Outcome.PASSED)
    line: dict[str, Any] = {
        "mutant": mutant.name,
        "promise": mutant.promise,
        "breaks": mutant.breaks,
        "caught_by": first.campaign or None,
        "size": str(first.size),
        "what": _in_a_line(first.what),
        "again": first.again,
        "seconds": round(seconds, 1),
        "also_caught_by": [finding.campaign for finding in caught[1:]],
        "not_caught_by": [finding.campaign for finding in findings if not finding.caught],
    }
    if broke := {f.campaign: f.what[-1000:] for f in findings if f.outcome is Outcome.BROKE}:
        line["broke"] = broke
    return line


def _in_a_line(what: str) -> str:
    """The line that says what happened: of a traceback, the one after its frames."""
    lines = [line for line in what.splitlines() if line.strip()] or [""]
    if lines[0].startswith("Traceback"):
        lines = [line for line in lines[1:] if not line[0].isspace()] or lines
    return lines[0][:300]


def try_all(
    bench: Bench,
    mutants: Sequence[Mutant],
    campaigns: Sequence[str],
    say: Callable[[dict[str, Any]], None],
    *,
    jobs: int = 2,
    every: bool = False,
) -> bool:
    """Try every mutant, and say what became of it. Whether all were caught, by campaigns that pass
    on the library as it is."""
    began = time.monotonic()

    def one(mutant: Mutant) -> dict[str, Any]:
        since = time.monotonic()
        try:
            findings = bench.findings(mutant, campaigns, every=every)
        except Unfit as unfit:
            return told(mutant, (), 0.0) | {"what": str(unfit)}
        return told(mutant, findings, time.monotonic() - since)

    lines: list[dict[str, Any]] = []
    with ThreadPoolExecutor(jobs) as pool:
        tries = [pool.submit(one, mutant) for mutant in mutants]
        try:
            for done in as_completed(tries):
                lines.append(done.result())
                say(lines[-1])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            bench.close()
            raise
    summary = _summary(bench, lines, time.monotonic() - began)
    say(summary)
    return not summary["survived"] and not summary["fails_as_it_is"]


def _summary(bench: Bench, lines: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    passed, skipped, failed = {}, {}, {}
    for found in bench.baselines:
        asked = f"{found.campaign} {found.size}"
        if found.outcome is Outcome.PASSED:
            passed[asked] = found.seconds
        elif found.outcome is Outcome.SKIPPED:
            skipped[asked] = found.what
        else:
            failed[asked] = f"{found.outcome}: {found.again} {found.what}"[:2000]
    return {
        "mutants": len(lines),
        "caught": sum(line["caught_by"] is not None for line in lines),
        "survived": sorted(line["mutant"] for line in lines if line["caught_by"] is None),
        "as_it_is": passed,
        "skipped": skipped,
        "fails_as_it_is": failed,
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
    }


def main() -> int:
    """The command line."""
    given = _given()
    mutants = [m for m in all_mutants() if not given.only or m.name in given.only]
    if unknown := set(given.only) - {mutant.name for mutant in mutants}:
        print(f"no such mutant: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        if given.out is not None:
            with given.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")

    memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="mutants-", dir=memory) as where:
        bench = Bench(ROOT, Path(where), given.patience)
        campaigns = [name for name in given.campaigns or ORDER if bench.present(name)]
        caught = try_all(bench, mutants, campaigns, say, jobs=given.jobs, every=given.every)
    return 0 if caught else 1


def _given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m proof.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", default=[], help="this mutant; may be repeated")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at once")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file, too")
    parser.add_argument(
        "--campaigns", nargs="+", choices=ORDER, help="ask these only, not all that there are"
    )
    parser.add_argument(
        "--every", action="store_true", help="ask every campaign, also when one has caught it"
    )
    parser.add_argument(
        "--patience", type=float, default=PATIENCE, help="seconds after which a campaign hangs"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
