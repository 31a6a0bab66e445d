"""Values as JSON, one way for the command line and for HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, cast

import attrs

from ._messages import SessionKey


def jsonable(value: object) -> Any:
    """`value` in JSON's own types: session keys as `channel:name`, times as ISO 8601 in UTC."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    if isinstance(value, SessionKey | Path):
        return str(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {str(name): jsonable(inner) for name, inner in items}
    if isinstance(value, Sequence):
        return [jsonable(one) for one in cast("Sequence[object]", value)]
    return jsonable(attrs.asdict(cast("attrs.AttrsInstance", value), recurse=False))
