"""The same metrics as `torchmetrics.Metric`s, whose states add up over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import CatMetric, Metric
from torchmetrics.utilities.data import dim_zero_cat

from dia_lightning.metrics.functional import (
    _perplexity_compute,
    _perplexity_update,
    _seconds_per_100_tokens_compute,
    _seconds_per_100_tokens_update,
    check_names,
    check_order,
    check_texts,
    distinct_n,
    self_bleu,
)  # fmt: skip
from dia_lightning.types import Cost
from dia_lightning.words import check_tokenizer


class TextMetric(Metric):
    """Keeps the texts themselves, as UTF-8 bytes and numbers of bytes, since only tensors travel
    between processes.
    """

    is_differentiable = False
    full_state_update = False
    utf8: list[Tensor] | Tensor
    n_bytes: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("utf8", default=[], dist_reduce_fx="cat")
        self.add_state("n_bytes", default=[], dist_reduce_fx="cat")

    def update(self, texts: Sequence[str]) -> None:
        """Add texts; TypeError if they are not a sequence of strings."""
        check_texts(texts)
        # surrogatepass: a lone surrogate is a legal str, and the text must come back as it was.
        self._append([text.encode("utf-8", "surrogatepass") for text in texts])

    def _append(self, encoded: list[bytes]) -> None:
        assert isinstance(self.utf8, list)
        assert isinstance(self.n_bytes, list)
        utf8 = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
        self.utf8.append(torch.from_numpy(utf8).to(self.device))
        self.n_bytes.append(
            torch.tensor([len(text) for text in encoded], dtype=torch.int64, device=self.device)
        )

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # For a process without texts torchmetrics would send an empty float32, which does not
        # gather with bytes.
        if isinstance(self.utf8, list) and not self.utf8:
            self._append([])
        super()._sync_dist(*args, **kwargs)

    def texts(self) -> list[str]:
        """The texts in the order of the processes and, in each, of the updates."""
        if isinstance(self.utf8, list) and not self.utf8:
            return []
        data = dim_zero_cat(self.utf8).cpu().numpy().tobytes()
        ends = dim_zero_cat(self.n_bytes).cumsum(0).tolist()
        return [
            data[a:b].decode("utf-8", "surrogatepass")
            for a, b in zip([0, *ends], ends, strict=False)
        ]


class SelfBLEU(TextMetric):
    """Self-BLEU in [0, 100] of all texts of all processes, see `functional.self_bleu`; NaN for
    fewer than two.

    Args:
        n_gram: longest n-gram.
        tokenizer: a name of sacrebleu's, or `auto`, which looks at the texts of all processes.
        kwargs: of `torchmetrics.Metric`.

    >>> metric = SelfBLEU()
    >>> metric.update(["the food is good", "the food is bad"])
    >>> metric.update(["quite another text here"])
    >>> metric.compute()
    tensor(39.6402, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, n_gram: int = 4, tokenizer: str = "auto", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_order("n_gram", n_gram)
        check_tokenizer(tokenizer)
        self.n_gram, self.tokenizer = n_gram, tokenizer

    def compute(self) -> Tensor:
        return self_bleu(self.texts(), self.n_gram, self.tokenizer).to(self.device)


class DistinctN(TextMetric):
    """Distinct n-grams over all n-grams of all texts of all processes, see `functional.distinct_n`.

    Args:
        n: length of the n-grams.
        tokenizer: as of `SelfBLEU`.
        kwargs: of `torchmetrics.Metric`.

    >>> metric = DistinctN(2)
    >>> metric.update(["a b a b", "a b"])
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, n: int, tokenizer: str = "auto", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_order("n", n)
        check_tokenizer(tokenizer)
        self.n, self.tokenizer = n, tokenizer

    def compute(self) -> Tensor:
        return distinct_n(self.texts(), self.n, self.tokenizer).to(self.device)


class LMPerplexity(Metric):
    """Perplexity from log-probabilities that were computed elsewhere (torchmetrics' own wants
    logits).

    See `functional.perplexity`.

    >>> metric = LMPerplexity()
    >>> metric.update(torch.tensor([-2.0, -4.0]), torch.tensor([1, 2]))
    >>> metric.compute()
    tensor(7.3891, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    log_p: Tensor
    n_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("log_p", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, log_p: Tensor, n_tokens: Tensor) -> None:
        """log_p (B,) nats and n_tokens (B,)."""
        sum_log_p, sum_n_tokens = _perplexity_update(
            log_p.to(self.device), n_tokens.to(self.device)
        )
        self.log_p += sum_log_p
        self.n_tokens += sum_n_tokens

    def compute(self) -> Tensor:
        return _perplexity_compute(self.log_p, self.n_tokens)


class SecondsPer100Tokens(Metric):
    """Seconds per 100 tokens over the warm batches, see `functional.seconds_per_100_tokens`;
    `per_text`, seconds per text.

    A batch that warms up the device is given with `warm=False`. It counts only where no process saw
    a warm one.

    >>> metric = SecondsPer100Tokens()
    >>> metric.update(9.0, 100, n_texts=4, warm=False)
    >>> metric.compute()
    tensor(9., dtype=torch.float64)
    >>> metric.update(2.0, 100, n_texts=4)
    >>> metric.compute(), metric.per_text()
    (tensor(2., dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    seconds: Tensor
    n_tokens: Tensor
    n_texts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Each state has two entries: cold batches, warm batches.
        self.add_state("seconds", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_tokens", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("n_texts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, seconds: float, n_tokens: int, n_texts: int, warm: bool = True) -> None:
        """One batch: its wall-clock seconds, the tokens of all its texts, and how many they are."""
        batch = (
            torch.tensor([seconds], dtype=torch.float64),
            torch.tensor([n_tokens], dtype=torch.int64),
        )
        sum_seconds, sum_n_tokens = _seconds_per_100_tokens_update(*batch)
        self.seconds[int(warm)] += sum_seconds
        self.n_tokens[int(warm)] += sum_n_tokens
        self.n_texts[int(warm)] += n_texts

    def compute(self) -> Tensor:
        kind = int(self.n_texts[1] > 0)
        return _seconds_per_100_tokens_compute(self.seconds[kind], self.n_tokens[kind])

    def per_text(self) -> Tensor:
        """Every process must call it, like `compute`."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute and not self._is_synced
        ):
            kind = int(self.n_texts[1] > 0)
            return self.seconds[kind] / self.n_texts[kind]


class MeanReward(CatMetric):
    """Mean of the rewards of all texts of all processes (`compute`) and their standard deviation
    (`std`), in float64.

    Keeps every value, one number a text, so that the deviation of nearly equal rewards does not
    cancel.

    >>> metric = MeanReward()
    >>> metric.update(torch.tensor([0.0, 2.0]))
    >>> metric.compute(), metric.std()
    (tensor(1., dtype=torch.float64), tensor(1.4142, dtype=torch.float64))
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nan_strategy="error", **kwargs)
        self.set_dtype(torch.float64)

    def update(self, value: Tensor) -> None:  # type: ignore[override]
        """Rewards (B,); ValueError where one is not finite."""
        if value.ndim != 1 or not value.isfinite().all():
            raise ValueError(
                f"rewards must be (B,) and finite, got {tuple(value.shape)}"
                f" {value.detach().cpu().tolist()}"
            )
        super().update(value.detach().to(self.device))

    def _values(self) -> Tensor:
        value: Tensor | list[Tensor] = self.value
        return (
            dim_zero_cat(value)
            if len(value)
            else torch.zeros(0, dtype=torch.float64, device=self.device)
        )

    def compute(self) -> Tensor:
        return self._values().mean()

    def std(self) -> Tensor:
        """Over texts, with Bessel's correction; NaN for fewer than two. Every process must call
        it, like `compute`.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute and not self._is_synced
        ):
            values = self._values()
        return (
            values.std()
            if len(values) > 1
            else torch.tensor(torch.nan, dtype=torch.float64, device=self.device)
        )


