"""Wasserstein-2 of Langevin kernels and of solvers on Gaussian mixtures, where scores and denoisers
are closed forms.

All figures are means over seeds with their standard errors. The sampling floor is the W2 of as many
exact draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.guidance import Predict, Prediction
from dia_lightning.sampling.langevin import LatentKernel, Polynomial, mala, ula
from dia_lightning.sampling.solvers import SOLVERS
from tests.oracles.gaussian_mixture import GaussianMixture, midpoints

F64 = torch.float64
SCHEDULE = make_schedule("cosine")
# The laws of tests/sampling/test_langevin.py and test_solvers.py: asymmetric, two modes.
LANGEVIN_LAW = GaussianMixture(
    torch.tensor([0.3, 0.7], dtype=F64),
    torch.tensor([[-1.5], [1.0]], dtype=F64),
    torch.tensor([0.4, 0.6], dtype=F64),
)
SOLVER_LAW = GaussianMixture(
    torch.tensor([0.3, 0.7], dtype=F64),
    torch.tensor([[-2.0], [1.0]], dtype=F64),
    torch.full((2,), 0.5, dtype=F64),
)
SOLVER_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ancestral": ("ancestral", {}),
    "ddim": ("ddim", {}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dia": ("dia", {"corrector_steps": 1, "eta": 0.1}),
    "dia_literal, marginal": ("dia_literal", {"eta": 0.1, "reading": "marginal"}),
    "dia_literal, per step": ("dia_literal", {"eta": 0.1, "reading": "per_step"}),
}
DETERMINISTIC = ("ddim", "dpmpp_2m")


class Curve(NamedTuple):
    """x (K,), and over seeds the mean (K,) and its standard error (K,)."""

    x: np.ndarray
    mean: np.ndarray
    error: np.ndarray


def curve(x: Sequence[float], by_seed: Sequence[Sequence[float]]) -> Curve:
    """By_seed (S, K); with one seed the standard error is 0 (nothing random)."""
    values = np.array(by_seed)
    n = len(values)
    error = values.std(0, ddof=1) / n**0.5 if n > 1 else np.zeros(values.shape[1])
    return Curve(np.array(x, dtype=float), values.mean(0), error)


def w2(x: Tensor, quantiles: Tensor) -> float:
    """W2 of a sample (N,) to the law with these quantiles (N,) at the midpoints."""
    return float((x.sort().values - quantiles).square().mean().sqrt())


def floor(law: GaussianMixture, n: int, seeds: int) -> tuple[float, float]:
    """Mean W2 of n exact draws and its standard deviation."""
    quantiles = law.quantile(midpoints(n))
    values = [
        w2(law.draw(n, torch.Generator().manual_seed(1000 + s))[:, 0], quantiles)
        for s in range(seeds)
    ]
    return float(np.mean(values)), float(np.std(values, ddof=1))


def kernels(eta: Any) -> dict[str, LatentKernel[Any, Any]]:
    law = LANGEVIN_LAW
    return {"ULA": ula(law.score, eta), "MALA": mala(law.score, eta, law.log_density)}


def against_eta(etas: Sequence[float], n: int, seeds: int, time: float = 10.0) -> dict[str, Curve]:
    """W2 after η k = `time`, from exact draws: what is left is the bias of the kernel's own
    stationary law.
    """
    quantiles, out = LANGEVIN_LAW.quantile(midpoints(n)), {}
    for name in ("ULA", "MALA"):
        rows = []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            row = []
            for eta in etas:
                kernel = kernels(eta)[name]
                state = kernel.init(LANGEVIN_LAW.draw(n, generator))
                for _ in range(max(5, round(time / eta))):
                    state, _ = kernel.step(state, generator)
                row.append(w2(state.position[:, 0], quantiles))
            rows.append(row)
        out[name] = curve(etas, rows)
    return out


def against_steps(eta: float, steps: Sequence[int], n: int, seeds: int) -> dict[str, Curve]:
    """W2 after each number of steps, all chains started at x = 3; also ULA with a step size that
    decays.
    """
    quantiles, out = LANGEVIN_LAW.quantile(midpoints(n)), {}
    decaying = ula(LANGEVIN_LAW.score, Polynomial(eta * 10**0.55, 10, 0.55))
    for name, kernel in [*kernels(eta).items(), ("ULA, decaying η", decaying)]:
        rows = []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            state, row = kernel.init(torch.full((n, 1), 3.0, dtype=F64)), []
            for k in range(1, max(steps) + 1):
                state, _ = kernel.step(state, generator)
                if k in steps:
                    row.append(w2(state.position[:, 0], quantiles))
            rows.append(row)
        out[name] = curve(steps, rows)
    return out


def exact_denoiser(law: GaussianMixture) -> Predict:
    """E[z_0 | z_t], all positions at one level."""

    def predict(z: Tensor, t: Tensor, _: Tensor | None) -> Prediction:
        z0 = law.posterior_mean(z, float(SCHEDULE.alpha(t[0, 0])), float(SCHEDULE.sigma(t[0, 0])))
        return Prediction(z0, z0, z0)

    return predict


def solvers(steps: Sequence[int], n: int, seeds: int) -> dict[str, Curve]:
    """W2 of each solver with the exact denoiser against its number of levels.

    The deterministic ones start at the quantiles of the first level's law, so nothing in their
    figure is random.
    """
    law, out = SOLVER_LAW, {}
    quantiles, predict = law.quantile(midpoints(n)), exact_denoiser(law)
    first = law.level(
        SCHEDULE.alpha(torch.ones((), dtype=F64)), SCHEDULE.sigma(torch.ones((), dtype=F64))
    )
    for name, (solver, options) in SOLVER_OPTIONS.items():
        fixed, rows = name in DETERMINISTIC, []
        for seed in range(1 if fixed else seeds):
            generator, row = torch.Generator().manual_seed(seed), []
            for k in steps:
                z = first.quantile(midpoints(n))[:, None] if fixed else first.draw(n, generator)
                times = torch.linspace(1, 0, k + 1, dtype=F64)[:, None]
                z = SOLVERS[solver](predict, SCHEDULE, z[:, None], times, generator, **options)
                row.append(w2(z.flatten(), quantiles))
            rows.append(row)
        out[name] = curve(steps, rows)
    return out


def order(result: Curve, above: float) -> tuple[float, float, int]:
    """−d log W2 / d log steps by least squares over the points with W2 > `above`; its standard
    error; their number.

    Fewer than three points, or no line at all, give NaN.
    """
    use = result.mean > above
    if use.sum() < 3:
        return math.nan, math.nan, int(use.sum())
    x, y = np.log(result.x[use]), np.log(result.mean[use])
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    return -slope, float((rest @ rest / (len(x) - 2) / (x @ x)) ** 0.5), len(x)
