"""Draws `top.svg`: what `trio-gateway top` shows of the gateway that has a store.

python docs/images/top.py gateway.db >docs/images/top.svg
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from trio_gateway._control_client import connected
from trio_gateway._top import ROWS, frame

with connected(Path(sys.argv[1]).absolute()) as control:
    told = control.ask("overview", rows=ROWS)
console = Console(record=True, width=100, file=sys.stderr, force_terminal=True)
console.print(frame(told, 40))
svg = console.export_svg(title="trio-gateway top", theme=MONOKAI)
# The machine's own fonts will do; a picture loads nothing from elsewhere.
svg = re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)
sys.stdout.write("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")
