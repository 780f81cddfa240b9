"""How many effective samples the exact moves give by position of p_θ and by second.

    make moves                                     every row that is missing, the important first
    python benchmarks/moves.py --minutes 60        begin no row after an hour; go on another time
    python benchmarks/moves.py --kits tiny --lengths 40 --seeds 0

Chains of one move start from the same texts, (near) draws of π: of POOL texts of p_θ for each chain
one is drawn by its weight exp(λ r), then moved by BURN uniform suffix moves. Each row runs as many
seconds; rows stand in runs/moves/rows.jsonl, the tables go to docs/results.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from benchmarks.rows import DOC, Rows, cell, made_by, options, publish
from benchmarks.theory import table
from dia_lightning.data import Reading
from dia_lightning.data.prompts import PromptData
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.meter import Meter
from dia_lightning.numerics import draw_categorical
from dia_lightning.rewards import VaderSentiment
from dia_lightning.samplers import Chains, GuidedSamplerModule, Models, Move, Suffix, moves
from dia_lightning.sampling.annealing import cycle
from dia_lightning.sampling.diagnostics import by_prompt
from dia_lightning.sampling.state import State, start
from dia_lightning.target import TargetDensity, completions
from dia_lightning.types import Batch, Reward, scored_mask

OUT = ROOT / "runs" / "moves"
POOL, BURN = 32, 10
Part = Mapping[str, Any]


class SentimentBySentence(Reward):
    """Mean of VADER's compound over the sentences of a text."""

    def __init__(self) -> None:
        self.name, self._one = "sentences", VaderSentiment()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        cut = [[s for s in re.split(r"(?<=[.!?])\s+", text) if s.strip()] or [""] for text in texts]
        each = self._one([sentence for sentences in cut for sentence in sentences])
        return torch.stack([part.mean() for part in each.split([len(s) for s in cut])])


REWARDS = {"sentiment": (VaderSentiment, 8.0), "sentences": (SentimentBySentence, 20.0)}
SUBJECTS = ["a lighthouse keeper", "two old friends"]
TEMPLATE = "user\nWrite a long story about {prompt}.<|im_end|>\n<|im_start|>assistant\n"
KITS: dict[str, dict[str, Any]] = {
    "tiny": {
        "base_lm": "checkpoints/tiny/lm", "prompts": [""], "chains": 64, "lengths": [40],
        "seconds": 40,
    },
    "smollm2": {
        "base_lm": "smollm2", "prompts": [TEMPLATE.format(prompt=s) for s in SUBJECTS],
        "chains": 16, "lengths": [128, 48, 256], "seconds": 240,
    },
}  # fmt: skip
DEFAULTS = {"tries": 1, "form": "metropolis", "cut": "uniform"}
KINDS = {"suffix": "Suffix", "window": "Window", "denoise": "DenoiseAccept"}


def suffix(tries: int = 1, cut: str = "uniform", form: str = "metropolis") -> Part:
    return {"kind": "suffix", "tries": tries, "cut": cut, "form": form}


def window(length: int, tries: int, cut: str = "uniform", form: str = "metropolis") -> Part:
    return {"kind": "window", "length": length, "tries": tries, "cut": cut, "form": form}


def variants() -> list[list[list[Part]]]:
    """The moves of each row, in tiers of falling importance; the first is today's."""
    cuts, tries, lengths = ("uniform", "entropy"), (1, 4, 8, 16), (4, 8, 16)
    first = [[suffix()]]
    second = [[suffix(k, cut)] for k, cut in product((4, 8), cuts)] + [[suffix(1, "entropy")]]
    third = [[window(n, 8)] for n in lengths]
    third += [[suffix(4, "entropy"), window(8, 8)], [suffix(4), window(8, 8, "entropy")]]
    third += [[suffix(4, "jump")], [suffix(4, form="gibbs")]]
    every = [[suffix(k, cut)] for k, cut in product(tries, (*cuts, "jump"))]
    every += [[window(n, k, cut)] for n, k, cut in product(lengths, tries, cuts)]
    every += [[suffix(k, cut), window(n, k, cut)]
              for n, k, cut in product(lengths, (4, 8), cuts)]  # fmt: skip
    every += [[suffix(8, form="gibbs")], [window(8, 8, form="gibbs")]]
    known = [*first, *second, *third]
    return [first, second, third, [parts for parts in every if parts not in known]]


