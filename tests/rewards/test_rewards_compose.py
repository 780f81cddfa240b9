"""`WeightedSum`, `ProductOfExperts` and `Hinge` by hand; their refusals; rewards from a
`class_path`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.rewards import (
    Coverage,
    Hinge,
    Keyword,
    Length,
    ProductOfExperts,
    Regex,
    VaderSentiment,
    WeightedSum,
    check_reward,
)
from dia_lightning.rewards.base import RewardError, call_reward
from dia_lightning.types import Reward

TEXTS = ["The food was lovely.", "A pub.", "Food in a pub, and 12 chairs", ""]
FOOD, PUB, DIGIT = (
    Keyword(["food"], name="food"),
    Keyword(["pub", "inn"], name="pub"),
    Regex(r"\d", name="digit"),
)


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


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3),
    st.lists(st.sampled_from(TEXTS), max_size=5),
)
def test_the_sum_is_the_weighted_sum_of_its_parts(weights: list[float], texts: list[str]) -> None:
    reward = WeightedSum([FOOD, PUB, DIGIT], weights)
    expected = [
        sum(w * part([text]).item() for w, part in zip(weights, (FOOD, PUB, DIGIT), strict=True))
        for text in texts
    ]
    torch.testing.assert_close(reward(texts), torch.tensor(expected), rtol=0, atol=1e-6)


def test_it_obeys_the_laws_also_nested_and_with_whole_weights() -> None:
    inner = WeightedSum([FOOD, PUB], [1, 2], name="inner")
    check_reward(WeightedSum([VaderSentiment(), inner, DIGIT], [0.3, 1.0, -2.0]))


def test_it_is_deterministic_only_if_its_parts_are() -> None:
    assert WeightedSum([FOOD, PUB]).deterministic
    assert not WeightedSum([FOOD, Noise()]).deterministic
    check_reward(WeightedSum([FOOD, Noise()]))


def test_a_broken_part_is_named() -> None:
    with pytest.raises(
        RewardError,
        match=r"reward 'nan' breaks the law 'finite' on the text 'The food was lovely\.'",
    ):
        WeightedSum([FOOD, Nan()], [1.0, 0.0])(TEXTS)


@pytest.mark.parametrize("rewards", [[], [FOOD, FOOD], [FOOD, PUB, Regex("x", name="food")]])
def test_parts_need_different_names(rewards: list[Reward]) -> None:
    with pytest.raises(UserError, match=r"^rewards: names .* given, allowed: .* different names"):
        WeightedSum(rewards)


@pytest.mark.parametrize(
    "weights", [[], [1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [float("inf"), 1.0]]
)
def test_weights_are_one_finite_number_a_part(weights: list[float]) -> None:
    with pytest.raises(UserError, match=r"^weights: .* given, allowed: 2 finite numbers"):
        WeightedSum([FOOD, PUB], weights)


COVERED = Coverage(n=1)
RECORDS = [
    {"source": "a lovely pub"},
    {"source": "a pub"},
    {"source": "food and chairs"},
    {"source": "food"},
]


def test_a_sum_with_a_conditional_part_hands_it_the_records() -> None:
    reward = WeightedSum([FOOD, COVERED], [1.0, 2.0])
    assert reward.conditional
    assert not WeightedSum([FOOD, PUB]).conditional
    expected = [1 + 2 * 1 / 4, 2 * 2 / 2, 1 + 2 * 3 / 7, 0.0]
    assert call_reward(reward, TEXTS, RECORDS).tolist() == pytest.approx(expected)
    assert reward.parts(TEXTS, RECORDS)["coverage"].tolist() == pytest.approx([1 / 4, 1, 3 / 7, 0])
    check_reward(reward, TEXTS[:3], RECORDS[:3])
    with pytest.raises(RewardError, match="'coverage' needs the field 'source'"):
        call_reward(reward, TEXTS)


def test_the_product_by_hand() -> None:
    reward = ProductOfExperts([PUB, COVERED], [2.0, 1.0], floor=1e-3)
    low = math.log(1e-3)
    expected = [
        2 * low + math.log(1 / 4),
        2 * math.log(0.5),
        2 * math.log(0.5) + math.log(3 / 7),
        3 * low,
    ]
    assert call_reward(reward, TEXTS, RECORDS).tolist() == pytest.approx(expected)
    assert reward.parts(TEXTS, RECORDS)["pub"].tolist() == [0, 0.5, 0.5, 0]


def test_exp_of_the_product_is_the_product() -> None:
    reward = ProductOfExperts([PUB, COVERED])
    product = PUB(TEXTS) * COVERED(TEXTS, RECORDS)
    values = call_reward(reward, TEXTS, RECORDS).exp()
    torch.testing.assert_close(values[1:3], product[1:3])
    assert values[0] == pytest.approx(1e-6 / 4)


@pytest.mark.parametrize(
    ("reward", "value"),
    [(VaderSentiment(), "-0.5"), (WeightedSum([FOOD], [2.0], name="twice"), "2")],
)
def test_an_expert_outside_0_and_1_is_named_with_its_text(reward: Reward, value: str) -> None:
    with pytest.raises(
        RewardError,
        match=(
            rf"'product': its part '{reward.name}' gave {value}.* for the text 'The food was terr"
        ),
    ):
        ProductOfExperts([PUB, reward])(["A pub.", "The food was terrible!"])


def test_rounding_above_1_is_no_error() -> None:
    one = WeightedSum([FOOD], [1.000001], name="one")
    assert ProductOfExperts([one])(TEXTS[:1]).tolist() == [0.0]


@pytest.mark.parametrize("floor", [0.0, 1.0, -1.0, float("nan")])
def test_the_floor_is_between_0_and_1(floor: float) -> None:
    with pytest.raises(
        UserError,
        match=r"^floor: .* given, allowed: a number above 0 and below 1",
    ):
        ProductOfExperts([PUB], floor=floor)


def test_products_and_sums_refuse_alike() -> None:
    with pytest.raises(UserError, match=r"^rewards: names .* different names"):
        ProductOfExperts([PUB, PUB])
    with pytest.raises(UserError, match=r"^weights: .* 2 finite numbers"):
        ProductOfExperts([PUB, FOOD], [1.0])


def test_the_hinge_by_hand() -> None:
    texts = ["a b c d", "a b c", "a", ""]
    hinge = Hinge(Length(4), threshold=-0.5, name="long enough")
    assert hinge(texts).tolist() == [0.0, 0.0, -0.25, -0.5]
    assert hinge.parts(texts)["length"].tolist() == [0.0, -0.25, -0.75, -1.0]
    check_reward(hinge, texts)


@pytest.mark.parametrize("threshold", [float("nan"), float("inf")])
def test_the_threshold_is_finite(threshold: float) -> None:
    with pytest.raises(UserError, match=r"^threshold: .* given, allowed: a finite number"):
        Hinge(FOOD, threshold)


def test_parts_of_parts_are_named_by_their_path() -> None:
    inner = ProductOfExperts([PUB, COVERED], name="experts")
    reward = WeightedSum([Hinge(inner, -1.0), FOOD], [3.0, 1.0])
    parts = reward.parts(TEXTS, RECORDS)
    assert list(parts) == [
        "hinge",
        "hinge/experts",
        "hinge/experts/pub",
        "hinge/experts/coverage",
        "food",
    ]
    torch.testing.assert_close(parts["hinge/experts/coverage"], COVERED(TEXTS, RECORDS))
    torch.testing.assert_close(parts["hinge"], (parts["hinge/experts"] + 1).clamp_max(0))
    torch.testing.assert_close(reward(TEXTS, RECORDS), 3 * parts["hinge"] + parts["food"])
    assert reward.conditional
    check_reward(reward, TEXTS[:3], RECORDS[:3])


@pytest.mark.parametrize(
    "compose",
    [lambda r: Hinge(r, 0.0), lambda r: ProductOfExperts([r]), lambda r: WeightedSum([r])],
)
def test_determinism_and_conditions_are_passed_on(compose: Any) -> None:
    assert not compose(Noise()).deterministic
    assert compose(FOOD).deterministic
    assert compose(compose(COVERED)).conditional
    assert not compose(FOOD).conditional


FOOD_CONFIG = {
    "class_path": "dia_lightning.rewards.Keyword",
    "init_args": {"words": ["food"], "name": "food"},
}
CONFIGS: dict[str, tuple[dict[str, Any], float]] = {
    "vader": (
        {"class_path": "dia_lightning.rewards.VaderSentiment"},
        VaderSentiment()(TEXTS[:1]).item(),
    ),
    "keyword": (FOOD_CONFIG, 1.0),
    "regex": (
        {
            "class_path": "dia_lightning.rewards.Regex",
            "init_args": {"pattern": "F..d", "ignore_case": False},
        },
        0.0,
    ),
    "sum": (
        {
            "class_path": "dia_lightning.rewards.WeightedSum",
            "init_args": {
                "rewards": [
                    FOOD_CONFIG,
                    {"class_path": "dia_lightning.rewards.Regex", "init_args": {"pattern": "was"}},
                ],
                "weights": [1.0, 0.5],
            },
        },
        1.5,
    ),
    "hinge": (
        {
            "class_path": "dia_lightning.rewards.Hinge",
            "init_args": {"reward": FOOD_CONFIG, "threshold": 1.5},
        },
        -0.5,
    ),
    "product": (
        {
            "class_path": "dia_lightning.rewards.ProductOfExperts",
            "init_args": {"rewards": [FOOD_CONFIG], "floor": 0.1},
        },
        0.0,
    ),
    "length": ({"class_path": "dia_lightning.rewards.Length", "init_args": {"target": 8}}, -0.5),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_every_reward_is_made_from_a_class_path(case: str) -> None:
    config, value = CONFIGS[case]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    reward = parser.instantiate_classes(parser.parse_object({"reward": config})).reward
    assert reward(TEXTS[:1]).tolist() == [value]
