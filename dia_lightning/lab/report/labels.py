"""The words of reports: names, units and formats of figures, and captions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from dia_lightning.lab.report.results import Estimate


class Label(NamedTuple):
    """Name with unit; digits after the point, −1: prefix (k, M, G); better: "↑", "↓" or ""."""

    text: str
    digits: int = 3
    better: str = ""

    @property
    def head(self) -> str:
        return f"{self.text}\u00a0{self.better}".strip()


@cache
def in_words() -> dict[str, dict[str, Any]]:
    """The content of `templates/words.yaml`."""
    import yaml  # type: ignore[import-untyped]

    found: dict[str, dict[str, Any]] = yaml.safe_load(
        (files(__package__) / "templates/words.yaml").read_text(encoding="utf-8")
    )
    return found


def caption(name: str, **values: Any) -> str:
    """A caption, or that of a table of figures, with its values."""
    from jinja2 import StrictUndefined, Template

    tables = {table: spec["caption"] for table, spec in in_words()["tables"].items()}
    text = (in_words()["captions"] | tables)[name]
    text = Template(text, undefined=StrictUndefined).render(values)
    return " ".join(part for part in text.split(" ") if part)


def label(name: str) -> Label:
    """Of a figure, by its flat name."""
    if found := in_words()["labels"].get(name):
        return Label(*found)
    if name.startswith("training/"):
        _, part, kind = name.split("/")
        flops = kind == "flops"
        return Label(f"{part}: {'FLOPs' if flops else _plain(kind)}", -1 if flops else 1)
    for prefix, (form, digits) in in_words()["prefixes"].items():
        if name.startswith(prefix) and len(name) > len(prefix):
            rest = name[len(prefix) :]
            rest = "p_θ" if rest in ("base_lm", "lm") else _plain(rest)
            return Label(form.format(rest), digits)
    return Label(_plain(name))


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("/", ", ")


def number(value: float, digits: int) -> str:
    """`value` with a true minus sign; −1 digits: three significant ones and a prefix.

    >>> number(-1.5, 2), number(3_211_000, -1)
    ('−1.50', '3.21 M')
    """
    if math.isnan(value):
        return "–"
    if digits < 0:
        prefixes = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
        size, prefix = next((p for p in prefixes if abs(value) >= 0.9995 * p[0]), (1.0, ""))
        text = f"{value / size:.3g} {prefix}".rstrip()
    elif 1e-12 < abs(value) < 0.5 * 10**-digits:
        text = f"{value:.1e}"
    else:
        text = f"{value:,.{digits}f}".replace(",", " ")
    return text.replace("-", "−")


def written(found: Estimate | None, digits: int) -> str:
    """Mean ± half-width; the mean alone where seeds agree or there is one; "–" for None.

    >>> written(Estimate(0.5, 0.0123, 3), 3)
    '0.500 ± 0.012'
    """
    if found is None:
        return "–"
    mean = number(found.mean, digits)
    alone = math.isnan(found.half) or found.half <= 1e-12 * abs(found.mean)
    return mean if alone else f"{mean} ± {number(found.half, digits)}"


def setting_name(setting: Mapping[str, Any]) -> str:
    """A method by its name; otherwise each axis and its value.

    >>> setting_name({"method": "DIA", "λ": 4.0})
    'DIA, λ = 4'
    """
    named = [
        value_name(value) if axis == "method" else f"{axis} = {value_name(value)}"
        for axis, value in setting.items()
    ]
    return ", ".join(named) or "default"


def value_name(value: Any) -> str:
    """The value of an axis, as tables show it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int | float):
        return f"{value:g}".replace("-", "−")
    return str(value)
