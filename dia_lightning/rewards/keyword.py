"""Rewards that look for words."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.types import Reward
from dia_lightning.words import whole_word


class Keyword(Reward):
    """The share of `words` that occur in the text as whole words, case ignored, in [0, 1].

    Words of scripts without spaces (Chinese, Japanese, Thai and so on) have no ends, so there a
    word may stand anywhere in the text, and a Latin word or number may stand between such letters:
    "cafe" is in "很好的cafe在". Full-width forms are characters of their
    own: "ABC" is not in "ＡＢＣ".

    Args:
        words: Words to look for; one may be a phrase, with any white space between its parts.
        name: Label in outputs.

    Raises:
        UserError: if `words` is empty or holds an empty word.
    """

    on_prefix = True

    def __init__(self, words: list[str], name: str = "keyword") -> None:
        if not words or not all(word.strip() for word in words):
            raise UserError(f"words: {words} given, allowed: one word or more, none empty")
        self.words, self.name = words, name
        self._patterns = [whole_word(word) for word in words]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        found = [
            sum(p.search(text) is not None for p in self._patterns) / len(self._patterns)
            for text in texts
        ]
        return torch.tensor(found, dtype=torch.float32)


class Regex(Reward):
    """1 where `pattern` matches anywhere in the text, else 0.

    Args:
        pattern: Regular expression in Python's syntax.
        name: Label in outputs.
        ignore_case: Match without regard to case.

    Raises:
        UserError: if `pattern` is no regular expression.
    """

    def __init__(self, pattern: str, name: str = "regex", ignore_case: bool = True) -> None:
        self.pattern, self.name, self.ignore_case = pattern, name, ignore_case
        try:
            self._compiled = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(
                f"pattern: {pattern!r:.100} given, allowed: a regular expression in"
                f" Python's syntax ({error})"
            ) from error

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor(
            [self._compiled.search(text) is not None for text in texts], dtype=torch.float32
        )
