"""Twisted SMC: unbiased on an enumerable table, whatever the twist, and the module with a critic
on a small random model.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dia_lightning.data.prompts import prompt_rows
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.samplers import Critic, GuidedSamplerModule, TwistedSMC
from dia_lightning.samplers.twisted_smc import Twist, TwistedParticles, twisted_smc
from dia_lightning.types import Batch, text_mask
from tests.oracles.table_lm import REWARD, codes, pi
from tests.oracles.table_model import P, TableValue, chi_square_ok, free, soft_values, table_lm
from tests.samplers.test_particle_steering import ShareOfVowels, batch

LAM = 0.8
EXACT, PI, Z = soft_values(LAM), pi(LAM), float((P * np.exp(LAM * REWARD)).sum())
_NOISE = np.random.default_rng(5).normal(size=len(EXACT))
THREE = TwistedSMC(Critic(), particles=3)
POOR = {prefix: float(x) for prefix, x in zip(EXACT, _NOISE, strict=True)}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reward(tokens: Tensor, rows: Tensor) -> Tensor:
    return torch.from_numpy(REWARD[codes(tokens)])


def populations(
    values: dict[tuple[int, ...], float] | None,
    n_groups: int,
    size: int,
    lam: float = LAM,
    **options: Any,
) -> TwistedParticles:
    given = free(n_groups * size)
    twist = Twist(None if values is None else TableValue(values), reward, lam, **options)
    return twisted_smc(table_lm(), given.tokens, given.prompt_mask, n_groups, twist, seeded(1))


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (POOR, {"ess": 0.7}), (POOR, {"ess": 1.0, "every": 2, "resampling": "multinomial"}),
        (EXACT, {"ess": 0.7}), (None, {}),
    ],
    ids=["poor", "poor, every 2", "exact", "none"],
)  # fmt: skip
def test_unbiased(values: dict[tuple[int, ...], float] | None, options: dict[str, Any]) -> None:
    """Ẑ, and Ẑ times the weight of each text of π(x) > 0.01, over 400 populations of 8: within 4.5
    standard errors.

    That is a false-alarm rate of 7e-6 for each of at most 20 figures.
    """
    done = populations(values, 400, 8, **options)
    z = done.log_z.exp() / Z
    assert abs(float(z.mean()) - 1) < 4 * float(z.std()) / 400**0.5
    assert float(z.std()) / 400**0.5 < 0.05
    place = torch.from_numpy(codes(done.writing.text())).view(400, 8)
    for x in np.flatnonzero(PI > 0.01):
        share = z * (done.log_w.softmax(1) * (place == x)).sum(1)
        assert abs(float(share.mean()) - PI[x]) < 4.5 * float(share.std()) / 400**0.5, x
    assert bool((done.resampled > 0).any()) == (values is not None)


def test_a_better_twist_has_less_variance() -> None:
    """Standard deviations of Ẑ at λ = 1.5 over 400 populations, known to about 7 %, are less
    with the exact twist.
    """
    values = (soft_values(1.5), None, POOR)
    exact, none, poor = (float((populations(v, 400, 8, 1.5).log_z.exp()).std()) for v in values)
    assert exact < 0.85 * min(none, poor)


def test_roots_and_weights_after_resampling() -> None:
    """Particles that share a root share its first token; two of one text have one weight where
    all were weighed together.
    """
    done = populations(EXACT, 50, 8, ess=1.0)
    first = done.writing.text()[:, 0].view(50, 8)
    for roots, tokens in zip(done.roots, first, strict=True):
        assert all(len(set(tokens[roots == root].tolist())) == 1 for root in roots.tolist())
    assert bool((done.roots.sort(1).values.diff(dim=1) == 0).any())


def test_one_particle_is_the_base_model() -> None:
    """The same tokens as `generate`, weighed by exp(λ r) in the end; χ² of 4000 texts at
    false-alarm rate 10⁻³.
    """
    given = free(4000)
    twist = Twist(TableValue(POOR), reward, LAM)
    done = twisted_smc(table_lm(), given.tokens, given.prompt_mask, 4000, twist, seeded(2))
    tokens = done.writing.text()
    assert torch.equal(tokens, table_lm().generate(given.tokens, given.prompt_mask, seeded(2)))
    assert chi_square_ok(tokens, P)
    torch.testing.assert_close(done.log_z, LAM * reward(tokens, torch.arange(4000)))


def module(
    lm_folder: Path, critic_folder: Path, sampler: TwistedSMC = THREE, **options: Any
) -> GuidedSamplerModule:
    files = {"base_lm": str(lm_folder), "critic": str(critic_folder / "mse")}
    given = {**files, "lam": 0.7, "compare_base": False} | options
    return GuidedSamplerModule(ShareOfVowels(), sampler, **given)


def test_populations_prompts_and_calls(lm_folder: Path, critic_folder: Path, lm: BaseLM) -> None:
    smc = module(lm_folder, critic_folder, TwistedSMC(Critic(), particles=3, every=2, ess=0.99))
    assert smc.value is not None
    calls = []
    smc.value.critic.trunk.register_forward_pre_hook(
        lambda network, inputs: calls.append(len(inputs[0]))
    )
    given = batch(lm, ["the good", "the", "the good", "the"])
    (generations,) = smc.predict_step(given)
    tokens = generations.tokens
    assert torch.equal(tokens[given.prompt_mask], given.tokens[given.prompt_mask])
    assert bool((tokens[~text_mask(tokens, given.prompt_mask, lm.end_id)] == lm.end_id).all())
    assert sum(calls) > 0
    assert generations.costs["critic"].calls == sum(calls)
    assert generations.costs["base_lm"].calls == 4 * 3 * 6
    assert generations.costs["reward"].calls >= 4 * 3
    assert set(generations.diagnostics) == {"log_z", "ess", "roots", "resampled"}
    log_z = generations.diagnostics["log_z"]
    assert log_z[0] == log_z[2] != log_z[1]
    assert log_z[1] == log_z[3]
    (again,) = smc.predict_step(given)
    assert torch.equal(again.tokens, tokens)


def test_log_z_of_the_module_against_plain_sampling(
    lm_folder: Path, critic_folder: Path, lm: BaseLM
) -> None:
    """log E[exp(λ r)] over 2000 texts of p_θ, and over 20 populations of 50: within 4 joint
    standard errors.
    """
    many = batch(lm, ["the"] * 2000)
    tokens = lm.generate(many.tokens, many.prompt_mask, seeded(1))
    weights = (
        0.7
        * ShareOfVowels()(
            [x.strip() for x in lm.decode(tokens, many.prompt_mask, with_prompt=True)]
        )
    ).exp()
    sampler = TwistedSMC(Critic(), particles=50, every=1, ess=0.9)
    smc, generator = module(lm_folder, critic_folder, sampler), seeded(2)
    drawn = [smc.draw(batch(lm, ["the"]), generator).diagnostics for _ in range(20)]
    z = torch.stack([x["log_z"][0] for x in drawn if x is not None]).exp() / weights.mean()
    error = (
        float(z.var()) / len(z) + float(weights.var() / weights.mean() ** 2) / len(weights)
    ) ** 0.5
    assert error < 0.1
    assert abs(float(z.mean()) - 1) < 4 * error
    assert (
        float(weights.mean()) / float(weights.log().mean().exp()) > 1.1
    )  # else a constant weight would pass
    assert sum(float(x["resampled"][0]) for x in drawn if x is not None) > 0


def test_texts_have_more_reward_with_lambda_and_need_no_critic_without(
    lm_folder: Path, critic_folder: Path, lm: BaseLM
) -> None:
    """100 texts each; 4 standard errors of the difference are 0.57 standard deviations of a
    text.
    """
    rewards = {}
    for lam in (0.0, 2.0):
        smc = module(
            lm_folder, critic_folder, lam=lam, critic=str(critic_folder / "mse") if lam else None
        )
        (generations,) = smc.predict_step(batch(lm, ["the"] * 100))
        rewards[lam] = generations.reward
        assert ("critic" in generations.costs) == (lam > 0)
    assert float(rewards[2.0].mean()) > float(rewards[0.0].mean()) + 0.57 * float(
        rewards[0.0].std()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "^lam: -1.0 given, allowed: 0 or more"),
        ({"critic": None}, "^critic: none given"),
    ],
)
def test_options_are_checked(
    lm_folder: Path, critic_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        module(lm_folder, critic_folder, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 0}, "^particles: 0 given, allowed: 1 or more"),
        ({"every": 0}, "^every: 0 given, allowed: 1 or more, or word"),
        ({"ess": 2.0}, "^ess: 2.0 given"),
        (
            {"resampling": "none"},
            "^resampling: none given, allowed: systematic, stratified, multinomial",
        ),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TwistedSMC(**options)


def test_blanks_are_refused(lm_folder: Path, critic_folder: Path, lm: BaseLM) -> None:
    prompts = ["the[blank:2] pub"]
    given = Batch(0, [0], prompts, *prompt_rows(lm, prompts, 8))
    with pytest.raises(
        UserError, match="blanks or a length given, but TwistedSMC writes from left to right"
    ):
        module(lm_folder, critic_folder).draw(given, torch.Generator())
