"""What stays float32 under a trainer of another true precision: bf16-true, 16-true and 64-true are of the networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def float32_default() -> Iterator[None]:
    """New tensors are float32: a step of such a trainer has its own precision as torch's default."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class KeepsBuffers(nn.Module):
    """A module whose buffers, also those of its parts, keep their precision when its weights change theirs.

    They are p_θ's embeddings, noise schedules, rotary frequencies and running means: too coarse for 16 bits.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = [(part, name, kept) for part in self.modules() for name, kept in part._buffers.items()]
        super()._apply(fn, recurse)
        for part, name, kept in before:
            moved = part._buffers[name]
            if kept is not None and moved is not None and moved.dtype != kept.dtype:
                part._buffers[name] = kept.to(moved.device)
        return self
