"""What the wiring tests share: networks with random weights of which every input counts, and
guided sampling in plain loops.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dia_lightning.data.prompts import prompt_rows
from dia_lightning.diffusion.checkpoint import save_network
from dia_lightning.diffusion.critic import CriticNetwork
from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.guidance import Prediction
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.types import Batch, Reward
from tests.oracles.table_lm import END, T

LENGTH, STEPS, SOFT_LAM = 8, 6, 2.0
SIZE = NetworkSize(width=16, layers=1, heads=2, max_length=LENGTH)
# t at u = 0, 1/64, …, 1: far from t = u.
KNOTS = torch.linspace(0, 1, 65) ** 1.7


class Vowels(Reward):
    """The share of vowels among the characters, times 10; `soft` is another function, which only
    has to have a gradient.
    """

    name = "vowels"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor(
            [10 * sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts]
        )

    def soft(self, probabilities: Tensor) -> Tensor:
        value = torch.arange(probabilities.shape[-1]).sin()
        return 4 * (probabilities @ value).square().sum(1)


def randomise(network: torch.nn.Module, std: float) -> None:
    """No weight stays zero, so that no input is without effect."""
    for parameter in network.parameters():
        parameter.data += std * torch.randn(parameter.shape)


def save_parts(
    folder: Path,
    embedding: TokenEmbedding,
    reward: str,
    spread: float = 0.3,
    scale: float = 3.0,
    factorised: bool = False,
) -> None:
    """`denoiser`, an `mse` critic `critic` and a critic `soft` for λ = 2, all with random weights
    and a bent time.

    Args:
        reward: name of the critics' reward. spread: of the weights. scale: of the critics' values.
        factorised: the denoiser's trunk has no say, its logits are a bias and the likelihood of
            z_i.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        schedule = make_schedule("cosine")
        schedule.set_warp(KNOTS)
        denoiser, critic = (
            DenoiserNetwork(embedding, schedule, SIZE),
            CriticNetwork(embedding.dim, schedule, SIZE),
        )
        for network in (denoiser, critic):
            randomise(network, spread)
        critic.scale.fill_(scale)
        if factorised:
            denoiser.head.weight.data.zero_()
    settings: dict[str, Any] = {
        "schema": 1,
        "base_lm": "base",
        "embedding": embedding.fingerprint(),
        "schedule": "cosine",
    }
    settings |= {
        "size": SIZE.as_dict(),
        "tied_head": False,
        "objective": "mse",
        "lam": 1.0,
        "reward": reward,
    }
    save_network(denoiser, settings | {"kind": "denoiser"}, folder / "denoiser")
    save_network(critic, settings | {"kind": "critic"}, folder / "critic")
    save_network(
        critic, settings | {"kind": "critic", "objective": "soft", "lam": SOFT_LAM}, folder / "soft"
    )


def prompted(lm: BaseLM, prompts: list[str], index: int = 3) -> Batch:
    tokens, mask = prompt_rows(lm, prompts, LENGTH)
    records = [{"source": "a"} for _ in prompts]
    return Batch(index, list(range(len(prompts))), prompts, tokens, mask, records)


def apart(n: int, first: int | None = None) -> Batch:
    """A batch of n texts of the table with a record each, so that none shares a population.

    `first`: a token with which all begin.
    """
    tokens = torch.full((n, T), END)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    if first is not None:
        tokens[:, 0], mask[:, 0] = first, True
    prompt, records = "" if first is None else "ab"[first], [{"number": i} for i in range(n)]
    return Batch(0, list(range(n)), [prompt] * n, tokens, mask, records)


def seed_of(seed: int, index: int, stream: int = 0) -> torch.Generator:
    """The generator of batch `index`: of a method (stream 0), or of p_θ beside it (1)."""
    return torch.Generator().manual_seed(seed * 1_000_003 + 2 * index + stream)


def warped(u: float | Tensor) -> Tensor:
    """t(u) by NumPy."""
    grid = np.linspace(0, 1, len(KNOTS))
    return torch.tensor(np.interp(np.asarray(u), grid, KNOTS.numpy())).float()


def unwarped(t: Tensor) -> Tensor:
    """u(t) by NumPy."""
    return torch.from_numpy(
        np.interp(t.numpy(), KNOTS.numpy(), np.linspace(0, 1, len(KNOTS)))
    ).float()


