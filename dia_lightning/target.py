"""π(x | c) ∝ p_θ(x | c) exp(λ r(x, c)) as a value that kernels can ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards.base import call_reward
from dia_lightning.types import Batch, Reward, leading, text_mask


class Terms(NamedTuple):
    """The two parts of a log-density, (B,) float64 each: log_prob = log_base + λ reward."""

    log_base: Tensor
    reward: Tensor


class Target(Protocol):
    """What a kernel needs: an unnormalised log-density, tokens (B, T) int64 → (B,)."""

    def log_prob(self, tokens: Tensor) -> Tensor: ...


class TargetDensity:
    """The target for a batch of rows, each with its prompt.

    Args:
        lm: p_θ. reward: r. lam: λ ≥ 0.
        batch: prompts of the rows; without it rows have none.
        with_base: whether log p_θ is computed. Regeneration by p_θ itself, resampling and swaps
            between temperatures ask for differences of the reward alone; without it `log_base` is
            NaN.

    Attributes:
        calls: {"base_lm": …, "reward": …}, rows scored so far.
    """

    def __init__(
        self,
        lm: BaseLM,
        reward: Reward,
        lam: float,
        batch: Batch | None = None,
        with_base: bool = True,
    ) -> None:
        self.lm, self.reward, self.lam, self.batch, self.with_base = (
            lm,
            reward,
            lam,
            batch,
            with_base,
        )
        self.calls = {"base_lm": 0, "reward": 0}

    def terms(self, tokens: Tensor) -> Terms:
        """Log p_θ(x | c) in nats and r(x, c) for (B, T) tokens in canonical form."""
        if not self.with_base:
            reward = self._reward(tokens)
            return Terms(torch.full_like(reward, torch.nan), reward)
        # In p_θ's own precision, whatever the trainer's: these numbers decide what is accepted.
        with torch.autocast(tokens.device.type, enabled=False):
            log_base = self.lm.log_prob(tokens, self._prompt_mask(tokens))
        return Terms(log_base, self._reward(tokens))

    def terms_and_hidden(self, tokens: Tensor) -> tuple[Terms, Tensor]:
        """`terms`, and from the same pass of p_θ what `next_log_probs` reads: (B, T, H)."""
        with torch.autocast(tokens.device.type, enabled=False):
            log_base, hidden = self.lm.log_prob_and_hidden(tokens, self._prompt_mask(tokens))
        return Terms(log_base, self._reward(tokens)), hidden

    def next_log_probs(self, tokens: Tensor, hidden: Tensor, index: Tensor) -> Tensor:
        """Log p_θ(v | x_<i, c) at the positions i in `index` (B, K): (B, K, V); 0 after the end
        of the text.
        """
        keep = text_mask(tokens, self._prompt_mask(tokens), self.lm.end_id).gather(1, index)
        with torch.autocast(tokens.device.type, enabled=False):
            return torch.where(keep[..., None], self.lm.log_probs_at(hidden, index), 0.0)

    def _prompt_mask(self, tokens: Tensor) -> Tensor:
        return (
            torch.zeros_like(tokens, dtype=torch.bool)
            if self.batch is None
            else self.batch.prompt_mask
        )

    def _reward(self, tokens: Tensor) -> Tensor:
        batch = self.batch or Batch(
            0, list(range(len(tokens))), [""] * len(tokens), tokens, self._prompt_mask(tokens)
        )
        reward = call_reward(self.reward, reward_inputs(self.lm, tokens, batch), batch.records)
        for name in self.calls:
            self.calls[name] += len(tokens)
        return reward.to(tokens.device, torch.float64)

    def log_prob(self, tokens: Tensor) -> Tensor:
        """Log p_θ(x | c) + λ r(x, c), unnormalised, (B,) float64."""
        log_base, reward = self.terms(tokens)
        return log_base + self.lam * reward


def completions(lm: BaseLM, tokens: Tensor, batch: Batch) -> list[str]:
    """The texts of (B, T) tokens without their prompts; one with blanks in its middle is none
    without, and stays whole.
    """
    texts = lm.decode(tokens, batch.prompt_mask)
    filled = _has_blanks(lm, batch)
    if not any(filled):
        return texts
    whole = lm.decode(tokens, batch.prompt_mask, with_prompt=True)
    return [
        full if blanks else text for text, full, blanks in zip(texts, whole, filled, strict=True)
    ]


def whole_texts(lm: BaseLM, texts: Sequence[str], batch: Batch) -> list[str]:
    """Prompt and text of each, to the character; `texts` are those of `completions`."""
    given = zip(batch.prompts, texts, _has_blanks(lm, batch), strict=True)
    return [text if blanks else prompt + text for prompt, text, blanks in given]


def reward_inputs(lm: BaseLM, tokens: Tensor, batch: Batch) -> list[str]:
    """The texts of (B, T) tokens as rewards read them (see `Prompts.whole`)."""
    texts = completions(lm, tokens, batch)
    return whole_texts(lm, texts, batch) if batch.whole else texts


def _has_blanks(lm: BaseLM, batch: Batch) -> list[bool]:
    """Of each row whether fixed words follow a free position."""
    fixed = batch.prompt_mask & ~leading(batch.prompt_mask) & (batch.tokens != lm.end_id)
    found: list[bool] = fixed.any(1).tolist()
    return found


def terms_of(target: Target | TargetDensity, tokens: Tensor) -> Terms:
    """The terms of any target; one that has a `log_prob` only is all `log_base`, with reward 0."""
    if hasattr(target, "terms"):
        return target.terms(tokens)
    log_prob = target.log_prob(tokens).double()
    return Terms(log_prob, torch.zeros_like(log_prob))
