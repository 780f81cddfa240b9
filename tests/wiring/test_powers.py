"""The power target p_θ^α exp(λ r): exact samplers against its listed law, with their log Z; all
others refuse it in one line.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dia_lightning as dia
from dia_lightning import cli
from dia_lightning.errors import UserError
from dia_lightning.samplers import (
    Annealed,
    BaseModel,
    BestOfN,
    Chains,
    DenoiseAccept,
    Diffusion,
    GuidedDecoding,
    GuidedSamplerModule,
    Move,
    ParticleGibbs,
    ParticleSteering,
    Sampler,
    Source,
    Spans,
    Suffix,
    TwistedSMC,
    Window,
)
from dia_lightning.settings import parser
from dia_lightning.testing import TableReward, exact_law, table_lm
from dia_lightning.testing.law import Law, misfit
from tests.conftest import Run
from tests.test_cli import assert_one_line

LM = table_lm()  # 31 texts of two letters, up to four
REWARD = TableReward(LM)
FALSE_ALARM = 1e-4  # of each χ² test


def law_of(lam: float, alpha: float, prompt: str = "") -> Law:
    """π ∝ p_θ^α exp(λ r), and log E_{p_θ}[p_θ^(α−1) exp(λ r)]."""
    law = exact_law(LM, REWARD, 0.0, prompt)
    log_pi = alpha * law.log_p + lam * law.reward
    log_z = float(np.logaddexp.reduce(log_pi))
    return law._replace(pi=np.exp(log_pi - log_z), log_z=log_z)


def made(sampler: Sampler, alpha: float, lam: float, **options: Any) -> GuidedSamplerModule:
    return GuidedSamplerModule(
        REWARD, sampler, LM, lam=lam, alpha=alpha, compare_base=False, **options  # type: ignore[arg-type]
    )  # fmt: skip


REDRAW = DenoiseAccept(Spans(2), rounds=1, tries=2)
MOVES: dict[str, list[Move]] = {
    "suffix": [Suffix()],
    "suffixes by entropy": [Suffix(tries=3, form="gibbs", cut="entropy")],
    "windows": [Suffix(cut="jump"), Window(2, vary=True, tries=2)],
    "denoiser": [Suffix(), REDRAW],
}


@pytest.mark.parametrize("lam", [0.0, 1.2])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize("kind", ["chains", "annealed"])
def test_texts_of_the_power_target(
    kind: str, moves: str, alpha: float, lam: float, table_parts: Path
) -> None:
    """χ² of 1,000 texts (of annealed populations, every tenth particle) of two prompts; the law of
    α = 1 does not pass.
    """
    chosen = MOVES[moves]
    if kind == "annealed":
        sampler: Sampler = Annealed(chosen, particles=10, rounds=3)
    else:
        sampler = Chains(moves=chosen, rounds=30)
    options = {"denoiser": str(table_parts / "denoiser")} if moves == "denoiser" else {}
    module = made(sampler, alpha, lam, **options)
    batch = LM.batch(["", "b"] * 500)
    (found,) = module.predict_step(batch)
    for i, prompt in enumerate(("", "b")):
        tokens = found.tokens[i::2]
        law = law_of(lam, alpha, prompt)
        assert len(law.pi) <= 64
        assert misfit(law, tokens, FALSE_ALARM) == ""
        assert misfit(law_of(lam, 1.0, prompt), tokens, FALSE_ALARM)
        place = {tuple(row): k for k, row in enumerate(law.rows.tolist())}
        at = [place[tuple(row)] for row in tokens.tolist()]
        # What is reported is log p_θ and the reward itself.
        np.testing.assert_allclose(found.log_p[i::2].numpy(), law.log_p[at], atol=1e-5)
        np.testing.assert_allclose(found.reward[i::2].numpy(), law.reward[at], atol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 1.2])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_twisted_smc(alpha: float, lam: float) -> None:
    """χ² of 500 texts of two prompts out of 20,000 particles each; log Z to 0.05. As the start of a
    population too.
    """
    for sampler in (TwistedSMC(particles=40, every=1), Annealed(start=TwistedSMC(), particles=40)):
        module = made(sampler, alpha, lam)
        (found,) = module.predict_step(LM.batch(["", "b"] * 500))
        for i, prompt in enumerate(("", "b")):
            law = law_of(lam, alpha, prompt)
            assert misfit(law, found.tokens[i::2], FALSE_ALARM) == ""
            assert misfit(law_of(lam, 1.0, prompt), found.tokens[i::2], FALSE_ALARM)
            assert abs(float(found.diagnostics["log_z"][i]) - law.log_z) < 0.05


@pytest.mark.parametrize("temperatures", [2, 3])
def test_tempered_chains(temperatures: int) -> None:
    """1,000 chains; the weaker ones of each ladder end elsewhere."""
    module = made(Chains(rounds=40, temperatures=temperatures), 2.0, 1.2)
    (found,) = module.predict_step(LM.batch([""] * 1000))
    assert misfit(law_of(1.2, 2.0), found.tokens, FALSE_ALARM) == ""
    assert misfit(law_of(0.6, 1.5), found.tokens, FALSE_ALARM)


@pytest.mark.parametrize("pool", [1, 4])
@pytest.mark.parametrize(("alpha", "lam"), [(0.5, 1.2), (2.0, 1.2), (2.0, 0.0), (0.5, 0.0)])
def test_log_z_of_the_power_target(alpha: float, lam: float, pool: int) -> None:
    """30 populations of 400: mean of log Z within 4.5 standard errors (7e-6) and 0.01 of log
    E_{p_θ}[p_θ^(α−1) exp(λ r)].
    """
    module = made(Annealed([Suffix()], particles=400 // pool, pool=pool), alpha, lam)
    found = module.predict_step(apart_of_table(30))[0].diagnostics["log_z"]
    exact, error = law_of(lam, alpha).log_z, float(found.std()) / 30**0.5
    assert error < 0.04
    assert abs(float(found.mean()) - exact) < 4.5 * error + 0.01
    assert abs(exact - law_of(lam, 1.0).log_z) > 0.2


def apart_of_table(n: int) -> Any:
    """A population of its own for each text: records that differ."""
    batch = LM.batch([""] * n)
    batch.records = [{"number": i} for i in range(n)]
    return batch


REFUSE: list[Sampler] = [
    BaseModel(), BestOfN(), Diffusion(), GuidedDecoding(), ParticleGibbs(), ParticleSteering(),
    Source(),
]  # fmt: skip


@pytest.mark.parametrize("sampler", REFUSE, ids=lambda sampler: type(sampler).__name__)
def test_others_refuse_it(sampler: Sampler) -> None:
    name = type(sampler).__name__
    for alpha in (0.5, 2.0, 1 + 1e-9, 0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match=rf"^alpha: \S+ given, allowed: 1 with {name}$"):
            made(sampler, alpha, 1.0)


def test_every_sampler_is_either() -> None:
    parts = {getattr(dia.samplers, name) for name in dia.samplers.__all__}
    every = {part for part in parts if isinstance(part, type) and issubclass(part, Sampler)}
    assert every - {Sampler} == {*map(type, REFUSE), Annealed, Chains, TwistedSMC}


def test_values_of_alpha() -> None:
    for sampler in (Annealed([Suffix()]), Chains()):
        for alpha in (1e-9, 0.5, 1.0, 30.0):
            assert made(sampler, alpha, 1.0).models.alpha == alpha
        for alpha in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(UserError, match=r"^alpha: \S+ given, allowed: above 0$"):
                made(sampler, alpha, 1.0)
    for chains in (Chains(moves=[]), Chains(rounds=0)):
        assert made(chains, 1.0, 1.0).alpha == 1
        with pytest.raises(UserError, match=r"^alpha: 2\.0 given, allowed: 1 without moves$"):
            made(chains, 2.0, 1.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["alpha=0"], "--model.alpha: 0.0 given, allowed: above 0"),
        (["alpha=-2"], "--model.alpha: -2.0 given, allowed: above 0"),
        (["alpha=nan"], "--model.alpha: nan given"),
        (["alpha=much"], "--model.alpha: much given"),
        (["sampler=BestOfN", "alpha=2"], "--model.alpha: 2.0 given, allowed: 1 with BestOfN"),
        (["sampler=Diffusion", "alpha=.5"], "--model.alpha: 0.5 given, allowed: 1 with Diffusion"),
        (["sampler=Chains", "sampler.rounds=0", "alpha=2"],
         "--model.alpha: 2.0 given, allowed: 1 without moves"),
    ],
    ids=str,
)  # fmt: skip
def test_on_the_command_line(lightning: Run, options: list[str], said: str) -> None:
    assert_one_line(lightning("predict", *[f"--model.{option}" for option in options]), said)


def test_in_a_file_and_in_python(tmp_path: Path) -> None:
    """Likely texts become likelier: log p_θ of 64 texts of the tiny kit at α = 3 and at ½."""
    text = "model: {init_args: {alpha: 3.0, sampler: {class_path: Annealed, init_args: {"
    text += "moves: [Suffix]}}}}"
    file = tmp_path / "mine.yaml"
    file.write_text(text + "\n", encoding="utf-8")
    arguments = ["predict", "--config", "configs/dia_tiny.yaml", "--config", str(file)]
    module = parser.build_model(cli.prepare_arguments(arguments))
    assert module.models.alpha == 3
    found = {}
    for alpha in (0.5, 3.0):
        result = dia.sample(
            base_lm=LM, reward=REWARD, lam=0.0, alpha=alpha, n=64, sampler=Chains(rounds=10),
            max_length=4, progress=False, compare_base=False,
        )  # fmt: skip
        found[alpha] = torch.as_tensor(result.log_p).double()
    # Exact means −2.2 and −1.4, standard deviations below 1: 5 standard errors are 0.9 and less.
    means = {a: float(law_of(0.0, a).pi @ law_of(0.0, a).log_p) for a in found}
    for alpha, values in found.items():
        assert abs(float(values.mean()) - means[alpha]) < 5 * float(values.std()) / 8 + 0.02
    assert means[3.0] > means[0.5] + 0.5


def test_log_weights_of_chains_have_their_own_name() -> None:
    """What chains follow is λ r + (α − 1) log p_θ, not the reward."""
    batch = LM.batch([""] * 8)
    for alpha, name in ((1.0, "reward"), (2.0, "log_weight")):
        (found,) = made(Chains(rounds=5), alpha, 1.0).predict_step(batch)
        told = {n for n in found.diagnostics if n.startswith("ess_")}
        assert told == {f"ess_{name}", "ess_log_p"}
