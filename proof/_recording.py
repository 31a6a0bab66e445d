"""What went to a disk, in order, and every disk that the power could have left of it.

A write is safe once its file was synced; a name in the folder, once the folder was. Of what is not
safe yet, any part may have come to the disk when the power goes, in any order: all of a write, none
of it, some of its sectors, half a sector. A file may have grown without its data, and where data is
missing, there may be zeros or rubbish.

    Recording    what was done, with what was promised meanwhile, as one list
    Medium       the disk after so many entries of it: what is safe, what is not
    Medium.cut   one disk that the power leaves

A cut is drawn by dice: the same dice draw the same disk.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import attrs

SECTOR: Final = 512

Files: TypeAlias = dict[str, bytes]
"""A folder: names and contents."""


class Op(NamedTuple):
    """Something that a disk did to one file.

    open, delete (`at`: the folder is synced, too), write, truncate (to `at`), sync (`at`: the
    folder is synced, too), lose (a sync that failed: what it was to save never will be).
    """

    what: str
    file: str
    at: int = 0
    data: bytes = b""


class Commit(NamedTuple):
    """A commit begins, or has returned."""

    done: bool


class Promise(NamedTuple):
    """Somebody was told that something is on disk."""

    what: str
    about: tuple[Any, ...]


class Outside(NamedTuple):
    """So long are the files in which the world outside is noted."""

    lengths: tuple[int, ...]


Entry: TypeAlias = Op | Commit | Promise | Outside


@attrs.define
class Recording:
    """All of it, in order. `outside`: the files in which the world outside is noted; how long they
    are is looked up before each entry."""

    outside: tuple[Path, ...] = ()
    entries: list[Entry] = attrs.field(factory=list[Entry])
    lengths: tuple[int, ...] = ()
    """How long those files were at the last entry."""

    def add(self, entry: Entry) -> None:
        """Write an entry down."""
        lengths = tuple(path.stat().st_size if path.exists() else 0 for path in self.outside)
        if lengths != self.lengths:
            self.lengths = lengths
            self.entries.append(Outside(lengths))
        self.entries.append(entry)

    def tap(self, moment: str) -> None:
        """Called by a store around its commits."""
        self.add(Commit(moment == "after"))

    def promise(self, what: str, *about: Any) -> None:
        """Somebody has just been told."""
        self.add(Promise(what, about))

    def upto(self, count: int) -> Recording:
        """The first so many entries: what there is when the process is killed then."""
        entries = self.entries[:count]
        told = [entry.lengths for entry in entries if isinstance(entry, Outside)]
        return Recording(self.outside, entries, told[-1] if told else (0,) * len(self.outside))


# ----- a store's files

_SUFFIXES: Final = ("", "-wal", "-journal")


def read_files(store: Path) -> Files:
    """The files of a store, as they are."""
    paths = [store.with_name(store.name + suffix) for suffix in _SUFFIXES]
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def write_files(store: Path, files: Files) -> None:
    """Put these in the place of a store's files. The WAL's index, which is of no disk, goes."""
    for suffix in (*_SUFFIXES, "-shm"):
        path = store.with_name(store.name + suffix)
        path.unlink(missing_ok=True)
        if path.name in files:
            path.write_bytes(files[path.name])


# ----- a disk in the middle of its work


@attrs.define
class _Inode:
    safe: bytearray = attrs.field(factory=bytearray)
    loose: list[Op] = attrs.field(factory=list[Op])


@attrs.define
class Medium:
    """What is safe on the disk, and what is not yet."""

    _inodes: list[_Inode] = attrs.field(factory=list[_Inode])
    _names: dict[str, int] = attrs.field(factory=dict[str, int])
    """The folder as the processes see it."""
    _has_lost: bool = False
    _safe_names: dict[str, int] = attrs.field(factory=dict[str, int])
    _loose_names: list[tuple[str, int | None]] = attrs.field(factory=list[tuple[str, "int | None"]])

    @classmethod
    def with_files(cls, files: Files) -> Medium:
        """A disk on which these are safe."""
        medium = cls()
        for name, content in files.items():
            medium._names[name] = len(medium._inodes)
            medium._inodes.append(_Inode(bytearray(content)))
        medium._sync_folder()
        return medium

    @property
    def loose(self) -> int:
        """How many things are not safe."""
        inodes = {*self._names.values(), *self._safe_names.values()}
        return len(self._loose_names) + sum(len(self._inodes[i].loose) for i in inodes)

    def do(self, op: Op) -> None:
        """Go on by one operation."""
        if op.what == "open":
            if op.file not in self._names:
                self._inodes.append(_Inode())
                self._names[op.file] = len(self._inodes) - 1
                self._loose_names.append((op.file, len(self._inodes) - 1))
        elif op.what == "delete":
            del self._names[op.file]
            self._loose_names.append((op.file, None))
            if op.at:
                self._sync_folder()
        else:
            self._do_to_file(self._inodes[self._names[op.file]], op)

    def _do_to_file(self, inode: _Inode, op: Op) -> None:
        if op.what in ("write", "truncate"):
            inode.loose.append(op)
            return
        if op.what == "sync":
            for loose in inode.loose:
                put(inode.safe, loose)
            if op.at:
                self._sync_folder()
        else:
            self._has_lost = True
        inode.loose = []

    def _sync_folder(self) -> None:
        self._loose_names = []
        self._safe_names = dict(self._names)

    # ----- without power

    def cut(self, luck: Luck) -> Files:
        """One folder that is left when the power goes now."""
        names = dict(self._safe_names)
        for name, inode in self._loose_names:
            if luck.survives():
                if inode is None:
                    names.pop(name, None)
                else:
                    names[name] = inode
        return {name: luck.draw(self._inodes[i].safe, self._inodes[i].loose)
                for name, i in sorted(names.items())}  # fmt: skip

    def kill(self) -> Files:
        """The folder that the next process finds when only the process dies."""
        assert not self._has_lost, "what is lost without power is still seen with it"
        return {name: _all_of(self._inodes[i]) for name, i in self._names.items()}


def _all_of(inode: _Inode) -> bytes:
    content = bytearray(inode.safe)
    for op in inode.loose:
        put(content, op)
    return bytes(content)


def put(content: bytearray, op: Op) -> None:
    """Do a write or a truncation to a file's content."""
    if op.what == "truncate":
        _stretch(content, op.at)
        del content[op.at :]
    else:
        _stretch(content, op.at)
        content[op.at : op.at + len(op.data)] = op.data


