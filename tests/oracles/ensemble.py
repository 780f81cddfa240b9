"""The ensemble kernel by listing everything that a step can draw: every piece that is kept, every
tuple of drafts. float64 NumPy, nothing of the package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Row = tuple[int, ...]
LEAST = 0.1  # nats that a place is worth at least


class Text(NamedTuple):
    """A row of T tokens, and where it is given."""

    row: Row
    given: tuple[bool, ...]


class Draft(NamedTuple):
    """q: probability that it is drawn. w: π(x_j) c(S | x_j) / q(y_j | S), 0 where it is no text.
    to: number of the text, −1 none. script: its length, and the tokens that are drawn.
    """

    q: float
    w: float
    to: int
    script: tuple[int, Row]


class Keep(NamedTuple):
    """p: c(S | x). own: w_0. drafts: whatever q may draw. script: place and length."""

    p: float
    own: float
    drafts: list[Draft]
    script: tuple[int, int]


@dataclass
class Problem:
    """π ∝ p^α exp(λ r) over listed texts. after: next-token probabilities; the last token ends a
    text. reward: by row.
    """

    after: Mapping[Row, Floats]
    texts: Sequence[Text]
    reward: Mapping[Row, float]
    lam: float
    alpha: float = 1.0

    def __post_init__(self) -> None:
        self.end, self.wide = len(self.after[()]) - 1, len(self.texts[0].row)
        self.number = {text: i for i, text in enumerate(self.texts)}

    def length(self, text: Text) -> int:
        """Places that hold the text, its end included."""
        ends = [i for i in range(self.wide) if text.row[i] == self.end and not text.given[i]]
        return ends[0] + 1 if ends else self.wide

    def log_p(self, text: Text) -> float:
        """Of what follows the prompt."""
        prompt = next((i for i, given in enumerate(text.given) if not given), self.wide)
        places = range(prompt, self.length(text))
        return sum(math.log(self.after[text.row[:i]][text.row[i]]) for i in places)

    def weight(self, text: Text) -> float:
        return math.exp(self.alpha * self.log_p(text) + self.lam * self.reward[text.row])

    def pi(self) -> Floats:
        weights = np.array([self.weight(text) for text in self.texts])
        return np.asarray(weights / weights.sum())

    def entropy(self, prefix: Row) -> float:
        p = self.after[prefix]
        return float(-(p * np.log(p)).sum())

    def shares(self, cut: str, text: Text, places: Sequence[int]) -> dict[int, float]:
        """c(i | x) of the `places` that may be drawn."""
        worth = dict.fromkeys(places, 1.0)
        for i in places if cut != "uniform" else ():
            worth[i] = self.entropy(text.row[:i])
            if cut == "jump" and i:
                worth[i] = max(0.0, worth[i] - self.entropy(text.row[: i - 1]))
            worth[i] += LEAST
        return {i: value / sum(worth.values()) for i, value in worth.items()}

    def suffixes(self, text: Text, cut: str) -> Iterator[Keep]:
        """Keep x_<i, draw the rest from p."""

        def shares(text: Text) -> dict[int, float]:
            free = [i for i in range(self.length(text)) if not text.given[i]]
            return self.shares(cut, text, free)

        def w(text: Text, i: int) -> tuple[float, float]:
            rest = range(i, self.length(text))
            q = math.prod(self.after[text.row[:k]][text.row[k]] for k in rest)
            return q, self.weight(text) * shares(text)[i] / q

        for i, p in shares(text).items():
            drafts = [
                Draft(*w(other, i), j, (0, other.row[i : self.length(other)]))
                for j, other in enumerate(self.texts)
                if other.row[:i] == text.row[:i]
            ]
            yield Keep(p, w(text, i)[1], drafts, (i, 0))

    def windows(self, text: Text, cut: str, longest: int, vary: bool) -> Iterator[Keep]:
        """Keep all but [i, i + k), draw k' tokens that are not the end from p."""
        lengths = range(1, longest + 1) if vary else [longest]
        each = 1 / len(lengths)

        def shares(text: Text, k: int) -> dict[int, float]:
            def free(i: int) -> bool:
                return i < self.wide and not text.given[i] and text.row[i] != self.end

            places = range(self.wide)
            begins = [i for i in places if all(free(n) for n in range(i, i + k))]
            return self.shares(cut, text, begins)

        def w(text: Text, i: int, k: int) -> tuple[float, float]:
            q = 1.0
            for n in range(i, i + k):
                after = self.after[text.row[:n]]
                q *= after[text.row[n]] / (1 - after[self.end])
            return q, self.weight(text) * shares(text, k)[i] / q

        for k in lengths:
            if not shares(text, k):
                yield Keep(each, 1.0, [Draft(each, 0.0, -1, (new, ())) for new in lengths], (0, k))
            for i, p in shares(text, k).items():
                drafts = []
                for new in lengths:
                    if not self.fits(text, k, new):
                        drafts.append(Draft(each, 0.0, -1, (new, ())))
                        continue
                    for content in itertools.product(range(self.end), repeat=new):
                        other = self.replaced(text, i, k, content)
                        q, weight = w(other, i, new)
                        drafts.append(Draft(each * q, weight, self.number[other], (new, content)))
                yield Keep(each * p, w(text, i, k)[1], drafts, (i, k))

    def fits(self, text: Text, k: int, new: int) -> bool:
        length = self.length(text)
        ended = length < self.wide or (text.row[-1] == self.end and not text.given[-1])
        return new == k or (ended and length - k + new <= self.wide)

    def replaced(self, text: Text, i: int, k: int, content: Row) -> Text:
        length = self.length(text)
        row = text.row[:i] + content + text.row[i + k : length]
        given = text.given[:i] + (False,) * len(content) + text.given[i + k : length]
        left = self.wide - len(row)
        return Text(row + (self.end,) * left, given + (False,) * left)