class NetworkCosts(Metric):
    """Sums of what passed through each network (`types.Cost`).

    Args:
        networks: the names of all that will occur; known beforehand, so that every process holds
            the same state.
        kwargs: of `torchmetrics.Metric`.

    >>> metric = NetworkCosts(["denoiser", "critic"])
    >>> metric.update({"denoiser": Cost(16, 640, 1e9)})
    >>> metric.compute()["denoiser"]
    Cost(calls=16.0, tokens=640.0, flops=1000000000.0)
    """

    is_differentiable = False
    full_state_update = False
    costs: Tensor

    def __init__(self, networks: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_names("networks", networks)
        self.networks = list(networks)
        self.add_state(
            "costs",
            torch.zeros(len(networks), len(Cost._fields), dtype=torch.float64),
            dist_reduce_fx="sum",
        )

    def update(self, costs: Mapping[str, Cost]) -> None:
        """Costs by network; ValueError for one that was not named at construction."""
        if unknown := set(costs) - set(self.networks):
            raise ValueError(
                f"costs must be of networks among {self.networks}, got {sorted(unknown)}"
            )
        rows = [costs.get(name, Cost()) for name in self.networks]
        self.costs += torch.tensor(rows, dtype=torch.float64, device=self.device).reshape(
            self.costs.shape
        )

    def compute(self) -> dict[str, Cost]:
        return {
            name: Cost(*row) for name, row in zip(self.networks, self.costs.tolist(), strict=True)
        }
