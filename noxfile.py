"""What is checked before a change is done: `nox` runs all of it, `nox -s tests-3.12` one part.

A Python that is not installed is skipped, except where CI is set: there it is an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = "CI" in os.environ
nox.options.sessions = [
    "lint", "types", "tests", "tests_trio", "examples", "docs", "build", "bench", "proof", "crash",
]  # fmt: skip

PYTHONS = ["3.11", "3.12", "3.13"]
OLDEST_TRIO = "trio==0.32.0"
CAMPAIGNS = [
    "systemd", "power", "bad-input", "soak", "door", "resources", "machine", "supervisors",
    "contract",
]  # fmt: skip
"""What fits, in the size of CI, into twenty minutes on two cores that others use as well."""
LONG_CAMPAIGNS = ["lives", "kill-io", "disk", "kill-syscalls"]
"""What takes as long by itself."""
GROUPS = nox.project.dependency_groups
PROJECT = nox.project.load_toml("pyproject.toml")


def _offer_pyenv_pythons() -> None:
    """Let pyenv's `python3.12` and the like start: its shims know only versions that are chosen."""
    if os.environ.get("PYENV_VERSION") or shutil.which("pyenv") is None:
        return
    chosen = _words("pyenv", "version-name")
    installed = _words("pyenv", "versions", "--bare", "--skip-aliases")
    wanted = [v for v in installed if v.rpartition(".")[0] in PYTHONS and v not in chosen]
    os.environ["PYENV_VERSION"] = ":".join([*chosen, *wanted])


def _words(*command: str) -> list[str]:
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return output.replace(":", " ").split()


_offer_pyenv_pythons()


@nox.session
def lint(session: nox.Session) -> None:
    """Style, and what is easily done wrong in Trio."""
    session.install(*GROUPS(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("flake8-async", *map(str, Path("trio_gateway").rglob("*.py")))


@nox.session
def types(session: nox.Session) -> None:
    """Types, by two checkers, and that nothing public is without one."""
    session.install("-e", ".[test]", *GROUPS(PROJECT, "types"))
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--verifytypes", "trio_gateway", "--ignoreexternal")


def _test(session: nox.Session) -> None:
    """Run the tests. In CI, what fails in company is tried once more, alone: a machine that others
    use as well is no verdict. What fails twice is one."""
    try:
        session.run("pytest", *(session.posargs or ["-n", "2"]))
    except CommandFailed:
        if "CI" not in os.environ:
            raise
        session.warn("once more, alone: what failed")
        session.run("pytest", "-n", "0", "--last-failed", "--last-failed-no-failures", "none")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests, on every Python. Arguments go to pytest."""
    session.install("-e", ".[test]")
    _test(session)


@nox.session(python="3.12")
@nox.parametrize("trio", [OLDEST_TRIO, "trio"], ids=["oldest", "newest"])
def tests_trio(session: nox.Session, trio: str) -> None:
    """The tests, on the oldest Trio that is allowed, and on the newest."""
    session.install("-e", ".[test]")
    session.install("--upgrade", trio)
    _test(session)


@nox.session
def examples(session: nox.Session) -> None:
    """Every example, run as a process; README's bot and transcript, every listing of the site."""
    session.install("-e", ".[test]")
    files = ["examples", "example_approval", "example_polling", "readme", "docs", "docs_run",
             "tutorial"]  # fmt: skip
    session.run("pytest", *(f"tests/test_{file}.py" for file in files), *session.posargs)


@nox.session(python="3.12")
def docs(session: nox.Session) -> None:
    """The site, in docs/_build/html; a warning is an error. Arguments go to sphinx-build."""
    session.install("-e", ".[test]", *GROUPS(PROJECT, "docs"))
    session.run("sphinx-build", "-b", "html", "-E", "-W", "--keep-going", "-n", "-q",
                *session.posargs, "docs", "docs/_build/html")  # fmt: skip
    print("docs/_build/html/index.html")


@nox.session
def build(session: nox.Session) -> None:
    """The wheel, installed by itself, works from another folder."""
    session.install("build")
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder)
    session.run("python", "-m", "build", "--outdir", str(folder / "dist"))
    (wheel,) = (folder / "dist").glob("*.whl")
    session.run("python", "-m", "venv", str(folder / "venv"))
    bin_folder = folder / "venv" / "bin"
    session.run(str(bin_folder / "pip"), "install", "--quiet", str(wheel), external=True)
    shutil.copy("examples/echo.py", folder)
    with session.chdir(folder):
        session.run(str(bin_folder / "trio-gateway"), "--version", external=True)
        _expect_echo(session, bin_folder / "trio-gateway")


def _expect_echo(session: nox.Session, command: Path) -> None:
    """`echo hello | trio-gateway run echo.py:agent`, as a stranger would."""
    done = subprocess.run(
        [command, "run", "echo.py:agent"],
        input="hello\n", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode or done.stdout != "hello\n":
        session.error(f"echo answered {done.stdout!r} ({done.returncode})\n{done.stderr}")


@nox.session
def bench(session: nox.Session) -> None:
    """The figures: ratios to a bare program that makes the same commits. One JSON object."""
    session.install("-e", ".[http]")
    session.run("python", "-m", "benchmarks", "floor", "--json", *session.posargs)


# ----- the proof: what a machine cannot run is skipped, and says so


def _prove(session: nox.Session, *args: str) -> None:
    session.install("-e", ".[test]", *GROUPS(PROJECT, "proof"))
    session.run("python", "-m", "proof", *args, *session.posargs)


@nox.session
def proof(session: nox.Session) -> None:
    """What CI runs: every campaign, those that take long in small. One JSON line each."""
    _prove(session, *CAMPAIGNS, "--at-once", "2")
    _prove(session, *LONG_CAMPAIGNS, "--at-once", "2", "--size", "quick")


@nox.session
def crash(session: nox.Session) -> None:
    """Every commit of two scenarios is killed, and every commit of their recoveries."""
    session.install("-e", ".[test]")
    session.run("pytest", "tests/crash", "-m", "crash", *session.posargs)


@nox.session(name="proof-long")
def proof_long(session: nox.Session) -> None:
    """What CI runs in small, in its whole size; then every campaign in the size for a long run,
    which takes hours. Arguments go to both: `nox -s proof-long -- --out figures.jsonl`."""
    _prove(session, *LONG_CAMPAIGNS, "--at-once", "2")
    _prove(session, "all", "--at-once", "2", "--size", "long")


for name in CAMPAIGNS + LONG_CAMPAIGNS:

    @nox.session(name=name)
    def campaign(session: nox.Session, name: str = name) -> None:
        """One campaign; arguments go to it: `nox -s lives -- --only 17`."""
        _prove(session, name)


@nox.session
def mutants(session: nox.Session) -> None:
    """Deliberate breaks of a copy: each must be caught by a campaign."""
    session.install("-e", ".[test]", *GROUPS(PROJECT, "proof"))
    session.run("python", "-m", "proof.mutants", *session.posargs)
