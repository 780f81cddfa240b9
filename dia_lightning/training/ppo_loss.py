"""The formulas of PPO and RLOO against a KL-penalised reward, as functions over tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

KL_GAIN = 0.1
KL_ERROR_MAX = 0.2


def token_rewards(reward: Tensor, log_ratio: Tensor, mask: Tensor, beta: Tensor | float) -> Tensor:
    """(B, T): −β log(policy / p_θ) at each token, and the text's reward (B,) at its last one
    (Ziegler et al. 2019, eq. 2).

    Args:
        reward: (B,). log_ratio: (B, T) nats, log policy − log p_θ of each drawn token. mask: (B,
            T), True at drawn tokens.
    """
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(mask, -beta * log_ratio, 0.0) + torch.where(last, reward[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: float) -> Tensor:
    """(B, T) generalised advantage estimates without discount (Schulman et al. 2016, eq. 16, γ =
    1).

    A_t = Σ_l λ^l δ_{t+l}, δ_t = r_t + V_{t+1} − V_t, where V is 0 after the last token. values (B,
    T): V before each token.
    """
    values = torch.where(mask, values, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta = torch.where(mask, rewards + following - values, 0.0)
    place = torch.arange(delta.shape[1], device=delta.device)
    steps = place[None, :] - place[:, None]
    decay = torch.where(steps >= 0, gae_lambda ** steps.clamp_min(0).double(), 0.0)
    return torch.where(mask, delta.double() @ decay.T, 0.0).to(delta.dtype)


def leave_one_out(scores: Tensor, group: Tensor) -> Tensor:
    """(B,) each text's score less the mean of the others of its group (RLOO, Ahmadian et al. 2024,
    eq. 7).

    Args:
        scores: (B,). group: (B,) int64, number of the prompt; every group has two texts or more.
    """
    n_groups = len(group)
    total = scores.new_zeros(n_groups).index_add(0, group, scores)[group]
    size = scores.new_zeros(n_groups).index_add(0, group, torch.ones_like(scores))[group]
    return scores - (total - scores) / (size - 1)


def whiten(x: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """`x` less its mean, over its standard deviation, where `mask` is True; 0 elsewhere.

    Args:
        x, mask: (B, T). total: the sum of a tensor over all processes, whose entries all count.
    """
    kept = torch.where(mask, x, 0.0).double()
    n, first = total(torch.stack([mask.sum().double(), kept.sum()]))
    mean = first / n
    variance = total(torch.where(mask, kept - mean, 0.0).square().sum()) / n
    return torch.where(mask, (kept - mean) / (variance.sqrt() + 1e-8), 0.0).to(x.dtype)


def clipped_loss(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """−min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) of every entry, ρ = exp(log_ratio) (PPO, Schulman et al.
    2017, eq. 7).

    At ρ = 1 its gradient is that of −A log π, the policy gradient.
    """
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def was_clipped(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """True where the clip leaves no gradient."""
    ratio = log_ratio.exp()
    return torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)


def adapted_beta(beta: Tensor, kl: Tensor, target: float) -> Tensor:
    """β after a step whose KL was `kl` nats a text: β (1 + 0.1 e), e = kl / target − 1 within
    ±0.2 (Ziegler et al. 2019).
    """
    return beta * (1 + KL_GAIN * (kl / target - 1).clamp(-KL_ERROR_MAX, KL_ERROR_MAX))


def explained_variance(
    target: Tensor, estimate: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """1 − Var(target − estimate) / Var(target) over the entries of `mask` in all processes; NaN
    where target is constant.
    """
    parts = [torch.where(mask, x, 0.0).double() for x in (target, target - estimate)]
    sums = total(
        torch.stack(
            [mask.sum().double(), *(x.sum() for x in parts), *(x.square().sum() for x in parts)]
        )
    )
    n, spread = sums[0], sums[3:] - sums[1:3].square() / sums[0]
    return torch.where(spread[0] > 1e-12 * n, 1 - spread[1] / spread[0], torch.nan)
