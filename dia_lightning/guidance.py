"""A denoiser, or a denoiser guided by a reward, as one callable; the only place where gradients
are switched on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.numerics import FirstTime
from dia_lightning.types import Denoiser


class Prediction(NamedTuple):
    """What a solver asks for at (z, t): z0 (B, T, d), the (guided) estimate of the clean
    embeddings, and the network's own estimate `z0_network`, which the next call is conditioned on
    (of several branches (K B, T, d), the plain one first); logits (B, T, V) of the (guided) token
    distribution, and the network's own, `logits_network`, where they are others.
    """

    z0: Tensor
    z0_network: Tensor
    logits: Tensor
    logits_network: Tensor | None = None


class Watched:
    """A `Predict` that remembers in which call a row was not finite for the first time.

    Calls are noted where they are computed, so that nothing waits for the device; `check` does,
    once, when all are made.
    """

    def __init__(self, predict: Predict) -> None:
        self.predict, self._calls, self._first = predict, 0, FirstTime()

    def __call__(self, z: Tensor, t: Tensor, z0_prev: Tensor | None) -> Prediction:
        prediction = self.predict(z, t, z0_prev)
        self._calls += 1
        values = {
            "the denoiser's estimate": prediction.z0_network,
            "the guided estimate": prediction.z0,
        }
        for name, value in values.items():
            # A sum is finite only where all its terms are.
            self._first.note(
                f"{name} of the text", ~value[: len(z)].sum((1, 2)).isfinite(), self._calls
            )
        return prediction

    def check(self) -> None:
        """Raises `NotFinite` that names the quantity, the call and the rows which were the
        first.
        """
        self._first.check("the denoiser's call")


class LabelledDenoiser(Protocol):
    """A `Denoiser` that also takes a label (B,) int64 for each text, 0 = none."""

    def __call__(
        self, z: Tensor, t: Tensor, z0_prev: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor: ...


# A solver's view of the model: (z, t, z0_network of the call before or None) → Prediction.
Predict = Callable[[Tensor, Tensor, Tensor | None], Prediction]
# What guidance climbs: (z (B, T, d), t (B, T)) → (B,), the critic's value or the reward itself, λ
# included.
LogValue = Callable[[Tensor, Tensor], Tensor]

# As a float32 a longer gradient may have no length.
CAP_MAX = 1e15


def unguided(network: Denoiser, embedding: TokenEmbedding, temperature: float = 1.0) -> Predict:
    """The denoiser as it is: ẑ_0 = Σ_v softmax(logits / temperature)_v E(v)."""

    @torch.no_grad()
    def predict(z: Tensor, t: Tensor, z0_prev: Tensor | None) -> Prediction:
        logits = _token_logits(network, embedding, temperature, z, t, z0_prev)
        z0 = embedding.expected(logits)
        return Prediction(z0, z0, logits, logits)

    return predict


def classifier_free(
    network: LabelledDenoiser,
    embedding: TokenEmbedding,
    label: int,
    scale: float,
    temperature: float = 1.0,
) -> Predict:
    """Classifier-free guidance towards a label y, whose score is ∇log p(z|y) + w (∇log p(z|y) −
    ∇log p(z)).

    By Tweedie's formula that is ẑ_0 = (1 + w) ẑ_0(z, y) − w ẑ_0(z) (Ho and Salimans,
    arXiv:2207.12598, eq. 6), and tokens have the same on their logits, (1 + w) log p(x_i|z, y) − w
    log p(x_i|z). The expectation under those would stay among the embeddings, but its score is
    neither of these.

    Both branches run in one batch, and each is conditioned on its own earlier estimate, as in
    training: the plain one must not learn of the label.

    Args:
        network: takes labels (B,), 0 = none. scale: w; 0 = p(z|y) itself, −1 = p(z).
        temperature: of the token distribution of both branches.
    """

    @torch.no_grad()
    def predict(z: Tensor, t: Tensor, z0_prev: Tensor | None) -> Prediction:
        labels = torch.tensor([0, label], device=z.device).repeat_interleave(len(z))
        both = _token_logits(
            partial(network, label=labels),
            embedding,
            temperature,
            z.repeat(2, 1, 1),
            t.repeat(2, 1),
            z0_prev,
        )
        z0_both = embedding.expected(both)
        (plain, conditional), (z0_plain, z0_conditional) = both.chunk(2), z0_both.chunk(2)
        logits = torch.where(
            embedding.decodable, (1 + scale) * conditional - scale * plain, -torch.inf
        )
        return Prediction((1 + scale) * z0_conditional - scale * z0_plain, z0_both, logits, plain)

    return predict


def _token_logits(
    network: Denoiser,
    embedding: TokenEmbedding,
    temperature: float,
    z: Tensor,
    t: Tensor,
    z0_prev: Tensor | None,
) -> Tensor:
    return network(z, t, z0_prev).masked_fill(~embedding.decodable, -torch.inf) / temperature


def gradient_of(log_value: LogValue, z: Tensor, t: Tensor) -> Tensor:
    """∇_z log_value(z, t), (B, T, d), also under inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = z.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_value(leaf, t.clone()).sum(), leaf)
    return gradient


