"""The way in from the shell: one call in, one exit code out. The commands are in `_commands`.

0 done · 1 failed · 2 not understood · 3 no gateway runs that could be asked · 75 start me again ·
78 the configuration or the agent cannot be used, so do not start me again · 130 interrupted
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from ._control import NoGateway
from ._errors import AgentNotUsable, ConfigError, GatewayError, escape
from ._logs import redact, secrets_in
from ._signals import SignalDesk
from .channels._fds import keep_standard_fds

EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2
EXIT_NO_GATEWAY: Final = 3
EXIT_CONFIG: Final = 78
EXIT_INTERRUPTED: Final = 130


class UsageError(GatewayError):
    """The command line was not understood."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code for the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    keep_standard_fds()
    # Before anything slow is imported, and before the agent is: a signal counts from here on.
    signals = _take_signals() if words[:1] == ["run"] else None
    return _guarded(lambda: _call(words, signals))


def _take_signals() -> SignalDesk:
    signals = SignalDesk()
    signals.install()
    return signals


def _call(words: list[str], signals: SignalDesk | None) -> int:
    from ._commands import call

    return call(words, signals)


def _guarded(command: Callable[[], int]) -> int:
    try:
        return command()
    except UsageError as error:
        _complain(f"{error}\nsee trio-gateway --help")
        return EXIT_USAGE
    except NoGateway as error:
        _complain(str(error))
        return EXIT_NO_GATEWAY
    except (ConfigError, AgentNotUsable) as error:
        _complain(str(error))
        return EXIT_CONFIG
    except GatewayError as error:
        _complain(str(error))
        return EXIT_FAILURE
    except BrokenPipeError:
        # Whoever read the answer has seen enough. Python must not try to flush the rest.
        _turn_away_stdout()
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _complain(text: str) -> None:
    """One line each on standard error; nothing in it that is secret or that a terminal obeys."""
    if sys.stderr is None:  # closed by whoever started us; print would take standard output
        return
    with suppress(OSError, ValueError):
        for line in redact(text, secrets_in(os.environ)).splitlines():
            print(f"trio-gateway: {escape(line)}", file=sys.stderr)  # noqa: T201


def _turn_away_stdout() -> None:
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
