"""BLEU and ROUGE against sacrebleu and rouge-score on the whole corpus at once; batches and two
processes against one.
"""

import doctest
import statistics
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from dia_lightning.metrics import reference
from dia_lightning.metrics.reference import (
    ReferenceBLEU,
    ReferenceROUGE,
    reference_bleu,
    reference_rouge,
)
from tests.metrics.test_metrics import Processes, random_texts

N = 12
TEXTS = random_texts(0, N, 12)
# One to three references a text, each a text with some of its words changed and its end moved to
# the front, so that every order of n-grams matches sometimes, and ROUGE-1 and ROUGE-L differ.
DRAW = Random(1)
REFERENCES = [
    [
        " ".join(
            w if DRAW.random() < 0.8 else "other"
            for w in ["end", *text.split()[-2:], *text.split()[:-2]]
        )
        for _ in range(1 + i % 3)
    ]
    for i, text in enumerate(TEXTS)
]


def sacrebleu_score(texts: list[str], references: list[list[str]]) -> tuple[float, str]:
    bleu = BLEU()
    columns = [
        [given[k] if k < len(given) else None for given in references]
        for k in range(max(map(len, references)))
    ]
    return bleu.corpus_score(texts, columns).score, str(bleu.get_signature())


def rouge_scores(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """The best reference by a loop of our own: `RougeScorer.score` for one reference at a time."""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    best = [
        [scorer.score(r, text) for r in given]
        for text, given in zip(texts, references, strict=True)
    ]
    keys = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    return {
        ours: statistics.fmean(max(s[key].fmeasure for s in one) for one in best)
        for ours, key in keys.items()
    }


def test_bleu_is_sacrebleus_on_the_corpus() -> None:
    expected, _ = sacrebleu_score(TEXTS, REFERENCES)
    assert 5 < expected < 95
    assert reference_bleu(TEXTS, REFERENCES).item() == pytest.approx(expected, rel=1e-12)
    # Not the mean over texts or batches, which a sum of scores would give.
    halves = [reference_bleu(TEXTS[i::2], REFERENCES[i::2]).item() for i in range(2)]
    assert statistics.fmean(halves) != pytest.approx(expected, rel=1e-3)


def test_rouge_is_the_best_reference_of_each_text() -> None:
    expected = rouge_scores(TEXTS, REFERENCES)
    found = {name: value.item() for name, value in reference_rouge(TEXTS, REFERENCES).items()}
    assert found == pytest.approx(expected, rel=1e-12)
    first = [given[:1] for given in REFERENCES]
    assert reference_rouge(TEXTS, first)["rouge_2"].item() < found["rouge_2"] - 1e-3
    assert len(set(found.values())) == 3


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("shares", [([0, 2], [1]), ([0, 1, 2], [])])
def test_two_processes_are_one(shares: tuple[list[int], list[int]]) -> None:
    """Batches of 1, 4 and 7 texts; the second process may have none."""
    batches = [slice(0, 1), slice(1, 5), slice(5, N)]

    def work(indices: list[int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def figures(options: dict[str, Any]) -> dict[str, Any]:
            bleu, rouge = ReferenceBLEU(**options), ReferenceROUGE(**options)
            for i in indices:
                for metric in (bleu, rouge):
                    metric.update(TEXTS[batches[i]], REFERENCES[batches[i]])
            return {"bleu": bleu.compute(), "signature": bleu.signature(), **rouge.compute()}

        return figures

    score, signature = sacrebleu_score(TEXTS, REFERENCES)
    expected = {"bleu": score, **rouge_scores(TEXTS, REFERENCES)}
    for found in [work([0, 1, 2])({}), *Processes(2).run([work(share) for share in shares])]:
        assert found.pop("signature") == signature
        assert {name: value.item() for name, value in found.items()} == pytest.approx(
            expected, rel=1e-12
        )


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_the_signature_states_the_number_of_references() -> None:
    metric = ReferenceBLEU()
    metric.update(["a b", "c"], [["a", "b"], ["c", "d"]])
    assert metric.signature() == sacrebleu_score(["a b", "c"], [["a", "b"], ["c", "d"]])[1]
    assert "nrefs:2|" in metric.signature()
    metric.update(["e"], [["e"]])
    assert "nrefs:var|" in metric.signature()
    metric.reset()
    assert metric.compute().isnan()
    metric.update(["e"], [["e"]])
    assert "nrefs:1|" in metric.signature()


def test_without_texts_there_is_no_figure() -> None:
    assert reference_bleu([], []).isnan()
    assert reference_rouge([], [])["rouge_1"].isnan()
    assert reference_bleu([""], [["a b"]]).item() == 0


def test_references_are_checked_at_the_door() -> None:
    for metric in (
        reference_bleu,
        reference_rouge,
        ReferenceBLEU().update,
        ReferenceROUGE().update,
    ):
        with pytest.raises(TypeError, match="sequence of strings"):
            metric(["a"], ["a"])
        with pytest.raises(ValueError, match="at least one for each text, got none at place 1"):
            metric(["a", "b"], [["a"], []])
        with pytest.raises(ValueError, match="one entry for each of 2 texts, got 1"):
            metric(["a", "b"], [["a"]])


def test_examples() -> None:
    result = doctest.testmod(reference)
    assert result.failed == 0
    assert result.attempted >= 4
