"""A denoiser, or a denoiser guided by a reward, as one callable; the only place where gradients are switched on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.embedding import TokenEmbedding
from dia_lightning.types import Denoiser


class Prediction(NamedTuple):
    """What a solver asks for at (z, t): z0 (B, T, d), the (guided) estimate of the clean embeddings, and the network's own
    estimate `z0_network`, which the next call is conditioned on; logits (B, T, V) of the (guided) token distribution.
    """

    z0: Tensor
    z0_network: Tensor
    logits: Tensor


# A solver's view of the model: (z, t, z0_network of the call before or None) → Prediction.
Predict = Callable[[Tensor, Tensor, Tensor | None], Prediction]


def unguided(network: Denoiser, embedding: TokenEmbedding, temperature: float = 1.0) -> Predict:
    """The denoiser as it is: ẑ_0 = Σ_v softmax(logits / temperature)_v E(v)."""

    @torch.no_grad()
    def predict(z: Tensor, t: Tensor, z0_prev: Tensor | None) -> Prediction:
        logits = network(z, t, z0_prev).masked_fill(~embedding.decodable, -torch.inf) / temperature
        z0 = embedding.expected(logits)
        return Prediction(z0, z0, logits)

    return predict


def guided(
    predict: Predict,
    log_value: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    embedding: TokenEmbedding,
    cap: float,
    window: tuple[float, float] = (0.0, 1.0),
) -> Predict:
    """Add the gradient of a log-value to the score: s_π = s_ψ + ∇_z log_value(z, t) (science.md, "Reverse process").

    With Tweedie's formula the sum is ẑ_0 + (σ²/α) ∇_z log_value. The tokens feel the same gradient: the first-order change
    of log_value when position i turns into v is α ⟨∇_{z_i}, E(v)⟩, added to logits_{i,v}.

    Args:
        predict: the denoiser. log_value: (z (B, T, d), t (B, T)) → (B,), λ times the critic's value.
        cap: longest allowed gradient per token, in units that do not depend on d: ‖∇_{z_i}‖ √d ≤ cap.
        window: levels u in which guidance acts, as fractions of the way from clean (0) to noise (1).
    """
    scale = embedding.dim**0.5

    def with_guidance(z: Tensor, t: Tensor, z0_prev: Tensor | None) -> Prediction:
        plain = predict(z, t, z0_prev)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(log_value(leaf, t.clone()).sum(), leaf)
        u = schedule.unwarp(t)
        active = (t > 0) & (u >= window[0]) & (u <= window[1])
        norm = gradient.norm(dim=-1, keepdim=True) * scale
        gradient = gradient * (cap / norm.clamp_min(cap)) * active[..., None]
        alpha, sigma = schedule.alpha(t)[..., None], schedule.sigma(t)[..., None]
        tilt = (alpha * gradient) @ embedding.weight.T
        z0 = plain.z0 + sigma.square() / alpha * gradient
        return Prediction(z0, plain.z0_network, plain.logits + tilt)

    return with_guidance
