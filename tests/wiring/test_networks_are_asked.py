"""What networks are asked: with the earlier estimate, at warped times, as often as `every` says,
in the reward's units.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dia_lightning.diffusion.labels import RewardLabels
from dia_lightning.diffusion.loss import Noised
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.samplers import (
    DDIM,
    Ancestral,
    Annealed,
    Chains,
    ClassifierFree,
    Critic,
    CriticGuidance,
    DenoiseAccept,
    DiaLiteral,
    Diffusion,
    DPMpp2M,
    GuidedSamplerModule,
    ParticleSteering,
    PredictorCorrector,
    Sampler,
    Solver,
    TwistedSMC,
    Unguided,
)
from dia_lightning.sampling.positions import Spans
from dia_lightning.training import DenoiserModule, Network
from tests.wiring.kit import (
    LENGTH,
    SOFT_LAM,
    STEPS,
    Vowels,
    agree,
    ancestral_by_hand,
    guided_by_hand,
    prompted,
    randomise,
    seed_of,
    warped,
)

PROMPTS = ["the good", "the", "a", "the bad food"] * 3


def files(lm_folder: Path, parts: Path, critic: str = "critic") -> dict[str, Any]:
    made = {
        "base_lm": str(lm_folder),
        "denoiser": str(parts / "denoiser"),
        "critic": str(parts / critic),
    }
    return made | {"compare_base": False}


def guided(
    lm_folder: Path, parts: Path, sampler: Sampler, lam: float = 1.0, critic: str = "critic"
) -> GuidedSamplerModule:
    return GuidedSamplerModule(Vowels(), sampler, **files(lm_folder, parts, critic), lam=lam)


def diffusion(solver: Solver, **options: Any) -> Diffusion:
    return Diffusion(solver, **({"steps": STEPS, "stagger": 2.0} | options))


class Asked:
    """Inputs and outputs of every call of a network."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.calls: list[tuple[tuple[Any, ...], Any]] = []
        network.register_forward_hook(lambda network, given, out: self.calls.append((given, out)))

    @property
    def times(self) -> list[Tensor]:
        return [given[1] for given, _ in self.calls]


# Self-conditioning.


def test_the_denoiser_is_conditioned_on_its_earlier_estimate(
    lm_folder: Path, parts: Path, lm: BaseLM
) -> None:
    """The module's texts are those of a loop that feeds ẑ_0 back, not those of one that does
    not.
    """
    given = prompted(lm, PROMPTS)
    made = guided(lm_folder, parts, diffusion(Ancestral()), lam=0.0)
    (generations,) = made.predict_step(given)
    network = made.denoiser_network
    with_it, without = (
        ancestral_by_hand(
            guided_by_hand(network, made.embedding, None, self_conditioned=told), network,
            made.embedding, given, lm.end_id, seed_of(0, given.index),
        )
        for told in (True, False)
    )  # fmt: skip
    assert agree(generations.tokens, with_it, given) > 0.95
    assert agree(generations.tokens, without, given) < 0.8


MALA = PredictorCorrector(accept=True)


