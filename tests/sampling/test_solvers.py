"""Solvers against Gaussian mixtures: posterior mean, quantiles and the map of the
probability-flow ODE are known exactly.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dia_lightning.diffusion.schedule import Schedule, make_schedule, time_grid
from dia_lightning.guidance import Predict, Prediction
from dia_lightning.sampling.corrector import langevin_step
from dia_lightning.sampling.langevin import Polynomial
from dia_lightning.sampling.solvers import SOLVERS, solve
from tests.oracles.gaussian_mixture import GaussianMixture, midpoints, wasserstein_2

SCHEDULE = make_schedule("cosine")
F64 = torch.float64
LAW = GaussianMixture(
    torch.tensor([0.3, 0.7], dtype=F64),
    torch.tensor([[-2.0], [1.0]], dtype=F64),
    torch.full((2,), 0.5, dtype=F64),
)
PLANE = GaussianMixture(
    torch.tensor([0.2, 0.5, 0.3], dtype=F64),
    torch.tensor([[-2.0, 0.0], [1.0, 1.0], [0.0, -2.0]], dtype=F64),
    torch.tensor([0.3, 0.6, 0.4], dtype=F64),
)
N = 100_000
# W2 of N exact draws to LAW: mean 0.013, standard deviation 0.008 (20 seeds). By the triangle
# inequality the W2 of N draws from another law is off by no more, so that bounds 0.07 apart are 7
# standard deviations apart.
FLOOR = 0.07
DETERMINISTIC = ("ddim", "dpmpp_2m")
SOUND = tuple(name for name in SOLVERS if name != "dia_literal")


def level(t: Tensor) -> tuple[float, float]:
    return float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))


def exact(law: GaussianMixture) -> Predict:
    """E[z_0 | z_t], all positions at one level."""

    def predict(z: Tensor, t: Tensor, _: Tensor | None) -> Prediction:
        z0 = law.posterior_mean(z, *level(t[0, 0]))
        return Prediction(z0, z0, z0)

    return predict


def each(z: Tensor, t: Tensor, _: Tensor | None) -> Prediction:
    """E[z_0 | z_t], every position at its own level."""
    z0 = torch.stack([LAW.posterior_mean(z[:, i], *level(t[0, i])) for i in range(z.shape[1])], 1)
    return Prediction(z0, z0, z0)


def zero(z: Tensor, t: Tensor, _: Tensor | None) -> Prediction:
    return Prediction(torch.zeros_like(z), torch.zeros_like(z), z)


def evenly(steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    return torch.linspace(start, end, steps + 1, dtype=F64)[:, None]


def run(
    sampler: str, steps: int, law: GaussianMixture = LAW, n: int = N, **options: object
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, 1, law.means.shape[1], generator=generator, dtype=F64)
    return SOLVERS[sampler](exact(law), SCHEDULE, z, evenly(steps), generator, **options)[:, 0]


def ode_error(sampler: str, times: Tensor) -> float:
    """Root mean square distance to the ODE's end point, over starts at the quantiles of the first
    level's law.

    In one dimension the ODE carries quantiles to quantiles, so its map needs no reference solver;
    and this is also the W2 of the sampler as long as its own map is monotone. Nothing here is
    random.
    """
    start, end = (LAW.level(*level(times[i, 0])).quantile(midpoints(400)) for i in (0, -1))
    x = SOLVERS[sampler](exact(LAW), SCHEDULE, start[:, None, None], times, torch.Generator())
    return float((x.flatten() - end).square().mean().sqrt())


def slope(error: Callable[[int], float], steps: tuple[int, ...]) -> float:
    """−d log error / d log steps, by least squares."""
    x = torch.tensor([math.log(n) for n in steps])
    y = torch.tensor([math.log(error(n)) for n in steps])
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def even_in_log_snr(steps: int) -> Tensor:
    """Times at which log(α/σ) rises evenly from −4 to 4, where the theory of orders is stated."""
    alpha = torch.sigmoid(2 * torch.linspace(-4, 4, steps + 1, dtype=F64)).sqrt()
    low, high = torch.zeros_like(alpha), torch.ones_like(alpha)
    for _ in range(60):
        middle = (low + high) / 2
        right = SCHEDULE.alpha(middle) > alpha
        low, high = torch.where(right, middle, low), torch.where(right, high, middle)
    return ((low + high) / 2)[:, None]


@pytest.mark.parametrize(("sampler", "low", "high"), [("ddim", 0.9, 1.05), ("dpmpp_2m", 1.9, 2.1)])
def test_order_between_two_levels(sampler: str, low: float, high: float) -> None:
    """Measured: 0.96 and 1.97 (0.99 and 2.00 between 128 and 256 steps)."""
    assert (
        low < slope(lambda n: ode_error(sampler, even_in_log_snr(n)), (16, 32, 64, 128, 256)) < high
    )


@pytest.mark.parametrize(("sampler", "low", "high"), [("ddim", 0.9, 1.05), ("dpmpp_2m", 1.6, 2.05)])
def test_order_of_a_whole_run(sampler: str, low: float, high: float) -> None:
    """Measured: 0.97 and 1.70; at both ends the steps in log-SNR grow with their number, which
    costs logarithms.
    """
    assert low < slope(lambda n: ode_error(sampler, evenly(n)), (16, 32, 64, 128, 256)) < high


@pytest.mark.parametrize("steps", [8, 12, 16])
def test_second_order_beats_first_with_few_steps(steps: int) -> None:
    """Measured ratios of the error: 1.9, 2.5, 3.1."""
    assert ode_error("dpmpp_2m", evenly(steps)) < 0.6 * ode_error("ddim", evenly(steps))


@pytest.mark.parametrize("sampler", SOUND)
def test_solvers_reach_the_mixture(sampler: str) -> None:
    assert wasserstein_2(run(sampler, 128)[:, 0], LAW) < FLOOR


@pytest.mark.parametrize("sampler", ["ancestral", "dia"])
def test_more_steps_bring_stochastic_solvers_closer(sampler: str) -> None:
    """W2 at 4, 8, 16, 32 steps, measured 0.46, 0.29, 0.17, 0.10 and 0.42, 0.25, 0.14, 0.07:
    slopes 0.74 and 0.86.
    """
    few, many = (wasserstein_2(run(sampler, steps)[:, 0], LAW) for steps in (4, 32))
    assert many + FLOOR < 0.5 * few
    assert 0.5 < slope(lambda n: wasserstein_2(run(sampler, n)[:, 0], LAW), (4, 8, 16, 32)) < 1.2


@pytest.mark.parametrize("sampler", SOUND)
def test_solvers_reach_a_mixture_in_the_plane(sampler: str) -> None:
    """W2 along three directions; of as many exact draws: mean at most 0.023, standard deviation
    at most 0.013 (20 seeds).
    """
    x = run(sampler, 128, PLANE, n=20_000)
    for angle in (0.0, 1.0, 2.0):
        direction = torch.tensor([math.cos(angle), math.sin(angle)], dtype=F64)
        assert wasserstein_2(x @ direction, PLANE.project(direction)) < 0.1


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_known_text_is_reached_exactly(sampler: str, steps: int) -> None:
    """With ẑ_0 = m whatever z is, the ODE is z_t = α_t m + σ_t ε, which both follow without
    error.
    """

    def known(z: Tensor, t: Tensor, _: Tensor | None) -> Prediction:
        return Prediction(torch.full_like(z, 3.0), torch.full_like(z, 3.0), z)

    eps = torch.randn(5, 1, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    times = evenly(steps, 0.9, 0.2)
    (alpha, sigma), (alpha_end, sigma_end) = level(times[0]), level(times[-1])
    z = SOLVERS[sampler](known, SCHEDULE, alpha * 3 + sigma * eps, times, torch.Generator())
    torch.testing.assert_close(z, alpha_end * 3 + sigma_end * eps)
    done = SOLVERS[sampler](known, SCHEDULE, eps, evenly(steps), torch.Generator())
    assert torch.equal(done, torch.full_like(eps, 3.0))


def test_ddim_with_eta_one_is_ancestral() -> None:
    torch.testing.assert_close(
        run("ddim", 7, n=50, eta=1.0), run("ancestral", 7, n=50), rtol=1e-9, atol=1e-9
    )


def test_ddim_between_keeps_the_variance_of_each_level() -> None:
    """For z_0 = 0 the law at every level is N(0, σ_s²), whatever η. 7 standard errors,
    false-alarm rate 3e-12.
    """
    generator = torch.Generator().manual_seed(0)
    _, sigma = level(torch.tensor(0.8, dtype=F64))
    z = sigma * torch.randn(N, 1, 1, generator=generator, dtype=F64)
    out = SOLVERS["ddim"](zero, SCHEDULE, z, evenly(1, 0.8, 0.4), generator, eta=0.6)
    want = level(torch.tensor(0.4, dtype=F64))[1] ** 2
    assert abs(float(out.var()) - want) < 7 * want * (2 / N) ** 0.5
    # Of z itself √(σ_s² − σ̃²)/σ_t is left: eq. 12 by hand.
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (level(torch.tensor(t, dtype=F64)) for t in (0.8, 0.4))
    fresh = 0.6 * sigma_s / sigma_t * (1 - alpha_t**2 / alpha_s**2) ** 0.5
    left = float((out * z).mean() / z.square().mean())
    assert abs(left - (sigma_s**2 - fresh**2) ** 0.5 / sigma_t) < 7 * fresh / sigma_t / N**0.5


def test_dpmpp_2m_by_hand() -> None:
    """Two steps written out with log-SNRs (arXiv:2211.01095, Algorithm 2)."""
    times = torch.tensor([[0.9], [0.6], [0.5]], dtype=F64)
    z = torch.tensor([[[0.7]], [[-1.3]]], dtype=F64)
    out = SOLVERS["dpmpp_2m"](exact(LAW), SCHEDULE, z, times, torch.Generator())
    (a0, s0), (a1, s1), (a2, s2) = map(level, times)
    h1, h2 = math.log(a1 / s1) - math.log(a0 / s0), math.log(a2 / s2) - math.log(a1 / s1)
    first = LAW.posterior_mean(z, a0, s0)
    z1 = s1 / s0 * z - a1 * (math.exp(-h1) - 1) * first
    second, r = LAW.posterior_mean(z1, a1, s1), h1 / h2
    mixed = (1 + 1 / (2 * r)) * second - 1 / (2 * r) * first
    torch.testing.assert_close(out, s2 / s1 * z1 - a2 * (math.exp(-h2) - 1) * mixed)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_each_position_has_its_own_steps(sampler: str) -> None:
    """Staggered positions end where each would alone, its idle steps left out: waiting at noise
    and clean ones keep still.
    """
    z = torch.randn(4, 3, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    times = time_grid(SCHEDULE, 9, 3, 1.5).double()
    together = SOLVERS[sampler](each, SCHEDULE, z, times, torch.Generator())
    for i in range(3):
        own = times[:, i].unique(sorted=True).flip(0)[:, None]
        assert i == 1 or len(own) < len(times)
        alone = SOLVERS[sampler](each, SCHEDULE, z[:, i : i + 1], own, torch.Generator())
        torch.testing.assert_close(together[:, i : i + 1], alone, rtol=1e-9, atol=1e-9)


def test_langevin_step_keeps_the_marginal() -> None:
    """For z ~ N(0, 1) at a level where the target is standard normal, a step of size η leaves
    variance (1 − η)² + 2 η.
    """
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400_000, generator=generator)
    eta, sigma, alpha = 0.1, torch.tensor(1.0), torch.tensor(0.0)
    out = langevin_step(z, torch.zeros_like(z), alpha, sigma, eta, generator)
    want = (1 - eta) ** 2 + 2 * eta
    # Standard error of a variance of n normals is var √(2/n); 7 of them, false-alarm rate 3e-12.
    assert abs(float(out.var()) - want) < 7 * want * (2 / 400_000) ** 0.5


def test_corrector_step_sizes_follow_the_schedule() -> None:
    asked = []

    def eta(k: int) -> float:
        asked.append(k)
        return 0.2 / (k + 3) ** 0.7

    ours = run("dia", 4, n=10, corrector_steps=2, eta=eta)
    assert asked == list(range(8))
    assert torch.equal(ours, run("dia", 4, n=10, corrector_steps=2, eta=Polynomial(0.2, 3, 0.7)))
    assert not torch.equal(ours, run("dia", 4, n=10, corrector_steps=2, eta=0.2))


BELL = GaussianMixture(
    torch.ones(1, dtype=F64), torch.tensor([[1.5]], dtype=F64), torch.tensor([0.5], dtype=F64)
)


def test_mala_takes_the_correctors_bias_away() -> None:
    """N(1.5, ½²) at the level t = 0.5 after 15 corrector steps of η = 0.8, from exact draws at t =
    0.55.

    The precision there is p, in units of 1/σ². ULA's variance is (1/p) / (1 − η p/2) in those
    units, AR(1) by hand; MALA's is 1/p: the score is linear and the trapezoid rule exact. 7
    standard errors, false-alarm rate 3e-12; the bias is over 40.
    """
    n, generator = 20_000, torch.Generator().manual_seed(0)
    (alpha, sigma), above = (
        level(torch.tensor(0.5, dtype=F64)),
        level(torch.tensor(0.55, dtype=F64)),
    )
    start = BELL.level(*above).draw(n, generator)[:, None]
    times, options = evenly(1, 0.55, 0.5), {"corrector_steps": 15, "eta": 0.8}
    ula, mala = (
        SOLVERS["dia"](exact(BELL), SCHEDULE, start, times, generator, corrector=name, **options)[
            :, 0, 0
        ]
        for name in ("ula", "mala")
    )
    variance, error = alpha**2 * 0.25 + sigma**2, (2 / n) ** 0.5
    assert abs(float(mala.var()) / variance - 1) < 7 * error
    assert abs(float(mala.mean()) - 1.5 * alpha) < 7 * (variance / n) ** 0.5
    biased = 1 / (1 - 0.4 * sigma**2 / variance)
    assert abs(float(ula.var()) / variance / biased - 1) < 7 * error
    assert biased > 1 + 40 * error


def test_mala_accepts_by_the_density_of_all_positions_at_their_own_levels() -> None:
    """One step, rows of three positions: at t = 0.6, at t = 0.3 and held at 0. The mean acceptance,
    the step and who takes it follow from densities written out, log π of each position's own level
    and q = N(z + η σ² s, 2 η σ²).
    """
    eta, n = 0.9, 500
    t = torch.tensor([0.6, 0.3, 0.0], dtype=F64)
    generator = torch.Generator().manual_seed(0)
    laws, sigmas = [LAW.level(*level(u)) for u in t[:2]], [level(u)[1] for u in t[:2]]
    z = torch.stack(
        [*(law.draw(n, generator) for law in laws), torch.full((n, 1), 0.7, dtype=F64)], 1
    )
    # Held at their levels, so that the predictor step does nothing and the corrector sees z itself.
    times, told = t.expand(2, 1, 3), []
    predicted, noise = generator.clone_state(), generator.clone_state()
    asked = []

    def predict(z: Tensor, t: Tensor, z0_prev: Tensor | None) -> Prediction:
        asked.append((z, z0_prev))
        z0 = torch.stack(
            [*(LAW.posterior_mean(z[:, i], *level(t[0, i])) for i in range(2)), z[:, 2]], 1
        )
        return Prediction(z0, z0 + len(asked), z0)

    out = SOLVERS["dia"](
        predict,
        SCHEDULE,
        z,
        times,
        predicted,
        corrector_steps=1,
        eta=eta,
        corrector="mala",
        note=told.append,
    )
    torch.randn(z.shape, generator=noise, dtype=F64)  # the predictor's
    zeta = torch.randn(z.shape, generator=noise, dtype=F64)
    log_u = torch.rand(n, generator=noise, dtype=F64).log()
    log_ratio, y = torch.zeros(n, dtype=F64), z.clone()
    # The trapezoid rule in place of the density of a mixture.
    for i, (law, sigma) in enumerate(zip(laws, sigmas, strict=True)):
        x, score = z[:, i, 0], law.score(z[:, i])[:, 0]
        move = x + eta * sigma**2 * score + sigma * (2 * eta) ** 0.5 * zeta[:, i, 0]
        back = law.score(move[:, None])[:, 0]
        y[:, i, 0] = move
        q = torch.distributions.Normal(
            x + eta * sigma**2 * score, sigma * (2 * eta) ** 0.5
        ).log_prob(move)
        q_back = torch.distributions.Normal(
            move + eta * sigma**2 * back, sigma * (2 * eta) ** 0.5
        ).log_prob(x)
        log_ratio = log_ratio + (score + back) / 2 * (move - x) + q_back - q
    torch.testing.assert_close(told[0], log_ratio.exp().clamp_max(1), rtol=1e-5, atol=1e-7)
    taken = log_u < log_ratio
    assert 50 < int(taken.sum()) < 450
    torch.testing.assert_close(out, torch.where(taken[:, None, None], y, z), rtol=1e-6, atol=1e-6)
    assert torch.equal(out[:, 2], z[:, 2])
    # Asked by the predictor, at its point and at the proposal, the last two conditioned on the
    # first's estimate.
    assert len(asked) == 3
    assert asked[1][1] is asked[2][1]


def test_mala_conditions_the_next_step_on_the_point_it_accepted() -> None:
    """(2 + 2) calls at each of 3 levels of 2 steps: predictor, start and proposals; the corrector's
    all on the predictor's estimate, the next predictor's on the one where the chain is. Estimates
    are the points asked at, so that both are known: the chain's own point is where a run over fewer
    levels ends.
    """
    asked: list[tuple[Tensor, Tensor | None]] = []
    told: list[Tensor] = []

    def predict(z: Tensor, t: Tensor, z0_prev: Tensor | None) -> Prediction:
        asked.append((z, z0_prev))
        return Prediction(z, z, z)

    def dia(levels: int) -> Tensor:
        asked.clear(), told.clear()
        generator = torch.Generator().manual_seed(0)
        z, times = (
            torch.randn(200, 1, 1, generator=generator, dtype=F64),
            evenly(4, 0.9, 0.1)[: levels + 1],
        )
        options = {"corrector": "mala", "corrector_steps": 2, "eta": 1.0, "note": told.append}
        return SOLVERS["dia"](predict, SCHEDULE, z, times, generator, **options)

    reached = dia(2)
    dia(3)
    assert len(asked) == 3 * 4
    assert torch.equal(asked[8][0], reached)
    assert torch.equal(asked[8][1], reached)
    assert not torch.equal(asked[7][0], reached)
    assert [given is asked[8][0] for _, given in asked[9:]] == [True] * 3
    assert 0.3 < float(told[0].mean()) < 0.99


def test_acceptance_is_not_counted_where_nothing_moves() -> None:
    """Two levels, the second at 0 for all positions, where everything is accepted: the mean is
    that of the first.
    """
    told: list[Tensor] = []
    for times in (evenly(1, 0.9, 0.6), torch.tensor([[0.9], [0.6], [0.0]], dtype=F64)):
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(200, 1, 1, generator=generator, dtype=F64)
        SOLVERS["dia"](
            exact(LAW), SCHEDULE, z, times, generator, corrector="mala", eta=1.0, note=told.append
        )
    assert torch.equal(told[0], told[1])
    assert float(told[0].mean()) < 0.95


@pytest.mark.parametrize("sampler", SOLVERS)
def test_clean_positions_never_move(sampler: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, 2, generator=generator)
    times = torch.where(
        torch.tensor([True, False, False, False]), 0.0, time_grid(SCHEDULE, 5, 4, 1.0)
    )
    out = SOLVERS[sampler](zero, SCHEDULE, z, times, generator)
    assert torch.equal(out[:, 0], z[:, 0])
    assert not torch.isclose(out[:, 1:], z[:, 1:]).any()


@pytest.mark.parametrize("sampler", SOLVERS)
def test_commit_is_called_for_positions_that_arrive(sampler: str) -> None:
    """Position 0 is a prompt; position 1 is clean two steps before position 2, and its token
    stays.
    """
    z, generator = torch.zeros(1, 3, 2), torch.Generator().manual_seed(0)
    times = torch.tensor(
        [[0.0, 0.9, 0.9], [0.0, 0.4, 0.9], [0.0, 0.0, 0.7], [0.0, 0.0, 0.3], [0.0, 0.0, 0.0]]
    )
    calls = iter(range(1, 5))
    done = SOLVERS[sampler](
        zero,
        SCHEDULE,
        z,
        times,
        generator,
        commit=lambda p: torch.full_like(p.z0, float(next(calls))),
    )
    assert done[0, :, 0].tolist() == [0.0, 2.0, 4.0]


class Slope(Schedule):
    """α = 1 − 0.4 t: (α, σ) = (0.6, 0.8) at t = 1 and (0.8, 0.6) at t = ½."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - 0.4 * t


