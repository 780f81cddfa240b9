"""A page of its own: semantic HTML with inline style and inline SVG, no script, nothing from outside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from dia_lightning.reports.plots import Plot

_STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;color:#111;background:#fff;
 max-width:62rem;margin:0 auto;padding:1rem 1.2rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:.6rem 0}h2{font-size:1.35rem;margin:2.6rem 0 .4rem;padding-top:.8rem;
 border-top:2px solid #111}h3{font-size:1.08rem;margin:1.8rem 0 .4rem}p{margin:.5rem 0;max-width:48rem}
nav ul{padding-left:1.2rem;margin:.3rem 0}a{color:#0b4a8f}
.question{font-style:italic}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.2rem 0 .4rem;max-width:min(48rem,calc(100vw - 2.4rem));color:#333}
th,td{padding:.25rem .6rem;border-bottom:1px solid #ccc;text-align:right;vertical-align:top}
thead th{border-bottom:2px solid #111;vertical-align:bottom;font-weight:600;min-width:4.2rem}
tbody th{text-align:left;font-weight:500;min-width:7rem}td{white-space:nowrap}
th.text,td.text{text-align:left;white-space:normal;overflow-wrap:anywhere}
tr.default{background:#f3f3f3}
table.failed{border:2px solid #111}table.failed caption{font-weight:600;color:#111}
figure{margin:1.4rem 0;max-width:52rem}figure svg{display:block;max-width:100%;height:auto}
figcaption{font-size:.9rem;color:#333;margin-top:.3rem;max-width:48rem}
.prompt{margin:1.2rem 0 .3rem;font-weight:600}
.samples{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.6rem;margin:0;padding:0;list-style:none}
.samples li{border:1px solid #bbb;border-radius:4px;padding:.4rem .6rem;font-size:.88rem;min-width:0}
.samples header{display:flex;justify-content:space-between;gap:.6rem;border-bottom:1px solid #ddd;margin-bottom:.3rem;
 font-weight:600;font-size:.82rem}.samples header span:last-child{white-space:nowrap}
.samples p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;font-size:.9rem}dt{font-weight:600}dd{margin:0}
details{margin:.6rem 0}summary{cursor:pointer;font-weight:600}
pre{background:#f6f6f6;border:1px solid #ddd;padding:.6rem;overflow-x:auto;font-size:.8rem;line-height:1.35}
@media (max-width:40rem){dl{grid-template-columns:1fr}dd{margin-bottom:.4rem}}
@media print{body{max-width:none;font-size:10pt}figure,.samples li,tr{break-inside:avoid}h2,h3,caption{break-after:avoid}
 .scroll{overflow:visible}table{font-size:7.5pt}th,td{padding:1pt 3pt}thead th{min-width:0}a{color:#111}}
"""


_DEFAULT = ' class="default"'


@dataclass(frozen=True)
class Table:
    """caption: what it shows and what to look for. head and rows: text. text: columns that hold prose. default: marked rows."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    text: frozenset[int] = frozenset()
    default: frozenset[int] = frozenset()
    failed: bool = False


@dataclass(frozen=True)
class Sample:
    """A text of one method. note: its score, written out."""

    method: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Prose:
    """A paragraph. kind: class of the element."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Samples:
    """What several methods wrote for the same prompts: pairs of a heading and the texts. folded: shown on a click."""

    rows: list[tuple[str, list[Sample]]]
    folded: bool = False


@dataclass(frozen=True)
class Terms:
    """Words and what they mean."""

    rows: list[tuple[str, str]]


@dataclass(frozen=True)
class Details:
    """Folded away: preformatted text under a summary."""

    summary: str
    text: str


@dataclass(frozen=True)
class Heading:
    """Of a part of a section."""

    text: str


Block = Table | Prose | Samples | Plot | Terms | Details | Heading


@dataclass(frozen=True)
class Section:
    """name: for links to it."""

    name: str
    title: str
    blocks: list[Block] = field(default_factory=list)


