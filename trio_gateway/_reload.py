"""Reading the configuration again while a gateway runs: what has changed, and what of it counts.

A file that cannot be used changes nothing. Of one that can, the hot keys count at once; a cold one
is told, with its old and its new value, until a restart has read it. The command line and the
environment of the start are kept: they win over the file, as they did then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import attrs

from ._config import (
    COLD,
    DEFAULT_FILE,
    HOT,
    Config,
    Given,
    LogLevel,
    Sections,
    as_toml,
    keys,
    load_config,
    value_of,
)


@attrs.frozen
class Change:
    """A key whose value is another now. Values are as `gateway.toml` says them."""

    key: str
    before: str
    after: str
    why: str | None = None
    """Why it needs a restart; None: it counts already."""

    def __str__(self) -> str:
        told = f"{self.key}: {self.before} -> {self.after}"
        return told if self.why is None else f"{told} needs a restart ({self.why})"


@attrs.frozen
class Reloaded:
    """What reading it again came to: the configuration that counts from now on, and the changes."""

    told: Config
    hot: tuple[Change, ...]
    cold: tuple[Change, ...]


def compare(running: Config, read: Config) -> Reloaded:
    """What changes in a gateway that runs as `running` where `read` is what stands there now."""
    changed = [key for key in keys() if _differs(running.sections, read.sections, key)]
    hot = tuple(_change(running, read, key) for key in changed if key in HOT)
    cold = tuple(_change(running, read, key) for key in changed if key not in HOT)
    sections = running.sections
    for change in hot:
        sections = _with(sections, change.key, value_of(read.sections, change.key))
    origins = {
        key: origin
        for source, wanted in ((running.origins, False), (read.origins, True))
        for key, origin in source.items()
        if (key in HOT) is wanted
    }
    return Reloaded(Config(sections, MappingProxyType(origins), running.file), hot, cold)


def _differs(running: Sections, read: Sections, key: str) -> bool:
    return value_of(running, key) != value_of(read, key) and not _goes_with_channel(
        running, read, key
    )


def _goes_with_channel(running: Sections, read: Sections, key: str) -> bool:
    """Whether a key only comes or goes together with its channel, which is told itself."""
    if key.count(".") < 2:
        return False
    channel = key.rpartition(".")[0]
    return value_of(running, channel) != value_of(read, channel)


def _change(running: Config, read: Config, key: str) -> Change:
    before, after = (as_toml(value_of(told.sections, key)) for told in (running, read))
    return Change(key, before, after, COLD.get(key))


def _with(sections: Sections, key: str, value: object) -> Sections:
    section, _, name = key.partition(".")
    return attrs.evolve(
        sections, **{section: attrs.evolve(getattr(sections, section), **{name: value})}
    )


def level_in(told: Config) -> LogLevel:
    """The level that a configuration gives the log."""
    return told.sections.log.level


class Reloader:
    """Reads the configuration again as the start has read it."""

    def __init__(
        self,
        told: Config,
        environ: Mapping[str, str],
        options: Sequence[Given] = (),
        level: Callable[[Config], LogLevel] = level_in,
    ) -> None:
        self.level = level
        """From which level on the log tells something."""
        self.told = told
        """What counts now."""
        self.pending: tuple[Change, ...] = ()
        """What a restart would change."""
        # An agent may set variables, and go elsewhere; neither is what the start has read.
        self._environ = dict(environ)
        self._options = tuple(options)
        self._file = None if told.file is None else told.file.absolute()
        self._folder = Path.cwd()

    def read(self) -> Config:
        """What stands there now. Takes as long as the disk does. Raises `ConfigError`."""
        default = self._folder / DEFAULT_FILE
        file = self._file or (default if default.exists() else None)
        return load_config(file, self._environ, self._options)

    def apply(self, read: Config, use: Callable[[Config], None]) -> Reloaded:
        """Let `use` take what counts at once; what it raises changes nothing."""
        reloaded = compare(self.told, read)
        use(reloaded.told)
        self.told, self.pending = reloaded.told, reloaded.cold
        return reloaded
