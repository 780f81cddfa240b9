"""`VaderSentiment` against vaderSentiment's own analyzer, text by text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from dia_lightning.rewards import VaderSentiment, check_reward

REWARD, ANALYZER = VaderSentiment(), SentimentIntensityAnalyzer()
WORDS = [
    "good",
    "BAD",
    "not",
    "very",
    "but",
    "awful!",
    "love",
    ":)",
    "😀",
    "the",
    "food",
    "isn't",
    "kind",
    "of",
    "?!",
]
TEXTS = [
    "VADER is smart, handsome, and funny!",
    "The food was not good, but the staff were lovely.",
    "Today SUX!",
    "The plot was kind of bad.",
    "The Eagle is a pub near the river.",
    "",
]


def oracle(texts: list[str]) -> torch.Tensor:
    return torch.tensor(
        [ANALYZER.polarity_scores(text)["compound"] for text in texts], dtype=torch.float32
    )


def test_it_obeys_the_laws() -> None:
    check_reward(REWARD)
    check_reward(REWARD, TEXTS)


def test_it_is_the_compound_score() -> None:
    torch.testing.assert_close(REWARD(TEXTS), oracle(TEXTS), rtol=0, atol=0)


def test_the_published_example() -> None:
    """The first example of the package's README: compound 0.8439."""
    assert REWARD(TEXTS[:1]).item() == pytest.approx(0.8439, abs=1e-6)


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join) | st.text(max_size=20),
        max_size=4,
    )
)
def test_any_text_agrees_with_the_analyzer_and_lies_in_minus_one_to_one(texts: list[str]) -> None:
    values = REWARD(texts)
    torch.testing.assert_close(values, oracle(texts), rtol=0, atol=0)
    assert bool((values.abs() <= 1).all())


def test_the_name() -> None:
    assert (REWARD.name, VaderSentiment(name="mood").name) == ("sentiment", "mood")
