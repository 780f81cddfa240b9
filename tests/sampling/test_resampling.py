"""Resampling schemes: unbiased, without particles of weight 0, each with the variance that it
promises.
"""

import math

import numpy as np
import pytest
import torch

from dia_lightning.sampling.resampling import RESAMPLING, effective_size, log_mean_exp

F64 = torch.float64
each_scheme = pytest.mark.parametrize("scheme", RESAMPLING)
WEIGHTS = torch.tensor([0.37, 0.0, 0.21, 0.02, 0.4], dtype=F64)


def counts(scheme: str, weights: torch.Tensor, n: int, seed: int = 0) -> np.ndarray:
    """(n, M): how often each particle was picked, in n independent populations."""
    log_w = weights.log().expand(n, -1)
    ancestors = RESAMPLING[scheme](log_w, torch.Generator().manual_seed(seed))
    assert ancestors.dtype == torch.int64
    assert ancestors.shape == (n, len(weights))
    return (ancestors[..., None] == torch.arange(len(weights))).sum(1).numpy()


@each_scheme
def test_expected_counts(scheme: str) -> None:
    """M w each, within 4 standard errors of a multinomial count, the widest of the three (40,000
    populations, 3e-4).
    """
    n, m = 40_000, len(WEIGHTS)
    mean = counts(scheme, WEIGHTS, n).mean(0)
    error = np.sqrt(m * WEIGHTS.numpy() * (1 - WEIGHTS.numpy()) / n)
    assert (np.abs(mean - m * WEIGHTS.numpy()) <= 4 * error).all()


def test_the_variance_of_each() -> None:
    """Multinomial: M w (1 − w). Systematic: a count is one of the two whole numbers around M w.
    Stratified lies between.
    """
    n, m, w = 40_000, len(WEIGHTS), WEIGHTS.numpy()
    variance = {scheme: counts(scheme, WEIGHTS, n).var(0) for scheme in RESAMPLING}
    np.testing.assert_allclose(variance["multinomial"], m * w * (1 - w), rtol=0.06)
    fraction = m * w - np.floor(m * w)
    np.testing.assert_allclose(variance["systematic"], fraction * (1 - fraction), rtol=0.06)
    # Particle 2 lies on [0.37, 0.58): a stratum of width 0.2 is crossed from 0.37 to 0.4 and one
    # from 0.4 to 0.58.
    assert variance["stratified"][2] == pytest.approx(0.15 * 0.85 + 0.9 * 0.1, rel=0.06)
    picked = counts("systematic", WEIGHTS, n)
    assert (np.abs(picked - m * w) < 1).all()


@each_scheme
def test_weight_zero_is_never_picked(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at either end of [0, 1), and not where a float32 cumulative sum ends below 1."""
    weights = torch.ones(50_000)
    weights[::2] = 0
    weights[-3:] = 0
    narrow = (weights / weights.sum()).numpy().cumsum(dtype=np.float32)
    assert narrow[-1] < 1 - 1e-4  # five of the points of `systematic` lie beyond it
    for u in (None, 0.0, 1 - 2.0**-53):
        if u is not None:
            monkeypatch.setattr(
                torch, "rand", lambda *shape, u=u, **_: torch.full(shape, u, dtype=F64)
            )
        log_w = weights.double().log()
        assert bool(
            (weights[RESAMPLING[scheme](log_w, torch.Generator().manual_seed(1))] > 0).all()
        )
        assert bool(
            (weights[RESAMPLING[scheme](log_w.float(), torch.Generator().manual_seed(1))] > 0).all()
        )


@each_scheme
def test_populations_do_not_mix_and_scale_does_not_matter(scheme: str) -> None:
    log_w = torch.randn(3, 4, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    log_w[0, 0] = torch.tensor([-math.inf] * 7 + [0.0])
    ancestors = RESAMPLING[scheme](log_w, torch.Generator().manual_seed(1))
    assert ancestors.shape == (3, 4, 8)
    assert ancestors[0, 0].tolist() == [7] * 8
    shifted = RESAMPLING[scheme](log_w - 5000.0, torch.Generator().manual_seed(1))
    assert torch.equal(ancestors, shifted)


@each_scheme
def test_equal_weights(scheme: str) -> None:
    """Systematic and stratified keep everyone; multinomial loses e^−1 of them (1000 particles,
    0.367 ± 0.01 is 3 s.e.).
    """
    ancestors = RESAMPLING[scheme](torch.zeros(1000, dtype=F64), torch.Generator().manual_seed(0))
    if scheme == "multinomial":
        assert 1 - len(set(ancestors.tolist())) / 1000 == pytest.approx(math.exp(-1), abs=0.03)
    else:
        assert ancestors.tolist() == list(range(1000))


def test_sizes_and_means() -> None:
    log_w = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, -math.inf, -math.inf, -math.inf]], dtype=F64)
    torch.testing.assert_close(effective_size(log_w), torch.tensor([4.0, 1.0], dtype=F64))
    torch.testing.assert_close(log_mean_exp(log_w), torch.tensor([1.0, -math.log(4)], dtype=F64))


def test_any_number_of_dimensions() -> None:
    log_w = torch.randn(2, 3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    for function in (effective_size, log_mean_exp):
        one_by_one = torch.stack([torch.stack([function(row) for row in rows]) for rows in log_w])
        torch.testing.assert_close(function(log_w), one_by_one)
    w = log_w[0, 0].exp()
    torch.testing.assert_close(effective_size(log_w[0, 0]), w.sum() ** 2 / (w**2).sum())
    torch.testing.assert_close(log_mean_exp(log_w[0, 0]), w.mean().log())
