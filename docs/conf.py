"""How `make docs` builds a site of the pages. On GitHub they are read as they are.

The source directory is the repository, so that links between files are right in both places and
the READMEs are pages as well.
"""

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
"""Tables of figures are only linked from other pages. tests/documents knows of all other pages."""

myst_heading_anchors = 3
"""Headings down to this level have GitHub's anchors."""

autodoc_member_order = "bysource"
autoclass_content = "both"
autodoc_preserve_defaults = True
"""Otherwise the default of `Service.run`, the environment of the builder, would be written out."""

html_theme = "furo"
html_title = f"{project} {release}"
html_additional_pages = {"index": "redirect.html"}
html_copy_source = html_show_sourcelink = html_show_copyright = html_show_sphinx = False

API_PAGE = "docs/api"


def navigation(markdown: str) -> str:
    """Add a tree of the pages that a page's sections list as links to its end."""
    trees = []
    for section in markdown.split("\n## ")[1:]:
        caption, _, text = section.partition("\n")
        pages = re.findall(r"^- \[[^]]*\]\(([^)#]+\.md)\)", text, re.MULTILINE)
        if pages:
            tree = ["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]
            trees.append("\n".join(tree))
    return "\n\n".join([markdown, *trees])


def reference(markdown: str) -> str:
    """Add the description of each public name, from its docstring, to the end of a page."""
    directives = [_directive(name) for name in idempotent_consumer.__all__]
    return "\n".join([markdown, "", "```{eval-rst}", *directives, "```"])


def _directive(name: str) -> str:
    described, path = getattr(idempotent_consumer, name), f"idempotent_consumer.{name}"
    if inspect.isfunction(described):
        lines = [f".. autofunction:: {path}"]
    elif not inspect.isclass(described):
        # A type alias has no docstring of its own.
        lines = [f".. py:data:: {path}", "   :value: " + re.sub(r"\w+\.", "", str(described))]
    elif hasattr(described, "_fields"):
        # Python generates the docstrings of a named tuple's fields and constructor.
        left_out = f"   :exclude-members: {', '.join(described._fields)}"
        lines = [f".. autoclass:: {path}", "   :members:", "   :class-doc-from: class", left_out]
    else:
        kind = "exception" if issubclass(described, Exception) else "class"
        lines = [f".. auto{kind}:: {path}", "   :members:"]
    return "\n".join([*lines, ""])


def setup(app: Any) -> None:
    """Complete both pages when Sphinx reads them."""

    def read(_app: Any, page: str, source: list[str]) -> None:
        if page == root_doc:
            source[0] = navigation(source[0])
        elif page == API_PAGE:
            source[0] = reference(source[0])

    app.connect("source-read", read)
