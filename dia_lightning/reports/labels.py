"""How figures are called, in which unit they are and how they are written, for a reader who does not know the code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dia_lightning.reports.results import NATS_ABOVE_BASE, Estimate


class Label(NamedTuple):
    """text: name and unit. digits: after the point, −1 for large counts with a prefix (k, M, G). better: "↑", "↓" or ""."""

    text: str
    digits: int = 3
    better: str = ""

    @property
    def head(self) -> str:
        return f"{self.text}\u00a0{self.better}".strip()


LABELS = {
    "reward": Label("reward", better="↑"),
    "reward_std": Label("reward, std over texts"),
    "perplexity": Label("perplexity under p_θ", 2, "↓"),
    "log_p_per_token": Label("log p_θ per token (nats)", 3, "↑"),
    NATS_ABOVE_BASE: Label("−log p_θ per token, above p_θ's own (nats)", 3, "↓"),
    "distinct_1": Label("distinct-1"),
    "distinct_2": Label("distinct-2", 3, "↑"),
    "self_bleu": Label("self-BLEU (0 – 100)", 1, "↓"),
    "accept_rate": Label("acceptance rate of moves", 3),
    "ess": Label("ESS, share of particles", 3, "↑"),
    "roots": Label("ancestors left, share", 3, "↑"),
    "resampled": Label("resamplings", 1),
    "log_z": Label("log Z, estimate (nats)", 3),
    "log_z_upper": Label("log Z, upper estimate (nats)", 3),
    "temperatures": Label("temperatures", 1),
    "hacking_rate": Label("reward hacking, share of texts", 3, "↓"),
    "seconds_per_text": Label("seconds per text", 4, "↓"),
    "latency_s_per_100_tokens": Label("seconds per 100 tokens", 3, "↓"),
    "flops_per_text": Label("FLOPs per text", -1, "↓"),
    "peak_memory_mib": Label("peak memory (MiB)", 0, "↓"),
    "bleu": Label("BLEU (0 – 100)", 2, "↑"),
    "n": Label("texts", 0),
}
_PREFIXES = {
    "nfe/": ("{} rows per text", 1), "tokens/": ("{} positions per text", -1), "flops/": ("{} FLOPs per text", -1),
    "accept_": ("acceptance, {}", 3), "ess_": ("ESS per chain, {}", 2), "rhat_": ("R̂, {}", 3),
    "autocorrelation_": ("autocorrelation time, {} (moves)", 2), "rouge_": ("ROUGE-{}", 3), "reward_": ("reward, {}", 3),
    "hacking_reasons/": ("texts flagged: {}", 0), "distinct_": ("distinct-{}", 3),
}  # fmt: skip
_NETWORKS = {"base_lm": "p_θ", "lm": "p_θ"}


def label(name: str) -> Label:
    """Of a figure by its flat name."""
    if name in LABELS:
        return LABELS[name]
    if name.startswith("training/"):
        _, part, kind = name.split("/")
        return Label(f"{part}: FLOPs", -1) if kind == "flops" else Label(f"{part}: {kind.replace('_', ' ')}", 1)
    for prefix, (form, digits) in _PREFIXES.items():
        if name.startswith(prefix) and len(name) > len(prefix):
            rest = name[len(prefix) :]
            return Label(form.format(_NETWORKS.get(rest, rest.replace("_", " ").replace("/", ", "))), digits)
    return Label(name.replace("_", " ").replace("/", ", "), 3)


def number(value: float, digits: int) -> str:
    """`value` with a true minus sign; with −1 digits as 3 significant ones and a prefix.

    >>> number(-1.5, 2), number(3_211_000, -1)
    ('−1.50', '3.21 M')
    """
    if math.isnan(value):
        return "–"
    if digits < 0:
        value, suffix = _scaled(value)
        return f"{value:.3g}{suffix}".replace("-", "−")
    if 1e-12 < abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}".replace("-", "−")
    return f"{value:,.{digits}f}".replace("-", "−").replace(",", " ")


def _scaled(value: float) -> tuple[float, str]:
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return value / size, f" {prefix}"
    return value, ""


def written(found: Estimate | None, digits: int) -> str:
    """Mean ± half-width of the interval, the mean alone without one or where all seeds agree; "–" for nothing.

    >>> written(Estimate(0.5, 0.0123, 3), 3)
    '0.500 ± 0.012'
    """
    if found is None:
        return "–"
    mean = number(found.mean, digits)
    return mean if math.isnan(found.half) or found.half <= 1e-12 * abs(found.mean) else f"{mean} ± {number(found.half, digits)}"


def setting_name(setting: Mapping[str, Any]) -> str:
    """A method by its name; else what is varied and its value.

    >>> setting_name({"method": "DIA", "λ": 4.0})
    'DIA, λ = 4'
    """
    return ", ".join(value_name(v) if k == "method" else f"{k} = {value_name(v)}" for k, v in setting.items()) or "default"


def value_name(value: Any) -> str:
    """A value of what is varied; a class by its last name."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int | float):
        return f"{value:g}".replace("-", "−")
    return str(value)
