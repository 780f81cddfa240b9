"""The ensemble kernel: several drafts of a piece of text, one chosen by exact weights."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from dia_lightning.errors import require
from dia_lightning.lm.row_cache import TokenTerms
from dia_lightning.numerics import draw_categorical
from dia_lightning.sampling.state import Info, State, start
from dia_lightning.target import Target, TargetDensity, Terms, terms_of

Form = Literal["metropolis", "gibbs"]


class Drafts(NamedTuple):
    """K texts beside each chain's own, drawn independently given what is kept.

    tokens: (B, K, T) int64. log_q: (B, 1 + K) float64, log of q(y_j | S, x_−S) / (c(S | x_j) a_j)
        up to a constant of the row, the chain's own text first; ∞: no text, or out of reach.
    prompt_mask: (B, K, T) bool, where what is given moves. read: what p_θ says of the B · K rows,
        where they were drawn by it, and own, what it says of the chains.
    """

    tokens: Tensor
    log_q: Tensor
    prompt_mask: Tensor | None = None
    read: TokenTerms | None = None
    own: TokenTerms | None = None


class Proposal(Protocol):
    """q: draws `n` drafts for each chain."""

    def __call__(self, state: State, n: int, generator: torch.Generator) -> Drafts: ...


class EnsembleKernel:
    """Keeps a piece of the text, drafts the rest `tries` times and chooses among all drafts and
    what stands there, by w_j = π(x_j) c(S | x_j) a_j / q(y_j | S, x_−S) (moves.md).

    Given (S, x_−S) the drafts and y_0 are exchangeable but for the weights, so π stays invariant
    for any number of drafts and any q.

    Args:
        target: any object with `log_prob(tokens)`, unnormalised.
        proposal: q, with the choice c of what is kept.
        tries: K drafts a step.
        form: `gibbs` chooses j ∈ {0 … K} ∝ w_j (Tjelmeland 2004; Neal 2011; Barker's rule for K =
            1). `metropolis` chooses j ≠ 0 ∝ w_j and accepts with min(1, Σ_{k≠0} w_k / Σ_{k≠j} w_k)
            (Liu 1996; Metropolis–Hastings for K = 1).

    Raises:
        UserError: for options out of range.
    """

    def __init__(
        self, target: Target | TargetDensity, proposal: Proposal, tries: int = 1,
        form: Form = "metropolis",
    ) -> None:  # fmt: skip
        require("tries", tries, tries >= 1, "1 or more")
        require("form", form, form in get_args(Form), ", ".join(get_args(Form)))
        self.target: Any = target
        self.proposal, self.tries, self.form = proposal, tries, form

    def init(
        self, tokens: Tensor, prompt_mask: Tensor | None = None, lam: Tensor | None = None
    ) -> State:
        """Chains at `tokens` (B, T); see `start`."""
        return start(self.target, tokens, prompt_mask, lam)

    def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
        drafts = self.proposal(state, self.tries, generator)
        possible = drafts.log_q[:, 1:] != torch.inf
        # A text that is no text cannot be scored; what is scored in its place does not matter.
        tokens = torch.where(possible[..., None], drafts.tokens, state.tokens[:, None])
        mask = drafts.prompt_mask
        if mask is not None:
            mask = torch.where(possible[..., None], mask, state.prompt_mask[:, None])
        log_base, reward = self._terms(state, tokens, mask, drafts.read)
        gain = log_base - state.log_base[:, None]
        gain = gain + state.lam[:, None] * (reward - state.reward[:, None])
        log_w = gain + (drafts.log_q[:, :1] - drafts.log_q[:, 1:])
        # A NaN is never chosen.
        undefined = (log_w.isnan() & possible & (log_base != -torch.inf)).any(1)
        log_w = torch.where(log_w.isnan() | ~possible, -torch.inf, log_w)
        chosen, info = choose(log_w, self.form, generator)
        return self._moved(state, drafts, tokens, mask, Terms(log_base, reward), chosen, info), (
            info._replace(undefined=undefined)
        )

    def _terms(
        self, state: State, tokens: Tensor, mask: Tensor | None, read: TokenTerms | None
    ) -> Terms:
        """Of (B, K, T) texts, (B, K) each; log p_θ is known where p_θ has drawn them."""
        if mask is None:
            mask = state.prompt_mask[:, None].expand_as(tokens)
        terms = terms_of(self.target, tokens.flatten(0, 1), mask.flatten(0, 1), read)
        return Terms(*(field.view(tokens.shape[:2]) for field in terms))

    def _moved(
        self, state: State, drafts: Drafts, tokens: Tensor, mask: Tensor | None, terms: Terms,
        chosen: Tensor, info: Info,
    ) -> State:  # fmt: skip
        """The chains after the draft `chosen` (B,), where that was `info.accepted`."""

        def pick(drafted: Tensor, own: Tensor) -> Tensor:
            at = chosen.view(-1, 1, *[1] * (own.ndim - 1)).expand(-1, 1, *own.shape[1:])
            accepted = info.accepted.view(-1, *[1] * (own.ndim - 1))
            return torch.where(accepted, drafted.gather(1, at)[:, 0], own)

        read = None
        if drafts.read is not None and drafts.own is not None:
            rows = torch.arange(len(chosen), device=chosen.device) * self.tries + chosen
            its = drafts.read if self.tries == 1 else drafts.read.take(rows)
            read = its.where(info.accepted, drafts.own)
        return State(
            pick(tokens, state.tokens),
            state.prompt_mask if mask is None else pick(mask, state.prompt_mask),
            pick(terms.log_base, state.log_base),
            pick(terms.reward, state.reward),
            state.lam,
            read,
        )


def choose(log_w: Tensor, form: Form, generator: torch.Generator) -> tuple[Tensor, Info]:
    """The draft (B,) to move to, and whether to, from log-weights (B, K) relative to the chain's
    own text; −inf is never chosen.
    """
    n, k = log_w.shape
    log_w = log_w.clamp_max(1e300)  # from a text that is impossible, any draft is as good
    total = log_w.logsumexp(1)
    if form == "gibbs":
        own = torch.zeros_like(log_w[:, :1])
        drawn = draw_categorical(torch.cat([own, log_w], 1), generator)
        return (drawn - 1).clamp_min(0), Info(drawn > 0, total)
    chosen = torch.zeros(n, dtype=torch.int64, device=log_w.device)
    if k > 1:
        chosen = draw_categorical(torch.where(total[:, None].isinf(), 0.0, log_w), generator)
    others = log_w.scatter(1, chosen[:, None], 0.0)  # the chain's own in the place of j
    log_ratio = total - others.logsumexp(1)
    u = torch.rand(n, generator=generator, device=log_w.device, dtype=torch.float64)
    return chosen, Info(u.log() < log_ratio, log_ratio)
