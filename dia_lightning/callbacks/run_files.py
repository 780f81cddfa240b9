"""The files that every run leaves: its texts, one a line, and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dia_lightning import __version__
from dia_lightning.callbacks.batch_files import dumps, records, without_nan
from dia_lightning.errors import UserError
from dia_lightning.files import in_place
from dia_lightning.metrics.evaluation import Evaluator
from dia_lightning.metrics.generation import compute_metrics
from dia_lightning.metrics.reasons import reasons
from dia_lightning.metrics.repeats import figures_by_prompt
from dia_lightning.types import SCHEMA, Generations, Record
from dia_lightning.words import Tokenizer, resolve

_Runs = list[list[Generations]]


def write_atomically(path: Path, text: str) -> None:
    """Write to a neighbour first: `path` is whole or absent whenever the process dies.

    Raises:
        OSError: naming `path`.
    """
    with in_place(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_run(
    folder: Path, runs: _Runs, known: Sequence[Record], key: str | None,
    training: Mapping[str, Any], complete: bool = True, tokenizer: Tokenizer = "auto",
    evaluation: Evaluator | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write `predictions.jsonl`, `base_predictions.jsonl`, `metrics.json`, and `hacking.jsonl`.

    Args:
        folder: where to write; these files of an earlier run are replaced.
        runs: the batches of the method, and those of p_θ where it was sampled too.
        known: the record of each text.
        key: the hash of the settings, where there is one.
        training: what the networks cost to train.
        complete: whether all batches are there; without figures where they are not.
        tokenizer, evaluation: see `PredictionWriter`.

    Returns:
        The figures of each of `runs`.
    """
    # An earlier run's may be there, which do not belong to these texts.
    for name in ("metrics.json", "base_predictions.jsonl", "hacking.jsonl", "report.html"):
        (folder / name).unlink(missing_ok=True)
    for name, run in zip(("predictions.jsonl", "base_predictions.jsonl"), runs, strict=False):
        _write_lines(
            folder / name,
            [line | _source(known, line["id"]) for batch in run for line in records(batch)],
        )
    figures: list[dict[str, Any]] = [{"n": sum(len(batch.texts) for batch in run)} for run in runs]
    if complete:
        figures = _figures(folder, runs, known, tokenizer, evaluation)
    metrics = [
        {"method": run[0].method, **values} for run, values in zip(runs, figures, strict=True)
    ]
    result = {
        "schema": SCHEMA,
        "complete": complete,
        **metrics[0],
        "training": training,
        "config_hash": key,
        "versions": versions(),
    }
    if len(metrics) > 1:
        result["base"] = metrics[1]
    write_atomically(folder / "metrics.json", dumps(result, indent=2) + "\n")
    return metrics


def _figures(
    folder: Path,
    runs: _Runs,
    known: Sequence[Record],
    tokenizer: Tokenizer,
    evaluation: Evaluator | None,
) -> list[dict[str, Any]]:
    """Of each run, all with one tokenizer, and why some are null."""
    name = resolve(tokenizer, [text for run in runs for batch in run for text in batch.texts])
    figures = [
        {"tokenizer": name, **compute_metrics(run, name), **figures_by_prompt(run, known)}
        for run in runs
    ]
    if evaluation is not None:
        evaluated = evaluation(runs, known, tokenizer)
        figures = [_joined(*both) for both in zip(figures, evaluated.figures, strict=True)]
        if evaluated.flagged is not None:
            _write_lines(folder / "hacking.jsonl", evaluated.flagged)
    return [without_nan({**found, "reasons": reasons(found)}) for found in figures]


def _joined(figures: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(set(figures) & set(more)):
        raise UserError(
            f"evaluation: a judge named {taken[0]!r} given, allowed: any other name; another figure"
            " has it"
        )
    return {**figures, **more}


def _source(known: Sequence[Record], text: int) -> dict[str, str]:
    """What the text was made from, where its record has that."""
    source = known[text].get("source") if text < len(known) else None
    return {"source": source} if isinstance(source, str) else {}


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_atomically(path, "".join(dumps(line) + "\n" for line in lines))


def versions() -> dict[str, str]:
    """Of this package and of those that its figures hang on."""
    import lightning
    import transformers

    return {
        "dia_lightning": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
    }
