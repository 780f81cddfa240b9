"""Every sampler at equal numbers of network calls, and what each approximation costs: the
figures of benchmarks/theory.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.theory_mixture import Curve, curve
from benchmarks.theory_tokens import (
    Problem,
    Run,
    best_of_n,
    chains,
    exact_mean_reward,
    exact_predictor,
    make_problem,
    population,
    predictor,
    reverse_process,
    steered,
)
from dia_lightning.guidance import Predict

# (problem, critic, network calls a text, texts, generator) → tokens (n, T), weights (n,) or None
# where all are equal.
Sampler = Callable[[Problem, str, int, int, torch.Generator], tuple[Tensor, np.ndarray | None]]


def _solver(
    solver: str,
    calls_a_level: int,
    denoise: Callable[[Problem, str], Predict] = predictor,
    **options: Any,
) -> Sampler:
    def sampler(
        problem: Problem, critic: str, budget: int, n: int, generator: torch.Generator
    ) -> tuple[Tensor, None]:
        predict = denoise(problem, critic)
        return (
            reverse_process(
                problem, predict, solver, budget // calls_a_level, n, generator, **options
            ),
            None,
        )

    return sampler


def _steered(potential: str) -> Sampler:
    return partial(_reordered, potential)


def _reordered(
    potential: str, problem: Problem, critic: str, budget: int, n: int, generator: torch.Generator
) -> tuple[Tensor, np.ndarray]:
    return steered(problem, critic, potential, budget, n, generator)


def _moves(run: Callable[..., Tensor], *names: str) -> Sampler:
    def sampler(
        problem: Problem, critic: str, budget: int, n: int, generator: torch.Generator
    ) -> tuple[Tensor, None]:
        return run(problem, names, budget, n, generator), None

    return sampler


def _best_of_n(
    problem: Problem, critic: str, budget: int, n: int, generator: torch.Generator
) -> tuple[Tensor, None]:
    return best_of_n(problem, budget // problem.listed.T, n, generator), None


# A guided level is a call of the denoiser and one of the critic; `dia` does a corrector step at
# each.
GUIDED: dict[str, Sampler] = {
    "ancestral (classifier guidance)": _solver("ancestral", 2),
    "ddim": _solver("ddim", 2),
    "dpmpp_2m": _solver("dpmpp_2m", 2),
    "dia": _solver("dia", 4, corrector_steps=1, eta=0.1),
    "dia_literal, marginal": _solver("dia_literal", 2, eta=0.1, reading="marginal"),
    "dia_literal, per step": _solver("dia_literal", 2, eta=0.1, reading="per_step"),
    "SMC, FK difference": _steered("difference"),
    "SMC, DAS": _steered("das"),
}
GUIDED_AT_THE_END: dict[str, Sampler] = {
    "SMC, FK max": _steered("max"),
    "SMC, FK sum": _steered("sum"),
}
ON_P: dict[str, Sampler] = {
    "best-of-n": _best_of_n,
    "suffix regeneration": _moves(chains, "suffix"),
    "denoise-and-accept": _moves(chains, "denoise_accept"),
    "both in turn": _moves(chains, "suffix", "denoise_accept"),
    "population, no moves": _moves(population),
    "population, suffix": _moves(population, "suffix"),
    "population, denoise-and-accept": _moves(population, "denoise_accept"),
}
SOFT = ("ancestral (classifier guidance)", "ddim", "dpmpp_2m", "dia", "SMC, DAS")
# Network calls a level.
CALLS = {
    **dict.fromkeys(GUIDED, 2),
    **dict.fromkeys(GUIDED_AT_THE_END, 2),
    "dia": 4,
    "SMC, DAS": 3,
}
PREDICTORS = ("ancestral", "ddim", "dpmpp_2m")
# One approximation more in each row; the last, the trained denoiser, is in the curves already.
STAGES: dict[tuple[str, str], Callable[[Problem, str], Predict]] = {
    ("exact", "exact, log E[exp(λ r) \\| z]"): lambda problem, _: exact_predictor(
        problem, problem.lam
    ),
    ("exact", "exact, λ E[r \\| z]"): lambda problem, _: exact_mean_reward(
        problem, exact_predictor(problem, 0.0)
    ),
    ("exact", "critic `mse`"): lambda problem, critic: predictor(
        problem, critic, exact_predictor(problem, 0.0)
    ),
}
COSTS = {
    (*stage, s): _solver(s, 2, predict) for stage, predict in STAGES.items() for s in PREDICTORS
}
ALL: dict[Any, Sampler] = {**GUIDED, **GUIDED_AT_THE_END, **ON_P, **COSTS}
PANELS = (tuple(GUIDED), tuple(ON_P))


@dataclass(frozen=True)
class Scale:
    """How much is done. budgets: network calls a text, the table is made at the last one.
    levels: of unguided samples.
    """

    V: int = 5
    T: int = 4
    lam: float = 1.0
    n: int = 1500
    seeds: int = 3
    budgets: tuple[int, ...] = (8, 16, 32, 64)
    levels: tuple[int, ...] = (16, 32, 64)
    train_steps: int = 4000
    batch: int = 256


class Found(NamedTuple):
    """curves: total variation to π by network calls. floor: of n exact draws; untouched: of n
    samples of p.

    tables: (head, rows) by marker. notes: a sentence under each.
    """

    curves: dict[str, Curve]
    floor: float
    untouched: float
    tables: dict[str, tuple[Sequence[str], list[list[str]]]]
    notes: dict[str, str]


def measure(scale: Scale, run: Run = map) -> Found:
    """Train, sample, compare; `run` maps the work, which is the same in whatever order it is
    done.
    """
    problem = make_problem(scale.V, scale.T, scale.lam, scale.train_steps, scale.batch, run=run)
    rng = np.random.default_rng(0)
    floors = {lam: problem.listed.floor(scale.n, lam, rng, 50) for lam in (0.0, scale.lam)}
    base = [problem.listed.draw(scale.n, 0.0, rng) for _ in range(20)]
    untouched = float(
        np.mean([problem.listed.total_variation(tokens, scale.lam) for tokens in base])
    )
    unguided = _table_of_denoisers(problem, scale)
    print(
        "unguided: levels, trained, exact denoiser:",
        *unguided,
        f"floor {floors[0.0]:.3f}",
        flush=True,
    )
    every = [(name, "mse", budget) for name in (*GUIDED, *ON_P) for budget in scale.budgets]
    last = scale.budgets[-1]
    every += [(name, "mse", last) for name in (*GUIDED_AT_THE_END, *COSTS)] + [
        (name, "soft", last) for name in SOFT
    ]
    jobs = [(*job, seed) for job in every for seed in range(scale.seeds)]
    values = dict(zip(jobs, run(partial(distance, problem, scale.n), jobs), strict=True))

    def line(name: Any, critic: str, budgets: Sequence[int]) -> Curve:
        return curve(
            budgets,
            [[values[name, critic, b, seed] for b in budgets] for seed in range(scale.seeds)],
        )

    curves = {name: line(name, "mse", scale.budgets) for name in (*GUIDED, *ON_P)}
    rows = []
    for name in (*GUIDED, *GUIDED_AT_THE_END):
        soft = _cell(line(name, "soft", [last])) if name in SOFT else "–"
        rows.append([name, _cell(line(name, "mse", [last])), soft, f"{last // CALLS[name]} levels"])
    rows += [[name, f"{_cell(curves[name])} (no critic)", "", _steps(name, scale)] for name in ON_P]
    costs = [
        [
            *stage,
            *(_cell(line((*stage, s), "mse", [last])) for s in ("ancestral", "ddim", "dpmpp_2m")),
        ]
        for stage in STAGES
    ]
    guided = (next(name for name in GUIDED if name.startswith(s)) for s in PREDICTORS)
    costs.append(
        ["trained", "critic `mse`", *(_cell(line(name, "mse", [last])) for name in guided)]
    )
    size = (
        f"{len(problem.listed.sequences)} texts (V = {scale.V}, T = {scale.T}), λ = {scale.lam:g}"
    )
    common = f"{size}; {scale.n:,} texts a run, {scale.seeds} seeds, mean ± standard error."
    floor, floor_p = f"{floors[scale.lam]:.3f}", f"{floors[0.0]:.3f}"
    tables = {
        "denoiser": (["noise levels", "trained denoiser", "exact denoiser"], unguided),
        "samplers": (["sampler", "critic `mse`", "critic `soft`", "steps"], rows),
        "costs": (["denoiser", "guidance", *PREDICTORS], costs),
    }
    notes = {
        "denoiser": (
            f"Total variation to p of unguided `ancestral` samples. {common} Floor: {floor_p}."
        ),
        "samplers": (
            f"Total variation to π at {scale.budgets[-1]} network calls a text. {common} Floor:"
            f" {floor}. Samples of p, untouched: {untouched:.3f}."
        ),
        "costs": (
            f"Total variation to π with {scale.budgets[-1] // 2} levels. {common} Floor: {floor}."
        ),
    }
    return Found(curves, floors[scale.lam], untouched, tables, notes)


def distance(problem: Problem, n: int, job: tuple[Any, str, int, int]) -> float:
    """Total variation to π of n texts, for a job (sampler, critic, network calls, seed)."""
    name, critic, budget, seed = job
    tokens, weights = ALL[name](
        problem, critic, budget, n, torch.Generator().manual_seed(1_000 * seed + budget)
    )
    return problem.listed.total_variation(tokens, problem.lam, weights)


def _steps(name: str, scale: Scale) -> str:
    """What a sampler on p does with the last budget: drawing a text is T calls, a move is its
    proposal and its score.
    """
    budget, T = scale.budgets[-1], scale.T
    calls = {"suffix": T + 1, "denoise-and-accept": 2 * 2, "both": T + 1 + 2 * 2}
    for kind, each in calls.items():
        if kind in name:
            return f"{(budget - T) // each} moves"
    return f"{budget // T} candidates" if name == "best-of-n" else f"{T} calls only"


def _cell(line: Curve) -> str:
    return f"{line.mean[-1]:.3f} ± {line.error[-1]:.3f}"


def _table_of_denoisers(problem: Problem, scale: Scale) -> list[list[str]]:
    rows = []
    for levels in scale.levels:
        row = [str(levels)]
        for predict in (predictor(problem, None), exact_predictor(problem, 0.0)):
            values = [
                problem.listed.total_variation(
                    reverse_process(
                        problem,
                        predict,
                        "ancestral",
                        levels,
                        scale.n,
                        torch.Generator().manual_seed(seed),
                    ),
                    0.0,
                )
                for seed in range(scale.seeds)
            ]
            row.append(_cell(curve([levels], [[v] for v in values])))
        rows.append(row)
    return rows
