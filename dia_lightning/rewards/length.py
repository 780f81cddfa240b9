"""A reward for texts of a wanted length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.types import Reward
from dia_lightning.words import n_words


class Length(Reward):
    """−|n − target| / target for a text of n words: 0 at the target, −1 for the empty text.

    Words are pieces between white space; in scripts without spaces (Chinese, Japanese, Thai and so
    on) every letter and punctuation mark counts.

    Args:
        target: Wanted number of words, 1 or more.
        name: Label in outputs.

    Raises:
        UserError: if `target` is below 1.
    """

    on_prefix = False

    def __init__(self, target: int, name: str = "length") -> None:
        if target < 1:
            raise UserError(f"target: {target} given, allowed: a number of words from 1")
        self.target, self.name = target, name

    def __call__(self, texts: Sequence[str]) -> Tensor:
        lengths = torch.tensor([n_words(text) for text in texts], dtype=torch.float32)
        return -(lengths - self.target).abs() / self.target
