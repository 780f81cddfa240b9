"""Texts with fixed pieces: valid share, distance from the truth and reward of methods that fill
blanks.

    make blanks                                     every row that is missing (hours)
    python benchmarks/blanks.py --kits tiny --methods "diffusion + moves" --minutes 60

Problems come from p_θ's own texts: 2 to 4 pieces of 1 to 3 words must occur in their order (half of
them: two pieces of one word), and in every second the last phrase is given too. In the form
`lengths` each blank's number of tokens is given, and so each piece's place, in the form `free` it
is not. The truth is what is left of many texts of p_θ that meet the problem, weighed by exp(λ r); a
problem with fewer than ENOUGH effective ones has none. Rows stand in runs/blanks/rows.jsonl, the
table goes to docs/results.md.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.rows import DOC, Row, Rows, made_by, options, publish
from benchmarks.theory import table
from dia_lightning.data.prompts import PromptData
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import VaderSentiment
from dia_lightning.samplers import (
    Annealed,
    BaseModel,
    BestOfN,
    Chains,
    CriticGuidance,
    DenoiseAccept,
    Diffusion,
    GuidedDecoding,
    GuidedSamplerModule,
    Sampler,
    Suffix,
)
from dia_lightning.target import TargetDensity, reward_inputs
from dia_lightning.types import Reward, scored_mask

OUT = ROOT / "runs" / "blanks"
LAM, LENGTH, ENOUGH, BINS = 8.0, 40, 100, 10
STATISTICS = ("reward", "log_p", "tokens")
TEMPLATE = "user\nWrite one sentence about {}.<|im_end|>\n<|im_start|>assistant\n"
KITS: dict[str, dict[str, Any]] = {
    "tiny": {
        "base_lm": "checkpoints/tiny/lm", "subjects": None, "problems": 100,
        "texts": 8, "pool": 50_000, "critic": "checkpoints/tiny/critic",
    },
    "smollm2": {
        "base_lm": "smollm2", "problems": 50, "texts": 4, "pool": 2_000,
        "subjects": ["a lighthouse", "an old friend", "the first day of school", "a broken radio"],
        "critic": "checkpoints/smollm2/critic_sentiment",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """prefix: the prompt before the text. pieces: in order, with the space before each. gaps:
    tokens before each piece, and after the last; 0 where the text begins or ends with a piece.
    """

    prefix: str
    pieces: tuple[str, ...]
    gaps: tuple[int, ...]

    @property
    def ends(self) -> bool:
        """Whether the last phrase is given."""
        return self.gaps[-1] == 0

    def prompt(self, form: str) -> str:
        """As a user writes it: `[blank:N]` in the form `lengths`, `[blank]` in `free`."""
        blanks = [f"[blank:{n}]" if form == "lengths" else "[blank]" for n in self.gaps]
        shown = [blank if n else "" for blank, n in zip(blanks, self.gaps, strict=True)]
        parts = zip(shown, (*self.pieces, ""), strict=True)
        return self.prefix + "".join(blank + piece for blank, piece in parts)

    def solved(self, text: str) -> bool:
        """Whether the pieces stand in the text in their order, as whole words, the last at the
        end where that is given.
        """
        return self.found(text) == len(self.pieces)

    def found(self, text: str) -> int:
        """How many of the pieces, from the first on, stand there."""
        for n in range(len(self.pieces), 0, -1):
            words = [rf"(?<!\w){re.escape(piece.strip())}(?!\w)" for piece in self.pieces[:n]]
            end = r"\s*\Z" if self.ends and n == len(self.pieces) else ""
            first = r"\A\s*" if self.gaps[0] == 0 else ""
            if re.search(first + ".*?".join(words) + end, text, re.DOTALL):
                return n
        return 0


class Constrained(Reward):
    """The sentiment, less 1 for each missing piece: how methods without blanks are told."""

    def __init__(self, problem: Problem) -> None:
        self.name, self._problem, self._sentiment = "sentiment", problem, VaderSentiment()

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        missing = [len(self._problem.pieces) - self._problem.found(text) for text in texts]
        return self._sentiment(texts) - torch.tensor(missing, dtype=torch.float32)


@dataclass(frozen=True)
class Method:
    """form: of the blanks that the sampler is given; "reward": none, the reward tells."""

    form: str
    sampler: Callable[[], Sampler]


METHODS = {
    "p_θ alone": Method("reward", BaseModel),
    "best-of-64": Method("reward", lambda: BestOfN(n=64)),
    "suffix chains (QUEST)": Method("reward", lambda: Chains(moves=[Suffix()], rounds=60)),
    "guided decoding": Method("reward", lambda: GuidedDecoding(top_k=16)),
    "population": Method("free", lambda: Annealed(particles=2, least=64, rounds=2)),
    "guided diffusion": Method(
        "lengths", lambda: Diffusion(guidance=CriticGuidance(scale=10.0), steps=64)
    ),
    "diffusion + moves": Method(
        "lengths",
        lambda: Chains(start=Diffusion(steps=32), moves=[DenoiseAccept()], rounds=40),
    ),
}


@cache
def base_lm(kit: str) -> BaseLM:
    return BaseLM.load(str(KITS[kit]["base_lm"]))


def prefixes(kit: str) -> list[str]:
    subjects = KITS[kit]["subjects"]
    return [TEMPLATE.format(subject) for subject in subjects] if subjects else [""]


def data_of(kit: str, prompt: str, n: int, prefix: str) -> PromptData:
    length = len(base_lm(kit).token_ids([prefix])[0]) + LENGTH
    data = PromptData(
        KITS[kit]["base_lm"], [prompt], n_texts=n, batch_size=n, max_length=length,
        reward_sees_prompt=False,
    )  # fmt: skip
    data.setup("predict")
    return data


def texts_of_base(kit: str, prefix: str, n: int, seed: int) -> dict[str, Any]:
    """n texts of p_θ: tokens after the prefix, text, reward, log p and length of each."""
    lm, generator = base_lm(kit), torch.Generator().manual_seed(seed)
    out: dict[str, list[Any]] = {name: [] for name in ("ids", "texts", *STATISTICS)}
    while len(out["texts"]) < n:
        batch = data_of(kit, prefix, min(500, n - len(out["texts"])), prefix).batch(0)
        tokens = lm.generate(batch.tokens, batch.prompt_mask, generator)
        keep = scored_mask(tokens, batch.prompt_mask, lm.end_id)
        terms = TargetDensity(lm, VaderSentiment(), LAM, batch).terms(tokens)
        out["ids"] += [
            row[kept & (row != lm.end_id)].tolist() for row, kept in zip(tokens, keep, strict=True)
        ]
        out["texts"] += reward_inputs(lm, tokens, batch)
        out["reward"] += terms.reward.tolist()
        out["log_p"] += terms.log_base.tolist()
        out["tokens"] += keep.sum(1).tolist()
    return out


@cache
def pool(kit: str, prefix: str) -> dict[str, Any]:
    """Many texts of p_θ, from a file if there: the truth of every problem."""
    n = KITS[kit]["pool"]
    path = OUT / f"pool-{kit}-{prefixes(kit).index(prefix)}-{n}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(texts_of_base(kit, prefix, n, seed=54_321), path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


@cache
def problems(kit: str) -> list[Problem]:
    """The problems of a kit, always the same, from texts of p_θ that are not in the pool."""
    n, lm, found = KITS[kit]["problems"], base_lm(kit), list[Problem]()
    rng = random.Random(0)
    drawn = [texts_of_base(kit, prefix, 4 * n, seed=99) for prefix in prefixes(kit)]
    for place, (prefix, base) in product(range(4 * n), zip(prefixes(kit), drawn, strict=True)):
        kind = {"last_phrase": len(found) % 2 == 1, "easy": len(found) % 4 < 2}
        problem = cut(lm, prefix, base["ids"][place], rng, **kind)
        if problem is not None and problem.solved(base["texts"][place]) and len(found) < n:
            found.append(problem)
    if len(found) < n:
        raise RuntimeError(f"{kit}: {len(found)} problems of {n}")
    return found


def cut(
    lm: BaseLM, prefix: str, ids: list[int], rng: random.Random, last_phrase: bool, easy: bool
) -> Problem | None:
    """2 to 4 pieces of a text, of whole words and with something between them; two of one word if
    `easy`, for which p_θ's own texts often do. None where the text is too short.
    """
    words = [lm.tokenizer.decode([token]) for token in ids]
    starts = [i for i, word in enumerate(words) if word.startswith(" ")] + [len(ids)]
    n_words, n_pieces = len(starts) - 1, 2 if easy else rng.randint(2, 4)
    if n_words < 3 * n_pieces + 2 or len(ids) >= LENGTH - 1:
        return None
    width = n_words // n_pieces  # each piece lies in its own part of the text
    pieces, gaps, last = list[str](), list[int](), 0
    for part in range(n_pieces):
        size, at_end = 1 if easy else rng.randint(1, min(3, width - 1)), part == n_pieces - 1
        first = part * width + rng.randint(0, width - 1 - size)
        if at_end:
            first = n_words - size - (0 if last_phrase else 1)
        begin, end = starts[first], starts[first + size]
        if begin <= last:
            return None
        pieces.append(lm.tokenizer.decode(ids[begin:end]))
        gaps.append(begin - last)
        last = end
    return Problem(prefix, tuple(pieces), (*gaps, len(ids) - last))


def truth(kit: str, problem: Problem, form: str) -> dict[str, NDArray[np.float64]] | None:
    """Values of the truth's texts and their weights; None with fewer than ENOUGH effective ones."""
    base = pool(kit, problem.prefix)
    meets = [i for i, text in enumerate(base["texts"]) if problem.solved(text)]
    if form == "lengths":
        batch = data_of(kit, problem.prompt("lengths"), 1, problem.prefix).batch(0)
        skip = len(base_lm(kit).token_ids([problem.prefix])[0])
        end, row = base_lm(kit).end_id, batch.tokens[0, skip:].tolist()
        fixed = batch.prompt_mask[0, skip:].tolist()
        meets = [i for i in meets if _fits([*base["ids"][i], end], row, fixed, end)]
    values = {name: np.array([base[name][i] for i in meets]) for name in STATISTICS}
    if not meets:
        return None
    weights = np.exp(LAM * (values["reward"] - values["reward"].max()))
    weights /= weights.sum()
    return {**values, "weights": weights} if 1 / (weights**2).sum() >= ENOUGH else None