def label(parts: Sequence[Part]) -> str:
    """As a line of the table names it."""
    names = []
    for part in parts:
        if part["kind"] == "denoise":
            names.append("denoise-and-accept")
            continue
        length = f" of {part['length']}" if part["kind"] == "window" else ""
        form = ", Gibbs" if part["form"] == "gibbs" else ""
        names.append(f"{part['kind']}{length}, {part['cut']}, K = {part['tries']}{form}")
    return " + ".join(names)


def make_move(part: Part) -> Move | None:
    """The move, or None where this version of the package has it not."""
    options = {name: value for name, value in part.items() if name != "kind"}
    kind = getattr(moves, KINDS[part["kind"]], None)
    if kind is None:
        return None
    known = {field.name for field in dataclasses.fields(kind)}
    for name in [name for name in options if name not in known]:
        if options.pop(name) != DEFAULTS.get(name):
            return None
    return kind(**options)  # type: ignore[no-any-return]


@cache
def base_lm(name: str) -> tuple[BaseLM, Meter]:
    """p_θ and what counts its positions, once a process."""
    lm, meter = BaseLM.load(name), Meter()
    meter.watch("base_lm", lm.multiplied())
    return lm, meter


def batch_of(spec: Part, chains: int) -> Batch:
    """The prompts of all chains; the free part of each has `length` tokens."""
    setting = KITS[spec["kit"]]
    lm, _ = base_lm(setting["base_lm"])
    n_prompt = max(len(ids) for ids in lm.token_ids(setting["prompts"]))
    data = PromptData(
        setting["base_lm"], list(setting["prompts"]), Reading(), n_texts=chains,
        batch_size=chains * len(setting["prompts"]), max_length=n_prompt + spec["length"],
        reward_sees_prompt=False,
    )  # fmt: skip
    data.setup("predict")
    return data.batch(0)


def pool_of(spec: Part, batch: Batch) -> Tensor:
    """(B, POOL, T) texts of p_θ for each chain, for all rewards, from a file if there."""
    key = "-".join(str(spec[name]) for name in ("kit", "length", "seed", "chains"))
    path = OUT / f"pool-{key}-{POOL}.pt"
    if not path.exists():
        lm, _ = base_lm(KITS[spec["kit"]]["base_lm"])
        generator, pools = torch.Generator().manual_seed(1000 + spec["seed"]), []
        for i in range(len(batch.tokens)):
            pool = batch.take(torch.full((POOL,), i))
            pools.append(lm.generate(pool.tokens, pool.prompt_mask, generator))
        torch.save(torch.stack(pools), path)
    kept: Tensor = torch.load(path, weights_only=True)
    return kept


