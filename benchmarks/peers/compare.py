"""genlm-control's SMC and this package side by side: one p_θ, one reward, one scorer.

    make peers                                        (builds .venv-peers, then all rows: hours)
    python benchmarks/peers/compare.py --minutes 60   go on for an hour; finished rows are kept
    python benchmarks/peers/compare.py --kits tiny letters --seeds 0

Each side draws until 256 different texts are there, or RUNS runs are over, in one thread and
with the same float format. Rows stand in runs/peers/rows.jsonl, the table goes to docs/results.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import letters
from benchmarks.peers.judges import judge_of
from benchmarks.rows import DOC, Rows, cell, made_by, options, publish
from benchmarks.theory import table
from dia_lightning.data import Reading
from dia_lightning.data.prompts import PromptData
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.files import folder_of
from dia_lightning.samplers import (
    Annealed,
    BestOfN,
    Chains,
    GuidedSamplerModule,
    Sampler,
    Suffix,
    TwistedSMC,
)
from dia_lightning.types import Batch, Reward, scored_mask

OUT, PEER = ROOT / "runs" / "peers", ROOT / ".venv-peers" / "bin" / "python"
RUNS = 8
LAM = {"tiny": 8.0, "smollm2": 8.0, "letters": 3.0}
KITS: dict[str, dict[str, Any]] = {
    "tiny": {"base_lm": "checkpoints/tiny/lm", "length": 40, "texts": 256, "subjects": None},
    "smollm2": {
        "base_lm": "smollm2", "length": 40, "texts": 64,
        "subjects": ["a lighthouse", "an old friend", "the first day of school", "a broken radio"],
    },
    "letters": {
        "base_lm": "runs/peers/letters", "length": letters.LENGTH, "texts": 4096, "subjects": None
    },
}  # fmt: skip
TEMPLATE = "user\nWrite one sentence about {prompt}.<|im_end|>\n<|im_start|>assistant\n"
REWARDS: dict[str, list[dict[str, Any]]] = {
    "tiny": [
        {"name": "sentiment"}, {"name": "last word", "word": "pub"},
        {"name": "coverage", "words": ["Japanese", "Cambridge", "cheap", "kids"]},
    ],
    "smollm2": [
        {"name": "sentiment"}, {"name": "last word", "word": "life"},
        {"name": "coverage", "words": ["music", "night", "friend", "ocean"]},
    ],
    "letters": [{"name": "last letter", "letter": "b"}],
}  # fmt: skip
# Particles for each wanted text, and the queries that the peer's model reads in one pass (its own
# default of 20 is no faster).
PEERS: dict[str, dict[str, Any]] = {
    "genlm-control": {"particles": 1, "ess": 0.5, "batch": 64},
    "genlm-control × 4": {"particles": 4, "ess": 0.5, "batch": 64},
}
OURS: dict[str, Callable[[], Sampler]] = {
    "population": lambda: Annealed(),
    "population, begun by rewards on prefixes": lambda: Annealed(start=TwistedSMC()),
    "rewards on prefixes, every 4 tokens": lambda: TwistedSMC(particles=1),
    "rewards on prefixes, every word": lambda: TwistedSMC(particles=1, every="word"),
    "suffix chains (QUEST)": lambda: Chains(moves=[Suffix()], rounds=20),
    "best-of-16": lambda: BestOfN(n=16),
}


class Judged(Reward):
    """A function of judges.py as a reward."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.name, self._judge = spec["name"].replace(" ", "_"), judge_of(spec)

    def __call__(self, texts: Sequence[str]) -> list[float]:
        return self._judge(texts)


@cache
def base_lm(kit: str) -> BaseLM:
    if kit == "letters":
        letters.make(ROOT / KITS[kit]["base_lm"])
    return BaseLM.load(str(KITS[kit]["base_lm"]))


def batches(kit: str, texts: int) -> list[Batch]:
    """One batch a prompt, each with `texts` rows whose free part is `length` tokens."""
    setting, lm, found = KITS[kit], base_lm(kit), []
    for subject in setting["subjects"] or [""]:
        prompt = TEMPLATE.format(prompt=subject) if subject else ""
        n_prompt = len(lm.token_ids([prompt])[0])
        data = PromptData(
            setting["base_lm"], [prompt], Reading(), n_texts=texts, batch_size=texts,
            max_length=n_prompt + setting["length"], reward_sees_prompt=False,
        )  # fmt: skip
        data.setup("predict")
        found.append(data.batch(0))
    return found


