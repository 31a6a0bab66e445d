"""Scenarios of a machine that has too little: disk, file descriptors, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGABRT, SIGKILL, SIGSEGV, SIGUSR2

from ._limits import SmallDisk, fds, limit, memory_group, small_disk, status_of, under, unlimit
from ._platform import PATIENCE, Platform, open_turns, rows
from ._process import Process, started
from ._scene import Scene

# ----- a disk


class DiskPlatform(Platform):
    """Its store is on a disk of its own; what the campaign itself writes is not."""

    @property
    def store(self) -> Path:
        return self.folder / "disk" / "gateway.db"


@contextmanager
def disk_of(scene: Scene) -> Generator[SmallDisk]:
    """The disk of the scene's store, and all that is left of it is looked at before it goes."""
    scene.platform = DiskPlatform(scene.folder, scene.dice)
    with small_disk(scene.folder / "disk", 6) as disk:
        yield disk


def full_in_load(scene: Scene) -> None:
    """The disk fills under load: what cannot be kept is said, what was kept is answered once there
    is room, and the process never leaves."""
    with disk_of(scene) as disk:
        with started(scene.platform) as gateway:
            scene.feed(gateway, 40)
            scene.platform.wait_answered()
            begun = len(scene.platform.sent)
            scene.open_long_turns(gateway, 5, f"sleep {scene.dice.random():.2f}")
            disk.fill()
            _until_refused(scene, gateway, "the disk is full")
            gateway.wait_log("settle_delayed")
            gateway.wait_log('"operation": "accept"')
            assert len(scene.platform.finals) == begun, "answered what could not be kept"
            disk.make_room()
            _all_goes_on(scene, gateway)
        scene.finish()


def _until_refused(scene: Scene, gateway: Process, why: str) -> None:
    """Send until a message is refused for that reason."""
    since = len(scene.platform.events)
    deadline = time.monotonic() + PATIENCE
    while not scene.heard("error", why, since):
        assert time.monotonic() < deadline, f"nothing was refused because {why}\n{gateway.story}"
        scene.feed(gateway, 1, apart=True)
        time.sleep(0.02)
    scene.seen.append("a write that found no room")


def _all_goes_on(scene: Scene, gateway: Process) -> None:
    """With everything back, the same process answers everything, and stops in order."""
    gateway.send(*scene.platform.again(0.0))
    scene.platform.wait_answered()
    assert gateway.alive, "the process left"
    assert gateway.stop() == 0, gateway.story


def full_at_marking(scene: Scene) -> None:
    """The disk is full when a stop wants to mark: that is said, the stop ends in time, and what was
    open resumes all the same. Now and then there is room by the time it tries once more."""
    with disk_of(scene) as disk:
        with started(scene.platform) as gateway:
            scene.feed(gateway, 20)
            scene.open_long_turns(gateway, 10)
            scene.platform.wait_accepted()
            disk.fill()
            began = time.monotonic()
            assert gateway.stop() == 0, gateway.story
            assert time.monotonic() - began < 4, "longer than its budget"
            assert "marking_failed" in gateway.log(), gateway.story
            how = "shutdown" if "turns_marked" in gateway.log() else "crash"
            scene.seen.append("a marking that found no room")
        assert len(open_turns(scene.platform.store)) >= 10
        disk.make_room()
        scene.finish()
    assert scene.figures[f"resumed_{how}"] >= 10, scene.figures


def full_at_boot(scene: Scene) -> None:
    """No start is possible on a full disk; each says why, and none is held against a turn."""
    with disk_of(scene) as disk:
        with started(scene.platform) as gateway:
            scene.feed(gateway, 20)
            scene.open_long_turns(gateway, 10)
            gateway.kill()
        open_before = open_turns(scene.platform.store)
        disk.fill()
        for _ in range(3):
            with started(scene.platform) as gateway:
                scene.feed(gateway, 1, apart=True)
                assert gateway.wait() == 1, gateway.story
                assert "full" in gateway.log(), gateway.story
                assert "Traceback" not in gateway.log(), gateway.story
            scene.seen.append("a start on a full disk")
        assert open_turns(scene.platform.store) == open_before
        disk.make_room()
        scene.finish()
        _charged_once(scene)


