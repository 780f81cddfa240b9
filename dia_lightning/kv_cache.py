"""A key–value cache that is allocated once: transformers' own grows by a copy of everything at every token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class _AllocatedLayer(DynamicLayer):
    """`DynamicLayer` that writes into room for `length` tokens; `keys` and `values` are views of what is filled."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New states (B, H, n, D) → all states so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = [x.new_empty(*x.shape[:2], self.length, x.shape[3]) for x in (key_states, value_states)]
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
    cache.layers = [_AllocatedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep `rows` (N,) of every layer: transformers' own `batch_select_indices` forgets recurrent states."""
    layer: Any
    for layer in cache.layers:
        layer.reorder_cache(rows)
