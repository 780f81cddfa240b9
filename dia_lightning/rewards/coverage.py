"""How much of a text is taken from its source, word for word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.rewards.base import field_of
from dia_lightning.types import Record, Reward
from dia_lightning.words import words


class Coverage(Reward):
    """The share of the text's word n-grams that occur in the source, case and punctuation ignored,
    in [0, 1].

    A stand-in for entailment where no entailment model is at hand: it sees copying, not meaning. A
    text that negates its source in one word keeps most of its n-grams, and a faithful paraphrase
    loses them. An n-gram that the text repeats counts each time. A text of fewer than n words is
    one n-gram of all its words; a text without words gets 0. In scripts without spaces (Chinese,
    Japanese, Thai and so on) every letter is a word.

    Args:
        source_field: Field of the record that holds the source.
        n: Words in an n-gram, 1 or more.
        name: Label in outputs.

    Raises:
        UserError: if `n` is below 1.
    """

    conditional = True
    on_prefix = False

    def __init__(self, source_field: str = "source", n: int = 3, name: str = "coverage") -> None:
        if n < 1:
            raise UserError(f"n: {n} given, allowed: a number of words from 1")
        self.source_field, self.n, self.name = source_field, n, name

    def __call__(self, texts: Sequence[str], records: Sequence[Record] = ()) -> Tensor:
        sources = [field_of(record, self.source_field, self) for record in records]
        of = {source: words(source.casefold(), contractions=True) for source in set(sources)}
        values = [
            self._coverage(text, of[source]) for text, source in zip(texts, sources, strict=True)
        ]
        return torch.tensor(values, dtype=torch.float32)

    def _coverage(self, text: str, source: list[str]) -> float:
        own = words(text.casefold(), contractions=True)
        n = min(self.n, len(own))
        if n == 0:
            return 0.0
        known = set(_ngrams(source, n))
        ngrams = _ngrams(own, n)
        return sum(ngram in known for ngram in ngrams) / len(ngrams)


def _ngrams(row: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(row[i:] for i in range(n)), strict=False))
