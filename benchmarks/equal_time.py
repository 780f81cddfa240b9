"""Reward against log p_θ at equal seconds: each method at a ladder of efforts, then the largest
effort that fits a budget of seconds a text.

    make equal-time                                    every row that is missing (hours)
    python benchmarks/equal_time.py --kits tiny --minutes 60
    python benchmarks/equal_time.py --tables

Target, networks and texts are those of configs/comparison/equal_time.yaml (tiny kit) and
smollm2.yaml. Rows stand in runs/equal_time/rows.jsonl, the tables go to docs/results.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.rows import DOC, Row, Rows, cell, made_by, options, publish
from benchmarks.theory import table
from dia_lightning.data import Reading
from dia_lightning.data.prompts import PromptData
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.metrics.functional import distinct_n
from dia_lightning.rewards import LocalToxicity, Perplexity, VaderSentiment, WeightedSum
from dia_lightning.samplers import (
    Annealed,
    BaseModel,
    BestOfN,
    Chains,
    Critic,
    DenoiseAccept,
    GuidedDecoding,
    GuidedSamplerModule,
    ParticleSteering,
    Sampler,
    Suffix,
    TwistedSMC,
    Unguided,
)
from dia_lightning.types import Reward

OUT = ROOT / "runs" / "equal_time"
Ladder = Mapping[int, Sampler]


def sentiment_and_fluency() -> Reward:
    parts = [VaderSentiment(), Perplexity("checkpoints/tiny/lm")]
    return WeightedSum(parts, [1.0, 0.2], name="sentiment_and_fluency")


def kindness() -> Reward:
    return WeightedSum([VaderSentiment(), LocalToxicity()], name="kindness")


KITS: dict[str, dict[str, Any]] = {
    "tiny": {
        "base_lm": "checkpoints/tiny/lm", "reward": sentiment_and_fluency, "lam": 30.0,
        "critic": "checkpoints/ablations/critic_joint", "title": "tiny kit, λ = 30",
        "data": {"n_texts": 256, "batch_size": 128, "max_length": 40},
        "budgets": (0.05, 0.1, 0.2, 0.4, 0.8),
    },
    "smollm2": {
        "base_lm": "smollm2", "reward": kindness, "lam": 100.0,
        "critic": "checkpoints/smollm2/critic", 
        "title": "SmolLM2, sentiment and no toxicity, λ = 100",
        "data": {
            "prompts": "checkpoints/smollm2/prompts.txt", "n_texts": 4, "batch_size": 32,
            "max_length": 48, "reward_sees_prompt": False,
            "reading": Reading(
                template="user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", limit=32
            ),
        },
        "budgets": (1.0, 2.0, 4.0, 8.0),
    },
}  # fmt: skip


def doubling(first: int, n: int, make: Callable[[int], Sampler]) -> Ladder:
    return {first * 2**i: make(first * 2**i) for i in range(n)}


def both(kit: str) -> list[Any]:
    """The moves of the kit's own configuration."""
    from dia_lightning.samplers import Spans

    small = DenoiseAccept(positions=Spans(2), rounds=2)
    return [Suffix(), DenoiseAccept() if kit == "tiny" else small]


def methods(kit: str) -> dict[str, Ladder]:
    """Each method at growing efforts."""
    stagger = {"stagger": 40.0, "guidance": Unguided(), "potential": "difference"}
    steering: Ladder = {
        particles * steps: ParticleSteering(particles=particles, steps=steps, **stagger)
        for particles, steps in ((2, 8), (2, 16), (2, 32), (4, 32), (8, 32))
    }
    return {
        "p_θ (zero-shot)": {1: BaseModel()},
        "best-of-n": doubling(4, 6, lambda n: BestOfN(n=n)),
        "suffix chains (QUEST)": doubling(5, 6, lambda n: Chains(moves=[Suffix()], rounds=n)),
        "SMC on the diffusion (Feynman–Kac)": steering,
        "twisted SMC, critic": doubling(2, 7, lambda n: TwistedSMC(Critic(), particles=n)),
        "guided decoding": doubling(4, 3, lambda n: GuidedDecoding(top_k=n)),
        "twisted SMC, rewards on prefixes": doubling(1, 6, lambda n: TwistedSMC(particles=n)),
        "DIA population": doubling(1, 5, lambda n: Annealed(particles=n)),
        "DIA population, more rounds": doubling(1, 5, lambda n: Annealed(rounds=n)),
        "DIA population, 4 drafts": doubling(1, 4, lambda n: Annealed([Suffix(4)], particles=n)),
        "DIA population, begun by rewards on prefixes": doubling(
            1, 5, lambda n: Annealed(start=TwistedSMC(), particles=n)
        ),
        "DIA population, both moves": doubling(1, 4, lambda n: Annealed(both(kit), rounds=n)),
    }


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """All texts of one method at one effort and seed."""
    torch.set_num_threads(1)
    kit = KITS[spec["kit"]]
    sampler = methods(spec["kit"])[spec["method"]][spec["effort"]]
    lm = BaseLM.load(kit["base_lm"])
    module = GuidedSamplerModule(
        kit["reward"](), sampler, lm, critic=kit["critic"], lam=kit["lam"], compare_base=False,
        seed=spec["seed"],
    )  # fmt: skip
    data = PromptData(kit["base_lm"], **{**kit["data"], "n_texts": spec["n_texts"]})
    data.setup("predict")
    module.draw(data.batch(0), torch.Generator().manual_seed(1))  # first calls are slower
    begin = time.perf_counter()
    found = [part for i in range(data.n_batches) for part in module.predict_step(data.batch(i), i)]
    seconds, drawing = time.perf_counter() - begin, sum(part.latency_s for part in found)
    texts = [text for part in found for text in part.texts]
    reward = torch.cat([part.reward for part in found])
    parts = {
        f"reward_{name}": float(torch.cat([part.rewards[name] for part in found]).mean())
        for name in found[0].rewards
    }
    return {
        "texts": len(texts), "seconds_per_text": drawing / len(texts), "all_seconds": seconds,
        "reward": float(reward.mean()), **parts,
        "log_p_per_token": float(
            sum(part.log_p.sum() for part in found) / sum(part.n_tokens.sum() for part in found)
        ),
        "distinct_2": float(distinct_n(texts, 2)), "different": len(set(texts)) / len(texts),
        "positions": sum(part.costs["base_lm"].tokens for part in found if "base_lm" in part.costs)
        / len(texts),
    }  # fmt: skip


