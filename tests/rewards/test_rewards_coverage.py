"""`Coverage` by hand and against a search for the words in a string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dia_lightning.errors import UserError
from dia_lightning.rewards import Coverage, check_reward
from dia_lightning.rewards.base import RewardError, call_reward

SOURCE = {"source": "The Vaults is a pub near Café Adriatic. It isn't cheap; the food is French."}
WORDS = st.lists(st.sampled_from("abc"), max_size=9)


def value(text: str, n: int = 3, source: str = SOURCE["source"]) -> float:
    return Coverage(n=n)([text], [{"source": source}]).item()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the vaults is a PUB", 1.0),
        ("The Vaults is a restaurant", 2 / 3),
        ("It isn't cheap", 1.0),
        ("it is cheap", 0.0),
        ("pub near cafe", 0.0),
        ("French", 1.0),
        ("a pub", 1.0),
        ("pub a", 0.0),
        ("", 0.0),
        ("?! ...", 0.0),
    ],
)
def test_by_hand(text: str, expected: float) -> None:
    assert value(text) == pytest.approx(expected)


@given(WORDS, WORDS, st.integers(1, 4))
def test_it_is_the_share_of_windows_found_in_the_source(
    text: list[str], source: list[str], n: int
) -> None:
    size = min(n, len(text))
    windows = (
        [f" {' '.join(text[i : i + size])} " for i in range(len(text) - size + 1)] if text else []
    )
    found = sum(window in f" {' '.join(source)} " for window in windows)
    assert value(" ".join(text), n, " ".join(source)) == pytest.approx(found / max(1, len(windows)))


def test_a_repeated_ngram_counts_each_time() -> None:
    assert value("a pub a pub a pub", n=2) == pytest.approx(3 / 5)


def test_it_obeys_the_laws_and_reads_the_named_field() -> None:
    records = [{"article": "A pub by the river."}, {"article": "Good food."}]
    check_reward(Coverage("article", n=2), ["A pub by the sea.", "Good food, good pub."], records)
    with pytest.raises(
        RewardError, match="'coverage' needs the field 'source', a text, for every prompt"
    ):
        call_reward(Coverage(), ["A pub."], records[:1])


def test_n_is_at_least_1() -> None:
    with pytest.raises(UserError, match=r"^n: 0 given"):
        Coverage(n=0)
