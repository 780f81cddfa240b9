"""The value of an unfinished text, which guided decoding and twisted SMC ask of a critic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.lm.row_cache import rows_at_once
from dia_lightning.samplers.networks import RewardValue

# tokens (N, T) int64, which of them are settled (N, T) bool → (N,), in units of the reward.
PrefixValue = Callable[[Tensor, Tensor], Tensor]


def settled(tokens: Tensor, prompt_mask: Tensor, place: int, end_id: int) -> Tensor:
    """(N, T) bool, what is known once the positions before `place` are written: these, and all
    of a text that has ended.
    """
    before = torch.arange(tokens.shape[1], device=tokens.device) < place
    ended = ((tokens == end_id) & before & ~prompt_mask).any(1)
    return before | prompt_mask | ended[:, None]


def critic_of_prefixes(
    value: RewardValue, embedding: TokenEmbedding, length: int, generator: torch.Generator
) -> PrefixValue:
    """The critic's value of prefixes of texts of `length` positions.

    A critic is conditioned on a noise time for every token, and a clean beginning followed by noise
    is among what it was
    trained on: what is settled goes in clean (t = 0), all else as pure noise (t = 1), of which it
    knows nothing. The noise is drawn once, here, so that two prefixes differ in value by their
    tokens alone.
    """
    noise = torch.randn(length, embedding.dim, generator=generator, device=generator.device)

    def of(tokens: Tensor, known: Tensor) -> Tensor:
        rows, parts = rows_at_once(tokens), []
        for x, clean in zip(tokens.split(rows), known.split(rows), strict=True):
            parts.append(
                value(torch.where(clean[..., None], embedding(x), noise), (~clean).float())
            )
        return torch.cat(parts)

    return of
