"""A store whose files were damaged: bits flip, pages are lost, files are cut or another's.

The boot refuses the file in words that name it, and leaves every byte as it is; or it boots, and
serves what can be read. A file in which nothing was lost is served as if nothing had happened.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Final

import apsw
import trio

from trio_gateway import Message, SessionKey, StoreError

from ._bad_lives import Batch, clear, hosted, in_virtual_time, ours, story
from ._bad_stores import (
    DB,
    LONG_ENOUGH,
    SETTINGS,
    SHM,
    WAL,
    Files,
    Platform,
    agent_of,
    connection,
    content_of,
    ends_in,
    head_of,
    look,
    read_files,
    stores,
    truth,
    write_files,
)

PAGE: Final = 4096

AN_HOUR: Final = 3600.0
"""Virtual seconds for a torn file: what cannot be written is tried again for ever."""


def pages(batch: Batch) -> None:
    """Damaged files, one boot each."""
    for _ in range(batch.size):
        kind = batch.dice.choice(sorted(stores()))
        files = dict(stores()[kind])
        what = f"{kind}: {_damage(files, batch.dice)}"
        try:
            _boot(batch, files, kind)
        except Exception as error:
            raise AssertionError(f"{what}: {story(error)}") from error
    clear(batch.folder)


# ----- what is done to the files


def _damage(files: Files, dice: random.Random) -> str:
    name = WAL if WAL in files and dice.random() < 0.5 else DB
    if dice.random() < 0.02:
        files[SHM] = dice.randbytes(32_768)
    if dice.random() < 0.04:
        return _damage_whole(files, name, dice)
    data = bytearray(files[name])
    told = [
        dice.choice(_DAMAGES)(data, dice) if data else "nothing left"
        for _ in range(dice.choice((1, 1, 1, 2, 5)))
    ]
    files[name] = bytes(data)
    return f"{name}: {', '.join(told)}"


def _damage_whole(files: Files, name: str, dice: random.Random) -> str:
    """What happens to a file as one: it is gone, empty, another's, or of another time."""
    choice = dice.choice(("gone", "empty", "rubbish", "the other's", "of another time"))
    if choice == "gone":
        del files[name]
    elif choice == "empty":
        files[name] = b""
    elif choice == "rubbish":
        files[name] = dice.randbytes(dice.choice((1, 100, 5000, 20_000)))
    elif choice == "the other's":
        files[name] = files.get(WAL if name == DB else DB, b"")
    else:
        files[name] = stores()[dice.choice(sorted(stores()))].get(name, b"")
    return f"{name} is {choice}"


