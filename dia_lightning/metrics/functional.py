"""Metrics of generated text as pure functions: `_update` turns data into statistics, `_compute`
these into a figure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dia_lightning.words import cut, resolve

_Ints = NDArray[np.int64]


def check_texts(texts: Sequence[str]) -> None:
    """Raise TypeError unless `texts` is a sequence of strings (a single string is not)."""
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(
            f"texts must be a sequence of strings, got {type(texts).__name__} {str(texts)[:60]!r}"
        )
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"texts must be a sequence of strings, got {type(text).__name__} {str(text)[:60]!r}"
                f" at place {i}"
            )


def check_order(name: str, order: int) -> None:
    """Raise ValueError unless `order`, the length of an n-gram, is an integer from 1 on."""
    if not isinstance(order, int) or isinstance(order, bool) or order < 1:
        raise ValueError(f"{name} must be an integer, at least 1, got {order!r}")


def check_names(name: str, names: Sequence[str]) -> None:
    """Raise unless `names` is a sequence of strings (TypeError), all different (ValueError)."""
    if (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or not all(isinstance(name, str) for name in names)
    ):
        raise TypeError(f"{name} must be a sequence of names, got {names!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{name} must be different from each other, got {list(names)}")


def _check_pair(**pair: Tensor) -> None:
    (name_a, a), (name_b, b) = pair.items()
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"{name_a} and {name_b} must have one shape (B,), got {tuple(a.shape)} and"
            f" {tuple(b.shape)}"
        )


def _ngram_codes(words: list[list[str]], order: int) -> list[tuple[_Ints, _Ints]]:
    """For n = 1 … order, of each n-gram in N word lists: an integer (equal n-grams, equal integers)
    and its list's number.

    The code of an n-gram is made from that of its first n − 1 words and its last word, renumbered
    so that it cannot overflow.
    """
    lengths = np.array([len(row) for row in words], dtype=np.int64)
    vocabulary: dict[str, int] = {}
    tokens = np.array(
        [vocabulary.setdefault(word, len(vocabulary)) for row in words for word in row],
        dtype=np.int64,
    )
    text = np.repeat(np.arange(len(words)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(tokens))
    code, codes = tokens.copy(), []
    for n in range(1, order + 1):
        start = np.flatnonzero(left >= n)
        if n > 1:
            pair = code[start] * len(vocabulary) + tokens[start + n - 1]
            code[start] = np.unique(pair, return_inverse=True)[1]
        codes.append((code[start], text[start]))
    return codes


def _clipped_matches(gram: _Ints, text: _Ints, n_texts: int) -> tuple[_Ints, _Ints]:
    """(N,) n-grams of each text, every one counted at most as often as in some other text; and (N,)
    all its n-grams.

    Only the largest and the second largest count of each n-gram are needed: a text that holds the
    largest is clipped by the second largest, every other text by the largest.
    """
    key, count = np.unique(gram * n_texts + text, return_counts=True)
    gram, text = np.divmod(key, n_texts)
    order = np.lexsort((-count, gram))
    gram, text, count = gram[order], text[order], count[order]
    holds_largest = np.diff(gram, prepend=-1) != 0
    largest = count[holds_largest][np.cumsum(holds_largest) - 1]
    # The roll brings the first entry, which holds a largest count, behind the last: an n-gram ends
    # there too.
    second_largest = np.where(np.roll(holds_largest, -1), 0, np.roll(count, -1))
    matched = np.minimum(count, np.where(holds_largest, second_largest, largest))
    n_matched, n_all = np.bincount(text, matched, n_texts), np.bincount(text, count, n_texts)
    return n_matched.astype(np.int64), n_all.astype(np.int64)


def _closest_other_length(length: _Ints) -> _Ints:
    """(N,) for each text the length, among all others, that is closest to its own; the shorter
    one of two equally close.
    """
    ordered = np.sort(length)
    own = np.searchsorted(ordered, length)
    below, above = ordered[np.maximum(own - 1, 0)], ordered[np.minimum(own + 1, len(length) - 1)]
    take_below = (own > 0) & ((own == len(length) - 1) | (length - below <= above - length))
    return np.where(take_below, below, above)


def _self_bleu_update(
    texts: Sequence[str], n_gram: int = 4, tokenizer: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Statistics of N ≥ 2 texts, all int64: matched and all n-grams (n_gram, N); own and closest
    other length (N,), words.
    """
    words = cut(texts, resolve(tokenizer, texts))
    counts = [
        _clipped_matches(gram, text, len(texts)) for gram, text in _ngram_codes(words, n_gram)
    ]
    correct, total = (torch.from_numpy(np.stack(part)) for part in zip(*counts, strict=True))
    length = np.array([len(row) for row in words], dtype=np.int64)
    return correct, total, torch.from_numpy(length), torch.from_numpy(_closest_other_length(length))


