"""Drafts by a diffusion model, exact for any denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.guidance import LogValue, gradient_of
from dia_lightning.lm.row_cache import rows_at_once
from dia_lightning.numerics import draw_categorical
from dia_lightning.sampling.ensemble import Drafts
from dia_lightning.sampling.positions import Choice, Positions, Spans, gather_at, scatter_at
from dia_lightning.sampling.state import State, take
from dia_lightning.types import fill_after_end

# (z (B, T, d), t (B, T)) → logits (B, T, V). One that also has `at(z, t, index (B, K))` → (B, K, V)
# reads out less.
Logits = Callable[[Tensor, Tensor], Tensor]


class SharedDraws(NamedTuple):
    """What all drafts of a move share. choice: S. t: (B, 1), its level. z: (B, K, d), the
    noised z_S.

    opening: (B, k, V), the logits of the first round. push: (B, K, d), whose inner product with
        E(v) is the tilt, or None.
    """

    choice: Choice
    t: Tensor
    z: Tensor
    opening: Tensor
    push: Tensor | None

    def take(self, rows: Tensor) -> SharedDraws:
        """Those of the chains numbered `rows` (N,)."""
        push = None if self.push is None else self.push[rows]
        choice = Choice(*(field[rows] for field in self.choice))
        return SharedDraws(choice, self.t[rows], self.z[rows], self.opening[rows], push)


@dataclass(frozen=True)
class Tilt:
    """The critic's help for the proposal.

    Args:
        critic: h, (z, t) → (B,) in units of the reward; λ is each chain's own.
        strength: κ, how far the critic's gradient is trusted; 0 = no tilt.
        level: noise time t_c at which the critic sees S, around the mean ẑ_0 that the denoiser
            gives; None: z_S itself, which says little where the noise is high (the tilt falls as
            α²).
    """

    critic: LogValue
    strength: float
    level: float | None = None


class DenoiserDrafts:
    """Redraws some positions with a diffusion model, of which some noise is left: science.md,
    "Denoise-and-accept".

    A step draws positions S and a level t, noises S (an exact draw of the auxiliary variable z_S),
    and redraws S from the denoiser in `rounds` reveal rounds, each conditioned on what the earlier
    ones drew. What stands there is scored along the same order, so q(x_S | z, x_−S) is known of
    every draft, and a = N(z_S; α E(x_S), σ²).

    The proposal's logits may be helped, in every round: the tilt adds κ λ ⟨α_c ∇_{z_i} h, E(v)⟩,
    the first-order change of λ h; its gradient is taken once a step at a point that z_S and x_{−S}
    determine, which all drafts share.

    With `end_id` rows are texts in canonical form (end tokens after the end): proposals that are
    not are never made where that can be told beforehand, and have no weight where it cannot, so a
    move may shorten or lengthen the text.

    Args:
        proposal: (z, t) → logits, guided or not; see `DenoiserProposal`.
        embedding, schedule: E and the noise that `proposal` was made for.
        positions: how S is drawn; spans of 8 by default.
        levels: noise times, one is drawn for each chain and step; 1 is noise without information.
        rounds: reveal rounds; 1 redraws all of S independently given z.
        end_id: the end token, None where the target has none.
        tilt: the critic's help, or None.

    Raises:
        ValueError: for options out of range.
    """

    def __init__(
        self, proposal: Logits, embedding: TokenEmbedding, schedule: Schedule,
        positions: Positions | None = None, levels: Sequence[float] = (1.0,), rounds: int = 1,
        end_id: int | None = None, tilt: Tilt | None = None,
    ) -> None:  # fmt: skip
        if rounds < 1 or not levels or not all(0 < t <= 1 for t in levels):
            raise ValueError(
                f"rounds must be 1 or more and levels in (0, 1], got {rounds} and {levels}"
            )
        self.proposal, self.embedding, self.schedule = proposal, embedding, schedule
        self.positions = Spans(8) if positions is None else positions
        self.levels, self.rounds, self.end_id = tuple(levels), rounds, end_id
        self.tilt = tilt if tilt and tilt.strength else None

    def __call__(self, state: State, n: int, generator: torch.Generator) -> Drafts:
        tokens = state.tokens
        choice = self.positions.draw(tokens, state.prompt_mask, self.end_id, generator)
        levels = torch.tensor(self.levels, device=tokens.device)
        t = levels[
            torch.randint(len(levels), (len(tokens), 1), generator=generator, device=tokens.device)
        ]
        old = tokens.gather(1, choice.place)
        alpha, sigma = self.schedule.alpha(t)[..., None], self.schedule.sigma(t)[..., None]
        clean = self.embedding(old)
        z = alpha * clean + sigma * _noise_like(clean, generator)
        move = self._prepare(state, choice, z, t, generator)
        own = self._reveal(state, move, lambda logits, here: old[:, here])[1]
        own = own - _log_noise(z, alpha * clean, sigma, choice.valid)
        if n > 1:
            rows = torch.arange(len(tokens), device=tokens.device).repeat_interleave(n)
            state, move = take(state._replace(read=None), rows), move.take(rows)
            tokens, choice, z = state.tokens, move.choice, move.z
            alpha, sigma = alpha[rows], sigma[rows]
        new, log_q = self._reveal(
            state, move, lambda logits, here: draw_categorical(logits, generator)
        )
        drafted = scatter_at(tokens, choice, new)
        log_q = log_q - _log_noise(z, alpha * self.embedding(new), sigma, choice.valid)
        log_q = log_q - self.positions.log_ratio(
            choice, tokens, drafted, state.prompt_mask, self.end_id
        )
        if self.end_id is not None:
            text = fill_after_end(drafted, state.prompt_mask, self.end_id)
            log_q = log_q.masked_fill((text != drafted).any(1), torch.inf)
        shape = (len(own), n)
        log_q = torch.cat([own[:, None], log_q.view(shape)], 1)
        return Drafts(drafted.view(*shape, -1), log_q)

    def _prepare(
        self, state: State, choice: Choice, z: Tensor, t: Tensor, generator: torch.Generator
    ) -> SharedDraws:
        """Noise the chosen positions, ask for the first round's logits and for the tilt."""
        n = -(-z.shape[1] // self.rounds)
        if self.tilt is None or self.tilt.level is None:
            opening = self._logits(state.tokens, state.prompt_mask, choice, z, t, slice(0, n))
            push = self._push(state, choice, z, t) if self.tilt else None
            return SharedDraws(choice, t, z, opening, push)
        logits = self._logits(state.tokens, state.prompt_mask, choice, z, t, slice(0, z.shape[1]))
        at = torch.full_like(t, self.tilt.level)
        alpha, sigma = self.schedule.alpha(at)[..., None], self.schedule.sigma(at)[..., None]
        seen = alpha * self.embedding.expected(logits) + sigma * _noise_like(z, generator)
        return SharedDraws(choice, t, z, logits[:, :n], self._push(state, choice, seen, at))

    def _push(self, state: State, choice: Choice, z: Tensor, t: Tensor) -> Tensor:
        """κ λ α ∇_{z_i} h at the chosen positions, (B, K, d), where the critic sees `z` (B, K,
        d) at level t (B, 1).
        """
        assert self.tilt is not None
        noised, times, _ = self._noised(state.tokens, choice, z, t)
        rows = rows_at_once(noised)
        parts = zip(noised.split(rows), times.split(rows), strict=True)
        gradient = gather_at(
            torch.cat([gradient_of(self.tilt.critic, *part) for part in parts]), choice.place
        )
        return (
            self.tilt.strength
            * state.lam[:, None, None].to(z.dtype)
            * self.schedule.alpha(t)[..., None]
            * gradient
        )

    def _reveal(
        self, state: State, move: SharedDraws, choose: Callable[[Tensor, slice], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Reveal S in rounds, from the texts in `state`: tokens (B, K), as chosen, and log q of
        them, (B,) float64.
        """
        place, valid = move.choice
        tokens, values = state.tokens, []
        log_q = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        size, per_round = place.shape[1], move.opening.shape[1]
        for first in range(0, size, per_round):
            here = slice(first, first + per_round)
            later = Choice(place[:, first:], valid[:, first:])
            logits = move.opening
            if first:
                logits = self._logits(
                    tokens, state.prompt_mask, later, move.z[:, first:], move.t, slice(0, per_round)
                )
            logits = self._helped(logits, state, move, here).double()
            now = choose(logits, here)
            log_p = logits.gather(-1, now[..., None])[..., 0] - logits.logsumexp(-1)
            log_q = log_q + torch.where(valid[:, here], log_p, 0.0).sum(1)
            tokens = scatter_at(tokens, Choice(place[:, here], valid[:, here]), now)
            values.append(now)
        return torch.cat(values, 1), log_q

    def _helped(self, logits: Tensor, state: State, move: SharedDraws, here: slice) -> Tensor:
        """Logits (B, k, V) of the positions `here` of S with the tilt."""
        if move.push is not None:
            logits = logits + move.push[:, here] @ self.embedding.weight.T
        return logits

    def _noised(
        self, tokens: Tensor, choice: Choice, z: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, d) with z at the chosen positions, the times (B, T), and which positions are
        hidden (B, T) bool.
        """
        hidden = scatter_at(
            torch.zeros_like(tokens, dtype=torch.bool), choice, torch.ones_like(choice.valid)
        )
        return scatter_at(self.embedding(tokens), choice, z), torch.where(hidden, t, 0.0), hidden

    def _logits(
        self, tokens: Tensor, mask: Tensor, choice: Choice, z: Tensor, t: Tensor, here: slice
    ) -> Tensor:
        """Proposal logits (B, k, V) at the positions `here` of `choice`, all of which are hidden
        at level t.
        """
        noised, times, hidden = self._noised(tokens, choice, z, t)
        index = choice.place[:, here]
        if hasattr(self.proposal, "at"):
            logits = self.proposal.at(noised, times, index)
        else:
            logits = gather_at(self.proposal(noised, times), index)
        return (
            logits
            if self.end_id is None
            else _without_nonsense(logits, index, tokens, mask, hidden, self.end_id)
        )


def _noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _log_noise(z: Tensor, mean: Tensor, sigma: Tensor, valid: Tensor) -> Tensor:
    """(B,) float64 log N(z; mean, σ²) of the `valid` positions, up to a constant that does not
    depend on the mean.
    """
    log_p = -((z - mean).double().square().sum(-1)) / (2 * sigma[..., 0].double().square())
    return torch.where(valid, log_p, 0.0).sum(1)


def _without_nonsense(
    logits: Tensor,
    index: Tensor,
    tokens: Tensor,
    prompt_mask: Tensor,
    is_hidden: Tensor,
    end_id: int,
) -> Tensor:
    """Bar the end token before a known word, and everything but the end token after a known end.

    What is known lies outside S or was revealed in an earlier round, so the rule is the same in
    both directions.
    """
    is_end = tokens == end_id
    # A fixed end token counts as a word here: the text must reach it.
    word = ((~is_end | prompt_mask) & ~is_hidden).long()
    end = (is_end & ~is_hidden & ~prompt_mask).long()
    word_follows = (word.flip(1).cumsum(1).flip(1) > 0).gather(1, index)
    end_precedes = (end.cumsum(1) > 0).gather(1, index)
    only_end = torch.zeros_like(logits[0, 0], dtype=torch.bool)
    only_end[end_id] = True
    barred = torch.where(end_precedes[..., None], ~only_end, only_end & word_follows[..., None])
    return logits.masked_fill(barred, -torch.inf)
