"""Mutants: every patch still fits and still runs, and the runner tells caught from survived."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import pytest

from proof import mutants
from proof.__main__ import NAMES
from proof._platform import wait_until
from proof._report import Size
from proof.mutants import Bench, Mutant, Outcome, Unfit

pytestmark = pytest.mark.skipif(
    shutil.which("patch") is None, reason="patch is not installed; apt install patch"
)

ALL: Final = mutants.all_mutants()

CAMPAIGN: Final = """
import json, os, sys, time, trio_gateway
name = sys.argv[1]
WHAT = "Traceback (most recent call last):\\n  File 1\\nAssertionError: bad\\na note"
if trio_gateway.MOOD == "slow":
    time.sleep(600)
if trio_gateway.MOOD == "odd":
    raise SystemExit(7)
failures = []
if trio_gateway.MOOD == "bad" and name == "machine":
    failures = [{"again": "python -m proof machine --only 3", "what": WHAT}]
skipped = "no disk here" if name == "disk" else None
print(json.dumps({"campaign": name, "failures": failures, "skipped": skipped}))
sys.exit(bool(failures))
"""
"""A proof of three campaigns, of which one looks at the mood of the library."""


# ----- the patches


def test_there_are_mutants_for_every_promise() -> None:
    assert len(ALL) >= 28
    assert {mutant.promise for mutant in ALL} == set(range(1, 15))


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_patch_fits_at_one_place_only_and_leaves_python_behind(
    mutant: Mutant, tmp_path: Path
) -> None:
    for file, before in hunks(mutant.patch):
        copy = tmp_path / file
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(mutants.ROOT / file, copy)
        assert copy.read_text().count(before) == 1, f"{file} has it not once:\n{before}"
    mutants.apply(mutant, tmp_path)
    for path in tmp_path.rglob("*.py"):
        compile(path.read_bytes(), path, "exec", dont_inherit=True)


def hunks(patch: Path) -> list[tuple[str, str]]:
    """The file of each hunk, and the text that it replaces."""
    found: list[tuple[str, str]] = []
    file = ""
    for line in patch.read_text().splitlines(keepends=True):
        if line.startswith("--- a/"):
            file = line[6:].strip()
        elif line.startswith("@@"):
            found.append((file, ""))
        elif line[0] in " -" and found and not line.startswith("---"):
            found[-1] = (file, found[-1][1] + line[1:])
    return found


# ----- the runner


def test_every_campaign_is_asked() -> None:
    assert sorted(mutants.ORDER) == sorted(NAMES)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A library with a mood, and a proof that looks at it."""
    for name, text in {
        "trio_gateway/__init__.py": 'MOOD = "good"\n',
        "proof/__init__.py": "",
        "proof/__main__.py": CAMPAIGN,
        "proof/lives.py": "",
        "proof/machine.py": "",
        "proof/disk.py": "",
    }.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "root"


def mood(tmp_path: Path, mood: str, old: str = "good", head: str = "") -> Mutant:
    """A mutant that gives the library another mood."""
    path = tmp_path / f"{mood}.patch"
    path.write_text(
        f"Breaks: The mood.\nPromise: 3\n{head}\n--- a/trio_gateway/__init__.py\n"
        f'+++ b/trio_gateway/__init__.py\n@@ -1 +1 @@\n-MOOD = "{old}"\n+MOOD = "{mood}"\n'
    )
    return mutants.read_mutant(path)


def tried(root: Path, where: Path, *given: Mutant, **options: Any) -> list[dict[str, Any]]:
    """What is said of these mutants."""
    where.mkdir()
    lines: list[dict[str, Any]] = []
    bench = Bench(root, where, patience=3.0)
    campaigns = [name for name in mutants.ORDER if bench.present(name)]
    caught = mutants.try_all(bench, given, campaigns, lines.append, **options)
    assert caught == (not lines[-1]["survived"] and not lines[-1]["fails_as_it_is"])
    return lines


def test_a_mutant_is_caught_by_the_first_campaign_that_fails(root: Path, tmp_path: Path) -> None:
    line, summary = tried(root, tmp_path / "where", mood(tmp_path, "bad"))
    assert line["caught_by"] == "machine"
    assert line["not_caught_by"] == ["lives"]
    assert line["again"] == "python -m proof machine --only 3"
    assert line["what"] == "AssertionError: bad"
    assert summary["caught"] == 1
    assert summary["skipped"] == {}, "a campaign was asked after another had caught it"


