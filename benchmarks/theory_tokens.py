"""Total variation on a problem whose every text is listed, with networks of the package trained on
its samples.

A network call is one evaluation of one network for one text: of the denoiser, of the critic (its
value and gradient), or of p_θ (scoring a text is one call, drawing T tokens is T). Calls of the
reward are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dia_lightning.diffusion.critic import CriticNetwork
from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.loss import LOSSES, draw_times, noise
from dia_lightning.diffusion.schedule import make_schedule, time_grid
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.guidance import LogValue, Predict, Prediction, guided, unguided
from dia_lightning.numerics import draw_categorical
from dia_lightning.samplers.networks import DenoiserProposal
from dia_lightning.sampling.annealing import anneal, cycle, from_base
from dia_lightning.sampling.decode import commit_tokens
from dia_lightning.sampling.denoise_accept import DenoiserDrafts
from dia_lightning.sampling.drafts import SuffixDrafts
from dia_lightning.sampling.ensemble import EnsembleKernel
from dia_lightning.sampling.particles import Steering, smc
from dia_lightning.sampling.positions import RandomTokens
from dia_lightning.sampling.solvers import SOLVERS
from dia_lightning.sampling.state import Kernel
from dia_lightning.training.critic import OBJECTIVES
from dia_lightning.training.optim import AdamW
from tests.oracles.enumerable import Enumerable
from tests.oracles.listed import ListedTarget, listed_lm

DIM = 8
CAP = 1e6  # of the guidance gradient: none
STAGGER = 4.0  # left positions run ahead, as in the shipped configurations


@dataclass
class Problem:
    """An enumerable text model, its embedding and its networks; `critics` by objective."""

    listed: Enumerable
    lam: float
    embedding: TokenEmbedding
    denoiser: DenoiserNetwork
    critics: dict[str, CriticNetwork]

    @property
    def target(self) -> ListedTarget:
        return ListedTarget(self.listed, self.lam)


def make_problem(
    V: int, T: int, lam: float, train_steps: int, batch: int, seed: int = 0, run: Run = map
) -> Problem:
    """Train a denoiser and critics on samples of p, never on π; `run` maps a function over the
    networks' names.
    """
    listed = Enumerable(V, T, seed)
    table = np.random.default_rng(seed + 1).normal(size=(V, DIM)).astype(np.float32)
    embedding, size = (
        TokenEmbedding(torch.from_numpy(table)),
        NetworkSize(width=32, layers=2, heads=4, max_length=T),
    )
    train = partial(trained, listed, embedding, size, lam, train_steps, batch, seed)
    denoiser, mse, soft = run(train, ("denoiser", "mse", "soft"))
    return Problem(listed, lam, embedding, denoiser, {"mse": mse, "soft": soft})


def trained(
    listed: Enumerable,
    embedding: TokenEmbedding,
    size: NetworkSize,
    lam: float,
    steps: int,
    batch: int,
    seed: int,
    name: str,
) -> Any:
    """The network called `name`, for less time where it is a critic."""
    torch.manual_seed(seed)
    schedule = make_schedule("cosine")
    if name == "denoiser":
        denoiser = DenoiserNetwork(embedding, schedule, size)
        _train(denoiser, _denoiser_loss(denoiser), listed, steps, batch, seed)
        return denoiser
    critic = CriticNetwork(DIM, schedule, size)
    _train(critic, _critic_loss(critic, embedding, name, lam), listed, steps * 2 // 5, batch, seed)
    return critic


Run = Callable[
    [Callable[[Any], Any], Iterable[Any]], Iterable[Any]
]  # `map`, or that of a pool of processes
Loss = Callable[
    [int, Tensor, Tensor, torch.Generator], Tensor
]  # step, tokens (B, T), rewards (B,), generator


def _train(
    network: nn.Module, loss: Loss, listed: Enumerable, steps: int, batch: int, seed: int
) -> None:
    """AdamW on fresh samples of p."""
    recipe = AdamW(3e-3, 0.0, steps // 20 + 1).configure(network.named_parameters(), steps)
    optimizer, scheduler = recipe["optimizer"], recipe["lr_scheduler"]["scheduler"]
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    p = np.exp(listed.log_p)
    for step in range(steps):
        place = rng.choice(len(p), batch, p=p)
        tokens, reward = (
            torch.from_numpy(listed.sequences[place]),
            torch.from_numpy(listed.reward[place]).float(),
        )
        optimizer.zero_grad()
        loss(step, tokens, reward, generator).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    network.eval().requires_grad_(False)


def _noised(
    tokens: Tensor, embedding: TokenEmbedding, schedule: Any, generator: torch.Generator
) -> Any:
    times = draw_times(*tokens.shape, schedule, generator)
    eps = torch.randn(*tokens.shape, embedding.dim, generator=generator)
    rows = torch.arange(len(tokens))
    return noise(
        tokens, times, torch.zeros_like(tokens, dtype=torch.bool), rows, embedding, schedule, eps
    )


def _denoiser_loss(network: DenoiserNetwork) -> Loss:
    def loss(step: int, tokens: Tensor, reward: Tensor, generator: torch.Generator) -> Tensor:
        noised = _noised(tokens, network.embedding, network.schedule, generator)
        hidden, query = network.hidden(noised.z, noised.t)
        keep = noised.noised
        return LOSSES["ce"](network, hidden[keep], query[keep], tokens[keep], noised.t[keep]).mean()

    return loss


def _critic_loss(
    critic: CriticNetwork, embedding: TokenEmbedding, objective: str, lam: float
) -> Loss:
    # The reward of an enumerable problem is standardised under p already.
    def loss(step: int, tokens: Tensor, reward: Tensor, generator: torch.Generator) -> Tensor:
        noised = _noised(tokens, embedding, critic.schedule, generator)
        target = lam * reward if objective == "soft" else reward
        return OBJECTIVES[objective](critic.standardised(noised.z, noised.t), target).mean()

    return loss


def predictor(problem: Problem, critic: str | None, denoiser: Predict | None = None) -> Predict:
    """The trained denoiser, or the one given, guided by a trained critic."""
    predict = unguided(problem.denoiser, problem.embedding) if denoiser is None else denoiser
    if critic is None:
        return predict
    value = log_value(problem, critic)
    return guided(predict, value, problem.denoiser.schedule, problem.embedding, CAP)


def log_value(problem: Problem, critic: str) -> LogValue:
    """λ E[r | z_t] or log E[exp(λ r) | z_t] as the critic has learned it."""
    scale, network = 1.0 if critic == "soft" else problem.lam, problem.critics[critic]
    return lambda z, t: scale * network(z, t)


def exact_predictor(problem: Problem, lam: float) -> Predict:
    """What no network can better: the marginals of π(x) N(z; α E(x), σ²) at λ, summed over every
    text.

    At λ of the target this is the denoiser guided by the exact value function; at λ = 0 it is the
    exact denoiser of p.
    """
    log_pi = torch.from_numpy(problem.listed.log_pi(lam)).float()
    one_hot = torch.nn.functional.one_hot(
        torch.from_numpy(problem.listed.sequences), problem.listed.V
    ).float()

    def predict(z: Tensor, t: Tensor, _: Tensor | None) -> Prediction:
        alpha, sigma = (
            f(t)[..., None]
            for f in (problem.denoiser.schedule.alpha, problem.denoiser.schedule.sigma)
        )
        # All rows of E have one norm, so only the inner product depends on the token.
        each = (alpha / sigma.square().clamp_min(1e-4) * z) @ problem.embedding.weight.T
        posterior = (each.flatten(1) @ one_hot.flatten(1).T + log_pi).softmax(-1)
        p = (posterior @ one_hot.flatten(1)).unflatten(1, each.shape[1:])
        z0 = p @ problem.embedding.weight
        return Prediction(z0, z0, p.clamp_min(1e-30).log())

    return predict


def exact_mean_reward(problem: Problem, predict: Predict) -> Predict:
    """`predict` guided by λ E_p[r | z_t] itself, which a critic of objective `mse` can at best
    learn.
    """
    log_p, reward = (
        torch.from_numpy(x).float() for x in (problem.listed.log_p, problem.listed.reward)
    )
    sequences = torch.from_numpy(problem.listed.sequences)
    flat = torch.nn.functional.one_hot(sequences, problem.listed.V).float().flatten(1)
    schedule = problem.denoiser.schedule

    def mean_reward(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t)[..., None], schedule.sigma(t)[..., None]
        each = (alpha / sigma.square().clamp_min(1e-4) * z) @ problem.embedding.weight.T
        return problem.lam * (each.flatten(1) @ flat.T + log_p).softmax(-1) @ reward

    return guided(predict, mean_reward, schedule, problem.embedding, CAP)


def reverse_process(
    problem: Problem,
    predict: Predict,
    solver: str,
    levels: int,
    n: int,
    generator: torch.Generator,
    **options: Any,
) -> Tensor:
    """Tokens (n, T) of a solver with `levels` levels, left positions ahead."""
    T, schedule = problem.listed.T, problem.denoiser.schedule
    z = torch.randn(n, T, DIM, generator=generator)
    times = time_grid(schedule, levels, T, STAGGER)
    commit = commit_tokens(problem.embedding, True, generator)
    return problem.embedding.decode(
        SOLVERS[solver](predict, schedule, z, times, generator, commit, **options)
    )


def steered(
    problem: Problem, critic: str, potential: str, budget: int, n: int, generator: torch.Generator
) -> tuple[Tensor, np.ndarray]:
    """One population of n paths: tokens (n, T) and their weights (n,).

    FK potentials steer the unguided denoiser (two calls a level), DAS the guided one (three). `max`
    and `sum` are asked at four levels only, since they add up.
    """
    das = potential == "das"
    levels, value = budget // (3 if das else 2), log_value(problem, critic)
    every = max(1, levels // 4) if potential in ("max", "sum") else 1
    target = problem.target
    steering = Steering(
        lambda tokens: target.terms(tokens).reward,
        lambda z, t: value(z, t) / problem.lam,
        problem.lam,
        potential,
        every,
    )
    z = torch.randn(n, problem.listed.T, DIM, generator=generator)
    times = time_grid(problem.denoiser.schedule, levels, problem.listed.T, STAGGER)
    predict = predictor(problem, critic if das else None)
    found = smc(
        predict, problem.denoiser.schedule, z, times, generator, steering, problem.embedding
    )
    return problem.embedding.decode(found.z), found.log_w[0].exp().numpy()


def base_samples(problem: Problem, n: int, generator: torch.Generator) -> Tensor:
    empty = torch.zeros(n, problem.listed.T, dtype=torch.int64)
    return problem.target.lm.generate(empty, torch.zeros_like(empty, dtype=torch.bool), generator)


def best_of_n(problem: Problem, candidates: int, n: int, generator: torch.Generator) -> Tensor:
    """One of `candidates` samples of p, drawn in proportion to exp(λ r): importance resampling
    for each text.
    """
    tokens = base_samples(problem, n * candidates, generator)
    reward = problem.target.terms(tokens).reward.unflatten(0, (n, candidates))
    chosen = draw_categorical(problem.lam * reward, generator)
    return tokens.unflatten(0, (n, candidates))[torch.arange(n), chosen]


def make_kernels(problem: Problem, names: Sequence[str]) -> tuple[list[Kernel], int]:
    """Kernels by name, and network calls of one round of them."""
    target, made, calls = problem.target, [], 0
    for name in names:
        if name == "suffix":
            made.append(EnsembleKernel(target, SuffixDrafts(listed_lm(problem.listed))))  # type: ignore[arg-type]
            calls += problem.listed.T + 1
        else:
            proposal = DenoiserProposal(problem.denoiser)
            schedule, positions = problem.denoiser.schedule, RandomTokens(2)
            drafts = DenoiserDrafts(proposal, problem.embedding, schedule, positions, (1.0,), 2)
            made.append(EnsembleKernel(target, drafts))  # type: ignore[arg-type]
            calls += 2 * 2
    return made, calls


def chains(
    problem: Problem, names: Sequence[str], budget: int, n: int, generator: torch.Generator
) -> Tensor:
    """Chains that start at samples of p and spend the rest of the budget on moves."""
    tokens = base_samples(problem, n, generator)
    kernels, calls = make_kernels(problem, names)
    state = kernels[0].init(tokens)  # type: ignore[attr-defined]
    return cycle(kernels, state, (budget - problem.listed.T) // calls, generator)[0].tokens


def population(
    problem: Problem, names: Sequence[str], budget: int, n: int, generator: torch.Generator
) -> Tensor:
    """One annealed population of n, its moves as many at each temperature as the budget allows."""
    tokens = base_samples(problem, n, generator)
    mask, target = torch.zeros_like(tokens, dtype=torch.bool), problem.target
    kernels, calls = make_kernels(problem, names) if names else ([], 1)
    begin = from_base(target, tokens, mask)  # type: ignore[arg-type]
    state = anneal(target, [], begin, 1, torch.Generator().manual_seed(0))[2]  # type: ignore[arg-type]
    rounds = (budget - problem.listed.T) // calls
    moves = rounds // len(state.lam)
    state, _, trace = anneal(target, kernels, begin, 1, generator, moves=moves)  # type: ignore[arg-type]
    # What the temperatures leave over is spent at the last one.
    return cycle(
        kernels, state, max(0, rounds - moves * len(trace.lam)) if kernels else 0, generator
    )[0].tokens
