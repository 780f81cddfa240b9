"""Every option of guided diffusion reaches the solver: the module's texts are those of the same
sampling in plain loops.

Each case also shows that its option changes the texts, so that a module which ignored it would
fail.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.samplers import (
    DDIM,
    Ancestral,
    CriticGuidance,
    DiaLiteral,
    Diffusion,
    DPMpp2M,
    GuidedSamplerModule,
    PredictorCorrector,
    RewardGradient,
)
from dia_lightning.sampling.decode import draw_texts, source_rows
from dia_lightning.sampling.langevin import Polynomial
from dia_lightning.types import Batch
from tests.wiring.kit import (
    STEPS,
    Vowels,
    agree,
    ancestral_by_hand,
    guided_by_hand,
    prompted,
    seed_of,
)

LAM, SEED = 1.5, 7
SOLVERS = {part.name: part for part in (Ancestral, DDIM, DPMpp2M, PredictorCorrector, DiaLiteral)}
# Options of the solver as the part and as the function calls them.
OF_SOLVER = {"eta": "eta", "steps": "corrector_steps", "reading": "reading"}


def module(
    lm_folder: Path, parts: Path, options: dict[str, Any], solver: str = "ancestral"
) -> GuidedSamplerModule:
    """`options` of `Diffusion` by name, but for λ and those of its solver and of its guidance."""
    rest = {"steps": STEPS, "stagger": 2.0} | options
    guidance = rest.pop("guidance", {})
    if not isinstance(guidance, RewardGradient):
        guidance = CriticGuidance(**guidance)
    made = SOLVERS[solver](**rest.pop("solver", {}))
    lam = rest.pop("lam", LAM)
    denoiser, critic = str(parts / "denoiser"), str(parts / "critic")
    return GuidedSamplerModule(
        Vowels(), Diffusion(made, guidance, **rest), str(lm_folder), denoiser, critic, lam,
        compare_base=False, seed=SEED,
    )  # fmt: skip


def batch(lm: BaseLM) -> Batch:
    return prompted(lm, ["the good", "the", "a", "the bad food"] * 4)


def predictor(made: GuidedSamplerModule, options: dict[str, Any]) -> Any:
    lam, value, network = options.get("lam", LAM), made.value, made.denoiser_network
    log_value = None if value is None or not lam else lambda z, t: lam * value(z, t)
    given = {"temperature": options.get("temperature", 1.0), **options.get("guidance", {})}
    return guided_by_hand(network, made.embedding, log_value, **given)


def ancestral(made: GuidedSamplerModule, given: Batch, options: dict[str, Any]) -> Tensor:
    kept = {name: x for name, x in options.items() if name in ("steps", "stagger", "final")}
    return ancestral_by_hand(
        predictor(made, options),
        made.denoiser_network,
        made.embedding,
        given,
        made.lm.end_id,
        seed_of(SEED, given.index),
        **kept,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": {"scale": 4.0}}, {"guidance": {"scale": 0.2}}, {"guidance": {"decay": 2.0}},
        {"guidance": {"decay": 0.7}}, {"guidance": {"cap": 0.5}},
        {"guidance": {"window": (0.0, 0.4)}}, {"guidance": {"window": (0.8, 1.0)}},
        {"temperature": 0.4}, {"temperature": 2.0}, {"final": "argmax"},
        {"steps": 9}, {"stagger": 0.0}, {"lam": 0.0}, {"lam": 5.0},
        {
            "guidance": {"scale": 2.0, "decay": 1.0, "window": (0.1, 0.8)},
            "temperature": 0.7, "final": "argmax",
        },
    ],
    ids=str,
)  # fmt: skip
def test_guidance_of_the_ancestral_solver(
    lm_folder: Path, parts: Path, lm: BaseLM, options: dict[str, Any]
) -> None:
    given, made = batch(lm), module(lm_folder, parts, options)
    (generations,) = made.predict_step(given)
    plain = ancestral(module(lm_folder, parts, {}), given, {})
    assert agree(generations.tokens, ancestral(made, given, options), given) > 0.95
    assert agree(generations.tokens, plain, given) < 0.8


def drawn(made: GuidedSamplerModule, given: Batch, solver: str, options: dict[str, Any]) -> Tensor:
    """The solver as a function, with the estimate of the plain loop."""
    network = made.denoiser_network
    assert network is not None
    own = options.get("solver", {})
    kept = {OF_SOLVER[name]: x for name, x in own.items() if name in OF_SOLVER}
    if own.get("accept"):
        kept["corrector"] = "mala"
    if "eta_decay" in own:
        kept["eta"] = Polynomial(kept.get("eta", 0.1), gamma=own["eta_decay"])
    if "strength" in options:
        kept |= {"begin": source_rows(made.lm, given), "strength": options["strength"]}
    return draw_texts(
        predictor(made, options), given, made.embedding, network.schedule, made.lm.end_id,
        seed_of(SEED, given.index), solver, STEPS, 2.0, **kept,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("ancestral", {"strength": 0.6}), ("ddim", {"solver": {"eta": 0.9}}),
        ("ddim", {"solver": {"eta": 0.1}}), ("dpmpp_2m", {"guidance": {"scale": 4.0}}),
        ("dia", {"solver": {"eta": 0.5}}), ("dia", {"solver": {"eta_decay": 0.9}}),
        ("dia", {"solver": {"steps": 3}}), ("dia", {"solver": {"accept": True}}),
        (
            "dia",
            {"solver": {"eta": 0.8, "accept": True, "steps": 2}, "guidance": {"decay": 1.0}},
        ),
        ("dia_literal", {"solver": {"eta": 0.5}}),
        ("dia_literal", {"solver": {"reading": "per_step"}}),
    ],
    ids=str,
)  # fmt: skip
def test_options_of_the_other_solvers(
    lm_folder: Path, parts: Path, lm: BaseLM, solver: str, options: dict[str, Any]
) -> None:
    given, made = batch(lm), module(lm_folder, parts, options, solver)
    (generations,) = made.predict_step(given)
    assert agree(generations.tokens, drawn(made, given, solver, options), given) > 0.95
    assert agree(generations.tokens, drawn(made, given, solver, {}), given) < 0.8


@pytest.mark.parametrize("straight", [False, True])
def test_the_reward_itself_guides(lm_folder: Path, parts: Path, lm: BaseLM, straight: bool) -> None:
    """λ r of the denoiser's tokens, soft or the likeliest with the gradient of the soft ones, in
    the critic's place.
    """
    given = batch(lm)
    made = module(lm_folder, parts, {"guidance": RewardGradient(straight_through=straight)})
    assert made.value is None
    network, embedding = made.denoiser_network, made.embedding

    def log_value(straight: bool) -> Any:
        def value(z: Tensor, t: Tensor) -> Tensor:
            assert network is not None
            soft = network(z, t).masked_fill(~embedding.decodable, -torch.inf).softmax(-1)
            if straight:
                soft = torch.eye(soft.shape[-1])[soft.argmax(-1)] + soft - soft.detach()
            settled = torch.eye(soft.shape[-1])[embedding.decode(z)]
            return LAM * Vowels().soft(torch.where((t > 0)[..., None], soft, settled))

        return value

    def by_hand(straight: bool) -> Tensor:
        predict = guided_by_hand(network, embedding, log_value(straight))
        return ancestral_by_hand(
            predict, network, embedding, given, made.lm.end_id, seed_of(SEED, given.index)
        )

    (generations,) = made.predict_step(given)
    assert agree(generations.tokens, by_hand(straight), given) > 0.95
    assert agree(generations.tokens, by_hand(not straight), given) < 0.8
