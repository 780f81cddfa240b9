"""What a reward says of its values of unfinished texts, and who hears of it."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from dia_lightning import rewards
from dia_lightning.rewards.base import CachedReward, RewardError, check_reward
from dia_lightning.samplers import Critic, GuidedSamplerModule, RewardOnPrefix, TwistedSMC
from dia_lightning.types import Reward

GOOD, POOR = rewards.VaderSentiment(), rewards.Length(5)


class Plain(Reward):
    """A reward of which nobody has said anything."""

    def __init__(self, name: str = "plain", on_prefix: Any = None) -> None:
        self.name, self.on_prefix = name, on_prefix

    def __call__(self, texts: Sequence[str]) -> list[float]:
        return [float(len(text)) for text in texts]


class Whole(Plain):
    """Raises on a text that does not end."""

    def __call__(self, texts: Sequence[str]) -> list[float]:
        assert all(text.endswith((".", "!", "2")) for text in texts if text)
        return super().__call__(texts)


UNKNOWN = Plain()


def test_shipped_rewards() -> None:
    """Those that compare a whole text with something, count it or need its end say so."""
    poor = {
        "ChrFSimilarity", "Coverage", "EmbeddingSimilarity", "Entailment", "Length", "Perplexity",
        "SlotConsistency", "SlotErrorRate",
    }  # fmt: skip
    good = {"Formality", "Keyword", "LocalToxicity", "Perspective", "VaderSentiment"}
    every = {name: getattr(rewards, name) for name in rewards.__all__ if name[0].isupper()}
    assert {name for name, cls in every.items() if cls.on_prefix is False} == poor
    assert {name for name, cls in every.items() if cls.on_prefix} == good
    assert rewards.FunctionReward(len).on_prefix is None


@pytest.mark.parametrize(
    ("parts", "want"),
    [
        ([GOOD], True), ([POOR], False), ([UNKNOWN], None), ([GOOD, UNKNOWN], None),
        ([GOOD, POOR, UNKNOWN], False),
    ],
    ids=lambda value: "-".join(r.name for r in value) if isinstance(value, list) else str(value),
)  # fmt: skip
def test_a_combination_is_as_its_parts(parts: list[Reward], want: bool | None) -> None:
    assert rewards.WeightedSum(parts).on_prefix is want
    assert rewards.ProductOfExperts(parts).on_prefix is want
    assert rewards.Hinge(rewards.WeightedSum(parts), 0.0).on_prefix is want
    assert CachedReward(rewards.WeightedSum(parts)).on_prefix is want


def test_a_combination_may_know_better() -> None:
    class Ending(rewards.WeightedSum):
        on_prefix = True

    assert Ending([GOOD, POOR]).on_prefix is True


@pytest.mark.parametrize(
    ("reward", "lam", "warned"),
    [
        (POOR, 1.0, True), (rewards.WeightedSum([GOOD, POOR], name="both"), 1.0, True),
        (POOR, 0.0, False), (GOOD, 1.0, False), (UNKNOWN, 1.0, False),
    ],
    ids=["length", "sum", "no λ", "sentiment", "unknown"],
)  # fmt: skip
def test_the_user_is_told_once(
    lm_folder: Any, caplog: pytest.LogCaptureFixture, reward: Reward, lam: float, warned: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        GuidedSamplerModule(reward, TwistedSMC(RewardOnPrefix()), str(lm_folder), lam=lam)
    said = [r.getMessage() for r in caplog.records if "prefix" in r.getMessage()]
    assert len(said) == warned
    assert all(reward.name in line and "\n" not in line for line in said)


def test_a_critic_is_not_warned_of(lm_folder: Any, caplog: pytest.LogCaptureFixture) -> None:
    models = GuidedSamplerModule(POOR, TwistedSMC(), str(lm_folder)).models
    for twist, warned in ((RewardOnPrefix(), True), (Critic(), False)):
        caplog.clear()
        TwistedSMC(twist).check(models)
        assert ("prefix" in caplog.text) == warned


def test_check_reward() -> None:
    for on_prefix in (None, True, False):
        check_reward(Plain(on_prefix=on_prefix))
    for wrong in ("no", 0.5, []):
        with pytest.raises(RewardError, match=r"^reward 'plain': on_prefix = .*, allowed: True"):
            check_reward(Plain(on_prefix=wrong))
    check_reward(Whole())
    check_reward(Whole(on_prefix=False))
    with pytest.raises(RewardError, match="breaks the law 'unfinished texts' on a batch of 12"):
        check_reward(Whole(on_prefix=True))
