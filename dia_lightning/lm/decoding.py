"""Writing a text with p_θ, token by token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from dia_lightning.types import fill_after_end, leading, must_go_on


class Decoding:
    """Rows that p_θ, a `BaseLM`, writes from left to right: what stands there so far, and the
    states of p_θ that have read it.

    A model without a usable key–value cache (`BaseLM.has_cache`) reads each row again for every
    token.

    Attributes:
        tokens: (B, T) int64, the prompt and what is written, end tokens elsewhere. place: the
            position that comes next.
        rows: (N,) which rows are still written. ended: (N,) bool, those of them whose text is at
            its end.
    """

    def __init__(self, lm: Any, tokens: Tensor, prompt_mask: Tensor) -> None:
        from dia_lightning.lm.decoding import allocated_cache

        self.lm, self.prompt_mask, self.place = lm, prompt_mask, 0
        self.tokens = torch.where(prompt_mask, tokens, lm.end_id)
        self.rows = torch.arange(len(tokens), device=tokens.device)
        self.ended = torch.zeros_like(self.rows, dtype=torch.bool)
        self._inputs = torch.full_like(tokens[:, :1], lm.bos_id)
        self._cache = allocated_cache(lm.model.config, tokens.shape[1]) if lm.has_cache else None
        self._forced, self._given, self._barred = prompt_mask, tokens, must_go_on(prompt_mask)

    @torch.no_grad()
    def read_prompts(self) -> int:
        """Read what is given at the left of every row in one pass; how many places that was."""
        given = int(leading(self.prompt_mask).sum(1).min())
        if self.place or given < 2 or not self.lm.has_body:
            return 0
        if self._cache is not None:
            inputs = torch.cat([self._inputs, self._given[:, : given - 1]], 1)
            self.lm.model.base_model(inputs, past_key_values=self._cache, use_cache=True)
        self.tokens[:, :given] = self._given[:, :given]
        self._inputs, self.place = self._given[:, given - 1 : given], given
        return given

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """(N, V) logits of p_θ at `place`, without the end token where the text must go on;
        asked once a place.
        """
        if self._cache is None:
            seen = F.pad(self.tokens[self.rows, : self.place], (1, 0), value=self.lm.bos_id)
            logits = self.lm.next_logits(seen)
        else:
            out = self.lm.model(self._inputs, past_key_values=self._cache, use_cache=True)
            logits = self.lm.with_one_end(out.logits[:, -1])
        logits[:, self.lm.end_id].masked_fill_(self._barred[:, self.place], -torch.inf)
        return logits

    def write(self, drawn: Tensor) -> None:
        """Set `drawn` (N,) at `place`, but for the prompt and for what is at its end, and go on."""
        forced = self._forced[:, self.place]
        drawn = torch.where(
            forced, self._given[:, self.place], torch.where(self.ended, self.lm.end_id, drawn)
        )
        self.tokens[self.rows, self.place] = drawn
        self.ended = self.ended | (drawn == self.lm.end_id) & ~forced
        self._inputs = drawn[:, None]
        self.place += 1

    def drop_ended(self) -> bool:
        """Write those rows no more that have ended; whether any are left."""
        going = (~self.ended).nonzero()[:, 0]
        if 0 < len(going) < len(self.rows):
            self.rows = self.rows[going]
            self._select(going)
        return len(going) > 0

    def resample(self, ancestors: Tensor) -> None:
        """Every row goes on as a copy of row `ancestors` (B,), one with the same prompt; none
        may have been dropped.
        """
        self.tokens = self.tokens[ancestors]
        self._select(ancestors)

    def text(self) -> Tensor:
        """(B, T) int64, the rows in canonical form."""
        return fill_after_end(self.tokens, self.prompt_mask, self.lm.end_id)

    def _select(self, index: Tensor) -> None:
        from dia_lightning.lm.decoding import select_rows

        if self._cache is not None:
            select_rows(self._cache, index)
        self._inputs, self.ended = self._inputs[index], self.ended[index]
        self._forced, self._given, self._barred = (
            self._forced[index],
            self._given[index],
            self._barred[index],
        )


class _AllocatedLayer(DynamicLayer):
    """`DynamicLayer` that writes into room for `length` tokens; `keys` and `values` are views of
    what is filled.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New states (B, H, n, D) → all states so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = [
                x.new_empty(*x.shape[:2], self.length, x.shape[3])
                for x in (key_states, value_states)
            ]
        filled = self.get_seq_length()
        total = filled + key_states.shape[2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, filled:total] = states
        self.keys, self.values = (room[:, :, :total] for room in self._room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep rows `beam_idx`, in this order."""
        if self.is_initialized:
            total = self.get_seq_length()
            self._room = [room[beam_idx] for room in self._room]
            self.keys, self.values = (room[:, :, :total] for room in self._room)


def allocated_cache(config: Any, length: int) -> DynamicCache:
    """A cache for a model of `config` with room for `length` tokens; other kinds of layers stay."""
    cache = DynamicCache(config=config)
    cache.layers = [
        _AllocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep `rows` (N,) of every layer: transformers' own `batch_select_indices` forgets
    recurrent states.
    """
    layer: Any
    for layer in cache.layers:
        layer.reorder_cache(rows)
