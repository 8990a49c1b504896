"""Render HTML pages that need no other file: the page of a run and the page of a data set share one frame and style.

A page is a template that extends ``base.html`` and fills its blocks; pieces that several pages show are macros of
``parts.html``. Both lie beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

Fact = tuple[str, str]


@dataclass(frozen=True)
class Chart:
    """A figure, its name, what to look for in it, and the quantiles shown below it (label, value)."""

    title: str
    hint: str
    svg: Markup
    wide: bool = False
    quantiles: Sequence[Fact] = ()


def render_page(package: str, template: str, *, name: str, tiles: Sequence[Fact], facts: Sequence[Fact], **own: Any) -> str:
    """Render ``template``, which lies in ``package`` and extends ``base.html``.

    All values are escaped, since names and captions come from strangers.

    Args:
        package: Python package that holds the template, for example ``data_tools.stats``.
        template: file name of the template.
        name: title of the page.
        tiles: the most important figures, shown large.
        facts: further figures, shown in a row below them.
        own: the values that only this template uses. A template that uses a value not given is an error.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(each, "") for each in dict.fromkeys((package, "megamoe.report"))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(name=name, tiles=tiles, facts=facts, **own)