def _fits(ids: list[int], row: list[int], fixed: list[bool], end: int) -> bool:
    padded = ids + [end] * (len(row) - len(ids))
    return all(a == b for a, b, given in zip(padded, row, fixed, strict=False) if given)


def places(
    values: Sequence[float], true: NDArray[np.float64], weights: NDArray[np.float64],
    rng: np.random.Generator,
) -> list[float]:  # fmt: skip
    """Where each value lies in the truth's distribution, ties at random: uniform on [0, 1] if it
    comes from there.
    """
    below = [float(weights[true < value].sum()) for value in values]
    same = [float(weights[true == value].sum()) for value in values]
    return [a + rng.random() * b for a, b in zip(below, same, strict=True)]


def kl(uniforms: Sequence[float]) -> tuple[float, float]:
    """KL of the places of n texts from uniform, in BINS bins, less the bias (BINS − 1) / 2n of
    counting; and its standard error where the law is right.
    """
    n = len(uniforms)
    counts = np.histogram(np.clip(uniforms, 0, 1), BINS, (0, 1))[0]
    share = counts[counts > 0] / n
    return (
        float((share * np.log(share * BINS)).sum()) - (BINS - 1) / (2 * n),
        float(np.sqrt((BINS - 1) / 2) / n),
    )


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """One problem: each text's validity, and its place in the truth where there is one."""
    torch.set_num_threads(1)
    kit, method = spec["kit"], METHODS[spec["method"]]
    problem, lm, setting = problems(kit)[spec["problem"]], base_lm(kit), KITS[kit]
    told = method.form == "reward"
    reward = Constrained(problem) if told else VaderSentiment()
    prompt = problem.prefix if told else problem.prompt(method.form)
    module = GuidedSamplerModule(
        reward, method.sampler(), lm, critic=setting["critic"], lam=LAM, compare_base=False,
        seed=spec["seed"],
    )  # fmt: skip
    batch = data_of(kit, prompt, spec["texts"], problem.prefix).batch(0)
    generator = torch.Generator().manual_seed(1000 * spec["seed"] + spec["problem"])
    begin = time.perf_counter()
    tokens = module.draw(batch, generator).tokens
    seconds = time.perf_counter() - begin
    own = data_of(kit, problem.prefix, spec["texts"], problem.prefix).batch(0)
    texts = lm.decode(tokens, own.prompt_mask)
    valid = [problem.solved(text) for text in texts]
    with_pieces = {
        "reward": VaderSentiment()(texts).tolist(),
        "log_p": lm.log_prob(tokens, own.prompt_mask).tolist(),
        "tokens": scored_mask(tokens, own.prompt_mask, lm.end_id).sum(1).tolist(),
    }
    figures: dict[str, Any] = {"seconds": seconds, "valid": valid, "texts": texts, **with_pieces}
    true = truth(kit, problem, "free" if told else method.form)
    if true is not None:
        rng = np.random.default_rng(spec["problem"])
        chosen = [i for i, fine in enumerate(valid) if fine]
        for name in STATISTICS:
            values = [with_pieces[name][i] for i in chosen]
            figures[f"place_{name}"] = places(values, true[name], true["weights"], rng)
        figures["true_reward"] = float(true["reward"] @ true["weights"])
    return figures


