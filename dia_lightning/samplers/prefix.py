"""The value of an unfinished text, by the reward itself or a critic."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.lm.row_cache import rows_at_once
from dia_lightning.rewards.base import call_reward
from dia_lightning.samplers.base import Models, Part
from dia_lightning.samplers.networks import RewardValue
from dia_lightning.target import reward_inputs
from dia_lightning.types import Batch

_LOG = logging.getLogger(__name__)
# tokens (N, T) int64, which of them are settled (N, T) bool → (N,), in units of the reward.
PrefixValue = Callable[[Tensor, Tensor], Tensor]
# The same, with the numbers of those rows in the batch (N,).
RowValue = Callable[[Tensor, Tensor, Tensor], Tensor]


class PrefixTwist(Part, ABC):
    """Tells how good an unfinished text is, so that particles can be weighed on their way."""

    @abstractmethod
    def value(self, models: Models, crowd: Batch, generator: torch.Generator) -> RowValue:
        """h, the value of the prefixes of texts of `crowd`, where λ is above 0."""


@dataclass(frozen=True)
class RewardOnPrefix(PrefixTwist):
    """The reward of the text so far: needs no network."""

    def check(self, models: Models) -> None:
        if models.lam and models.reward.on_prefix is False:
            _LOG.warning(
                "reward %s: its value of an unfinished text misleads (on_prefix = False); texts"
                " still follow the target, with more particles; or take twist: Critic",
                models.reward.name,
            )

    def value(self, models: Models, crowd: Batch, generator: torch.Generator) -> RowValue:
        def of(tokens: Tensor, known: Tensor, rows: Tensor) -> Tensor:
            some, prefixes = crowd.take(rows), tokens.where(known, models.lm.end_id)
            # A character of several tokens may be there in part.
            seen = [x.rstrip("\ufffd") for x in reward_inputs(models.lm, prefixes, some)]
            return call_reward(models.reward, seen, some.records)

        return of


@dataclass(frozen=True)
class Critic(PrefixTwist):
    """What a critic trained on the reward expects of the text. A `soft` one fits best: its value
    is the log-value of π itself.
    """

    def needs(self, lam: float) -> Set[str]:
        return {"critic"} if lam else frozenset()

    def value(self, models: Models, crowd: Batch, generator: torch.Generator) -> RowValue:
        assert models.critic is not None
        length = crowd.tokens.shape[1]
        value = critic_of_prefixes(models.critic, models.embedding, length, generator)
        return lambda tokens, known, rows: value(tokens, known)


def settled(tokens: Tensor, prompt_mask: Tensor, place: int, end_id: int) -> Tensor:
    """(N, T) bool, what is known once the positions before `place` are written: these, and all
    of a text that has ended.
    """
    before = torch.arange(tokens.shape[1], device=tokens.device) < place
    ended = ((tokens == end_id) & before & ~prompt_mask).any(1)
    return before | prompt_mask | ended[:, None]


def critic_of_prefixes(
    value: RewardValue, embedding: TokenEmbedding, length: int, generator: torch.Generator
) -> PrefixValue:
    """The critic's value of prefixes of texts of `length` positions.

    A critic is conditioned on a noise time for every token, and a clean beginning followed by noise
    is among what it was
    trained on: what is settled goes in clean (t = 0), all else as pure noise (t = 1), of which it
    knows nothing. The noise is drawn once, here, so that two prefixes differ in value by their
    tokens alone.
    """
    noise = torch.randn(length, embedding.dim, generator=generator, device=generator.device)

    def of(tokens: Tensor, known: Tensor) -> Tensor:
        rows, parts = rows_at_once(tokens), []
        for x, clean in zip(tokens.split(rows), known.split(rows), strict=True):
            parts.append(
                value(torch.where(clean[..., None], embedding(x), noise), (~clean).float())
            )
        return torch.cat(parts)

    return of
