"""How the pages become a site, by `make docs`. On GitHub they are read as they stand.

The source directory is the repository, so that a link from one file to another is right in both
places, and so that the READMEs are pages as well.
"""

from __future__ import annotations

import inspect
import re
from importlib.metadata import version as installed_version
from typing import Any

import idempotent_consumer

project = "idempotent-consumer"
release = version = installed_version(project)
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/README"
include_patterns = ["*.md", "docs/*.md", "idempotent_consumer/*.md", "benchmarks/results/*.md"]
exclude_patterns = [".*", "docs/build"]
templates_path = ["templates"]
suppress_warnings = ["toc.not_included"]
"""Tables of figures are linked from where they matter; tests/documents knows of all other pages."""

myst_heading_anchors = 3
"""Headings down to this level have GitHub's anchors."""

autodoc_member_order = "bysource"
autoclass_content = "both"
autodoc_preserve_defaults = True
"""Else the default of `Service.run` is written out: the environment of whoever builds the site."""

html_theme = "furo"
html_title = f"{project} {release}"
html_additional_pages = {"index": "redirect.html"}
html_copy_source = html_show_sourcelink = html_show_copyright = html_show_sphinx = False

API_PAGE = "docs/api"


def navigation(markdown: str) -> str:
    """Return a page with a tree of pages at its end: those that its sections list as links."""
    trees = []
    for section in markdown.split("\n## ")[1:]:
        caption, _, text = section.partition("\n")
        pages = re.findall(r"^- \[[^]]*\]\(([^)#]+\.md)\)", text, re.MULTILINE)
        if pages:
            tree = ["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]
            trees.append("\n".join(tree))
    return "\n\n".join([markdown, *trees])


def reference(markdown: str) -> str:
    """Return a page with the description of each public name at its end, from its docstrings."""
    directives = [_directive(name) for name in idempotent_consumer.__all__]
    return "\n".join([markdown, "", "```{eval-rst}", *directives, "```"])


def _directive(name: str) -> str:
    described, path = getattr(idempotent_consumer, name), f"idempotent_consumer.{name}"
    if inspect.isfunction(described):
        lines = [f".. autofunction:: {path}"]
    elif not inspect.isclass(described):
        # The name of a type, which has no docstring of its own.
        lines = [f".. py:data:: {path}", "   :value: " + re.sub(r"\w+\.", "", str(described))]
    elif hasattr(described, "_fields"):
        # Of a named tuple's fields and constructor Python itself writes the docstrings.
        left_out = f"   :exclude-members: {', '.join(described._fields)}"
        lines = [f".. autoclass:: {path}", "   :members:", "   :class-doc-from: class", left_out]
    else:
        kind = "exception" if issubclass(described, Exception) else "class"
        lines = [f".. auto{kind}:: {path}", "   :members:"]
    return "\n".join([*lines, ""])


def setup(app: Any) -> None:
    """Have both made of what is there when the site is built."""

    def read(_app: Any, page: str, source: list[str]) -> None:
        if page == root_doc:
            source[0] = navigation(source[0])
        elif page == API_PAGE:
            source[0] = reference(source[0])

    app.connect("source-read", read)
