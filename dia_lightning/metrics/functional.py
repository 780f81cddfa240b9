"""Metrics of generated text as pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Ints = NDArray[np.int64]


@lru_cache(maxsize=1)
def _tokenizer_13a() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"texts must be a sequence of strings, got {type(texts).__name__} {str(texts)[:60]!r}")


def _ngrams(tokens: _Ints, text_of: _Ints, order: int) -> list[tuple[_Ints, _Ints]]:
    """For n = 1 … order, an integer code for each n-gram and the text it stands in."""
    grams, code = [], tokens
    for n in range(1, order + 1):
        if n > 1:
            inside = text_of[: len(text_of) - n + 1] == text_of[n - 1 :]
            start = np.flatnonzero(inside)
            pair = np.full(len(tokens), -1, dtype=np.int64)
            pair[start] = code[start] * (tokens.max(initial=0) + 1) + tokens[start + n - 1]
            _, code = np.unique(pair, return_inverse=True)
            grams.append((code[start], text_of[start]))
        else:
            grams.append((code, text_of))
    return grams


def _matches(grams: _Ints, text_of: _Ints, n_texts: int) -> tuple[_Ints, _Ints]:
    """For each text its n-grams that occur in another text, clipped by the largest count in one other text; and all."""
    key, count = np.unique(grams * n_texts + text_of, return_counts=True)
    gram, text = key // n_texts, key % n_texts
    order = np.lexsort((-count, gram))
    gram, text, count = gram[order], text[order], count[order]
    first = np.r_[True, gram[1:] != gram[:-1]] if len(gram) else np.zeros(0, bool)
    group = np.cumsum(first) - 1
    top = np.flatnonzero(first)
    # The text with the largest count is clipped by the second largest, all others by the largest.
    second = np.where(np.r_[first[1:], True], 0, np.r_[count[1:], 0])[top] if len(gram) else top
    others = np.where(first, second[group], count[top][group])
    matched = np.bincount(text, np.minimum(count, others), n_texts)
    return matched.astype(np.int64), np.bincount(text, count, n_texts).astype(np.int64)


def _closest_other_length(lengths: _Ints) -> _Ints:
    """For each text the length, among all others, that is closest to its own; the shorter one of two equally close."""
    ordered = np.sort(lengths)
    place = np.searchsorted(ordered, lengths)  # where its own copy stands
    below = ordered[np.maximum(place - 1, 0)]
    above = ordered[np.minimum(place + 1, len(lengths) - 1)]
    no_below, no_above = place == 0, place == len(lengths) - 1
    take_below = ~no_below & (no_above | (lengths - below <= above - lengths))
    return np.where(take_below, below, above)


def self_bleu(texts: Sequence[str], max_order: int = 4) -> float:
    """Self-BLEU in [0, 100]: the mean sentence BLEU of each text against all others; low = diverse.

    Zhu et al., arXiv:1802.01886, with sacrebleu's BLEU: tokenizer 13a, exponential smoothing, effective order, closest
    reference length. Equal to `sacrebleu.sentence_bleu(text, others, use_effective_order=True)` text by text, in
    N log N instead of N² steps.

    Args:
        texts: N texts. max_order: longest n-gram.

    Returns:
        The mean, or NaN for fewer than two texts.

    >>> round(self_bleu(["the food is good", "the food is bad", "quite another text here"]), 2)
    39.64
    """
    _check_texts(texts)
    if len(texts) < 2:
        return float("nan")
    words = [_tokenizer_13a()(text.rstrip()).split() for text in texts]
    lengths = np.array([len(w) for w in words], dtype=np.int64)
    vocabulary: dict[str, int] = {}
    flat = np.array([vocabulary.setdefault(w, len(vocabulary)) for row in words for w in row], dtype=np.int64)
    text_of = np.repeat(np.arange(len(texts)), lengths)
    statistics = [_matches(grams, where, len(texts)) for grams, where in _ngrams(flat, text_of, max_order)]
    correct, total = (np.stack(part).astype(np.float64) for part in zip(*statistics, strict=True))
    return float(_sentence_bleu(correct, total, lengths, _closest_other_length(lengths)).mean())


def _sentence_bleu(correct: NDArray[Any], total: NDArray[Any], length: _Ints, reference_length: _Ints) -> NDArray[np.float64]:
    """Sacrebleu's `compute_bleu` with smoothing `exp` and effective order, for all texts: correct, total (order, N)."""
    halvings = np.cumsum((correct == 0) & (total > 0), axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(correct > 0, correct, 0.5**halvings) / total
        log_precision = np.where(total > 0, np.log(100 * precision), 0.0).sum(0)
        mean = log_precision / (total > 0).sum(0)
        penalty = np.where(length < reference_length, np.exp(1 - reference_length / length), 1.0)
    return np.where(correct.any(0), penalty * np.exp(mean), 0.0)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of all texts, words split at white space (Li et al., arXiv:1510.03055).

    Returns:
        A number in [0, 1]; NaN where no text has n words.

    >>> distinct_n(["a b a b", "a b"], 2)
    0.5
    """
    _check_texts(texts)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    rows = [text.split() for text in texts]
    grams = [gram for row in rows for gram in zip(*(row[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def perplexity(log_p: Tensor, n_tokens: Tensor) -> Tensor:
    """exp(−Σ log p / Σ n): log_p (B,) nats, n_tokens (B,) the tokens they are of, end tokens included.

    >>> perplexity(torch.tensor([-2.0, -4.0]), torch.tensor([1, 2])).item()  # exp(2)
    7.38905609893065
    """
    if log_p.shape != n_tokens.shape:
        raise ValueError(f"log_p and n_tokens must have one shape, got {tuple(log_p.shape)} and {tuple(n_tokens.shape)}")
    return torch.exp(-log_p.double().sum() / n_tokens.sum())
