"""Results as a person reads them on a screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dia_lightning.metrics.repeats import repeated, warnings_of
from dia_lightning.samplers import BaseModel, Sampler
from dia_lightning.terminal import console, one_line
from dia_lightning.types import Generations, Record

_ROWS = [
    ("reward", "reward, mean", "{:.3f}"),
    ("reward_std", "reward, std over texts", "{:.3f}"),
    ("perplexity", "perplexity under p_θ", "{:.2f}"),
    ("log_p_per_token", "log p_θ per token (nats)", "{:.3f}"),
    ("distinct_2", "distinct-2", "{:.3f}"),
    ("self_bleu", "self-BLEU (0 – 100, low = diverse)", "{:.1f}"),
    ("latency_s_per_100_tokens", "seconds per 100 tokens", "{:.3f}"),
    ("n", "texts", "{:d}"),
]


def print_results(
    metrics: list[dict[str, Any]],
    runs: list[list[Generations]],
    folder: Path,
    n_shown: int,
    n_resumed: int,
    n_batches: int,
    rows: Sequence[tuple[str, str, str]] = (),
) -> None:
    """Print a table with one column per method (base first), texts of each, and the files.

    `rows`, the task's, go below the reward's: key, label and format of each.
    """
    from rich.table import Table

    screen = console()
    order = sorted(range(len(metrics)), key=lambda i: metrics[i]["method"] != "zero_shot")
    table = Table("", *(_title(metrics[i]["method"]) for i in order))
    for key, label, form in [*_ROWS[:2], *rows, *_ROWS[2:]]:
        table.add_row(
            label,
            *("–" if metrics[i][key] is None else form.format(metrics[i][key]) for i in order),
        )
    screen.print(table)
    for i in order:
        screen.print(f"{_title(metrics[i]['method'])}:", style="bold", highlight=False)
        first = runs[i][0]
        for prompt, text, reward in list(
            zip(first.prompts, first.texts, first.reward.tolist(), strict=True)
        )[:n_shown]:
            line = one_line(f"{reward:+.2f}  {f'[{prompt}] ' if prompt else ''}{text}")
            for part in screen.render_str(line, highlight=False).wrap(
                screen, max(screen.width - 2, 10)
            ):
                part.rstrip()
                part.pad_left(2)
                screen.print(part)
    if n_resumed:
        screen.print(
            f"{n_resumed} of {n_batches} batches were there from an earlier run with the same"
            " settings."
        )
    files = f"{folder / 'predictions.jsonl'} and {folder / 'metrics.json'}"
    screen.print(
        f"Wrote {files}; curves: tensorboard --logdir {folder / 'tensorboard'}", soft_wrap=True
    )


def repeats(
    sampler: Sampler, runs: Sequence[Sequence[Generations]], known: Sequence[Record]
) -> list[str]:
    """The prompts whose texts are nearly all the same, and what to raise; the base model's texts
    are as they are.
    """
    if isinstance(sampler, BaseModel):
        return []
    moves = getattr(sampler, "moves", True)
    # None: the sampler takes some by itself.
    names = ["particles", *([] if moves == [] else ["rounds"])]
    settings = {name: getattr(sampler, name) for name in names if hasattr(sampler, name)}
    base = runs[1] if len(runs) > 1 else []
    return warnings_of(repeated(runs[0], base, known), settings)


def print_unfinished(folder: Path, n_done: int, n_batches: int) -> None:
    """Print how much of a run is finished, its file, and how to get the rest."""
    console().print(
        f"{n_done} of {n_batches} batches are finished, {n_batches - n_done} are missing; their "
        f"texts are in {folder / 'predictions.jsonl'}, figures come with the last batch. The same "
        "command again, without a limit on batches, draws what is missing.",
        soft_wrap=True,
    )


def _title(method: str) -> str:
    return "base model (zero_shot)" if method == "zero_shot" else method
