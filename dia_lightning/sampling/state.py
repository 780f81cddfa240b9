"""Chains, and what a step of a kernel does to them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dia_lightning.lm.row_cache import TokenTerms
from dia_lightning.target import Target, TargetDensity, terms_of


class State(NamedTuple):
    """Chains and what is known of them, so that a step reads and scores only what it proposes.

    tokens: (B, T) int64. prompt_mask: (B, T) bool, what is given. log_base, reward: (B,) float64,
        the target's terms.
    lam: (B,) float64, λ of each chain. read: what p_θ says of `tokens`, where the last move has
        kept it, else None; who changes `tokens` by hand sets it to None.
    """

    tokens: Tensor
    prompt_mask: Tensor
    log_base: Tensor
    reward: Tensor
    lam: Tensor
    read: TokenTerms | None = None

    @property
    def log_prob(self) -> Tensor:
        return self.log_base + self.lam * self.reward


class Info(NamedTuple):
    """One step. accepted: (B,) bool. log_ratio: (B,) float64, log of the odds of a move: of the
    Metropolis–Hastings ratio, or of change against none (−inf: impossible).

    undefined: (B,) bool, where the ratio was NaN although the proposed text is possible; None of a
        kernel that cannot tell.
    """

    accepted: Tensor
    log_ratio: Tensor
    undefined: Tensor | None = None


class Kernel(Protocol):
    """A move that leaves π at `state.lam` invariant."""

    def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]: ...


def start(
    target: Target | TargetDensity, tokens: Tensor, prompt_mask: Tensor | None = None,
    lam: Tensor | None = None,
) -> State:  # fmt: skip
    """Chains at `tokens`; λ is the target's unless given (B,)."""
    if prompt_mask is None:
        prompt_mask = torch.zeros_like(tokens, dtype=torch.bool)
    log_base, reward = terms_of(target, tokens, prompt_mask)
    if lam is None:
        lam = torch.full_like(reward, getattr(target, "lam", 0.0))
    return State(tokens, prompt_mask, log_base, reward, lam)


def take(state: State, rows: Tensor) -> State:
    """The chains numbered `rows` (N,) int64."""
    read = None if state.read is None else state.read.take(rows)
    tokens, mask, log_base, reward, lam = (field[rows] for field in state[:5])
    return State(tokens, mask, log_base, reward, lam, read)
