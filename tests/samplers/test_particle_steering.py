"""ParticleSteering on a small random denoiser and critic: log Z against plain sampling,
populations, calls, errors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dia_lightning.data.prompts import prompt_rows
from dia_lightning.diffusion.checkpoint import save_network
from dia_lightning.diffusion.critic import CriticNetwork
from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.errors import UserError
from dia_lightning.guidance import unguided
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.samplers import CriticGuidance, GuidedSamplerModule, ParticleSteering, Unguided
from dia_lightning.sampling.decode import draw_texts
from dia_lightning.types import Batch, Reward, text_mask

SIZE, T, STEPS = NetworkSize(width=16, layers=1, heads=2, max_length=8), 6, 5
HALF = CriticGuidance(scale=0.5)


class ShareOfVowels(Reward):
    """The share of vowels among the characters, times 10."""

    name = "vowels"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor(
            [10 * sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts]
        )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, lm: BaseLM, embedding: TokenEmbedding) -> Path:
    """A denoiser and an `mse` critic with random weights, as checkpoints."""
    folder, schedule = tmp_path_factory.mktemp("parts"), make_schedule("cosine")
    torch.manual_seed(1)
    denoiser, critic = (
        DenoiserNetwork(embedding, schedule, SIZE),
        CriticNetwork(embedding.dim, schedule, SIZE),
    )
    torch.nn.init.normal_(denoiser.head.weight, std=0.3)
    settings = {
        "schema": 1,
        "base_lm": "base",
        "embedding": embedding.fingerprint(),
        "schedule": "cosine",
    }
    settings |= {
        "size": SIZE.as_dict(),
        "tied_head": False,
        "objective": "mse",
        "lam": 1.0,
        "reward": "vowels",
    }
    save_network(denoiser, settings | {"kind": "denoiser"}, folder / "denoiser")
    save_network(critic, settings | {"kind": "critic"}, folder / "critic")
    save_network(
        critic, settings | {"kind": "critic", "objective": "soft", "lam": 0.7}, folder / "soft"
    )
    return folder


def module(
    lm_folder: Path, parts: Path, steering: dict[str, Any] | None = None, **options: Any
) -> GuidedSamplerModule:
    """`steering` has the settings of the sampler but for its steps."""
    files = {"base_lm": str(lm_folder)}
    files |= {name: str(parts / name) for name in ("denoiser", "critic")}
    given = {**files, "lam": 0.7, "compare_base": False} | options
    sampler = ParticleSteering(steps=STEPS, **(steering or {}))
    return GuidedSamplerModule(ShareOfVowels(), sampler, **given)


def batch(lm: BaseLM, prompts: list[str]) -> Batch:
    tokens, mask = prompt_rows(lm, prompts, T)
    return Batch(0, list(range(len(prompts))), prompts, tokens, mask)


@pytest.mark.parametrize(
    ("critic", "steering"),
    [
        ("critic", {"potential": "das", "guidance": HALF, "stagger": 2.0}),
        ("critic", {"potential": "max", "guidance": Unguided(), "every": 2}),
        ("soft", {"potential": "difference", "guidance": HALF, "resampling": "stratified"}),
    ],
    ids=["das", "max", "difference"],
)
def test_log_z_against_plain_sampling(
    lm_folder: Path, parts: Path, lm: BaseLM, critic: str, steering: dict[str, Any]
) -> None:
    """log E[exp(λ r)] over 2000 texts of `ancestral`, and of 8 populations of 100: within 4
    joint standard errors.
    """
    smc = module(lm_folder, parts, {**steering, "particles": 100}, critic=str(parts / critic))
    assert isinstance(smc.sampler, ParticleSteering)
    assert smc.denoiser_network is not None
    network, many = smc.denoiser_network, batch(lm, ["the"] * 2000)
    tokens = draw_texts(
        unguided(network, smc.embedding), many, smc.embedding, network.schedule, lm.end_id,
        torch.Generator().manual_seed(1), "ancestral", STEPS, smc.sampler.stagger,
    )  # fmt: skip
    weights = (
        0.7
        * ShareOfVowels()(
            [x.strip() for x in lm.decode(tokens, many.prompt_mask, with_prompt=True)]
        )
    ).exp()
    generator = torch.Generator().manual_seed(2)
    drawn = [smc.draw(batch(lm, ["the"]), generator).diagnostics for _ in range(8)]
    z = torch.stack([x["log_z"][0] for x in drawn if x is not None]).exp() / weights.mean()
    error = (
        float(z.var()) / len(z) + float(weights.var() / weights.mean() ** 2) / len(weights)
    ) ** 0.5
    assert error < 0.1
    assert abs(float(z.mean()) - 1) < 4 * error
    assert (
        float(weights.mean()) / float(weights.log().mean().exp()) > 1.1
    )  # else a constant weight would pass


def test_populations_prompts_and_calls(lm_folder: Path, parts: Path, lm: BaseLM) -> None:
    smc = module(lm_folder, parts, {"particles": 3, "guidance": CriticGuidance(), "every": 2})
    calls = {"denoiser": 0, "critic": 0}

    def count(name: str) -> Any:
        def hook(network: object, inputs: tuple[Tensor, ...]) -> None:
            calls[name] += len(inputs[0])

        return hook

    assert smc.denoiser_network is not None
    smc.denoiser_network.trunk.register_forward_pre_hook(count("denoiser"))
    assert smc.value is not None
    smc.value.critic.trunk.register_forward_pre_hook(count("critic"))
    prompts = ["the good", "the bad", "the good", "the bad"]
    given = batch(lm, prompts)
    (generations,) = smc.predict_step(given)
    tokens = generations.tokens
    assert torch.equal(tokens[given.prompt_mask], given.tokens[given.prompt_mask])
    assert bool((tokens[~text_mask(tokens, given.prompt_mask, lm.end_id)] == lm.end_id).all())
    assert {name: generations.costs[name].calls for name in calls} == calls
    assert generations.costs["reward"].calls == 4 * 3
    assert set(generations.diagnostics) == {"log_z", "ess", "roots", "resampled"}
    log_z = generations.diagnostics["log_z"]
    assert log_z[0] == log_z[2] != log_z[1]
    assert log_z[1] == log_z[3]
    assert bool(
        ((generations.diagnostics["ess"] >= 1 / 6) & (generations.diagnostics["ess"] <= 1)).all()
    )
    (again,) = smc.predict_step(given)
    assert torch.equal(again.tokens, tokens)


def test_texts_have_more_reward_with_lambda_and_need_no_critic_without(
    lm_folder: Path, parts: Path, lm: BaseLM
) -> None:
    """100 texts each; 4 standard errors of the difference are 0.57 standard deviations of a
    text.
    """
    rewards = {}
    for lam in (0.0, 2.0):
        smc = module(lm_folder, parts, lam=lam, critic=str(parts / "critic") if lam else None)
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
    lm_folder: Path, parts: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        module(lm_folder, parts, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"potential": "best"}, "^potential: best given, allowed: difference, max, sum, das"),
        (
            {"resampling": "none"},
            "^resampling: none given, allowed: systematic, stratified, multinomial",
        ),
        ({"ess": 2.0}, "^ess: 2.0 given"),
        ({"particles": 0}, "^particles: 0 given, allowed: 1 or more"),
        ({"temperature": 0.0}, "^temperature: 0.0 given, allowed: above 0"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ParticleSteering(**options)


def test_a_soft_critic_is_for_one_lambda(lm_folder: Path, parts: Path) -> None:
    with pytest.raises(
        UserError, match=r"lam: 1.5 given, allowed: 0.7, for which the soft critic .* was trained"
    ):
        module(lm_folder, parts, critic=str(parts / "soft"), lam=1.5)
