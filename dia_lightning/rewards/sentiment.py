"""Sentiment by lexicon and rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dia_lightning.types import Reward


class VaderSentiment(Reward):
    """VADER's compound score in [−1, 1], larger = more positive.

    Source: Hutto and Gilbert, ICWSM 2014; package vaderSentiment.

    Args:
        name: Label in outputs.
    """

    on_prefix = True

    def __init__(self, name: str = "sentiment") -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self.name = name
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor(
            [self._analyzer.polarity_scores(text)["compound"] for text in texts],
            dtype=torch.float32,
        )
