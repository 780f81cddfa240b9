"""What a run or a cell of a study left behind, and the estimates over seeds made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from dia_lightning.errors import UserError
from dia_lightning.types import SCHEMA

# Derived: how much less likely a token of the texts is under p_θ than one of p_θ's own, in nats.
NATS_ABOVE_BASE = "nats_above_base"


@dataclass(frozen=True)
class Study:
    """A family of runs that answers one question.

    name: for files and links. axes: labels of what varies, keys of `Result.setting`. baseline:
    the default setting, may be empty. config: the YAML.
    """

    name: str
    title: str
    question: str
    axes: Collection[str]
    baseline: dict[str, Any] = field(default_factory=dict)
    config: str = field(default="", repr=False)


@dataclass(frozen=True)
class CellResult:
    """One run of a study, at one seed.

    setting: label → value of what varies, for example {"λ": 4.0} or {"method": "best-of-16"}.
    folder: of `metrics.json` and `predictions.jsonl`. metrics: the former, {} for a failed run.
    error: one line, "" for success. seconds: of the whole run, start included.
    """

    study: str
    setting: dict[str, Any]
    seed: int
    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


class Estimate(NamedTuple):
    """Mean over n seeds; half: half-width of its 95 % interval, NaN for one seed."""

    mean: float
    half: float
    n: int


@dataclass(frozen=True)
class Group:
    """The runs of one setting, one per seed; each figure's estimate by its flat name."""

    study: str
    setting: dict[str, Any]
    results: list[CellResult]
    figures: dict[str, Estimate]


def read_metrics(folder: Path, option: str = "report") -> dict[str, Any]:
    """`metrics.json` of a finished run.

    Raises:
        UserError: if it is missing or of an unfinished run; the message begins with `option`.
    """
    path = folder / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: cannot read {path} as JSON ({error})") from error
    if not isinstance(metrics, dict) or metrics.get("complete") is not True:
        advice = "the same command again finishes it"
        raise UserError(f"{option}: {path} is of a run that was stopped; {advice}")
    if (schema := metrics.get("schema")) != SCHEMA:
        raise UserError(f"{option}: {path} has schema {schema}, this version reads {SCHEMA}")
    return metrics


def read_lines(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The first objects of a file of JSON lines, [] for a missing file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, limit)]


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every finite number among nested figures, by the path to it; `schema` is left out."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            found |= flatten(value, f"{name}/")
        elif is_number(value) and name != "schema":
            found[name] = float(value)
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def estimates(runs: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    """Of each figure that some run has, over those runs: mean and 95 % interval (Student's t)."""
    import pandas as pd
    from scipy.special import stdtrit

    table = pd.DataFrame(runs)
    n = table.count()
    columns = (table.mean(), table.sem() * stdtrit(n - 1, 0.975), n)
    return {
        name: Estimate(float(mean), float(half), int(count))
        for name, mean, half, count in zip(table, *columns, strict=True)
    }


def estimate(values: Sequence[float]) -> Estimate:
    """`estimates` of one figure.

    >>> round(estimate([0.0, 2.0, 4.0]).half, 3)
    4.968
    """
    return estimates([{"": value} for value in values])[""]


def aggregate(results: Sequence[CellResult]) -> list[Group]:
    """One group per (study, setting), in order of appearance, without failed runs."""
    groups: dict[str, list[CellResult]] = {}
    for result in results:
        if not result.error:
            groups.setdefault(setting_key(result.study, result.setting), []).append(result)
    return [
        Group(
            runs[0].study, runs[0].setting, runs, estimates([flatten(run.metrics) for run in runs])
        )
        for runs in groups.values()
    ]


def setting_key(study: str, setting: Mapping[str, Any]) -> str:
    """Equal for equal settings, in any order of their keys; 4 and 4.0 are one value."""
    plain = {k: float(v) if type(v) is int else v for k, v in setting.items()}
    return json.dumps([study, plain], sort_keys=True, default=str)


def relative_to_base(results: Sequence[CellResult]) -> list[CellResult]:
    """Add `nats_above_base`: log p_θ per token of p_θ's own texts minus that of the method's.

    p_θ's own comes from the same run (`base`), else it is the mean over the study's runs.
    """
    own: dict[str, list[float]] = {}
    for result in results:
        if (value := _base_log_p(result)) is not None:
            own.setdefault(result.study, []).append(value)
    out = []
    for result in results:
        base, found = _base_log_p(result), result.metrics.get("log_p_per_token")
        if base is None and result.study in own:
            base = math.fsum(own[result.study]) / len(own[result.study])
        if base is not None and isinstance(found, float):
            result = replace(result, metrics={**result.metrics, NATS_ABOVE_BASE: base - found})
        out.append(result)
    return out


def _base_log_p(result: CellResult) -> float | None:
    itself = result.metrics.get("method") == "zero_shot"
    figures = result.metrics if itself else result.metrics.get("base") or {}
    value = figures.get("log_p_per_token")
    return value if isinstance(value, float) else None