def full_from_the_beginning(scene: Scene) -> None:
    """A disk without a byte of room, and no store yet: no start, and no half-made store that would
    be in the way of the next one."""
    with disk_of(scene) as disk:
        disk.fill()
        for _ in range(2):
            with started(scene.platform) as gateway:
                scene.feed(gateway, 1)
                assert gateway.wait() == 1, gateway.story
                assert "trio-gateway: " in gateway.log(), gateway.story
                assert "Traceback" not in gateway.log(), gateway.story
        disk.make_room()
        scene.finish()


def full_log(scene: Scene) -> None:
    """The log goes to the disk that is full, too: what it could not tell is counted, once there is
    room for that, and nothing waits for it."""
    with disk_of(scene) as disk:
        (scene.folder / "log.txt").symlink_to(disk.where / "log.txt")
        with started(scene.platform) as gateway:
            scene.feed(gateway, 40)
            scene.platform.wait_answered()
            disk.fill()
            for _ in range(50):  # each is told, which is more than is left of a page
                _until_refused(scene, gateway, "the disk is full")
            disk.make_room()
            _all_goes_on(scene, gateway)
            for event in ("log_dropped", "stop_requested", "drain_report"):
                assert event in gateway.log(), f"no {event} in the log: {gateway.story}"
            scene.seen.append("a log that found no room")
        scene.finish()


def no_more_bytes(scene: Scene) -> None:
    """No file may grow any more (a quota, `ulimit -f`): the same as a full disk, but that SQLite
    takes it for a disk that fails."""
    with started(scene.platform) as gateway:
        scene.feed(gateway, 40)
        scene.platform.wait_answered()
        scene.open_long_turns(gateway, 5, f"sleep {scene.dice.random():.2f}")
        wal = scene.platform.store.with_name("gateway.db-wal").stat().st_size
        limit(gateway.pid, resource.RLIMIT_FSIZE, wal + 1)
        _until_refused(scene, gateway, "the disk failed")
        gateway.wait_log("settle_delayed")
        unlimit(gateway.pid, resource.RLIMIT_FSIZE)
        _all_goes_on(scene, gateway)
    scene.finish()


# ----- file descriptors


def no_fds(scene: Scene) -> None:
    """A running gateway cannot open a file any more: it accepts, answers and stops as ever."""
    with started(scene.platform) as gateway:
        scene.feed(gateway, 20)
        scene.platform.wait_answered()
        limit(gateway.pid, resource.RLIMIT_NOFILE, max(fds(gateway.pid)) + 1)
        scene.feed(gateway, 200)
        gateway.send(scene.platform.new("who", "opens"))
        scene.platform.wait_answered()
        scene.seen.append("a gateway that could open no file")
        scene.open_long_turns(gateway, 10)
        assert gateway.stop() == 0, gateway.story
        assert "turns_marked" in gateway.log(), gateway.story
    assert set(open_turns(scene.platform.store).values()) == {"shutdown"}
    scene.finish()
    assert scene.figures["resumed_shutdown"] == 10, scene.figures


def no_fds_at_boot(scene: Scene) -> None:
    """Starts with ever more descriptors, until one succeeds: the others leave with an error, and
    are not held against what was open."""
    with started(scene.platform) as gateway:
        scene.open_long_turns(gateway, 5)
        gateway.kill()
    for number in range(3, 64):
        with started(scene.platform, inside=under("nofile", number), again=None) as gateway:
            gateway.send(scene.platform.new(f"apart-{number}", "plain"))
            if _serves(scene, gateway):
                assert gateway.stop() == 0, gateway.story
                break
            # A thread that ends makes the C library open a file, and abort if it cannot.
            code = gateway.wait()
            assert code > 0 or code == -SIGABRT, f"{number} descriptors: {code} {gateway.story}"
            assert gateway.log(), f"{number} descriptors: left without a word"
            scene.figures["boots_refused"] += 1
            if "cannot be opened" in gateway.log():
                scene.seen.append("a gateway that could open no file")
    else:
        raise AssertionError("64 descriptors are not enough")
    scene.finish()
    _charged_once(scene)


def _serves(scene: Scene, gateway: Process) -> bool:
    """Whether it acknowledges the newest message before it leaves."""
    newest = list(scene.platform.sent)[-1]
    deadline = time.monotonic() + PATIENCE
    while newest not in scene.platform.accepted and time.monotonic() < deadline:
        if not gateway.alive:
            return False
        time.sleep(0.01)
    return newest in scene.platform.accepted