@pytest.mark.parametrize(
    ("reading", "mean", "std"),
    [
        # ε = (2 − 0.6)/0.8 = 1.75; μ = (2 − 0.8 · 1.75)/0.6 = 1; s_π = (0.6 · 1.5 − 2)/0.64; 1 +
        # 0.1 · 0.64 s_π
        ("marginal", 0.89, 0.8 * 0.2**0.5),
        # a = 0.75, b² = 0.64 − 0.75² · 0.36 = 0.4375; μ = (2 − 0.66143783 · 1.75)/0.75 =
        # 1.12331173; + 0.1 · 0.4375 s_π
        ("per_step", 1.04811642, 0.4375**0.5 * 0.2**0.5),
    ],
)
def test_dia_literal_by_hand(reading: str, mean: float, std: float) -> None:
    def predict(z: Tensor, t: Tensor, _: Tensor | None) -> Prediction:
        return Prediction(torch.full_like(z, 1.5), torch.full_like(z, 1.0), z)

    times, z = torch.tensor([[1.0], [0.5]], dtype=F64), torch.full((3, 1, 2), 2.0, dtype=F64)
    out = SOLVERS["dia_literal"](
        predict, Slope(), z, times, torch.Generator().manual_seed(5), eta=0.1, reading=reading
    )
    noise = torch.randn(3, 1, 2, generator=torch.Generator().manual_seed(5), dtype=F64)
    torch.testing.assert_close(out, mean + std * noise, rtol=0, atol=1e-7)


@pytest.mark.parametrize("reading", ["marginal", "per_step"])
@pytest.mark.parametrize("eta", [0.02, 0.1, 0.5])
def test_dia_literal_misses_the_mixture(reading: str, eta: float) -> None:
    """`dia` ends below 0.07 (see above); this one between 0.50 and 1.73, and more steps do not
    help.
    """
    assert (
        wasserstein_2(run("dia_literal", 64, n=20_000, eta=eta, reading=reading)[:, 0], LAW) > 0.35
    )


def test_dia_literal_names_its_readings() -> None:
    with pytest.raises(ValueError, match="reading: 'other' given, allowed: marginal, per_step"):
        run("dia_literal", 1, n=1, reading="other")


@pytest.mark.parametrize("method", ["euler", "", "DDIM"])
def test_an_unknown_method_is_named(method: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"method: {method!r} given, allowed: ancestral, ddim, dpmpp_2m, dia, dia_literal",
    ):
        solve(method, None, None, torch.zeros(1, 1, 1), torch.zeros(2, 1), torch.Generator())  # type: ignore[arg-type]
