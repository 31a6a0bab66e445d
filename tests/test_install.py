"""`trio-gateway install systemd`: what it writes, that systemd agrees with it, and that a real one
runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import gettempdir

import apsw
import attrs
import pytest

import trio_gateway._install as _install_module
from proof import systemd as campaign
from proof._report import Skip
from proof._systemd import Systemd, check_machine, gateway_below
from trio_gateway._cli import main
from trio_gateway._config import Config
from trio_gateway._install import (
    doubts,
    is_ours,
    plan_service,
    signed,
    unit_folder,
    write_units,
)
from trio_gateway._policy import ResumeRules, allow, plan_stop

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "systemd.md"
PATIENCE = 30.0

Install = Callable[..., str]


@pytest.fixture(name="install")
def _install(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Install:
    """Call the command in a folder with a bot; what it wrote, or what it complained of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in [name for name in os.environ if name.startswith("TRIO_GATEWAY_")]:
        monkeypatch.delenv(name)
    (tmp_path / "bot.py").write_text("async def agent(turn):\n    return turn.text\n")

    def call(*words: str, code: int = 0) -> str:
        assert main(["install", "systemd", *words]) == code
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return told.err if code else told.out

    return call


def setting(unit: str, name: str) -> str:
    """The one value of a setting."""
    (value,) = re.findall(rf"^{name}=(.*)$", unit, re.M)
    return str(value)


# ----- the deadlines


@pytest.mark.parametrize(
    ("budget", "stop", "watchdog"),
    [(1, 6, 30), (9, 14, 30), (30, 40, 30), (60, 80, 60), (600, 630, 600), (0.5, 6, 30)],
)
def test_p11_deadlines_are_derived_from_the_one_budget(
    budget: float, stop: int, watchdog: int
) -> None:
    told = allow(plan_stop(None, budget), ResumeRules())
    assert (told.stop, told.watchdog) == (stop, watchdog)
    assert told.stop >= budget + 5


@pytest.mark.parametrize("crashes", [1, 3, 10, 2**31 - 1])
def test_p09_a_turn_that_kills_is_convicted_before_systemd_gives_up(crashes: int) -> None:
    told = allow(plan_stop(), ResumeRules(max_crashes=crashes))
    assert told.burst > min(crashes, 25) * 3
    assert 20 <= told.burst <= 100
    assert told.interval > told.burst * 2  # RestartSec: or the limit would never be met