def _sentence_bleu(
    correct: Tensor, total: Tensor, length: Tensor, reference_length: Tensor
) -> Tensor:
    """(N,) BLEU in [0, 100] from the statistics: sacrebleu's `BLEU.compute_bleu` with `exp` and
    effective order.
    """
    exists = total > 0
    halvings = ((correct == 0) & exists).cumsum(0)
    precision = torch.where(correct > 0, correct.double(), 0.5**halvings) / total
    log_precision = torch.where(exists, (100 * precision).log(), 0.0).sum(0) / exists.sum(0)
    log_penalty = (1 - reference_length.double() / length).clamp(max=0)
    return torch.where(correct.any(0), (log_precision + log_penalty).exp(), 0.0)


def _self_bleu_compute(
    correct: Tensor, total: Tensor, length: Tensor, reference_length: Tensor
) -> Tensor:
    score = _sentence_bleu(correct, total, length, reference_length).mean()
    return torch.where(length.any(), score, torch.nan)


def self_bleu(texts: Sequence[str], n_gram: int = 4, tokenizer: str = "auto") -> Tensor:
    """Self-BLEU: the mean BLEU of each text with all the others as its references; low means
    diverse.

    Zhu et al. 2018 (Texygen, arXiv:1802.01886), on sacrebleu's scale of 0 to 100 and by its
    definition of sentence BLEU: smoothing `exp`, effective order, closest reference length. Equal
    to the mean over i of `sacrebleu.sentence_bleu(texts[i], others, tokenize=…,
    use_effective_order=True).score`, in N log N instead of N² steps.

    Args:
        texts: N texts.
        n_gram: longest n-gram, at least 1.
        tokenizer: a name of sacrebleu's, or `auto`, see `words.resolve`.

    Returns:
        A float64 scalar in [0, 100]; NaN for N < 2, where a text has no others, and where all are
        empty.

    Raises:
        TypeError: `texts` is not a sequence of strings.
        ValueError: `n_gram` < 1.
        UserError: the tokenizer is unknown or not installed.

    >>> self_bleu(["the food is good", "the food is bad", "quite another text here"])
    tensor(39.6402, dtype=torch.float64)
    """
    check_texts(texts)
    check_order("n_gram", n_gram)
    if len(texts) < 2:
        return torch.tensor(torch.nan, dtype=torch.float64)
    return _self_bleu_compute(*_self_bleu_update(texts, n_gram, tokenizer))


