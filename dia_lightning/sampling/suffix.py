"""Suffix regeneration: Metropolis–Hastings with p_θ itself as the proposal for the end of a
text.
"""

from __future__ import annotations

import torch

from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.sampling.denoise_accept import Info, State, accept, score, start
from dia_lightning.sampling.positions import n_text
from dia_lightning.target import TargetDensity


class SuffixRegeneration:
    """QUEST (Faria et al., arXiv:2406.00049, eq. 6): keep a random prefix, draw the rest from p_θ.

    p_θ(x' | c) q(x | x') / (p_θ(x | c) q(x' | x)) leaves only n(x) / n(x'), the numbers of places
    to cut, so the ratio is exp(λ (r(x') − r(x))) n(x) / n(x').

    Args:
        target: its `lm` draws the suffix.
    """

    def __init__(self, target: TargetDensity) -> None:
        self.target = target

    def init(
        self,
        tokens: torch.Tensor,
        prompt_mask: torch.Tensor | None = None,
        lam: torch.Tensor | None = None,
    ) -> State:
        """Chains at `tokens` (B, T); see `denoise_accept.start`."""
        return start(self.target, tokens, prompt_mask, lam)

    def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
        lm: BaseLM = self.target.lm
        tokens, mask = state.tokens, state.prompt_mask
        n_prompt = mask.sum(1)
        count = n_text(tokens, mask, lm.end_id) - n_prompt
        u = torch.rand(len(tokens), generator=generator, device=tokens.device, dtype=torch.float64)
        cut = n_prompt + (u * count).long().clamp_max(count - 1)
        kept = torch.arange(tokens.shape[1], device=tokens.device) < cut[:, None]
        with torch.autocast(tokens.device.type, enabled=False):
            proposed = lm.generate(tokens, kept, generator)
        new_count = n_text(proposed, mask, lm.end_id) - n_prompt
        terms, hidden = score(self.target, proposed, state.hidden is not None)
        log_ratio = state.lam * (terms.reward - state.reward) + (count.double() / new_count).log()
        return accept(state, proposed, terms, log_ratio, generator, hidden)
