"""What a run or a cell of a study left behind, as the value that tables, plots and the HTML page are made of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from dia_lightning.errors import UserError
from dia_lightning.types import SCHEMA

# Derived: how much less likely a token of the texts is under p_θ than one of p_θ's own texts, in nats.
NATS_ABOVE_BASE = "nats_above_base"


@dataclass(frozen=True)
class Study:
    """What is asked of a family of runs.

    name: for files and links. title. question: what it asks, one sentence. axes: labels of what is varied, keys of
    `Result.setting`. baseline: the default setting, may be empty. config: the exact resolved YAML.
    """

    name: str
    title: str
    question: str
    axes: list[str]
    baseline: dict[str, Any] = field(default_factory=dict)
    config: str = ""


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


class Estimate(NamedTuple):
    """mean over seeds; half: half-width of its 95 % interval, NaN with one seed; n: seeds."""

    mean: float
    half: float
    n: int


@dataclass(frozen=True)
class Group:
    """The runs of one setting, one a seed, and the estimate of each figure, by its flat name (`nfe/base_lm`)."""

    study: str
    setting: dict[str, Any]
    results: list[Result]
    figures: dict[str, Estimate]


def read_metrics(folder: Path, option: str = "report") -> dict[str, Any]:
    """`metrics.json` of a finished run; messages begin with `option`.

    Raises:
        UserError: if there is none, or the run was stopped.
    """
    path = folder / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: cannot read {path} as JSON ({error})") from error
    if not isinstance(metrics, dict) or metrics.get("complete") is not True:
        raise UserError(f"{option}: {path} is of a run that was stopped; the same command again finishes it")
    if metrics.get("schema") != SCHEMA:
        raise UserError(f"{option}: {path} has schema {metrics.get('schema')}, this version reads {SCHEMA}")
    return metrics


def read_result(folder: Path, study: str, setting: Mapping[str, Any], seed: int, seconds: float = 0.0) -> Result:
    """The result of a finished run in `folder`; UserError as from `read_metrics`."""
    return Result(study, dict(setting), seed, folder, read_metrics(folder), seconds=seconds)


def read_lines(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The first objects of a file of JSON lines, none where it is missing."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(limit if limit is not None else 1 << 60), file, strict=False)]


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of nested figures, by the path to it; what is no finite number is left out, and so is `schema`."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flatten(value, f"{name}/")
        elif isinstance(value, list):
            found |= flatten({str(i): item for i, item in enumerate(value)}, f"{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and name != "schema":
            found[name] = float(value)
    return found


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and half-width of the 95 % interval by Student's t with n − 1 degrees of freedom.

    >>> round(estimate([0.0, 2.0, 4.0]).half, 3)
    4.968
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, math.nan, n)
    from scipy.special import stdtrit

    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, float(stdtrit(n - 1, 0.975)) * math.sqrt(variance / n), n)


def aggregate(results: Sequence[Result]) -> list[Group]:
    """One group a (study, setting), in the order of first appearance; failed runs are left out.

    A figure that some seeds lack is estimated from the others, which its n says.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        if not result.error:
            groups.setdefault(setting_key(result.study, result.setting), []).append(result)
    out = []
    for members in groups.values():
        values: dict[str, list[float]] = {}
        for result in members:
            for name, value in flatten(result.metrics).items():
                values.setdefault(name, []).append(value)
        figures = {name: estimate(found) for name, found in values.items()}
        out.append(Group(members[0].study, members[0].setting, members, figures))
    return out


def setting_key(study: str, setting: Mapping[str, Any]) -> str:
    """Equal for equal settings, whatever the order of their keys; 4 and 4.0 are one value."""
    plain = {k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in setting.items()}
    return json.dumps([study, plain], sort_keys=True, default=str)


def relative_to_base(results: Sequence[Result]) -> list[Result]:
    """Results whose metrics also have `nats_above_base`, log p_θ per token of p_θ's own texts minus that of the method's.

    p_θ's own is that of the same run (`base`), else the mean over all runs of the study that have one or are p_θ itself.
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


def _base_log_p(result: Result) -> float | None:
    figures = result.metrics if result.metrics.get("method") == "zero_shot" else result.metrics.get("base") or {}
    value = figures.get("log_p_per_token")
    return value if isinstance(value, float) else None