def guided_by_hand(
    network: Any, embedding: TokenEmbedding, log_value: Callable[[Tensor, Tensor], Tensor] | None,
    scale: float = 1.0, decay: float = 0.0, cap: float = 100.0,
    window: tuple[float, float] = (0.0, 1.0), temperature: float = 1.0,
    self_conditioned: bool = True,
) -> Callable[..., Prediction]:  # fmt: skip
    """science.md's guided estimate, written out; `log_value` is λ times the value."""

    def predict(z: Tensor, t: Tensor, z0_prev: Tensor | None) -> Prediction:
        with torch.no_grad():
            logits = network(z, t, z0_prev if self_conditioned else None)
        logits = logits.masked_fill(~embedding.decodable, -torch.inf) / temperature
        z0 = logits.softmax(-1) @ embedding.weight
        if log_value is None:
            return Prediction(z0, z0, logits, logits)
        leaf = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_value(leaf, t).sum(), leaf)
        u = unwarped(t)
        gradient = scale * gradient * ((1 - u) ** decay)[..., None]
        length = gradient.norm(dim=-1, keepdim=True) * embedding.dim**0.5
        gradient = torch.where(length > cap, gradient * cap / length, gradient)
        gradient = gradient * ((t > 0) & (u >= window[0]) & (u <= window[1]))[..., None]
        alpha, sigma = network.schedule.alpha(t)[..., None], network.schedule.sigma(t)[..., None]
        tilted = logits + (alpha * gradient) @ embedding.weight.T
        return Prediction(z0 + sigma**2 / alpha * gradient, z0, tilted, logits)

    return predict


def times_by_hand(steps: int, stagger: float) -> Tensor:
    """(steps + 1, T) noise times."""
    rows = []
    for k in range(steps + 1):
        u, place = 1 - k / steps, torch.linspace(0, 1, LENGTH)
        rows.append(warped(((1 + stagger) * u - stagger * (1 - place)).clamp(0, 1)))
    return torch.stack(rows)


def ancestral_by_hand(
    predict: Callable[..., Prediction], network: Any, embedding: TokenEmbedding, batch: Batch,
    end_id: int, generator: torch.Generator, steps: int = STEPS, stagger: float = 2.0,
    final: str = "sample",
) -> Tensor:  # fmt: skip
    """The tokens (B, T) of ancestral sampling in one loop: one draw of noise a step, then one
    uniform number a position.
    """
    mask, schedule = batch.prompt_mask, network.schedule
    clean = embedding(batch.tokens)
    z = torch.where(mask[..., None], clean, torch.randn(clean.shape, generator=generator))
    grid, before = times_by_hand(steps, stagger), None
    for k in range(steps):
        t, s = (torch.where(mask, 0.0, grid[k + j]) for j in (0, 1))
        prediction = predict(z, t, before)
        before = prediction.z0_network
        (a_t, v_t), (a_s, v_s) = (
            (schedule.alpha(x)[..., None], schedule.sigma(x)[..., None] ** 2) for x in (t, s)
        )
        ratio = a_t / a_s
        var = (v_t - ratio**2 * v_s).clamp_min(0)
        mean = (ratio * v_s * z + a_s * var * prediction.z0) / v_t.clamp_min(1e-12)
        noise = torch.randn(z.shape, generator=generator)
        moved = mean + (var * v_s / v_t.clamp_min(1e-12)).sqrt() * noise
        z = torch.where((t > 0)[..., None], moved, z)
        if final == "sample":
            cumulative = prediction.logits.double().softmax(-1).cumsum(-1)
            u = torch.rand(t.shape, generator=generator, dtype=torch.float64)
            tokens = (
                (cumulative / cumulative[..., -1:] <= u[..., None])
                .sum(-1)
                .clamp_max(len(embedding.weight) - 1)
            )
        else:
            tokens = prediction.logits.argmax(-1)
        z = torch.where(((t > 0) & (s == 0))[..., None], embedding(tokens), z)
    tokens = torch.where(
        mask,
        batch.tokens,
        (z @ embedding.weight.T).masked_fill(~embedding.decodable, -torch.inf).argmax(-1),
    )
    for row, fixed in zip(tokens, mask, strict=True):
        ends = [i for i in range(LENGTH) if row[i] == end_id and not fixed[i]]
        if ends:
            row[ends[0] :] = end_id
    return tokens


def agree(tokens: Tensor, other: Tensor, batch: Batch) -> float:
    """The share of free positions with the same token. One of 84 may differ by rounding: a draw
    falls on an edge.
    """
    free = ~batch.prompt_mask
    return float((tokens == other)[free].double().mean())
