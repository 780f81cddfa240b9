"""BLEU and ROUGE of texts against references, as functions and as metrics whose states are sums."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from dia_lightning.metrics.functional import check_texts

_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
_MANY = 1 << 30


@lru_cache(maxsize=1)
def _bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    # Texts are compared as they are: no warning about those that look tokenised.
    return BLEU(force=True)


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(_ROUGE.values()))


def check_references(texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise unless `references` has, for each text, a sequence of strings (TypeError), at least one (ValueError)."""
    check_texts(texts)
    if isinstance(references, str) or len(references) != len(texts):
        raise ValueError(f"references must have one entry for each of {len(texts)} texts, got {len(references)}")
    for i, given in enumerate(references):
        check_texts(given)
        if not given:
            raise ValueError(f"references must have at least one for each text, got none at place {i}")


def _reference_bleu_update(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Matched and all n-grams by n (4,), and the lengths of the texts and of their closest references (2,); int64."""
    check_references(texts, references)
    if not texts:
        return torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    score = _bleu().corpus_score(list(texts), list(zip_longest(*references)))
    return torch.tensor(score.counts), torch.tensor(score.totals), torch.tensor([score.sys_len, score.ref_len])


def _reference_bleu_compute(correct: Tensor, total: Tensor, lengths: Tensor) -> Tensor:
    if not lengths[1]:  # no texts, or empty references only
        return torch.tensor(torch.nan, dtype=torch.float64)
    score = _bleu().compute_bleu(correct.tolist(), total.tolist(), *lengths.tolist(), smooth_method="exp").score
    return torch.tensor(score, dtype=torch.float64)


def reference_bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
    """Corpus BLEU in [0, 100] by sacrebleu with its defaults (Post 2018, arXiv:1804.08771).

    Args:
        texts: N texts.
        references: for each text one reference or more; their number may vary.

    Returns:
        A float64 scalar; NaN without texts.

    Raises:
        TypeError: texts or references are not sequences of strings.
        ValueError: not one entry a text, or an empty one.

    >>> reference_bleu(["the food is good here"], [["the food is good there", "the good food"]])
    tensor(66.8740, dtype=torch.float64)
    """
    return _reference_bleu_compute(*_reference_bleu_update(texts, references))


def bleu_signature(n_references: int | None) -> str:
    """Sacrebleu's signature of `reference_bleu`; `n_references` for every text, None where the number varies.

    >>> bleu_signature(1)[:50]
    'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|versi'
    """
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(force=True)
    bleu.num_refs = -1 if n_references is None else n_references
    return str(bleu.get_signature())


def _reference_rouge_update(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """Sums over texts of the three F-measures (3,) float64, and the number of texts (int64 scalar)."""
    check_references(texts, references)
    best = [_rouge().score_multi(list(given), text) for text, given in zip(texts, references, strict=True)]
    f = torch.tensor([[score[key].fmeasure for key in _ROUGE.values()] for score in best], dtype=torch.float64)
    return f.reshape(-1, len(_ROUGE)).sum(0), torch.tensor(len(texts))


def _reference_rouge_compute(f: Tensor, n: Tensor) -> dict[str, Tensor]:
    return dict(zip(_ROUGE, f / n, strict=True))


def reference_rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """ROUGE-1, -2 and -L, F-measure in [0, 1], means over texts, by rouge-score (Lin 2004).

    Of several references the one with the largest F-measure counts, for each of the three by itself. Without a stemmer; words
    are lower-case letters a – z and digits, so that other scripts give 0.

    Args:
        texts: N texts.
        references: for each text one reference or more; their number may vary.

    Returns:
        `rouge_1`, `rouge_2` and `rouge_l`, float64 scalars; NaN without texts.

    Raises:
        TypeError: texts or references are not sequences of strings.
        ValueError: not one entry a text, or an empty one.

    >>> reference_rouge(["the food is good"], [["the food was good", "no"]])["rouge_1"]
    tensor(0.7500, dtype=torch.float64)
    """
    return _reference_rouge_compute(*_reference_rouge_update(texts, references))


class ReferenceBLEU(Metric):
    """Corpus BLEU of all texts of all processes, see `reference_bleu`; NaN without texts.

    >>> metric = ReferenceBLEU()
    >>> metric.update(["the food is good here"], [["the food is good there", "the good food"]])
    >>> metric.compute()
    tensor(66.8740, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor
    lengths: Tensor
    fewest: Tensor
    most: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, size in (("correct", 4), ("total", 4), ("lengths", 2)):
            self.add_state(name, torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")
        # References of a text: for the signature only.
        self.add_state("fewest", torch.tensor(_MANY), dist_reduce_fx="min")
        self.add_state("most", torch.tensor(0), dist_reduce_fx="max")

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add texts with their references."""
        correct, total, lengths = (s.to(self.device) for s in _reference_bleu_update(texts, references))
        self.correct += correct
        self.total += total
        self.lengths += lengths
        numbers = [len(given) for given in references]
        self.fewest = self.fewest.clamp(max=min(numbers, default=_MANY))
        self.most = self.most.clamp(min=max(numbers, default=0))

    def compute(self) -> Tensor:
        return _reference_bleu_compute(self.correct, self.total, self.lengths).to(self.device)

    def signature(self) -> str:
        """Sacrebleu's signature for these texts. Every process must call it, like `compute`."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute and not self._is_synced):
            return bleu_signature(int(self.most) if self.fewest == self.most else None)


class ReferenceROUGE(Metric):
    """ROUGE of all texts of all processes, see `reference_rouge`; NaN without texts.

    >>> metric = ReferenceROUGE()
    >>> metric.update(["the food is good"], [["the food was good", "no"]])
    >>> metric.compute()["rouge_2"]
    tensor(0.3333, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    f: Tensor
    n: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("f", torch.zeros(len(_ROUGE), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add texts with their references."""
        f, n = _reference_rouge_update(texts, references)
        self.f += f.to(self.device)
        self.n += n.to(self.device)

    def compute(self) -> dict[str, Tensor]:
        return _reference_rouge_compute(self.f, self.n)
