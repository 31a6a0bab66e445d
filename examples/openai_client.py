"""An agent behind the OpenAI API, and a client that reads its answer to the end, whatever happens.

The client is OpenAI's own: `pip install openai`. It takes two terminals. Try:

    trio-gateway run examples/openai_client.py:agent --http 127.0.0.1:8080
    OPENAI_API_KEY=$(trio-gateway token) python examples/openai_client.py

and kill the gateway in the middle of the story (`kill -9`). The client waits; start the gateway
again, and it goes on behind the last letter that it has shown.

OPENAI_BASE_URL is another address than http://127.0.0.1:8080/v1, STORY_PACE the seconds from one
word to the next (0.3 by default).
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import trio

from trio_gateway import Turn

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.responses import ResponseStreamEvent

STORY = (
    "Once upon a time there was a gateway. It was stopped, killed and unplugged, and whenever it"
    " came back, it knew what it had promised. And if nobody has deleted its store, it still does."
)
PACE = float(os.environ.get("STORY_PACE", "0.3"))

ENDS = ("response.completed", "response.failed", "response.incomplete")


async def agent(turn: Turn) -> str:
    """Tells a story, and shows how it grows."""
    for place, letter in enumerate(STORY):
        if letter == " ":
            turn.progress(STORY[:place], draft=True)
            await trio.sleep(PACE)
    return STORY


def show(event: ResponseStreamEvent) -> None:
    """Show what an event adds."""
    if event.type == "response.output_text.delta":
        sys.stdout.write(event.delta)
    elif event.type == "response.output_item.done":
        sys.stdout.write("\n")
    sys.stdout.flush()


def read(client: OpenAI, text: str) -> None:
    """Ask, and go on behind the last event as often as the stream breaks."""
    from openai import APIError

    name, seen = "", -1
    while True:
        try:
            if name:
                stream = client.responses.retrieve(name, stream=True, starting_after=seen)
            else:
                stream = client.responses.create(model="trio-gateway", input=text, stream=True)
            with stream:
                for event in stream:
                    if event.type == "response.created":
                        name = event.response.id
                    if (number := getattr(event, "sequence_number", None)) is not None:
                        seen = number
                    show(event)
                    if event.type in ENDS:
                        return
        except APIError:
            if not name:
                raise  # nobody knows whether it was accepted; an Idempotency-Key would tell
        time.sleep(0.3)


def main() -> None:
    """Ask for a story."""
    try:
        from openai import OpenAI
    except ModuleNotFoundError:
        sys.exit("this needs OpenAI's client: pip install openai")
    url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8080/v1")
    with OpenAI(base_url=url) as client:
        read(client, "Tell me a story.")


if __name__ == "__main__":
    main()
