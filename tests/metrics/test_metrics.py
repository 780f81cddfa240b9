"""Metrics against sacrebleu, naive counts and the standard library; two processes against one."""

import doctest
import math
import statistics
import threading
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from sacrebleu.metrics.bleu import BLEU
from torch import Tensor

from dia_lightning.metrics import (
    DistinctN,
    GenerationMetrics,
    LMPerplexity,
    MeanReward,
    SecondsPer100Tokens,
    SelfBLEU,
    collection,
    functional,
)
from dia_lightning.metrics.collection import NetworkCosts
from dia_lightning.metrics.functional import (
    distinct_n,
    perplexity,
    seconds_per_100_tokens,
    self_bleu,
)
from dia_lightning.metrics.generation import compute_metrics
from dia_lightning.types import Cost, Generations

WORDS = [
    "the",
    "The",
    "food",
    "is",
    "good,",
    "bad.",
    "café",
    "3.5",
    "(near)",
    "it's",
    "U.S.",
    "-",
    "&amp;",
    "ΩΩ",
]


def random_texts(seed: int, n: int, longest: int) -> list[str]:
    """Few words, so that texts share n-grams and repeat themselves; some are empty or equal to
    another.
    """
    draw = Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(0, longest))) for _ in range(n - 1)]
    return [*texts, texts[0]]


@pytest.mark.parametrize("seed", range(8))
def test_self_bleu_is_sacrebleus(seed: int) -> None:
    texts = random_texts(seed, 3 + seed, 2 + 2 * seed)
    others = [texts[:i] + texts[i + 1 :] for i in range(len(texts))]
    expected = [
        sacrebleu.sentence_bleu(t, o, use_effective_order=True).score
        for t, o in zip(texts, others, strict=True)
    ]
    correct, total, length, reference_length = functional._self_bleu_update(texts, 4)
    # Per text, not only in the mean, where errors could cancel.
    assert functional._sentence_bleu(
        correct, total, length, reference_length
    ).tolist() == pytest.approx(expected, abs=1e-9)
    assert self_bleu(texts).item() == pytest.approx(statistics.fmean(expected), abs=1e-9)
    bigrams = BLEU(max_ngram_order=2, effective_order=True)
    expected = [bigrams.sentence_score(t, o).score for t, o in zip(texts, others, strict=True)]
    assert self_bleu(texts, 2).item() == pytest.approx(statistics.fmean(expected), abs=1e-9)


def test_names_are_strings_that_differ() -> None:
    for wrong in ("reward", ["a", 3], [3, "a"], [None], 5, {"a"}):
        with pytest.raises(TypeError, match="names must be a sequence of names, got"):
            functional.check_names("names", wrong)  # type: ignore[arg-type]
    for wrong in (["a", "a"], ["a", "b", "c", "a"]):
        with pytest.raises(ValueError, match="names must be different from each other"):
            functional.check_names("names", wrong)
    for right in ([], ["a"], ("a", "b")):
        functional.check_names("names", right)


@pytest.mark.parametrize("wrong", [0, -1, True, False, 1.5, 2.0, "2", None])
def test_the_length_of_an_n_gram_is_a_number_from_one_on(wrong: Any) -> None:
    with pytest.raises(ValueError, match="n_gram must be an integer, at least 1, got "):
        self_bleu(["a b", "c d"], wrong)
    with pytest.raises(ValueError, match=r"^n must be an integer, at least 1, got "):
        distinct_n(["a b", "c d"], wrong)
    assert distinct_n(["a b a"], 1).item() == pytest.approx(2 / 3)


def test_sums_that_are_none_are_refused() -> None:
    for seconds, tokens in ((-1.0, 5), (math.inf, 5), (-math.inf, 5), (math.nan, 5), (1.0, -1)):
        with pytest.raises(ValueError, match="must be finite and not negative"):
            seconds_per_100_tokens(torch.tensor([1.0, seconds]), torch.tensor([3, tokens]))
    assert float(
        seconds_per_100_tokens(torch.tensor([1.0, 0.0]), torch.tensor([3, 0]))
    ) == pytest.approx(100 / 3)
    for tokens in (-1, -5):
        with pytest.raises(ValueError, match=f"n_tokens must not be negative, got {tokens}"):
            perplexity(torch.tensor([-1.0, -2.0]), torch.tensor([3, tokens]))
    assert float(perplexity(torch.tensor([-3.0, 0.0]), torch.tensor([3, 0]))) == pytest.approx(
        math.e
    )
    for function in (perplexity, seconds_per_100_tokens):
        for a, b in (
            (torch.ones(2), torch.ones(3)),
            (torch.ones(2, 1), torch.ones(2, 1)),
            (torch.ones(()), torch.ones(())),
        ):
            with pytest.raises(ValueError, match=r"must have one shape \(B,\)"):
                function(a, b)


