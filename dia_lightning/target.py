"""π(x | c) ∝ p_θ(x | c) exp(λ r(x, c)) as a value that kernels can ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.row_cache import TokenTerms
from dia_lightning.rewards.base import call_reward
from dia_lightning.types import Batch, Reward, has_blank, leading, segments


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
        alpha: α, for the power target p_θ^α exp(λ r) (arXiv:2510.14901). Where it is not 1 the
            path from p_θ to the target has one parameter: `lam` is 1, and the reward of `terms` is
            λ r + (α − 1) log p_θ.

    Attributes:
        lam: the value of `State.lam` that is the target. unit: λ for each unit of it.
        calls: {"base_lm": …, "reward": …}, rows scored so far.
    """

    def __init__(
        self, lm: BaseLM, reward: Reward, lam: float, batch: Batch | None = None,
        alpha: float = 1.0,
    ) -> None:  # fmt: skip
        self.lm, self.reward, self.batch, self.alpha = lm, reward, batch, alpha
        self.lam, self.unit = (lam, 1.0) if alpha == 1 else (1.0, lam)
        self.calls = {"base_lm": 0, "reward": 0}

    def terms(
        self, tokens: Tensor, prompt_mask: Tensor | None = None, read: TokenTerms | None = None
    ) -> Terms:
        """Log p_θ(x | c) in nats and r(x, c) for (N, T) tokens in canonical form.

        N is a multiple of the batch: so many texts for each of its prompts, side by side.
        `prompt_mask`: what is given, where blanks have moved it. `read`: what p_θ says of the
        tokens, where it has read them.
        """
        batch = self._batch(tokens)
        if read is not None:
            log_base = read.log_p.double().sum(1)
        else:
            # In p_θ's own precision, whatever the trainer's: these numbers decide what is accepted.
            with torch.autocast(tokens.device.type, enabled=False):
                log_base = self.lm.log_prob(tokens, batch.prompt_mask)
            self.calls["base_lm"] += len(tokens)
        found = call_reward(self.reward, reward_inputs(self.lm, tokens, batch), batch.records)
        self.calls["reward"] += len(tokens)
        reward = found.to(tokens.device, torch.float64)
        if self.alpha != 1:
            reward = self.unit * reward + (self.alpha - 1) * log_base
        return Terms(log_base, reward)

    def _batch(self, tokens: Tensor) -> Batch:
        """The prompts of `tokens` (N, T)."""
        batch, n = self.batch, len(tokens)
        if batch is None:
            nothing = torch.zeros_like(tokens, dtype=torch.bool)
            batch = Batch(0, list(range(n)), [""] * n, tokens, nothing)
        elif n != len(batch.ids):
            rows = torch.arange(len(batch.ids), device=tokens.device)
            batch = batch.take(rows.repeat_interleave(n // len(batch.ids)))
        return batch

    def log_prob(self, tokens: Tensor) -> Tensor:
        """Log p_θ(x | c) + λ r(x, c), unnormalised, (B,) float64."""
        log_base, reward = self.terms(tokens)
        return log_base + self.lam * reward


def completions(lm: BaseLM, tokens: Tensor, batch: Batch) -> list[str]:
    """The texts of (B, T) tokens without their prompts; one with blanks is none without, and stays
    whole.
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


def fillings(lm: BaseLM, tokens: Tensor, prompt_mask: Tensor, batch: Batch) -> list[list[str]]:
    """The texts that fill the blanks of each row, in order, to the character; none where no row has
    blanks.

    Args:
        tokens: (B, T). prompt_mask: (B, T) what is given in them.
    """
    filled = _has_blanks(lm, batch)
    if not any(filled):
        return []
    found: list[list[str]] = [[] for _ in filled]
    places, at = torch.arange(tokens.shape[1], device=tokens.device), segments(prompt_mask)
    for s in range(int(at.max()) + 1):
        run = (at == s) & ~prompt_mask
        begin, end = run.long().argmax(1)[:, None], (places * run).amax(1)[:, None] + 1
        # As what follows a prompt, all that stands on the left.
        its = lm.decode(tokens.masked_fill(places >= end, lm.end_id), places < begin)
        for texts, text, blanks, there in zip(found, its, filled, run.any(1).tolist(), strict=True):
            if blanks and there:
                texts.append(text)
    return found


def _has_blanks(lm: BaseLM, batch: Batch) -> list[bool]:
    """Of each row whether its prompt has blanks, or fixed words follow a free position."""
    fixed = batch.prompt_mask & ~leading(batch.prompt_mask) & (batch.tokens != lm.end_id)
    return [
        found or has_blank(prompt)
        for found, prompt in zip(fixed.any(1).tolist(), batch.prompts, strict=True)
    ]


def terms_of(
    target: Target | TargetDensity, tokens: Tensor, prompt_mask: Tensor | None = None,
    read: TokenTerms | None = None,
) -> Terms:  # fmt: skip
    """The terms of any target; one that has a `log_prob` only is all `log_base`, with reward 0."""
    if isinstance(target, TargetDensity):
        return target.terms(tokens, prompt_mask, read)
    if hasattr(target, "terms"):
        return target.terms(tokens)
    log_prob = target.log_prob(tokens).double()
    return Terms(log_prob, torch.zeros_like(log_prob))
