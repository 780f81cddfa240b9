"""Blanks between what is given: how long they are, and how p_θ fills them given both sides."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.row_cache import TokenTerms
from dia_lightning.target import TargetDensity, Terms
from dia_lightning.types import Batch, leading, must_go_on, segments, text_mask

# Of each further token of a blank; a first guess of its length, from which p_θ's own is reached.
_LONGER = 0.85


def is_rigid(prompt_mask: Tensor, elastic: Tensor | None) -> Tensor:
    """(N, T) bool, the places of blanks whose length is given: something follows them, and they are
    none of the `elastic` (N, S) ones (`Batch.elastic`).
    """
    inside = must_go_on(prompt_mask)
    if elastic is None:
        return inside
    return inside & ~elastic.gather(1, segments(prompt_mask).clamp(0, elastic.shape[1] - 1))


def lay_out(batch: Batch, end_id: int, generator: torch.Generator) -> Batch:
    """The rows with a length for each elastic blank, drawn as `log_lengths` says; its places hold
    the end token until p_θ has filled them.
    """
    if batch.elastic is None:
        return batch
    mask, wide = batch.prompt_mask, batch.tokens.shape[1]
    at = segments(mask)
    begins = must_go_on(mask) & ~is_rigid(mask, batch.elastic)
    room, width = room_of(batch, end_id), torch.ones_like(at)
    for s in range(batch.elastic.shape[1]):
        here = begins & (at == s)
        u = torch.rand(len(room), generator=generator, device=at.device, dtype=torch.float64)
        most = -torch.expm1((room.double() + 1) * math.log(_LONGER))
        longer = (torch.log1p(-u * most) / math.log(_LONGER)).long().minimum(room)
        longer = torch.where(here.any(1), longer, 0)
        width, room = width + here * longer[:, None], room - longer
    place = (width.cumsum(1) - width).masked_fill(~mask, wide).clamp_max(wide)

    def laid(values: Tensor, fill: int) -> Tensor:
        out = torch.full_like(values[:, :1], fill).repeat(1, wide + 1)
        return out.scatter(1, place, values)[:, :wide]

    return replace(batch, tokens=laid(batch.tokens, end_id), prompt_mask=laid(mask, 0))


def room_of(batch: Batch, end_id: int) -> Tensor:
    """(N,) by how many tokens the elastic blanks of a row can grow together, so that one token is
    left behind what is given.
    """
    mask, wide = batch.prompt_mask, batch.tokens.shape[1]
    taken = must_go_on(mask) | mask & (batch.tokens != end_id)
    last = (taken * torch.arange(wide, device=mask.device)).amax(1)
    return (wide - 2 - last).clamp_min(0)


def log_lengths(prompt_mask: Tensor, elastic: Tensor, room: Tensor) -> Tensor:
    """(N,) float64 log-probability of the blanks' lengths: from left to right, each has one token
    and a number of further ones that is geometric, cut at the room that is left.
    """
    at, room = segments(prompt_mask), room.double()
    total = torch.zeros_like(room)
    inside = must_go_on(prompt_mask) & ~is_rigid(prompt_mask, elastic)
    for s in range(elastic.shape[1]):
        length = (inside & (at == s)).sum(1)
        longer = (length - 1).clamp_min(0).double()
        cut = (-torch.expm1((room + 1) * math.log(_LONGER))).log()
        log_p = longer * math.log(_LONGER) + math.log1p(-_LONGER) - cut
        total, room = total + torch.where(length > 0, log_p, 0.0), room - longer
    return total


class RightSide(TargetDensity):
    """From p_θ(y | left) to p_θ(y | left, right), y what fills the blanks: ∝ ℓ(y) p_θ(y | left)
    [p_θ(right | left, y) / ℓ(y)]^β, β the `lam` of its chains and 1 in the end (moves.md,
    "Annealing the right side").

    p_θ(y | left) is that of tokens other than the end; ℓ, the law of the lengths, and the
    probability that the text goes on are part of what β brings in or takes out. At β = 1 this is
    p_θ of the whole text.

    Args:
        lm: p_θ. batch: the rows as they were before `lay_out`.
    """

    def __init__(self, lm: BaseLM, batch: Batch) -> None:
        super().__init__(lm, None, 1.0, batch)  # type: ignore[arg-type]
        self.room = room_of(batch, lm.end_id)

    def terms(
        self, tokens: Tensor, prompt_mask: Tensor | None = None, read: TokenTerms | None = None
    ) -> Terms:
        """ℓ(y) p_θ(y | left), and what β is the exponent of, both as logarithms."""
        assert prompt_mask is not None
        assert self.batch is not None
        if read is None:
            with torch.autocast(tokens.device.type, enabled=False):
                read = self.lm.read(tokens, prompt_mask)
        times = len(tokens) // len(self.batch.ids)
        text = text_mask(tokens, prompt_mask, self.lm.end_id)
        log_p, goes_on = read.log_p.double() * text, read.log_goes_on.double()
        barred = (goes_on * must_go_on(prompt_mask)).sum(1)
        left = (log_p * ~prompt_mask).sum(1) - barred
        right = (log_p * (prompt_mask & ~leading(prompt_mask))).sum(1) + barred
        if self.batch.elastic is not None:
            elastic = self.batch.elastic.repeat_interleave(times, 0)
            lengths = log_lengths(prompt_mask, elastic, self.room.repeat_interleave(times))
            left, right = left + lengths, right - lengths
        return Terms(left, right)
