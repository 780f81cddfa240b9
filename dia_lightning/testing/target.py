"""The laws that any target must obey."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TargetError(ValueError):
    """A target broke one of its laws; the message names the law and the first row that shows it."""


def check_target(target: Any, tokens: Tensor, atol: float = 1e-3) -> None:
    """Run a target through the laws that kernels rely on; returns if all hold.

    The laws: 'shape', (B,) of float32 or float64; 'not NaN' and 'not +inf' (−inf is a text of
    probability 0); 'deterministic'; 'tokens unchanged'; 'terms', those of a target that has
    `terms` make up its `log_prob`; 'batch = one by one' to `atol` (only where rows need no prompts
    of their own).

    Args:
        target: any object with `log_prob`. tokens: (B, T) int64, at least two different rows.

    Raises:
        TargetError: naming the law and the row.
    """
    given = tokens.clone()
    values = target.log_prob(tokens)
    if not torch.equal(tokens, given):
        raise TargetError("law 'tokens unchanged': log_prob wrote into its argument")
    if values.shape != (len(tokens),) or values.dtype not in (torch.float32, torch.float64):
        raise TargetError(
            f"law 'shape': ({len(tokens)},) float32 or float64 needed, got {tuple(values.shape)}"
            f" {values.dtype}"
        )
    wrong = values.isnan() | (values == torch.inf)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise TargetError(
            f"law 'finite or −inf': {values[i].item()} for row {i}: {tokens[i].tolist()}"
        )
    _require_close("deterministic", values, target.log_prob(tokens), tokens, 1e-9)
    if hasattr(target, "terms"):
        log_base, reward = target.terms(tokens)
        _require_close("terms", values, log_base + target.lam * reward, tokens, atol)
    if getattr(target, "batch", None) is None:
        singles = torch.cat([target.log_prob(row[None]) for row in tokens])
        _require_close("batch = one by one", values, singles, tokens, atol)


def _require_close(law: str, values: Tensor, other: Tensor, tokens: Tensor, atol: float) -> None:
    wrong = (values != other) & ~((values - other).abs() <= atol)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise TargetError(
            f"law {law!r}: {values[i].item()} and {other[i].item()} for row {i}:"
            f" {tokens[i].tolist()}"
        )
