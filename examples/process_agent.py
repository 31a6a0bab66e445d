"""An agent in another language: a shell script that counts words, and counts each message once.

Try:

    trio-gateway run examples/process_agent.py:agent

and say something. `process_agent.sh` gets one process for each turn, and talks with the gateway in
JSON lines; docs/process-agent.md has all of them. While it counts, kill the gateway from another
terminal (`kill -9`): no script is left behind. Start it again, and the script goes on: it does not
count again what it has counted (`counted.log`, in the folder that you are in, is its own book).

The script sees no more of the gateway's environment than is named here. WORDS_PACE is how many
seconds it takes over its answer (1 by default).
"""

from __future__ import annotations

from pathlib import Path

from trio_gateway.agents import DEFAULT_ENV, ProcessAgent

SCRIPT = Path(__file__).with_name("process_agent.sh")

agent = ProcessAgent(["sh", str(SCRIPT)], env=(*DEFAULT_ENV, "WORDS_PACE"))
