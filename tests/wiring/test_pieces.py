"""The pieces that samplers are made of, on the table and on the small base model: loading,
beginnings, starts, proposals.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import VaderSentiment
from dia_lightning.samplers import (
    Ancestral,
    Annealed,
    CriticGuidance,
    DenoiseAccept,
    Diffusion,
    GuidedSamplerModule,
    ParticleSteering,
    RewardGradient,
    Sampler,
    Spans,
    Suffix,
    Unguided,
)
from dia_lightning.samplers.guided_decoding import decode_guided
from dia_lightning.samplers.networks import (
    DenoiserProposal,
    embedding_for,
    load_critic,
    load_denoiser,
    load_labelled,
    load_value,
)
from dia_lightning.samplers.prefix import critic_of_prefixes, settled
from dia_lightning.sampling.decode import starting_point
from dia_lightning.sampling.positions import Choice
from dia_lightning.target import TargetDensity, completions, reward_inputs, whole_texts
from dia_lightning.types import Batch
from tests.oracles.table_lm import END, NEXT, T, pi
from tests.oracles.table_model import (
    P,
    TableReward,
    TableValue,
    chi_square_ok,
    free,
    soft_values,
    table_lm,
)
from tests.wiring.kit import (
    KNOTS,
    LENGTH,
    SOFT_LAM,
    apart,
    seed_of,
    times_by_hand,
    warped,
)

LAM = 1.5
SUFFIX, REDRAW = Suffix(), DenoiseAccept(Spans(2), rounds=1)
pytestmark = pytest.mark.usefixtures("on_table")


def guided(table_parts: Path, sampler: Sampler, **options: Any) -> GuidedSamplerModule:
    files = {name: str(table_parts / name) for name in ("denoiser", "critic")}
    return GuidedSamplerModule(
        TableReward(), sampler, **files | {"lam": LAM, "compare_base": False} | options
    )


# Loading.


def table_embedding() -> TokenEmbedding:
    lm = table_lm()
    return TokenEmbedding(lm.embedding_table(), len(lm.tokenizer))


def test_critics_in_units_of_the_reward(table_parts: Path) -> None:
    """A soft critic has learnt λ h: divided by its λ, and for no other λ; both are frozen."""
    z, t = torch.randn(2, T, table_embedding().dim), torch.full((2, T), 0.5)
    for name, unit, lam in (("critic", 1.0, 7.0), ("soft", SOFT_LAM, SOFT_LAM)):
        path = str(table_parts / name)
        network, settings = load_critic(path, table_embedding())
        assert settings["reward"] == "table"
        value = load_value(path, table_embedding(), "table", lam)
        torch.testing.assert_close(value(z, t), network(z, t) / unit)
        assert not value.critic.training
        assert not any(p.requires_grad for p in value.parameters())
    for asked in (None, "table"):
        assert load_critic(path, table_embedding(), asked)[1]["lam"] == SOFT_LAM
    with pytest.raises(
        UserError, match=r"for the reward 'other'; it was trained on the reward 'table'"
    ):
        load_critic(path, table_embedding(), "other")
    with pytest.raises(
        UserError, match=r"lam: 1.0 given, allowed: 2.0, for which the soft critic .* was trained"
    ):
        load_value(path, table_embedding(), "table", 1.0)
    with pytest.raises(UserError, match=r"critic: none given"):
        load_value(None, table_embedding(), "table", 1.0)
    with pytest.raises(UserError, match=r"allowed: one with labels of 'table' .*it has no labels"):
        load_labelled(str(table_parts / "denoiser"), table_embedding(), "table")
    denoiser = load_denoiser(str(table_parts / "denoiser"), table_embedding())
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    assert (
        embedding_for(table_lm(), None, str(table_parts / "critic")).fingerprint()
        == table_embedding().fingerprint()
    )


# Beginnings of texts.


def test_what_is_settled_by_hand() -> None:
    tokens = torch.tensor([[0, 1, 0, 1], [0, END, END, END], [END, 1, 1, END], [0, 1, 1, END]])
    prompt = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    want = {
        0: [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]],
        1: [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]],
        2: [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]],
        4: [[1, 1, 1, 1]] * 4,
    }
    for place, known in want.items():
        assert settled(tokens, prompt, place, END).long().tolist() == known


def test_a_critic_sees_noise_where_nothing_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise for all rows and calls, level 1 there and 0 elsewhere; in parts as in one."""
    table, seen = table_embedding(), []

    def value(z: Tensor, t: Tensor) -> Tensor:
        seen.append((z, t))
        return z.sum((1, 2)) + t.sum(1)

    noise = torch.randn(T, table.dim, generator=seed_of(0, 0))
    of = critic_of_prefixes(value, table, T, seed_of(0, 0))  # type: ignore[arg-type]
    tokens = torch.tensor([[0, 1, 0, END], [1, 1, END, END], [0, 0, 0, 0]])
    known = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    want = torch.where(known[..., None], table.weight[tokens], noise)
    for rows in (100, 1, 2):
        monkeypatch.setattr("dia_lightning.samplers.prefix.rows_at_once", lambda x, rows=rows: rows)
        seen.clear()
        torch.testing.assert_close(of(tokens, known), want.sum((1, 2)) + (~known).sum(1))
        torch.testing.assert_close(torch.cat([z for z, _ in seen]), want)
        assert torch.cat([t for _, t in seen]).tolist() == (~known).float().tolist()


