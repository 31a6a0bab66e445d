"""docs/proof.md is what its sources say, and its track record names tests that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from proof import page
from proof.__main__ import NAMES, campaign

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_its_sources_say() -> None:
    assert page.PAGE.read_text("utf-8") == page.page(), "python -m proof.page"


def test_the_track_record_names_tests_that_exist() -> None:
    names = set(
        re.findall(r"def (test_\w+)", "".join(p.read_text() for p in ROOT.rglob("tests/*.py")))
    )
    for bug in tomllib.loads(page.TRACK_RECORD.read_text("utf-8"))["bug"]:
        assert bug["promise"] in page.PROMISES
        assert bug["test"] in names, bug


def test_every_promise_is_attacked() -> None:
    attacked = {promise for name in NAMES for promise in campaign(name).promises}
    assert attacked == set(page.PROMISES)
    assert all(campaign(name).short for name in NAMES)