def _distinct_n_update(
    texts: Sequence[str], n: int, tokenizer: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Numbers of distinct and of all n-grams: int64 scalars."""
    name = resolve(tokenizer, texts)
    words = [text.split() for text in texts] if name == "13a" else cut(texts, name)
    gram, _ = _ngram_codes(words, n)[-1]
    return torch.tensor(len(np.unique(gram))), torch.tensor(len(gram))


def _distinct_n_compute(distinct: Tensor, total: Tensor) -> Tensor:
    return distinct.double() / total


def distinct_n(texts: Sequence[str], n: int, tokenizer: str = "auto") -> Tensor:
    """Distinct n-grams over all n-grams of all texts together; high means diverse.

    Li et al. 2016 (arXiv:1510.03055). With `13a`, the one for scripts with spaces, words are what
    `text.split()` gives: punctuation stays on its word. With any other they are its tokens. Case is
    kept. The figure falls as texts are added, so compare it for equal numbers of texts only.

    Args:
        texts: N texts.
        n: length of the n-grams, at least 1.
        tokenizer: a name of sacrebleu's, or `auto`, see `words.resolve`.

    Returns:
        A float64 scalar in (0, 1]; NaN where no text has n words.

    Raises:
        TypeError: `texts` is not a sequence of strings.
        ValueError: `n` < 1.
        UserError: the tokenizer is unknown or not installed.

    >>> distinct_n(["a b a b", "a b"], 2)
    tensor(0.5000, dtype=torch.float64)
    """
    check_texts(texts)
    check_order("n", n)
    return _distinct_n_compute(*_distinct_n_update(texts, n, tokenizer))


def _perplexity_update(log_p: Tensor, n_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the batch: log p in nats (float64 scalar) and tokens (int64 scalar)."""
    _check_pair(log_p=log_p, n_tokens=n_tokens)
    if (n_tokens < 0).any():
        raise ValueError(f"n_tokens must not be negative, got {n_tokens.min().item()}")
    return log_p.double().sum(), n_tokens.long().sum()


def _perplexity_compute(log_p: Tensor, n_tokens: Tensor) -> Tensor:
    return torch.exp(-log_p / n_tokens)


def perplexity(log_p: Tensor, n_tokens: Tensor) -> Tensor:
    """exp(−Σ log p / Σ n): perplexity per token of the whole corpus, not a mean over texts.

    Args:
        log_p: (B,) log-probability of each text and its end token, nats.
        n_tokens: (B,) number of the tokens these are of, end token included.

    Returns:
        A float64 scalar, at least 1; NaN where there are no tokens.

    Raises:
        ValueError: the shapes are not one (B,), or a number of tokens is negative.

    >>> perplexity(torch.tensor([-2.0, -4.0]), torch.tensor([1, 2]))  # exp(6 / 3)
    tensor(7.3891, dtype=torch.float64)
    """
    return _perplexity_compute(*_perplexity_update(log_p, n_tokens))


def _seconds_per_100_tokens_update(seconds: Tensor, n_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the batches: seconds (float64 scalar) and tokens (int64 scalar)."""
    _check_pair(seconds=seconds, n_tokens=n_tokens)
    if not ((seconds >= 0) & seconds.isfinite()).all() or (n_tokens < 0).any():
        raise ValueError(
            f"seconds and n_tokens must be finite and not negative, got {seconds.tolist()},"
            f" {n_tokens.tolist()}"
        )
    return seconds.double().sum(), n_tokens.long().sum()


def _seconds_per_100_tokens_compute(seconds: Tensor, n_tokens: Tensor) -> Tensor:
    return 100 * seconds / n_tokens


def seconds_per_100_tokens(seconds: Tensor, n_tokens: Tensor) -> Tensor:
    """100 Σ seconds / Σ tokens over batches; the caller leaves out those that warm up the device.

    Args:
        seconds: (K,) wall-clock seconds of each batch.
        n_tokens: (K,) tokens of all texts in each batch, end tokens included.

    Returns:
        A float64 scalar, seconds; NaN without batches.

    Raises:
        ValueError: the shapes are not one (K,), or a value is negative or not finite.

    >>> seconds_per_100_tokens(torch.tensor([1.0, 3.0]), torch.tensor([50, 150]))
    tensor(2., dtype=torch.float64)
    """
    return _seconds_per_100_tokens_compute(*_seconds_per_100_tokens_update(seconds, n_tokens))