@pytest.mark.parametrize(
    ("top_k", "final"), [(0, "sample"), (2, "sample"), (1, "sample"), (0, "argmax"), (2, "argmax")]
)
def test_guided_decoding_with_the_exact_value(top_k: int, final: str) -> None:
    """All tokens and the exact value: π. One candidate: p_θ's likeliest tokens. `argmax`: the
    best at each place.
    """
    batch, lm = free(3000), table_lm()
    value = TableValue(soft_values())
    tokens = decode_guided(
        lm, batch.tokens, batch.prompt_mask, value, LAM, top_k, seed_of(0, 0), final
    )
    if (top_k, final) == (0, "sample"):
        assert chi_square_ok(tokens, pi(LAM))
        return
    assert not chi_square_ok(tokens, pi(LAM))
    rows: set[tuple[int, ...]] = {()}
    for _ in range(T):
        longer = set()
        for row in rows:
            if END in row:
                longer.add((*row, END))
                continue
            kept = np.argsort(-NEXT[row])[: top_k or None]
            best = max(
                kept, key=lambda v: np.log(NEXT[row][v]) + LAM * value.values[(*row, int(v))]
            )
            longer |= {(*row, int(v)) for v in ([best] if final == "argmax" else kept)}
        rows = longer
    assert {tuple(row) for row in tokens.tolist()} == rows


def test_the_guidance_of_a_part_is_its_own(table_parts: Path) -> None:
    """λ = 0: the denoiser as it is; above, the gradient of λ scale h at each level, scaled by (1
    − u)^decay.
    """
    z, t = torch.randn(2, T, table_embedding().dim), torch.tensor([[0.2, 0.4, 0.0, 0.9]] * 2)
    plain = guided(table_parts, Diffusion(Ancestral()), lam=0.0)
    found = CriticGuidance(scale=3.0).predictor(plain.models, 1.0)(z, t, None)
    assert torch.equal(found.z0, found.z0_network)
    made = guided(table_parts, Diffusion(Ancestral()), lam=2.0)
    one, three = (
        CriticGuidance(scale=s, cap=1e9).predictor(made.models, 1.0)(z, t, None) for s in (1.0, 3.0)
    )
    torch.testing.assert_close(
        three.z0 - three.z0_network, 3 * (one.z0 - one.z0_network), rtol=1e-3, atol=1e-5
    )
    u = made.models.denoiser.schedule.unwarp(t)  # type: ignore[union-attr]
    faded = CriticGuidance(decay=0.7, cap=1e9).predictor(made.models, 1.0)(z, t, None)
    want = (one.z0 - one.z0_network) * ((1 - u) ** 0.7)[..., None]
    torch.testing.assert_close(faded.z0 - faded.z0_network, want, rtol=1e-3, atol=1e-5)