def _charged_once(scene: Scene) -> None:
    """The turns that were open at the one crash were charged for that one."""
    charged = rows(scene.platform.store, "SELECT DISTINCT crashes FROM turn WHERE attempt > 1")
    assert charged == [(1,)], f"crashes charged: {charged}"


# ----- memory


def out_of_memory(scene: Scene) -> None:
    """A turn eats all memory and the kernel kills the process, once: it resumes, like all others
    that were open."""
    crashes = scene.dice.randint(1, 2)
    with memory_group(160) as group:
        for number in range(crashes):
            with started(scene.platform, inside=group.inside) as gateway:
                scene.feed(gateway, 20)
                if not number:
                    gateway.send(scene.platform.new("glutton", f"eat {crashes}"))
                _until_killed(scene, gateway)
        assert group.oom_kills == crashes, f"{group.oom_kills} of {crashes}"
    scene.finish()
    assert scene.figures["resumed_crash"] >= crashes, scene.figures


def _until_killed(scene: Scene, gateway: Process) -> None:
    assert gateway.wait() == -SIGKILL, f"{gateway.popen.returncode}\n{gateway.story}"
    scene.figures["oom_kills"] += 1
    scene.seen.append("a process that the OOM killer took")


def poisoned(scene: Scene) -> None:
    """A turn that eats all memory whenever it is tried is put aside at its third crash, alone; the
    others are answered."""
    with memory_group(160) as group:
        for number in range(3):
            with started(scene.platform, inside=group.inside) as gateway:
                if not number:
                    scene.open_long_turns(gateway, 5, "sleep 1")
                    poison = gateway.send(scene.platform.new("glutton", "eat 99"))
                    assert poison
                scene.feed(gateway, 20)
                _until_killed(scene, gateway)
        with started(scene.platform, inside=group.inside) as gateway:
            scene.feed(gateway, 20)
            scene.platform.wait_answered()
            assert gateway.stop() == 0, gateway.story
        assert group.oom_kills == 3, f"{group.oom_kills} of 3"
    states = rows(
        scene.platform.store, "SELECT DISTINCT state FROM turn WHERE state != 'COMPLETED'"
    )
    assert states == [("QUARANTINED",)], states
    (glutton,) = (id for id, m in scene.platform.sent.items() if m["session"] == "glutton")
    assert scene.state_of(glutton) == "quarantined"
    scene.excuse(glutton, "put it aside")
    scene.seen.append("a poisonous turn put aside")
    scene.finish()


def no_memory(scene: Scene) -> None:
    """A turn takes all the memory that the process may have, and holds it for a moment. Turns that
    find none fail, and say sorry; where the gateway itself finds none it leaves, within its budget,
    and is started again."""
    for number in range(3):
        with started(scene.platform) as gateway:
            scene.feed(gateway, 20)
            scene.platform.wait_accepted()
            size = status_of(gateway.pid, "VmSize") << 10
            limit(gateway.pid, resource.RLIMIT_AS, size + (64 << 20))
            gateway.send(scene.platform.new(f"hoarder-{number}", "hoard 0.3"))
            for _ in range(20):
                scene.feed(gateway, 2)
                time.sleep(0.02)
            _answered_or_left(scene, gateway)
    with started(scene.platform):
        scene.platform.wait_answered()
    for id, error in rows(
        scene.platform.store, "SELECT id, error FROM message WHERE state = 'failed'"
    ):
        assert "MemoryError" in error, f"{id} failed with {error}"
        scene.excuse(id, "Sorry")
        scene.figures["turns_without_memory"] += 1
    assert scene.figures["turns_without_memory"] + scene.figures["left_without_memory"] > 0
    scene.seen.append("a process that found no memory")
    scene.finish()


def _answered_or_left(scene: Scene, gateway: Process) -> None:
    everything = scene.platform.sent.keys()
    deadline = time.monotonic() + PATIENCE
    while gateway.alive and not scene.platform.finals.keys() >= everything:
        if time.monotonic() > deadline:
            gateway.signal(SIGUSR2)  # it says where it is
            time.sleep(2.0)
            raise AssertionError(f"hangs without memory\n{gateway.story}")
        time.sleep(0.02)
    if gateway.alive:
        assert gateway.stop() == 0, gateway.story
    else:
        # A stack that cannot grow, or an extension that cannot allocate, ends as it ends.
        code = gateway.wait()
        assert code in (1, -SIGABRT, -SIGSEGV), f"{code}\n{gateway.story}"
        scene.figures["left_without_memory"] += 1
