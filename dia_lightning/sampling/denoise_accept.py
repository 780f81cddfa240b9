"""Denoise-and-accept: Metropolis–Hastings on tokens with a diffusion model as the proposal, exact for any denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.embedding import TokenEmbedding
from dia_lightning.lm import draw_categorical
from dia_lightning.sampling.positions import Choice, Positions, Spans
from dia_lightning.target import Target, TargetDensity, Terms, terms_of
from dia_lightning.types import fill_after_end

# (z (B, T, d), t (B, T)) → logits (B, T, V). One that also has `at(z, t, index (B, K))` → (B, K, V) reads out less.
Proposal = Callable[[Tensor, Tensor], Tensor]


class State(NamedTuple):
    """Chains and what is known of them, so that a step scores only what it proposes.

    tokens: (B, T) int64. prompt_mask: (B, T) bool, never changed. log_base, reward: (B,) float64, the target's terms.
    lam: (B,) float64, λ of each chain.
    """

    tokens: Tensor
    prompt_mask: Tensor
    log_base: Tensor
    reward: Tensor
    lam: Tensor

    @property
    def log_prob(self) -> Tensor:
        return self.log_base + self.lam * self.reward


class Info(NamedTuple):
    """One step. accepted: (B,) bool. log_ratio: (B,) float64, log of the Metropolis–Hastings ratio (−inf: impossible)."""

    accepted: Tensor
    log_ratio: Tensor


class Kernel(Protocol):
    """A move that leaves π at `state.lam` invariant."""

    def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]: ...


def start(target: Target, tokens: Tensor, prompt_mask: Tensor | None = None, lam: Tensor | None = None) -> State:
    """Chains at `tokens`; λ is the target's unless given (B,)."""
    if prompt_mask is None:
        prompt_mask = torch.zeros_like(tokens, dtype=torch.bool)
    log_base, reward = terms_of(target, tokens)
    if lam is None:
        lam = torch.full_like(reward, getattr(target, "lam", 0.0))
    return State(tokens, prompt_mask, log_base, reward, lam)


def accept(state: State, tokens: Tensor, proposed: Terms, log_ratio: Tensor, generator: torch.Generator) -> tuple[State, Info]:
    """Move to `tokens`, whose terms are `proposed`, with probability min(1, exp(log_ratio))."""
    # A NaN is a rejection.
    log_ratio = torch.where(log_ratio.isnan(), -torch.inf, log_ratio)
    u = torch.rand(log_ratio.shape, generator=generator, device=log_ratio.device, dtype=torch.float64)
    accepted = u.log() < log_ratio
    new = State(
        torch.where(accepted[:, None], tokens, state.tokens),
        state.prompt_mask,
        torch.where(accepted, proposed.log_base, state.log_base),
        torch.where(accepted, proposed.reward, state.reward),
        state.lam,
    )
    return new, Info(accepted, log_ratio)