class Listed(NamedTuple):
    """Every keep and every tuple of K drafts, one a row: the state it begins at, its probability,
    w_j / w_0 (B, K), the states of the drafts, and what was drawn.
    """

    begin: Ints
    p: Floats
    ratio: Floats
    to: Ints
    keeps: list[tuple[int, int]]
    drafts: list[tuple[tuple[int, Row], ...]]


def listed(n: int, keeps: Callable[[int], Iterator[Keep]], tries: int) -> Listed:
    begin, p, ratio, to, kept, drawn = [], [], [], [], [], []
    for x in range(n):
        for keep in keeps(x):
            for drafts in itertools.product(keep.drafts, repeat=tries):
                begin.append(x)
                p.append(keep.p * math.prod(draft.q for draft in drafts))
                ratio.append([draft.w / keep.own for draft in drafts])
                to.append([draft.to for draft in drafts])
                kept.append(keep.script)
                drawn.append(tuple(draft.script for draft in drafts))
    return Listed(np.array(begin), np.array(p), np.array(ratio), np.array(to), kept, drawn)


def matrix(n: int, rows: Listed, form: str) -> Floats:
    """P(x → y): Gibbs among drafts and text, or a draft that is accepted or not (Liu 1996)."""
    w, total = rows.ratio, rows.ratio.sum(1, keepdims=True)
    if form == "gibbs":
        moves = w / (1 + total)
    else:
        accept = np.minimum(1, total / (1 + total - w))
        moves = w / np.where(total > 0, total, 1) * accept
    out, possible = np.zeros((n, n)), rows.to >= 0
    share = rows.p[:, None] * np.where(possible, moves, 0)
    begin = np.broadcast_to(rows.begin[:, None], rows.to.shape)
    np.add.at(out, (begin[possible], rows.to[possible]), share[possible])
    np.add.at(out, (rows.begin, rows.begin), rows.p - share.sum(1))
    return out
