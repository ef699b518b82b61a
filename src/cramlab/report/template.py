"""The HTML templates of this package, with the style sheet that all pages share."""

from __future__ import annotations

import importlib.resources

import jinja2


def template(name: str) -> jinja2.Template:
    """The template in a file of this package; an undefined variable is an error, and text is escaped."""
    package = importlib.resources.files("cramlab.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals["style"] = package.joinpath("style.css").read_text(encoding="utf-8")
    return environment.from_string(package.joinpath(name).read_text(encoding="utf-8"))
