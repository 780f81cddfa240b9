"""`Keyword` against a plain split of the text into words; `Regex` against `re`; what both
refuse.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dia_lightning.errors import UserError
from dia_lightning.rewards import Keyword, Regex, check_reward

VOCABULARY = ["food", "Food", "foods", "pub", "PUB", "river", "riverside", "cheap"]


@pytest.mark.parametrize(
    "reward", [Keyword(["food", "river"]), Regex(r"food|\d"), Regex("FOOD", ignore_case=False)]
)
def test_they_obey_the_laws(reward: Keyword | Regex) -> None:
    check_reward(reward)


@pytest.mark.parametrize(
    ("words", "text", "share"),
    [
        (["food", "pub"], "FOOD, and a pub.", 1.0),
        (["food", "pub"], "Food food food", 0.5),
        (["food"], "seafood foods food_1", 0.0),
        (["fast food"], "Fast\n food", 1.0),
        (["fast food"], "food, fast", 0.0),
        (["C++", "c"], "I write C++.", 1.0),
        (["C++"], "C++11", 0.0),
        (["a.c"], "abc", 0.0),
        (["été"], "L'ÉTÉ", 1.0),
        (["a", "b", "c", "d"], "d", 0.25),
        (["a"], "", 0.0),
    ],
)
def test_keyword_by_hand(words: list[str], text: str, share: float) -> None:
    assert Keyword(words)([text]).tolist() == [share]


@given(
    st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=4),
    st.lists(st.sampled_from(VOCABULARY), max_size=6),
)
def test_keyword_is_the_share_of_words_in_the_split_text(words: list[str], text: list[str]) -> None:
    present = {word.lower() for word in text}
    share = sum(word.lower() in present for word in words) / len(words)
    assert Keyword(words)([", ".join(text)]).item() == pytest.approx(share, abs=1e-7)


@pytest.mark.parametrize("words", [[], [""], ["food", "  "]])
def test_keyword_refuses_an_empty_list_and_an_empty_word(words: list[str]) -> None:
    with pytest.raises(
        UserError,
        match=r"words: .* given, allowed: one word",
    ) as caught:
        Keyword(words)
    assert str(words) in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "ignore_case", "text", "value"),
    [
        (r"\d+", True, "on page 12", 1.0),
        (r"^\d+", True, "on page 12", 0.0),
        ("pub", True, "The PUB", 1.0),
        ("pub", False, "The PUB", 0.0),
        ("a$", True, "b", 0.0),
        ("", True, "", 1.0),
    ],
)
def test_regex_by_hand(pattern: str, ignore_case: bool, text: str, value: float) -> None:
    assert Regex(pattern, ignore_case=ignore_case)([text]).tolist() == [value]


@given(
    st.lists(st.text(alphabet="aAb1 \n", max_size=6), max_size=5),
    st.sampled_from(["a+b", "^A", r"\d\s", "b$", "[^a]"]),
)
def test_regex_is_one_where_python_finds_a_match(texts: list[str], pattern: str) -> None:
    assert Regex(pattern)(texts).tolist() == [
        float(bool(re.findall(f"(?i){pattern}", text))) for text in texts
    ]


@pytest.mark.parametrize("pattern", ["(", "[a", "*", r"(a)\2", "a{99999999999999999999}"])
def test_regex_refuses_a_bad_pattern(pattern: str) -> None:
    with pytest.raises(UserError, match=r"pattern: .* given, allowed:") as caught:
        Regex(pattern)
    assert repr(pattern) in str(caught.value)


@given(st.text(alphabet="a1({[*+?\\|^$.)}],:<>=!", max_size=12))
def test_regex_refuses_or_accepts_but_never_fails_otherwise(pattern: str) -> None:
    try:
        reward = Regex(pattern)
    except UserError:
        return
    assert reward([]).shape == (0,)


def test_the_names() -> None:
    assert (Keyword(["a"]).name, Keyword(["a"], name="k").name) == ("keyword", "k")
    assert (Regex("a").name, Regex("a", name="x").name) == ("regex", "x")
