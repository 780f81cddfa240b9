"""What samplers and their module report, need and refuse, on the enumerable table: figures that
are known exactly.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.samplers import (
    Ancestral,
    Annealed,
    BaseModel,
    BestOfN,
    Chains,
    ClassifierFree,
    Critic,
    DenoiseAccept,
    Diffusion,
    GuidedDecoding,
    GuidedSamplerModule,
    ParticleSteering,
    RandomTokens,
    RewardGradient,
    Sampler,
    Source,
    Spans,
    Suffix,
    TwistedSMC,
    Unguided,
    chains,
)
from dia_lightning.sampling.resampling import LAM_MAX
from dia_lightning.target import TargetDensity
from dia_lightning.types import Batch
from tests.oracles.table_lm import END, REWARD, T, codes, pi
from tests.oracles.table_model import P, TableReward, chi_square_ok, free, table_lm
from tests.wiring.kit import apart, seed_of, warped

LAM = 1.5
SUFFIX, REDRAW = Suffix(), DenoiseAccept(Spans(2), rounds=1)
pytestmark = pytest.mark.usefixtures("on_table")


def guided(table_parts: Path, sampler: Sampler, **options: Any) -> GuidedSamplerModule:
    files = {name: str(table_parts / name) for name in ("denoiser", "critic")}
    return GuidedSamplerModule(
        TableReward(), sampler, **files | {"lam": LAM, "compare_base": False} | options
    )


def rewards(tokens: Tensor) -> Tensor:
    return torch.from_numpy(REWARD[codes(tokens)])


# Figures.


@pytest.mark.parametrize(
    "options",
    [{}, {"compare_base": True}, {"seed": 3, "compare_base": True}, {"compare_base": False}],
)
def test_base_texts_beside_the_methods(options: dict[str, Any]) -> None:
    """Unless told not to, as many samples of p_θ, from random numbers of their own."""
    made, batch = GuidedSamplerModule(TableReward(), BestOfN(2), **options), free(20)
    first, again = made.predict_step(batch), made.predict_step(batch, 1)
    names = ["best_of_n", "zero_shot"] if options.get("compare_base", True) else ["best_of_n"]
    assert [g.method for g in first] == names
    assert [g.warm for g in first] == [False] * len(names)
    assert [g.warm for g in again] == [True] * len(names)
    tested = made.test_step(batch)["generations"]
    for k, one in enumerate(first):
        assert torch.equal(one.tokens, again[k].tokens)
        assert torch.equal(one.tokens, tested[k].tokens)
        assert (one.seed, one.index) == (options.get("seed", 0), 0)
        lengths = [
            next((i + 1 for i, v in enumerate(row) if v == END), T) for row in one.tokens.tolist()
        ]
        assert one.n_tokens.tolist() == lengths
        assert one.accept_rate is None
    if len(names) == 2:
        base = table_lm().generate(
            batch.tokens, batch.prompt_mask, seed_of(options.get("seed", 0), 0, 1)
        )
        assert torch.equal(first[1].tokens, base)


@pytest.mark.parametrize(
    "sampler",
    [
        Annealed([], particles=1, least=1),
        TwistedSMC(particles=1, every=1),
        TwistedSMC(Critic(), particles=1, every=1),
        TwistedSMC(particles=1, ess=0.0),
        BestOfN(1, weighted=True),
        ParticleSteering(Unguided(), particles=1, steps=2),
        ParticleSteering(Unguided(), particles=1, steps=3, potential="max"),
        ParticleSteering(Unguided(), particles=1, steps=3, potential="sum", every=2),
    ],
    ids=str,
)
def test_one_particle_knows_log_z_as_its_own_weight(table_parts: Path, sampler: Sampler) -> None:
    """λ r of each text, and all shares 1."""
    (found,) = guided(table_parts, sampler).predict_step(apart(50))
    torch.testing.assert_close(
        found.diagnostics["log_z"], LAM * rewards(found.tokens), atol=1e-5, rtol=0
    )
    want = {"ess": 1.0, "roots": 1.0, "resampled": 0.0, "temperatures": 1.0}
    for name, value in want.items():
        if name in found.diagnostics:
            assert found.diagnostics[name].tolist() == pytest.approx([value] * 50)
    if "log_z_reverse" in found.diagnostics:
        torch.testing.assert_close(found.diagnostics["log_z_reverse"], found.diagnostics["log_z"])
    assert {values.dtype for values in found.diagnostics.values()} == {torch.float64}
    assert found.accept_rate is None


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("kind", ["annealed", "chains"])
def test_acceptance_of_each_move_and_their_mean(table_parts: Path, kind: str, rounds: int) -> None:
    moves = [SUFFIX, REDRAW, SUFFIX]
    sampler = (
        Annealed(moves, rounds=rounds) if kind == "annealed" else Chains(moves=moves, rounds=rounds)
    )
    (found,) = guided(table_parts, sampler).predict_step(free(30))
    rates = [
        found.diagnostics[f"accept_{name}"] for name in ("suffix", "denoise_accept", "suffix_2")
    ]
    assert found.accept_rate is not None
    torch.testing.assert_close(found.accept_rate, sum(rates, torch.zeros(30)) / 3)
    for rate in rates:
        assert rate.shape == (30,)
        # Shares of `rounds` moves.
        torch.testing.assert_close(rate * rounds, (rate * rounds).round())
        assert 0 < float(rate.mean()) < 1
    known = {
        f"{kind}_{name}"
        for kind in ("ess", "rhat", "autocorrelation")
        for name in ("reward", "log_p")
    }
    annealed = {"log_z", "log_z_reverse", "temperatures", "ess", "roots"}
    more = annealed if kind == "annealed" else known
    assert (
        set(found.diagnostics)
        == {"accept_suffix", "accept_denoise_accept", "accept_suffix_2"} | more
    )


def test_what_chains_tell(table_parts: Path) -> None:
    """Reward and log p_θ along chains, which every move knows; tempered chains have one rate."""
    traces = {f"{kind}_{name}" for kind in ("ess", "rhat", "autocorrelation")
              for name in ("reward", "log_p")}  # fmt: skip
    (found,) = guided(table_parts, Chains(rounds=5)).predict_step(free(4))
    assert set(found.diagnostics) == {"accept_suffix"} | traces
    (found,) = guided(table_parts, Chains(rounds=5, temperatures=2)).predict_step(free(4))
    assert set(found.diagnostics) == {"accept_tempered"} | traces
    assert found.accept_rate is not None
    torch.testing.assert_close(found.accept_rate, found.diagnostics["accept_tempered"])


@pytest.mark.parametrize(
    "sampler", [Annealed(rounds=0), Annealed([]), Chains(rounds=0), Chains(moves=[])], ids=str
)
def test_without_moves_nothing_is_accepted(table_parts: Path, sampler: Sampler) -> None:
    (found,) = guided(table_parts, sampler, lam=0.0).predict_step(free(30))
    assert found.accept_rate is None
    assert not [name for name in found.diagnostics if name.startswith("accept")]
    assert chi_square_ok(
        guided(table_parts, sampler, lam=0.0).predict_step(free(2000))[0].tokens, P
    )


@pytest.mark.parametrize(("pool", "temperatures"), [(1, 0), (2, 1), (3, 1)])
def test_temperatures_are_counted(table_parts: Path, pool: int, temperatures: int) -> None:
    """At λ = 0 none is passed, but for the one at which the pool is thinned."""
    (found,) = guided(table_parts, Annealed([SUFFIX], pool=pool), lam=0.0).predict_step(free(8))
    assert found.diagnostics["temperatures"].tolist() == [temperatures] * 8
    assert found.diagnostics["log_z"].tolist() == pytest.approx([0.0] * 8)


def test_chains_from_given_texts(table_parts: Path) -> None:
    """500 chains from the text `ab` in each record end at π, and at no rounds are where they
    were.
    """
    batch = with_source(500)
    start = guided(table_parts, Source()).predict_step(batch)[0]
    assert start.tokens.tolist() == [[0, 1, END, END]] * 500
    assert start.method == "source"
    moved = guided(table_parts, Chains(Source(), [SUFFIX], rounds=40), lam=1.0).predict_step(batch)[
        0
    ]
    assert moved.method == "source"
    assert chi_square_ok(moved.tokens, pi(1.0))
    few = guided(table_parts, Chains(Source(), [SUFFIX], rounds=1), lam=1.0).predict_step(batch)[0]
    assert not chi_square_ok(few.tokens, pi(1.0))


def with_source(n: int) -> Batch:
    batch = free(n)
    return Batch(
        0,
        batch.ids,
        batch.prompts,
        batch.tokens,
        batch.prompt_mask,
        [{"source": "ab"} for _ in range(n)],
    )


# What is needed and refused.

TILTED = DenoiseAccept(tilt=0.1)


@pytest.mark.parametrize(
    ("sampler", "at_zero", "above"),
    [
        (Annealed(), set(), set()),
        (Annealed([DenoiseAccept()]), {"denoiser"}, {"denoiser"}),
        (Annealed([DenoiseAccept()], rounds=0), set(), set()),
        (Annealed([SUFFIX]), set(), set()),
        (Annealed([SUFFIX, TILTED]), {"denoiser"}, {"denoiser", "critic"}),
        (BaseModel(), set(), set()),
        (BestOfN(), set(), set()),
        (Chains(), set(), set()),
        (Chains(moves=[TILTED], rounds=0), set(), set()),
        (Chains(moves=[TILTED], rounds=1), {"denoiser"}, {"denoiser", "critic"}),
        (Chains(Diffusion(), rounds=0), {"denoiser"}, {"denoiser", "critic"}),
        (Diffusion(), {"denoiser"}, {"denoiser", "critic"}),
        (Diffusion(guidance=Unguided()), {"denoiser"}, {"denoiser"}),
        (Diffusion(guidance=RewardGradient()), {"denoiser"}, {"denoiser"}),
        (Diffusion(guidance=ClassifierFree()), {"denoiser", "labels"}, {"denoiser", "labels"}),
        (GuidedDecoding(), set(), {"critic"}),
        (ParticleSteering(Unguided()), {"denoiser"}, {"denoiser", "critic"}),
        (Source(), set(), set()),
        (TwistedSMC(), set(), set()),
        (TwistedSMC(Critic()), set(), {"critic"}),
    ],
    ids=lambda x: str(sorted(x)) if isinstance(x, set) else str(x),
)
def test_networks_that_are_needed(sampler: Sampler, at_zero: set[str], above: set[str]) -> None:
    assert set(sampler.needs(0.0)) == at_zero
    assert set(sampler.needs(1e-9)) == above


def test_limits_of_the_module() -> None:
    def made(**options: Any) -> GuidedSamplerModule:
        return GuidedSamplerModule(TableReward(), BaseModel(), **options)

    for option, fine, wrong in (
        ("seed", [0, 2**32 - 1], [-1, 2**32]),
        ("lam", [0.0, LAM_MAX], [-1e-9, 2 * LAM_MAX, math.nan]),
    ):
        for value in fine:
            assert getattr(made(**{option: value}), option) == value
        for value in wrong:
            with pytest.raises(UserError, match=f"^{option}: .* given, allowed: 0"):
                made(**{option: value})
    plain = made()
    assert (plain.lam, plain.seed, plain.compare_base, plain.shard_base_lm) == (6.0, 0, True, False)


def test_tempering_needs_a_reward(table_parts: Path) -> None:
    for lam in (0.0, 1e-9):
        if lam:
            assert guided(table_parts, Chains(temperatures=2), lam=lam).sampler == Chains(
                temperatures=2
            )
            continue
        with pytest.raises(UserError, match=r"^temperatures: 2 given, allowed: 1 where λ is 0"):
            guided(table_parts, Chains(temperatures=2), lam=lam)
    assert guided(table_parts, Chains(temperatures=1), lam=0.0).lam == 0


@pytest.mark.parametrize("sampler", [Annealed(), Chains(), Chains(rounds=3)])
def test_default_moves_need_no_denoiser(sampler: Sampler, tmp_path: Path) -> None:
    """Moves that were asked for do, and are an error without one."""
    alone = str(tmp_path / "kit" / "lm")
    assert GuidedSamplerModule(TableReward(), sampler, alone).sampler == sampler
    with pytest.raises(UserError, match=r"^denoiser: none given, needed for the sampler Annealed"):
        GuidedSamplerModule(TableReward(), Annealed([DenoiseAccept()]), alone)
    plain = Annealed([Suffix(), Suffix()])
    assert GuidedSamplerModule(TableReward(), plain, alone).sampler == plain


def test_networks_of_the_kit(table_parts: Path, tmp_path: Path) -> None:
    """Those beside a folder `lm` are taken, but not those beside another folder."""
    kit = tmp_path / "kit"
    shutil.copytree(table_parts / "denoiser", kit / "denoiser")
    (kit / "lm").mkdir()
    sampler = Annealed([DenoiseAccept()])
    made = GuidedSamplerModule(TableReward(), sampler, str(kit / "lm"))
    assert made.denoiser == str(kit / "denoiser")
    assert made.trained_parts() == {"denoiser": str(kit / "denoiser")}
    made = GuidedSamplerModule(TableReward(), Annealed(), str(kit / "lm"))
    assert (made.denoiser, made.trained_parts()) == (None, {})  # not needed
    with pytest.raises(UserError, match=r"^critic: none given"):
        GuidedSamplerModule(TableReward(), TwistedSMC(Critic()), str(kit / "lm"))
    with pytest.raises(UserError, match=r"^denoiser: none given"):
        GuidedSamplerModule(TableReward(), sampler, str(kit / "model"))
    told = GuidedSamplerModule(TableReward(), sampler, str(kit / "model"), str(kit / "denoiser"))
    assert told.trained_parts() == {"denoiser": str(kit / "denoiser")}


@pytest.mark.parametrize(
    ("sampler", "refused"),
    [
        (Annealed([SUFFIX]), True),
        (Annealed([SUFFIX, SUFFIX]), True),
        (Annealed(), False),
        (Annealed([SUFFIX, REDRAW]), False),
        (BestOfN(2), True),
        (TwistedSMC(), True),
        (GuidedDecoding(), True),
        (ParticleSteering(Unguided(), steps=2), True),
        (Chains(moves=[REDRAW]), True),
        (Chains(Source(), [SUFFIX, REDRAW]), True),
        (Chains(Source(), [REDRAW, SUFFIX]), True),
        (Chains(Source(), [REDRAW]), False),
        (Chains(Source(), [SUFFIX], rounds=0), False),
        (Diffusion(Ancestral(), steps=2), False),
    ],
    ids=str,
)
def test_who_can_fill_blanks(table_parts: Path, sampler: Sampler, refused: bool) -> None:
    """What writes from left to right cannot hold a word that is given behind a free place."""
    batch = with_source(3)
    batch.records[0]["source"] = batch.records[1]["source"] = "a"
    batch.prompt_mask[2, 1] = True
    batch.tokens[2, 1] = 1
    made = guided(table_parts, sampler)
    if refused:
        said = f"blanks or a length given, but {type(sampler).__name__} writes from left to right"
        if isinstance(sampler, Annealed):
            said = "moves: Suffix.* given, allowed with blanks or a length"
        with pytest.raises(UserError, match=said):
            made.draw(batch, seed_of(0, 0))
        return
    if isinstance(sampler, Chains):
        assert made.draw(batch, seed_of(0, 0)).tokens.shape == (3, T)
        return
    tokens = made.draw(batch, seed_of(0, 0)).tokens
    assert int(tokens[2, 1]) == 1
    assert int(tokens[2, 0]) != END


@pytest.mark.parametrize(
    "sampler",
    [
        Annealed([SUFFIX, REDRAW], particles=2, pool=2),
        BaseModel(),
        BestOfN(2),
        BestOfN(2, weighted=True),
        Chains(moves=[SUFFIX, REDRAW, DenoiseAccept(tilt=0.5)], rounds=2),
        Chains(rounds=2, temperatures=3),
        Diffusion(steps=2),
        GuidedDecoding(),
        ParticleSteering(steps=2),
        TwistedSMC(),
        TwistedSMC(Critic(), every="word"),
    ],
    ids=str,
)
def test_a_single_text(table_parts: Path, sampler: Sampler) -> None:
    (found,) = guided(table_parts, sampler).predict_step(free(1))
    torch.testing.assert_close(found.reward.double(), rewards(found.tokens), atol=1e-6, rtol=0)
    assert all(values.shape == (1,) for values in found.diagnostics.values())
    assert found.n_tokens.shape == found.log_p.shape == (1,)


@pytest.mark.parametrize("level", [None, 0.0, 0.4, 1.0])
def test_the_level_at_which_the_critic_looks(table_parts: Path, level: float | None) -> None:
    made = guided(table_parts, Annealed([DenoiseAccept(tilt=1.0, tilt_level=level)]))
    kernel: Any = made.sampler.moves[0].kernel(
        made.models, TargetDensity(made.lm, made.reward, LAM)
    )  # type: ignore[attr-defined]
    drafts = kernel.proposal
    assert drafts.tilt.level == (
        None if level is None else pytest.approx(float(warped(level)), abs=1e-6)
    )
    assert (drafts.tilt.strength, drafts.levels, drafts.rounds, drafts.end_id) == (
        1.0,
        (1.0,),
        4,
        END,
    )


@pytest.mark.parametrize("temperatures", [1, 2, 4])
def test_each_chain_has_a_rung_of_its_own(
    table_parts: Path, temperatures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """λ/K, 2 λ/K, …, λ beside each other for every text; a chain that had λ instead would still
    end at π.
    """
    seen: list[Tensor] = []
    plain = chains.cycle

    def cycle(kernels: Any, state: Any, *rest: Any) -> Any:
        seen.append(state.lam)
        return plain(kernels, state, *rest)

    monkeypatch.setattr(chains, "cycle", cycle)
    guided(table_parts, Chains(rounds=1, temperatures=temperatures)).predict_step(free(3))
    rungs = [LAM * (i + 1) / temperatures for i in range(temperatures)]
    assert seen[0].tolist() == pytest.approx(rungs * 3)


def test_what_is_no_text_is_not_accepted(table_parts: Path) -> None:
    """Words behind an end that was drawn with them: impossible, and told as such."""
    made = guided(table_parts, Annealed([DenoiseAccept(RandomTokens(3), rounds=1)]))
    kernel: Any = made.sampler.moves[0].kernel(
        made.models, TargetDensity(made.lm, made.reward, LAM)
    )  # type: ignore[attr-defined]
    state = kernel.init(torch.tensor([[0, 1, 0, 1]]).repeat(300, 1))
    new, info = kernel.step(state, seed_of(0, 0))
    impossible = info.log_ratio.isneginf()
    assert 0 < int(impossible.sum()) < 300
    assert bool((info.log_ratio < math.inf).all())
    assert not info.accepted[impossible].any()
    assert torch.equal(new.tokens[impossible], state.tokens[impossible])
