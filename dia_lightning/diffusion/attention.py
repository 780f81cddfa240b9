"""Attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v; q, k, v (B, H, T, D); over all positions, or over those `seen` (T,
    T) bool by each.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch 2.13's fused kernel takes seven times as long in the backward pass here (64 × 4 × 41
        # × 32).
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        return torch.softmax(scores, -1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
