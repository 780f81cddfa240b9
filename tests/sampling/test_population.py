"""The annealed population on a model small enough to enumerate."""

import numpy as np
import pytest
import torch

from dia_lightning.sampling.annealing import (
    AnnealingTrace,
    ancestry,
    anneal,
    cycle,
    from_base,
    pick_islands,
    resample,
    resample_down,
)
from dia_lightning.sampling.diagnostics import log_z_reverse
from dia_lightning.sampling.drafts import SuffixDrafts
from dia_lightning.sampling.ensemble import EnsembleKernel
from dia_lightning.sampling.resampling import log_mean_exp
from tests.oracles.table_lm import END, LOG_P, REWARD, ROWS, T, TableTarget, codes, pi

LAM = 3.0


def run(  # type: ignore[no-untyped-def]
    n_groups: int, size: int, seed: int, moves: int = 1, ess: float = 0.5, lam: float = LAM,
    islands: int = 1,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    target = TableTarget(lam)
    empty = torch.full((n_groups * size, T), END)
    mask = torch.zeros_like(empty, dtype=torch.bool)
    tokens = target.lm.generate(empty, mask, generator)
    kernels = [EnsembleKernel(target, SuffixDrafts(target.lm))] if moves else []
    begin = from_base(target, tokens, mask)
    return anneal(target, kernels, begin, n_groups, generator, ess, moves, islands)


def total_variation(counts: np.ndarray, want: np.ndarray) -> float:
    return 0.5 * float(np.abs(counts / counts.sum() - want).sum())


def test_the_particles_are_distributed_as_pi() -> None:
    """20,000 particles: total variation to π against that of 20,000 exact draws, whose mean over
    seeds is the floor.
    """
    state, _, trace = run(1, 20_000, 0)
    assert len(trace.lam) >= 3
    counts = np.bincount(codes(state.tokens), minlength=len(ROWS))
    rng = np.random.default_rng(0)
    floor = np.mean([total_variation(rng.multinomial(20_000, pi(LAM)), pi(LAM)) for _ in range(50)])
    start = total_variation(np.exp(LOG_P), pi(LAM))
    assert start > 0.5
    assert total_variation(counts, pi(LAM)) < floor + 0.02
    torch.testing.assert_close(state.reward, torch.tensor(REWARD[codes(state.tokens)]))
    assert bool((state.lam == LAM).all())


def test_log_z() -> None:
    """200 populations of 500: log Z within 3 standard errors, and the mean of Ẑ / Z within 4
    standard errors of 1 (6e-5).
    """
    exact = float(np.log(np.exp(LOG_P + LAM * REWARD).sum()))
    _, log_z, trace = run(200, 500, 1)
    assert log_z.shape == (200,)
    ratio = (log_z - exact).exp().numpy()
    error = ratio.std(ddof=1) / 200**0.5
    assert error < 0.02
    assert (
        abs(ratio.mean() - 1) < 4 * error + 0.005
    )  # the adaptation of the temperatures costs O(1 / 500)
    assert abs(float(log_z.mean()) - exact) < 3 * float(log_z.std()) / 200**0.5 + 0.01
    # Every rise keeps half of the particles effective; the last one may keep more.
    assert bool((trace.ess >= 0.49 * 500).all())


def test_log_z_lies_between_its_bounds() -> None:
    """200 populations of 50: on average log Ẑ is below log Z and the bound from exact draws of π
    above, by more than 4 s.e.
    """
    exact = float(np.log(np.exp(LOG_P + LAM * REWARD).sum()))
    _, lower, _ = run(200, 50, 4)
    rng = np.random.default_rng(5)
    upper = log_z_reverse(torch.tensor(REWARD[rng.choice(len(ROWS), (200, 50), p=pi(LAM))]), LAM)
    for bound, sign in ((lower, -1), (upper, 1)):
        error = float(bound.std()) / 200**0.5
        assert 4 * error < sign * (float(bound.mean()) - exact) < 1


def test_lambda_zero_is_the_base_model() -> None:
    state, log_z, trace = run(2, 50, 2, lam=0.0)
    generator = torch.Generator().manual_seed(2)
    empty = torch.full((100, T), END)
    assert torch.equal(
        state.tokens,
        TableTarget(0.0).lm.generate(empty, torch.zeros_like(empty, dtype=torch.bool), generator),
    )
    assert log_z.tolist() == [0, 0]
    assert len(trace.lam) == 0


def test_without_moves_it_is_importance_resampling() -> None:
    """Only samples of p_θ survive, in proportion to exp(λ r)."""
    state, _, trace = run(1, 4000, 3, moves=0)
    assert trace.accepted.shape[1] == 0
    mean = float(state.reward.mean())
    want = float((pi(LAM) * REWARD).sum())
    assert abs(mean - want) < 0.1
    assert mean > float((np.exp(LOG_P) * REWARD).sum()) + 0.5


def test_many_texts_thinned_to_few_particles() -> None:
    """One population of 80,000 thinned to 10,000: exact at the λ it stops at, and annealed from
    there at π.

    Total variation against the mean of exact draws of that size, and log Z of both parts, within
    0.02.
    """
    generator, target = torch.Generator().manual_seed(6), TableTarget(LAM)
    empty = torch.full((80_000, T), END)
    mask = torch.zeros_like(empty, dtype=torch.bool)
    many = from_base(target, target.lm.generate(empty, mask, generator), mask)
    few, log_w, ancestors = resample_down(many, 1, 10_000, LAM, generator)
    assert torch.equal(few.tokens, many.tokens[ancestors[0]])
    log_z = log_mean_exp(log_w)
    reached = float(few.lam[0])
    assert 0 < reached < LAM
    assert len(few.tokens) == 10_000
    weights = (reached * many.reward).softmax(0)
    assert abs(1 / float(weights.square().sum()) - 10_000) < 1
    state, rest, _ = anneal(
        target, [EnsembleKernel(target, SuffixDrafts(target.lm))], few, 1, generator
    )
    rng = np.random.default_rng(0)
    for found, lam in ((few, reached), (state, LAM)):
        floor = np.mean(
            [total_variation(rng.multinomial(10_000, pi(lam)), pi(lam)) for _ in range(50)]
        )
        assert (
            total_variation(np.bincount(codes(found.tokens), minlength=len(ROWS)), pi(lam))
            < floor + 0.02
        )
    for estimate, lam in ((log_z, reached), (log_z + rest, LAM)):
        assert abs(float(estimate) - float(np.log(np.exp(LOG_P + lam * REWARD).sum()))) < 0.02


def test_populations_do_not_mix() -> None:
    """Two populations of which one holds a single text keep to their own."""
    target, generator = TableTarget(LAM), torch.Generator().manual_seed(0)
    tokens = torch.tensor([ROWS[0]] * 50 + [ROWS[5]] * 50)
    state, log_z, _ = anneal(
        target,
        [],
        from_base(target, tokens, torch.zeros_like(tokens, dtype=torch.bool)),
        2,
        generator,
    )
    assert set(codes(state.tokens[:50])) == {0}
    assert set(codes(state.tokens[50:])) == {5}
    torch.testing.assert_close(log_z, torch.tensor(LAM * REWARD[[0, 5]]))


def test_cycle_reports_every_step() -> None:
    target = TableTarget(1.0)
    kernel = EnsembleKernel(target, SuffixDrafts(target.lm))  # type: ignore[arg-type]
    state, followed = cycle(
        [kernel, kernel], kernel.init(torch.tensor(ROWS)), 3, torch.Generator().manual_seed(0)
    )
    assert followed.accepted.shape == (2, len(ROWS))
    assert followed.reward.shape == (3, len(ROWS))
    torch.testing.assert_close(followed.reward[-1], state.reward)


def test_ess_is_checked() -> None:
    with pytest.raises(ValueError, match="ess must be"):
        run(1, 10, 0, ess=1.0)


# Islands: many small populations of one prompt.


@pytest.mark.parametrize(("size", "moves"), [(1, 1), (2, 0), (2, 1), (4, 1)])
def test_islands_weighted_by_their_z_are_exact(size: int, moves: int) -> None:
    """20,000 particles in islands of a few: weighted by Ẑ at the noise of as many independent draws
    as their effective number (mean over 50 samples, twice that and 0.01), unweighted far off.
    """
    n = 20_000 // size
    state, log_z, _ = run(n, size, 1, moves, islands=n)
    weights, place = log_z.softmax(0).numpy(), codes(state.tokens)
    effective = int(1 / (weights**2).sum())
    rng = np.random.default_rng(0)
    floor = np.mean(
        [total_variation(rng.multinomial(effective, pi(LAM)), pi(LAM)) for _ in range(50)]
    )

    def far(weights: np.ndarray) -> float:
        counts = np.bincount(place, np.repeat(weights, size), len(ROWS))
        return total_variation(counts, pi(LAM))

    assert far(weights) < 2 * floor + 0.01 < 0.1
    assert far(np.ones(n)) > 0.5


def test_islands_choose_their_temperatures_together() -> None:
    """20,000 islands of 4: the mean of Ẑ / Z within 4 standard errors of 1 (6e-5); where each of
    them chooses its own λ's, so few particles bias it by more.
    """
    exact = float(np.log(np.exp(LOG_P + LAM * REWARD).sum()))
    together, own = ((run(20_000, 4, 2, islands=n)[1] - exact).exp() for n in (20_000, 1))
    for ratio, unbiased in ((together, True), (own, False)):
        error = float(ratio.std()) / 20_000**0.5
        assert error < 0.03
        assert (abs(float(ratio.mean()) - 1) < 4 * error) == unbiased


def test_texts_are_given_islands_by_weight() -> None:
    """5,000 draws of 4 texts of one prompt and 1 of another: each text by itself in proportion to
    Ẑ (4.5 s.e. of 5 × 3 cells, 1e-4 in all); together as often as systematic resampling allows.
    """
    log_z = torch.tensor([[0.55, 0.3, 0.15], [0.1, 0.2, 0.7]], dtype=torch.float64).log() + 7
    group, generator = torch.tensor([0, 1, 0, 0, 0]), torch.Generator().manual_seed(0)
    seen = torch.stack([pick_islands(group, log_z, generator) for _ in range(5000)])
    for text, prompt in enumerate(group.tolist()):
        want = log_z[prompt].softmax(0).numpy()
        found = np.bincount(seen[:, text] - 3 * prompt, minlength=3) / 5000
        assert (np.abs(found - want) < 4.5 * np.sqrt(want * (1 - want) / 5000)).all()
    counts = torch.stack([(seen[:, group == 0] == i).sum(1) for i in range(3)], 1)
    for i, mean in enumerate((2.2, 1.2, 0.6)):
        assert set(counts[:, i].tolist()) == {int(mean), int(mean) + 1}
    alone = torch.randn(2, 1, dtype=torch.float64)
    assert torch.equal(pick_islands(group, alone, generator), group)


def test_weighted_texts_are_resampled_in_their_population() -> None:
    """The state of each follows the text that it was; weights 0 leave nobody."""
    target, generator = TableTarget(LAM), torch.Generator().manual_seed(0)
    tokens = torch.tensor(ROWS[:6])
    begin = from_base(target, tokens, torch.zeros_like(tokens, dtype=torch.bool), 0.7)
    assert begin.lam.tolist() == [0.7] * 6
    log_w = torch.tensor([[0.0, -torch.inf, 0.0], [-torch.inf, -torch.inf, 5.0]])
    state, ancestors = resample(begin, log_w.double(), 2, generator)
    assert ancestors.tolist() == [[0, 2], [2, 2]]
    assert codes(state.tokens).tolist() == [0, 2, 5, 5]
    torch.testing.assert_close(state.reward, torch.tensor(REWARD[[0, 2, 5, 5]]))


def test_ancestry_by_hand() -> None:
    """Two prompts of two islands of 3 particles, which began as 4 each; of the second prompt's only
    the first island has texts.
    """
    start = torch.tensor([[0, 1, 3], [0, 0, 2], [3, 2, 1], [0, 1, 2]])
    steps = [
        [[0, 0, 2], [0, 1, 2], [1, 1, 1], [0, 1, 2]],
        [[2, 2, 1], [1, 0, 0], [0, 2, 1], [0, 1, 2]],
    ]
    ess = torch.tensor([[3.0, 3, 3, 3], [1.5, 3, 3, 0.6]], dtype=torch.float64)
    trace = AnnealingTrace(ess, ess, ess, torch.tensor(steps))
    begun, log_z = torch.tensor([1.0, 0.9, 0.8, 1.0]), torch.tensor([[2.0, 2.0], [3.0, -60.0]])
    population = torch.tensor([0, 1, 2, 2])
    found = ancestry(begun.double(), start, trace, log_z.double(), population)
    # Final particles descend from {3, 0}, {0}, {2} and, unused, {0, 1, 2}.
    assert found["roots"].tolist() == pytest.approx([(2 / 3 + 1 / 3) / 2, 1 / 6])
    # The least of 0.9 and 1.5 / 3, of 0.6 / 3, and of the islands' 1/2.
    assert found["ess"].tolist() == pytest.approx([0.5, 0.2])
    none = trace._replace(ess=ess[:0], ancestors=trace.ancestors[:0])
    found = ancestry(begun.double(), start, none, log_z.double(), population)
    assert found["roots"].tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 2])
    assert found["ess"].tolist() == pytest.approx([0.9, 0.5])


def test_few_survive_without_moves_as_many_as_there_are_texts() -> None:
    """Where rows are drawn once each, ancestors are told apart by their texts."""
    target, generator = TableTarget(LAM), torch.Generator().manual_seed(3)
    tokens = torch.tensor(ROWS)
    begin = from_base(target, tokens, torch.zeros_like(tokens, dtype=torch.bool))
    state, log_z, trace = anneal(target, [], begin, 1, generator)
    own = torch.arange(len(ROWS))[None]
    found = ancestry(torch.ones_like(log_z), own, trace, log_z[None], torch.tensor([0]))
    assert float(found["roots"]) == len(set(codes(state.tokens))) / len(ROWS) < 0.3
    assert float(found["ess"]) == pytest.approx(float(trace.ess.min()) / len(ROWS))
    assert 0.45 < float(found["ess"]) < 0.75