def page(title: str, lead: Sequence[Block], sections: Sequence[Section]) -> str:
    """The whole file."""
    links = "".join(f'<li><a href="#{escape(s.name)}">{escape(s.title)}</a></li>' for s in sections)
    body = "".join(
        f'<section id="{escape(s.name)}"><h2>{escape(s.title)}</h2>{"".join(map(to_html, s.blocks))}</section>\n'
        for s in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,">\n<style>{_STYLE}</style></head>\n<body>\n<main>'
        f"<h1>{escape(title)}</h1>\n{''.join(map(to_html, lead))}"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n{body}</main>\n</body>\n</html>\n'
    )


def to_html(block: Block) -> str:
    """One element; every text is escaped here."""
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Plot):
        return _figure(block)
    if isinstance(block, Samples):
        samples = "".join(_samples(heading, texts) for heading, texts in block.rows)
        return f"<details><summary>Show the texts</summary>{samples}</details>" if block.folded else samples
    if isinstance(block, Terms):
        return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in block.rows) + "</dl>\n"
    if isinstance(block, Details):
        return f"<details><summary>{escape(block.summary)}</summary><pre>{escape(block.text)}</pre></details>\n"
    if isinstance(block, Heading):
        return f"<h3>{escape(block.text)}</h3>\n"
    kind = f' class="{escape(block.kind)}"' if block.kind else ""
    return f"<p{kind}>{escape(block.text)}</p>\n"


def _table(table: Table) -> str:
    def cell(i: int, text: str, tag: str, more: str = "") -> str:
        kind = ' class="text"' if i in table.text or (i == 0 and tag == "th") else ""
        return f"<{tag}{kind}{more}>{escape(text)}</{tag}>"

    head = "".join(cell(i, text, "th", ' scope="col"') for i, text in enumerate(table.head))
    rows = ""
    for r, row in enumerate(table.rows):
        cells = cell(0, row[0], "th", ' scope="row"') + "".join(cell(i, text, "td") for i, text in enumerate(row[1:], 1))
        rows += f"<tr{_DEFAULT if r in table.default else ''}>{cells}</tr>\n"
    kind = ' class="failed"' if table.failed else ""
    return (
        f'<div class="scroll"><table{kind}><caption>{escape(table.caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n"
    )


def _figure(plot: Plot) -> str:
    """Ids get the plot's name in front, since those of two plots may be equal."""
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{plot.name}-", plot.svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(plot.title)}" ', 1)
    return (
        f'<figure id="{escape(plot.name)}">\n{svg}\n<figcaption><strong>{escape(plot.title)}.</strong> '
        f"{escape(plot.caption)}</figcaption></figure>\n"
    )


def _samples(heading: str, texts: Sequence[Sample]) -> str:
    items = "".join(
        f"<li><header><span>{escape(s.method)}</span><span>{escape(s.note)}</span></header><p>{escape(s.text)}</p></li>\n"
        for s in texts
    )
    return f'<p class="prompt">{escape(heading)}</p>\n<ul class="samples">{items}</ul>\n'


def to_markdown(sections: Sequence[Section], title: str) -> str:
    """The tables under their headings."""
    out = [f"# {title}"]
    for section in sections:
        out.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, Table):
                align = ["---"] + ["---" if i in block.text else "---:" for i in range(1, len(block.head))]
                lines = ["| " + " | ".join(map(_in_cell, row)) + " |" for row in (block.head, align, *block.rows)]
                out += [_in_cell(block.caption), "\n".join(lines)]
            elif isinstance(block, Prose):
                out.append(_in_cell(block.text))
    return "\n\n".join(out) + "\n"


def _in_cell(text: str) -> str:
    """One line of Markdown that means itself."""
    text = re.sub(r"([\\|*_`<\[#~])", r"\\\1", text)
    return " ".join(text.split())
