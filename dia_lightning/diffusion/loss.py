"""What the denoiser is trained on: noised rows, the three losses, and the running loss that
bends the noise times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import Schedule, staggered

# Share of training rows: all positions at one time, a clean prefix, clean random positions, a
# noised span between clean text, times rising to the right.
_MIXTURE = (0.15, 0.1, 0.1, 0.3, 0.35)
_LONGEST_GAP = 16
_LOGITS_PER_CHUNK = 1 << 25
RowLoss = Callable[..., Tensor]
"""network, hidden, query, targets, t → the loss of each row (N,)."""


class Noised(NamedTuple):
    """Rows at their noise times: z (B, T, d), t (B, T), and `noised` (B, T) bool, False where a
    position was left clean.
    """

    z: Tensor
    t: Tensor
    noised: Tensor


def draw_times(n_rows: int, length: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
    """(B, T) noise times for training, rows drawn from the mixture that makes one network serve
    every use.

    Levels are stratified over the batch (low discrepancy, Kingma et al., arXiv:2107.00630, App.
    I.1); 0 means clean.
    """
    device = schedule.knots.device
    strata = torch.arange(n_rows, device=device) + torch.rand(1, generator=generator, device=device)
    u = (strata / n_rows)[torch.randperm(n_rows, generator=generator, device=device)]
    kind = torch.rand(n_rows, generator=generator, device=device)
    share = torch.rand(n_rows, generator=generator, device=device)[:, None]
    place = torch.arange(length, device=device) / length
    # A span takes three, also in shorter rows.
    scatter = torch.rand(n_rows, max(3, length), generator=generator, device=device)
    past_all, past_prefix, past_scattered, past_span = (
        kind >= sum(_MIXTURE[:i]) for i in range(1, 5)
    )
    clean = torch.where(
        past_scattered[:, None], _outside_span(share, place, scatter), scatter[:, :length] < share
    )
    clean = (
        torch.where(past_prefix[:, None], clean, place < share) & (past_all & ~past_span)[:, None]
    )
    # Half of the spans hide their tokens altogether, as the first reveal of denoise-and-accept
    # does.
    u = torch.where(past_scattered & ~past_span & (scatter[:, 0] < 0.5), 1.0, u)
    # Staggers from 1 to T, log-uniform: from a broad front to token by token.
    stagger = torch.exp(share[:, 0] * torch.log(torch.tensor(float(length), device=device)))
    levels = torch.where(
        past_span[:, None], staggered(u, length, stagger), u[:, None].expand(-1, length)
    )
    return torch.where(clean, 0.0, schedule.warp(levels))


def draw_gaps(n_rows: int, length: int, schedule: Schedule, generator: torch.Generator) -> Tensor:
    """(B, T) noise times for training an infiller: gaps of 1 to 16 positions, log-uniform, with
    clean text of 1 to 8 between them; in a third of the rows none. Six in ten rows hide theirs
    altogether, the others have one level each; 0 means clean.
    """
    device = schedule.knots.device
    draws = torch.rand(n_rows, length + 5, generator=generator, device=device)
    begin, place = (8 * draws[:, -1]).long(), torch.arange(length, device=device)
    gap = torch.zeros(n_rows, length, dtype=torch.bool, device=device)
    for i in range(0, length, 2):
        size = torch.exp(draws[:, i] * math.log(_LONGEST_GAP + 1)).long().clamp(1, _LONGEST_GAP)
        gap |= (place >= begin[:, None]) & (place < (begin + size)[:, None])
        begin = begin + size + 1 + (8 * draws[:, i + 1]).long()
    level = schedule.warp(torch.where(draws[:, -2] < 0.6, 1.0, draws[:, -3]))
    return torch.where(gap & (draws[:, -4:-3] > 1 / 3), level[:, None], 0.0)


def _outside_span(share: Tensor, place: Tensor, scatter: Tensor) -> Tensor:
    """(B, T) True outside a span of log-uniform width, and in a part of it from its left end on
    (revealed already).
    """
    length = place.shape[0]
    width = torch.exp(share * torch.log(torch.tensor(float(length), device=place.device))) / length
    begin, revealed = 0.75 * scatter[:, 1:2], (2 * scatter[:, 2:3] - 1).clamp_min(0) * width
    return (place < begin + revealed) | (place >= begin + width)


def noise(
    tokens: Tensor,
    times: Tensor,
    ends: Tensor,
    rows: Tensor,
    embedding: TokenEmbedding,
    schedule: Schedule,
    eps: Tensor,
) -> Noised:
    """Noise rows: z = α E(x) + σ ε at (B, T) `times`.

    `ends` (B, T) bool marks end tokens after a text's own; in every second row they are left clean,
    so that the network
    learns both: texts whose length is known, and texts that decide where they end. `rows` (B,)
    numbers the rows in the batch of all processes.
    """
    known = (rows % 2 == 0)[:, None]
    t = torch.where(ends & known, 0.0, times)
    alpha, sigma = schedule.alpha(t)[..., None], schedule.sigma(t)[..., None]
    noised = t > 0
    z0 = embedding(tokens)
    return Noised(torch.where(noised[..., None], alpha * z0 + sigma * eps, z0), t, noised)


def summed(
    loss: RowLoss,
    network: DenoiserNetwork,
    hidden: Tensor,
    query: Tensor,
    targets: Tensor,
    t: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sum of one of `LOSSES` over rows, with its gradient, and its value in each row (N,), without.

    Logits are made in chunks of at most 2²⁵ numbers (128 MiB of float32). A chunk's gradient is
    taken while its logits are there, so that memory does not grow with N × V and no logits are made
    twice.

    Args:
        hidden: (N, width). query: (N, d), see `DenoiserNetwork.hidden`. targets: (N,) int64. t:
            (N,).
    """
    if len(targets) <= _chunk_rows(network) or not torch.is_grad_enabled():
        parts = _chunks(network, hidden, query, targets, t)
        values = torch.cat([loss(network, *part) for part in parts])
        return values.sum(), values.detach()
    weights = [weight for weight in network.head.parameters() if weight.requires_grad]
    total, values = _Summed.apply(loss, network, hidden, query, targets, t, *weights)  # type: ignore[no-untyped-call]
    return total, values


