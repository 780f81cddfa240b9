"""Small parts of sampling in plain loops, with scripted kernels: what each step counts,
remembers and refuses.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from dia_lightning.sampling.adaptation import Adapted
from dia_lightning.sampling.annealing import (
    anneal,
    cycle,
    from_base,
    particles_of,
    pick,
    pick_by_weight,
    weight_diagnostics,
)
from dia_lightning.sampling.denoise_accept import DenoiserDrafts, Tilt
from dia_lightning.sampling.ensemble import Drafts, EnsembleKernel
from dia_lightning.sampling.langevin import DualAveraging
from dia_lightning.sampling.positions import Choice, RandomTokens, Spans, WholeText
from dia_lightning.sampling.resampling import next_temperature
from dia_lightning.sampling.state import Info, State, start, take
from dia_lightning.sampling.tempering import Tempering, swap_neighbours
from dia_lightning.target import Terms
from dia_lightning.types import Batch
from tests.oracles.scripted import Scripted, chains

F64 = torch.float64


# Adaptation.


@pytest.mark.parametrize(("burn_in", "rate"), [(1, None), (2, None), (7, 0.6), (8, 0.2)])
def test_the_place_on_the_ladder_step_by_step(burn_in: int, rate: float | None) -> None:
    """i ← i + 2 n^−0.6 (rate − target), held on the ladder; at the end the mean over the second
    half of burn-in.
    """
    rng, n = np.random.default_rng(burn_in), 20
    script = (rng.random((burn_in + 3, n)) < rng.random((burn_in + 3, 1))).tolist()
    rungs = [Scripted() for _ in range(4)]
    kernel = Adapted(rungs, burn_in) if rate is None else Adapted(rungs, burn_in, rate)
    place, later = 1.5, []
    generator = torch.Generator()
    for step, given in enumerate(script):
        assert kernel.place == pytest.approx(place)
        rung = rungs[round(place)]
        rung.accepted, rung.steps = [given], 0
        _, info = kernel.step(chains([0.0] * n), generator)
        assert info.accepted.tolist() == given
        if step < burn_in:
            place += 2 * (step + 1) ** -0.6 * (np.mean(given) - (0.35 if rate is None else rate))
            place = min(3.0, max(0.0, place))
            later += [place] if step >= burn_in // 2 else []
            place = float(np.mean(later)) if step == burn_in - 1 else place


@pytest.mark.parametrize("accepted", [False, True])
def test_the_place_stays_on_the_ladder(accepted: bool) -> None:
    """All moves rejected: the easiest kernel; all accepted: the hardest."""
    rungs = [Scripted(accepted=[[accepted] * 3] * 20) for _ in range(4)]
    kernel = Adapted(rungs, 20)
    for step in range(20):
        kernel.step(chains([0.0] * 3), torch.Generator())
        assert -1e-9 < kernel.place < 3 + 1e-9
        assert step < 3 or kernel.place == pytest.approx(3 if accepted else 0)


@pytest.mark.parametrize(
    ("ladder", "burn_in", "rate"), [(0, 5, 0.35), (1, -1, 0.35), (1, 5, 0.0), (1, 5, 1.0)]
)
def test_adaptation_refuses(ladder: int, burn_in: int, rate: float) -> None:
    with pytest.raises(
        ValueError, match=f"ladder {ladder}, burn_in {burn_in}, rate {rate}: allowed are"
    ):
        Adapted([Scripted()] * ladder, burn_in, rate)
    assert Adapted([Scripted()], 0, 1e-9).place == 0
    assert Adapted([Scripted()], 0, 1 - 1e-9).current is not None


def test_dual_averaging_step_by_step() -> None:
    """Hoffman and Gelman, eq. 6, in floats: H̄, log ε and log ε̄ of each step; from burn-in on
    nothing moves.
    """
    dual, rng = (
        DualAveraging(0.3, burn_in=6, target=0.7, gamma=0.1, m_0=4.0, kappa=0.6),
        np.random.default_rng(0),
    )
    state = dual.init(torch.device("cpu"))
    assert float(state.log_eta) == pytest.approx(math.log(0.3))
    error, mean = 0.0, 0.0
    for k in range(9):
        accepted = rng.random(5)
        state = dual.update(state, torch.tensor(accepted), k)
        if k < 6:
            m = k + 1
            error += (0.7 - accepted.mean() - error) / (m + 4.0)
            log_eta = math.log(10 * 0.3) - m**0.5 / 0.1 * error
            mean = m**-0.6 * log_eta + (1 - m**-0.6) * mean
        assert float(state.error) == pytest.approx(error)
        assert float(state.log_eta_mean) == pytest.approx(mean)
        assert float(state.log_eta) == pytest.approx(mean if k >= 5 else log_eta)


# Rounds of moves.


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_shares_of_accepted_moves(rounds: int) -> None:
    one, two = np.random.default_rng(0).random((2, 3, 4)) < 0.5
    kernels = [
        Scripted(accepted=one.tolist()),
        Scripted(lambda s: s._replace(reward=s.reward + 1), two.tolist()),
    ]
    state, followed = cycle(kernels, chains([0, 1, 2, 3]), rounds, torch.Generator())
    np.testing.assert_allclose(followed.accepted, [one[:rounds].mean(0), two[:rounds].mean(0)])
    assert followed.reward.tolist() == [[k + i for i in range(4)] for k in range(1, rounds + 1)]
    assert [kernel.steps for kernel in kernels] == [rounds, rounds]
    assert state.reward.tolist() == followed.reward[-1].tolist()


def test_no_rounds() -> None:
    state, followed = cycle([Scripted()], chains([1.0, 2.0]), 0, torch.Generator())
    assert followed.accepted.tolist() == [[0, 0]]
    assert followed.reward.shape == followed.log_base.shape == (0, 2)
    assert state.reward.tolist() == [1, 2]


def test_the_trace_of_an_annealed_population() -> None:
    """λ, effective size and acceptance of each temperature, from the rewards alone, and `moves`
    rounds at each.
    """

    class Kept(Scripted):
        lam = 2.0

        def terms(self, tokens: Tensor) -> Terms:
            return Terms(torch.zeros(len(tokens), dtype=F64), tokens[:, 0].double())

    target, kernel = Kept(), Kept()
    tokens = torch.arange(12)[:, None]
    begin = from_base(target, tokens, torch.zeros_like(tokens, dtype=torch.bool))  # type: ignore[arg-type]
    state, log_z, trace = anneal(
        target, [kernel], begin, 2, torch.Generator().manual_seed(0), 0.6, 3
    )  # type: ignore[arg-type]
    first = [brentq(lambda d, g=g: ess(d * np.arange(6.0) + g) - 3.6, 0, 2) for g in (0, 6)]
    np.testing.assert_allclose(trace.lam[0], first, rtol=1e-9)
    np.testing.assert_allclose(trace.ess[0], [3.6, 3.6], rtol=1e-9)
    assert bool((trace.ess >= 3.6 - 1e-9).all())
    assert trace.lam[-1].tolist() == [2, 2]
    assert trace.accepted.tolist() == [[1.0]] * len(trace.lam)
    assert kernel.steps == 3 * len(trace.lam)
    assert log_z.shape == (2,)
    assert state.lam.tolist() == [2] * 12
    for wrong in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="ess must be between 0 and 1"):
            anneal(target, [], begin, 2, torch.Generator(), wrong)  # type: ignore[arg-type]


def ess(log_w: np.ndarray) -> float:
    w = np.exp(log_w - log_w.max())
    return float(w.sum() ** 2 / (w**2).sum())


def test_the_next_temperature_is_the_root() -> None:
    """Where the effective size is the share wanted, found by another method; λ_max where that
    keeps enough.
    """
    rng = np.random.default_rng(2)
    rewards, log_w = rng.normal(size=(3, 9)), 0.2 * rng.normal(size=(3, 9))
    lam = np.array([0.0, 0.5, 1.0])
    got = next_temperature(*(torch.tensor(x) for x in (rewards, log_w, lam)), 50.0, 0.4)
    want = [
        brentq(lambda x, g=g: ess(log_w[g] + (x - lam[g]) * rewards[g]) - 3.6, lam[g], 50)
        for g in range(3)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-9)
    near = next_temperature(*(torch.tensor(x) for x in (rewards, log_w, lam)), 1.01, 0.4)
    assert near.tolist() == [1.01] * 3


# Several particles for each text.


def a_batch() -> Batch:
    tokens = torch.tensor([[0, 9], [1, 9], [0, 9], [2, 9], [1, 8]])
    records = [{}, {"a": 1}, {}, {"a": 1}, {"a": 1}]
    return Batch(7, [10, 11, 12, 13, 14], ["x", "y", "x", "z", "y"], tokens, tokens < 3, records)


def test_crowds_by_hand() -> None:
    """Texts 0 and 2 share a prompt; 1 and 4 have one each, whose records merely look alike. All
    populations are as large.
    """
    crowd, n_groups, group = particles_of(a_batch(), 3)
    assert n_groups == 4
    assert group.tolist() == [0, 1, 0, 2, 3]
    assert crowd.prompts == ["x"] * 6 + ["y"] * 6 + ["z"] * 6 + ["y"] * 6
    assert crowd.ids == list(range(24))
    assert crowd.tokens.tolist() == [[0, 9]] * 6 + [[1, 9]] * 6 + [[2, 9]] * 6 + [[1, 8]] * 6
    assert crowd.records[6] is not crowd.records[18]
    shared = a_batch()
    shared.records[4] = shared.records[1]
    assert particles_of(shared, 1)[2].tolist() == [0, 1, 0, 2, 1]
    # Prompts of 2, 2 and 1 texts: two islands each, of one text's particles.
    crowd, n_groups, group = particles_of(shared, 3, 1)
    assert (n_groups, group.tolist()) == (6, [0, 1, 0, 2, 1])
    assert crowd.prompts == ["x"] * 6 + ["y"] * 6 + ["z"] * 6
    for many in (0, 2, 9):
        assert particles_of(shared, 3, many)[1] == 3
    some = a_batch().take(torch.tensor([3, 3, 0]))
    assert (some.ids, some.prompts, some.index) == ([13, 13, 10], ["z", "z", "x"], 7)
    assert some.prompt_mask.tolist() == [[True, False]] * 3
    assert some.records == [{"a": 1}, {"a": 1}, {}]


def test_each_text_gets_a_particle_of_its_own() -> None:
    """500 draws: of the own population, none twice, and each particle as often as any other (5
    s.e., 2e-5 in all).
    """
    group, generator = torch.tensor([0, 1, 0, 0]), torch.Generator().manual_seed(0)
    seen = torch.stack([pick(group, 5, generator) for _ in range(500)])
    assert bool(((seen // 5) == group).all())
    assert all(len(set(row)) == 4 for row in seen.tolist())
    for text in range(4):
        count = np.bincount(seen[:, text] % 5, minlength=5)
        assert (np.abs(count - 100) < 5 * (500 * 0.2 * 0.8) ** 0.5).all()
    # More texts than particles: all of them before any is taken again.
    many = pick(torch.zeros(7, dtype=torch.long), 3, generator).bincount().tolist()
    assert sorted(many) == [2, 2, 3]
    log_w = torch.full((2, 5), -math.inf, dtype=F64)
    log_w[0, 3], log_w[1, 1] = 0.0, 2.0
    for scheme in ("systematic", "stratified", "multinomial"):
        assert pick_by_weight(log_w, scheme, group, generator).tolist() == [3, 6, 3, 3]


def test_figures_of_weights_by_hand() -> None:
    log_w = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -math.inf, -math.inf]], dtype=F64)
    roots = torch.tensor([[0, 1, 1, 0], [2, 2, 2, 2]])
    log_z, resampled = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    found = weight_diagnostics(log_z, log_w, roots, resampled)
    assert {name: values.tolist() for name, values in found.items()} == {
        "log_z": [1, 2], "ess": [1, 0.5], "roots": [0.5, 0.25], "resampled": [3, 4],
    }  # fmt: skip


# Positions.


@pytest.mark.parametrize("n", [1, 2, 6])
def test_the_ratio_of_spans_one_row_or_many(n: int) -> None:
    """Four places, end token 9: the numbers of spans that touch each text, and −inf where the
    text no longer reaches.
    """
    tokens = torch.tensor([[5, 5, 5, 9]]).expand(n, -1)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    spans = Spans(3)
    # Places 2 and 3, the third lies behind the row.
    choice = Choice(
        torch.tensor([[2, 3, 3]]).expand(n, -1), torch.tensor([[True, True, False]]).expand(n, -1)
    )
    shorter = torch.tensor([[5, 5, 9, 9]]).expand(n, -1)
    torch.testing.assert_close(
        spans.log_ratio(choice, tokens, shorter, mask, 9),
        torch.full((n,), math.log(6 / 5), dtype=F64),
    )
    out = torch.tensor([[5, 9, 9, 9]]).expand(n, -1)
    assert spans.log_ratio(choice, tokens, out, mask, 9).tolist() == [-math.inf] * n
    # Only the last place: text of four tokens is touched, one of three is not.
    last = Choice(
        torch.tensor([[3, 3, 3]]).expand(n, -1), torch.tensor([[True, False, False]]).expand(n, -1)
    )
    assert spans.log_ratio(last, tokens, tokens, mask, 9).tolist() == [0] * n
    assert spans.log_ratio(last, tokens, shorter, mask, 9).tolist() == [-math.inf] * n
    assert WholeText().log_ratio(last, tokens, shorter, mask, 9).tolist() == [0] * n


def test_random_tokens_by_hand() -> None:
    """300 draws: only free places are valid, none twice, each as often as any other; all where
    there are fewer.
    """
    mask = torch.tensor([[True, False, False, False, False], [True, True, True, False, True]])
    tokens, generator = torch.zeros(2, 5, dtype=torch.int64), torch.Generator().manual_seed(0)
    counts = np.zeros(5)
    for _ in range(300):
        place, valid = RandomTokens(3).draw(tokens, mask, None, generator)
        assert place.shape == valid.shape == (2, 3)
        assert valid.sum(1).tolist() == [3, 1]
        assert place[1][valid[1]].tolist() == [3]
        assert len(set(place[0].tolist())) == 3
        counts += np.bincount(place[0], minlength=5)
    assert counts[0] == 0
    assert (np.abs(counts[1:] - 225) < 5 * (300 * 0.75 * 0.25) ** 0.5).all()
    place, valid = WholeText().draw(tokens, mask, None, generator)
    assert place.tolist() == [list(range(5))] * 2
    assert valid.tolist() == (~mask).tolist()


# Accepting.


def scripted(
    state: State, log_q: list[float], terms: dict[int, tuple[float, float]]
) -> tuple[State, Info]:
    """One step to the one draft of each chain, its tokens and 10; `terms` by the draft's first
    token, `log_q` (chain's own minus draft's) by the chain.
    """

    class Told:
        def terms(self, tokens: Tensor) -> Terms:
            found = [terms.get(i, (0.0, 0.0)) for i in tokens[:, 0].tolist()]
            return Terms(*torch.tensor(found, dtype=F64).T)

    ratio = torch.stack([torch.zeros(len(log_q), dtype=F64), -torch.tensor(log_q, dtype=F64)], 1)
    drafts = Drafts(state.tokens[:, None] + 10, ratio)
    kernel = EnsembleKernel(Told(), lambda *given: drafts)  # type: ignore[arg-type]
    return kernel.step(state, torch.Generator().manual_seed(0))


def test_a_state_after_a_move() -> None:
    """Row 0 moves, row 1 stays, row 2 has no ratio, row 3's draft is no text, row 4's is one
    without probability, which is no wonder.
    """
    old = chains([1.0, 2.0, 3.0, 4.0, 5.0])
    terms = {10: (5.0, 7.0), 11: (5.0, -1e9), 12: (0.0, math.nan), 14: (-math.inf, math.nan)}
    state, info = scripted(old, [0.0, 0.0, 0.0, -math.inf, 0.0], terms)
    assert info.accepted.tolist() == [True, False, False, False, False]
    assert state.tokens[:, 0].tolist() == [10, 1, 2, 3, 4]
    assert state.reward.tolist() == [7, 2, 3, 4, 5]
    assert state.log_base.tolist() == [5, 0, 0, 0, 0]
    assert info.undefined is not None
    assert info.undefined.tolist() == [False, False, True, False, False]
    assert info.log_ratio.tolist() == [11, -1e9 - 2 + 5, -math.inf, -math.inf, -math.inf]
    assert state.log_prob.tolist() == [12, 2, 3, 4, 5]
    assert state.read is None


def test_a_move_is_accepted_as_often_as_its_ratio_says() -> None:
    """40,000 rows at ratio 0.3, within 5 standard errors (6e-7)."""
    n = 40_000
    _, info = scripted(chains([0.0] * n), [math.log(0.3)] * n, {})
    assert abs(float(info.accepted.double().mean()) - 0.3) < 5 * (0.3 * 0.7 / n) ** 0.5


def test_where_chains_start() -> None:
    class Plain:
        def log_prob(self, tokens: Tensor) -> Tensor:
            return tokens[:, 0].double()

    tokens = torch.tensor([[3], [4]])
    state = start(Plain(), tokens)
    assert (state.lam.tolist(), state.log_base.tolist(), state.read) == ([0, 0], [3, 4], None)
    assert not state.prompt_mask.any()
    given = start(
        Plain(), tokens, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([1.0, 2.0])
    )
    assert given.prompt_mask.all()
    assert given.lam.tolist() == [1, 2]
    assert take(given, torch.tensor([1, 1, 0])).lam.tolist() == [2, 2, 1]


# Parallel tempering.


@pytest.mark.parametrize("ladder", [[], [-0.1, 1.0], [0.5, 0.5], [0.0, 2.0, 1.0]])
def test_a_ladder_that_does_not_rise(ladder: list[float]) -> None:
    with pytest.raises(ValueError, match="ladder must rise from 0 or more"):
        Tempering(Scripted(), [], ladder)  # type: ignore[arg-type]
    assert Tempering(Scripted(), [], [0.0, 1e-9]).ladder == [0.0, 1e-9]  # type: ignore[arg-type]


@pytest.mark.parametrize("n_rungs", [2, 3, 4])
def test_swaps_of_neighbours(n_rungs: int) -> None:
    """2,000 groups: who swaps with whom, at which ratio, and that texts move while λ stays."""
    n, generator = 2000, torch.Generator().manual_seed(0)
    lam = torch.arange(n_rungs, dtype=F64) * 0.7
    reward = torch.tensor([0.3, -0.2, 0.9, 0.1][:n_rungs], dtype=F64)
    state = chains([0.0] * (n * n_rungs))._replace(lam=lam.repeat(n), reward=reward.repeat(n))
    after, info = swap_neighbours(state, n_rungs, generator)
    assert torch.equal(after.lam, state.lam)
    source = after.tokens[:, 0].view(n, n_rungs) - n_rungs * torch.arange(n)[:, None]
    assert bool((source.sort(1).values == torch.arange(n_rungs)).all())
    assert bool(((source != torch.arange(n_rungs)) == info.accepted.view(n, -1)).all())
    assert torch.equal(after.reward.view(n, -1), reward[source])
    ratios = info.log_ratio.view(n, n_rungs)
    for i in range(n_rungs - 1):
        j = i + 1
        want = float((lam[i] - lam[j]) * (reward[j] - reward[i]))
        # Half of the groups propose this pair, and chains without a partner have no ratio.
        proposed = (ratios[:, i] - want).abs() < 1e-12
        paired = proposed & ((ratios[:, j] - want).abs() < 1e-12)
        assert abs(float(paired.double().mean()) - 0.5) < 5 * (0.25 / n) ** 0.5
        swapped = (source[:, i] == j) & (source[:, j] == i)
        rate, chance = float(swapped[paired].double().mean()), min(1.0, math.exp(want))
        assert abs(rate - chance) < 5 * (chance * (1 - chance) / (n / 2)) ** 0.5 + 1e-9
        assert not swapped[~paired].any()
    assert bool(ratios[:, 0].isneginf().any())


def test_rungs_and_rows() -> None:
    ladder = Tempering(Scripted(), [Scripted(), Scripted()], [0.5, 1.0, 2.0])  # type: ignore[arg-type]
    state = ladder.init(torch.arange(6)[:, None])
    assert state.lam.tolist() == [0.5, 1.0, 2.0] * 2
    with pytest.raises(ValueError, match="5 rows given, not a multiple of the 3 rungs"):
        ladder.init(torch.arange(5)[:, None])
    ladder.kernels = [Scripted(accepted=[[False] * 6]), Scripted(accepted=[[True, False] * 3])]
    state = state._replace(reward=torch.tensor([9.0, 0.0, -9.0] * 2, dtype=F64) * 1e9)
    _, info = ladder.step(state, torch.Generator().manual_seed(0))
    swapped = {0, 1} if info.log_ratio[2].isneginf() else {1, 2}
    other = {3, 4} if info.log_ratio[5].isneginf() else {4, 5}
    assert {i for i in range(6) if info.accepted[i]} == {0, 2, 4} | swapped | other


def test_limits_of_denoise_and_accept() -> None:
    def made(**options: Any) -> DenoiserDrafts:
        return DenoiserDrafts(None, None, None, **options)  # type: ignore[arg-type]

    for wrong in (
        {"rounds": 0},
        {"levels": ()},
        {"levels": (0.0,)},
        {"levels": (0.5, 1 + 1e-9)},
        {"levels": (-0.1, 1.0)},
    ):
        with pytest.raises(ValueError, match=r"^rounds must be 1 or more and levels in \(0, 1\]"):
            made(**wrong)
    tilt = Tilt(lambda z, t: z, 0.1)
    assert (made(tilt=tilt).tilt, made(tilt=replace(tilt, strength=0.0)).tilt) == (tilt, None)
    plain = made(rounds=1, levels=(1e-9, 1.0))
    assert (plain.rounds, plain.levels, plain.positions, plain.end_id) == (
        1,
        (1e-9, 1.0),
        Spans(8),
        None,
    )
    assert made(positions=Spans(2)).positions == Spans(2)


def test_a_ratio_that_is_no_number_is_told_through_tempering() -> None:
    """Of any of the kernels, and of one that cannot tell none."""

    class Undefined(Scripted):
        def __init__(self, undefined: list[bool] | None) -> None:
            super().__init__()
            self.undefined = undefined

        def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
            state, info = super().step(state, generator)
            return state, info._replace(
                undefined=None if self.undefined is None else torch.tensor(self.undefined)
            )

    kernels = [
        Undefined([True, False, False, False]),
        Undefined(None),
        Undefined([False, False, True, False]),
    ]
    ladder = Tempering(Scripted(), kernels, [0.5, 1.0])  # type: ignore[arg-type]
    _, info = ladder.step(chains([0.0] * 4), torch.Generator().manual_seed(0))
    assert info.undefined is not None
    assert info.undefined.tolist() == [True, False, True, False]
