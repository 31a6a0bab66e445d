"""The site: `nox -s docs` builds it, and every warning is an error.

The pages are the Markdown files of this folder, as they are read in the repository, too. What
stands elsewhere (README, ARCHITECTURE.md, examples/, deploy/, the command line's own help) is
copied into `files/` when a build begins; `_ext/` says how.
"""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "trio-gateway"
author = "the authors of trio-gateway"
project_copyright = "the authors of trio-gateway"
release = version = version_of("trio-gateway")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinxcontrib_trio",
    "copied_files",
    "docstrings",
    "promises_of_the_site",
]
exclude_patterns = ["_*"]
nitpicky = True
default_role = "literal"

# ----- Markdown

myst_enable_extensions = ["colon_fence", "deflist", "smartquotes"]
myst_heading_anchors = 3

# ----- the reference

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_use_legacy_class_based = True  # what sphinxcontrib-trio extends
autodoc_default_options = {"members": True, "undoc-members": True}
python_maximum_signature_line_length = 88
python_display_short_literal_types = True
nitpick_ignore_regex = [
    # Other projects: to link to them, a build would have to ask hosts of theirs.
    (r"py:.*", r"(trio|trio_util|structlog|hypercorn|starlette|attrs?|pytest)\..*"),
    (r"py:.*", r"(collections|contextlib|datetime|enum|os|pathlib|types|typing|builtins)\..*"),
    (r"py:.*", r"(socket|signal)\..*"),
    # What stands for a type of somebody else: OpenTelemetry's, and one of contextlib.
    (r"py:class", r"TracerProvider|AbstractAsyncContextManager"),
    # Types of fields that nobody makes: they are read as the texts that they are.
    (r"py:class", r"trio_gateway\._(steps\.Effect|policy\.Command)"),
    # Type variables stand for no thing of their own.
    (r"py:.*", r"(.*\.)?T"),
]

# ----- how it looks; nothing is fetched from anybody else's host

html_theme = "furo"
html_title = f"trio-gateway {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
