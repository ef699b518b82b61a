"""The HTML templates of this package, with the style sheet that all pages share."""

from __future__ import annotations

import importlib.resources
import re

import jinja2
from markupsafe import Markup


def template(name: str) -> jinja2.Template:
    """The template in a file of this package; an undefined variable is an error, and text is escaped."""
    package = importlib.resources.files("cramlab.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["md"] = _literal
    environment.globals["style"] = package.joinpath("style.css").read_text(encoding="utf-8")
    return environment.from_string(package.joinpath(name).read_text(encoding="utf-8"))


def _literal(text: str) -> Markup:
    """Text of one line such that Markdown shows it as it is, with neither markup nor a cell of a table."""
    return Markup(re.sub(r"([\\`*\[\]<>|])", r"\\\1", text))
