"""A run of `predict` or `test` for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dia_lightning.types import Generations, has_blank

_SHOWN = 4  # texts of each batch
_WIDEST = 1e19  # TensorBoard's bins end at 1e20


def write_events(
    folder: Path, runs: Sequence[Sequence[Generations]], figures: Sequence[Mapping[str, Any]]
) -> None:
    """One TensorBoard run a method, its batches as steps.

    Of each batch: histograms of every reward and of log p_θ per token, means and histograms of the
    acceptance rate and of every diagnostic (effective sample size, log Ẑ and so on), and a few
    texts. Of the whole run: every number of `metrics.json`; of each prompt, by its number from 1,
    those of `by_prompt`.
    """
    from torch.utils.tensorboard import SummaryWriter

    for batches, numbers in zip(runs, figures, strict=True):
        with SummaryWriter(str(folder / batches[0].method)) as writer:
            for batch in batches:
                _write_batch(writer, batch)
            for name, value in numbers.items():
                if isinstance(value, int | float):
                    writer.add_scalar(f"run/{name}", value)
            for number, row in enumerate(numbers.get("by_prompt", []), 1):
                for name, value in row.items():
                    if isinstance(value, int | float):
                        writer.add_scalar(f"prompts/{name}", value, number)


def _write_batch(writer: Any, batch: Generations) -> None:
    followed = {} if batch.accept_rate is None else {"accept_rate": batch.accept_rate}
    followed |= batch.diagnostics
    spread = {"reward": batch.reward, "log_p_per_token": batch.log_p / batch.n_tokens}
    spread |= {f"reward_{name}": values for name, values in batch.rewards.items()}
    for name, values in (spread | followed).items():
        known: Tensor = values[values.isfinite()]
        if not len(known):
            continue
        writer.add_histogram(f"texts/{name}", known.double().clamp(-_WIDEST, _WIDEST), batch.index)
        if name in followed:
            writer.add_scalar(f"sampler/{name}", known.double().mean(), batch.index)
    lines = [
        _bold(text) if has_blank(prompt) else f"{prompt}{_bold(text)}"
        for prompt, text in zip(batch.prompts, batch.texts, strict=True)
    ]
    writer.add_text("texts/samples", "\n\n".join(lines[:_SHOWN]), batch.index)


def _bold(text: str) -> str:
    """`text` in Markdown's bold, which may begin and end with no space."""
    bare = text.strip()
    before, _, after = text.partition(bare) if bare else (text, "", "")
    return f"{before}**{bare}**{after}" if bare else text
