"""Writes docs/proof.md: what was injected, how often, what was found.

    python -m proof.page            write it
    python -m proof.page --check    exit code 1 unless it is what would be written

Nothing on that page is typed by hand: the figures come from the JSON lines in `results` (what
`python -m proof ... --out` and `python -m proof.mutants --out` have printed), what a campaign
injects comes from the campaign, and the track record from `track_record.toml`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from .__main__ import NAMES, campaign
from ._report import Campaign, Size

FOLDER: Final = Path(__file__).resolve().parent
PAGE: Final = FOLDER.parent / "docs" / "proof.md"
RESULTS: Final = FOLDER / "results"
TRACK_RECORD: Final = FOLDER / "track_record.toml"

PROMISES: Final = {
    1: "Accepted is kept",
    2: "In order, one at a time",
    3: "Marker before work",
    4: "Markers first",
    5: "Exactly the interrupted",
    6: "Settled is one transaction",
    7: "Replies are not lost",
    8: "Effects are not repeated silently",
    9: "A planned stop is nobody's failure",
    10: "Stopped is stopped",
    11: "Bounded",
    12: "The door to the inbox stays open",
    13: "Whoever asks for a restart is not its victim",
    14: "Bad input costs one error",
}

Line = dict[str, Any]
"""What one run of a campaign has printed."""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m proof.page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, say whether it is so")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, "utf-8")
    elif PAGE.read_text("utf-8") != text:
        print(f"{PAGE.name} is not what its sources say: python -m proof.page", file=sys.stderr)
        return 1
    return 0


def page() -> str:
    """The whole page."""
    runs = list(newest_runs())
    return (
        "\n\n".join([*_intro(), *_promises(runs), *_campaigns(runs), *_mutants(), *_rest()]) + "\n"
    )


def newest_runs() -> Iterator[Line]:
    """The newest line of each campaign in each size, in the order of the campaigns."""
    found: dict[tuple[str, str], Line] = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in read_lines(path):
            if "campaign" in line and not line.get("only"):
                place = line["campaign"], line["size"]
                if not line["skipped"] or place not in found:
                    found[place] = line
    for name in NAMES:
        for size in Size:
            if (name, size) in found:
                yield found[name, size]


def read_lines(path: Path) -> Iterator[Line]:
    """The JSON lines of a file."""
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            yield json.loads(line)


# ----- the parts


def _intro() -> Iterator[str]:
    yield "# The proof"
    yield (
        "What the [README](../README.md) promises, attacked: every fault that could be injected,"
        " how often it was, and what was found. This page is written by `python -m proof.page`"
        " from what the campaigns printed; nothing on it is typed by hand."
    )
    yield (
        "    python -m proof list               what there is\n"
        "    python -m proof lives              one campaign, in its size `ci`\n"
        "    python -m proof lives --only 17    one point of it, as a failure names it\n"
        "    nox -s proof                       what CI runs: four of them in size `quick`\n"
        "    nox -s proof-long                  the rest, and all in the size for a long run\n"
        "    nox -s mutants                     the deliberate breaks, and who catches them"
    )


def _promises(runs: Iterable[Line]) -> Iterator[str]:
    yield "## Promise by promise"
    yield (
        "*Injected* adds up the newest runs of each size; *broken* is what those runs found broken."
        " What was found on the way, and mended, is in the track record below."
    )
    rows: list[list[str]] = []
    for number, promise in PROMISES.items():
        mine = [run for run in runs if number in campaign(run["campaign"]).promises]
        names = list(dict.fromkeys(run["campaign"] for run in mine))
        for place, name in enumerate(names):
            its = [run for run in mine if run["campaign"] == name]
            told = campaign(name)
            rows.append(
                [
                    f"{number}. {promise}" if not place else "",
                    told.short,
                    f"{sum(_injected(run, told) for run in its):,}",
                    str(sum(len(run["failures"]) for run in its)),
                    f"`python -m proof {name}`",
                ]
            )
    yield _table(["promise", "injected", "times", "broken", "command"], rows)


def _injected(run: Line, told: Campaign) -> int:
    return int(run["figures"].get(told.counted, 0))


def _campaigns(runs: Iterable[Line]) -> Iterator[str]:
    yield "## The campaigns"
    for name in NAMES:
        told = campaign(name)
        mine = [run for run in runs if run["campaign"] == name]
        yield f"### {name}"
        yield f"Injects {told.injects}. Holds the gateway to promises {_list(told.promises)}."
        if not mine:
            yield "No run of it is on record."
            continue
        yield _table(
            ["size", "result", "figures", "minutes", "with"],
            [
                [
                    run["size"],
                    _result(run),
                    _figures(run["figures"], told.counted),
                    f"{run['seconds'] / 60:.1f}",
                    _with(run),
                ]
                for run in mine
            ],
        )
        if seen := {state for run in mine for state in run["seen"]}:
            yield "Came through: " + ", ".join(sorted(seen)) + "."


def _with(run: Line) -> str:
    return f"Python {run['python']}, Trio {run['trio']}, SQLite {run['sqlite']}"


def _result(run: Line) -> str:
    if run["skipped"]:
        return f"skipped: {run['skipped']}"
    return f"**{len(run['failures'])} failures**" if run["failures"] else "nothing broken"


def _figures(figures: Mapping[str, int], first: str) -> str:
    names = [first, *(name for name in figures if name != first)]
    shown = [f"{figures[name]:,} {name.replace('_', ' ')}" for name in names if name in figures]
    return ", ".join(shown)


def _mutants() -> Iterator[str]:
    yield "## The mutants"
    patches = {path.stem for path in (FOLDER / "mutants").glob("*.patch")}
    newest = {line.get("mutant"): line for line in read_lines(RESULTS / "mutants.jsonl")}
    lines = [line for name, line in newest.items() if name in patches]
    caught = [line for line in lines if line["caught_by"]]
    yield (
        "Whether the campaigns have teeth: each of these patches is one deliberate break of the"
        " library. It is applied to a copy, and the campaigns are run on that copy, one after"
        " the other, in their quick size unless the patch names another, until one notices. There"
        f" are {len(patches)}; the run on record"
        f" tried {len(lines)} of them, and {len(caught)} were caught."
    )
    yield _table(
        ["promise", "what is broken", "caught by", "what it said", "seconds"],
        [
            [
                str(line["promise"]),
                line["breaks"],
                f"`{line['caught_by']}`" if line["caught_by"] else "**nobody**",
                _short(line["what"]),
                f"{line['seconds']:.0f}",
            ]
            for line in sorted(lines, key=lambda line: (line["promise"], line["mutant"]))
        ],
    )


def _short(text: str, most: int = 110) -> str:
    line = text.strip().partition("\n")[0].replace("|", "\\|").replace("`", "'")
    return line if len(line) <= most else line[: most - 1] + "…"


def _rest() -> Iterator[str]:
    record = tomllib.loads(TRACK_RECORD.read_text("utf-8"))
    yield "## What this cannot show"
    yield "\n".join(f"- {limit}" for limit in record["limits"])
    yield "## Track record"
    yield (
        "Every bug that was found, by which campaign or by whom, and the line that repeats it on"
        " the code of that time. Each has a test now."
    )
    yield _table(
        ["promise", "what was wrong", "found by", "repeated by", "test"],
        [
            [
                str(bug["promise"]),
                bug["what"],
                bug["found_by"],
                f"`{bug['again']}`" if bug.get("again") else "",
                f"`{bug['test']}`" if bug.get("test") else "",
            ]
            for bug in record["bug"]
        ],
    )


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
