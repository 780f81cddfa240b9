"""Rewards of the comparison with peers, as functions of texts: the same code on both sides, so this
file imports neither the package nor a peer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Judge = Callable[[Sequence[str]], list[float]]


def sentiment() -> Judge:
    """VADER's compound score, in [−1, 1]."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda texts: [analyzer.polarity_scores(text)["compound"] for text in texts]


def last_word(word: str) -> Judge:
    """1 where `word` is the last of the text, else 0: a prefix that ends so misleads, since the
    text goes on.
    """
    pattern = re.compile(rf"\b{re.escape(word)}\W*$", re.IGNORECASE)
    return lambda texts: [float(pattern.search(text) is not None) for text in texts]


def coverage(words: Sequence[str]) -> Judge:
    """Share of `words` that the text holds; a prefix without them says nothing of what comes."""
    patterns = [re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE) for word in words]
    return lambda texts: [
        sum(pattern.search(text) is not None for pattern in patterns) / len(patterns)
        for text in texts
    ]


def last_letter(letter: str) -> Judge:
    """1 where the text ends in `letter`, else 0: for texts of letters, which are enumerable."""
    return lambda texts: [float(text.endswith(letter)) for text in texts]


JUDGES: dict[str, Callable[..., Judge]] = {
    "sentiment": sentiment, "last word": last_word, "coverage": coverage,
    "last letter": last_letter,
}  # fmt: skip


def judge_of(spec: Mapping[str, Any]) -> Judge:
    """The function of {"name": …, its arguments}."""
    arguments = {key: value for key, value in spec.items() if key != "name"}
    return JUDGES[spec["name"]](**arguments)
