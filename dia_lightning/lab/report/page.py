"""A report as data (sections of blocks), and the files written from it by templates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from dia_lightning.lab.report.labels import in_words
from dia_lightning.lab.report.plots import Plot


@dataclass(frozen=True)
class Table:
    """text: columns of prose. default: marked rows. failed: whether it lists failures."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    text: frozenset[int] = frozenset()
    default: frozenset[int] = frozenset()
    failed: bool = False
    kind: ClassVar[str] = "table"


class Sample(NamedTuple):
    """A text of one method. note: its score, as written."""

    method: str
    text: str
    note: str


class PageBlock(NamedTuple):
    """Any other element.

    - "p": a paragraph; title: its class.
    - "h3": a heading.
    - "dl": words and their meanings, a dict.
    - "details": preformatted text, folded under the title.
    - "samples": lists of `Sample` by heading, a dict; folded under the title, if there is one.
    """

    kind: str
    content: Any
    title: str = ""


class Section(NamedTuple):
    """name: for links to it."""

    name: str
    title: str
    blocks: Sequence[Table | Plot | PageBlock]


def write_page(
    folder: Path, title: str, lead: Sequence[Table | PageBlock], sections: Sequence[Section]
) -> Path:
    """Write `report.html`, `results.md` and the plots of both; an earlier report's plots go."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    for old in plots.glob("*.svg"):
        old.unlink()
    for plot in (block for section in sections for block in section.blocks):
        if isinstance(plot, Plot):
            text = f'<?xml version="1.0" encoding="utf-8"?>\n{plot.svg}'
            (plots / f"{plot.name}.svg").write_text(text, encoding="utf-8")
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(inline=_inline, cell=_in_cell)
    content = {
        "title": title,
        "lead": lead,
        "sections": sections,
        "glossary": in_words()["glossary"],
    }
    for name, template in (("report.html", "page.html"), ("results.md", "results.md")):
        made = environment.get_template(template).render(content)
        (folder / name).write_text(made, encoding="utf-8")
    return folder / "report.html"


def _inline(plot: Plot) -> str:
    """Ids get the plot's name in front, since two plots may share ids."""
    from markupsafe import Markup

    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{plot.name}-", plot.svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(plot.title)}" ', 1))


def _in_cell(text: str) -> str:
    """One line of Markdown without markup."""
    return " ".join(re.sub(r"([\\|*_`<\[#~])", r"\\\1", text).split())
