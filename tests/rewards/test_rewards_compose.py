"""`WeightedSum` against sums by hand; its refusals; every reward from a `class_path` in a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import Tensor

from dia_lightning.resources import UserError
from dia_lightning.rewards import Keyword, Regex, RewardError, VaderSentiment, WeightedSum, check_reward
from dia_lightning.types import Reward

TEXTS = ["The food was lovely.", "A pub.", "Food in a pub, and 12 chairs", ""]
FOOD, PUB, DIGIT = Keyword(["food"], name="food"), Keyword(["pub", "inn"], name="pub"), Regex(r"\d", name="digit")


class Noise(Reward):
    name, deterministic = "noise", False

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.rand(len(texts))


class Nan(Reward):
    name = "nan"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.full((len(texts),), float("nan"))


def test_the_sum_by_hand() -> None:
    reward = WeightedSum([FOOD, PUB, DIGIT], [2.0, -1.0, 0.5])
    assert reward(TEXTS).tolist() == [2.0, -0.5, 2.0, 0.0]
    assert WeightedSum([FOOD, PUB, DIGIT])(TEXTS).tolist() == [1.0, 0.5, 2.5, 0.0]


def test_the_parts_are_unweighted_and_by_name() -> None:
    parts = WeightedSum([FOOD, PUB, DIGIT], [2.0, -1.0, 0.5]).parts(TEXTS)
    assert {name: values.tolist() for name, values in parts.items()} == {
        "food": [1.0, 0.0, 1.0, 0.0],
        "pub": [0.0, 0.5, 0.5, 0.0],
        "digit": [0.0, 0.0, 1.0, 0.0],
    }


@given(st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3), st.lists(st.sampled_from(TEXTS), max_size=5))
def test_the_sum_is_the_weighted_sum_of_its_parts(weights: list[float], texts: list[str]) -> None:
    reward = WeightedSum([FOOD, PUB, DIGIT], weights)
    expected = [sum(w * part([text]).item() for w, part in zip(weights, (FOOD, PUB, DIGIT), strict=True)) for text in texts]
    torch.testing.assert_close(reward(texts), torch.tensor(expected), rtol=0, atol=1e-6)


def test_it_obeys_the_laws_also_nested_and_with_whole_weights() -> None:
    inner = WeightedSum([FOOD, PUB], [1, 2], name="inner")
    check_reward(WeightedSum([VaderSentiment(), inner, DIGIT], [0.3, 1.0, -2.0]))


def test_it_is_deterministic_only_if_its_parts_are() -> None:
    assert WeightedSum([FOOD, PUB]).deterministic
    assert not WeightedSum([FOOD, Noise()]).deterministic
    check_reward(WeightedSum([FOOD, Noise()]))


def test_a_broken_part_is_named() -> None:
    with pytest.raises(RewardError, match=r"reward 'nan' breaks the law 'finite' on the text 'The food was lovely\.'"):
        WeightedSum([FOOD, Nan()], [1.0, 0.0])(TEXTS)


@pytest.mark.parametrize("rewards", [[], [FOOD, FOOD], [FOOD, PUB, Regex("x", name="food")]])
def test_parts_need_different_names(rewards: list[Reward]) -> None:
    with pytest.raises(UserError, match=r"reward\.init_args\.rewards: names .* given, allowed: .* different names"):
        WeightedSum(rewards)


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_weights_are_one_finite_number_a_part(weights: list[float]) -> None:
    with pytest.raises(UserError, match=r"reward\.init_args\.weights: .* given, allowed: 2 finite numbers"):
        WeightedSum([FOOD, PUB], weights)


FOOD_CONFIG = {"class_path": "dia_lightning.rewards.Keyword", "init_args": {"words": ["food"], "name": "food"}}
CONFIGS: dict[str, tuple[dict[str, Any], float]] = {
    "vader": ({"class_path": "dia_lightning.rewards.VaderSentiment"}, VaderSentiment()(TEXTS[:1]).item()),
    "keyword": (FOOD_CONFIG, 1.0),
    "regex": ({"class_path": "dia_lightning.rewards.Regex", "init_args": {"pattern": "F..d", "ignore_case": False}}, 0.0),
    "sum": (
        {
            "class_path": "dia_lightning.rewards.WeightedSum",
            "init_args": {
                "rewards": [FOOD_CONFIG, {"class_path": "dia_lightning.rewards.Regex", "init_args": {"pattern": "was"}}],
                "weights": [1.0, 0.5],
            },
        },
        1.5,
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_every_reward_is_made_from_a_class_path(case: str) -> None:
    config, value = CONFIGS[case]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    reward = parser.instantiate_classes(parser.parse_object({"reward": config})).reward
    assert reward(TEXTS[:1]).tolist() == [value]
