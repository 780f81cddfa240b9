"""Gaussian mixtures in d dimensions: everything a sampler estimates, in closed form. Shares no code
with the package.

A law Σ_k w_k N(m_k, s_k² I), seen at the level z = α z_0 + σ ε, is the mixture Σ_k w_k N(α m_k, (α²
s_k² + σ²) I).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class GaussianMixture:
    """weights (K,), means (K, d), stds (K,), float64."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def level(self, alpha: float | Tensor, sigma: float | Tensor) -> GaussianMixture:
        """The law of α z_0 + σ ε."""
        alpha, sigma = (
            torch.as_tensor(alpha, dtype=torch.float64),
            torch.as_tensor(sigma, dtype=torch.float64),
        )
        return GaussianMixture(
            self.weights, alpha * self.means, (alpha**2 * self.stds**2 + sigma**2).sqrt()
        )

    def project(self, direction: Tensor) -> GaussianMixture:
        """The law in one dimension of ⟨direction, z⟩, direction (d,) of norm 1."""
        return GaussianMixture(self.weights, (self.means @ direction)[:, None], self.stds)

    def _terms(self, z: Tensor) -> Tensor:
        """(…, K) log w_k N(z; m_k, s_k² I) for z (…, d)."""
        square = ((z[..., None, :] - self.means) ** 2).sum(-1)
        d = self.means.shape[1]
        return (
            self.weights.log()
            - square / (2 * self.stds**2)
            - d * (self.stds.log() + 0.5 * math.log(2 * math.pi))
        )

    def log_density(self, z: Tensor) -> Tensor:
        """Z (…, d) → (…,)."""
        return self._terms(z).logsumexp(-1)

    def score(self, z: Tensor) -> Tensor:
        """∇ log density, z (…, d) → (…, d)."""
        share = self._terms(z).softmax(-1)[..., None]
        return (share * (self.means - z[..., None, :]) / self.stds[:, None] ** 2).sum(-2)

    def posterior_mean(self, z: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[z_0 | α z_0 + σ ε = z], z (…, d) → (…, d): each component's linear regression,
        weighted by its share.
        """
        variance = alpha**2 * self.stds**2 + sigma**2
        square = ((z[..., None, :] - alpha * self.means) ** 2).sum(-1)
        log_share = (
            self.weights.log() - square / (2 * variance) - self.means.shape[1] / 2 * variance.log()
        )
        gain = (alpha * self.stds**2 / variance)[:, None]
        each = self.means + gain * (z[..., None, :] - alpha * self.means)
        return (log_share.softmax(-1)[..., None] * each).sum(-2)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, d) exact draws."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[which] + self.stds[which, None] * noise

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (d,) and variance of each coordinate (d,)."""
        mean = self.weights @ self.means
        return mean, self.weights @ (self.means**2 + self.stds[:, None] ** 2) - mean**2

    def cdf(self, x: Tensor) -> Tensor:
        """P(z ≤ x) in one dimension, x (…,) → (…,)."""
        return (
            self.weights * torch.special.ndtr((x[..., None] - self.means[:, 0]) / self.stds)
        ).sum(-1)

    def quantile(self, p: Tensor) -> Tensor:
        """The inverse of `cdf`, by bisection to float64."""
        reach = 12 * self.stds.max() + self.means.abs().max()
        low, high = torch.full_like(p, -reach), torch.full_like(p, reach)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def midpoints(n: int) -> Tensor:
    """(n,) probabilities (i + ½)/n: quantiles there stand for the law without sampling noise."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def wasserstein_2(x: Tensor, law: GaussianMixture) -> float:
    """W2 of the sample x (N,) to the one-dimensional law, by sorting against its quantiles."""
    return float(
        (x.double().sort().values - law.quantile(midpoints(len(x)))).square().mean().sqrt()
    )


def wasserstein_2_spread(
    law: GaussianMixture, n: int, repeats: int, seed: int
) -> tuple[float, float]:
    """Mean and standard deviation of `wasserstein_2` over `repeats` sets of n exact draws: the
    sampling floor.
    """
    generator = torch.Generator().manual_seed(seed)
    floor = torch.tensor([wasserstein_2(law.draw(n, generator)[:, 0], law) for _ in range(repeats)])
    return float(floor.mean()), float(floor.std())
