"""What a run or a cell of a study left behind, as the value that tables, plots and the HTML page are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """One run of a study: a method, or one value of what is varied, at one seed.

    study: its name. setting: what is varied, label → value, for example {"λ": 4.0, "steps": 16} or {"method": "best-of-16"}.
    seed. folder: where `metrics.json`, `predictions.jsonl` and `config.yaml` lie. metrics: the first of them, {} of a failed
    run. error: why it failed, one line, "" where it did not. seconds: the whole run's, its start included.
    """

    study: str
    setting: dict[str, Any]
    seed: int
    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0
