"""The annealed population on a model small enough to enumerate."""

import numpy as np
import pytest
import torch

from dia_lightning.sampling.annealing import anneal, cycle, from_base, resample_down
from dia_lightning.sampling.diagnostics import log_z_upper
from dia_lightning.sampling.drafts import SuffixDrafts
from dia_lightning.sampling.ensemble import EnsembleKernel
from tests.oracles.table_lm import END, LOG_P, REWARD, ROWS, T, TableTarget, codes, pi

LAM = 3.0


def run(n_groups: int, size: int, seed: int, moves: int = 1, ess: float = 0.5, lam: float = LAM):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    target = TableTarget(lam)
    empty = torch.full((n_groups * size, T), END)
    mask = torch.zeros_like(empty, dtype=torch.bool)
    tokens = target.lm.generate(empty, mask, generator)
    kernels = [EnsembleKernel(target, SuffixDrafts(target.lm))] if moves else []
    return anneal(target, kernels, from_base(target, tokens, mask), n_groups, generator, ess, moves)


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
    upper = log_z_upper(torch.tensor(REWARD[rng.choice(len(ROWS), (200, 50), p=pi(LAM))]), LAM)
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
    few, log_z = resample_down(many, 1, 10_000, LAM, generator)
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