def guided(
    predict: Predict,
    log_value: LogValue,
    schedule: Schedule,
    embedding: TokenEmbedding,
    cap: float,
    window: tuple[float, float] = (0.0, 1.0),
    factor: Callable[[Tensor], Tensor] | None = None,
) -> Predict:
    """Add the gradient of a log-value to the score: s_π = s_ψ + ∇_z log_value(z, t) (science.md,
    "Reverse process").

    With Tweedie's formula the sum is ẑ_0 + (σ²/α) ∇_z log_value. The tokens feel the same gradient:
    the first-order change of log_value when position i turns into v is α ⟨∇_{z_i}, E(v)⟩, added to
    logits_{i,v}.

    Args:
        predict: the denoiser. log_value: (z (B, T, d), t (B, T)) → (B,), λ times the critic's
            value, or `true_gradient`.
        cap: longest allowed gradient per token, in units that do not depend on d: ‖∇_{z_i}‖ √d ≤
            cap.
        window: levels u in which guidance acts, as fractions of the way from clean (0) to noise
            (1).
        factor: scale of the gradient by level, u (B, T) → (B, T), applied before the cap; 1 by
            default.
    """
    root_d = embedding.dim**0.5

    def with_guidance(z: Tensor, t: Tensor, z0_prev: Tensor | None) -> Prediction:
        plain = predict(z, t, z0_prev)
        gradient = gradient_of(log_value, z, t)
        u = schedule.unwarp(t)
        active = (t > 0) & (u >= window[0]) & (u <= window[1])
        if factor is not None:
            gradient = gradient * factor(u)[..., None]
        norm = gradient.norm(dim=-1, keepdim=True) * root_d
        gradient = gradient * (cap / norm.clamp_min(cap)) * active[..., None]
        alpha, sigma = schedule.alpha(t)[..., None], schedule.sigma(t)[..., None]
        tilt = (alpha * gradient) @ embedding.weight.T
        z0 = plain.z0 + sigma.square() / alpha * gradient
        logits_network = plain.logits if plain.logits_network is None else plain.logits_network
        return Prediction(z0, plain.z0_network, plain.logits + tilt, logits_network)

    return with_guidance


class DifferentiableReward(Protocol):
    """A reward that also takes, at every position, a distribution over tokens in the place of a
    token.

    `soft(probabilities)`: (B, T, V), rows that sum to 1 → (B,), differentiable; on one-hot rows it
    is the reward of that text. A reward model that shares the tokenizer returns its output for the
    inputs `probabilities @ its own table`.
    """

    def soft(self, probabilities: Tensor) -> Tensor: ...


def true_gradient(
    reward: DifferentiableReward,
    network: Denoiser,
    embedding: TokenEmbedding,
    lam: float,
    straight_through: bool = False,
    temperature: float = 1.0,
) -> LogValue:
    """λ r(softmax(logits(z, t))) as a log-value for `guided`: the gradient runs through the reward
    and the denoiser.

    No critic is trained. It stands for log E[exp(λ r) | z_t] by putting the expectation inside the
    reward, right to first order in λ for a reward that is linear in the probabilities. Positions at
    t = 0 enter as the tokens that they are.

    Args:
        reward: r.
        network, embedding, temperature: the denoiser, as for `unguided`; asked without
            self-conditioning.
        lam: λ.
        straight_through: the reward sees the likeliest tokens, one-hot, and its gradient goes to
            the probabilities (Bengio et al., arXiv:1308.3432): for rewards that make nothing of a
            mixture of tokens.
    """

    def log_value(z: Tensor, t: Tensor) -> Tensor:
        soft = _token_logits(network, embedding, temperature, z, t, None).softmax(-1)
        if straight_through:
            soft = _one_hot(soft.argmax(-1), soft) + soft - soft.detach()
        clean = _one_hot(embedding.decode(z), soft)
        return lam * reward.soft(torch.where((t > 0)[..., None], soft, clean))

    return log_value


def _one_hot(tokens: Tensor, like: Tensor) -> Tensor:
    return F.one_hot(tokens, like.shape[-1]).to(like.dtype)
