"""The Dockerfile, the compose file and the Kubernetes manifest in deploy/ agree with each other,
with the configuration and with the code: deadlines, paths, ports, users, probes. They are read,
and not run."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import yaml

from trio_gateway._allowance import MARGIN, STOP_LIMIT, warnings_at_start
from trio_gateway._commands import app
from trio_gateway._config import Config, load_config, parse_duration
from trio_gateway._policy import Allowance, allow, plan_stop
from trio_gateway._signals import STOPS

DEPLOY = Path(__file__).parents[1] / "deploy"
BUDGET = "TRIO_GATEWAY_DRAIN__BUDGET"
NOWHERE = Path("/dev/null")
"""An empty configuration."""

Words = tuple[str, ...]


# ----- reading


@attrs.frozen
class Image:
    """What a Dockerfile says of the image, in its last stage."""

    lines: tuple[tuple[str, str], ...]

    def of(self, name: str) -> str:
        """The one instruction of that name."""
        (value,) = (value for key, value in self.lines if key == name)
        return value

    def words(self, name: str) -> Words:
        """The same, as it is written for no shell."""
        return tuple(json.loads(self.of(name)))

    @property
    def environ(self) -> dict[str, str]:
        """The variables that it sets."""
        return dict(re.findall(r'(\w+)="([^"]*)"', self.of("ENV")))

    @property
    def health(self) -> tuple[dict[str, float], Words]:
        """The options of its health check in seconds or times, and what is run."""
        options, _, command = self.of("HEALTHCHECK").partition("CMD ")
        told = dict(re.findall(r"--([\w-]+)=(\w+)", options))
        return {name: seconds(text) for name, text in told.items()}, tuple(json.loads(command))


def seconds(text: str) -> float:
    """Of a duration; or a plain number."""
    return float(text) if text.isdecimal() else parse_duration(text).total_seconds()


def image() -> Image:
    """The image of the Dockerfile."""
    text = (DEPLOY / "Dockerfile").read_text()
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.M))
    stage = joined[joined.rindex("FROM ") :]
    pairs = (line.split(None, 1) for line in stage.splitlines() if line.strip())
    return Image(tuple((name, " ".join(value.split())) for name, value in pairs))


@attrs.define
class Files:
    """All of them."""

    image: Image
    compose: dict[str, Any]
    service: dict[str, Any]
    stateful: dict[str, Any]

    @property
    def pod(self) -> dict[str, Any]:
        """What a pod is made of."""
        pod: dict[str, Any] = self.stateful["spec"]["template"]["spec"]
        return pod

    @property
    def container(self) -> dict[str, Any]:
        """The one container of a pod."""
        (container,) = self.pod["containers"]
        return dict(container)

    def config(self) -> Config:
        """The configuration that a gateway of the image has."""
        return load_config(NOWHERE, self.image.environ)

    def allowance(self) -> Allowance:
        """What such a gateway is to be allowed."""
        told = self.config().sections
        return allow(plan_stop(told.drain.grace, told.drain.budget), told.resume)


def files() -> Files:
    """What stands in deploy/."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service, stateful = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return Files(image(), compose["services"]["gateway"], service, stateful)


# ----- checking


def disagreements(told: Files) -> Iterator[str]:
    """What does not fit."""
    for check in CHECKS:
        try:
            check(told)
        except AssertionError as error:
            yield f"{check.__name__}: {error}"


def stops(told: Files) -> None:
    """Whoever stops it waits for as long as is derived from the budget, and says so to it."""
    allowed, config = told.allowance(), told.config().sections.drain
    budget = plan_stop(config.grace, config.budget).budget
    grace = told.pod["terminationGracePeriodSeconds"]
    (limit,) = [one["value"] for one in told.container["env"] if one["name"] == STOP_LIMIT]
    assert seconds(told.compose["stop_grace_period"]) == allowed.stop
    assert grace == allowed.stop >= budget + MARGIN
    for said in (limit, told.compose["environment"][STOP_LIMIT]):
        assert seconds(said) == allowed.stop
        assert warnings_at_start(budget, {STOP_LIMIT: said}) == []
    assert f"--stop-timeout {allowed.stop} " in (DEPLOY / "Dockerfile").read_text()
    assert "lifecycle" not in told.container, "a preStop is part of the grace"


def signals(told: Files) -> None:
    """The signal that stops it is one that it takes, and reaches it past number 1."""
    assert told.compose["stop_signal"] == told.image.of("STOPSIGNAL")
    assert signal.Signals[told.image.of("STOPSIGNAL")] in STOPS
    assert told.image.words("ENTRYPOINT") == ("tini", "--")
    assert not {"command", "entrypoint"} & told.compose.keys()
    assert not {"command", "args"} & told.container.keys()


def restarts(told: Files) -> None:
    """It is started again after 75."""
    assert told.compose["restart"] in ("always", "unless-stopped")
    assert told.pod.get("restartPolicy", "Always") == "Always"
    assert told.stateful["spec"]["replicas"] == 1, "a store has one gateway"


def commands(told: Files) -> None:
    """What is started is our command, with arguments that it takes."""
    program, *words = told.image.words("CMD")
    assert program == "trio-gateway"
    assert words[-2] == "--http"
    _, bound, _ = app.parse_args(words[:-2], print_error=False, exit_on_error=False)
    assert bound.args == ("/app/bot.py:agent",)


