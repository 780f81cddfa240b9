"""From text to the noise that a solver starts at, and back to tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dia_lightning.diffusion.schedule import Schedule, time_grid
from dia_lightning.embedding import TokenEmbedding
from dia_lightning.guidance import Predict, Prediction
from dia_lightning.lm import draw_categorical
from dia_lightning.sampling.solvers import Commit
from dia_lightning.sampling.solvers import sample as sample_latent
from dia_lightning.types import Prompts, fill_after_end


def starting_point(
    batch: Prompts, embedding: TokenEmbedding, schedule: Schedule, steps: int, stagger: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Z (B, T, d), pure noise but for the prompts, and times (steps + 1, B, T), 0 at the prompts."""
    clean = embedding(batch.tokens)
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    grid = time_grid(schedule, steps, batch.tokens.shape[1], stagger)
    times = torch.where(batch.prompt_mask, 0.0, grid[:, None])
    return torch.where(batch.prompt_mask[..., None], clean, noise), times


def commit_tokens(embedding: TokenEmbedding, sample: bool, generator: torch.Generator) -> Commit:
    """What a position becomes when it arrives at t = 0: E of a token drawn from the logits, or of the likeliest one."""

    def commit(prediction: Prediction) -> Tensor:
        logits = prediction.logits
        return embedding(draw_categorical(logits, generator) if sample else logits.argmax(-1))

    return commit


def draw_texts(
    predict: Predict, batch: Prompts, embedding: TokenEmbedding, schedule: Schedule, end_id: int,
    generator: torch.Generator, sampler: str, steps: int, stagger: float, sample: bool = True, **options: Any,
) -> Tensor:  # fmt: skip
    """Run the solver called `sampler` from noise to text: tokens (B, T) in canonical form, prompts untouched."""
    z, times = starting_point(batch, embedding, schedule, steps, stagger, generator)
    commit = commit_tokens(embedding, sample, generator)
    z = sample_latent(sampler, predict, schedule, z, times, generator, commit, **options)
    tokens = torch.where(batch.prompt_mask, batch.tokens, embedding.decode(z))
    return fill_after_end(tokens, batch.prompt_mask, end_id)
