"""Remakes the tables of docs/theory.md about the shipped kit: refinement step by step, and methods
at equal time.

    python benchmarks/kit.py                        both
    python benchmarks/kit.py refinement methods     one of them

On one thread, in processor seconds, so that what else runs on the machine does not count.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from benchmarks.theory import DOC, fill, table
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.guidance import guided, unguided
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import Keyword, VaderSentiment
from dia_lightning.rewards.base import call_reward
from dia_lightning.samplers import DenoiseAccept, Models, Move, Suffix
from dia_lightning.samplers.networks import load_critic, load_denoiser
from dia_lightning.sampling.annealing import anneal, cycle, from_base
from dia_lightning.sampling.decode import draw_texts
from dia_lightning.sampling.diagnostics import chain_diagnostics
from dia_lightning.sampling.state import Kernel, State, start, take
from dia_lightning.target import TargetDensity
from dia_lightning.types import Batch, Reward, text_mask

LENGTH, TEXTS = 40, 256
MOVES: dict[str, list[Move]] = {
    "none": [], "suffix": [Suffix()], "denoise_accept": [DenoiseAccept()],
    "both": [Suffix(), DenoiseAccept()],
}  # fmt: skip


class Kit:
    """The shipped networks and a stream of random numbers."""

    def __init__(self, seed: int) -> None:
        self.lm = BaseLM.load("checkpoints/tiny/lm")
        self.embedding = TokenEmbedding(self.lm.embedding_table(), len(self.lm.tokenizer))
        self.denoiser = load_denoiser("checkpoints/tiny/denoiser", self.embedding)
        self.critic, _ = load_critic("checkpoints/tiny/critic", self.embedding)
        self.generator = torch.Generator().manual_seed(seed)

    def empty(self, n: int) -> tuple[Tensor, Tensor]:
        tokens = torch.full((n, LENGTH), self.lm.end_id)
        return tokens, torch.zeros_like(tokens, dtype=torch.bool)

    def base(self, n: int) -> Tensor:
        """Samples (n, T) of p_θ."""
        return self.lm.generate(*self.empty(n), self.generator)

    def guided(self, n: int, lam: float) -> Tensor:
        """Texts of the guided diffusion, with the options of configs/guided_tiny.yaml."""
        predict = unguided(self.denoiser, self.embedding)
        if lam:
            predict = guided(
                predict,
                lambda z, t: 10 * lam * self.critic(z, t),
                self.denoiser.schedule,
                self.embedding,
                100.0,
            )
        work = Batch(0, list(range(n)), [""] * n, *self.empty(n))
        with torch.autocast("cpu", torch.bfloat16):
            return draw_texts(
                predict, work, self.embedding, self.denoiser.schedule, self.lm.end_id,
                self.generator, "dia", 64, 40.0, corrector_steps=1, eta=0.1,
            )  # fmt: skip

    def kernels(self, moves: str, target: TargetDensity) -> list[Kernel]:
        """The kernels of `MOVES`."""
        models = Models(self.lm, self.embedding, self.denoiser, None, target.reward, target.lam)
        return [move.kernel(models, target) for move in MOVES[moves]]

    def rewards(self, reward: Reward, tokens: Tensor) -> Tensor:
        return call_reward(
            reward, self.lm.decode(tokens, torch.zeros_like(tokens, dtype=torch.bool))
        )

    def n_tokens(self, tokens: Tensor) -> Tensor:
        return text_mask(tokens, torch.zeros_like(tokens, dtype=torch.bool), self.lm.end_id).sum(1)


def mean_and_error(values: Tensor) -> str:
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


def per_token(kit: Kit, state: State) -> tuple[float, float]:
    """Mean log p_θ per token over all tokens, and its standard error over texts (a ratio, by
    linearisation).
    """
    n = kit.n_tokens(state.tokens).double()
    ratio = float(state.log_base.sum() / n.sum())
    residual = state.log_base - ratio * n
    return ratio, float(residual.std() / len(n) ** 0.5 / n.mean())


def refinement(kit: Kit, n: int = 512) -> str:
    """Reward and log p_θ of guided diffusion after so many exact moves, unguided and at λ = 6."""
    reward, rows = VaderSentiment(), []
    base = start(TargetDensity(kit.lm, reward, 0.0), kit.base(4 * n))
    at, error = per_token(kit, base)
    rows.append(
        ["p_θ itself", "", "", f"{at:.3f} ± {error:.3f}", mean_and_error(base.reward), "", "", ""]
    )
    for lam, plan in (
        (0.0, {"denoise_accept": (0, 5, 20), "both": (0, 5, 20)}),
        (6.0, {"both": (0, 5, 20, 100)}),
    ):
        begun = kit.guided(n, lam)
        for moves, steps in plan.items():
            target = TargetDensity(kit.lm, reward, lam)
            state, kernels = start(target, begun), kit.kernels(moves, target)
            done, rewards, accepted = 0, [], math.nan
            for wanted in steps:
                if wanted > done:
                    state, followed = cycle(kernels, state, wanted - done, kit.generator)
                    accepted, done = float(followed.accepted.mean()), wanted
                    rewards.append(followed.reward)
                at, error = per_token(kit, state)
                known = chain_diagnostics(torch.cat(rewards)) if rewards else {}
                figures = [accepted, known.get("ess", math.nan), known.get("rhat", math.nan)]
                start_name = "`dia`, unguided" if lam == 0 else f"`dia`, λ = {lam:g}"
                rows.append([
                    start_name, moves, str(wanted), f"{at:.3f} ± {error:.3f}",
                    mean_and_error(state.reward),
                    *("" if math.isnan(f) else f"{f:.3g}" for f in figures),
                ])  # fmt: skip
                print(rows[-1], flush=True)
    head = [
        "start",
        "moves",
        "rounds",
        "log p_θ per token (nats)",
        "reward",
        "accepted",
        "ESS of the reward",
        "R̂",
    ]
    return table(head, rows)


Method = Callable[[Kit, TargetDensity, int, int], State]


def best_of_n(kit: Kit, target: TargetDensity, texts: int, n: int) -> State:
    """The best of n samples of p_θ, for each text."""
    tokens = kit.base(texts * n)
    best = kit.rewards(target.reward, tokens).unflatten(0, (texts, n)).argmax(1) + n * torch.arange(
        texts
    )
    return start(target, tokens[best])


def population(moves: str) -> Method:
    """An annealed population of n particles a text, all texts in one; a round of moves at each
    temperature and at the end.
    """

    def run(kit: Kit, target: TargetDensity, texts: int, n: int) -> State:
        kernels, (_, mask) = kit.kernels(moves, target), kit.empty(texts * n)
        rounds = 1 if kernels else 0
        state, _, _ = anneal(
            target,
            kernels,
            from_base(target, kit.base(texts * n), mask),
            1,
            kit.generator,
            0.5,
            rounds,
        )
        state, _ = cycle(kernels, state, rounds, kit.generator)
        return take(state, torch.randperm(texts * n, generator=kit.generator)[:texts])

    return run


def chains(moves: str) -> Method:
    """n steps from samples of p_θ, one chain a text."""

    def run(kit: Kit, target: TargetDensity, texts: int, n: int) -> State:
        return cycle(kit.kernels(moves, target), start(target, kit.base(texts)), n, kit.generator)[
            0
        ]

    return run


METHODS: dict[str, tuple[Method, tuple[int, ...]]] = {
    "best-of-{}": (best_of_n, (4, 16)),
    "population without moves, {} particles a text": (population("none"), (4, 16)),
    "population, suffix moves, {} particles a text": (population("suffix"), (2, 4)),
    "population, both moves, {} particles a text": (population("both"), (1, 2)),
    "denoise-and-accept alone, {} steps": (chains("denoise_accept"), (10,)),
    "suffix regeneration alone, {} steps": (chains("suffix"), (20,)),
}


def exact_moments(rewards: Tensor, lam: float) -> tuple[float, float]:
    """Mean and variance of the reward under π, from self-normalised weights of many samples of
    p_θ.
    """
    weight = (lam * rewards.double()).softmax(0)
    mean = float(weight @ rewards.double())
    return mean, float(weight @ (rewards.double() - mean).square())


def measured(
    kit: Kit,
    name: str,
    method: Method,
    target: TargetDensity,
    budget: int,
    repeats: int,
    exact: float,
    variance: float,
) -> list[str]:
    """One row: processor seconds, mean reward and log p_θ over runs, distinct texts, effective
    draws a second.

    The last is Var_π(r) / MSE of a run's mean reward to that of π, over its time: independent draws
    of π that would do as well.
    """
    states, begin = [], time.process_time()
    for _ in range(repeats):
        states.append(method(kit, target, TEXTS, budget))
    seconds = (time.process_time() - begin) / repeats
    means = torch.stack([state.reward.mean() for state in states])
    log_p = torch.tensor([per_token(kit, state)[0] for state in states])
    distinct = sum(len({tuple(row) for row in state.tokens.tolist()}) for state in states) / (
        repeats * TEXTS
    )
    per_second = variance / float((means - exact).square().mean()) / seconds
    row = [
        name.format(budget).replace(" 1 particles", " 1 particle"),
        f"{seconds:.1f}",
        mean_and_error(means),
        mean_and_error(log_p),
        f"{distinct:.2f}",
        f"{per_second:.3g}",
    ]
    print(row, flush=True)
    return row


def methods(kit: Kit, repeats: int = 2, n_reference: int = 20_000) -> str:
    """Every method at every budget, for a common reward and a rare one."""
    samples = torch.cat([kit.base(2000) for _ in range(n_reference // 2000)])
    rows = []
    for reward, lams in (
        (Keyword(["delicious"], "delicious"), (8.0, 4.0)),
        (VaderSentiment(), (6.0, 2.0)),
    ):
        rewards = kit.rewards(reward, samples)
        for lam in lams:
            exact, variance = exact_moments(rewards, lam)
            given = (
                f"**{reward.name}, λ = {lam:g}**: mean reward {rewards.mean():.4f} under p_θ,"
                f" {exact:.3f} under π"
            )
            rows.append([given, "", "", "", "", ""])
            print(given, flush=True)
            target = TargetDensity(kit.lm, reward, lam)
            for name, (method, budgets) in METHODS.items():
                for budget in budgets:
                    rows.append(
                        measured(kit, name, method, target, budget, repeats, exact, variance)
                    )
    head = [
        f"method, {TEXTS} texts",
        "processor s",
        "reward",
        "log p_θ per token (nats)",
        "distinct texts",
        "effective draws / s",
    ]
    return table(head, rows)


PARTS = {"refinement": refinement, "methods": methods}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or PARTS:
        begin = time.process_time()
        body = PARTS[name](Kit(seed=0))
        minutes = (time.process_time() - begin) / 60
        body += (
            f"\n\nMade by `python benchmarks/kit.py {name}`, seed 0, in {minutes:.0f} minutes of"
            " one core (AMD EPYC)."
        )
        DOC.write_text(fill(DOC.read_text(encoding="utf-8"), f"kit-{name}", body), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
