"""Windows of text drawn from left to right by an infiller: a proposal that reads both sides."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.infiller import InfillerTrunk, Right
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.row_cache import RowCache, rows_at_once
from dia_lightning.numerics import draw_categorical
from dia_lightning.types import leading


class _Window(NamedTuple):
    """Hidden positions of a chunk of texts (B, T): `place` (B, k), what is read on the `right` of
    them, whether the text may end there, (B, 1) bool, and whether it has ended before, (B, 1) bool.
    """

    tokens: Tensor
    place: Tensor
    right: Right
    may_end: Tensor
    ended: Tensor


class Infill:
    """q(y | left, right) of a hidden window y of k tokens: Π_l p(y_l | left, y_<l, right).

    An end token is drawn where no word follows the window; then all that follows in it are end
    tokens, with probability 1. What the network learned of a token is added to p_θ's own last
    state, so untrained this is p_θ given the left.

    Args:
        lm: p_θ. network: a denoiser with `trunk: infiller` for it.

    Raises:
        UserError: for another denoiser, or a base model whose logits are not its head of its last
            state.
    """

    def __init__(self, lm: BaseLM, network: DenoiserNetwork) -> None:
        trunk: Any = network.trunk
        if not isinstance(trunk, InfillerTrunk):
            raise UserError(
                f"denoiser: trunk {network.size.trunk!r} given, allowed: 'infiller', which draws"
                " windows"
            )
        if not lm.has_body:
            raise UserError(
                f"base_lm: {lm.name} given, allowed: one whose logits are a linear head of its last"
                " states, without scaling or capping; the infiller adds to them"
            )
        self.lm, self.network, self.trunk = lm, network, trunk

    @torch.no_grad()
    def draw(
        self,
        tokens: Tensor,
        first: Tensor,
        length: int,
        n_drafts: int,
        generator: torch.Generator,
        prompt_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """K drafts of the window of `length` = k positions from `first` (B,) on in each text.

        Args:
            tokens: (B, T) int64 in canonical form. prompt_mask: (B, T) bool, what is given; the
                window holds nothing of it. A fixed end token is a word.

        Returns:
            Tokens (B, K, k) int64 and log q of them, (B, K) float64 nats.
        """
        mask = torch.zeros_like(tokens, dtype=torch.bool) if prompt_mask is None else prompt_mask
        rows = self._rows(tokens, n_drafts)
        parts = zip(*(x.split(rows) for x in (tokens, first, mask)), strict=True)
        drawn = [self._draw(self._window(length, *part), n_drafts, generator) for part in parts]
        values, log_q = zip(*drawn, strict=True)
        return torch.cat(values), torch.cat(log_q)

    @torch.no_grad()
    def log_prob(
        self,
        tokens: Tensor,
        first: Tensor,
        length: int,
        values: Tensor,
        prompt_mask: Tensor | None = None,
    ) -> Tensor:
        """Log q (B, K) float64 of the fillings `values` (B, K, k), by one pass over all of them.

        What stands in the windows of `tokens` does not matter.
        """
        mask = torch.zeros_like(tokens, dtype=torch.bool) if prompt_mask is None else prompt_mask
        rows = self._rows(tokens, values.shape[1])
        parts = zip(*(x.split(rows) for x in (tokens, first, mask, values)), strict=True)
        return torch.cat([self._scored(self._window(length, *part), y) for *part, y in parts])

    def _rows(self, tokens: Tensor, n_drafts: int) -> int:
        return max(1, rows_at_once(tokens) // n_drafts)

    def _window(self, length: int, tokens: Tensor, first: Tensor, mask: Tensor) -> _Window:
        place = first[:, None] + torch.arange(length, device=tokens.device)
        if length < 1 or bool((first < 0).any() or (place[:, -1] >= tokens.shape[1]).any()):
            raise ValueError(f"windows of {length} tokens do not lie in rows of {tokens.shape[1]}")
        at = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = (at >= first[:, None]) & (at <= place[:, -1:])
        z = torch.where(hidden[..., None], 0.0, self.network.embedding(tokens))
        t = hidden.float()
        right = self.trunk.read_right(z, t, self.network.schedule.alpha(t))
        is_end = (tokens == self.lm.end_id) & ~mask
        word_follows = (~is_end & (at > place[:, -1:])).any(1, keepdim=True)
        ended = (is_end & ~leading(mask) & (at < first[:, None])).any(1, keepdim=True)
        return _Window(tokens, place, right, ~word_follows, ended)

    def _log_q(self, state: Tensor, place: Tensor, window: _Window, ended: Tensor) -> Tensor:
        """(B, Q, V) float64 at `place` (B, Q), where p_θ's states are `state` (B, Q, H)."""
        state = self.trunk.join(state.float(), place, window.right)
        log_p = self.lm.logits(state).log_softmax(-1).double()
        end = torch.zeros_like(log_p[0, 0], dtype=torch.bool)
        end[self.lm.end_id] = True
        barred = (ended[..., None] & ~end) | (~(ended | window.may_end)[..., None] & end)
        return log_p.masked_fill(barred, -torch.inf).log_softmax(-1)

    def _draw(
        self, window: _Window, n_drafts: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        reading = _Reading(self.lm, window.tokens, window.place, n_drafts)
        ended = window.ended.expand(-1, n_drafts)
        values: list[Tensor] = []
        total = torch.zeros_like(ended, dtype=torch.float64)
        for i in range(window.place.shape[1]):
            if values:
                reading.write(values[-1].flatten())
            state = reading.state().unflatten(0, (-1, n_drafts))
            log_q = self._log_q(state, window.place[:, i : i + 1].expand_as(ended), window, ended)
            drawn = draw_categorical(log_q, generator)
            total = total + log_q.gather(-1, drawn[..., None])[..., 0]
            ended = ended | (drawn == self.lm.end_id)
            values.append(drawn)
        return torch.stack(values, -1), total

    def _scored(self, window: _Window, values: Tensor) -> Tensor:
        n_drafts, length = values.shape[1:]
        rows = window.tokens.repeat_interleave(n_drafts, 0)
        place = window.place.repeat_interleave(n_drafts, 0)
        rows = rows.scatter(1, place, values.flatten(0, 1))[:, : int(window.place.max())]
        states = self.lm.model.base_model(
            F.pad(rows, (1, 0), value=self.lm.bos_id), use_cache=False
        ).last_hidden_state
        states = states.gather(1, place[..., None].expand(-1, -1, states.shape[-1]))
        is_end = values == self.lm.end_id
        ended = window.ended[..., None] | (is_end.cumsum(-1) - is_end.long() > 0)
        flat, at = (x.unflatten(0, (-1, n_drafts)).flatten(1, 2) for x in (states, place))
        log_q = self._log_q(flat, at, window, ended.flatten(1))
        log_q = log_q.gather(-1, values.flatten(1)[..., None])[..., 0]
        return log_q.unflatten(1, (n_drafts, length)).sum(-1)


class _Reading:
    """p_θ reading K drafts of each window: what stands on the left once, then token by token."""

    def __init__(self, lm: BaseLM, tokens: Tensor, place: Tensor, n_drafts: int) -> None:
        first = place[:, 0]
        source = torch.arange(len(tokens), device=tokens.device).repeat_interleave(n_drafts)
        self._place, self._width = first[source], int(first.max()) + 1
        cache = RowCache(lm, *tokens.shape)
        inputs = F.pad(tokens, (1, 0), value=lm.bos_id)[:, : self._width]
        states = cache.read(inputs, torch.zeros_like(first), self._width)
        self._cache, self._state = cache.take(source), states[source, self._place]

    def state(self) -> Tensor:
        """(B · K, H), p_θ's last state before the next position."""
        return self._state

    def write(self, drawn: Tensor) -> None:
        """Read `drawn` (B · K,), the tokens at the next position."""
        self._place, self._width = self._place + 1, self._width + 1
        self._state = self._cache.read(drawn[:, None], self._place, self._width)[:, 0]
