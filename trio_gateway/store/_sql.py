"""Reads the `.sql` files: each statement by its name."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Final

_NAMED: Final = re.compile(r"^-- name: (\w+)\n((?:--.*\n)+)((?:(?!--).*\n?)+)", re.MULTILINE)


def parse_queries(text: str) -> dict[str, tuple[str, str]]:
    """Name → (its sentence, its statement), from text where `-- name: x` begins each."""
    found = {
        name: (comment.replace("--", "").strip(), statement.strip().rstrip(";"))
        for name, comment, statement in _NAMED.findall(text)
    }
    if len(found) != text.count("-- name: "):
        raise ValueError("a query lacks its sentence, or two share a name")
    return found


def read_sql(name: str) -> str:
    """The text of a `.sql` file of this package."""
    return files(__name__.rpartition(".")[0]).joinpath(name).read_text("utf-8")


_QUERIES: Final = parse_queries(read_sql("queries.sql"))


def query(name: str) -> str:
    """The statement called `name` in queries.sql."""
    return _QUERIES[name][1]
