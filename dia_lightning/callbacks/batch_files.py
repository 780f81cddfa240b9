"""A batch of texts as JSON: as it is kept between runs, and as lines of predictions.jsonl."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dia_lightning.metrics.repeats import BY_BLANKS, BY_PROMPT
from dia_lightning.types import Cost, Generations


def records(batch: Generations) -> list[dict[str, Any]]:
    """One dictionary a text, with the fields of `predictions.jsonl`."""
    return [
        {
            "id": batch.ids[i],
            "prompt": batch.prompts[i],
            "text": batch.texts[i],
            "tokens": batch.tokens[i].tolist(),
            "reward": batch.reward[i].item(),
            "rewards": {name: values[i].item() for name, values in batch.rewards.items()},
            "log_p": batch.log_p[i].item(),
            "n_tokens": int(batch.n_tokens[i]),
            "method": batch.method,
            "seed": batch.seed,
            **({} if batch.accept_rate is None else {"accept_rate": batch.accept_rate[i].item()}),
            **({} if batch.canonical is None else {"canonical": bool(batch.canonical[i])}),
            **({"fills": batch.fills[i]} if batch.fills and batch.fills[i] else {}),
            **{
                name: batch.diagnostics[name][i].item()
                for name in (*BY_PROMPT, *BY_BLANKS)
                if name in batch.diagnostics
                and (name in BY_PROMPT or not batch.diagnostics[name][i].isnan())
            },
        }
        for i in range(len(batch.texts))
    ]


def to_json(batch: Generations) -> dict[str, Any]:
    """All of a batch as plain values."""

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, Tensor) else value

    fields = {name: plain(value) for name, value in asdict(batch).items()}
    for group in ("rewards", "diagnostics"):
        fields[group] = {name: plain(values) for name, values in fields[group].items()}
    return fields


def from_json(fields: dict[str, Any]) -> Generations:
    """The batch that `to_json` wrote; ValueError, TypeError or KeyError where it is none."""
    for name in ("tokens", "log_p", "n_tokens", "reward", "accept_rate", "canonical"):
        if fields[name] is not None:
            fields[name] = torch.tensor(
                fields[name], dtype=torch.float64 if name == "log_p" else None
            )
    for group in ("rewards", "diagnostics"):
        fields[group] = {
            # JSON has null for a number that is none.
            name: torch.tensor([math.nan if value is None else value for value in values])
            for name, values in fields[group].items()
        }
    fields["costs"] = {name: Cost(*values) for name, values in fields["costs"].items()}
    return Generations(**fields)


def without_nan(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return (
        {key: without_nan(item) for key, item in value.items()}
        if isinstance(value, dict)
        else value
    )


def dumps(value: dict[str, Any], indent: int | None = None) -> str:
    """`value` as JSON that every reader takes; NaN and infinity become null."""
    return json.dumps(without_nan(value), ensure_ascii=False, allow_nan=False, indent=indent)