class _Summed(torch.autograd.Function):
    """`summed` in more than one chunk."""

    @staticmethod
    def forward(
        ctx: Any, loss: RowLoss, network: DenoiserNetwork, hidden: Tensor, query: Tensor,
        targets: Tensor, t: Tensor, *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        values, of_hidden, of_weights = (
            [],
            torch.empty_like(hidden),
            [torch.zeros_like(weight) for weight in weights],
        )
        begin = 0
        for h, *rest in _chunks(network, hidden, query, targets, t):
            leaf = h.detach().requires_grad_()
            with torch.enable_grad():
                value = loss(network, leaf, *rest)
                total = value.sum()
            with torch.autocast(hidden.device.type, enabled=False):
                first, *others = torch.autograd.grad(total, [leaf, *weights])
            of_hidden[begin : begin + len(h)] = first
            for gradient, more in zip(of_weights, others, strict=True):
                gradient += more
            begin += len(h)
            values.append(value.detach())
        ctx.save_for_backward(of_hidden, *of_weights)
        every = torch.cat(values)
        ctx.mark_non_differentiable(every)
        return every.sum(), every

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *of_weights = (gradient.mul_(upstream[0]) for gradient in ctx.saved_tensors)
        return None, None, of_hidden, None, None, None, *of_weights


def _chunk_rows(network: DenoiserNetwork) -> int:
    return max(1, _LOGITS_PER_CHUNK // network.embedding.vocab_size)


def _chunks(network: DenoiserNetwork, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(_chunk_rows(network)) for x in rows), strict=True)


def expected_embedding(network: DenoiserNetwork, hidden: Tensor, query: Tensor) -> Tensor:
    """ẑ_0 (N, d) for rows of `hidden` and `query`, in the same chunks."""
    return torch.cat(
        [
            network.embedding.expected(network.readout(*part))
            for part in _chunks(network, hidden, query)
        ]
    )


def _regression(weigh: Callable[[Tensor, Tensor], Tensor]) -> RowLoss:
    def loss(
        network: DenoiserNetwork, hidden: Tensor, query: Tensor, targets: Tensor, t: Tensor
    ) -> Tensor:
        error = (
            (expected_embedding(network, hidden, query) - network.embedding(targets))
            .square()
            .mean(-1)
        )
        return weigh(network.schedule.alpha(t), network.schedule.sigma(t)) * error

    return loss


def _ce(
    network: DenoiserNetwork, hidden: Tensor, query: Tensor, targets: Tensor, t: Tensor
) -> Tensor:
    return F.cross_entropy(network.readout(hidden, query), targets, reduction="none")


# ‖ε − ε_ψ‖² = (α/σ)² ‖z_0 − ẑ_0‖², as ε and ẑ_0 say the same; both are means over the d
# coordinates.
LOSSES: dict[str, RowLoss] = {
    "ce": _ce,
    "eps": _regression(lambda alpha, sigma: (alpha / sigma).square()),
    "x0": _regression(lambda alpha, sigma: alpha.new_ones(())),
}


def warp_knots(t: Tensor, loss: Tensor, n_knots: int, floor: float = 0.2) -> Tensor:
    """Knots t(u) that give each stretch of t as much of u as the loss rises over it.

    Args:
        t: (K,) bin centres in [0, 1], rising. loss: (K,) running loss in each bin.
        n_knots: number of pieces. floor: share of u that is spread evenly over t.

    Returns:
        (n_knots + 1,) strictly rising from 0 to 1.
    """
    rising = torch.cummax(loss, 0).values
    edges = torch.cat([t.new_zeros(1), (t[1:] + t[:-1]) / 2, t.new_ones(1)])
    # Loss at the edges: nothing is lost at t = 0.
    at_edges = torch.cat([t.new_zeros(1), (rising[1:] + rising[:-1]) / 2, rising[-1:]])
    cdf = (1 - floor) * at_edges / at_edges[-1].clamp_min(1e-6) + floor * edges
    u = torch.linspace(0, 1, n_knots + 1, device=t.device)
    cell = (torch.searchsorted(cdf, u, right=True) - 1).clamp(0, len(edges) - 2)
    share = ((u - cdf[cell]) / (cdf[cell + 1] - cdf[cell])).clamp(0, 1)
    knots = edges[cell] + share * (edges[cell + 1] - edges[cell])
    knots[0], knots[-1] = 0.0, 1.0
    return knots
