"""What must be so of the site, or its build fails: every public name is told about, and nothing
that a page loads comes from another host."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from docstrings import MODULES, public_names
from sphinx.util.logging import getLogger

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

LOADED: Final = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=["'](?:https?:)?//[^"']+
      | <link\b(?=[^>]*\brel=["'](?:stylesheet|preload|icon|shortcut\ icon|preconnect))
             [^>]*\bhref=["'](?:https?:)?//[^"']+
      | (?:@import\s+|url\()\s*["']?(?:https?:)?//[^"')]+""",
    re.X,
)
logger = getLogger(__name__)


def setup(app: Sphinx) -> dict[str, bool]:
    """Look when all is read, and when all is written."""
    app.connect("env-check-consistency", _every_name_is_told)
    app.connect("build-finished", _nobody_else_is_asked)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _every_name_is_told(_app: Sphinx, env: BuildEnvironment) -> None:
    told, homes = env.domains.python_domain.objects, public_names()
    for module in map(importlib.import_module, MODULES):
        for name in getattr(module, "__all__", ()):
            if homes[f"{module.__name__}.{name}"] not in told:
                logger.warning("%s.%s is public, and not in the reference", module.__name__, name)


def _nobody_else_is_asked(app: Sphinx, failure: Exception | None) -> None:
    if failure is not None or app.builder.format != "html":
        return
    for path in sorted(Path(app.outdir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for found in LOADED.findall(path.read_text(errors="replace")):
                logger.warning("%s loads %s", path.relative_to(app.outdir), found)