def test_the_reward_of_another_kind_has_no_gradient(table_parts: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"^guidance: RewardGradient given, but the reward 'table' has no method `soft`",
    ):
        guided(table_parts, Diffusion(guidance=RewardGradient()))
    with pytest.raises(
        UserError, match=r"^guidance: RewardGradient given, but the reward 'sentiment'"
    ):
        GuidedSamplerModule(
            VaderSentiment(),
            Diffusion(guidance=RewardGradient()),
            denoiser=str(table_parts / "denoiser"),
        )


# Where the reverse process starts.


@pytest.mark.parametrize("strength", [None, 0.35, 0.6, 1.0])
@pytest.mark.parametrize(("steps", "stagger"), [(10, 0.0), (5, 3.0), (4, 40.0), (1, 0.0)])
def test_times_and_noise_of_a_start(steps: int, stagger: float, strength: float | None) -> None:
    """Times fall to 0 and pass no level above the start's; what is given is clean; a source is
    noised to its level.
    """
    schedule, table = make_schedule("cosine"), TokenEmbedding(torch.randn(5, 4))
    schedule.set_warp(KNOTS)
    tokens = torch.tensor([[1, 2, 3, 3, 3, 3, 3, 3], [3] * LENGTH])
    mask = torch.tensor([[True, True] + [False] * (LENGTH - 2), [False] * (LENGTH - 1) + [True]])
    batch = Batch(0, [0, 1], ["", ""], tokens, mask)
    begin = None if strength is None else torch.arange(2 * LENGTH).view(2, LENGTH) % 5
    options = {} if strength is None else {"begin": begin, "strength": strength}
    z, times = starting_point(batch, table, schedule, steps, stagger, seed_of(0, 0), **options)
    most = warped(1.0 if strength is None else strength)
    grid = times_by_hand(steps, stagger).clamp_max(float(most))
    # Rows at the start's own level are run through once.
    same = sum(bool(torch.allclose(row, most.expand(LENGTH), atol=1e-6)) for row in grid)
    grid = grid[max(0, same - 1) :] if begin is not None else grid
    torch.testing.assert_close(
        times, torch.where(mask, 0.0, grid[:, None].expand(-1, 2, -1)), atol=1e-5, rtol=0
    )
    assert not times[-1].any()
    noise = torch.randn(2, LENGTH, 4, generator=seed_of(0, 0))
    clean = table.weight[tokens]
    if begin is not None:
        noise = schedule.alpha(most) * table.weight[begin] + schedule.sigma(most) * noise
    torch.testing.assert_close(z, torch.where(mask[..., None], clean, noise), atol=1e-5, rtol=1e-5)


def test_texts_with_blanks_are_read_whole(lm: BaseLM) -> None:
    """A word behind a free place is part of the text; a prompt at the left and fixed ends are
    not.
    """
    words = lm.tokenizer("the good food is near")["input_ids"]
    tokens = torch.tensor([[*words, lm.end_id, lm.end_id]] * 4)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[1, :2], mask[2, [0, 2]], mask[3, -1] = True, True, True
    whole = lm.decode(tokens, torch.zeros_like(mask))
    beginning = lm.tokenizer.decode(words[:2])
    batch = Batch(0, [0, 1, 2, 3], ["", beginning, "the", ""], tokens, mask)
    texts = completions(lm, tokens, batch)
    assert texts == [whole[0], whole[1][len(beginning) :], whole[2], whole[3]]
    assert whole_texts(lm, texts, batch) == whole
    assert reward_inputs(lm, tokens, batch) == whole
    batch.whole = False
    assert reward_inputs(lm, tokens, batch) == texts
    plain = Batch(0, [0, 1], ["", beginning], tokens[:2], mask[:2])
    assert completions(lm, tokens[:2], plain) == texts[:2]


# Proposals.


