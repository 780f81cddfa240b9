"""From text to the noise that a solver starts at, and back to tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import Schedule, time_grid
from dia_lightning.errors import UserError
from dia_lightning.guidance import Predict, Prediction, Watched
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.numerics import draw_categorical
from dia_lightning.sampling.solvers import Commit
from dia_lightning.sampling.solvers import solve as sample_latent
from dia_lightning.types import Batch, fill_after_end, must_go_on


def starting_point(
    batch: Batch, embedding: TokenEmbedding, schedule: Schedule, steps: int, stagger: float,
    generator: torch.Generator, begin: Tensor | None = None, strength: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Where a solver starts: z (B, T, d) and times (steps + 1, B, T), 0 at the prompts.

    Without `begin` z is pure noise but for the prompts. With the tokens `begin` (B, T) it is their
    embedding noised to the level u = `strength`, and no position is ever noised more than that
    (SDEdit, Meng et al., arXiv:2108.01073).
    """
    clean = embedding(batch.tokens)
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    grid = time_grid(schedule, steps, batch.tokens.shape[1], stagger)
    if begin is not None:
        most = schedule.warp(torch.full((), strength, device=grid.device))
        grid = grid.minimum(most)
        noise = schedule.alpha(most) * embedding(begin) + schedule.sigma(most) * noise
        # Levels above the highest one would ask the network for nothing.
        grid = grid[max(0, int((grid == most).all(1).sum()) - 1) :]
    times = torch.where(batch.prompt_mask, 0.0, grid[:, None])
    return torch.where(batch.prompt_mask[..., None], clean, noise), times


def source_rows(lm: BaseLM, batch: Batch) -> Tensor:
    """(B, T) tokens of each record's `source`, the text to rewrite, after the prompt.

    Raises:
        UserError: if a record has none, or it does not fit.
    """
    rows = batch.tokens.clone()
    lengths, wide = batch.prompt_mask.sum(1).tolist(), batch.tokens.shape[1]
    for row, n_prompt, record in zip(rows, lengths, batch.records, strict=True):
        source = record.get("source")
        if not isinstance(source, str):
            has = ", ".join(record) or "none"
            raise UserError(
                "prompts: no field 'source' given, which is the text to rewrite"
                f" (fields there: {has})"
            )
        ids = lm.tokenizer(source, add_special_tokens=False)["input_ids"]
        if n_prompt + len(ids) > wide:
            raise UserError(
                f"prompts: the source {source[:40]!r} has {len(ids)} tokens,"
                f" allowed: at most {wide - n_prompt} (data.max_length is {wide})"
            )
        row[n_prompt:] = lm.end_id
        row[n_prompt : n_prompt + len(ids)] = torch.tensor(ids, dtype=row.dtype)
    return rows


def commit_tokens(
    embedding: TokenEmbedding,
    sample: bool,
    generator: torch.Generator,
    barred: Tensor | None = None,
) -> Commit:
    """What a position becomes when it arrives at t = 0: E of a token drawn from the logits, or of
    the likeliest one.

    `barred` (B, T, V) bool: tokens that a position may not become.
    """

    def commit(prediction: Prediction) -> Tensor:
        logits = (
            prediction.logits
            if barred is None
            else prediction.logits.masked_fill(barred, -torch.inf)
        )
        return embedding(draw_categorical(logits, generator) if sample else logits.argmax(-1))

    return commit


def _barred(prompt_mask: Tensor, embedding: TokenEmbedding, end_id: int) -> Tensor | None:
    """The end token where the text must go on, if it must anywhere."""
    inside = must_go_on(prompt_mask)
    if not bool(inside.any()):
        return None
    return inside[..., None] & (torch.arange(len(embedding.weight), device=inside.device) == end_id)


def draw_texts(
    predict: Predict, batch: Batch, embedding: TokenEmbedding, schedule: Schedule, end_id: int,
    generator: torch.Generator, sampler: str, steps: int, stagger: float, sample: bool = True,
    begin: Tensor | None = None, strength: float = 1.0, **options: Any,
) -> Tensor:  # fmt: skip
    """Run the solver called `sampler` from noise to text: tokens (B, T) in canonical form, prompts
    untouched.

    `begin`, `strength`: see `starting_point`.

    Raises:
        NotFinite: if what `predict` gives is not, after the run.
    """
    watched = Watched(predict)
    z, times = starting_point(
        batch, embedding, schedule, steps, stagger, generator, begin, strength
    )
    commit = commit_tokens(
        embedding, sample, generator, _barred(batch.prompt_mask, embedding, end_id)
    )
    z = sample_latent(sampler, watched, schedule, z, times, generator, commit, **options)
    watched.check()
    tokens = torch.where(batch.prompt_mask, batch.tokens, embedding.decode(z))
    return fill_after_end(tokens, batch.prompt_mask, end_id)