def _stretch(content: bytearray, size: int) -> None:
    content.extend(bytes(max(0, size - len(content))))


# ----- what comes to the disk and what does not


@attrs.define
class Luck:
    """Says of each loose thing what becomes of it. `kept` is how likely it is to survive, `torn`
    how likely a write is to survive in part. `odd` is the number (from 0) of the one thing to which
    the opposite happens.

    `kinds` has in the end what it drew: "torn" (a write in part), "torn inside" (a sector in part),
    "grown" (a size without its data), "rubbish" (where data is missing).
    """

    dice: random.Random
    kept: float
    torn: float = 0.0
    odd: int = -1
    kinds: set[str] = attrs.field(factory=set[str])
    _asked: int = 0

    def survives(self) -> bool:
        """Whether the next thing survives as a whole."""
        odd = self._asked == self.odd
        self._asked += 1
        return (self.dice.random() < self.kept) != odd

    def draw(self, safe: bytearray, loose: Sequence[Op]) -> bytes:
        """What is left of one file."""
        if not loose:
            return bytes(safe)
        content = bytearray(safe)
        largest = len(safe)
        for op in loose:
            largest = max(largest, op.at + len(op.data))
            if op.what == "truncate":
                if self.survives():
                    put(content, op)
            else:
                self._write(content, op)
        self._grow(content, largest)
        return bytes(content)

    def _write(self, content: bytearray, op: Op) -> None:
        if self.torn and self.dice.random() < self.torn:
            for part in _sectors(op):
                if self.dice.random() < 0.5:
                    put(content, self._perhaps_cut(part))
            self.kinds.add("torn")
        elif self.survives():
            put(content, op)

    def _perhaps_cut(self, part: Op) -> Op:
        if self.dice.random() > 0.1:
            return part
        self.kinds.add("torn inside")
        cut = self.dice.randrange(len(part.data))
        if self.dice.random() < 0.5:
            return part._replace(data=part.data[:cut])
        return part._replace(at=part.at + cut, data=part.data[cut:])

    def _grow(self, content: bytearray, largest: int) -> None:
        """Let the size be that of writes whose data did not come."""
        before = len(content)
        if not self.torn or before >= largest or self.dice.random() < 0.5:
            return
        self.kinds.add("grown")
        _stretch(content, self.dice.choice((largest, self.dice.randint(before, largest))))
        if self.dice.random() < 0.5:
            self.kinds.add("rubbish")
            content[before:] = self.dice.randbytes(len(content) - before)


def _sectors(op: Op) -> Iterator[Op]:
    """A write, cut where the disk's sectors end."""
    at = op.at
    end = op.at + len(op.data)
    while at < end:
        to = min(end, (at // SECTOR + 1) * SECTOR)
        yield Op("write", op.file, at, op.data[at - op.at : to - op.at])
        at = to