def ours(spec: dict[str, Any], sampler: Sampler) -> list[list[dict[str, Any]]]:
    """The runs of this package for each prompt: seconds and texts."""
    lm = base_lm(spec["kit"])
    module = GuidedSamplerModule(
        Judged(spec["reward"]), sampler, lm, lam=spec["lam"], compare_base=False
    )
    found, seed = [], spec["seed"]
    for place, batch in enumerate(batches(spec["kit"], spec["texts"])):
        warm = torch.arange(min(4, len(batch.tokens)))
        module.draw(_first(batch, warm), torch.Generator().manual_seed(1))
        seen, runs = set[tuple[int, ...]](), list[dict[str, Any]]()
        while len(seen) < spec["wanted"] and len(runs) < spec["runs"]:
            generator = torch.Generator().manual_seed(1_000_003 * seed + 1000 * place + len(runs))
            begin = time.perf_counter()
            drawn = module.draw(replace(batch, index=len(runs)), generator).tokens
            seconds = time.perf_counter() - begin
            texts = [_own(row, mask, lm.end_id) for row, mask in _rows(drawn, batch)]
            seen |= {tuple(text) for text in texts}
            runs.append({"seconds": seconds, "tokens": texts, "different": len(seen)})
        found.append(runs)
    return found


def _rows(tokens: Tensor, batch: Batch) -> list[tuple[list[int], list[bool]]]:
    return list(zip(tokens.tolist(), batch.prompt_mask.tolist(), strict=True))


def _own(row: list[int], mask: list[bool], end: int) -> list[int]:
    own = [token for token, given in zip(row, mask, strict=True) if not given]
    return own[: own.index(end)] if end in own else own


def _first(batch: Batch, rows: Tensor) -> Batch:

    return replace(batch.take(rows), whole=batch.whole)