def unconstrained(kit: str) -> float:
    """E_π[r] without pieces, from the pool."""
    means = []
    for prefix in prefixes(kit):
        reward = np.array(pool(kit, prefix)["reward"])
        weights = np.exp(LAM * (reward - reward.max()))
        means.append(float(reward @ weights / weights.sum()))
    return float(np.mean(means))


def tables(rows: Sequence[Row]) -> str:
    """One table a kit."""
    head = [
        "method", "problems", "valid %", "reward of the valid", "true reward there",
        "log p_θ per token (nats)", "different %", "seconds a text", "problems with a truth",
        *(f"KL of {name.replace('log_p', 'log p_θ')} (s.e.)" for name in STATISTICS),
    ]  # fmt: skip
    out = []
    for kit in dict.fromkeys(row["spec"]["kit"] for row in rows):
        own = [row for row in rows if row["spec"]["kit"] == kit]
        lines = []
        for method in dict.fromkeys(row["spec"]["method"] for row in own):
            lines.append(_line(method, [r for r in own if r["spec"]["method"] == method]))
        free = unconstrained(kit)
        out.append(
            f"**{kit}, sentiment, λ = {LAM:g}** (reward without pieces {free:.3f})\n\n"
            + table(head, lines)
        )
    return "\n\n".join(out)


