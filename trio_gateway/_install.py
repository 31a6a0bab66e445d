"""`trio-gateway install systemd`: a unit with deadlines that are derived from the configuration.

What is written begins with a line that has a digest of the rest. So a file that somebody else
wrote, or has changed since, is known, and is not overwritten.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

import attrs

from ._config import DEFAULT, Config, variables_in
from ._errors import ConfigError, GatewayError
from ._policy import Allowance, allow, plan_stop

WRITTEN_BY: Final = "# Written by trio-gateway install systemd, sha256 "

NOTIFY_RELOAD: Final = 253
"""The version of systemd that knows `Type=notify-reload`; an older one starts nothing so."""

PATIENCE: Final = 3.0
"""Seconds that systemctl gets to say its version."""

SYSTEM_UNITS: Final = Path("/etc/systemd/system")

ANYWHERE: Final = MappingProxyType(
    {
        "UMask": "0077",
        "LimitCORE": "0",
        "NoNewPrivileges": "yes",
        "LockPersonality": "yes",
        "RestrictNamespaces": "yes",
        "RestrictRealtime": "yes",
        "RestrictSUIDSGID": "yes",
        "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK",
        "SystemCallArchitectures": "native",
        "SystemCallErrorNumber": "EPERM",
    }
)
"""The sandbox that a systemd of any kind can give."""

CALLS: Final = ("@system-service", "~@privileged @resources")
"""System calls that are allowed, and those of them that are not after all."""

MACHINE_ONLY: Final = MappingProxyType(
    {
        "CapabilityBoundingSet": "",
        "AmbientCapabilities": "",
        "DevicePolicy": "closed",
        "KeyringMode": "private",
        "PrivateDevices": "yes",
        "PrivateTmp": "yes",
        "PrivateUsers": "yes",
        "ProtectClock": "yes",
        "ProtectControlGroups": "yes",
        "ProtectHostname": "yes",
        "ProtectKernelLogs": "yes",
        "ProtectKernelModules": "yes",
        "ProtectKernelTunables": "yes",
        "ProtectProc": "invisible",
        "ProtectSystem": "strict",
        "RemoveIPC": "yes",
    }
)
"""What it takes a systemd with root's rights for: mounts, and users of its own."""


class NotOurs(GatewayError):
    """A file stands where a unit is to be written, and this program has not written it so."""


@attrs.frozen(kw_only=True)
class Service:
    """What a unit is made of. Paths are absolute."""

    name: str
    agent: str
    """As `run` takes it."""
    folder: Path
    """Where the command is given."""
    command: Sequence[str]
    """The program, before `run`."""
    allowance: Allowance
    config: Path | None = None
    store: Path | None = None
    """None: in the StateDirectory of the unit."""
    account: str | None = None
    """Whose rights it has; None: those of a user that is made for it, or one's own."""
    user: bool = False
    """For one's own systemd, instead of the machine's."""
    http: str | None = None
    """The address that the HTTP channel listens at, if it does."""
    socket: bool = False
    """Whether systemd opens that address, and keeps it open across restarts."""
    notify_reload: bool = False
    """Whether its systemd knows services that say when they have reloaded."""
    credentials: Sequence[str] = ()
    """`NAME:PATH`, each a file that is handed to the service in $CREDENTIALS_DIRECTORY."""

    def units(self) -> Mapping[str, str]:
        """The text of each unit, by the name of its file."""
        made = {f"{self.name}.service": signed(_service(self))}
        if self.socket:
            made[f"{self.name}.socket"] = signed(_socket(self))
        return MappingProxyType(made)


def plan_service(
    agent: str,
    told: Config,
    *,
    name: str | None,
    account: str | None,
    user: bool,
    http: str | None,
    socket: bool,
    credentials: Sequence[str],
) -> Service:
    """What a unit is to say that hosts `agent` as `told`. Raises `ConfigError`."""
    where, colon, what = agent.rpartition(":")
    if not (where and colon and what):
        raise ConfigError(
            f"{agent!r} names no agent; write the file and the name in it: bot.py:agent"
        )
    is_file = where.endswith(".py") or "/" in where
    if is_file and not Path(where).is_file():
        raise ConfigError(f"{where} is no file; name the file that has the agent, as bot.py:agent")
    sections = told.sections
    drain = plan_stop(sections.drain.grace, sections.drain.budget)
    service = Service(
        name=_checked_name(name or (Path(where).stem if is_file else where.rpartition(".")[2])),
        agent=f"{Path(where).absolute()}:{what}" if is_file else agent,
        folder=Path.cwd(),
        command=_program(),
        allowance=allow(drain, sections.resume),
        config=None if told.file is None else told.file.absolute(),
        store=None if told.origin("store.path") == DEFAULT else sections.store.path.absolute(),
        account=account,
        user=user,
        http=http,
        socket=socket,
        notify_reload=(systemd_version() or 0) >= NOTIFY_RELOAD,
        credentials=credentials,
    )
    _check(service)
    return service


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name):
        raise ConfigError(f"{name!r} cannot be a unit's name; give another with --name")
    return name


