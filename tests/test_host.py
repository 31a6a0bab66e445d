"""The process around a gateway: real processes, real signals, a real supervisor's socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from processes import COMPANY, ECHO, SLOW, launch, markers

from trio_gateway._supervisor import Supervisor

TERM, INT = signal.SIGTERM, signal.SIGINT
USR1, USR2 = signal.SIGUSR1, signal.SIGUSR2

# Each blocks in its first attempt, in its own way, and answers in the second.
STUBBORN = {
    "swallows": """
        import trio
        async def agent(turn):
            turn.progress("begun")
            while not turn.resumed:
                try:
                    await trio.sleep_forever()
                except trio.Cancelled:
                    continue
            return "resumed"
        """,
    "sleeps": """
        import time
        async def agent(turn):
            turn.progress("begun")
            if not turn.resumed:
                time.sleep(600)
            return "resumed"
        """,
    "computes": """
        async def agent(turn):
            turn.progress("begun")
            while not turn.resumed:
                sum(range(100))
            return "resumed"
        """,
    "deadlocks-in-c": """
        import ctypes
        libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        async def agent(turn):
            turn.progress("begun")
            if not turn.resumed:
                libc.pthread_mutex_lock(lock)
                libc.pthread_mutex_lock(lock)   # never returns, and runs no Python handler
            return "resumed"
        """,
    "thread": """
        import time
        def agent(turn):
            turn.progress("begun")
            if not turn.resumed:
                time.sleep(600)
            return "resumed"
        """,
}


# ----- stopping in order


@pytest.mark.parametrize("number", [TERM, INT])
def test_p11_a_signal_drains_and_leaves_with_0(tmp_path: Path, number: signal.Signals) -> None:
    with launch(tmp_path, ECHO) as gateway:
        gateway.send("a", "m1", "hello")
        gateway.expect("reply", text="hello", final=True)
        assert gateway.stop(number) == 0
        assert "Traceback" not in gateway.stderr


def test_p09_usr1_drains_and_leaves_with_75(tmp_path: Path) -> None:
    with launch(tmp_path, SLOW, grace=0.2, budget=4) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        assert gateway.stop(USR1) == 75
    assert markers(tmp_path) == {"a": ("RESUME_PENDING", "restart")}
    with launch(tmp_path, SLOW) as gateway:
        gateway.expect("reply", text="resumed: hi", attempt=2)


def test_p13_an_agent_that_asks_for_a_restart_is_answered_first(tmp_path: Path) -> None:
    agent = """
        async def agent(turn):
            turn.request_restart()
            return "done"
        """
    with launch(tmp_path, agent) as gateway:
        gateway.send("a", "m1")
        gateway.expect("reply", text="done", final=True)
        assert gateway.wait() == 75
    assert markers(tmp_path) == {}


def test_the_end_of_the_input_finishes_what_was_accepted(tmp_path: Path) -> None:
    agent = """
        import trio
        async def agent(turn):
            await trio.sleep(0.3)
            return turn.text
        """
    with launch(tmp_path, agent, ready=False) as gateway:
        for n in range(3):
            gateway.send("a", f"m{n}", str(n))
        gateway.end_input()
        assert gateway.wait() == 0
        assert [e["text"] for e in gateway.events if e["event"] == "reply"] == ["0", "1", "2"]
        assert "Traceback" not in gateway.stderr
    assert markers(tmp_path) == {}


def test_a_closed_stdout_is_a_stop_not_a_traceback(tmp_path: Path) -> None:
    with launch(tmp_path, SLOW, grace=0.2, budget=4) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        gateway.close_output()
        assert gateway.wait() == 0
        assert "Traceback" not in gateway.stderr
    assert markers(tmp_path) == {"a": ("RESUME_PENDING", "shutdown")}


# ----- c46: agents that do not stop


@pytest.mark.parametrize("how", STUBBORN)
def test_c46_a_stubborn_agent_is_left_within_the_budget_and_resumes(
    tmp_path: Path, how: str
) -> None:
    budget = 3.0
    with launch(tmp_path, STUBBORN[how], grace=0.5, budget=budget) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        began = time.monotonic()
        code = gateway.stop(TERM)
        assert time.monotonic() - began < budget + COMPANY
        # Served in order, but for a blocked loop, where the watchdog had to.
        assert code == (0 if how in ("swallows", "thread") else 1)
        if code == 1:
            assert "the stop's budget of 3 s is over" in gateway.stderr
    assert markers(tmp_path) == {"a": ("RESUME_PENDING", "shutdown")}
    with launch(tmp_path, STUBBORN[how]) as gateway:
        gateway.expect("reply", text="resumed", attempt=2)


def test_c46_a_restart_asked_of_a_blocked_loop_still_restarts(tmp_path: Path) -> None:
    with launch(tmp_path, STUBBORN["sleeps"], grace=0.2, budget=2) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        assert gateway.stop(USR1) == 75
    assert markers(tmp_path) == {"a": ("RESUME_PENDING", "restart")}


def test_c46_a_held_interpreter_lock_does_not_hold_the_process(tmp_path: Path) -> None:
    """Nothing of ours can run: the thread in C leaves, and says where it was."""
    agent = """
        import ctypes, signal, threading
        libc, lock = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
        async def agent(turn):
            turn.progress("begun")
            while signal.getsignal(signal.SIGTERM) and not turn.draining.value:
                import trio
                await trio.sleep(0.01)
            libc.pthread_mutex_lock(lock)
            libc.pthread_mutex_lock(lock)   # for ever, with the lock of the interpreter
        """
    with launch(tmp_path, agent, grace=0.5, budget=2) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        began = time.monotonic()
        assert gateway.stop(TERM) == 1
        assert time.monotonic() - began < 2 + COMPANY
        assert "in agent" in gateway.stderr
    assert markers(tmp_path) == {"a": ("RESUME_PENDING", "shutdown")}


def test_c46_a_thread_that_does_not_end_does_not_keep_the_process(tmp_path: Path) -> None:
    agent = """
        import threading, time
        threading.Thread(target=time.sleep, args=(600,)).start()
        async def agent(turn):
            return turn.text
        """
    with launch(tmp_path, agent, budget=4) as gateway:
        began = time.monotonic()
        assert gateway.stop(TERM) == 0
        assert time.monotonic() - began < 4 + COMPANY


def test_p11_a_trio_and_a_log_that_fell_over_do_not_keep_the_process(tmp_path: Path) -> None:
    """What a process without memory has met: nothing wakes the loop any more, so that nothing that
    is written is ever heard of; and nobody could say that a stop was asked for."""
    agent = """
        import trio
        from trio._core import _run
        from trio_gateway import _logs

        def no_memory(*_):
            raise MemoryError

        async def agent(turn):
            turn.progress("begun")
            if not turn.resumed:
                _logs.event_name = no_memory
                _run.GLOBAL_RUN_CONTEXT.runner.entry_queue.wakeup.wait_woken = no_memory
                trio.lowlevel.current_trio_token().run_sync_soon(list)
                await trio.sleep_forever()
            return "resumed"
        """
    with launch(tmp_path, agent, grace=0.5, budget=2) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        began = time.monotonic()
        assert gateway.wait() == 1
        assert time.monotonic() - began < 2 + COMPANY
    assert markers(tmp_path) == {"a": ("RESUME_PENDING", "shutdown")}
    with launch(tmp_path, agent) as gateway:
        gateway.expect("reply", text="resumed", attempt=2)


def test_c49_a_stop_that_nobody_asked_for_leaves_with_1(tmp_path: Path) -> None:
    """Trio falls over, and a turn does not end: the process leaves by itself, and says that it
    failed, so that whoever looks after it starts it again."""
    agent = """
        import trio

        def fall_over():
            raise MemoryError

        async def agent(turn):
            turn.progress("begun")
            if not turn.resumed:
                trio.lowlevel.current_trio_token().run_sync_soon(fall_over)
                with trio.CancelScope(shield=True):
                    await trio.sleep_forever()
            return "resumed"
        """
    with launch(tmp_path, agent, grace=0.5, budget=3) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        assert gateway.wait() == 1
    with launch(tmp_path, agent) as gateway:
        gateway.expect("reply", text="resumed", attempt=2)


def test_p11_nobody_reading_stderr_does_not_keep_the_process(tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    try:
        os.set_blocking(write_fd, False)
        while os.write(write_fd, b"x" * 4096) == 4096:
            continue
    except BlockingIOError:
        os.set_blocking(write_fd, True)
    with launch(tmp_path, STUBBORN["sleeps"], grace=0.2, budget=2, stderr=write_fd) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        began = time.monotonic()
        assert gateway.stop(TERM) == 1
        assert time.monotonic() - began < 2 + COMPANY
    os.close(read_fd)
    os.close(write_fd)


# ----- c47: signals, and more signals


def test_c47_term_twice_changes_nothing(tmp_path: Path) -> None:
    agent = """
        import trio
        async def agent(turn):
            turn.progress("begun")
            await trio.sleep(1.0)
            return "settled"
        """
    with launch(tmp_path, agent, grace=5, budget=10) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        gateway.signal(TERM, TERM, TERM)
        gateway.expect("reply", text="settled")
        assert gateway.wait() == 0
    assert markers(tmp_path) == {}


def test_c47_term_until_the_very_end_is_still_an_orderly_end(tmp_path: Path) -> None:
    """Also while Python takes itself apart, and has given the signals back to the kernel."""
    with launch(tmp_path, ECHO) as gateway:
        gateway.send("a", "m1")
        gateway.expect("reply")
        assert gateway.storm(TERM) == 0


def test_c47_int_then_term_drains(tmp_path: Path) -> None:
    agent = """
        import trio
        async def agent(turn):
            turn.progress("begun")
            await trio.sleep(1.0)
            return "settled"
        """
    with launch(tmp_path, agent, grace=5, budget=10) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        gateway.signal(INT, TERM)
        gateway.expect("reply", text="settled")
        assert gateway.wait() == 0


def test_c47_the_second_interrupt_ends_the_window(tmp_path: Path) -> None:
    with launch(tmp_path, SLOW, grace=20, budget=30) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        began = time.monotonic()
        gateway.signal(INT, INT)
        assert gateway.wait() == 0
        assert time.monotonic() - began < 4 + COMPANY
    assert markers(tmp_path) == {"a": ("RESUME_PENDING", "shutdown")}


@pytest.mark.parametrize("how", ["swallows", "sleeps"])
def test_c47_the_third_interrupt_leaves_at_once(tmp_path: Path, how: str) -> None:
    with launch(tmp_path, STUBBORN[how], grace=100, budget=200) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        began = time.monotonic()
        gateway.signal(INT, INT, INT)
        assert gateway.wait() == 130
        assert time.monotonic() - began < 2 + COMPANY
    assert markers(tmp_path) == {"a": ("RESUME_PENDING", "shutdown")}


SLOW_IMPORT = """
    import sys, time, trio
    print("booting", file=sys.stderr, flush=True)
    time.sleep(1)
    async def agent(turn):
        await trio.sleep_forever()
    """
SLOW_OPENING = """
    import contextlib, sys, trio
    @contextlib.asynccontextmanager
    async def agent():
        print("booting", file=sys.stderr, flush=True)
        await trio.sleep(1)
        async def answer(turn):
            await trio.sleep_forever()
        yield answer
    """


@pytest.mark.parametrize(("number", "code"), [(TERM, 0), (USR1, 75)])
@pytest.mark.parametrize("boot", [SLOW_IMPORT, SLOW_OPENING])
def test_c47_a_signal_during_boot_is_remembered(
    tmp_path: Path, boot: str, number: signal.Signals, code: int
) -> None:
    with launch(tmp_path, SLOW) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        gateway.kill()
    with launch(tmp_path, boot, grace=0.2, budget=5, ready=False) as gateway:
        gateway.expect_stderr("booting")
        assert gateway.stop(number) == code
        assert "Traceback" not in gateway.stderr
    assert markers(tmp_path).keys() == {"a"}
    with launch(tmp_path, SLOW) as gateway:
        gateway.expect("reply", text="resumed: hi")


def test_c47_a_boot_that_hangs_ends_within_the_budget(tmp_path: Path) -> None:
    """Not the configured budget: that is not known yet."""
    hanging = """
        import contextlib, sys, trio
        @contextlib.asynccontextmanager
        async def agent():
            print("opening", file=sys.stderr, flush=True)
            await trio.sleep_forever()
            yield
        """
    with launch(tmp_path, hanging, grace=0.2, budget=1.5, ready=False) as gateway:
        gateway.expect_stderr("opening")
        began = time.monotonic()
        assert gateway.stop(TERM) == 1
        assert time.monotonic() - began < 2 + COMPANY


def test_ctrl_c_is_never_a_keyboard_interrupt_in_an_agent(tmp_path: Path) -> None:
    agent = """
        import time
        async def agent(turn):
            turn.progress("begun")
            try:
                time.sleep(1)
            except KeyboardInterrupt:
                return "interrupted"
            return "settled"
        """
    with launch(tmp_path, agent) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        gateway.signal(INT)
        gateway.expect("reply", text="settled")
        assert gateway.wait() == 0


def test_a_forked_child_does_not_pass_its_signals_on(tmp_path: Path) -> None:
    agent = """
        import os, signal, time
        async def agent(turn):
            child = os.fork()
            if not child:
                time.sleep(60)
                os._exit(0)
            time.sleep(0.1)
            os.kill(child, signal.SIGTERM)
            return str(os.WTERMSIG(os.waitpid(child, 0)[1]))
        """
    with launch(tmp_path, agent) as gateway:
        gateway.send("a", "m1")
        gateway.expect("reply", text="15")
        gateway.send("a", "m2")
        gateway.expect("reply", text="15")
        assert gateway.stop() == 0


def test_usr2_shows_tasks_and_open_turns(tmp_path: Path) -> None:
    with launch(tmp_path, SLOW, grace=0.1, budget=2) as gateway:
        gateway.send("ada", "m1")
        gateway.expect("progress")
        gateway.signal(USR2)
        gateway.expect_stderr("tasks:")
        assert "turn 1 of 'jsonl:ada', attempt 1, running for" in gateway.stderr
        gateway.expect_stderr("agent (")
        gateway.send("bob", "m2")
        gateway.expect("progress", session="bob")
        assert gateway.stop() == 0


def test_usr2_shows_where_a_blocked_loop_is(tmp_path: Path) -> None:
    with launch(tmp_path, STUBBORN["sleeps"], grace=0.1, budget=2) as gateway:
        gateway.send("ada", "m1")
        gateway.expect("progress")
        gateway.signal(USR2)
        gateway.expect_stderr("the event loop does not answer")
        gateway.expect_stderr("in agent")


# ----- failures


def test_c49_a_failure_of_the_gateway_marks_first_and_leaves_with_1(tmp_path: Path) -> None:
    # The agent's module breaks the gateway from within, as a bug of its own would.
    agent = """
        import trio
        from trio_gateway import _gateway
        async def broken(self):
            await wanted.wait()
            raise RuntimeError("a bug of the gateway")
        _gateway.Gateway._touch = broken
        wanted = trio.Event()
        async def agent(turn):
            turn.progress("begun")
            wanted.set()
            await trio.sleep_forever()
        """
    with launch(tmp_path, agent, grace=0.2, budget=4) as gateway:
        gateway.send("a", "m1")
        gateway.expect("progress")
        assert gateway.wait() == 1
        assert "a bug of the gateway" in gateway.stderr
        assert "Traceback" in gateway.stderr
    assert markers(tmp_path) == {"a": ("RESUME_PENDING", "shutdown")}


def test_c50_the_second_gateway_on_a_store_names_the_first(tmp_path: Path) -> None:
    with launch(tmp_path, ECHO) as first:
        with launch(tmp_path, ECHO, ready=False) as second:
            assert second.wait() == 1
            assert f"{first.pid}" in second.stderr
            assert second.stderr.count("trio-gateway: ") == 1
            assert "Traceback" not in second.stderr
        first.send("a", "m1", "still here")
        first.expect("reply", text="still here")
        first.kill()
    with launch(tmp_path, ECHO) as third:
        assert third.stop() == 0


def test_c53_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = tmp_path / "gateway.db"
    store.write_bytes(b"these are my notes, not a database" * 100)
    with launch(tmp_path, ECHO, ready=False) as gateway:
        assert gateway.wait() == 1
        assert "gateway.db" in gateway.stderr
        assert "Traceback" not in gateway.stderr
    assert store.read_bytes().startswith(b"these are my notes")


def test_a_store_in_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with launch(tmp_path, ECHO, store="nowhere/gateway.db", ready=False) as gateway:
        assert gateway.wait() == 1
        assert "nowhere" in gateway.stderr
        assert "Traceback" not in gateway.stderr


def test_an_object_that_is_no_agent_leaves_with_78(tmp_path: Path) -> None:
    with launch(tmp_path, "agent = 42", ready=False) as gateway:
        assert gateway.wait() == 78
        assert "Traceback" not in gateway.stderr
        assert "trio-gateway: " in gateway.stderr


def test_an_agent_that_cannot_be_opened_is_told_with_its_traceback(tmp_path: Path) -> None:
    agent = """
        import contextlib
        @contextlib.asynccontextmanager
        async def agent():
            raise RuntimeError("no key for the model")
            yield
        """
    with launch(tmp_path, agent, ready=False) as gateway:
        assert gateway.wait() == 1
        assert "no key for the model" in gateway.stderr


# ----- the supervisor


@pytest.mark.parametrize("abstract", [False, True])
def test_a_supervisor_hears_of_ready_marking_and_progress(tmp_path: Path, abstract: bool) -> None:
    agent = """
        import trio
        async def agent(turn):
            turn.progress("begun")
            await trio.sleep(float(turn.text))
            return "settled"
        """
    name = f"trio-gateway-test-{os.getpid()}"
    path = "\0" + name if abstract else str(tmp_path / "notify")
    address = "@" + name if abstract else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(path)
        supervisor.settimeout(10)
        env = os.environ | {"NOTIFY_SOCKET": address}
        with launch(tmp_path, agent, grace=2, budget=5, env=env) as gateway:
            assert "READY=1" in _until(supervisor, "READY=1")
            gateway.send("a", "m1", "0.5")
            gateway.send("b", "m2", "60")
            gateway.expect("progress", session="a")
            gateway.expect("progress", session="b")
            gateway.signal(TERM)
            heard = _until(supervisor, "EXTEND_TIMEOUT_USEC")
            assert gateway.wait() == 0
            assert "READY=1" not in heard
            assert heard.index("STOPPING=1") < heard.index("EXTEND_TIMEOUT_USEC")
            assert 2e6 < int(heard.rpartition("=")[2]) < 5e6
            supervisor.setblocking(False)
            assert {line.partition("=")[0] for line in _rest(supervisor)} <= {"STATUS"}


def _rest(supervisor: socket.socket) -> list[str]:
    lines: list[str] = []
    with suppress(BlockingIOError):
        while True:
            lines += supervisor.recv(4096).decode().splitlines()
    return lines


def _until(supervisor: socket.socket, word: str) -> str:
    heard = ""
    while word not in heard:
        heard += supervisor.recv(4096).decode() + "\n"
    return heard.rstrip()


def test_without_a_supervisor_nothing_is_told(tmp_path: Path) -> None:
    assert not Supervisor({}).tell("READY=1")
    assert not Supervisor({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).tell("READY=1")


def test_signals_that_nobody_took_are_python_s_own() -> None:
    """Importing the package takes no signal; only a host does."""
    script = "import signal, trio_gateway; print(signal.getsignal(signal.SIGTERM))"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=30
    )
    assert int(done.stdout) == signal.SIG_DFL