@pytest.mark.parametrize(
    "sampler",
    [
        *(
            diffusion(solver)
            for solver in (
                Ancestral(),
                DDIM(0.1),
                DPMpp2M(),
                PredictorCorrector(),
                MALA,
                DiaLiteral(),
            )
        ),
        ParticleSteering(particles=1, steps=STEPS, stagger=2.0),
        diffusion(Ancestral(), guidance=ClassifierFree()),
    ],
    ids=[
        "ancestral",
        "ddim",
        "dpmpp_2m",
        "dia",
        "dia mala",
        "dia_literal",
        "smc",
        "classifier_free",
    ],
)
def test_every_sampler_feeds_the_estimate_back(
    lm_folder: Path, parts: Path, lm: BaseLM, sampler: Sampler, tmp_path: Path
) -> None:
    """A network is given Σ_v p(v) E(v) of its own logits of the call before, guided or not."""
    given = prompted(lm, PROMPTS)
    if "labels" in sampler.needs(1.0):
        denoiser = labelled(lm_folder, tmp_path)
        made = GuidedSamplerModule(Vowels(), sampler, str(lm_folder), denoiser, compare_base=False)
    else:
        made = guided(lm_folder, parts, sampler)
    mala = isinstance(sampler, Diffusion) and sampler.solver == MALA
    asked = Asked(made.denoiser_network)
    made.predict_step(given)
    assert len(asked.calls) >= STEPS
    assert asked.calls[0][0][2] is None
    told = 0
    for (_, before), ((z, _, z0_prev), _) in zip(asked.calls, asked.calls[1:], strict=False):
        logits = before.masked_fill(~made.embedding.decodable, -torch.inf)
        expected = logits.softmax(-1) @ made.embedding.weight
        if mala:  # a rejected step keeps the estimate that it has
            told += int(((z0_prev - expected).abs().amax((1, 2)) < 1e-4).sum())
            continue
        torch.testing.assert_close(z0_prev, expected[: len(z0_prev)], atol=1e-4, rtol=1e-4)
        told += len(z)
    assert told > len(given.ids) * (STEPS - 1) / 2


def labelled(lm_folder: Path, folder: Path) -> str:
    training = DenoiserModule(
        str(lm_folder),
        Network(16, 1, 2, LENGTH),
        init_from="random",
        labels=RewardLabels(Vowels(), [2.0, 4.0]),
    )
    randomise(training.network, 0.3)
    training.export(folder / "labelled")
    return str(folder / "labelled")


def test_self_conditioning_in_training(lm_folder: Path, lm: BaseLM) -> None:
    """The loss with an estimate is the cross-entropy of the network given its own ẑ_0, and
    another one without.
    """
    module = DenoiserModule(
        str(lm_folder),
        Network(16, 1, 2, LENGTH),
        init_from="random",
    )
    torch.manual_seed(2)
    randomise(module.network, 0.3)
    tokens = prompted(lm, PROMPTS).tokens
    t = torch.rand(tokens.shape)
    noised = Noised(torch.randn(*tokens.shape, module.embedding.dim), t, t > 0.3)
    for estimated in (True, False):
        before = (
            module.network(noised.z, t).softmax(-1) @ module.embedding.weight if estimated else None
        )
        log_p = (
            module.network(noised.z, t, before).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        )
        want = -log_p[noised.noised].sum()
        other = module.losses(tokens, noised, not estimated).total
        torch.testing.assert_close(
            module.losses(tokens, noised, estimated).total, want, rtol=1e-4, atol=1e-3
        )
        assert abs(float((other - want).detach())) > 0.1


# Levels are in u; networks are asked at t(u).


@pytest.mark.parametrize("sampler", [Annealed, Chains])
@pytest.mark.parametrize("levels", [[0.5], [0.2, 0.9]])
@pytest.mark.parametrize("tilt", [0.0, 1.0])
def test_levels_of_moves(
    lm_folder: Path,
    parts: Path,
    lm: BaseLM,
    sampler: type[Annealed | Chains],
    levels: list[float],
    tilt: float,
) -> None:
    """Denoiser (all but clean positions) at exactly the warped levels, the critic of the tilt at
    its own.
    """
    move = DenoiseAccept(Spans(2), rounds=2, levels=levels, tilt=tilt, tilt_level=0.3)
    made = guided(lm_folder, parts, sampler(moves=[move], rounds=6))
    assert made.denoiser_network is not None
    asked = Asked(made.denoiser_network.trunk)
    critic = None if made.value is None else Asked(made.value.critic)
    made.predict_step(prompted(lm, PROMPTS))
    times = torch.cat([t.flatten() for t in asked.times]).unique()
    torch.testing.assert_close(times, torch.tensor([0.0, *warped(torch.tensor(levels)).tolist()]))
    assert (critic is not None) == (tilt > 0)
    if critic is not None:
        seen = torch.cat([t.flatten() for t in critic.times]).unique()
        torch.testing.assert_close(seen, torch.tensor([0.0, float(warped(0.3))]))


