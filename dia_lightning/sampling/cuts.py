"""Where a move cuts a text: c(i | x), and what that choice contributes to its weight."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dia_lightning.lm.row_cache import TokenTerms

Cut = Literal["uniform", "entropy", "jump"]
CUTS = get_args(Cut)
# Nats that a place is worth where p_θ is sure: no place may be out of reach.
_LEAST = 0.1


def worth(rule: Cut, read: TokenTerms, allowed: Tensor) -> Tensor:
    """(N, T) float64 unnormalised c(i | x): 0 where i is not `allowed`; else 1 (`uniform`), ε + the
    entropy of p_θ's next token at i (`entropy`), or ε + its rise from the place before (`jump`,
    arXiv:2605.30327). It depends on x_<i alone, its sum on all of x.
    """
    if rule == "uniform":
        return allowed.double()
    assert read.entropy is not None
    entropy = read.entropy.double()
    if rule == "jump":
        before = torch.cat([torch.zeros_like(entropy[:, :1]), entropy[:, :-1]], 1)
        entropy = (entropy - before).clamp_min(0)
    return torch.where(allowed, _LEAST + entropy, 0.0)


def draw_place(weights: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) places drawn in proportion to `weights` (N, T); any where all are 0."""
    u = torch.rand(len(weights), generator=generator, device=weights.device, dtype=torch.float64)
    cumulative = weights.cumsum(1)
    u = u * cumulative[:, -1]
    place = torch.searchsorted(cumulative, u[:, None], right=True)[:, 0]
    # Rounding may carry u to the whole sum: then the last place that has a weight.
    last = (weights.cumsum(1) < cumulative[:, -1:]).sum(1)
    return torch.minimum(place, last).clamp_max(weights.shape[1] - 1)


def log_choice(weights: Tensor, place: Tensor) -> Tensor:
    """(N,) log c(place | x)."""
    chosen = weights.gather(1, place[:, None])[:, 0]
    return chosen.log() - weights.sum(1).log()
