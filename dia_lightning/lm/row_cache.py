"""What p_θ has read of rows of different lengths, so that each can be written on from its own
place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

# On a CPU larger temporaries are given back to the system after every operation: at 512 rows of 40
# tokens, page faults take half of p_θ's time and a third of the denoiser's.
_POSITIONS_AT_ONCE = defaultdict(lambda: 1 << 16, cpu=1 << 11)
_KEPT_BYTES = 1 << 30


def rows_at_once(rows: Tensor) -> int:
    """How many of `rows` (B, T, …) a network should take at a time."""
    return max(1, _POSITIONS_AT_ONCE[rows.device.type] // rows.shape[1])


class _Slots(DynamicLayer):
    """Keys and values of one layer (N, H, T + 1, D), those of place i in slot i whatever the row;
    the last slot takes what is thrown away.
    """

    def __init__(self, n_slots: int) -> None:
        super().__init__()
        self.n_slots, self.room = n_slots, [torch.empty(0)] * 2
        self.place, self.rows, self.n_rows, self.width = torch.empty(0), slice(None), 0, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New states (n, H, q, D) of `rows` at `place` (n, q) → their states of all `width` first
        slots.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # Slots not yet written are masked, but 0 · NaN would be NaN.
            self.room = [
                x.new_zeros(self.n_rows, x.shape[1], self.n_slots, x.shape[3])
                for x in (key_states, value_states)
            ]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            at = self.place[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            room[self.rows].scatter_(2, at, states)
        keys, values = (room[self.rows, :, : self.width] for room in self.room)
        return keys, values


class RowCache:
    """States of p_θ, a `BaseLM`, for N rows that stand at different places.

    A model that cannot be asked so (`BaseLM.has_slots`, or rows are longer than what its layers
    see) reads each row again at every call; the answers are the same.

    Args:
        lm: p_θ. n_rows: N. length: T, places of a row.
    """

    def __init__(self, lm: Any, n_rows: int, length: int) -> None:
        self.lm, self.n_rows, self.length = lm, n_rows, length
        self._layers: list[_Slots] = []
        self._inputs = torch.full((n_rows, length + 1), lm.bos_id, device=lm.device)
        if lm.has_slots:
            layers = DynamicCache(config=lm.model.config).layers
            # A layer that looks back less far would be shown all that the slots hold.
            if length <= min(getattr(layer, "sliding_window", length) for layer in layers):
                self._layers = [_Slots(length + 1) for _ in layers]
            for layer in self._layers:
                layer.n_rows = n_rows

    @property
    def fits(self) -> bool:
        """Whether these states may stay in memory between moves."""
        sizes = (
            room.numel() * room.element_size() for layer in self._layers for room in layer.room
        )
        return sum(sizes) <= _KEPT_BYTES

    @torch.no_grad()
    def read(
        self, inputs: Tensor, first: Tensor, width: int, valid: Tensor | None = None
    ) -> Tensor:
        """(N, q, H) states after `inputs` (N, q), which stand at places `first` (N,) and on; place
        0 is the start token's, so that the state at place i predicts the text's token i.

        `width`: places that hold something, T at most. `valid` (N, q): False is thrown away.
        """
        place = first[:, None] + torch.arange(inputs.shape[1], device=inputs.device)
        place = place.clamp_max(self.length)
        if valid is not None:
            place = torch.where(valid, place, self.length)
        width, n = min(width, self.length), rows_at_once(inputs)
        if not self._layers:
            return self._reread(inputs, place, width)
        parts = [
            self._read(inputs[i : i + n], place[i : i + n], width, slice(i, i + n))
            for i in range(0, len(inputs), n)
        ]
        return torch.cat(parts)

    def _read(self, inputs: Tensor, place: Tensor, width: int, rows: slice) -> Tensor:
        for layer in self._layers:
            layer.place, layer.rows, layer.width = place, rows, width
        cache = DynamicCache()
        cache.layers = list(self._layers)
        at = place.clamp_max(self.length - 1)
        seen = torch.arange(width, device=place.device) <= at[..., None]
        dtype = self.lm.model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=place.device)
        mask = mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]
        state: Tensor = self.lm.model.base_model(
            inputs, past_key_values=cache, use_cache=True, attention_mask=mask, position_ids=at
        ).last_hidden_state
        return state

    def _reread(self, inputs: Tensor, place: Tensor, width: int) -> Tensor:
        self._inputs.scatter_(1, place, inputs)
        states = self.lm.states(self._inputs[:, :width])
        at = place.clamp_max(width - 1)[..., None].expand(-1, -1, states.shape[-1])
        return states.gather(1, at)

    def take(self, rows: Tensor) -> RowCache:
        """A copy of the rows numbered `rows` (M,)."""
        taken = RowCache(self.lm, len(rows), self.length)
        taken._inputs = self._inputs[rows]
        for new, layer in zip(taken._layers, self._layers, strict=True):
            if layer.is_initialized:
                new.lazy_initialization(*layer.room)
                new.room = [room[rows] for room in layer.room]
        return taken

    def put(self, rows: Tensor, other: RowCache) -> None:
        """Set the rows numbered `rows` (M,) to those of `other`."""
        self._inputs[rows] = other._inputs
        for layer, given in zip(self._layers, other._layers, strict=True):
            for room, states in zip(layer.room, given.room, strict=True):
                room[rows] = states

    def where(self, rows: Tensor, other: RowCache) -> RowCache:
        """These rows where `rows` (N,) is True, else those of `other`."""
        chosen = RowCache(self.lm, self.n_rows, self.length)
        chosen._inputs = torch.where(rows[:, None], self._inputs, other._inputs)
        layers = zip(chosen._layers, self._layers, other._layers, strict=True)
        for new, mine, its in layers:
            new.lazy_initialization(*mine.room)
            pairs = zip(mine.room, its.room, strict=True)
            new.room = [torch.where(rows[:, None, None, None], a, b) for a, b in pairs]
        return chosen


@dataclass(frozen=True)
class TokenTerms:
    """What p_θ says of rows (N, T) at each of their places, float32 nats; 0 where there is no text.

    log_p: log p_θ(x_i | x_<i, c), 0 at the prompt. log_goes_on: log(1 − p_θ(end at i | x_<i, c)).
        entropy: of p_θ's next token at i, None where nobody asked.
    cache: the states behind them, None where they would not fit.
    """

    log_p: Tensor
    log_goes_on: Tensor
    entropy: Tensor | None = None
    cache: RowCache | None = None

    def take(self, rows: Tensor) -> TokenTerms:
        """The rows numbered `rows` (M,)."""
        cache = None if self.cache is None else self.cache.take(rows)
        return replace(self._map(lambda x: x[rows]), cache=cache)

    def where(self, rows: Tensor, other: TokenTerms) -> TokenTerms:
        """These where `rows` (N,) is True, else those of `other`."""
        entropy, cache = None, None
        if self.entropy is not None and other.entropy is not None:
            entropy = torch.where(rows[:, None], self.entropy, other.entropy)
        if self.cache is not None and other.cache is not None:
            cache = self.cache.where(rows, other.cache)
        return TokenTerms(
            torch.where(rows[:, None], self.log_p, other.log_p),
            torch.where(rows[:, None], self.log_goes_on, other.log_goes_on),
            entropy,
            cache,
        )

    def _map(self, of: Callable[[Tensor], Tensor]) -> TokenTerms:
        entropy = None if self.entropy is None else of(self.entropy)
        return TokenTerms(of(self.log_p), of(self.log_goes_on), entropy)


@torch.no_grad()
def read_in_parts(lm: Any, rows: Tensor) -> Tensor:
    """(N, T, V) logits of `rows` (N, T) read in two parts that begin elsewhere in each row.

    Raises:
        Exception: whatever a model raises that cannot be asked so.
    """
    n, length = rows.shape
    cache = RowCache(lm, n, length)
    first = torch.arange(n, device=rows.device) % length
    start, places = torch.zeros_like(first), torch.arange(length, device=rows.device)
    left = cache.read(rows, start, length, valid=places < first[:, None])
    inputs = F.pad(rows, (0, length)).gather(1, first[:, None] + places)
    right = cache.read(inputs, first, length, valid=first[:, None] + places < length)
    at = (places - first[:, None]).clamp_min(0)[..., None].expand(-1, -1, right.shape[-1])
    states = torch.where((places < first[:, None])[..., None], left, right.gather(1, at))
    logits: Tensor = lm.logits_as_read(states)
    return logits
