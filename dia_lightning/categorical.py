"""Draws from categorical distributions, exact also where the vocabulary is large."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def draw_categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One draw from softmax(logits) per row, (…, V) → (…) int64, by inversion in float64.

    `torch.multinomial` gives the same law at twenty times the cost on a CPU; float32 sums would lower the temperature. Of a
    large vocabulary, sums of 256 tokens (float32, as few add up no error) are inverted first, then one such block.
    """
    u = torch.rand(logits.shape[:-1], generator=generator, device=logits.device, dtype=torch.float64)
    n_tokens = logits.shape[-1]
    if n_tokens < 4096:
        cumulative = logits.double().softmax(-1).cumsum(-1)
        # Scaled by the last value, which is 1 but for rounding, so that no draw falls beyond the vocabulary.
        return _invert(cumulative, u * cumulative[..., -1])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    weights = (logits - logits.amax(-1, keepdim=True)).float().exp()
    blocks = F.pad(weights, (0, -n_tokens % 256)).unflatten(-1, (-1, 256))
    cumulative = blocks.sum(-1).double().cumsum(-1)
    u = u * cumulative[..., -1]
    block = _invert(cumulative, u)
    before = F.pad(cumulative, (1, 0)).gather(-1, block[..., None])[..., 0]
    inner = blocks.gather(-2, block[..., None, None].expand(*block.shape, 1, 256))[..., 0, :].double().cumsum(-1)
    return (256 * block + _invert(inner, u - before)).clamp_max(n_tokens - 1)


def _invert(cumulative: Tensor, u: Tensor) -> Tensor:
    """The first index whose cumulative sum (…, N) exceeds u (…)."""
    found = torch.searchsorted(cumulative, u[..., None], right=True)[..., 0]
    return found.clamp_max(cumulative.shape[-1] - 1)