def test_the_campaign_that_is_named_is_asked_first(root: Path, tmp_path: Path) -> None:
    mutant = mood(tmp_path, "bad", head="Caught-by: machine\n")
    line, _ = tried(root, tmp_path / "where", mutant)
    assert (line["caught_by"], line["not_caught_by"]) == ("machine", [])


def test_the_campaign_that_is_named_is_asked_in_the_size_that_is_named(
    root: Path, tmp_path: Path
) -> None:
    campaign = CAMPAIGN.replace('name == "machine"', 'sys.argv[3] == "ci"')
    (root / "proof/__main__.py").write_text(campaign)
    mutant = mood(tmp_path, "bad", head="Caught-by: machine\nSize: ci\n")
    line, summary = tried(root, tmp_path / "where", mutant)
    assert (line["caught_by"], line["size"]) == ("machine", "ci")
    assert summary["as_it_is"].keys() == {"machine ci"}


def test_a_mutant_that_nobody_catches_survives(root: Path, tmp_path: Path) -> None:
    line, summary = tried(root, tmp_path / "where", mood(tmp_path, "fair"))
    assert (line["caught_by"], line["not_caught_by"]) == (None, ["lives", "machine"])
    assert summary["survived"] == ["fair"]
    assert summary["skipped"] == {"disk quick": "no disk here"}


def test_a_campaign_that_falls_over_has_caught_nothing(root: Path, tmp_path: Path) -> None:
    line, summary = tried(root, tmp_path / "where", mood(tmp_path, "odd"))
    assert "exit code 7" in line["broke"]["machine"]
    assert summary["survived"] == ["odd"]


def test_a_campaign_that_hangs_has_caught_it(root: Path, tmp_path: Path) -> None:
    line, _ = tried(root, tmp_path / "where", mood(tmp_path, "slow"))
    assert line["caught_by"] == "lives"
    assert line["what"] == "did not end within 3 s"


def test_all_campaigns_are_asked_if_wanted(root: Path, tmp_path: Path) -> None:
    mutant = mood(tmp_path, "bad", head="Caught-by: machine\n")
    line, _ = tried(root, tmp_path / "where", mutant, every=True)
    assert (line["caught_by"], line["not_caught_by"]) == ("machine", ["lives"])


def test_a_campaign_that_fails_on_the_library_as_it_is_is_not_asked(
    root: Path, tmp_path: Path
) -> None:
    (root / "trio_gateway/__init__.py").write_text('MOOD = "bad"\n')
    line, summary = tried(root, tmp_path / "where", mood(tmp_path, "worse", old="bad"))
    assert line["not_caught_by"] == ["lives"], "machine was asked"
    assert summary["fails_as_it_is"].keys() == {"machine quick"}


def test_a_patch_that_does_not_fit_any_more_is_told(root: Path, tmp_path: Path) -> None:
    line, summary = tried(root, tmp_path / "where", mood(tmp_path, "worse", old="dark"))
    assert "worse.patch does not apply any more" in line["what"]
    assert summary["survived"] == ["worse"]


def test_a_patch_without_its_head_is_told(tmp_path: Path) -> None:
    path = tmp_path / "dumb.patch"
    path.write_text("Breaks: The mood.\n--- a/x\n")
    with pytest.raises(Unfit, match=r"dumb\.patch: its first lines lack or garble 'Promise'"):
        mutants.read_mutant(path)


def test_another_library_than_the_copy_is_told(root: Path, tmp_path: Path) -> None:
    copy = mutants.copy_of(root, tmp_path / "copy")
    mutants.check_imported(copy)
    (copy / "trio_gateway/__init__.py").unlink()
    with pytest.raises(Unfit, match="imported"):
        mutants.check_imported(copy)


def test_a_process_that_was_left_behind_is_killed(root: Path, tmp_path: Path) -> None:
    (root / "proof/__main__.py").write_text(
        "import subprocess, sys\n"
        'left = subprocess.Popen(["sleep", "600"], start_new_session=True)\n'
        'open("left.txt", "w").write(str(left.pid))\n'
    )
    copy = mutants.copy_of(root, tmp_path / "copy")
    (tmp_path / "where").mkdir()
    found = Bench(root, tmp_path / "where").ask("lives", Size.QUICK, copy)
    assert found.outcome is Outcome.BROKE, "it reported nothing"
    left = Path("/proc", (copy / "left.txt").read_text())
    wait_until(lambda: not is_alive(left), "the death of what was left behind", patience=10)


def is_alive(process: Path) -> bool:
    """Whether it is more than an entry that nobody has collected."""
    try:
        return (process / "stat").read_text().split()[2] != "Z"
    except OSError:
        return False