def run(rows: Rows, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the ladders, each up to the first effort beyond the largest budget; the specs of
    what belongs to the grid.
    """
    end = time.monotonic() + 60 * (float("inf") if given.minutes is None else given.minutes)
    specs, going = [], not given.tables
    for seed, kit in product(given.seeds, given.kits):
        n_texts = given.n_texts or KITS[kit]["data"]["n_texts"]
        for method, ladder in methods(kit).items():
            for effort in list(ladder)[: 1 if given.quick else None]:
                spec = {
                    "kit": kit, "method": method, "effort": effort, "seed": seed,
                    "n_texts": n_texts, "sampler": repr(ladder[effort]),
                }  # fmt: skip
                specs.append(spec)
                left = (end - time.monotonic()) / 60
                going = going and rows.measure([spec], measure, left)
                row = rows.find(spec)
                most = KITS[kit]["budgets"][-1]
                if row is None or row["figures"]["seconds_per_text"] > most:
                    break
    return specs


def chosen(rows: Sequence[Row], budget: float) -> list[Row]:
    """Of one method, the rows of the largest effort whose mean time fits the budget."""
    fitting: list[list[Row]] = []
    for effort in sorted({row["spec"]["effort"] for row in rows}):
        some = [row for row in rows if row["spec"]["effort"] == effort]
        if mean(row["figures"]["seconds_per_text"] for row in some) <= budget:
            fitting.append(some)
    return max(fitting, key=lambda rows: rows[0]["spec"]["effort"]) if fitting else []


def tables(rows: Sequence[Row]) -> str:
    """One table a kit and budget."""
    head = [
        "method", "effort", "seconds a text", "reward", "sentiment", "log p_θ per token (nats)",
        "distinct-2", "different texts %", "positions of p_θ",
    ]  # fmt: skip
    out = []
    for kit in dict.fromkeys(row["spec"]["kit"] for row in rows):
        own = [row for row in rows if row["spec"]["kit"] == kit]
        for budget in KITS[kit]["budgets"]:
            lines = []
            for method in dict.fromkeys(row["spec"]["method"] for row in own):
                some = chosen([row for row in own if row["spec"]["method"] == method], budget)
                if not some:
                    continue
                lines.append([
                    method, str(some[0]["spec"]["effort"]), cell(some, "seconds_per_text", 3),
                    cell(some, "reward", 3), cell(some, "reward_sentiment", 3),
                    cell(some, "log_p_per_token", 2), cell(some, "distinct_2", 3),
                    cell(some, "different", 0, 100), cell(some, "positions", 0),
                ])  # fmt: skip
            title = f"**{KITS[kit]['title']}: at most {budget:g} s a text**"
            out.append(f"{title}\n\n{table(head, lines)}")
    return "\n\n".join(out)


def main(arguments: Sequence[str] | None = None, out: Path = OUT) -> int:
    parser = options(__doc__, list(KITS), [0, 1, 2], "tiny kit, least efforts, 16 texts")
    parser.add_argument("--n-texts", type=int, help="for each prompt")
    given = parser.parse_args(arguments)
    if given.quick:
        given.kits, given.seeds, given.n_texts = ["tiny"], [0], 16
    rows = Rows(out / ("quick.jsonl" if given.quick else "rows.jsonl"))
    found = rows.of(run(rows, given))
    if not found:
        raise SystemExit("no row is there yet")
    made = f"{made_by('make equal-time', found)} Mean (smallest–largest) over seeds."
    body = f"{tables(found)}\n\n{made}"
    publish(out, "equal-time", "Equal seconds", body, DOC if given.doc else None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