def test_the_unit_follows_the_configuration(install: Install, tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text('[drain]\nbudget = "2m"\n[resume]\nmax_crashes = 10\n')
    unit = install("bot.py:agent", "--print")
    assert setting(unit, "TimeoutStopSec") == "150"
    assert setting(unit, "WatchdogSec") == "120"
    assert setting(unit, "StartLimitBurst") == "40"
    assert f"--config {tmp_path}/gateway.toml" in setting(unit, "ExecStart")


def test_the_shell_s_variables_are_not_the_service_s(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIO_GATEWAY_DRAIN__BUDGET", "2m")
    told = install("bot.py:agent", "--user")
    assert "warning: TRIO_GATEWAY_DRAIN__BUDGET: set in this shell, but not for the service" in told
    assert setting(install("bot.py:agent", "--user", "--print"), "TimeoutStopSec") == "40"


# ----- the text


def test_the_unit_hosts_the_agent_that_is_named(install: Install, tmp_path: Path) -> None:
    unit = install("bot.py:agent", "--print")
    start = setting(unit, "ExecStart")
    assert f" run {tmp_path}/bot.py:agent --store %S/bot/gateway.db" in start
    assert Path(start.split()[0]).is_file()
    assert setting(unit, "WorkingDirectory") == str(tmp_path)
    assert setting(unit, "DynamicUser") == "yes"
    assert setting(unit, "StateDirectory") == "bot"
    assert "Socket" not in unit
    unit = install("my.package:agent", "--as", "ada", "--store", "x/bot.db", "--print")
    assert f" run my.package:agent --store {tmp_path}/x/bot.db" in setting(unit, "ExecStart")
    assert setting(unit, "User") == "ada"
    assert setting(unit, "ReadWritePaths") == f"{tmp_path}/x"
    assert "DynamicUser" not in unit


@pytest.mark.parametrize(
    ("version", "kind", "reload"),
    [
        (None, "notify", True),
        (252, "notify", True),
        (253, "notify-reload", False),
        (260, "notify-reload", False),
    ],
)
def test_a_systemd_that_waits_for_a_reload_is_told_to(
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    version: int | None,
    kind: str,
    reload: bool,
) -> None:
    """252 takes what it does not know for a service that says nothing at all."""
    monkeypatch.setattr(_install_module, "systemd_version", lambda: version)
    unit = install("bot.py:agent", "--print")
    assert setting(unit, "Type") == kind
    assert ("ExecReload=kill -HUP $MAINPID" in unit) is reload


def test_what_is_started_can_be_called_so(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    words = setting(install("bot.py:agent", "--print"), "ExecStart").split()
    shown = subprocess.run(
        [*words[: words.index("run") + 1], "--help"],
        capture_output=True, text=True, check=True, timeout=PATIENCE,
    ).stdout  # fmt: skip
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--\w+", shown))


def test_a_user_s_unit_asks_for_nothing_that_its_systemd_cannot_do(install: Install) -> None:
    unit = install("bot.py:agent", "--user", "--print")
    for name in ("DynamicUser", "User", "ProtectSystem", "PrivateTmp", "CapabilityBoundingSet"):
        assert f"\n{name}=" not in unit
    assert setting(unit, "WantedBy") == "default.target"
    assert setting(unit, "NoNewPrivileges") == "yes"


def test_the_socket_has_the_address_and_the_name(install: Install) -> None:
    units = install("bot.py:agent", "--http", "127.0.0.1:8080", "--socket", "--print")
    service, socket = (f"[Unit]{part}" for part in units.split("[Unit]")[1:])
    assert setting(socket, "ListenStream") == "127.0.0.1:8080"
    assert setting(socket, "FileDescriptorName") == "http"
    assert setting(service, "Requires") == "bot.socket"
    assert setting(service, "ExecStart").endswith(" --http 127.0.0.1:8080")


def test_credentials_are_handed_on(install: Install) -> None:
    unit = install("bot.py:agent", "--credential", "model:/etc/bot/model-key", "--print")
    assert setting(unit, "LoadCredential") == "model:/etc/bot/model-key"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bot.py"], "names no agent"),
        (["none.py:agent"], "none.py is no file"),
        (["bot.py:agent", "--name", "a b"], "give another with --name"),
        (["bot.py:agent", "--socket"], "--http 127.0.0.1:8080"),
        (["bot.py:agent", "--as", "ada", "--user"], "--as is for the machine's systemd"),
        (["bot.py:agent", "--store", "/srv/x.db"], "name the owner of its folder with --as"),
        (["bot.py:agent", "--credential", "key"], "expected a name and a path"),
    ],
)
def test_p14_what_cannot_be_is_one_clear_error(
    install: Install, words: list[str], told: str
) -> None:
    assert told in install(*words, code=78)


# ----- the files


def test_it_writes_and_says_what_to_type(install: Install, tmp_path: Path) -> None:
    folder = tmp_path / "config" / "systemd" / "user"
    told = install("bot.py:agent", "--user", "--http", "127.0.0.1:8080", "--socket").splitlines()
    assert told[:2] == [f"wrote {folder}/bot.service", f"wrote {folder}/bot.socket"]
    assert told[told.index("next:") + 1 :] == [
        "  systemctl --user daemon-reload",
        "  systemctl --user enable --now bot.socket bot.service",
        "  systemctl --user status bot",
        "  loginctl enable-linger",
        "  trio-gateway doctor --unit bot --user",
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["bot.service", "bot.socket"]
    assert is_ours((folder / "bot.service").read_text())


def test_only_what_it_wrote_itself_is_overwritten(install: Install, tmp_path: Path) -> None:
    path = tmp_path / "config" / "systemd" / "user" / "bot.service"
    install("bot.py:agent", "--user")
    (tmp_path / "gateway.toml").write_text('[drain]\nbudget = "1m"\n')
    install("bot.py:agent", "--user")
    assert setting(path.read_text(), "TimeoutStopSec") == "80"
    changed = path.read_text().replace("TimeoutStopSec=80", "TimeoutStopSec=10")
    path.write_text(changed)
    complaint = install("bot.py:agent", "--user", code=1)
    assert f"{path} was not written by this command, or was changed since" in complaint
    assert path.read_text() == changed
    install("bot.py:agent", "--user", "--force")
    assert setting(path.read_text(), "TimeoutStopSec") == "80"


def test_both_files_or_none(tmp_path: Path) -> None:
    (tmp_path / "b.socket").write_text("[Socket]\n")
    units = {"b.service": signed("[Service]\n"), "b.socket": signed("[Socket]\n")}
    with pytest.raises(Exception, match=r"b\.socket was not written by this command"):
        write_units(tmp_path, units, force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["b.socket"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(signed("[Service]\n"))
    (tmp_path / "b.service").symlink_to(elsewhere)
    with pytest.raises(Exception, match=r"b\.service was not written"):
        write_units(tmp_path, {"b.service": signed("[Service]\nX=1\n")}, force=False)
    write_units(tmp_path, {"b.service": signed("[Service]\nX=1\n")}, force=True)
    assert "X=1" not in elsewhere.read_text()
    assert "X=1" in (tmp_path / "b.service").read_text()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_who_may_not_write_is_told_what_to_do(install: Install) -> None:
    complaint = install("bot.py:agent", code=78)
    assert "do it as root, for yourself with --user, or look at the unit with --print" in complaint


def test_where_units_are(tmp_path: Path) -> None:
    assert unit_folder({}, user=False) == Path("/etc/systemd/system")
    assert unit_folder({"HOME": "/home/ada"}, user=True) == Path("/home/ada/.config/systemd/user")


def test_files_that_the_service_cannot_reach_are_told(tmp_path: Path) -> None:
    """What is closed to others, and what is temporary: there a service sees files of its own."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    service = plan_service(
        "bot:agent", Config(), name=None, account=None, user=False, http=None, socket=False,
        credentials=(),
    )  # fmt: skip
    told = list(doubts(attrs.evolve(service, folder=closed), {}))
    assert any(line.startswith(f"{closed} is a temporary file") for line in told)
    assert any("name an account that may read it with --as" in line for line in told)
    assert not [line for line in doubts(attrs.evolve(service, account="ada"), {}) if "--as" in line]
    assert not list(doubts(attrs.evolve(service, user=True), {}))


# ----- what systemd says of it


def needs_analyze() -> None:
    """Skip, saying what is missing."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze: apt-get install systemd")


def written_units(
    install: Install, folder: Path, *words: str, http: str = "127.0.0.1:8080"
) -> list[str]:
    """The units, as files in a folder; their paths."""
    text = install("bot.py:agent", "--http", http, "--socket", *words, "--print")
    service, socket = (f"[Unit]{part}" for part in text.split("[Unit]")[1:])
    folder.mkdir()
    paths = [folder / "bot.service", folder / "bot.socket"]
    paths[0].write_text(service.partition("# Written")[0])
    paths[1].write_text(socket)
    return [str(path) for path in paths]


def analyze(*words: str) -> str:
    """What systemd-analyze has to say, in all."""
    done = subprocess.run(
        ["systemd-analyze", *words],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
        env=os.environ | {"SYSTEMD_COLORS": "0", "XDG_RUNTIME_DIR": gettempdir()},
    )  # fmt: skip
    assert done.returncode == 0, done
    return done.stdout + done.stderr


@pytest.mark.parametrize("words", [[], ["--user"], ["--as", "root", "--store", "x.db"]])
def test_systemd_reads_every_line(install: Install, tmp_path: Path, words: list[str]) -> None:
    """Also with a path that takes quoting."""
    needs_analyze()
    odd = tmp_path / '50% of $HOME "and" it\'s'
    odd.mkdir()
    shutil.copy(tmp_path / "bot.py", odd)
    os.chdir(odd)
    paths = written_units(install, tmp_path / "units", *words)
    manager = ["--user"] if "--user" in words else []
    told = analyze(*manager, "verify", "--man=no", "--recursive-errors=no", *paths)
    # What is wrong in the machine's own units is not ours.
    assert [line for line in told.splitlines() if "bot.s" in line] == []


def test_the_exposure_is_the_one_that_the_page_states(install: Install, tmp_path: Path) -> None:
    needs_analyze()
    stated = re.search(r"exposure of \*\*(\d\.\d)\*\*", PAGE.read_text())
    assert stated is not None
    service, _ = written_units(install, tmp_path / "units")
    told = analyze("security", "--offline=true", "--no-pager", service)
    measured = re.search(r"Overall exposure level for bot.service: (\d+\.\d)", told)
    assert measured is not None, told
    # Beneath somebody's home (--protect-home=read-only) it is a tenth more.
    assert float(measured[1]) <= float(stated[1])


def test_the_page_shows_what_is_written(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the paths of whoever wrote it, and its digest."""
    monkeypatch.setattr(_install_module, "systemd_version", lambda: 252)
    block = re.search(r"```ini\n(.*?)```", PAGE.read_text(), re.S)
    assert block is not None
    shown = setting_lines(block[1])
    made = setting_lines(install("bot.py:agent", "--print"))
    assert shown.keys() == made.keys()
    ours = {"Description", "ExecStart", "WorkingDirectory", "ProtectHome"}
    assert {k: v for k, v in shown.items() if k not in ours} == {
        k: v for k, v in made.items() if k not in ours
    }


def setting_lines(unit: str) -> dict[str, list[str]]:
    """Every setting of a unit, and all its values."""
    told: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", unit, re.M):
        told.setdefault(name, []).append(value)
    return told


# ----- a real systemd


BOT = """
import os, time
async def agent(turn):
    if turn.text == "block" and not turn.resumed:
        time.sleep(600)
    return f"{turn.text} {turn.attempt} {os.getuid()}"
"""


@contextmanager
def real_systemd(folder: Path) -> Generator[Systemd]:
    """One of our own, or skip."""
    try:
        check_machine()
        campaign.try_boot()
    except Skip as skip:
        pytest.skip(str(skip))
    with Systemd(folder) as systemd:
        yield systemd


class Talk:
    """A fifo to a service's standard input, and what comes out of it."""

    def __init__(self, folder: Path) -> None:
        self.fifo = folder / "in.fifo"
        self.out = folder / "out.jsonl"
        os.mkfifo(self.fifo)
        self._fd = os.open(self.fifo, os.O_RDWR)

    def send(self, session: str, id: str, text: str) -> None:
        """Hand in a message."""
        line = json.dumps({"session": session, "id": id, "text": text})
        os.write(self._fd, f"{line}\n".encode())

    def replies(self) -> list[str]:
        """The texts that were said, so far."""
        lines = self.out.read_text().splitlines() if self.out.exists() else []
        events = [json.loads(line) for line in lines if line.startswith("{")]
        return [event["text"] for event in events if event["event"] == "reply"]

    def expect(self, text: str) -> str:
        """Wait for a reply that begins so."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for reply in self.replies():
                if reply.startswith(text):
                    return reply
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} in {self.replies()}")

    def close(self) -> None:
        """Hang up."""
        os.close(self._fd)


def lives_in(store: Path) -> int:
    """How many lives have recovered."""
    with closing(apsw.Connection(str(store), flags=apsw.SQLITE_OPEN_READONLY)) as db:
        return int(next(iter(db.execute("SELECT count(*) FROM epoch")))[0])


def test_p05_a_real_systemd_runs_the_unit_and_its_watchdog_works(
    install: Install, tmp_path: Path
) -> None:
    """As a user that is made for it, in its sandbox: ready after recovery, its status shown, kept
    while it gives signs of life; killed when a turn blocks the loop, and that turn resumes."""
    tmp_path.chmod(0o755)  # anybody may read a bot
    (tmp_path / "bot.py").write_text(BOT)
    (tmp_path / "gateway.toml").write_text("[channels.jsonl]\n")
    name = f"trio-gateway-test-{os.getpid()}"
    unit = install("bot.py:agent", "--name", name, "--print")
    with real_systemd(tmp_path) as systemd, closing(Talk(tmp_path)) as talk:
        systemd.write_unit(f"{name}.service", unit)
        systemd.write_unit(f"{name}.service.d/test.conf", in_this_place(tmp_path, talk))
        state = Path(f"/var/lib/private/{name}")
        try:
            systemd.ctl("start", name)
            assert lives_in(state / "gateway.db") == 1, "ready before it had recovered"
            talk.send("ada", "m1", "hello")
            uid = int(talk.expect("hello 1").split()[-1])
            assert 61184 <= uid <= 65519  # where systemd makes users
            watch_it_live(systemd, name)
            talk.send("bob", "m2", "block")
            talk.send("ada", "m3", "meanwhile")
            talk.expect("block 2")
            talk.expect("meanwhile")
            assert lives_in(state / "gateway.db") == 2
            assert int(systemd.show(name, "NRestarts")["NRestarts"]) == 1
            assert "reception only permitted" not in systemd.console
            systemd.ctl("stop", name)
            assert systemd.show(name, "Result")["Result"] == "success"
            assert [reply.rpartition(" ")[0] for reply in talk.replies()].count("hello 1") == 1
        except AssertionError as error:
            error.add_note(systemd.console[-2000:])
            error.add_note(
                (tmp_path / "log.txt").read_text()[-2000:] if state.exists() else "no state"
            )
            raise
        finally:
            systemd.die()
            shutil.rmtree(state, ignore_errors=True)
            Path(f"/var/lib/{name}").unlink(missing_ok=True)


def test_p05_a_service_of_a_real_systemd_is_asked_reloaded_and_restarted(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From outside of its sandbox, as root, over the socket beside its store."""
    tmp_path.chmod(0o755)
    (tmp_path / "bot.py").write_text(BOT)
    (tmp_path / "gateway.toml").write_text("[channels.jsonl]\n")
    name = f"trio-gateway-test-control-{os.getpid()}"
    unit = install("bot.py:agent", "--name", name, "--print")
    log = tmp_path / "log.txt"
    with real_systemd(tmp_path) as systemd, closing(Talk(tmp_path)) as talk:
        systemd.write_unit(f"{name}.service", unit)
        systemd.write_unit(f"{name}.service.d/test.conf", in_this_place(tmp_path, talk))
        state = Path(f"/var/lib/private/{name}")
        store = ["--store", str(state / "gateway.db")]
        try:
            systemd.ctl("start", name)
            assert main(["status", "--json", *store]) == 0
            told = json.loads(capsys.readouterr().out)
            assert (told["supervisor"], told["state"]) == ("systemd", "serving")
            text = '[channels.jsonl]\n[limits]\nmessage_bytes = 4\n[log]\nlevel = "debug"\n'
            (tmp_path / "gateway.toml").write_text(text)
            systemd.ctl("reload", name)
            wait_for_text(log, '"reloaded"')
            assert systemd.show(name, "ActiveState")["ActiveState"] == "active"
            assert main(["reload", *store]) == 0
            assert "nothing has changed" in capsys.readouterr().out
            assert main(["restart", *store]) == 0
            assert "serves, epoch 2" in capsys.readouterr().out
            assert int(systemd.show(name, "NRestarts")["NRestarts"]) == 1
            assert main(["stop", *store]) == 0
            told = systemd.show(name, "Result", "ActiveState")
            assert (told["Result"], told["ActiveState"]) == ("success", "inactive")
        except AssertionError as error:
            error.add_note(systemd.console[-2000:])
            error.add_note(log.read_text()[-2000:] if log.exists() else "no log")
            raise
        finally:
            systemd.die()
            shutil.rmtree(state, ignore_errors=True)
            Path(f"/var/lib/{name}").unlink(missing_ok=True)


def wait_for_text(file: Path, text: str) -> None:
    """Wait until a file has this text."""
    deadline = time.monotonic() + PATIENCE
    while not file.exists() or text not in file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


SERVES = """
import os, socket
from trio_gateway._activation import listen_fds
(name, (listener,)), = listen_fds().items()
while True:
    connection, _ = listener.accept()
    connection.sendall(f"{name} {os.getpid()}".encode())
    connection.close()
"""


def test_a_real_systemd_keeps_the_address_open(install: Install, tmp_path: Path) -> None:
    """By the .socket unit: the first connection starts the service, which finds the socket by its
    name; and one that comes while it is dead waits for the next life."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (tmp_path / "serves.py").write_text(SERVES)
    words = ["--name", "door", "--as", "root", "--store", "x.db"]
    service, listening = written_units(install, tmp_path / "made", *words, http=address)
    with real_systemd(tmp_path) as systemd, closing(Talk(tmp_path)) as talk:
        systemd.write_unit("door.service", Path(service).read_text())
        systemd.write_unit("door.socket", Path(listening).read_text())
        for unit in ("door.service", "door.socket"):
            systemd.write_unit(f"{unit}.d/test.conf", "[Unit]\nDefaultDependencies=no\n")
        program = f"ExecStart=\nExecStart={sys.executable} {tmp_path}/serves.py\n"
        systemd.write_unit(
            "door.service.d/z.conf",
            f"{in_this_place(tmp_path, talk)}\nWatchdogSec=0\nType=exec\n{program}",
        )
        systemd.ctl("start", "door.socket")
        assert systemd.show("door.service", "ActiveState")["ActiveState"] == "inactive"
        name, first = ask(address).split()
        assert name == "http"
        systemd.ctl("kill", "--signal=KILL", "door.service")
        deadline = time.monotonic() + PATIENCE
        while systemd.show("door.service", "MainPID")["MainPID"] == first:
            # Until it is dead it could take the connection with it.
            assert time.monotonic() < deadline
        name, second = ask(address).split()
        assert name == "http"
        assert first != second


def ask(address: str) -> str:
    """Connect, and read all that is said."""
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        return connection.recv(100).decode()


def in_this_place(folder: Path, talk: Talk) -> str:
    """A drop-in: a shorter watchdog, somebody to talk to, and the files of this test and of this
    Python where a user of its own can reach them."""
    reach = " ".join({sys.base_prefix, sys.prefix, str(ROOT), str(folder)})
    return f"""
[Unit]
DefaultDependencies=no
After=
Wants=
[Service]
WatchdogSec=5s
RestartSec=50ms
ProtectHome=tmpfs
BindReadOnlyPaths={reach}
Environment=PYTHONPATH={os.environ.get("PYTHONPATH", "")} PYTHONDONTWRITEBYTECODE=1
StandardInput=file:{talk.fifo}
StandardOutput=append:{talk.out}
StandardError=append:{folder}/log.txt
"""


def watch_it_live(systemd: Systemd, name: str) -> None:
    """Longer than its watchdog waits: the same process, and a status that says what it does."""
    pid = gateway_below(systemd.pid)
    time.sleep(6)
    assert gateway_below(systemd.pid) == pid
    assert systemd.show(name, "NRestarts", "StatusText") == {
        "NRestarts": "0",
        "StatusText": "serving: turns running 0, messages open 0, replies on their way 0",
    }
