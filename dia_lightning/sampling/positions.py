"""Which positions a move redraws, and what that choice contributes to the Metropolis–Hastings
ratio.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.types import text_mask


class Choice(NamedTuple):
    """Positions in the order in which they are revealed: place (B, K) int64 and valid (B, K)
    bool (False: not used).
    """

    place: Tensor
    valid: Tensor


class Positions(ABC):
    """A way to draw S. `log_ratio` is log P(S | x') − log P(S | x), (B,); 0 where the choice
    does not depend on x.
    """

    @abstractmethod
    def draw(
        self, tokens: Tensor, prompt_mask: Tensor, end_id: int | None, generator: torch.Generator
    ) -> Choice: ...

    def log_ratio(
        self,
        choice: Choice,
        tokens: Tensor,
        proposed: Tensor,
        prompt_mask: Tensor,
        end_id: int | None,
    ) -> Tensor:
        return torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)


def scatter_at(rows: Tensor, choice: Choice, values: Tensor) -> Tensor:
    """`rows` (B, T, …) with `values` (B, K, …) at the valid ones of the chosen positions."""
    # Invalid entries go to a column of their own, which is cut off again.
    index = torch.where(choice.valid, choice.place, rows.shape[1])
    padded = torch.cat([rows, rows[:, :1]], 1)
    index = index.reshape(*index.shape, *[1] * (rows.ndim - 2)).expand(values.shape)
    return padded.scatter(1, index, values.to(rows.dtype))[:, :-1]


def gather_at(rows: Tensor, index: Tensor) -> Tensor:
    """(B, T, D) at (B, K) → (B, K, D)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def n_text(tokens: Tensor, prompt_mask: Tensor, end_id: int | None) -> Tensor:
    """(B,) number of positions that hold the prompt and the text, its end token included."""
    if end_id is None:
        return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    return text_mask(tokens, prompt_mask, end_id).sum(1)


def n_free(tokens: Tensor, prompt_mask: Tensor, end_id: int | None) -> Tensor:
    """(B,) number of free positions that hold text, its end token included."""
    text = (
        torch.ones_like(prompt_mask) if end_id is None else text_mask(tokens, prompt_mask, end_id)
    )
    return (text & ~prompt_mask).sum(1)


@dataclass(frozen=True)
class Spans(Positions):
    """`length` neighbouring free positions that touch the text (its end token included), uniformly
    over all such spans.

    The number of spans depends on the length of the text, so the choice enters the ratio. Free
    positions are neighbours also across what is fixed between them.

    Args:
        length: Positions in a span, 1 or more.
        shuffle: Reveal them in random order instead of from left to right.
    """

    length: int = 4
    shuffle: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"length: {self.length} given, allowed: 1 or more")

    def _bounds(
        self, tokens: Tensor, prompt_mask: Tensor, end_id: int | None
    ) -> tuple[Tensor, Tensor]:
        """First possible start (B,), counted in free positions, and the number of possible
        starts (B,).
        """
        low = torch.full((len(tokens),), 1 - self.length, device=tokens.device)
        return low, n_free(tokens, prompt_mask, end_id) - low

    def draw(
        self, tokens: Tensor, prompt_mask: Tensor, end_id: int | None, generator: torch.Generator
    ) -> Choice:
        low, count = self._bounds(tokens, prompt_mask, end_id)
        u = torch.rand(len(tokens), generator=generator, device=tokens.device, dtype=torch.float64)
        begin = low + (u * count).long().clamp_max(count - 1)
        steps = torch.arange(self.length, device=tokens.device).expand(len(tokens), -1)
        if self.shuffle:
            steps = torch.rand(steps.shape, generator=generator, device=tokens.device).argsort(1)
        index = begin[:, None] + steps
        valid = (index >= 0) & (index < (~prompt_mask).sum(1, keepdim=True))
        free_first = prompt_mask.long().argsort(dim=1, stable=True)
        return Choice(free_first.gather(1, index.clamp(0, tokens.shape[1] - 1)), valid)

    def log_ratio(
        self,
        choice: Choice,
        tokens: Tensor,
        proposed: Tensor,
        prompt_mask: Tensor,
        end_id: int | None,
    ) -> Tensor:
        _, count = self._bounds(tokens, prompt_mask, end_id)
        _, new_count = self._bounds(proposed, prompt_mask, end_id)
        first = torch.where(choice.valid, choice.place, tokens.shape[1]).amin(1)
        reachable = first < n_text(proposed, prompt_mask, end_id)
        return torch.where(reachable, count.double().log() - new_count.double().log(), -torch.inf)


@dataclass(frozen=True)
class RandomTokens(Positions):
    """`count` positions outside the prompt, uniformly, in random order (all of them where there are
    fewer).

    Args:
        count: Positions that a step redraws, anywhere in the text, 1 or more.
    """

    count: int = 4

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count: {self.count} given, allowed: 1 or more")

    def draw(
        self, tokens: Tensor, prompt_mask: Tensor, end_id: int | None, generator: torch.Generator
    ) -> Choice:
        score = (
            torch.rand(tokens.shape, generator=generator, device=tokens.device) + 2 * prompt_mask
        )
        index = score.argsort(1)[:, : self.count]
        return Choice(index, ~prompt_mask.gather(1, index))


@dataclass(frozen=True)
class WholeText(Positions):
    """All positions outside the prompt, from left to right."""

    def draw(
        self, tokens: Tensor, prompt_mask: Tensor, end_id: int | None, generator: torch.Generator
    ) -> Choice:
        index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return Choice(index, ~prompt_mask)