@pytest.mark.parametrize(
    "lengths", [[3, 5], [4, 4], [1, 3, 5], [9, 1, 2, 2], [0, 7, 3, 5, 6, 1], [2, 2, 2, 8]]
)
def test_the_closest_other_length(lengths: list[int]) -> None:
    """The shorter of two equally close."""
    want = [
        min((abs(b - a), b) for j, b in enumerate(lengths) if j != i)[1]
        for i, a in enumerate(lengths)
    ]
    assert functional._closest_other_length(np.array(lengths)).tolist() == want


def test_self_bleu_at_its_ends() -> None:
    assert self_bleu(["the food is good here"] * 3).item() == pytest.approx(100)
    assert self_bleu(["a b c d", "e f g h"]).item() == 0
    assert self_bleu(["alone"]).isnan()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_distinct_n_is_a_count(n: int) -> None:
    for seed in range(5):
        texts = random_texts(seed, 12, 9)
        grams = [
            tuple(words[i : i + n])
            for words in map(str.split, texts)
            for i in range(len(words) - n + 1)
        ]
        assert distinct_n(texts, n).item() == len(set(grams)) / len(grams)
    assert distinct_n(["a b"], 3).isnan()


def test_perplexity_and_latency_are_ratios_of_sums() -> None:
    log_p, n_tokens = [-3.5, -20.25, -0.125], [2, 11, 1]
    assert perplexity(torch.tensor(log_p), torch.tensor(n_tokens)).item() == pytest.approx(
        math.exp(23.875 / 14), rel=1e-12
    )
    assert seconds_per_100_tokens(torch.tensor([1.5, 0.25]), torch.tensor([40, 10])).item() == 3.5
    assert perplexity(torch.zeros(0), torch.zeros(0)).isnan()


def test_reward_mean_and_deviation_do_not_cancel() -> None:
    rewards = [1000.25, 1000.5, 1000.125, 1000.0]
    metric = MeanReward()
    metric.update(torch.tensor(rewards[:3]))
    metric.update(torch.tensor(rewards[3:]))
    assert metric.compute().item() == statistics.fmean(rewards)
    assert metric.std().item() == pytest.approx(statistics.stdev(rewards), rel=1e-12)
    with pytest.raises(ValueError, match="finite"):
        metric.update(torch.tensor([math.nan]))


@pytest.mark.parametrize("wrong", ["one text", ["a", 1]])
def test_texts_are_sequences_of_strings(wrong: Any) -> None:
    for metric in (
        self_bleu,
        lambda texts: distinct_n(texts, 1),
        SelfBLEU().update,
        DistinctN(1).update,
    ):
        with pytest.raises(TypeError, match="sequence of strings"):
            metric(wrong)


@pytest.mark.parametrize("module", [collection, functional])
def test_examples(module: Any) -> None:
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0
    assert result.attempted >= 4


# Two processes, as two threads that exchange tensors where torchmetrics would gather


class Processes:
    """`all_gather` between threads: each call hands in one tensor and returns those of all."""

    def __init__(self, n: int) -> None:
        self.barrier, self.slots = threading.Barrier(n, timeout=10), [torch.empty(0)] * n
        self.rank = threading.local()

    def gather(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        self.slots[self.rank.value] = tensor
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        assert len({t.dtype for t in found}) == 1, "a real gather needs one dtype"
        assert len({t.ndim for t in found}) == 1
        return found

    def run(self, work: Sequence[Callable[[dict[str, Any]], Any]]) -> list[Any]:
        options = {"dist_sync_fn": self.gather, "distributed_available_fn": lambda: True}
        results: list[Any] = [None] * len(work)

        def one(rank: int) -> None:
            self.rank.value = rank
            results[rank] = work[rank](options)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(work))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def batch(index: int, n: int, warm: bool, seconds: float) -> Generations:
    draw = Random(index)
    reward = torch.tensor([draw.gauss(0, 1) for _ in range(n)])
    return Generations(
        index=index, ids=list(range(n)), prompts=[""] * n, texts=random_texts(index, n, 8),
        tokens=torch.zeros(n, 1, dtype=torch.int64),
        log_p=torch.tensor([-10 * draw.random() for _ in range(n)]).double(),
        n_tokens=torch.tensor([draw.randint(1, 9) for _ in range(n)]), rewards={"a.b": reward + 1,
         "c": reward},
        reward=reward, method="m", seed=0, latency_s=seconds, warm=warm,
        peak_memory_mib=10.0 + index,
        costs={"denoiser": Cost(8 * n, 80 * n, 1e12)} if index else {"critic": Cost(2 * n, 8 * n,
          1e9)},
    )  # fmt: skip