def peers(spec: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The runs of the peer, in its own process."""
    lm, kit = base_lm(spec["kit"]), KITS[spec["kit"]]
    firsts = [batch.tokens[0][batch.prompt_mask[0]] for batch in batches(spec["kit"], 1)]
    job = {
        "folder": str(folder_of(kit["base_lm"])), "length": kit["length"],
        "prompts": [[lm.bos_id, *first.tolist()] for first in firsts],
        "ends": [lm.tokenizer.convert_ids_to_tokens(i) for i in lm.end_ids], "threads": 1,
        "dtype": str(lm.model.dtype).removeprefix("torch."), **PEERS[spec["method"]],
        **{name: spec[name] for name in ("reward", "lam", "seed", "wanted", "runs")},
        "particles": spec["texts"] * PEERS[spec["method"]]["particles"],
    }  # fmt: skip
    asked, answered = OUT / "job.json", OUT / "result.json"
    asked.write_text(json.dumps(job), encoding="utf-8")
    answered.unlink(missing_ok=True)
    script = Path(__file__).parent / "run_genlm.py"
    command = [str(PEER), str(script), str(asked), str(answered)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode or not answered.exists():
        raise SystemExit(f"{' '.join(command)} failed:\n{ended.stderr[-3000:]}")
    found: list[list[dict[str, Any]]] = json.loads(answered.read_text(encoding="utf-8"))["prompts"]
    return found


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row: both sides are scored here."""
    torch.set_num_threads(1)
    method = spec["method"]
    found = peers(spec) if method in PEERS else ours(spec, OURS[method]())
    lm, judge = base_lm(spec["kit"]), judge_of(spec["reward"])
    rewards, log_ps, n_tokens, every = [], [], [], list[tuple[int, ...]]()
    for runs, batch in zip(found, batches(spec["kit"], 1), strict=True):
        texts = [tuple(text) for run in runs for text in run["tokens"]]
        every += texts
        tokens = batch.tokens.repeat(len(texts), 1)
        mask = batch.prompt_mask.repeat(len(texts), 1)
        n_prompt = int(mask[0].sum())
        for row, text in zip(tokens, texts, strict=True):
            row[n_prompt : n_prompt + len(text)] = torch.tensor(text, dtype=torch.int64)
        rewards += judge([text.strip() for text in lm.decode(tokens, mask)])
        log_ps += lm.log_prob(tokens, mask).tolist()
        n_tokens += scored_mask(tokens, mask, lm.end_id).sum(1).tolist()
    reached = all(runs[-1]["different"] >= spec["wanted"] for runs in found)
    drawn = sum(len(run["tokens"]) for runs in found for run in runs)
    seconds = sum(run["seconds"] for runs in found for run in runs)
    different = sum(runs[-1]["different"] for runs in found)
    figures = {
        "seconds": seconds, "reached": reached, "different": different, "drawn": drawn,
        "seconds_per_different": seconds / different,
        "first_run_different": sum(runs[0]["different"] for runs in found),
        "first_run_drawn": sum(len(runs[0]["tokens"]) for runs in found),
        "reward": float(np.mean(rewards)), "log_p": float(np.mean(log_ps)),
        "log_p_per_token": sum(log_ps) / sum(n_tokens),
    }  # fmt: skip
    if spec["kit"] == "letters":
        p = letters.law(ROOT / KITS["letters"]["base_lm"])
        names = ["".join(letters.LETTERS[i] for i in text) for text in p]
        far = letters.total_variation(every, p, np.array(judge(names)), spec["lam"])
        figures |= dict(zip(("total_variation", "floor"), far, strict=True))
    return figures


def grid(kits: Sequence[str], seeds: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    """Every row, the first seed of all kits first."""
    specs = []
    for seed, kit in product(seeds, kits):
        for reward, method in product(REWARDS[kit], [*PEERS, *OURS]):
            setting = KITS[kit]
            has_denoiser = kit != "letters"
            if "both" in method and not has_denoiser:
                continue
            texts = min(16, setting["texts"]) if quick else setting["texts"]
            wanted = texts if kit != "letters" else 100_000  # one run: the law is compared
            specs.append({
                "kit": kit, "reward": reward, "lam": LAM[kit], "method": method, "seed": seed,
                "settings": repr(OURS[method]()) if method in OURS else PEERS[method],
                "texts": texts, "wanted": wanted, "runs": RUNS if kit != "letters" else 1,
            })  # fmt: skip
    return specs


def tables(rows: list[dict[str, Any]]) -> str:
    """One table a kit and reward."""
    parts: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        spec = row["spec"]
        title = f"{spec['kit']}, {_named(spec['reward'])}, λ = {spec['lam']:g}"
        parts.setdefault(title, {}).setdefault(spec["method"], []).append(row)
    head = [
        "method", "seconds for the wanted different texts", "seconds a different text",
        "different, first run", "reward", "log p_θ per token (nats)", "total variation (floor)",
    ]  # fmt: skip
    out = []
    for title, methods in parts.items():
        lines = []
        for method, found in methods.items():
            reached = sum(row["figures"]["reached"] for row in found)
            wanted = [row for row in found if row["figures"]["reached"]]
            share = "" if reached == len(found) else f" ({reached} of {len(found)} seeds reached)"
            lines.append([
                method, cell(wanted, "seconds", 1) + share,
                cell(found, "seconds_per_different", 4), cell(found, "first_run_different", 0),
                cell(found, "reward", 3), cell(found, "log_p_per_token", 2),
                f"{cell(found, 'total_variation', 3)} ({cell(found, 'floor', 3)})",
            ])  # fmt: skip
        if not any("floor" in row["figures"] for found in methods.values() for row in found):
            shown = range(len(head) - 1)
        else:  # one run of many texts, to compare laws
            shown = [i for i in range(len(head)) if i != 1]
        lines = [[line[i] for i in shown] for line in lines]
        out.append(f"**{title}**\n\n{table([head[i] for i in shown], lines)}")
    return "\n\n".join(out)


def _named(reward: Mapping[str, Any]) -> str:
    rest = ", ".join(str(value) for key, value in reward.items() if key != "name").strip("[]")
    return f"{reward['name']} ({rest})" if rest else str(reward["name"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options(__doc__, list(KITS), [0, 1, 2], "16 texts, the first kit and seed")
    given = parser.parse_args(arguments)
    if not PEER.exists() and not given.tables:
        raise SystemExit(f"no {PEER.parent.parent.name}: run `make peers` first")
    if given.quick:
        given.kits, given.seeds = given.kits[:1], given.seeds[:1]
    specs = grid(given.kits, given.seeds, given.quick)
    rows = Rows(OUT / ("quick.jsonl" if given.quick else "rows.jsonl"))
    if not given.tables:
        rows.measure(specs, measure, given.minutes)
    found = rows.of(specs)
    if not found:
        raise SystemExit("no row is there yet")
    body = f"{tables(found)}\n\n{made_by('make peers', found)} Mean (smallest–largest) over seeds."
    publish(OUT, "peers", "genlm-control side by side", body, DOC if given.doc else None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
