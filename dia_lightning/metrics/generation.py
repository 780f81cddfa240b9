"""Every figure of a run from its `Generations`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torchmetrics import MaxMetric, MetricCollection, SumMetric

from dia_lightning.metrics.collection import (
    DistinctN,
    LMPerplexity,
    MeanReward,
    NetworkCosts,
    SecondsPer100Tokens,
    SelfBLEU,
)  # fmt: skip
from dia_lightning.metrics.functional import check_names
from dia_lightning.types import Generations


class GenerationMetrics(nn.Module):
    """Every figure of a run, batch by batch; `compute` gives those of all processes and must be
    called on each of them.

    The names are taken at construction so that every process, also one that drew nothing, holds the
    same states. A
    collective over NCCL needs the states on the GPU: move the object there, as any module.

    Args:
        reward_names: keys of `Generations.rewards`.
        networks: all that `Generations.costs` may have; a batch may lack some.
        tokenizer: of self-BLEU and distinct-n; `auto` looks at the texts of all processes.
        kwargs: of every `torchmetrics.Metric` in it, such as `sync_on_compute`.

    Raises:
        TypeError: the names are not a sequence of strings.
        ValueError: two names are equal, or a reward is named `std`, which is another figure's key.
    """

    def __init__(
        self, reward_names: Sequence[str], networks: Sequence[str] = (), tokenizer: str = "auto",
        **kwargs: Any
    ) -> None:  # fmt: skip
        super().__init__()
        check_names("reward_names", reward_names)
        check_names("networks", networks)
        if "std" in reward_names:
            raise ValueError(
                "reward_names must not have 'std', since reward_std is another figure, got"
                f" {list(reward_names)}"
            )
        self.reward_names = list(reward_names)
        self.n = SumMetric(nan_strategy="error", **kwargs).set_dtype(torch.float64)
        self.reward = MeanReward(**kwargs)
        # A list, not a dictionary of modules, whose keys may not contain a dot.
        self.rewards = nn.ModuleList(MeanReward(**kwargs) for _ in reward_names)
        self.perplexity = LMPerplexity(**kwargs)
        text_metrics = {"self_bleu": SelfBLEU(tokenizer=tokenizer, **kwargs)} | {
            f"distinct_{n}": DistinctN(n, tokenizer, **kwargs) for n in range(1, 5)
        }
        # One group: they share one copy of the texts.
        self.text = MetricCollection(text_metrics, compute_groups=[list(text_metrics)])  # type: ignore[arg-type]
        self.latency = SecondsPer100Tokens(**kwargs)
        self.costs = NetworkCosts(networks, **kwargs)
        self.peak_memory = MaxMetric(nan_strategy="disable", **kwargs)

    def update(self, generations: Generations) -> None:
        """Add one batch.

        Raises:
            ValueError: the fields of the batch do not have one length, or a reward is unknown,
                missing or not finite.
        """
        batch = generations
        self._check(batch)
        self.costs.update(batch.costs)
        self.peak_memory.update(batch.peak_memory_mib)
        self.reward.update(batch.reward)
        for name, metric in self._by_name():
            metric.update(batch.rewards[name])
        self.perplexity.update(batch.log_p, batch.n_tokens)
        self.text.update(batch.texts)
        self.latency.update(
            batch.latency_s, int(batch.n_tokens.sum()), len(batch.texts), batch.warm
        )
        self.n.update(len(batch.texts))

    def _by_name(self) -> list[tuple[str, MeanReward]]:
        return [
            (name, cast(MeanReward, metric))
            for name, metric in zip(self.reward_names, self.rewards, strict=True)
        ]

    def _check(self, batch: Generations) -> None:
        if set(batch.rewards) != set(self.reward_names):
            raise ValueError(
                f"generations.rewards must have the names {self.reward_names}, got"
                f" {list(batch.rewards)}"
            )
        fields = {
            "reward": batch.reward,
            "log_p": batch.log_p,
            "n_tokens": batch.n_tokens,
            **batch.rewards,
        }
        shapes = {name: tuple(values.shape) for name, values in fields.items()}
        if any(shape != (len(batch.texts),) for shape in shapes.values()):
            raise ValueError(
                f"generations must have one value for each of its {len(batch.texts)} texts, got"
                f" shapes {shapes}"
            )

    def compute(self) -> dict[str, Any]:
        """The figures by name, of all processes.

        Returns:
            `n` texts (int); `reward` and `reward_<name>`, means over texts; `reward_std`, over
            texts, with Bessel's correction; `perplexity` and `log_p_per_token` (nats) under p_θ;
            `self_bleu` in [0, 100]; `distinct_1` … `distinct_4`; `latency_s_per_100_tokens` and
            `seconds_per_text` over the warm batches or, where there is none (a run of one batch),
            over the others; by network and for each text, `nfe` (rows that passed it), `tokens`
            (positions) and `flops`, and of all networks `flops_per_text`; `peak_memory_mib`. NaN
            where a figure needs more texts.
        """
        perplexity, n = self.perplexity.compute(), int(self.n.compute())
        costs = self.costs.compute()
        return {
            "n": n,
            "reward": float(self.reward.compute()),
            **{f"reward_{k}": float(metric.compute()) for k, metric in self._by_name()},
            "reward_std": float(self.reward.std()),
            "perplexity": float(perplexity),
            "log_p_per_token": -float(perplexity.log()),
            **{name: float(value) for name, value in self.text.compute().items()},
            "latency_s_per_100_tokens": float(self.latency.compute()),
            "seconds_per_text": float(self.latency.per_text()),
            "flops_per_text": sum(cost.flops for cost in costs.values()) / n,
            "peak_memory_mib": float(self.peak_memory.compute()),
            "nfe": {name: cost.calls / n for name, cost in costs.items()},
            "tokens": {name: cost.tokens / n for name, cost in costs.items()},
            "flops": {name: cost.flops / n for name, cost in costs.items()},
        }

    def reset(self) -> None:
        """Forget all batches."""
        for metric in (
            self.n,
            self.reward,
            self.perplexity,
            self.text,
            self.latency,
            self.costs,
            self.peak_memory,
        ):
            metric.reset()
        for _, reward in self._by_name():
            reward.reset()


def compute_metrics(batches: Iterable[Generations], tokenizer: str = "auto") -> dict[str, Any]:
    """All figures of a run whose batches lie in this process, with the keys of `metrics.json`.

    Those of `GenerationMetrics`, and the means of `accept_rate`, `canonical` and each of the
    diagnostics, if any, over the texts that have them.

    Args:
        batches: one at least.
        tokenizer: of self-BLEU and distinct-n.

    Raises:
        ValueError: no batches.
        UserError: the tokenizer is unknown or not installed.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches must have at least one batch, got none")
    networks = list(dict.fromkeys(name for batch in batches for name in batch.costs))
    metrics = GenerationMetrics(
        list(batches[0].rewards), networks, tokenizer, sync_on_compute=False
    )
    for batch in batches:
        metrics.update(batch)
    return {
        **metrics.compute(),
        **{
            name: float(torch.cat(values).double().nanmean())
            for name, values in _by_name(batches).items()
        },
    }


def _by_name(batches: Sequence[Generations]) -> dict[str, list[torch.Tensor]]:
    """The acceptance rates and diagnostics that the batches have, batch by batch."""
    found: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        shares = {"accept_rate": batch.accept_rate, "canonical": batch.canonical}
        rates = {name: values for name, values in shares.items() if values is not None}
        for name, values in {**rates, **batch.diagnostics}.items():
            found.setdefault(name, []).append(values)
    return found