def _somewhere(data: bytearray, dice: random.Random) -> int:
    """A place, more often one that means much: a header, the begin of a page."""
    if dice.random() < 0.2:
        return dice.randrange(min(len(data), 120))
    if dice.random() < 0.4:
        page = dice.randrange(max(len(data) // PAGE, 1)) * PAGE
        return min(page + dice.choice((0, 1, 3, 4, 5, 6, 8, 9, 12, 13)), len(data) - 1)
    return dice.randrange(len(data))


def _flip_bit(data: bytearray, dice: random.Random) -> str:
    at, bit = _somewhere(data, dice), dice.randrange(8)
    data[at] ^= 1 << bit
    return f"bit {bit} of byte {at}"


def _set_byte(data: bytearray, dice: random.Random) -> str:
    at, value = _somewhere(data, dice), dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
    data[at] = value
    return f"byte {at} is {value}"


def _overwrite(data: bytearray, dice: random.Random) -> str:
    at, size = _somewhere(data, dice), dice.choice((2, 4, 16, 100, 512, PAGE))
    filling = dice.choice((b"\0" * size, b"\xff" * size, dice.randbytes(size)))
    end = min(at + size, len(data))
    data[at:end] = filling[: end - at]
    return f"bytes {at} to {end} are {filling[:4].hex()}..."


def _swap_pages(data: bytearray, dice: random.Random) -> str:
    count = max(len(data) // PAGE, 1)
    one, other = (dice.randrange(count) * PAGE for _ in range(2))
    kept = data[one : one + PAGE]
    data[one : one + PAGE] = data[other : other + PAGE]
    if dice.random() < 0.5:
        data[other : other + PAGE] = kept
    return f"page at {one} is the one at {other}"


def _truncate(data: bytearray, dice: random.Random) -> str:
    at = dice.randrange(len(data))
    if dice.random() < 0.5:
        at -= at % PAGE
    del data[at:]
    return f"cut at {at}"


def _append(data: bytearray, dice: random.Random) -> str:
    size = dice.choice((1, 100, PAGE))
    data += dice.choice((b"\0" * size, dice.randbytes(size), bytes(data[:size])))
    return f"{size} bytes more"


_DAMAGES: Final[tuple[Callable[[bytearray, random.Random], str], ...]] = (
    _flip_bit, _flip_bit, _flip_bit, _set_byte, _set_byte, _overwrite, _overwrite, _swap_pages,
    _truncate, _append,
)  # fmt: skip


# ----- what comes of it


def _boot(batch: Batch, files: Files, kind: str) -> None:
    write_files(batch.folder, files)
    state = _look_before(batch.store, kind)
    write_files(batch.folder, files)
    taken: list[str] = []
    refused = _live(batch, taken, AN_HOUR if state == "torn" else LONG_ENOUGH)
    if refused is not None:
        assert state != "unharmed", f"nothing is lost, and yet it was refused: {refused}"
        assert str(batch.store) in str(refused), f"which file? {refused!r}"
        changed = _changed(files, read_files(batch.folder))
        assert not changed, f"{changed} was changed by who refused it: {refused!r}"
        batch.input("refused")
        batch.seen["a damaged file refused, and left as it was"] += 1
        return
    if state != "torn":
        _check_served(batch, taken)
    if state == "unharmed":
        assert ends_in(batch.store).items() >= truth(kind).ends.items(), "something is lost"
    else:
        batch.seen["a boot on a damaged file"] += 1
    batch.input(f"booted, {state}")
    look(batch)


def _look_before(store: Path, kind: str) -> str:
    """What SQLite itself says of the file: `unharmed` if every row is as it was, `changed` if they
    are others but fit together, else `torn`."""
    try:
        with closing(connection(store)) as db:
            if [row[0] for row in db.execute("PRAGMA integrity_check")] != ["ok"]:
                return "torn"
        same = content_of(store) == truth(kind).content and head_of(store) == truth(kind).head
    except (apsw.Error, UnicodeDecodeError):
        return "torn"
    return "unharmed" if same else "changed"


def _changed(before: Files, after: Files) -> list[str]:
    """Which files are others now. The SHM is SQLite's own affair, and an empty file is none."""
    return [name for name in (DB, WAL) if (before.get(name) or b"") != (after.get(name) or b"")]


def _check_served(batch: Batch, taken: Sequence[str]) -> None:
    """In a database that fits together, new messages are taken and reach an end."""
    assert len(taken) == len(_CONTROLS), f"of the healthy messages only {taken} were taken"
    ends = ends_in(batch.store)
    for id in taken:
        _, fate = ends["local", id]
        assert fate not in ("queued", "running"), f"{id} was taken, and stays {fate}"


def _live(batch: Batch, taken: list[str], patience: float) -> StoreError | None:
    """One life: None, or how the store was refused."""
    try:
        in_virtual_time(partial(_life, batch, taken, patience))
    except StoreError as error:
        batch.error(ours(error))
        return error
    return None


_CONTROLS: Final = ("new", "done", "queue")


async def _life(batch: Batch, taken: list[str], patience: float) -> None:
    """Whatever can still be done is done, or refused in words of ours; and it ends."""
    platform = Platform(making=False)
    async with hosted(batch, agent_of(making=False), platform, settings=SETTINGS) as gateway:
        for session in _CONTROLS:
            message = Message(session=session, id=f"control-{session}", text="hi")
            if await _try(batch, partial(gateway.accept, message)):
                taken.append(message.id)
        with trio.move_on_after(patience):
            await gateway.wait_idle()
        for name in ("done", "steps"):
            await _try(batch, partial(gateway.history, SessionKey("local", name)))


async def _try(batch: Batch, call: Callable[[], Awaitable[object]]) -> bool:
    try:
        await call()
    except StoreError as error:
        batch.error(ours(error))
        return False
    return True
