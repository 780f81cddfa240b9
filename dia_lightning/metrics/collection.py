"""The same metrics as `torchmetrics.Metric`s, whose states add up over batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from dia_lightning.metrics.functional import distinct_n, perplexity, self_bleu
from dia_lightning.types import Generations


class _TextMetric(Metric):
    """Keeps texts as bytes, since only tensors travel between processes; an empty text is one separator."""

    full_state_update = False
    chunks: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("chunks", default=[], dist_reduce_fx="cat")

    def update(self, texts: Sequence[str]) -> None:
        """Add texts; the character NUL, which ends each of them here, may not occur."""
        data = "".join(text.replace("\0", " ") + "\0" for text in texts).encode()
        self.chunks.append(torch.tensor(list(data), dtype=torch.uint8, device=self.device))

    def texts(self) -> list[str]:
        chunks = self.chunks if isinstance(self.chunks, list) else [self.chunks]
        data = b"".join(bytes(chunk.cpu().tolist()) for chunk in chunks)
        return data.decode().split("\0")[:-1]


class SelfBLEU(_TextMetric):
    """Self-BLEU in [0, 100] of all texts seen (see `functional.self_bleu`).

    >>> metric = SelfBLEU()
    >>> metric.update(["the food is good", "the food is bad", "quite another text here"])
    >>> round(metric.compute().item(), 2)
    39.64
    """

    def compute(self) -> Tensor:
        return torch.tensor(self_bleu(self.texts()), dtype=torch.float64)


class DistinctN(_TextMetric):
    """Distinct n-grams over all n-grams of all texts seen (see `functional.distinct_n`).

    >>> metric = DistinctN(2)
    >>> metric.update(["a b a b", "a b"])
    >>> metric.compute().item()
    0.5
    """

    def __init__(self, n: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n = n

    def compute(self) -> Tensor:
        return torch.tensor(distinct_n(self.texts(), self.n), dtype=torch.float64)


class LMPerplexity(Metric):
    """Perplexity from log-probabilities that were computed elsewhere (torchmetrics' own wants logits).

    >>> metric = LMPerplexity()
    >>> metric.update(torch.tensor([-2.0, -4.0]), torch.tensor([1, 2]))
    >>> round(metric.compute().item(), 4)
    7.3891
    """

    full_state_update = False
    log_p: Tensor
    n_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("log_p", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, log_p: Tensor, n_tokens: Tensor) -> None:
        """log_p (B,) nats and n_tokens (B,)."""
        self.log_p += log_p.double().sum()
        self.n_tokens += n_tokens.sum()

    def compute(self) -> Tensor:
        return perplexity(self.log_p, self.n_tokens)


class GenerationMetrics:
    """Every figure of a run from its `Generations`.

    `update` takes one batch; batch 0 is the warm-up and counts for the latency only where it is alone.
    """

    def __init__(self, **kwargs: Any) -> None:
        def make(kind: Callable[..., Metric], *args: Any) -> Metric:
            return kind(*args, **kwargs)

        self.self_bleu, self.perplexity = make(SelfBLEU), make(LMPerplexity)
        self.distinct = {n: make(DistinctN, n) for n in range(1, 5)}
        self.rewards: dict[str, Metric] = {}
        self.square = make(MeanMetric)
        self._make_mean = lambda: make(MeanMetric)
        self.n, self.nfe = 0, dict[str, int]()
        self._seconds: dict[bool, float] = {}
        self._tokens: dict[bool, int] = {}

    def update(self, batch: Generations) -> None:
        """Add one batch."""
        for metric in (self.self_bleu, *self.distinct.values()):
            metric.update(batch.texts)
        self.perplexity.update(batch.log_p, batch.n_tokens)
        for name, values in {"reward": batch.reward, **{f"reward_{k}": v for k, v in batch.rewards.items()}}.items():
            self.rewards.setdefault(name, self._make_mean()).update(values)
        self.square.update(batch.reward.double().square())
        self.n += len(batch.texts)
        for kind, calls in batch.nfe.items():
            self.nfe[kind] = self.nfe.get(kind, 0) + calls * len(batch.texts)
        warm = batch.index > 0
        self._seconds[warm] = self._seconds.get(warm, 0.0) + batch.latency_s
        self._tokens[warm] = self._tokens.get(warm, 0) + int(batch.n_tokens.sum())

    def compute(self) -> dict[str, Any]:
        """The figures by their names in `metrics.json`; `nfe` is network calls per text, `reward_std` over texts."""
        rewards = {name: float(metric.compute()) for name, metric in self.rewards.items()}
        variance = max(0.0, float(self.square.compute()) - rewards["reward"] ** 2)
        perplexity_ = float(self.perplexity.compute())
        warm = True in self._tokens
        return {
            "n": self.n,
            **rewards,
            "reward_std": (variance * self.n / max(1, self.n - 1)) ** 0.5,
            "perplexity": perplexity_,
            "log_p_per_token": -float(torch.tensor(perplexity_, dtype=torch.float64).log()),
            "self_bleu": float(self.self_bleu.compute()),
            **{f"distinct_{n}": float(metric.compute()) for n, metric in self.distinct.items()},
            "latency_s_per_100_tokens": 100 * self._seconds[warm] / max(1, self._tokens[warm]),
            "nfe": {kind: calls / self.n for kind, calls in self.nfe.items()},
        }


def compute_metrics(batches: Iterable[Generations]) -> dict[str, Any]:
    """All figures of `batches`, computed in this process alone."""
    metrics = GenerationMetrics(sync_on_compute=False)
    for batch in batches:
        metrics.update(batch)
    return metrics.compute()
