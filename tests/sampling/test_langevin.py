"""Langevin kernels against laws known in closed form. Statistical bounds are 7 standard errors:
false-alarm rate 3e-12 each.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dia_lightning.sampling.langevin import (
    Constant,
    DualAveraging,
    LatentKernel,
    Polynomial,
    as_step_size,
    mala,
    trapezoid_change,
    ula,
)
from tests.oracles.gaussian_mixture import GaussianMixture, midpoints

F64 = torch.float64
LAW = GaussianMixture(
    torch.tensor([0.3, 0.7], dtype=F64),
    torch.tensor([[-1.5], [1.0]], dtype=F64),
    torch.tensor([0.4, 0.6], dtype=F64),
)
PLANE = GaussianMixture(
    torch.tensor([0.35, 0.65], dtype=F64),
    torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=F64),
    torch.tensor([0.6, 0.9], dtype=F64),
)
N = 200_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def last(kernel: LatentKernel, position: Tensor, steps: int, generator: torch.Generator) -> Tensor:  # type: ignore[type-arg]
    state = kernel.init(position)
    for _ in range(steps):
        state, _ = kernel.step(state, generator)
    return state.position


def chain(
    kernel: LatentKernel, state: Any, steps: int, generator: torch.Generator,  # type: ignore[type-arg]
    keep: Callable[[Any, Any], Tensor],
) -> tuple[Any, Tensor]:  # fmt: skip
    """The last state, and `keep` of every step stacked, (steps, …)."""
    kept = []
    for _ in range(steps):
        state, info = kernel.step(state, generator)
        kept.append(keep(state, info))
    return state, torch.stack(kept)


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "log density": LAW.log_density,
    "mean": lambda x: x[:, 0],
    "square": lambda x: x[:, 0] ** 2,
    "left mode": lambda x: (x[:, 0] < -0.7).double(),
}


def errors(x: Tensor) -> dict[str, float]:
    """How many standard errors the mean of each statistic over x (N, 1) lies from its value
    under LAW.
    """
    grid = LAW.quantile(midpoints(100_000))[:, None]
    return {
        name: float((f(x).mean() - f(grid).mean()) / f(x).std() * len(x) ** 0.5)
        for name, f in STATISTICS.items()
    }


def test_the_oracle_agrees_with_itself() -> None:
    """Score = gradient of the log density; posterior mean by Tweedie's formula and by brute
    integration; moments; levels.
    """
    z = torch.randn(7, 2, generator=seeded(), dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(PLANE.log_density(z).sum(), z)
    torch.testing.assert_close(PLANE.score(z), gradient)
    at, alpha, sigma = z.detach(), 0.8, 0.6
    tweedie = (at + sigma**2 * PLANE.level(alpha, sigma).score(at)) / alpha
    torch.testing.assert_close(PLANE.posterior_mean(at, alpha, sigma), tweedie)
    x = torch.linspace(-8, 8, 20_001, dtype=F64)[:, None]
    weight = (LAW.log_density(x) - (0.3 - alpha * x[:, 0]) ** 2 / (2 * sigma**2)).softmax(0)
    torch.testing.assert_close(
        weight @ x, LAW.posterior_mean(torch.tensor([0.3], dtype=F64), alpha, sigma)
    )
    assert float(LAW.log_density(x).exp().sum() * (x[1] - x[0])) == pytest.approx(1, abs=1e-9)
    grid = LAW.quantile(midpoints(100_000))
    assert float(grid.mean()) == pytest.approx(float(LAW.moments()[0]), abs=1e-6)
    assert float(grid.var()) == pytest.approx(float(LAW.moments()[1]), abs=1e-3)


def test_exact_draws_raise_no_alarm() -> None:
    assert max(map(abs, errors(LAW.draw(N, seeded())).values())) < 7


@pytest.mark.parametrize("eta", [0.1, 0.4])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_ula_has_its_known_bias_on_a_gaussian(eta: float, scale: float) -> None:
    """For N(0, Σ²), x ← (1 − η) x + Σ √(2η) ζ has the stationary variance Σ² 2η / (1 − (1 − η)²)
    = Σ² / (1 − η/2).
    """
    kernel = ula(lambda x: -x / scale**2, eta, scale=scale)
    x = last(kernel, scale * torch.randn(N, 1, generator=seeded(), dtype=F64), 100, seeded(1))
    want, error = scale**2 / (1 - eta / 2), (2 / N) ** 0.5
    assert abs(float(x.var()) / want - 1) < 7 * error
    assert float(x.var()) > scale**2 * (1 + 7 * error)


def test_mala_removes_the_bias_that_ula_shows() -> None:
    """From exact draws of a mixture, 40 steps. Measured for ULA: log density 64, mean 31, left
    mode 45 standard errors off.
    """
    start = LAW.draw(N, seeded())
    biased = errors(last(ula(LAW.score, 0.12), start, 40, seeded(1)))
    assert min(abs(biased[name]) for name in ("log density", "mean", "left mode")) > 14
    kept = errors(last(mala(LAW.score, 0.12, LAW.log_density), start, 40, seeded(1)))
    assert max(map(abs, kept.values())) < 7


def test_trapezoid_rule_needs_points_where_the_score_bends() -> None:
    """The same with the estimated ratio: the two ends alone are as far off as ULA (mean 47),
    nine points are not seen to be.
    """
    start = LAW.draw(N, seeded())
    coarse, fine = (
        errors(last(mala(LAW.score, 0.12, points=n), start, 40, seeded(1))) for n in (2, 9)
    )
    assert abs(coarse["mean"]) > 14
    assert max(map(abs, fine.values())) < 7


def test_mala_reaches_the_mixture_from_one_point() -> None:
    start = torch.full((40_000, 2), 3.0, dtype=F64)
    x = last(mala(PLANE.score, 0.4, PLANE.log_density), start, 150, seeded())
    mean, variance = PLANE.moments()
    error = x.std(0) / len(x) ** 0.5
    assert bool(((x.mean(0) - mean).abs() < 7 * error).all())
    square = (x - mean) ** 2
    assert bool(((square.mean(0) - variance).abs() < 7 * square.std(0) / len(x) ** 0.5).all())


@pytest.mark.parametrize(
    "scale", [torch.tensor(1.0, dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)]
)
def test_mala_ratio_by_hand(scale: Tensor) -> None:
    """log π(y) q(x | y) / π(x) q(y | x), with q = N(x + η Σ² s(x), 2 η Σ²) written out as a
    density.
    """
    eta = 0.3
    x = PLANE.draw(50, seeded())
    kernel = mala(PLANE.score, eta, PLANE.log_density, scale=scale)
    state, info = kernel.step(kernel.init(x), seeded(1))
    y = info.proposal

    def log_q(to: Tensor, start: Tensor) -> Tensor:
        law = torch.distributions.Normal(
            start + eta * scale**2 * PLANE.score(start), scale * (2 * eta) ** 0.5
        )
        return law.log_prob(to).sum(-1)

    want = PLANE.log_density(y) - PLANE.log_density(x) + log_q(x, y) - log_q(y, x)
    torch.testing.assert_close(info.log_ratio, want)
    torch.testing.assert_close(info.acceptance, want.exp().clamp_max(1))
    assert 0 < int(info.accepted.sum()) < 50
    torch.testing.assert_close(state.position, torch.where(info.accepted[:, None], y, x))
    torch.testing.assert_close(state.score, PLANE.score(state.position))
    torch.testing.assert_close(state.log_density, PLANE.log_density(state.position))


def imbalance(kernel: LatentKernel) -> float:  # type: ignore[type-arg]
    """Largest (n_ab − n_ba) / √(n_ab + n_ba) over three intervals, one step from exact draws:
    standard errors from balance.
    """
    x = LAW.draw(5 * N, seeded())
    edges = torch.tensor([-1.2, 0.5], dtype=F64)
    counts = torch.zeros(3, 3, dtype=F64)
    before, after = (
        torch.bucketize(y[:, 0].contiguous(), edges) for y in (x, last(kernel, x, 1, seeded(1)))
    )
    counts.view(-1).scatter_add_(0, 3 * before + after, torch.ones(len(x), dtype=F64))
    total = (counts + counts.T).clamp_min(1)
    return float(((counts - counts.T) / total.sqrt()).abs().max())


def test_mala_is_in_detailed_balance_and_ula_is_not() -> None:
    """Flux between any two sets is the same both ways. Asymmetric mixture, a million chains."""
    assert imbalance(mala(LAW.score, 0.25, LAW.log_density)) < 7
    assert imbalance(ula(LAW.score, 0.25)) > 14


@pytest.mark.parametrize("points", [2, 3, 6])
def test_trapezoid_rule_is_exact_for_quadratic_energies(points: int) -> None:
    precision = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=F64)

    def log_density(x: Tensor) -> Tensor:
        return -0.5 * torch.einsum("bi,ij,bj->b", x, precision, x)

    def score(x: Tensor) -> Tensor:
        return -x @ precision

    start = torch.randn(200, 2, generator=seeded(), dtype=F64)
    ours, exact = mala(score, 0.4, points=points), mala(score, 0.4, log_density)
    a, b = ours.init(start), exact.init(start)
    begin, left, right = b.log_density, seeded(1), seeded(1)
    for _ in range(20):
        (a, info_a), (b, info_b) = ours.step(a, left), exact.step(b, right)
        torch.testing.assert_close(info_a.log_ratio, info_b.log_ratio)
        assert torch.equal(info_a.accepted, info_b.accepted)
    torch.testing.assert_close(a.log_density, b.log_density - begin)
    assert 0.3 < float(info_a.acceptance.mean()) < 0.99


def test_trapezoid_rule_is_of_second_order() -> None:
    x, y = LAW.draw(500, seeded()), LAW.draw(500, seeded(1))
    want = LAW.log_density(y) - LAW.log_density(x)
    error = [
        float(
            (trapezoid_change(LAW.score, x, y, LAW.score(x), LAW.score(y), n) - want).abs().mean()
        )
        for n in (17, 33, 65)
    ]
    assert error[0] / error[1] == pytest.approx(4, rel=0.1)
    assert error[1] / error[2] == pytest.approx(4, rel=0.05)


def test_what_is_no_number_or_impossible_is_rejected() -> None:
    """Exp(1) on x > 0, NaN below −1 and −inf between: chains stay where the density is, and
    reach its mean 1.
    """

    def log_density(x: Tensor) -> Tensor:
        x = x[:, 0]
        return torch.where(x < -1, torch.nan, torch.where(x > 0, -x, -torch.inf))

    kernel = mala(lambda x: -torch.ones_like(x), 0.8, log_density)
    state, lowest = chain(
        kernel,
        kernel.init(torch.full((N, 1), 2.0, dtype=F64)),
        60,
        seeded(),
        keep=lambda s, _: s.position.min(),
    )
    assert float(lowest.min()) > 0
    assert abs(float(state.position.mean()) - 1) < 7 / N**0.5
    _, info = kernel.step(kernel.init(torch.full((N, 1), 0.1, dtype=F64)), seeded())
    outside = info.proposal[:, 0] <= 0
    assert bool((info.log_ratio[outside] == -torch.inf).all())
    assert bool((info.proposal[outside] < -1).any())
    assert not bool(info.log_ratio.isnan().any())


def test_held_coordinates_and_single_precision() -> None:
    """A coordinate of scale 0 stays; ratios are float64 for float32 positions of any shape."""
    scale = torch.tensor([1.0, 0.0])
    for kernel in (ula(lambda x: -x, 0.2, scale=scale), mala(lambda x: -x, 0.2, scale=scale)):
        x = last(kernel, torch.ones(5, 3, 2), 4, seeded())
        assert x.dtype == torch.float32
        assert torch.equal(x[..., 1], torch.ones(5, 3))
        assert not bool((x[..., 0] == 1).all())
    _, info = mala(lambda x: -x, 0.2).step(
        mala(lambda x: -x, 0.2).init(torch.ones(5, 3, 2)), seeded()
    )
    assert info.log_ratio.shape == (5,)
    assert info.log_ratio.dtype == torch.float64


def test_dual_averaging_by_hand() -> None:
    """Hoffman and Gelman 2014, eq. 6, two updates: H̄ = (δ − a)/11, then 11/12 H̄ + (δ − a)/12;
    μ = log 10 η_0.
    """
    adaptation = DualAveraging(0.1, burn_in=3, target=0.6)
    state = adaptation.update(adaptation.init(torch.device("cpu")), torch.tensor([0.2, 0.4]), 0)
    assert float(state.log_eta) == pytest.approx(0 - 1 / 0.05 * 0.3 / 11)
    assert float(state.log_eta_mean) == pytest.approx(float(state.log_eta))
    first, state = float(state.log_eta), adaptation.update(state, torch.tensor([0.75]), 1)
    want = 0 - 2**0.5 / 0.05 * (11 / 12 * 0.3 / 11 - 0.15 / 12)
    assert float(state.log_eta) == pytest.approx(want)
    assert float(state.log_eta_mean) == pytest.approx(2**-0.75 * want + (1 - 2**-0.75) * first)
    state = adaptation.update(state, torch.tensor([0.5]), 2)
    assert state.log_eta == state.log_eta_mean
    assert adaptation.update(state, torch.tensor([1.0]), 3) is state


@pytest.mark.parametrize("target", [0.574, 0.8])
@pytest.mark.parametrize("eta_0", [1e-3, 5.0])
def test_dual_averaging_reaches_its_target_and_stops(target: float, eta_0: float) -> None:
    """10-dimensional normal, 500 chains: acceptance over the 300 steps after burn-in, η the same in
    all of them.

    Measured distance to the target at most 0.006; the standard error of the mean itself is 0.001.
    """
    kernel = mala(
        lambda x: -x,
        DualAveraging(eta_0, burn_in=400, target=target),
        lambda x: -0.5 * x.square().sum(-1),
    )
    start = kernel.init(torch.randn(500, 10, generator=seeded(), dtype=F64))
    generator = seeded(1)
    state, etas = chain(
        kernel, start, 400, generator, keep=lambda _, info: torch.as_tensor(info.eta)
    )
    assert len(etas.unique()) == 400
    state, after = chain(
        kernel,
        state,
        300,
        generator,
        keep=lambda _, info: torch.stack([torch.as_tensor(info.eta), info.acceptance.mean()]),
    )
    assert len(after[:, 0].unique()) == 1
    assert abs(float(after[:, 1].mean()) - target) < 0.02


def test_step_size_schedules() -> None:
    assert as_step_size(0.3)(7) == 0.3
    polynomial = Polynomial(0.5, k_0=2, gamma=0.6)
    assert as_step_size(polynomial)(3) == pytest.approx(0.5 / 5**0.6)
    # A decaying η takes ULA's bias away: variance 1/(1 − η/2) at the η reached, 7 standard errors
    # above that.
    x = last(
        ula(lambda x: -x, Polynomial(0.5, 1, 0.9)),
        torch.randn(N, 1, generator=seeded(), dtype=F64),
        200,
        seeded(1),
    )
    assert abs(float(x.var()) - 1) < 1 / (1 - 0.5 / 200**0.9 / 2) - 1 + 7 * (2 / N) ** 0.5
    assert Polynomial(1.0, gamma=1.0)(9) == pytest.approx(0.1)


@pytest.mark.parametrize("gamma", [0.5, 1.01, math.nan])
def test_polynomial_decay_must_satisfy_robbins_and_monro(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"gamma: .* ½ < gamma ≤ 1"):
        Polynomial(0.1, gamma=gamma)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Polynomial(0.0),
        lambda: Polynomial(0.1, k_0=0),
        lambda: Constant(-1),
        lambda: DualAveraging(0.1, burn_in=0),
        lambda: DualAveraging(0.1, burn_in=5, target=1.0),
        lambda: mala(lambda x: x, 0.1, points=1),
    ],
)
def test_options_are_checked_at_construction(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="given, allowed"):
        build()
