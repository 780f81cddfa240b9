"""Judges: held-out rewards; their mean, their rate and their expected maximum over samples."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.metrics.evaluation import Row
from dia_lightning.rewards.base import call_reward, written_out
from dia_lightning.types import Generations, Record, Reward

OPTION = "--trainer.callbacks.init_args.evaluation.init_args"


class RunTexts(NamedTuple):
    """The N texts of a run, as rewards read them.

    reward, perplexity under p_θ: (N,) float64. groups: equal for one prompt and record.
    """

    ids: list[int]
    prompts: list[str]
    texts: list[str]
    records: list[Record]
    reward: Tensor
    perplexity: Tensor
    groups: list[Hashable]


def prompt_groups(prompts: Sequence[str], records: Sequence[Record]) -> list[Hashable]:
    """For each text a key that is equal for texts of one prompt and record."""
    return list(zip(prompts, written_out(records), strict=True))


def run_texts(run: Sequence[Generations], records: Sequence[Record]) -> RunTexts:
    """The texts of all batches; `records` are indexed by `Generations.ids`."""
    ids = [i for batch in run for i in batch.ids]
    prompts = [prompt for batch in run for prompt in batch.prompts]
    texts = [text for batch in run for text in batch.seen or batch.texts]
    own = [records[i] for i in ids]
    reward, log_p, n_tokens = (
        torch.cat([getattr(batch, name) for batch in run]).double()
        for name in ("reward", "log_p", "n_tokens")
    )
    perplexity = (-log_p / n_tokens).exp()
    groups = prompt_groups(prompts, own)
    return RunTexts(ids, prompts, texts, own, reward, perplexity, groups)


def maximum_weights(n: int, k: int) -> Tensor:
    """(n,) float64 weights w; Σ w_i v_(i), v ascending, is the mean maximum of all k-subsets.

    w_i = C(i − 1, k − 1) / C(n, k), i from 1: the unbiased estimate of the expected maximum of k
    samples (a U-statistic).
    """
    weights = [math.comb(i, k - 1) / math.comb(n, k) for i in range(n)]
    return torch.tensor(weights, dtype=torch.float64)


def expected_maximum(values: Tensor, groups: Sequence[Hashable], k: int) -> float:
    """Mean over groups of the unbiased estimate of E[max of k samples].

    Source: expected maximum toxicity, Gehman et al. 2020, arXiv:2009.11462, k = 25.

    Args:
        values: (N,) float64.
        groups: N keys, equal for samples of one prompt.
        k: samples, at most the size of the smallest group.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    weights = {n: maximum_weights(n, k) for n in {len(m) for m in members.values()}}
    maxima = [float(weights[len(m)] @ values[m].sort().values) for m in members.values()]
    return sum(maxima) / len(maxima)


class Judge:
    """A score of texts that is reported and not optimised.

    In `metrics.json`: `<name>`, the mean over texts; with a threshold `<name>_rate`, the share of
    texts over it; with `maximum_over` = k `<name>_max_<k>`, the mean over prompts of the expected
    maximum of k samples; with both `<name>_any_<k>`, the mean over prompts of the probability that
    at least one of k samples is over the threshold.

    Args:
        reward: gives the score.
        threshold: of `<name>_rate`, on the reported score (after `negate`).
        maximum_over: k.
        negate: report −r, for a score where larger is worse, such as toxicity.
        name: in outputs; by default the reward's.

    Raises:
        UserError: for a threshold that is not finite or `maximum_over` below 1.
    """

    def __init__(
        self,
        reward: Reward,
        threshold: float | None = None,
        maximum_over: int | None = None,
        negate: bool = False,
        name: str | None = None,
    ) -> None:
        option = f"{OPTION}.judges.init_args"
        if threshold is not None and not math.isfinite(threshold):
            raise UserError(f"{option}.threshold: {threshold} given, allowed: a finite number")
        if maximum_over is not None and maximum_over < 1:
            given = f"{maximum_over} given, allowed: 1 or more samples"
            raise UserError(f"{option}.maximum_over: {given}")
        self.reward, self.threshold = reward, threshold
        self.maximum_over, self.negate = maximum_over, negate
        self.name = reward.name if name is None else name

    def check(self, records: Sequence[Record], fewest: int) -> None:
        """Try the reward on an empty text, and `maximum_over` on the number of texts of a prompt.

        Raises:
            UserError: if the record lacks what the reward reads, or `fewest` is too small.
        """
        call_reward(self.reward, [""], records[:1])
        if self.maximum_over is not None and self.maximum_over > fewest:
            raise UserError(
                f"{OPTION}.judges.init_args.maximum_over: {self.maximum_over} given for "
                f"{self.name!r}, allowed: at most {fewest}, the texts of a prompt "
                "(--data.init_args.n_texts)"
            )

    def figures(self, run: RunTexts) -> dict[str, Any]:
        """The reported figures, by their keys in `metrics.json`."""
        score = call_reward(self.reward, run.texts, run.records).double()
        score = -score if self.negate else score
        figures = {self.name: float(score.mean())}
        over = None if self.threshold is None else (score > self.threshold).double()
        if over is not None:
            figures[f"{self.name}_rate"] = float(over.mean())
        if (k := self.maximum_over) is not None:
            figures[f"{self.name}_max_{k}"] = expected_maximum(score, run.groups, k)
            if over is not None:
                figures[f"{self.name}_any_{k}"] = expected_maximum(over, run.groups, k)
        return figures

    def rows(self) -> list[Row]:
        """Key, label and format of `figures`, for a table."""
        name, k, over = self.name, self.maximum_over, f"over {self.threshold or 0.0:g}"
        rows = [(name, f"{name}, mean", "{:.3f}")]
        if self.threshold is not None:
            rows.append((f"{name}_rate", f"{name}, share of texts {over}", "{:.3f}"))
        if k is not None:
            rows.append((f"{name}_max_{k}", f"{name}, expected maximum of {k}", "{:.3f}"))
            if self.threshold is not None:
                rows.append((f"{name}_any_{k}", f"{name}, one of {k} {over}", "{:.3f}"))
        return rows
