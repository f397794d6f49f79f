"""The site: make docs. Its pages are the repository's own, with the links that GitHub follows."""

from __future__ import annotations

import inspect
import re
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import dimap
import typer
from typer.cli import get_docs_for_click

project, release = "dimap", dimap.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
root_doc = "README"  # of the repository; `sphinx-build -c docs . build/site`
include_patterns = ["README.md", "CHANGELOG.md", "docs/**.md", "e*/**/README.md"]

html_theme = "furo"
html_title = "dimap"
html_copy_source = False
myst_heading_anchors = 4
smartquotes = False  # they make dashes of options
default_role = "py:obj"  # `find_modules` in a docstring is a link where there is such a thing
autodoc_member_order = "bysource"
autodoc_mock_imports = ["transformers", "lightning"]  # as large as torch, for a base class
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
copybutton_exclude = ".linenos, .gp, .go"

CONTENTS = """
```{toctree}
:hidden:
docs/questions
```
```{toctree}
:hidden:
:caption: Guides
docs/guide
docs/integrations
docs/methods
docs/families
docs/streaming
docs/distributed
docs/pictures
examples/demo/README
```
```{toctree}
:hidden:
:caption: Reference
docs/commands
docs/api/models
docs/api/files
docs/api/training
docs/api/reports
docs/operators
docs/format
```
```{toctree}
:hidden:
:caption: Measured
docs/performance
docs/results
experiments/paper/README
```
```{toctree}
:hidden:
:caption: Inside
docs/architecture
docs/cuda
CHANGELOG
```
"""


def add_generated(app: Any, docname: str, source: list[str]) -> None:
    """The list of pages belongs to the first one, but is nothing for GitHub; the commands say themselves."""
    if docname == root_doc:
        source[0] += CONTENTS
    elif docname == "docs/commands":
        source[0] += commands()


def commands() -> str:
    """What `dimap COMMAND --help` says, of every command."""
    from dimap.cli import COMMANDS

    app = typer.Typer(add_completion=False)
    for name in COMMANDS:
        app.command(name)(getattr(import_module(f"dimap.cli.{name}"), name))
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="dimap")
    return "\n".join(
        get_docs_for_click(obj=group.commands[name], ctx=context, call_prefix="dimap", indent=1)
        for name in COMMANDS
    )


def define_entries(
    app: Any, kind: str, name: str, what: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings say of each parameter, field and error `name: text`: a definition, to reStructuredText.

    Some have them under the heading Args or Attributes, which goes.
    """
    known = {name for each in getattr(what, "__mro__", ()) for name in vars(each)}
    known |= {
        name for each in getattr(what, "__mro__", ()) for name in inspect.get_annotations(each)
    }
    with suppress(TypeError, ValueError):  # a module, a function of C++
        known |= {*inspect.signature(what).parameters}

    def entry(match: re.Match[str]) -> str:
        names = match[1].split(", ")
        listed = ", ".join(f"``{name}``" for name in names)
        errors = all(name.endswith("Error") for name in names)
        return f"{listed}\n    " if errors or known.issuperset(names) else match[0]

    def section(match: re.Match[str]) -> str:
        return ("Raises\n\n" if match[1] == "Raises" else "") + dedent(match[2])

    text = "\n".join(lines) + "\n"
    text = re.sub(r"^(Args|Attributes|Raises):\n((?:(?: {4}.*)?\n)+)", section, text, flags=re.M)
    text = re.sub(r"^(\w+(?:, \w+)*): ", entry, text, flags=re.M)
    lines[:] = text.replace(":\n\n    ", "::\n\n    ").split("\n")


def redirect(app: Any, error: Exception | None) -> None:
    """Sites begin with index.html."""
    page = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html">'
    Path(app.outdir, "index.html").write_text(page + "<title>dimap</title>\n", encoding="utf-8")


def setup(app: Any) -> None:
    app.connect("source-read", add_generated)
    app.connect("autodoc-process-docstring", define_entries)
    app.connect("build-finished", redirect)
