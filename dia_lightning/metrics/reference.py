"""BLEU and ROUGE of texts against references, as functions and as metrics whose states are the
texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from dia_lightning.metrics.collection import TextMetric
from dia_lightning.metrics.functional import check_texts
from dia_lightning.words import RougeWords, bleu, check_tokenizer, mostly_latin, resolve

_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


@lru_cache(maxsize=8)
def _rouge(tokenizer: str | None) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    own = None if tokenizer is None else RougeWords(tokenizer)
    return RougeScorer(list(_ROUGE.values()), tokenizer=own)


def check_references(texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise unless `references` has, for each text, a sequence of strings (TypeError), at least
    one (ValueError).
    """
    check_texts(texts)
    if isinstance(references, str) or len(references) != len(texts):
        raise ValueError(
            f"references must have one entry for each of {len(texts)} texts, got {len(references)}"
        )
    for i, given in enumerate(references):
        check_texts(given)
        if not given:
            raise ValueError(
                f"references must have at least one for each text, got none at place {i}"
            )


def _tokenizer(tokenizer: str, references: Sequence[Sequence[str]]) -> str:
    """What `auto` stands for with these references together."""
    return resolve(tokenizer, [reference for given in references for reference in given])


def reference_bleu(
    texts: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "auto"
) -> Tensor:  # fmt: skip
    """Corpus BLEU in [0, 100] by sacrebleu (Post 2018, arXiv:1804.08771), else with its defaults.

    Args:
        texts: N texts.
        references: for each text one reference or more; their number may vary.
        tokenizer: a name of sacrebleu's, or `auto`, chosen by the references, see `words.resolve`.

    Returns:
        A float64 scalar; NaN without texts, or where no reference has a word.

    Raises:
        TypeError: texts or references are not sequences of strings.
        ValueError: not one entry a text, or an empty one.
        UserError: the tokenizer is unknown or not installed.

    >>> reference_bleu(["the food is good here"], [["the food is good there", "the good food"]])
    tensor(66.8740, dtype=torch.float64)
    """
    check_references(texts, references)
    name, score = _tokenizer(tokenizer, references), torch.nan
    if texts:
        found = bleu(name).corpus_score(list(texts), list(zip_longest(*references)))
        score = found.score if found.ref_len else torch.nan
    return torch.tensor(score, dtype=torch.float64)


def bleu_signature(n_references: int | None, tokenizer: str = "13a") -> str:
    """Sacrebleu's signature of `reference_bleu`; `n_references` for every text, None where the
    number varies.

    >>> bleu_signature(1)[:50]
    'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|versi'
    """
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(force=True, tokenize=tokenizer)
    scorer.num_refs = -1 if n_references is None else n_references
    return str(scorer.get_signature())


def reference_rouge(
    texts: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "auto"
) -> dict[str, Tensor]:  # fmt: skip
    """ROUGE-1, -2 and -L, F-measure in [0, 1], means over texts, by rouge-score (Lin 2004).

    Of several references the one with the largest F-measure counts, for each of the three by
    itself. Without a stemmer, in lower case. With `13a` and references in Latin script words are
    those of rouge-score, letters a – z and digits; with `13a` in another script those of
    `words.words`; with any other tokenizer its tokens that have a letter or digit.

    Args:
        texts: N texts.
        references: for each text one reference or more; their number may vary.
        tokenizer: as of `reference_bleu`.

    Returns:
        `rouge_1`, `rouge_2` and `rouge_l`, float64 scalars; NaN without texts, or where no
        reference has a word.

    Raises:
        TypeError: texts or references are not sequences of strings.
        ValueError: not one entry a text, or an empty one.
        UserError: the tokenizer is unknown or not installed.

    >>> reference_rouge(["the food is good"], [["the food was good", "no"]])["rouge_1"]
    tensor(0.7500, dtype=torch.float64)
    """
    check_references(texts, references)
    name, flat = _tokenizer(tokenizer, references), [r for given in references for r in given]
    scorer = _rouge(None if name == "13a" and mostly_latin(flat) else name)
    best = [
        scorer.score_multi(list(given), text) for text, given in zip(texts, references, strict=True)
    ]
    f = torch.tensor(
        [[score[key].fmeasure for key in _ROUGE.values()] for score in best], dtype=torch.float64
    )
    mean = f.reshape(-1, len(_ROUGE)).mean(0)
    if not mean.any() and not any(map(scorer._tokenizer.tokenize, flat)):
        mean = mean.fill_(torch.nan)
    return dict(zip(_ROUGE, mean, strict=True))


class _ReferenceMetric(TextMetric):
    """Keeps texts and references, since only all of them together say how words are cut.

    Args:
        tokenizer: a name of sacrebleu's, or `auto`, chosen by the references of all processes.
        kwargs: of `torchmetrics.Metric`.
    """

    higher_is_better = True
    n_references: list[Tensor] | Tensor

    def __init__(self, tokenizer: str = "auto", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.add_state("n_references", default=[], dist_reduce_fx="cat")

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:  # type: ignore[override]
        """Add texts with their references."""
        check_references(texts, references)
        super().update(
            [part for text, given in zip(texts, references, strict=True) for part in (text, *given)]
        )
        self._count([len(given) for given in references])

    def _count(self, numbers: list[int]) -> None:
        assert isinstance(self.n_references, list)
        self.n_references.append(torch.tensor(numbers, dtype=torch.int64, device=self.device))

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.n_references, list) and not self.n_references:
            self._count([])
        super()._sync_dist(*args, **kwargs)

    def pairs(self) -> tuple[list[str], list[list[str]]]:
        """The texts, and the references of each."""
        parts = iter(self.texts())
        numbers = dim_zero_cat(self.n_references).tolist() if len(self.n_references) else []
        rows = [(next(parts), [next(parts) for _ in range(n)]) for n in numbers]
        return [text for text, _ in rows], [given for _, given in rows]


class ReferenceBLEU(_ReferenceMetric):
    """Corpus BLEU of all texts of all processes, see `reference_bleu`; NaN without texts.

    >>> metric = ReferenceBLEU()
    >>> metric.update(["the food is good here"], [["the food is good there", "the good food"]])
    >>> metric.compute()
    tensor(66.8740, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        return reference_bleu(*self.pairs(), self.tokenizer).to(self.device)

    def signature(self) -> str:
        """Sacrebleu's signature for these texts. Every process must call it, like `compute`."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute and not self._is_synced
        ):
            _, references = self.pairs()
        numbers = {len(given) for given in references}
        return bleu_signature(
            numbers.pop() if len(numbers) == 1 else None, _tokenizer(self.tokenizer, references)
        )


class ReferenceROUGE(_ReferenceMetric):
    """ROUGE of all texts of all processes, see `reference_rouge`; NaN without texts.

    >>> metric = ReferenceROUGE()
    >>> metric.update(["the food is good"], [["the food was good", "no"]])
    >>> metric.compute()["rouge_2"]
    tensor(0.3333, dtype=torch.float64)
    """

    def compute(self) -> dict[str, Tensor]:
        scores = reference_rouge(*self.pairs(), self.tokenizer)
        return {name: value.to(self.device) for name, value in scores.items()}
