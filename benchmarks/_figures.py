"""What is measured, and against what."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import trio

from trio_gateway import Settings
from trio_gateway._collector import calm_collector

from . import _floor, _gateway, _http, _stores

Figures = dict[str, float]


# ----- what one process measures


def _turns(what: Any, path: Path, sessions: int, each: int) -> float:
    return float(trio.run(what.turns_per_second, path, sessions, each))


def _mark_gateway(path: Path, count: int) -> float:
    settings = Settings(limits=_gateway.OPEN, grace=0.01, budget=60.0)
    return trio.run(_gateway.fill_with_running, path, count, settings)["mark"] * 1000


def _mark_bare(path: Path, count: int) -> float:
    """One bare transaction that updates as many rows of about as many bytes."""
    db = _floor.connect(path)
    db.execute("CREATE TABLE turn (id INTEGER PRIMARY KEY, state TEXT, reason TEXT, rest TEXT)")
    with db:
        db.executemany(
            "INSERT INTO turn VALUES (?, 'RUNNING', NULL, ?)",
            ((number, "x" * 100) for number in range(count)),
        )
    began = perf_counter()
    with db:
        db.execute("UPDATE turn SET state = 'RESUME_PENDING', reason = 'shutdown'"
                   " WHERE state = 'RUNNING'")  # fmt: skip
    took = perf_counter() - began
    db.close()
    return took * 1000


def _boot(path: Path, sessions: int, markers: int) -> float:
    """The median of five boots, each of a copy: a boot changes what it finds."""
    _stores.make(path, sessions, markers)
    return median(_boot_copy(path) for _ in range(5))


def _boot_copy(path: Path) -> float:
    copy = path.with_name("copy.db")
    shutil.copyfile(path, copy)
    try:
        return trio.run(_gateway.boot_seconds, copy)
    finally:
        copy.unlink()


def _fresh(path: Path, count: int) -> float:
    return trio.run(_gateway.turns_per_second, path, count, 1)


def _resumed(path: Path, count: int) -> float:
    settings = Settings(limits=_gateway.OPEN, grace=0.01, budget=60.0)
    trio.run(_gateway.fill_with_running, path, count, settings)
    return trio.run(_gateway.resumed_per_second, path, count)


def _memory(path: Path, sessions: int) -> float:
    return trio.run(_gateway.memory_after, path, sessions)


def _drain(path: Path, count: int, seconds: float) -> float:
    return trio.run(_gateway.drain_overhead_ms, path, count, seconds)


def _http_accept(kind: str, path: Path, count: int) -> float:
    return _http.accepted(kind, path, count)


def _ttft(path: Path, rate: float, count: int) -> float:
    return _http.p99_first_text_ms(path, rate, count)


def _sse(path: Path, count: int) -> float:
    return _http.kb_each(path, count)


MEASUREMENTS: dict[str, Callable[..., float]] = {
    "floor_turns": partial(_turns, _floor),
    "gateway_turns": partial(_turns, _gateway),
    "mark_gateway": _mark_gateway,
    "mark_bare": _mark_bare,
    "boot": _boot,
    "fresh": _fresh,
    "resumed": _resumed,
    "memory": _memory,
    "drain": _drain,
    "http_gateway": partial(_http_accept, "gateway"),
    "http_hello": partial(_http_accept, "hello"),
    "ttft": _ttft,
    "sse": _sse,
}


def in_process(name: str, *args: float) -> float:
    """Run one measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._figures", name, json.dumps(args)],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name}{args} failed:\n{done.stderr}")
    return float(done.stdout)


def here(name: str, args: Sequence[float]) -> float:
    """Run one measurement on a new store."""
    folder = Path(tempfile.mkdtemp(prefix="trio-gateway-bench-"))
    calm_collector()  # as the host command does; the floor has it too
    try:
        return MEASUREMENTS[name](folder / "bench.db", *args)
    finally:
        shutil.rmtree(folder)


# ----- the figures


def pairs(a: tuple[Any, ...], b: tuple[Any, ...], times: int) -> tuple[float, float, float]:
    """Measure A and B in turn: the medians of A, of B, and of the pairs' A/B."""
    taken = [(in_process(*a), in_process(*b)) for _ in range(times)]
    return (
        median(one for one, _ in taken),
        median(other for _, other in taken),
        median(one / other for one, other in taken),
    )


