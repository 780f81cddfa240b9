"""Why a figure is null in `metrics.json`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_ALONE = "fewer than two texts"
# Of a figure without a value, by its whole name.
_REASONS = {
    "reward_std": _ALONE,
    r"distinct_(\d+)": r"no text has \1 words or more",
    "self_bleu": "no text has a word",
    "bleu|rouge_.": "no reference has a word",
    "(ess|rhat|autocorrelation)_.*": (
        "needs 4 steps or more of 2 chains of a prompt that do not stand still"
    ),
    "peak_memory_mib": "not measured on this system",
    "perplexity|log_p_per_token|.*latency.*|.*seconds.*": "the texts have no tokens",
}


def reasons(figures: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """For each figure that JSON cannot hold, or that is None, why; nested ones by their path, as in
    `nfe/critic`.

    >>> reasons({"n": 1, "self_bleu": math.nan, "log_z": -math.inf})
    {'self_bleu': 'fewer than two texts', 'log_z': 'not finite: -inf'}
    """
    found: dict[str, str] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            found |= reasons(value, f"{prefix}{key}/")
        elif value is None or (isinstance(value, float) and not math.isfinite(value)):
            alone = key == "self_bleu" and figures.get("n", 2) < 2
            found[f"{prefix}{key}"] = _ALONE if alone else _reason(key, value)
    return found


def _reason(key: str, value: float | None) -> str:
    if value is not None and math.isinf(value):
        return f"not finite: {value}"
    for pattern, reason in _REASONS.items():
        if match := re.fullmatch(pattern, key):
            return match.expand(reason)
    return "undefined for one text or more"
