"""Rewards that look for words."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dia_lightning.resources import UserError


class Keyword:
    """The share of `words` that occur in the text as whole words, case ignored, in [0, 1].

    Args:
        words: what to look for; a word may be a phrase.
        name: label in outputs.
    """

    def __init__(self, words: list[str], name: str = "keyword") -> None:
        if not words or not all(word.strip() for word in words):
            raise UserError(f"--model.init_args.reward.init_args.words: {words} given, at least one word is needed, none empty")
        self.words, self.name = words, name
        self._patterns = [re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE) for word in words]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        found = [sum(p.search(text) is not None for p in self._patterns) / len(self._patterns) for text in texts]
        return torch.tensor(found, dtype=torch.float32)


class Regex:
    """1 where `pattern` matches anywhere in the text, else 0.

    Args:
        pattern: a regular expression in Python's syntax.
        name: label in outputs.
        ignore_case: match without regard to case.
    """

    def __init__(self, pattern: str, name: str = "regex", ignore_case: bool = True) -> None:
        self.pattern, self.name, self.ignore_case = pattern, name, ignore_case
        try:
            self._compiled = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
        except re.error as error:
            raise UserError(f"--model.init_args.reward.init_args.pattern: {pattern!r} is no regular expression ({error})") from error

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([self._compiled.search(text) is not None for text in texts], dtype=torch.float32)
