"""Agents that are not Python functions: what can be given to `open_gateway` instead of one.

`ProcessAgent` runs a program in any language, one process for each attempt of a turn.
`OpenAIAgent` asks a model at any OpenAI-compatible server, which may use functions as tools.
"""

from ._lines import ProcessFailed
from ._talk import ModelFailed
from ._tool import Tool, tool
from .openai_ import OpenAIAgent
from .process import DEFAULT_ENV, ProcessAgent

__all__ = [
    "DEFAULT_ENV",
    "ModelFailed",
    "OpenAIAgent",
    "ProcessAgent",
    "ProcessFailed",
    "Tool",
    "tool",
]