class DenoiseAccept:
    """The kernel of science.md, "Denoise-and-accept".

    A step draws positions S and a level t, noises S (an exact draw of the auxiliary variable z_S), redraws S from the
    denoiser in `rounds` reveal rounds, each conditioned on what the earlier ones drew, and accepts with the ratio
    [π(x') N(z_S; α E(x'_S), σ²) q(x_S | z)] / [π(x) N(z_S; α E(x_S), σ²) q(x'_S | z)]. The reverse move is scored along
    the same order. So π is left invariant for any proposal; a better one is only accepted more often.

    With `end_id` rows are texts in canonical form (end tokens after the end): proposals that are not are never made where
    that can be told beforehand, and rejected where it cannot, so a move may shorten or lengthen the text.

    Args:
        target: any object with `log_prob(tokens)`, unnormalised.
        proposal: (z, t) → logits, guided or not; see `DenoiserProposal`.
        embedding, schedule: E and the noise that `proposal` was made for.
        positions: how S is drawn; spans of 8 by default.
        levels: noise times, one is drawn for each chain and step; 1 is noise without information.
        rounds: reveal rounds; 1 redraws all of S independently given z.
        end_id: the end token, None where the target has none.
    """

    def __init__(
        self,
        target: Target | TargetDensity,
        proposal: Proposal,
        embedding: TokenEmbedding,
        schedule: Schedule,
        positions: Positions | None = None,
        levels: Sequence[float] = (1.0,),
        rounds: int = 1,
        end_id: int | None = None,
    ) -> None:
        if rounds < 1 or not levels or not all(0 < t <= 1 for t in levels):
            raise ValueError(f"rounds must be 1 or more and levels in (0, 1], got {rounds} and {levels}")
        self.target, self.proposal, self.embedding, self.schedule = target, proposal, embedding, schedule
        self.positions = Spans(8) if positions is None else positions
        self.levels, self.rounds, self.end_id = tuple(levels), rounds, end_id

    def init(self, tokens: Tensor, prompt_mask: Tensor | None = None, lam: Tensor | None = None) -> State:
        """Chains at `tokens` (B, T); see `start`."""
        return start(self.target, tokens, prompt_mask, lam)

    def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
        tokens = state.tokens
        choice = self.positions.draw(tokens, state.prompt_mask, self.end_id, generator)
        levels = torch.tensor(self.levels, device=tokens.device)
        which = torch.randint(len(levels), (len(tokens), 1), generator=generator, device=tokens.device)
        t = levels[which]
        old = tokens.gather(1, choice.place)
        alpha, sigma = self.schedule.alpha(t)[..., None], self.schedule.sigma(t)[..., None]
        clean = self.embedding(old)
        z = alpha * clean + sigma * torch.randn(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
        new, log_q = self._redraw(state, choice, z, t, old, generator)
        proposed = _put(tokens, choice, new)
        log_noise = _log_normal(z, alpha * self.embedding(new), sigma) - _log_normal(z, alpha * clean, sigma)
        log_q = log_q + torch.where(choice.valid, log_noise, 0.0).sum(1)
        log_q = log_q + self.positions.log_ratio(choice, tokens, proposed, state.prompt_mask, self.end_id)
        if self.end_id is not None:
            canonical = (fill_after_end(proposed, state.prompt_mask, self.end_id) == proposed).all(1)
            log_q = torch.where(canonical, log_q, -torch.inf)
            # A text that is no text cannot be scored; what is scored in its place does not matter.
            proposed = torch.where(canonical[:, None], proposed, tokens)
        terms = terms_of(self.target, proposed)
        log_pi = terms.log_base - state.log_base + state.lam * (terms.reward - state.reward)
        return accept(state, proposed, terms, log_pi + log_q, generator)

    def _redraw(
        self, state: State, choice: Choice, z: Tensor, t: Tensor, old: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """New tokens (B, K) at the chosen positions, and log q(x_S | z) − log q(x'_S | z), (B,) float64.

        Both directions go through the denoiser in one batch: rows 0 … B−1 are drawn, rows B … 2B−1 forced to x.
        """
        n, size = len(old), old.shape[1]
        tokens, mask = state.tokens.repeat(2, 1), state.prompt_mask.repeat(2, 1)
        both = Choice(choice.place.repeat(2, 1), choice.valid.repeat(2, 1))
        z, t, values = z.repeat(2, 1, 1), t.repeat(2, 1), old.repeat(2, 1)
        log_q = torch.zeros(n, dtype=torch.float64, device=old.device)
        per_round = -(-size // self.rounds)
        for first in range(0, size, per_round):
            here = slice(first, first + per_round)
            logits = self._logits(tokens, mask, both, z, t, first, here)
            drawn = draw_categorical(logits[:n], generator)
            values = torch.cat([torch.cat([values[:n, :first], drawn, values[:n, here.stop :]], 1), values[n:]])
            log_p = logits.log_softmax(-1).gather(-1, values[:, here, None])[..., 0].double()
            log_p = torch.where(both.valid[:, here], log_p, 0.0).sum(1)
            log_q = log_q + log_p[n:] - log_p[:n]
            tokens = _put(tokens, Choice(both.place[:, here], both.valid[:, here]), values[:, here])
        return values[:n], log_q

    def _logits(self, tokens: Tensor, mask: Tensor, choice: Choice, z: Tensor, t: Tensor, first: int, here: slice) -> Tensor:
        """Proposal logits (2B, k, V) at the positions of this round; those from number `first` on are still hidden."""
        hidden = Choice(choice.place[:, first:], choice.valid[:, first:])
        is_hidden = _put(torch.zeros_like(mask), hidden, torch.ones_like(hidden.valid))
        noised = _put(self.embedding(tokens), hidden, z[:, first:])
        times = torch.where(is_hidden, t, 0.0)
        index = choice.place[:, here]
        if hasattr(self.proposal, "at"):
            logits = self.proposal.at(noised, times, index)
        else:
            logits = _gather(self.proposal(noised, times), index)
        return logits if self.end_id is None else _without_nonsense(logits, index, tokens, mask, is_hidden, self.end_id)


def _put(rows: Tensor, choice: Choice, values: Tensor) -> Tensor:
    """`rows` (B, T, …) with `values` (B, K, …) at the valid ones of the chosen positions."""
    # Invalid entries go to a column of their own, which is cut off again.
    index = torch.where(choice.valid, choice.place, rows.shape[1])
    padded = torch.cat([rows, rows[:, :1]], 1)
    index = index.reshape(*index.shape, *[1] * (rows.ndim - 2)).expand(values.shape)
    return padded.scatter(1, index, values.to(rows.dtype))[:, :-1]


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """(B, T, D) at (B, K) → (B, K, D)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _log_normal(z: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Log N(z; mean, σ²) up to a constant that does not depend on the mean, (B, K) float64."""
    return -((z - mean).double().square().sum(-1)) / (2 * sigma[..., 0].double().square())


def _without_nonsense(
    logits: Tensor, index: Tensor, tokens: Tensor, prompt_mask: Tensor, is_hidden: Tensor, end_id: int
) -> Tensor:
    """Bar the end token before a known word, and everything but the end token after a known end.

    What is known lies outside S or was revealed in an earlier round, so the rule is the same in both directions.
    """
    is_end = tokens == end_id
    word = (~is_end & ~is_hidden & ~prompt_mask).long()
    end = (is_end & ~is_hidden & ~prompt_mask).long()
    word_follows = ((word.flip(1).cumsum(1).flip(1) - word) > 0).gather(1, index)
    end_precedes = ((end.cumsum(1) - end) > 0).gather(1, index)
    only_end = torch.zeros_like(logits[0, 0], dtype=torch.bool)
    only_end[end_id] = True
    barred = torch.where(end_precedes[..., None], ~only_end, only_end & word_follows[..., None])
    return logits.masked_fill(barred, -torch.inf)
