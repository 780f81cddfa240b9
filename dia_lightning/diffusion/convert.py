"""ε, ẑ_0 and the score say the same. All tensors broadcast to
(B, T, d).
"""

from torch import Tensor


def eps_from_z0(z: Tensor, z0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """ε = (z − α ẑ_0) / σ."""
    return (z - alpha * z0) / sigma


def z0_from_eps(z: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """ẑ_0 = (z − σ ε) / α."""
    return (z - sigma * eps) / alpha


def score_from_z0(z: Tensor, z0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """S = −ε / σ = (α ẑ_0 − z) / σ² (Tweedie)."""
    return (alpha * z0 - z) / sigma.square()
