"""`check_sampler` on right and wrong samplers."""

from dataclasses import dataclass

import pytest
import torch

from dia_lightning.errors import UserError
from dia_lightning.rewards import check_reward as of_rewards
from dia_lightning.samplers import (
    Annealed,
    BaseModel,
    BestOfN,
    Chains,
    Diffusion,
    Drawn,
    Models,
    Sampler,
    Suffix,
)
from dia_lightning.testing import (
    TableLM,
    TableReward,
    check_reward,
    check_sampler,
    exact_law,
    table_lm,
)
from dia_lightning.testing.sampler import SamplerError
from dia_lightning.types import Batch


@dataclass(frozen=True)
class Exact(Sampler):
    """Looks π up; the fields break it."""

    lam_factor: float = 1.0
    fault: str = ""
    name = "exact"

    def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
        lm, reward = models.lm, models.reward
        assert isinstance(lm, TableLM)
        tokens = batch.tokens.clone()
        for prompt in set(batch.prompts):
            rows = torch.tensor([other == prompt for other in batch.prompts])
            known = "" if self.fault == "forgets prompts" else prompt
            law = exact_law(lm, reward, self.lam_factor * models.lam, known)
            source = generator
            if self.fault == "own randomness":
                source = torch.default_generator
            tokens[rows] = law.draw(int(rows.sum()), source)
        if self.fault == "other rows":
            tokens = tokens.roll(1, 0)
        if self.fault == "goes on after its end":
            tokens[:, -1] = 0
        if self.fault == "one text too often":
            often = torch.rand(len(tokens), generator=generator) < 0.05
            given = ~batch.prompt_mask[:, 0] & often
            tokens[given] = torch.tensor([0, 1, 0, 1])
        return Drawn(tokens)


@pytest.mark.parametrize(
    "sampler",
    [Exact(), Chains(rounds=40), Annealed([Suffix()], particles=15)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_right_samplers_pass(sampler: Sampler) -> None:
    check_sampler(sampler)


def test_lam_0_is_the_base_model() -> None:
    check_sampler(BaseModel(), lam=0.0)
    check_sampler(BestOfN(1), lam=0.0, prompts=["ab"], lm=table_lm(3, 3, seed=4))


@pytest.mark.parametrize(
    ("sampler", "law"),
    [
        (BaseModel(), "target"),
        (BaseModel(temperature=0.8), "target"),
        (BestOfN(3), "target"),
        (Exact(lam_factor=0.8), "target"),
        (Exact(lam_factor=-1.0), "target"),
        (Exact(fault="one text too often"), "target', prompt '', λ = 1.5: of 2000 texts 'abab'"),
        (Exact(fault="own randomness"), "same seed, same texts"),
        (Exact(fault="forgets prompts"), "prompts stay"),
        (Exact(fault="other rows"), "prompts stay"),
        (Exact(fault="goes on after its end"), "no text of this prompt in canonical form"),
    ],
    ids=str,
)
def test_wrong_samplers_are_named(sampler: Sampler, law: str) -> None:
    with pytest.raises(SamplerError, match=law):
        check_sampler(sampler)


def test_the_base_model_is_no_sampler_of_another_lam() -> None:
    """At λ = 0 p_θ is right, sharpened it is not."""
    with pytest.raises(SamplerError, match="target"):
        check_sampler(BaseModel(top_k=2), lam=0.0)


def test_arguments_reach_the_run() -> None:
    """Another model and another reward; a seed; a missing network, and too few texts."""
    lm = table_lm(3, 3, seed=7)
    check_sampler(Exact(), lm=lm, reward=TableReward(lm, seed=1), seed=5, prompts=["", "c", "ab"])
    with pytest.raises(UserError, match="denoiser: none given"):
        check_sampler(Diffusion())
    with pytest.raises(ValueError, match="n: 50 given, allowed: 100 or more"):
        check_sampler(Exact(), n=50)
    asked: list[float] = []

    @dataclass(frozen=True)
    class Spy(Exact):
        def draw(self, models: Models, batch: Batch, generator: torch.Generator) -> Drawn:
            asked.extend([models.lam, generator.initial_seed()])
            return super().draw(models, batch, generator)

    check_sampler(Spy(), lam=0.3, seed=2)
    assert asked == [0.3, 2 * 1_000_003] * 3


def test_check_reward_is_that_of_rewards() -> None:
    assert check_reward is of_rewards
    lm = table_lm()
    check_reward(TableReward(lm), lm.texts())