def turns_1(quick: bool) -> Figures:
    """One session: three commits in a row against the floor's four."""
    ours, floor, ratio = pairs(
        ("gateway_turns", 1, 100 if quick else 1000), ("floor_turns", 1, 100 if quick else 1000), 5
    )
    return {"turns_1_per_s": ours, "floor_1_per_s": floor, "turns_1_ratio": ratio}


def turns_1000(quick: bool) -> Figures:
    """A thousand sessions at once."""
    each = 5 if quick else 40
    ours, floor, ratio = pairs(
        ("gateway_turns", 1000, each), ("floor_turns", 1000, each), 3 if quick else 5
    )
    return {"turns_1000_per_s": ours, "floor_1000_per_s": floor, "turns_1000_ratio": ratio}


def scale(quick: bool) -> Figures:
    """Ten thousand sessions against a hundred."""
    many, few, ratio = pairs(
        ("gateway_turns", 10_000, 1 if quick else 4),
        ("gateway_turns", 100, 50 if quick else 400),
        1 if quick else 5,
    )
    return {"turns_10000_per_s": many, "turns_100_per_s": few, "scale_ratio": ratio}


def mark(count: int, quick: bool) -> Figures:
    """Marking, against one bare transaction that updates as many rows."""
    ours, bare, ratio = pairs(("mark_gateway", count), ("mark_bare", count), 1 if quick else 5)
    return {f"mark_{count}_ms": ours, f"bare_{count}_ms": bare, f"mark_{count}_ratio": ratio}


def boot(quick: bool) -> Figures:
    """A boot over a million stored sessions, against one over a hundred; the same open turns."""
    stored = 20_000 if quick else 1_000_000
    large, small, ratio = pairs(("boot", stored, 100), ("boot", 100, 100), 1)
    return {"boot_large_ms": large * 1000, "boot_small_ms": small * 1000, "boot_ratio": ratio}


def idle_memory(quick: bool) -> Figures:
    """What sessions that were served once leave behind."""
    many = 5_000 if quick else 100_000
    large, small, ratio = pairs(("memory", many), ("memory", 1000), 1)
    return {"memory_many_mb": large, "memory_1000_mb": small, "idle_memory_ratio": ratio}


def drain(quick: bool) -> Figures:
    """A drain of a thousand turns that end together, beyond that moment."""
    taken = [in_process("drain", 1000, 1.0) for _ in range(1 if quick else 5)]
    return {"drain_overhead_ms": median(taken)}


def resume(quick: bool) -> Figures:
    """Resuming, against as many fresh turns: how many times as long."""
    count = 500 if quick else 10_000
    fresh, resumed, ratio = pairs(("fresh", count), ("resumed", count), 1 if quick else 3)
    return {"fresh_per_s": fresh, "resumed_per_s": resumed, "resume_ratio": ratio}


def http(quick: bool) -> Figures:
    """Messages accepted over HTTP, against a bare hello that reads and writes as much."""
    count = 2_000 if quick else 20_000
    ours, hello, ratio = pairs(("http_gateway", count), ("http_hello", count), 1 if quick else 5)
    # The first text at half that load, whoever else is served: an open loop, so that a server that
    # falls behind cannot hide it.
    p99 = in_process("ttft", ours / 2, 1_000 if quick else 10_000)
    return {
        "http_accept_per_s": ours,
        "http_hello_per_s": hello,
        "http_accept_ratio": ratio,
        "ttft_p99_ms": p99,
    }


def sse(quick: bool) -> Figures:
    """Memory for each idle event stream."""
    return {"sse_kb": in_process("sse", 500 if quick else 10_000)}


FIGURES: dict[str, Callable[[bool], Figures]] = {
    "turns_1": turns_1,
    "turns_1000": turns_1000,
    "scale": scale,
    "mark_1000": partial(mark, 1000),
    "mark_10000": partial(mark, 10_000),
    "boot": boot,
    "idle_memory": idle_memory,
    "drain": drain,
    "resume": resume,
    "http": http,
    "sse": sse,
}


def measure(names: Sequence[str], *, quick: bool, say: Callable[[str], None]) -> Figures:
    """Measure the figures of those names; `say` hears how far it is."""
    figures: Figures = {}
    for name in names:
        began = perf_counter()
        found = FIGURES[name](quick)
        figures.update(found)
        text = ", ".join(f"{key} {value:.3g}" for key, value in found.items())
        say(f"{text}   ({perf_counter() - began:.0f} s)")
    return {name: round(value, 4) for name, value in figures.items()}


if __name__ == "__main__":
    print(here(sys.argv[1], json.loads(sys.argv[2])))
