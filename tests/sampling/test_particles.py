"""SMC over reverse diffusions whose log Z is known: a linear-Gaussian chain, and tokens drawn
one by one from a table.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.guidance import Predict, Prediction
from dia_lightning.sampling.decode import commit_tokens
from dia_lightning.sampling.particle_gibbs import GibbsState, ParticleGibbsKernel
from dia_lightning.sampling.particles import POTENTIALS, Particles, Steering, lineage, paths, smc
from dia_lightning.sampling.resampling import RESAMPLING
from dia_lightning.sampling.solvers import ancestral
from tests.oracles.enumerable import Enumerable

F64 = torch.float64
SCHEDULE = make_schedule("cosine")
each_potential = pytest.mark.parametrize("potential", POTENTIALS)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Oracle 1: data N(M, S²) in each of d = 2 coordinates of T = 3 positions, reward ⟨a, z_0⟩. One
# position is held, one runs ahead, and the start is N(0, 1). Every step of the ancestral sampler is
# z ← A z + b + std ζ, so E[exp(λ ⟨a, z_0⟩) | z_t] is exp of a line in z_t.
M, S, D = 0.4, 0.6, 2
TIMES = torch.tensor(
    [
        [0.0, 0.9, 0.9],
        [0.0, 0.7, 0.9],
        [0.0, 0.4, 0.8],
        [0.0, 0.2, 0.5],
        [0.0, 0.0, 0.25],
        [0.0, 0.0, 0.0],
    ],
    dtype=F64,
)
A_REWARD = torch.tensor([[0.3, -0.2], [0.9, 0.5], [-0.4, 0.8]], dtype=F64)


def gaussian_predict(z: Tensor, t: Tensor, _: Tensor | None) -> Prediction:
    alpha, sigma = SCHEDULE.alpha(t)[..., None], SCHEDULE.sigma(t)[..., None]
    z0 = M + alpha * S**2 / (alpha**2 * S**2 + sigma**2) * (z - alpha * M)
    return Prediction(z0, z0, z0)


class Line(NamedTuple):
    """log E[exp(λ r) | z_t] = ⟨slope (T, d), z_t⟩ + offset; its step: mean of z_s = gain z_t +
    shift, std, (T, 1).
    """

    slope: Tensor
    offset: float
    gain: Tensor
    shift: Tensor
    std: Tensor


def lines(lam: float) -> list[Line]:
    """By recursion from the end, with the posterior q(z_s | z_t, z_0) derived from its two
    Gaussian factors.
    """
    slope, offset, out = lam * A_REWARD, 0.0, []
    for t, s in reversed(list(pairwise(TIMES))):
        gain, shift, std = (torch.zeros(3, 1, dtype=F64) for _ in range(3))
        for i in range(3):
            if t[i] == 0 or t[i] == s[i]:
                gain[i] = 1
                continue
            (a_t, a_s), (v_t, v_s) = (
                (SCHEDULE.alpha(x).item() for x in (t[i], s[i])),
                (SCHEDULE.sigma(x).item() ** 2 for x in (t[i], s[i])),
            )
            a, v = a_t / a_s, v_t - (a_t / a_s) ** 2 * v_s
            # Precision of z_s: a²/v from z_t = a z_s + noise of variance v, 1/v_s from z_s ~ N(a_s
            # z_0, v_s).
            variance = 0.0 if v_s == 0 else 1 / (a**2 / v + 1 / v_s)
            of_z, of_z0 = (0.0, a_s) if v_s == 0 else (variance * a / v, variance * a_s / v_s)
            gain_0 = a_t * S**2 / (a_t**2 * S**2 + v_t)
            gain[i], shift[i], std[i] = (
                of_z + of_z0 * gain_0,
                of_z0 * (M - gain_0 * a_t * M),
                variance**0.5,
            )
        out.append(Line(slope, offset, gain, shift, std))  # of z_s; the step leads there
        offset += float((slope * shift).sum() + (slope * std).square().sum() / 2)
        slope = slope * gain
    return out[::-1]


HELD = torch.tensor([1.0, -2.0], dtype=F64)


def gaussian_start(n: int, generator: torch.Generator) -> Tensor:
    z = torch.randn(n, 3, D, generator=generator, dtype=F64)
    z[:, 0] = HELD
    return z


def at_start(line: Line) -> tuple[Tensor, float]:
    """Slope (T, d) and offset of log E[exp(λ r) | z_T], from the line that the first step leads
    to.
    """
    slope, offset, gain, shift, std = line
    return slope * gain, offset + float((slope * shift).sum() + (slope * std).square().sum() / 2)


def gaussian_log_z(lam: float) -> float:
    slope, offset = at_start(lines(lam)[0])
    return offset + float(slope[0] @ HELD) + float(slope[1:].square().sum()) / 2


def reward_of_z(z: Tensor) -> Tensor:
    return (z * A_REWARD).sum((1, 2))


def rough_value(z: Tensor, t: Tensor) -> Tensor:
    """A critic with a wrong scale and a bend."""
    return 0.6 * (SCHEDULE.alpha(t)[..., None] * z * A_REWARD).sum((1, 2)) + 0.1 * z[:, 2, 0].cos()


def shifted(predict: Predict, gradient: Tensor) -> Predict:
    """Guided by a constant gradient, ẑ_0 + σ² ∇."""

    def with_shift(z: Tensor, t: Tensor, z0_prev: Tensor | None) -> Prediction:
        plain = predict(z, t, z0_prev)
        ratio = SCHEDULE.sigma(t).square()[..., None]
        return plain._replace(z0=plain.z0 + ratio * gradient * (t > 0)[..., None])

    return with_shift


def gaussian_run(
    potential: str, seed: int, n_groups: int, size: int, lam: float = 1.2,
    predict: Predict = gaussian_predict, times: Tensor = TIMES, **options: object,
) -> Particles:  # fmt: skip
    generator = seeded(seed)
    steering = Steering(reward_of_z, rough_value, lam, potential, **options)  # type: ignore[arg-type]
    return smc(
        predict,
        SCHEDULE,
        gaussian_start(n_groups * size, generator),
        times,
        generator,
        steering,
        n_groups=n_groups,
    )


def assert_unbiased(log_z: Tensor, exact: float, widest: float) -> None:
    """Of 200 populations: the mean of Ẑ/Z within 4 standard errors of 1 (false alarms 6e-5), log of
    that mean within 3 of log Z (3e-3, at fixed seeds), and the standard error itself below
    `widest`."""
    ratio = (log_z - exact).exp()
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert error < widest
    assert abs(float(ratio.mean()) - 1) < 4 * error
    assert abs(math.log(float(ratio.mean()))) < 3 * error


def test_the_chain_of_the_oracle() -> None:
    """Mean and variance of λ r(z_0) in 100,000 runs of `ancestral` give the log Z of the
    recursion, within 4 s.e.
    """
    n = 100_000
    z = ancestral(gaussian_predict, SCHEDULE, gaussian_start(n, seeded(0)), TIMES, seeded(1))
    tilt = 1.2 * reward_of_z(z)
    variance = float(tilt.var())
    error = (variance / n + variance**2 / (2 * n)) ** 0.5
    assert abs(float(tilt.mean()) + variance / 2 - gaussian_log_z(1.2)) < 4 * error


@each_potential
@pytest.mark.parametrize("guidance", [0.0, 0.3])
def test_log_z_of_the_gaussian_chain(potential: str, guidance: float) -> None:
    """200 populations of 100; guided and not, steps of positions at their own pace."""
    predict = shifted(gaussian_predict, guidance * A_REWARD) if guidance else gaussian_predict
    particles = gaussian_run(potential, 3, 200, 100, predict=predict)
    assert particles.log_z.shape == (200,)
    assert bool((particles.z[:, 0] == HELD).all())
    assert_unbiased(particles.log_z, gaussian_log_z(1.2), 0.1)


@pytest.mark.parametrize("scheme", RESAMPLING)
def test_log_z_with_each_resampling(scheme: str) -> None:
    particles = gaussian_run("difference", 5, 200, 50, resampling=scheme, ess=0.9)
    assert float(particles.trace.resampled.double().mean()) > 0.3
    assert_unbiased(particles.log_z, gaussian_log_z(1.2), 0.06)


def test_the_best_proposal_leaves_no_variance() -> None:
    """q ∝ p_ψ(z_s | z_t) exp(h(z_s)) with the exact h, and values h/λ: every weight is E[exp(λ r) |
    z_T], one particle will do.

    The Gaussian ratio and the potentials then cancel to rounding, whatever the noise."""
    lam = 1.2
    each = lines(lam)
    calls, seen = iter(each), iter(each)

    def best(z: Tensor, t: Tensor, _: Tensor | None) -> Prediction:
        plain, line = gaussian_predict(z, t, None), next(calls)
        ratio = (SCHEDULE.sigma(t).square() / SCHEDULE.alpha(t))[..., None]
        return plain._replace(z0=plain.z0 + ratio * line.slope)

    def value(z: Tensor, t: Tensor) -> Tensor:
        line = next(seen)
        return ((line.slope * z).sum((1, 2)) + line.offset) / lam

    z = gaussian_start(6, seeded(0))
    particles = smc(
        best, SCHEDULE, z, TIMES, seeded(1), Steering(reward_of_z, value, lam), n_groups=6
    )
    slope, offset = at_start(each[0])
    torch.testing.assert_close(particles.log_z, (slope * z).sum((1, 2)) + offset, rtol=0, atol=1e-9)
    assert float(particles.log_z.std()) > 0.05


@pytest.mark.parametrize("ess", [0.5, 0.0])
def test_one_particle_is_the_proposal(ess: float) -> None:
    """To the bit `ancestral` with the same generator; and so is a population that is never
    resampled.
    """
    size = 1 if ess else 4
    particles = gaussian_run("max", 7, 12 // size, size, ess=ess)
    generator = seeded(7)
    z = ancestral(gaussian_predict, SCHEDULE, gaussian_start(12, generator), TIMES, generator)
    assert torch.equal(particles.z, z)
    assert not bool(particles.trace.resampled.any())


@each_potential
@pytest.mark.parametrize("every", [1, 2, 9])
def test_the_product_of_the_potentials(potential: str, every: int) -> None:
    """Without resampling and guidance it is exp(λ r(z_0)) for every path: weights ∝ exp(λ r), Ẑ
    their mean.
    """
    particles = gaussian_run(potential, 2, 3, 20, ess=0.0, every=every)
    tilt = 1.2 * reward_of_z(particles.z).unflatten(0, (3, 20))
    torch.testing.assert_close(particles.reward, reward_of_z(particles.z))
    torch.testing.assert_close(particles.log_w, tilt.log_softmax(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(particles.log_z, tilt.exp().mean(1).log(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("potential", "exponents"),
    [
        # λ = 2 and values v_1 … v_4 of (1, 3, 2, 5) for particle 0 and 0 for particle 1; r is not
        # asked before step 5.
        ("difference", (2, 6, 4, 10)),
        ("max", (2, 2 + 6, 2 + 6 + 6, 2 + 6 + 6 + 10)),
        ("sum", (2, 2 + 8, 2 + 8 + 12, 2 + 8 + 12 + 22)),
        ("das", tuple(2 * v * (2 ** (k / 5) - 1) for k, v in enumerate((1, 3, 2, 5), 1))),
    ],
)
def test_intermediate_weights_by_hand(potential: str, exponents: tuple[float, ...]) -> None:
    """The effective size of two particles with the weights e^x and 1 is (e^x + 1)² / (e^2x + 1)."""
    values = iter((1.0, 3.0, 2.0, 5.0))
    steering = Steering(
        reward_of_z, lambda z, t: torch.tensor([next(values), 0.0]), 2.0, potential, ess=0.0
    )
    particles = smc(
        gaussian_predict, SCHEDULE, gaussian_start(2, seeded(0)), TIMES, seeded(0), steering
    )
    want = torch.tensor(
        [(math.exp(x) + 1) ** 2 / (math.exp(2 * x) + 1) for x in exponents], dtype=F64
    )
    torch.testing.assert_close(particles.trace.ess[:4, 0], want, rtol=1e-6, atol=0)


def test_ancestry() -> None:
    """Paths followed back through the ancestors are continuous: each z_s is its z_t moved by the
    recorded noise.
    """
    generator = seeded(4)
    steering = Steering(reward_of_z, rough_value, 3.0, ess=0.9, resampling="multinomial")
    start = gaussian_start(40, generator)
    particles = smc(
        gaussian_predict, SCHEDULE, start, TIMES, generator, steering, n_groups=4, keep=True
    )
    assert int(particles.trace.resampled.sum()) >= 8
    assert particles.positions is not None
    assert particles.positions.shape == (6, 40, 3, D)
    slots = lineage(particles.trace.ancestors)
    assert slots[-1].tolist() == [list(range(10))] * 4
    final = torch.tensor([3, 0, 9, 5])
    path = paths(particles, final)
    rows = torch.arange(4) * 10
    assert torch.equal(path[-1], particles.z[rows + final])
    assert torch.equal(path[0], start[rows + slots[0, torch.arange(4), final]])
    # Position 2 does not move in the first step, so a path that is followed wrongly shows there.
    assert torch.equal(path[1][:, 2], path[0][:, 2])
    assert len(slots[0, 0].unique()) < 10
    # Brute force: carry the number of the starting particle along.
    numbers = torch.arange(10).expand(4, 10)
    for chosen in particles.trace.ancestors:
        numbers = numbers.gather(1, chosen)
    assert torch.equal(numbers, slots[0])


def test_a_value_that_is_no_number_is_weight_zero() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        steering = Steering(lambda z, bad=bad: torch.tensor([0.0, bad, 1.0]), None, 2.0)
        particles = smc(
            gaussian_predict, SCHEDULE, gaussian_start(3, seeded(0)), TIMES, seeded(0), steering
        )
        assert particles.log_w[0, 1] == -math.inf
        assert float(particles.log_z) == pytest.approx(math.log((1 + math.exp(2)) / 3))
    value = iter([torch.tensor([0.0, math.nan, 0.0]), *[torch.zeros(3)] * 3])
    steering = Steering(lambda z: torch.zeros(3), lambda z, t: next(value), 2.0, ess=0.9)
    particles = smc(
        gaussian_predict, SCHEDULE, gaussian_start(3, seeded(0)), TIMES, seeded(0), steering
    )
    assert float(particles.log_z) == pytest.approx(math.log(2 / 3))
    assert 1 not in particles.trace.ancestors[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "lam: -1.0 given, allowed: 0 or more"),
        ({"potential": "mean"}, "potential: mean given, allowed: difference, max, sum, das"),
        ({"every": 0}, "every: 0 given"),
        ({"ess": 1.5}, "ess: 1.5 given"),
        (
            {"resampling": "none"},
            "resampling: none given, allowed: systematic, stratified, multinomial",
        ),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Steering(**({"reward": reward_of_z, "value": None, "lam": 1.0} | options))  # type: ignore[arg-type]


# Oracle 2: tokens. Position by position falls from pure noise straight to 0, in the order ORDER;
# the denoiser is Bayes-exact by enumeration, so that its token is an exact draw given those before,
# and p_ψ is p itself.
LAM = 1.5
PROBLEM = Enumerable(3, 4, 11)
ORDER = (2, 0, 3, 1)
P, R = torch.from_numpy(np.exp(PROBLEM.log_p)), torch.from_numpy(PROBLEM.reward)
TEXTS = torch.from_numpy(PROBLEM.sequences)
ONE_HOT = torch.nn.functional.one_hot(TEXTS, 3).double().flatten(1)
EMBEDDING = TokenEmbedding(torch.tensor([[1.0, 0.0, 0.2], [-0.5, 0.8, 0.0], [-0.5, -0.9, 0.1]]))
TOKEN_TIMES = torch.ones(5, 4)
for step, place in enumerate(ORDER, 1):
    TOKEN_TIMES[step:, place] = 0.0


def tabulate(of_texts: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """(z, t) → of_texts((N,) 1.0 where a text agrees with the clean positions), looked up: 4⁴
    states, 3 = not yet clean.
    """
    states = torch.cartesian_prod(*[torch.arange(4)] * 4)
    agrees = ((states[:, None] == TEXTS) | (states == 3)[:, None]).all(-1).double()
    values = torch.stack([of_texts(row) for row in agrees])

    def look_up(z: Tensor, t: Tensor) -> Tensor:
        state = torch.where(t > 0, 3, EMBEDDING.decode(z))
        return values[state @ 4 ** torch.arange(3, -1, -1)]

    return look_up


# log Σ_x w(x) [x_i = v], (T, V): logits of the Bayes-exact denoiser of p, and of π.
PLAIN = tabulate(lambda agrees: ((agrees * P) @ ONE_HOT).unflatten(0, (4, 3)).log())
BEST = tabulate(
    lambda agrees: ((agrees * P * (LAM * R).exp()) @ ONE_HOT).unflatten(0, (4, 3)).log()
)
# E[r | z_t], and log E[exp(λ r) | z_t] / λ.
value_of_p = tabulate(lambda agrees: (agrees * P) @ R / (agrees @ P))
soft_value = tabulate(lambda agrees: ((agrees * P) @ (LAM * R).exp() / (agrees @ P)).log() / LAM)


def misleading(z: Tensor, t: Tensor) -> Tensor:
    return -0.5 * value_of_p(z, t) + 0.3 * (EMBEDDING.decode(z)[:, 2] == 1) * (t[:, 2] == 0)


def plain(z: Tensor, t: Tensor, _: Tensor | None) -> Prediction:
    logits = PLAIN(z, t)
    z0 = EMBEDDING.expected(logits)
    return Prediction(z0, z0, logits, logits)


def tilted(z: Tensor, t: Tensor, _: Tensor | None) -> Prediction:
    """A proposal that is off: half of the best tilt and a preference for token 0; its vectors
    are off too.
    """
    unguided = plain(z, t, None)
    logits = 0.5 * (unguided.logits + BEST(z, t)) + torch.tensor([0.4, 0.0, 0.0])
    return Prediction(EMBEDDING.expected(logits), unguided.z0_network, logits, unguided.logits)


def best(z: Tensor, t: Tensor, _: Tensor | None) -> Prediction:
    return plain(z, t, None)._replace(logits=BEST(z, t))


def reward_of_tokens(tokens: Tensor) -> Tensor:
    return R[torch.from_numpy(PROBLEM.index(tokens))]


def tokens_run(
    predict: Predict, seed: int, n_groups: int, size: int, potential: str = "difference",
    lam: float = LAM, value: Callable[[Tensor, Tensor], Tensor] | None = value_of_p,
    **options: object,
) -> Particles:  # fmt: skip
    generator = seeded(seed)
    z = torch.randn(n_groups * size, 4, 3, generator=generator)
    steering = Steering(reward_of_tokens, value, lam, potential, **options)  # type: ignore[arg-type]
    return smc(predict, SCHEDULE, z, TOKEN_TIMES, generator, steering, EMBEDDING, n_groups)


def off_floor(particles: Particles, lam: float, n: int) -> float:
    """Total variation of the weighted texts to π, less that of n exact draws."""
    weights = particles.log_w.exp().flatten().numpy()
    tv = PROBLEM.total_variation(EMBEDDING.decode(particles.z), lam, weights)
    return tv - PROBLEM.floor(n, lam, np.random.default_rng(0))


@each_potential
@pytest.mark.parametrize("predict", [plain, tilted])
def test_log_z_of_the_table(potential: str, predict: Predict) -> None:
    """200 populations of 64 against the enumerated log Z."""
    particles = tokens_run(predict, 1, 200, 64, potential)
    assert_unbiased(particles.log_z, PROBLEM.log_z(LAM), 0.05)


def test_log_z_with_a_value_that_misleads() -> None:
    particles = tokens_run(tilted, 2, 200, 64, value=misleading)
    assert float(particles.trace.resampled.double().mean()) > 0.1
    assert_unbiased(particles.log_z, PROBLEM.log_z(LAM), 0.05)


@each_potential
@pytest.mark.parametrize("predict", [plain, tilted])
def test_the_weighted_texts_are_distributed_as_pi(potential: str, predict: Predict) -> None:
    """One population of 100,000, resampled at least once; p itself is 0.4 away.

    The values that `sum` adds up are a third of the others': with the whole ones it leaves 0.1 (few
    texts survive it).
    """

    def value(z: Tensor, t: Tensor) -> Tensor:
        return value_of_p(z, t) / (3 if potential == "sum" else 1)

    particles = tokens_run(predict, 3, 1, 100_000, potential, value=value, ess=0.95)
    assert PROBLEM.total_variation(TEXTS, LAM, P.numpy()) > 0.4
    assert int(particles.trace.resampled.sum()) > 0
    assert off_floor(particles, LAM, 100_000) < 0.02


def test_without_the_correction_it_would_show() -> None:
    """The same proposal taken for p_ψ itself (its ratio dropped) is far off: what the tests
    above can tell apart.
    """
    particles = tokens_run(
        lambda z, t, x: tilted(z, t, x)._replace(logits_network=None), 3, 1, 20_000
    )
    assert off_floor(particles, LAM, 20_000) > 0.1
    assert abs(float(particles.log_z) - PROBLEM.log_z(LAM)) > 0.1


def test_the_best_tokens_leave_no_variance() -> None:
    """q(x_i) = π(x_i | those before) and the soft value: every single particle's Ẑ is Z, to
    rounding.
    """
    particles = tokens_run(best, 0, 50, 1, value=soft_value)
    torch.testing.assert_close(
        particles.log_z, torch.full((50,), PROBLEM.log_z(LAM), dtype=F64), rtol=0, atol=1e-9
    )
    assert len({tuple(row) for row in EMBEDDING.decode(particles.z).tolist()}) > 10
    together = tokens_run(best, 0, 1, 50, value=soft_value)
    torch.testing.assert_close(together.trace.ess, torch.full((4, 1), 50.0, dtype=F64))


def test_lambda_zero_is_p() -> None:
    """To the bit the texts of `ancestral`, log Z = 0, and near p; guided, still p by its
    weights.
    """
    particles = tokens_run(plain, 4, 1, 20_000, lam=0.0, ess=0.0)
    generator = seeded(4)
    z = torch.randn(20_000, 4, 3, generator=generator)
    z = ancestral(
        plain, SCHEDULE, z, TOKEN_TIMES, generator, commit_tokens(EMBEDDING, True, generator)
    )
    assert torch.equal(particles.z, z)
    assert float(particles.log_z) == pytest.approx(0, abs=1e-12)
    assert off_floor(particles, 0.0, 20_000) < 0.01
    assert off_floor(tokens_run(tilted, 4, 1, 20_000, lam=0.0), 0.0, 20_000) < 0.02


def test_populations_do_not_mix() -> None:
    """Of two populations with different prompts each keeps its own; a held position never moves."""
    z = torch.randn(100, 4, 3, generator=seeded(0))
    z[:, 2] = EMBEDDING(torch.tensor([0] * 50 + [1] * 50))
    times = torch.where(torch.arange(4) == 2, 0.0, TOKEN_TIMES)[1:]
    steering = Steering(reward_of_tokens, value_of_p, 3.0, ess=1.0)
    particles = smc(plain, SCHEDULE, z, times, seeded(0), steering, EMBEDDING, n_groups=2)
    assert bool(particles.trace.resampled[:-1].all())
    assert EMBEDDING.decode(particles.z)[:, 2].tolist() == [0] * 50 + [1] * 50
    for i, token in enumerate((0, 1)):
        keep = TEXTS[:, 2] == token
        exact = ((P * (3.0 * R).exp())[keep].sum() / P[keep].sum()).log()
        assert float(particles.log_z[i]) == pytest.approx(float(exact), abs=0.5)


# Particle Gibbs


def gibbs(
    n_chains: int, size: int, predict: Predict = tilted, **options: object
) -> ParticleGibbsKernel:
    steering = Steering(
        reward_of_tokens, value_of_p, LAM, ess=0.8, resampling="multinomial", **options
    )  # type: ignore[arg-type]

    def start(generator: torch.Generator) -> Tensor:
        return torch.randn(n_chains * size, 4, 3, generator=generator)

    return ParticleGibbsKernel(predict, SCHEDULE, TOKEN_TIMES, steering, start, EMBEDDING, n_chains)


def exact_paths(n: int, rng: np.random.Generator) -> Tensor:
    """(5, n, 4, 3) paths of the target: a text of π, and noise where it is not yet revealed."""
    return path_to(torch.from_numpy(PROBLEM.draw(n, LAM, rng)), rng)


def path_to(tokens: Tensor, rng: np.random.Generator) -> Tensor:
    noise = torch.from_numpy(rng.normal(size=(len(tokens), 4, 3))).float()
    return torch.stack([torch.where(t[:, None] > 0, noise, EMBEDDING(tokens)) for t in TOKEN_TIMES])


def chi_square(tokens: Tensor) -> float:
    """Σ (count − n π)² / n π over the texts, pooled where n π < 5; in units of its standard
    deviation from its mean.
    """
    n, pi = len(tokens), np.exp(PROBLEM.log_pi(LAM))
    counts = np.bincount(PROBLEM.index(tokens), minlength=len(pi))
    rare = n * pi < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, n * pi))
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("potential", ["difference", "max"])
def test_particle_gibbs_leaves_the_target_invariant(potential: str) -> None:
    """10,000 chains of 3 particles from exact paths, 3 steps: χ² on 81 texts below 3.9 (about 10⁻³
    for a χ² of 60 or more degrees). SMC with 3 particles, from which a path is picked likewise, is
    rejected by far."""
    n, rng, generator = 10_000, np.random.default_rng(5), seeded(6)
    kernel = gibbs(n, 3, potential=potential)
    state = kernel.init(exact_paths(n, rng))
    before = state.path
    for _ in range(3):
        state, info = kernel.step(state, generator)
    assert chi_square(EMBEDDING.decode(state.path[-1])) < 3.9
    torch.testing.assert_close(state.reward, reward_of_tokens(EMBEDDING.decode(state.path[-1])))
    assert 0.3 < float(info.renewed.mean()) < 0.9
    assert float((state.path == before).all(-1).double().mean()) < 0.7
    assert chi_square(EMBEDDING.decode(kernel.first(generator).path[-1])) > 20


def test_particle_gibbs_reaches_the_target() -> None:
    """4000 chains of 8 particles, all at the least likely text, 6 steps."""
    n = 4000
    worst = torch.from_numpy(PROBLEM.sequences[[PROBLEM.log_pi(LAM).argmin()]]).expand(n, -1)
    kernel, generator = gibbs(n, 8), seeded(8)
    state = kernel.init(path_to(worst, np.random.default_rng(0)))
    for _ in range(6):
        state, _ = kernel.step(state, generator)
    tv = PROBLEM.total_variation(EMBEDDING.decode(state.path[-1]), LAM)
    assert tv < PROBLEM.floor(n, LAM, np.random.default_rng(0)) + 0.02


def test_particle_gibbs_on_the_gaussian_chain() -> None:
    """Chains started at N(mean, ·) paths of the untilted law move to the tilted mean of r: mean
    + λ variance, 4 s.e.
    """
    n, size, lam = 4000, 6, 0.7
    steering = Steering(reward_of_z, rough_value, lam, ess=0.6, resampling="multinomial")
    predict = shifted(gaussian_predict, 0.4 * A_REWARD)
    kernel = ParticleGibbsKernel(
        predict, SCHEDULE, TIMES, steering, lambda g: gaussian_start(n * size, g), n_groups=n
    )
    generator = seeded(0)
    state = kernel.first(generator)
    for _ in range(6):
        state, _ = kernel.step(state, generator)
    # Cumulants: log Z(λ) = λ mean + λ² variance / 2.
    one, two = gaussian_log_z(1.0), gaussian_log_z(2.0)
    variance = two - 2 * one
    mean = one - variance / 2
    assert abs(float(state.reward.mean()) - (mean + lam * variance)) < 4 * (variance / n) ** 0.5
    assert float(state.reward.var()) == pytest.approx(variance, rel=0.12)


def test_particle_gibbs_keeps_the_retained_path() -> None:
    """A value that favours the retained text beyond measure: it survives every resampling as
    particle 0.
    """
    rng = np.random.default_rng(0)
    path = exact_paths(5, rng)
    tokens = EMBEDDING.decode(path[-1])
    rows = tokens.repeat_interleave(4, 0)

    def only_this(drawn: Tensor) -> Tensor:
        return torch.where((drawn == rows).all(1), 0.0, -1e4)

    steering = Steering(only_this, None, 1.0, resampling="multinomial")
    kernel = ParticleGibbsKernel(
        plain,
        SCHEDULE,
        TOKEN_TIMES,
        steering,
        lambda g: torch.randn(20, 4, 3, generator=g),
        EMBEDDING,
        5,
    )
    state, info = kernel.step(GibbsState(path, torch.zeros(5, dtype=F64)), seeded(1))
    assert info.renewed.tolist() == [0] * 5
    assert torch.equal(EMBEDDING.decode(state.path[-1]), tokens)
    assert torch.equal(state.path, path)
    assert torch.equal(gibbs(5, 3).init(path).reward, reward_of_tokens(tokens).double())


def test_particle_gibbs_checks_its_resampling() -> None:
    with pytest.raises(
        ValueError, match="resampling: systematic given, particle Gibbs allows: multinomial"
    ):
        ParticleGibbsKernel(
            plain,
            SCHEDULE,
            TOKEN_TIMES,
            Steering(reward_of_tokens, None, 1.0),
            lambda g: torch.zeros(2, 4, 3),
        )