def test_a_proposal_is_the_denoiser_at_the_positions_asked(
    parts: Path, embedding: TokenEmbedding
) -> None:
    network = load_denoiser(str(parts / "denoiser"), embedding)
    z, t = torch.randn(3, LENGTH, embedding.dim), torch.rand(3, LENGTH)
    with torch.no_grad():
        want = network(z, t)
    proposal, index = DenoiserProposal(network), torch.tensor([[0, 7, 3], [2, 2, 1], [5, 0, 6]])
    torch.testing.assert_close(proposal(z, t), want)
    torch.testing.assert_close(
        proposal.at(z, t, index), torch.stack([w[i] for w, i in zip(want, index, strict=True)])
    )


@pytest.mark.parametrize("level", [0.3, 0.8])
def test_the_tilt_is_the_first_order_change_of_the_value(table_parts: Path, level: float) -> None:
    """κ λ α_c ∇ h at each chosen place, by finite differences, with λ of each chain."""
    made = guided(table_parts, Annealed([DenoiseAccept(tilt=0.7)]))
    kernel: Any = made.sampler.moves[0].kernel(
        made.models, TargetDensity(made.lm, made.reward, LAM)
    )  # type: ignore[attr-defined]
    weight = torch.randn(T, made.embedding.dim, generator=seed_of(0, 0))
    value = lambda z, t: ((1 + t)[..., None] * weight * z).sum((1, 2))  # noqa: E731
    drafts = kernel.proposal
    drafts.tilt = replace(drafts.tilt, critic=value)
    tokens, lam = (
        torch.tensor([[0, 1, END, END], [1, 1, 0, 0]]),
        torch.tensor([0.5, 2.0], dtype=torch.float64),
    )
    state = kernel.init(tokens, lam=lam)
    place, t = torch.tensor([[1, 0], [3, 1]]), torch.full((2, 1), level)
    z = torch.randn(2, 2, made.embedding.dim)
    push = drafts._push(state, Choice(place, torch.ones(2, 2, dtype=torch.bool)), z, t)
    alpha = made.models.denoiser.schedule.alpha(torch.tensor(level))  # type: ignore[union-attr]
    want = 0.7 * lam.float()[:, None, None] * alpha * (1 + level) * weight[place]
    torch.testing.assert_close(push, want)
    # Of a power target λ is in the reward, and chains rise to 1.
    power = TargetDensity(made.lm, made.reward, LAM, alpha=2.0)
    tilt = made.sampler.moves[0].kernel(made.models, power).proposal.tilt  # type: ignore[attr-defined]
    assert tilt.strength == pytest.approx(0.7 * LAM)


@pytest.mark.parametrize(("steps", "stagger"), [(1, 0.0), (4, 0.0), (5, 3.0), (6, 40.0)])
def test_one_particle_is_the_ancestral_sampler(
    table_parts: Path, steps: int, stagger: float
) -> None:
    """To the token, also of positions that arrive before others and behind prompts."""
    batch = apart(40, 1)
    batch.prompt_mask[::2] = False
    batch.prompts[::2] = [""] * 20
    one = guided(
        table_parts, ParticleSteering(Unguided(), particles=1, steps=steps, stagger=stagger)
    )
    plain = guided(table_parts, Diffusion(Ancestral(), Unguided(), steps=steps, stagger=stagger))
    assert torch.equal(
        one.draw(batch, seed_of(0, 0)).tokens, plain.draw(batch, seed_of(0, 0)).tokens
    )


def test_all_tokens_are_candidates_of_a_single_text() -> None:
    """Its number is no bound: 200 draws of one text have the law of 200 texts."""
    lm, batch = table_lm(), free(1)
    texts = [
        decode_guided(lm, batch.tokens, batch.prompt_mask, None, 0.0, 0, seed_of(i, 0))
        for i in range(200)
    ]
    assert chi_square_ok(torch.cat(texts), P)
    few = [
        decode_guided(lm, batch.tokens, batch.prompt_mask, None, 0.0, 2, seed_of(i, 0))
        for i in range(200)
    ]
    for row in torch.cat(few).tolist():
        for i in range(T):
            assert END in row[:i] or NEXT[tuple(row[:i])][row[i]] > NEXT[tuple(row[:i])].min()