def _program() -> Sequence[str]:
    """How this very program is called, wherever its environment is."""
    script = Path(sys.executable).with_name("trio-gateway")
    # -P: a file in the bot's folder must not become everybody's module.
    return [str(script)] if script.exists() else [sys.executable, "-P", "-m", "trio_gateway"]


def _check(service: Service) -> None:
    if service.socket and service.http is None:
        raise ConfigError("--socket needs the address of the HTTP channel: --http 127.0.0.1:8080")
    if service.user and service.account is not None:
        raise ConfigError("--as is for the machine's systemd; with --user a service is your own")
    if not service.user and service.account is None and service.store is not None:
        raise ConfigError(
            f"store.path is {service.store}, where a user that systemd makes for the service cannot"
            f" write: leave it out (then the store is /var/lib/{service.name}/gateway.db), or name"
            " the owner of its folder with --as"
        )
    for credential in service.credentials:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}:/.+", credential):
            raise ConfigError(f"--credential {credential!r}: expected a name and a path, key:/path")


def systemd_version() -> int | None:
    """The version of this machine's systemd, if there is one."""
    systemctl = shutil.which("systemctl")
    if systemctl is None:
        return None
    try:
        done = subprocess.run(
            [systemctl, "--version"], capture_output=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.match(rb"systemd (\d{1,6})", done.stdout)
    return None if match is None else int(match[1])


# ----- the text


def _service(service: Service) -> str:
    sections = {
        "Unit": _about(service),
        "Service": [*_life(service), *_deadlines(service.allowance), *_place(service),
                    *_sandbox(service)],
        "Install": [("WantedBy", "default.target" if service.user else "multi-user.target")],
    }  # fmt: skip
    return _text(sections)


def _text(sections: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    return "\n".join(
        f"[{title}]\n" + "".join(f"{name}={value}\n" for name, value in lines)
        for title, lines in sections.items()
    )


def _about(service: Service) -> list[tuple[str, str]]:
    network = [] if service.user else [("Wants", "network-online.target")]
    after = ["network-online.target"] if network else []
    listening = [f"{service.name}.socket"] if service.socket else []
    return [
        ("Description", f"trio-gateway, {_literal(service.agent)}"),
        *network,
        *(("Requires", unit) for unit in listening),
        *(("After", " ".join(units)) for units in [[*after, *listening]] if units),
        ("StartLimitIntervalSec", str(service.allowance.interval)),
        ("StartLimitBurst", str(service.allowance.burst)),
    ]


def _life(service: Service) -> Iterator[tuple[str, str]]:
    yield "Type", "notify-reload" if service.notify_reload else "notify"
    yield "NotifyAccess", "main"
    yield "ExecStart", " ".join(_quoted(word) for word in service.command) + _arguments(service)
    if not service.notify_reload:
        yield "ExecReload", "kill -HUP $MAINPID"
    yield "WorkingDirectory", _literal(str(service.folder))
    # What agents have started ends with the gateway, and not before.
    yield "KillMode", "mixed"
    # Memory that a program of an agent's ran out of is no reason to stop the others.
    yield "OOMPolicy", "continue"
    yield "Restart", "on-failure"
    yield "RestartSec", "2"
    yield "RestartForceExitStatus", "75"
    yield "SuccessExitStatus", "75"
    yield "RestartPreventExitStatus", "78"


def _arguments(service: Service) -> str:
    state = f"%S/{service.name}/gateway.db"
    store = state if service.store is None else _quoted(str(service.store))
    config = "" if service.config is None else f" --config {_quoted(str(service.config))}"
    http = "" if service.http is None else f" --http {_quoted(service.http)}"
    return f" run {_quoted(service.agent)}{config} --store {store}{http}"


def _deadlines(allowance: Allowance) -> Iterator[tuple[str, str]]:
    yield "TimeoutStartSec", str(allowance.start)
    yield "TimeoutStopSec", str(allowance.stop)
    yield "WatchdogSec", str(allowance.watchdog)


def _place(service: Service) -> Iterator[tuple[str, str]]:
    """Who it is, and what it may write."""
    if service.account is not None:
        yield "User", service.account
    elif not service.user:
        yield "DynamicUser", "yes"
    if service.store is None:
        yield "StateDirectory", service.name
        yield "StateDirectoryMode", "0700"
    elif not service.user:
        yield "ReadWritePaths", _quoted(str(service.store.parent))
    for credential in service.credentials:
        yield "LoadCredential", _literal(credential)


def _sandbox(service: Service) -> Iterator[tuple[str, str]]:
    yield from ANYWHERE.items()
    yield from (("SystemCallFilter", calls) for calls in CALLS)
    if not service.user:
        yield from MACHINE_ONLY.items()
        at_home = any(_is_at_home(path) for path in _needed(service))
        yield "ProtectHome", "read-only" if at_home else "yes"


def _needed(service: Service) -> Iterator[Path]:
    """What it has to reach."""
    yield service.folder
    yield Path(service.command[0])
    yield Path(sys.base_prefix)
    where = service.agent.rpartition(":")[0]
    if where.startswith("/"):
        yield Path(where)
    yield from (path for path in (service.config, service.store) if path is not None)


def _is_at_home(path: Path) -> bool:
    homes = (Path("/home"), Path("/root"), Path("/run/user"))
    return any(one.is_relative_to(home) for one in (path, path.resolve()) for home in homes)


def _socket(service: Service) -> str:
    listen = [
        ("ListenStream", _literal(service.http or "")),
        ("FileDescriptorName", "http"),
        ("NoDelay", "yes"),
    ]
    return _text(
        {
            "Unit": [("Description", f"trio-gateway, {_literal(service.agent)}: its HTTP address")],
            "Socket": listen,
            "Install": [("WantedBy", "sockets.target")],
        }
    )


def _literal(text: str) -> str:
    """A value in which systemd replaces nothing."""
    if not text.isprintable():
        raise ConfigError(f"{text!r} cannot stand in a unit: rename it")
    return text.replace("%", "%%")


def _quoted(word: str) -> str:
    """A word of a command, as systemd reads it."""
    word = _literal(word)
    if re.fullmatch(r"(?a:[\w./:@%+=,-]+)", word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{escaped}"'


# ----- the files


def signed(text: str) -> str:
    """A unit under the line that says who wrote it, and what."""
    return f"{WRITTEN_BY}{_digest(text)}\n{text}"


def is_ours(text: str) -> bool:
    """Whether it is a unit as it was written, and nobody has changed it."""
    head, _, rest = text.partition("\n")
    return head == f"{WRITTEN_BY}{_digest(rest)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def unit_folder(environ: Mapping[str, str] = os.environ, *, user: bool) -> Path:
    """Where units are looked for that somebody has written: the machine's, or one's own."""
    if not user:
        return SYSTEM_UNITS
    home = environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".config"
    return Path(home) / "systemd" / "user"


def write_units(folder: Path, units: Mapping[str, str], *, force: bool) -> list[Path]:
    """Write all of them, or none. Raises `NotOurs`, and `ConfigError` where it is not possible."""
    paths = [folder / name for name in units]
    try:
        if not force:
            for path in paths:
                _check_ours(path)
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            _replace(path, units[path.name])
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder} cannot be written ({error.strerror}): do it as root, for"
            " yourself with --user, or look at the unit with --print"
        ) from error
    return paths


def _check_ours(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(kind) or not is_ours(path.read_text("utf-8", "replace")):
        raise NotOurs(
            f"{path} was not written by this command, or was changed since: keep it and put what"
            f" you need into a drop-in (systemctl edit {path.name}), or give --force"
        )


def _replace(path: Path, text: str) -> None:
    """In one step, so that nobody reads half of it."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("x", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


# ----- what to say


def next_commands(service: Service) -> list[str]:
    """What to type when the units are written."""
    ctl = "systemctl --user" if service.user else "systemctl"
    units = " ".join(sorted(service.units(), reverse=True))
    user = " --user" if service.user else ""
    linger = ["loginctl enable-linger"] if service.user else []
    return [
        f"{ctl} daemon-reload",
        f"{ctl} enable --now {units}",
        f"{ctl} status {service.name}",
        *linger,
        f"trio-gateway doctor --unit {service.name}{user}",
    ]


def doubts(service: Service, environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """What is allowed and yet not what somebody meant."""
    if found := variables_in(environ):
        yield (
            f"{', '.join(found)}: set in this shell, but not for the service; what it is to know"
            " belongs into gateway.toml"
        )
    if not service.user:
        for path in filter(_is_temporary, _needed(service)):
            yield f"{path} is a temporary file, and the service has such files of its own: move it"
    if not service.user and service.account is None:
        for path in sorted({closed for path in _needed(service) if (closed := _closed(path))}):
            yield (
                f"{path} is closed to others, and the service runs as a user of its own: name an"
                " account that may read it with --as"
            )


def _is_temporary(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in ("/tmp", "/var/tmp"))


def _closed(path: Path) -> Path | None:
    """The first folder on the way to a path, or its end, that others may not enter or read."""
    for one in (*reversed(path.parents), path):
        try:
            mode = one.stat().st_mode
        except OSError:
            return None
        if not mode & (stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH):
            return one
    return None