def stores(told: Files) -> None:
    """The store is on a volume; all else cannot be written, but for what is temporary."""
    folder = str(told.config().sections.store.path.parent)
    mounts = {one["name"]: one["mountPath"] for one in told.container["volumeMounts"]}
    (claim,) = told.stateful["spec"]["volumeClaimTemplates"]
    assert (folder,) == told.image.words("VOLUME")
    assert told.compose["volumes"] == [f"store:{folder}"]
    assert mounts == {claim["metadata"]["name"]: folder, "tmp": "/tmp"}
    assert told.compose["tmpfs"] == ["/tmp"]
    assert told.compose["read_only"] is True
    assert told.container["securityContext"]["readOnlyRootFilesystem"] is True


def rights(told: Files) -> None:
    """It is nobody, and becomes nobody else."""
    user, group = told.image.of("USER").split(":")
    context, own = told.pod["securityContext"], told.container["securityContext"]
    assert told.compose["user"] == f"{user}:{group}"
    assert int(user) == context["runAsUser"] > 0
    assert int(group) == context["runAsGroup"] == context["fsGroup"]
    assert f"-o {user} -g {group} -m 0700" in told.image.of("RUN")
    assert context["runAsNonRoot"]
    assert not own["allowPrivilegeEscalation"]
    assert own["capabilities"] == {"drop": told.compose["cap_drop"]} == {"drop": ["ALL"]}


def ports(told: Files) -> None:
    """One port, everywhere."""
    port = told.image.of("EXPOSE")
    assert told.image.words("CMD")[-1] == f"0.0.0.0:{port}"
    assert told.compose["ports"] == [f"127.0.0.1:{port}:{port}"]
    (named,) = told.container["ports"]
    (offered,) = told.service["spec"]["ports"]
    assert named["containerPort"] == int(port)
    assert offered["targetPort"] == named["name"]
    assert (
        told.service["spec"]["selector"] == told.stateful["spec"]["template"]["metadata"]["labels"]
    )


def probes(told: Files) -> None:
    """Each asks what it is to ask, and is as patient as the derived deadlines."""
    allowed, port = told.allowance(), told.image.of("EXPOSE")
    for name, path in (
        ("startup", "/startupz"),
        ("liveness", "/healthz"),
        ("readiness", "/readyz"),
    ):
        probe = told.container[f"{name}Probe"]
        assert probe["httpGet"]["path"] == path
        assert probe["httpGet"]["port"] == told.container["ports"][0]["name"]
        assert {"name": "Host", "value": f"127.0.0.1:{port}"} in probe["httpGet"]["httpHeaders"]
        assert probe["timeoutSeconds"] <= probe["periodSeconds"]
    assert patience(told.container["startupProbe"]) >= allowed.start
    assert patience(told.container["livenessProbe"]) >= allowed.watchdog
    options, command = told.image.health
    assert f"http://127.0.0.1:{port}/healthz" in command[-1]
    assert options["interval"] * options["retries"] >= allowed.watchdog
    assert options["start-period"] >= allowed.start
    health = told.compose["healthcheck"]
    assert f"http://127.0.0.1:{port}/readyz" in health["test"][-1]
    assert seconds(health["start_period"]) >= allowed.start


def patience(probe: dict[str, Any]) -> float:
    """Seconds until a probe has failed for good."""
    return float(probe["periodSeconds"] * probe["failureThreshold"])


CHECKS: tuple[Callable[[Files], None], ...] = (
    stops, signals, restarts, commands, stores, rights, ports, probes,
)  # fmt: skip


def test_p11_what_is_in_deploy_agrees() -> None:
    assert list(disagreements(files())) == []


def set_in_image(name: str, old: str, new: str) -> Callable[[Files], None]:
    """A change of the Dockerfile."""

    def change(told: Files) -> None:
        lines = [(key, v.replace(old, new) if key == name else v) for key, v in told.image.lines]
        assert lines != list(told.image.lines)
        told.image = Image(tuple(lines))

    return change


@pytest.mark.parametrize(
    ("change", "who"),
    [
        (set_in_image("ENV", 'PYTHONDONTWRITEBYTECODE="1"', f'{BUDGET}="35s"'), "stops"),
        (lambda told: told.pod.update(terminationGracePeriodSeconds=30), "stops"),
        (lambda told: told.compose.update(stop_grace_period="10s"), "stops"),
        (lambda told: told.compose["environment"].update({STOP_LIMIT: "50s"}), "stops"),
        (set_in_image("STOPSIGNAL", "SIGTERM", "SIGUSR2"), "signals"),
        (set_in_image("ENTRYPOINT", '"tini", "--"', '"sh", "-c"'), "signals"),
        (lambda told: told.compose.update(restart="no"), "restarts"),
        (lambda told: told.stateful["spec"].update(replicas=2), "restarts"),
        (set_in_image("ENV", "/data/gateway.db", "/app/gateway.db"), "stores"),
        (set_in_image("VOLUME", "/data", "/store"), "stores"),
        (set_in_image("USER", "10001:10001", "0:0"), "rights"),
        (set_in_image("EXPOSE", "8080", "8081"), "ports"),
        (lambda told: told.container["livenessProbe"].update(failureThreshold=1), "probes"),
        (lambda told: told.container["livenessProbe"]["httpGet"].update(path="/readyz"), "probes"),
    ],
)  # fmt: skip
def test_a_change_in_one_place_is_noticed(change: Callable[[Files], None], who: str) -> None:
    told = files()
    change(told)
    assert who in {line.partition(":")[0] for line in disagreements(told)}