def _line(method: str, rows: Sequence[Row]) -> list[str]:
    figures = [row["figures"] for row in rows]
    valid = np.concatenate([f["valid"] for f in figures])
    each = {name: np.concatenate([f[name] for f in figures]) for name in STATISTICS}
    known = [f for f in figures if f.get("place_reward")]
    found = [kl([u for f in known for u in f[f"place_{name}"]]) for name in STATISTICS if known]
    different = np.mean([len(set(f["texts"])) / len(f["texts"]) for f in figures])
    fine = f"{each['reward'][valid].mean():.3f}" if valid.any() else "–"
    return [
        method, str(len({row["spec"]["problem"] for row in rows})), f"{100 * valid.mean():.1f}",
        fine, f"{np.mean([f['true_reward'] for f in known]):.3f}" if known else "–",
        f"{each['log_p'].sum() / each['tokens'].sum():.2f}", f"{100 * different:.0f}",
        f"{sum(f['seconds'] for f in figures) / len(valid):.2f}",
        str(len({row["spec"]["problem"] for row in rows if row["figures"].get("place_reward")})),
        *([f"{value:.3f} ({error:.3f})" for value, error in found] or ["–"] * len(STATISTICS)),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None, out: Path = OUT) -> int:
    parser = options(__doc__, list(KITS), [0], "tiny kit, 2 problems, 2 texts each")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--texts", type=int, help="for each problem")
    parser.add_argument("--problems", type=int, help="the first so many")
    given = parser.parse_args(arguments)
    if given.quick:
        given.kits, given.problems, given.texts = ["tiny"], 2, 2
    rows = Rows(out / ("quick.jsonl" if given.quick else "rows.jsonl"))
    specs = [
        {
            "kit": kit, "method": method, "problem": i, "seed": seed,
            "texts": given.texts or KITS[kit]["texts"], "sampler": repr(METHODS[method].sampler()),
        }
        for kit, seed in product(given.kits, given.seeds)
        for i in range(given.problems or KITS[kit]["problems"])
        for method in given.methods
    ]  # fmt: skip
    if not given.tables:
        rows.measure(specs, measure, given.minutes)
    found = rows.of(specs)
    if not found:
        raise SystemExit("no row is there yet")
    made = (
        f"{made_by('make blanks', found)} KL: of the valid texts' places in the truth's"
        f" distribution, all problems together, from uniform, {BINS} bins, bias removed."
    )
    body = f"{tables(found)}\n\n{made}"
    publish(out, "blanks", "Fixed pieces", body, DOC if given.doc else None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