BATCHES = [
    batch(0, 3, False, 50.0),
    batch(1, 4, False, 70.0),
    batch(2, 5, True, 1.0),
    batch(3, 2, True, 2.0),
]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("shares", [([0, 2], [1, 3]), ([0, 1, 2, 3], [])])
def test_two_processes_are_one(shares: tuple[list[int], list[int]]) -> None:
    def work(indices: list[int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def figures(options: dict[str, Any]) -> dict[str, Any]:
            metrics = GenerationMetrics(["a.b", "c"], ["denoiser", "critic"], **options)
            for i in indices:
                metrics.update(BATCHES[i])
            return metrics.compute()

        return figures

    whole = work([0, 1, 2, 3])({})
    for figures in Processes(2).run([work(share) for share in shares]):
        assert figures.keys() == whole.keys()
        for name, value in figures.items():
            assert value == pytest.approx(whole[name], rel=1e-12), name
    assert whole["n"] == 14
    assert whole["tokens"] == {"critic": 8 * 3 / 14, "denoiser": 80 * 11 / 14}
    assert whole["flops_per_text"] == (3e12 + 1e9) / 14
    assert whole["peak_memory_mib"] == 13


@pytest.mark.parametrize(
    "metric",
    [
        SelfBLEU(),
        DistinctN(1),
        LMPerplexity(),
        SecondsPer100Tokens(),
        MeanReward(),
        NetworkCosts(["a"]),
    ],
    ids=lambda metric: type(metric).__name__,
)
def test_every_metric_forgets(metric: Any) -> None:
    given: dict[type, tuple[Any, ...]] = {
        SelfBLEU: (["a b", "a c"],), DistinctN: (["a b", "a"],),
        MeanReward: (torch.tensor([1.0]),), NetworkCosts: ({"a": Cost(1)},),
        SecondsPer100Tokens: (1.0, 10, 2), LMPerplexity: (torch.tensor([-1.0]), torch.tensor([1])),
    }  # fmt: skip
    values = []
    for _ in range(2):
        metric.update(*given[type(metric)])
        values.append(metric.compute())
        metric.reset()
    assert values[0] == values[1]


def test_figures_of_a_run() -> None:
    figures = compute_metrics(BATCHES)
    rewards = [r for b in BATCHES for r in b.reward.tolist()]
    assert figures["reward"] == pytest.approx(statistics.fmean(rewards), rel=1e-9)
    assert figures["reward_std"] == pytest.approx(statistics.stdev(rewards), rel=1e-9)
    assert figures["reward_a.b"] == pytest.approx(statistics.fmean(rewards) + 1, rel=1e-6)
    total = sum(b.log_p.sum().item() for b in BATCHES) / sum(
        b.n_tokens.sum().item() for b in BATCHES
    )
    assert figures["log_p_per_token"] == pytest.approx(total, rel=1e-9)
    # Only the warm batches: the first of each of two processes is left out, not only that of number
    # 0.
    warm = sum(b.n_tokens.sum().item() for b in BATCHES[2:])
    assert figures["latency_s_per_100_tokens"] == pytest.approx(300 / warm, rel=1e-9)
    assert figures["seconds_per_text"] == pytest.approx(3 / 7, rel=1e-9)
    assert figures["nfe"] == pytest.approx({"critic": 2 * 3 / 14, "denoiser": 8 * 11 / 14})
    cold = compute_metrics(BATCHES[:1])
    assert cold["latency_s_per_100_tokens"] == pytest.approx(
        5000 / BATCHES[0].n_tokens.sum().item(), rel=1e-9
    )