def test_strength_and_window_are_levels_too(lm_folder: Path, parts: Path, lm: BaseLM) -> None:
    """A start at u = 0.6 is noised to t(0.6), and with a window from 0.6 to 1 only the first
    step is guided.
    """
    guidance = CriticGuidance(scale=5.0, window=(0.59, 1.0))
    sampler = diffusion(Ancestral(), guidance=guidance, strength=0.6, stagger=0.0)
    made = guided(lm_folder, parts, sampler)
    assert made.denoiser_network is not None
    predict, seen = guidance.predictor(made.models, sampler.temperature), []
    asked = Asked(made.denoiser_network)
    made.predict_step(prompted(lm, PROMPTS))
    torch.testing.assert_close(asked.times[0].max(), warped(0.6))
    z = torch.randn(2, LENGTH, made.embedding.dim)
    for u in (0.58, 0.6):
        prediction = predict(z, warped(u).expand(2, LENGTH), None)
        seen.append(bool((prediction.z0 != prediction.z0_network).any()))
    assert seen == [False, True]


# Weighings.


@pytest.mark.parametrize(
    "prompts", [["a"] * 3, ["the good", "a", "the bad food"]], ids=["one prompt", "three"]
)
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_twisted_smc_weighs_every_so_many_tokens(
    lm_folder: Path, parts: Path, lm: BaseLM, prompts: list[str], every: int
) -> None:
    """The critic is asked about texts of p + every, p + 2 every, … tokens, p those of the
    shortest prompt, and of no others.
    """
    given = prompted(lm, prompts)
    made = guided(lm_folder, parts, TwistedSMC(Critic(), particles=8, every=every, ess=1.0))
    assert made.value is not None
    asked = Asked(made.value.critic)
    (generations,) = made.predict_step(given)
    first = int(given.prompt_mask.sum(1).min())
    want = list(range(first + every, LENGTH, every))
    # Longer prompts are settled from the start: the row with the fewest settled tokens tells the
    # place.
    assert [int((t == 0).sum(1).min()) for t in asked.times] == want
    assert float(generations.diagnostics["resampled"].max()) == len(want)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_smc_weighs_every_so_many_steps(
    lm_folder: Path, parts: Path, lm: BaseLM, every: int
) -> None:
    """Unguided, so that all that the critic is asked is for the weights; the last step has the
    reward itself.
    """
    sampler = ParticleSteering(Unguided(), particles=2, every=every, steps=STEPS, stagger=2.0)
    made = guided(lm_folder, parts, sampler)
    assert made.value is not None
    asked = Asked(made.value.critic)
    made.predict_step(prompted(lm, PROMPTS))
    assert len(asked.calls) == (STEPS - 1) // every


# A soft critic has learnt λ h.


@pytest.mark.parametrize("critic", ["critic", "soft"])
def test_the_unit_of_the_critic(lm_folder: Path, parts: Path, lm: BaseLM, critic: str) -> None:
    """Guidance climbs λ times an `mse` critic, and a `soft` one as it is."""
    given = prompted(lm, PROMPTS)
    made = guided(lm_folder, parts, diffusion(Ancestral()), SOFT_LAM, critic)
    network, value = made.denoiser_network, made.value
    assert value is not None
    (generations,) = made.predict_step(given)

    def by_hand(factor: float) -> Tensor:
        predict = guided_by_hand(network, made.embedding, lambda z, t: factor * value.critic(z, t))
        return ancestral_by_hand(
            predict, network, made.embedding, given, lm.end_id, seed_of(0, given.index)
        )

    right, wrong = (SOFT_LAM, 1.0) if critic == "critic" else (1.0, SOFT_LAM)
    assert agree(generations.tokens, by_hand(right), given) > 0.95
    assert agree(generations.tokens, by_hand(wrong), given) < 0.8