def begin(spec: Part, batch: Batch, reward: Reward, lam: float) -> Tensor:
    """Texts with which every move of this kit, reward, length and seed starts, from a file if
    there.
    """
    names = ("kit", "reward", "length", "seed", "chains")
    key = "-".join(str(spec[name]) for name in names)
    path = OUT / f"begin-{key}-{POOL}-{BURN}.pt"
    if not path.exists():
        lm, _ = base_lm(KITS[spec["kit"]]["base_lm"])
        generator, rows = torch.Generator().manual_seed(2000 + spec["seed"]), []
        for i, texts in enumerate(pool_of(spec, batch)):
            pool = batch.take(torch.full((POOL,), i))
            weight = lam * TargetDensity(lm, reward, lam, pool).terms(texts).reward
            rows.append(texts[int(draw_categorical(weight[None], generator))])
        target = TargetDensity(lm, reward, lam, batch)
        state = start(target, torch.stack(rows), batch.prompt_mask)
        kernel = Suffix().kernel(Models(lm, None, None, None, reward, lam), target)  # type: ignore[arg-type]
        state, _ = cycle([kernel], state, BURN, generator)
        torch.save(state.tokens, path)
    kept: Tensor = torch.load(path, weights_only=True)
    return kept


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Chains of the moves for so many seconds: what they gave and took."""
    setting, (kind, lam) = KITS[spec["kit"]], REWARDS[spec["reward"]]
    (lm, meter), reward = base_lm(setting["base_lm"]), kind()
    parts = [make_move(part) for part in spec["moves"]]
    chosen = [move for move in parts if move is not None]
    module = GuidedSamplerModule(reward, Chains(moves=chosen), lm, lam=lam, compare_base=False)
    batch = batch_of(spec, spec["chains"])
    target = TargetDensity(lm, reward, lam, batch)
    kernels = [move.kernel(module.models, target) for move in chosen]
    state = start(target, begin(spec, batch, reward, lam), batch.prompt_mask)
    generator = torch.Generator().manual_seed(spec["seed"])
    warm, _ = cycle(kernels, state, 1, generator)  # first calls are slower
    before = meter.read()["base_lm"].tokens
    trace, kept, accepted, changed, spent = [], [warm], [], [], 0.0
    state = warm
    while spent < spec["seconds"] or len(trace) < 16:
        clock, old = time.process_time(), state
        state, followed = cycle(kernels, state, 1, generator)
        spent += time.process_time() - clock
        trace.append(state.reward)
        accepted.append(followed.accepted.mean())
        changed.append((state.tokens != old.tokens).any(1).double().mean())
        kept.append(state)
    positions = meter.read()["base_lm"].tokens - before
    return {
        "steps": len(trace), "seconds": spent, "positions": positions,
        "accepted": float(torch.stack(accepted).mean()),
        "changed": float(torch.stack(changed).mean()),
        **efficiency(torch.stack(trace), batch, positions, spent),
        **quality(lm, batch, kept),
    }  # fmt: skip


def efficiency(trace: Tensor, batch: Batch, positions: float, seconds: float) -> dict[str, Any]:
    """Effective samples of the reward, all chains together, and the share of its variance that one
    step renews (1 − ρ_1), which a short run shows with less noise.
    """
    centred = trace - _prompt_means(trace, batch.prompts)
    ess, censored = pooled_ess(centred)
    renewed = float((trace[1:] - trace[:-1]).square().mean() / (2 * centred.square().mean()))
    found = by_prompt(batch.prompts, {"reward": trace})
    return {
        "ess": ess, "censored": censored, "ess_arviz": float(found["ess_reward"].sum()),
        "rhat": float(found["rhat_reward"].nan_to_num(1.0, torch.inf).max()),
        "ess_per_million_positions": 1e6 * ess / positions, "ess_per_second": ess / seconds,
        "renewed": renewed, "renewed_per_second": renewed * trace.numel() / seconds,
        "renewed_per_million_positions": 1e6 * renewed * trace.numel() / positions,
        "reward": float(trace.mean()), "reward_sd": float(centred.square().mean().sqrt()),
    }  # fmt: skip


def pooled_ess(centred: Tensor) -> tuple[float, bool]:
    """Effective samples of stationary chains (S, B), deviations from the mean that they share.

    One autocovariance for all chains about the shared mean, summed by Geyer's initial monotone
    sequence up to lag S/2. arviz takes each chain's own mean and is of no use below some hundred
    steps: eight steps of chains that stand still count as 115 samples of 64 there.

    Returns:
        The number, and whether the sum had not ended by then, so that the number is too large.
    """
    steps = len(centred)
    lags = max(2, steps // 2)
    cov = [(centred[: steps - t] * centred[t:]).mean() for t in range(lags)]
    rho = torch.stack(cov) / cov[0]
    pairs = rho[: lags // 2 * 2].view(-1, 2).sum(1)
    negative = (pairs <= 0).nonzero()
    end = int(negative[0]) if len(negative) else len(pairs)
    tau = 2 * float(pairs[:end].cummin(0).values.sum()) - 1 if end else 1.0
    return centred.numel() / max(tau, 1e-3), end == len(pairs)


def _prompt_means(trace: Tensor, prompts: Sequence[str]) -> Tensor:
    means = torch.empty_like(trace[0])
    for prompt in dict.fromkeys(prompts):
        rows = torch.tensor([other == prompt for other in prompts])
        means[rows] = trace[:, rows].mean()
    return means


def quality(lm: BaseLM, batch: Batch, states: Sequence[State], n: int = 4) -> dict[str, float]:
    """Of the texts at n places of the run: log p_θ per token, length; different ones at its end."""
    chosen = [states[round(i * (len(states) - 1) / (n - 1))].tokens for i in range(n)]
    log_p = sum(float(lm.log_prob(tokens, batch.prompt_mask).sum()) for tokens in chosen)
    lengths = [scored_mask(tokens, batch.prompt_mask, lm.end_id).sum() for tokens in chosen]
    total = float(sum(lengths))
    return {
        "log_p_per_token": log_p / total, "tokens": total / n / len(batch.tokens),
        "different": len(set(completions(lm, chosen[-1], batch))),
    }  # fmt: skip


def grid(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row, the important ones first: a rank for what is measured, one for where, one for the
    seed.
    """
    ranked = []
    for kit in given.kits:
        setting = KITS[kit]
        lengths = [n for n in setting["lengths"] if given.lengths is None or n in given.lengths]
        cells = list(product(lengths, given.rewards))
        for (tier, some), (place, (length, reward)), seed in product(
            enumerate(variants()), enumerate(cells), given.seeds
        ):
            for parts in some:
                ranked.append((tier + place + seed, tier, {
                    "kit": kit, "reward": reward, "length": length, "seed": seed,
                    "chains": given.chains or setting["chains"], "moves": [dict(p) for p in parts],
                    "seconds": given.seconds or setting["seconds"],
                }))  # fmt: skip
    return [spec for _, _, spec in sorted(ranked, key=lambda entry: entry[:2])]


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each kit, reward and length; factors against the first move there."""
    parts: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        spec = row["spec"]
        lam = REWARDS[spec["reward"]][1]
        title = f"{spec['kit']}, {spec['reward']} (λ = {lam:g}), {spec['length']} tokens"
        parts.setdefault(title, {}).setdefault(label(spec["moves"]), []).append(row)
    head = [
        "move", "ESS per million positions", "× today", "ESS per second", "× today",
        "renewed per second, × today", "accepted %", "changed %", "reward", "log p_θ per token",
        "largest R̂", "steps",
    ]  # fmt: skip
    out, today = [], label([suffix()])
    for title, found in parts.items():
        base = found.get(today, [])
        lines = [[
            name, cell(some, "ess_per_million_positions", 0) + _mark(some),
            _factor(some, base, "ess_per_million_positions"), cell(some, "ess_per_second", 2),
            _factor(some, base, "ess_per_second"), _factor(some, base, "renewed_per_second"),
            cell(some, "accepted", 0, 100), cell(some, "changed", 0, 100), cell(some, "reward", 3),
            cell(some, "log_p_per_token", 2), cell(some, "rhat", 2), cell(some, "steps", 0),
        ] for name, some in found.items()]  # fmt: skip
        out.append(f"**{title}**\n\n{table(head, lines)}")
    return "\n\n".join(out)


def _mark(some: Sequence[Any]) -> str:
    return " (too large)" if any(row["figures"]["censored"] for row in some) else ""


def _factor(some: Sequence[Any], today: Sequence[Any], name: str) -> str:
    """Ratio of the means over the seeds that both have."""
    seeds = {row["spec"]["seed"] for row in some} & {row["spec"]["seed"] for row in today}
    if not seeds:
        return "–"
    sums = [
        sum(row["figures"][name] for row in rows if row["spec"]["seed"] in seeds)
        for rows in (some, today)
    ]
    return f"{sums[0] / sums[1]:.2f}" if sums[1] else "–"


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__, list(KITS), [0, 1, 2], "tiny kit, first seed, a second a row")
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=list(REWARDS))
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--chains", type=int, help="a prompt")
    parser.add_argument("--seconds", type=float, help="of moves, a row")
    given = parser.parse_args(arguments)
    if given.quick:
        given.kits, given.seeds, given.chains, given.seconds = ["tiny"], [0], 8, 1.0
    return given


def main(arguments: Sequence[str] | None = None, out: Path = OUT) -> int:
    given = arguments_of(arguments)
    torch.set_num_threads(1)
    rows = Rows(out / ("quick.jsonl" if given.quick else "rows.jsonl"))
    specs = grid(given)
    absent = [spec for spec in specs if any(make_move(part) is None for part in spec["moves"])]
    for name in dict.fromkeys(label(spec["moves"]) for spec in absent):
        print(f"not measured, this version of the package has no such move: {name}")
    specs = [spec for spec in specs if spec not in absent]
    if not given.tables:
        rows.measure(specs, measure, given.minutes)
    found = rows.of(specs)
    if not found:
        raise SystemExit("no row is there yet")
    made = (
        f"{made_by('make moves', found)} Mean (smallest–largest) over seeds; “renewed”: chains ×"
        " steps × (1 − first autocorrelation of the reward), less noisy than ESS in short runs;"
        " “too large”: a run that was too short for the autocorrelation to end."
    )
    title = "Effective samples of the exact moves"
    publish(out, "moves", title, f"{tables(found)}\n\n{made}", DOC if given.doc else None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
