"""Every sampler through `predict_step` on the enumerable table: its texts against the exact law,
its log Z against log Z.

χ² tests have a false-alarm rate of 10⁻³ each (`chi_square_ok`), means are held to 4.5 standard
errors (7e-6). Seeds are fixed, so that an alarm is a change of the program.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.errors import UserError
from dia_lightning.samplers import (
    DDIM,
    Ancestral,
    Annealed,
    BaseModel,
    BestOfN,
    Chains,
    Critic,
    CriticGuidance,
    DenoiseAccept,
    Diffusion,
    DPMpp2M,
    Guidance,
    GuidedDecoding,
    GuidedSamplerModule,
    Move,
    ParticleGibbs,
    ParticleSteering,
    PredictorCorrector,
    Sampler,
    Solver,
    Suffix,
    TwistedSMC,
    Unguided,
)
from dia_lightning.samplers.networks import load_critic, load_denoiser
from dia_lightning.sampling.positions import Spans
from dia_lightning.types import Batch, Generations
from tests.oracles.table_lm import END, LOG_P, NEXT, REWARD, ROWS, T, V, codes, pi
from tests.oracles.table_model import P, TableReward, chi_square_ok, free, table_lm
from tests.wiring.kit import SOFT_LAM, apart, seed_of

LAM = 1.5
SUFFIX, REDRAW = Suffix(), DenoiseAccept(Spans(2), rounds=1)
pytestmark = pytest.mark.usefixtures("on_table")


def files(table_parts: Path, *names: str) -> dict[str, Any]:
    return {"compare_base": False, **{name: str(table_parts / name) for name in names}}


def guided(table_parts: Path, sampler: Sampler, **options: Any) -> GuidedSamplerModule:
    options = files(table_parts, "denoiser", "critic") | {"lam": LAM} | options
    return GuidedSamplerModule(TableReward(), sampler, **options)


def drawn(module: Any, batch: Batch) -> Generations:
    (generations,) = module.predict_step(batch)
    given = batch.prompt_mask[:, 0].numpy() * np.log(NEXT[()])[batch.tokens[:, 0]]
    np.testing.assert_allclose(
        generations.log_p.numpy(), LOG_P[codes(generations.tokens)] - given, atol=1e-5
    )
    np.testing.assert_allclose(
        generations.reward.numpy(), REWARD[codes(generations.tokens)], atol=1e-6
    )
    return generations


def log_z(lam: float, first: int | None = None) -> float:
    """Log E[exp(λ r)] under p_θ, given the first token."""
    fits = np.array([first is None or row[0] == first for row in ROWS])
    return float(np.log((P * np.exp(lam * REWARD))[fits].sum() / P[fits].sum()))


def by_weight(law: np.ndarray, lam: float = LAM) -> np.ndarray:
    """Of one of two draws of `law` by its weight exp(λ r): P(x) = 2 p(x) Σ_y p(y) w(x) / (w(x) +
    w(y)).
    """
    w = np.exp(lam * REWARD)
    out: np.ndarray = 2 * law * ((law / (w[:, None] + w)).sum(1) * w)
    return out


# Exact moves and the annealed population.


def names(moves: list[Move]) -> str:
    return " ".join(move.name for move in moves)


@pytest.mark.parametrize("moves", [[SUFFIX], [REDRAW], [SUFFIX, REDRAW]], ids=names)
def test_annealed(table_parts: Path, moves: list[Move]) -> None:
    """400 of 6,000 particles, whose own spread adds a sixth to χ²; p_θ, and π at half of λ, do
    not pass.
    """
    generations = drawn(guided(table_parts, Annealed(moves, particles=15, rounds=2)), free(400))
    assert chi_square_ok(generations.tokens, pi(LAM))
    assert not chi_square_ok(generations.tokens, P)
    assert not chi_square_ok(generations.tokens, pi(0.5 * LAM))
    assert float(generations.diagnostics[f"accept_{moves[0].name}"].mean()) > 0.05


@pytest.mark.parametrize(
    ("start", "moves", "rounds"),
    [
        (BaseModel(), [SUFFIX], 40),
        (Diffusion(Ancestral(), steps=2), [REDRAW], 150),
        (BaseModel(), [SUFFIX, REDRAW], 30),
    ],
    ids=["base_lm suffix", "ancestral denoise_accept", "base_lm cycle"],
)
def test_chains(table_parts: Path, start: Sampler, moves: list[Move], rounds: int) -> None:
    """500 chains from p_θ or from guided diffusion, neither of which passes."""
    made = guided(table_parts, Chains(start, moves, rounds), lam=1.0)
    assert chi_square_ok(drawn(made, free(500)).tokens, pi(1.0))
    unmoved = guided(table_parts, start, lam=1.0)
    assert not chi_square_ok(drawn(unmoved, free(500)).tokens, pi(1.0))


@pytest.mark.parametrize("temperatures", [2, 3])
def test_tempering_returns_the_chain_at_lambda(table_parts: Path, temperatures: int) -> None:
    """1,000 texts at λ; the laws of all weaker chains do not pass."""
    made = guided(table_parts, Chains(rounds=40, temperatures=temperatures), lam=1.2)
    tokens = drawn(made, free(1000)).tokens
    assert chi_square_ok(tokens, pi(1.2))
    for weaker in range(1, temperatures):
        assert not chi_square_ok(tokens, pi(1.2 * weaker / temperatures))


# Log Z.


@pytest.mark.parametrize(
    "options",
    [{"pool": 4, "particles": 125}, {"pool": 20, "particles": 25}, {"pool": 1, "particles": 500}],
    ids=str,
)
def test_log_z_of_the_annealed_population(table_parts: Path, options: dict[str, int]) -> None:
    """30 populations that begin with 500 texts each, given x_1 = 0 or 1: mean within 4.5 s.e. and
    0.01 of the exact one.

    0.01 is for the bias of log Ẑ and for the adaptation of the temperatures, O(1 / 500). Without
    what the pool knows a mean would be off by more than 1.
    """
    for first in (0, 1):
        made = guided(table_parts, Annealed([SUFFIX], **options), lam=2.0, seed=first)
        generations = drawn(made, apart(30, first))
        found, exact = generations.diagnostics["log_z"], log_z(2.0, first)
        error = float(found.std()) / 30**0.5
        assert error < 0.04
        assert abs(float(found.mean()) - exact) < 4.5 * error + 0.01
        assert float(generations.diagnostics["log_z_reverse"].mean()) > exact - 4.5 * error - 0.05
    assert abs(log_z(2.0, 0) - log_z(2.0, 1)) > 0.2  # a population of the other prompt would show


def test_log_z_of_two_prompts_in_one_batch(table_parts: Path) -> None:
    """Each text is told its own population's: 2,000 particles a prompt, within 0.1 (5 s.e.) of
    log Z given its first token.
    """
    tokens = torch.full((6, T), END)
    tokens[:, 0] = torch.tensor([0, 1, 1, 0, 1, 0])
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 0] = True
    batch = Batch(0, list(range(6)), ["ab"[i] for i in tokens[:, 0]], tokens, mask)
    for pool, particles in ((1, 700), (5, 140)):
        generations = drawn(guided(table_parts, Annealed([SUFFIX], particles, pool)), batch)
        exact = [log_z(LAM, int(first)) for first in tokens[:, 0]]
        np.testing.assert_allclose(generations.diagnostics["log_z"].numpy(), exact, atol=0.1)
        assert torch.equal(generations.tokens[:, 0], tokens[:, 0])


# The particle that is picked.


@pytest.mark.parametrize("pool", [1, 3])
def test_each_text_is_a_particle_of_its_own_prompt(table_parts: Path, pool: int) -> None:
    """400 texts of two prompts, mixed, and 10 particles for each: π given the first token."""
    tokens = torch.full((400, T), END)
    tokens[:, 0] = torch.randperm(400, generator=torch.Generator().manual_seed(1)) % 2
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 0] = True
    batch = Batch(0, list(range(400)), ["ab"[i] for i in tokens[:, 0]], tokens, mask)
    made = guided(table_parts, Annealed([SUFFIX], particles=10, pool=pool, rounds=2))
    generations = drawn(made, batch)
    assert torch.equal(generations.tokens[:, 0], tokens[:, 0])
    for first in (0, 1):
        law = pi(LAM) * np.array([row[0] == first for row in ROWS])
        assert chi_square_ok(generations.tokens[tokens[:, 0] == first], law / law.sum())


@pytest.mark.parametrize("sampler", [Annealed([], particles=1), TwistedSMC(particles=1)])
def test_no_particle_is_picked_twice(sampler: Sampler) -> None:
    """At λ = 0 with one particle a text, the texts are the samples of p_θ in another order."""
    made = GuidedSamplerModule(TableReward(), sampler, lam=0.0, compare_base=False)
    batch = free(300)
    tokens = drawn(made, batch).tokens
    base = table_lm().generate(batch.tokens, batch.prompt_mask, seed_of(0, 0))
    assert sorted(tokens.tolist()) == sorted(base.tolist())


@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
def test_twisted_smc_picks_by_weight(table_parts: Path, resampling: Any) -> None:
    """Two particles and no resampling on the way: one of two samples of p_θ by its weight, 4,000
    populations.
    """
    sampler = TwistedSMC(particles=2, ess=0.0, resampling=resampling)
    generations = drawn(guided(table_parts, sampler), apart(4000))
    assert chi_square_ok(generations.tokens, by_weight(P))
    assert not chi_square_ok(generations.tokens, P)
    z = generations.diagnostics["log_z"].exp()
    assert abs(float(z.mean()) - np.exp(log_z(LAM))) < 4.5 * float(z.std()) / 4000**0.5


def test_twisted_smc_with_a_critic_and_resampling(table_parts: Path) -> None:
    """A critic of random weights, resampling at every token: Ẑ of 400 populations of 8 is
    unbiased.
    """
    sampler = TwistedSMC(Critic(), 8, every=1, ess=1.0, resampling="multinomial")
    generations = drawn(guided(table_parts, sampler), apart(400))
    assert float(generations.diagnostics["resampled"].min()) == T - 1
    z = generations.diagnostics["log_z"].exp() / np.exp(log_z(LAM))
    assert float(z.std()) / 400**0.5 < 0.05
    assert abs(float(z.mean()) - 1) < 4.5 * float(z.std()) / 400**0.5


# Diffusion in one step: all that the network knows of a text are the biases of its head.


def one_step_law(table_parts: Path) -> np.ndarray:
    """p_ψ of the factorised denoiser: Π_i softmax(bias)_{x_i} up to the end token, to the trace
    (0.3 %) that t = 1 leaves.
    """
    lm = table_lm()
    embedding = TokenEmbedding(lm.embedding_table(), len(lm.tokenizer))
    network = load_denoiser(str(table_parts / "factorised" / "denoiser"), embedding)
    share = network.head.bias.softmax(0).double().numpy()
    lengths = [row.index(END) + 1 if END in row else T for row in ROWS]
    law = np.array([np.prod(share[list(row[:n])]) for row, n in zip(ROWS, lengths, strict=True)])
    assert abs(law.sum() - 1) < 1e-6
    return law


def factorised(table_parts: Path, sampler: Sampler, lam: float = LAM) -> GuidedSamplerModule:
    """Guided by the critic of the table; `sampler` takes one step, all positions together."""
    denoiser = str(table_parts / "factorised" / "denoiser")
    return guided(table_parts, sampler, denoiser=denoiser, lam=lam)


@pytest.mark.parametrize("solver", [Ancestral(), DDIM(0.1), DPMpp2M(), PredictorCorrector()])
def test_unguided_solvers(table_parts: Path, solver: Solver) -> None:
    """4,000 texts of one step; `temperature` makes them more likely ones."""
    law = one_step_law(table_parts)
    made = factorised(table_parts, Diffusion(solver, steps=1, stagger=0.0), lam=0.0)
    tokens = drawn(made, free(4000)).tokens
    assert chi_square_ok(tokens, law)
    assert not chi_square_ok(tokens, P)


def steering(guidance: Guidance, **options: Any) -> ParticleSteering:
    return ParticleSteering(guidance, steps=1, stagger=0.0, **options)


@pytest.mark.parametrize("resampling", ["systematic", "stratified"])
def test_smc_picks_by_weight(table_parts: Path, resampling: Any) -> None:
    """Two particles of p_ψ, unguided: one of two by its weight, 4,000 populations; log Z is that
    of p_ψ.
    """
    law = one_step_law(table_parts)
    made = factorised(table_parts, steering(Unguided(), particles=2, resampling=resampling))
    generations = drawn(made, apart(4000))
    assert chi_square_ok(generations.tokens, by_weight(law))
    assert not chi_square_ok(generations.tokens, law)
    z = generations.diagnostics["log_z"].exp()
    assert abs(float(z.mean()) - law @ np.exp(LAM * REWARD)) < 4.5 * float(z.std()) / 4000**0.5


def test_guided_smc(table_parts: Path) -> None:
    """Many particles, proposals guided by a critic of random weights: p_ψ(x) exp(λ r(x)), 400 of
    6,000.
    """
    law = one_step_law(table_parts) * np.exp(LAM * REWARD)
    made = factorised(table_parts, steering(CriticGuidance(), particles=15))
    assert chi_square_ok(drawn(made, free(400)).tokens, law / law.sum())


@pytest.mark.parametrize("potential", ["das", "difference"])
def test_particle_gibbs(table_parts: Path, potential: Any) -> None:
    """Three particles a text, one position a step with resampling between: 1,500 texts of p_ψ(x)
    exp(λ r(x)). p_ψ is that of one step, since each position goes from noise to its token at once.

    Three particles alone, the laws of half of λ and of p_ψ do not pass.
    """
    options: dict[str, Any] = {"steps": T, "stagger": 1e4, "particles": 3, "ess": 0.8}
    sampler = ParticleGibbs(CriticGuidance(), potential, rounds=12, **options)
    generations = drawn(factorised(table_parts, sampler), free(1500))
    plain = one_step_law(table_parts)
    half, law = (plain * np.exp(lam * REWARD) for lam in (LAM / 2, LAM))
    assert chi_square_ok(generations.tokens, law / law.sum())
    assert not chi_square_ok(generations.tokens, half / half.sum())
    assert not chi_square_ok(generations.tokens, plain)
    assert 0.3 < float(generations.diagnostics["renewed"].mean()) < 0.95
    assert 1 < float(generations.diagnostics["rhat_reward"].mean()) < 2  # of 13 values each
    first = factorised(table_parts, replace(sampler, rounds=0))
    assert not chi_square_ok(drawn(first, free(1500)).tokens, law / law.sum())


def test_particle_gibbs_keeps_prompts_and_is_its_proposal_without_a_reward(
    table_parts: Path,
) -> None:
    """At λ = 0 p_ψ itself, given the first token of each text: 1,500 of either."""
    tokens = torch.full((3000, T), END)
    tokens[:, 0] = torch.arange(3000) % 2
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 0] = True
    batch = Batch(0, list(range(3000)), ["ab"[i] for i in tokens[:, 0]], tokens, mask)
    sampler = ParticleGibbs(particles=2, rounds=2, steps=T, stagger=1e4)
    found = drawn(factorised(table_parts, sampler, lam=0.0), batch).tokens
    assert torch.equal(found[:, 0], tokens[:, 0])
    for first in (0, 1):
        law = one_step_law(table_parts) * np.array([row[0] == first for row in ROWS])
        assert chi_square_ok(found[tokens[:, 0] == first], law / law.sum())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("guidance", Unguided()),
        ("potential", "sum"),
        ("particles", 4),
        ("rounds", 3),
        ("every", 2),
        ("ess", 0.1),
        ("steps", 5),
        ("stagger", 0.0),
        ("temperature", 0.5),
    ],
)
def test_every_option_of_particle_gibbs_has_an_effect(
    table_parts: Path, option: str, value: Any
) -> None:
    """The critic's gradient counts only between t = 0 and 1, where no step begins that reveals a
    position at once.
    """
    made, stagger = (guided, 2.0) if option == "guidance" else (factorised, 1e4)
    usual = ParticleGibbs(particles=3, rounds=2, steps=T, stagger=stagger, ess=1.0)
    parts = (usual, usual, replace(usual, **{option: value}))
    found = [drawn(made(table_parts, part), free(60)).tokens for part in parts]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("particles", 1, "2 or more"),
        ("rounds", -1, "0 or more"),
        ("every", 0, "1 or more"),
        ("potential", "best", "difference, max, sum, das"),
        ("ess", 1.5, "0 ≤ ess ≤ 1"),
    ],
)
def test_particle_gibbs_checks_its_settings(option: str, value: Any, allowed: str) -> None:
    with pytest.raises(UserError, match=f"^{option}: {value} given, allowed: {allowed}"):
        ParticleGibbs(**{option: value})


# Baselines.


def cut(rows: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """The law of the texts whose next token has the distribution `rows` of what is there."""
    out = []
    for row in ROWS:
        n = row.index(END) + 1 if END in row else T
        out.append(np.prod([rows[row[:i]][row[i]] for i in range(n)]))
    return np.array(out)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.8}], ids=str
)
def test_zero_shot(options: dict[str, Any]) -> None:
    """4,000 texts; next tokens sharpened, of the two likeliest, of those that together have 80
    %.
    """
    rows = {}
    for prefix, given in NEXT.items():
        share, order = given ** (1 / options.get("temperature", 1)), np.argsort(-given)
        kept = order[: options.get("top_k", V)]
        kept = kept[np.cumsum(given[kept]) - given[kept] < options.get("top_p", 1.1)]
        rows[prefix] = np.where(np.isin(np.arange(V), kept), share, 0)
        rows[prefix] = rows[prefix] / rows[prefix].sum()
    made = GuidedSamplerModule(TableReward(), BaseModel(**options), compare_base=False)
    tokens = drawn(made, free(4000)).tokens
    law = cut(rows)
    assert law[codes(tokens)].min() > 0
    assert chi_square_ok(tokens, law)
    assert chi_square_ok(tokens, P) == (not options)


@pytest.mark.parametrize("sampler", [BestOfN(3), BestOfN(2, weighted=True)])
def test_best_of_n(sampler: BestOfN) -> None:
    """The best of three: F(x)³ − F(x−)³; one of two by its weight. 4,000 texts."""
    order, law = REWARD.argsort(), np.empty_like(P)
    upper = P[order].cumsum()
    law[order] = upper**3 - (upper - P[order]) ** 3
    made = GuidedSamplerModule(TableReward(), sampler, lam=LAM, compare_base=False)
    wanted = by_weight(P) if sampler.weighted else law
    assert chi_square_ok(drawn(made, free(4000)).tokens, wanted)


@pytest.mark.parametrize("critic", ["critic", "soft"])
def test_guided_decoding(table_parts: Path, critic: str) -> None:
    """Next tokens in proportion to p exp(λ h), h a critic of random weights asked by hand; a soft
    critic's value is λ h.

    4,000 texts; with the other unit they do not pass.
    """
    lm = table_lm()
    embedding = TokenEmbedding(lm.embedding_table(), len(lm.tokenizer))
    network, _ = load_critic(str(table_parts / critic), embedding)
    noise = torch.randn(T, embedding.dim, generator=seed_of(0, 0))

    def value(prefix: tuple[int, ...]) -> float:
        text: Tensor = torch.tensor([*prefix, *[END] * (T - len(prefix))])
        clean = torch.arange(T) < (T if END in prefix else len(prefix))
        return float(
            network(
                torch.where(clean[:, None], embedding(text), noise)[None], (~clean).float()[None]
            )
        )

    laws = []
    for factor in (1.0, SOFT_LAM):
        rows = {}
        for prefix, given in NEXT.items():
            if END not in prefix:
                weight = given * np.exp([factor * value((*prefix, v)) for v in range(V)])
                rows[prefix] = weight / weight.sum()
        laws.append(cut(rows))
    right, wrong = reversed(laws) if critic == "critic" else laws
    asked = str(table_parts / critic)
    made = guided(table_parts, GuidedDecoding(top_k=0), critic=asked, lam=SOFT_LAM)
    tokens = drawn(made, free(4000)).tokens
    assert chi_square_ok(tokens, right)
    assert not chi_square_ok(tokens, wrong)
