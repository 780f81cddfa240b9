"""Judges: rewards that nothing was optimised for, with their mean, their rate and their expected maximum over samples."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.rewards import call_reward
from dia_lightning.rewards.base import written_out
from dia_lightning.types import Generations, Record, Reward

OPTION = "--trainer.callbacks.init_args.evaluation.init_args"
Row = tuple[str, str, str]


class RunTexts(NamedTuple):
    """The N texts of a run, as rewards read them; groups, equal for texts of one prompt and record.

    reward, perplexity under p_θ: (N,) float64.
    """

    ids: list[int]
    prompts: list[str]
    texts: list[str]
    records: list[Record]
    reward: Tensor
    perplexity: Tensor
    groups: list[Hashable]


def prompt_groups(prompts: Sequence[str], records: Sequence[Record]) -> list[Hashable]:
    """For each text what it was drawn for, so that texts of one prompt and one record are equal here."""
    return list(zip(prompts, written_out(records), strict=True))


def run_texts(run: Sequence[Generations], records: Sequence[Record]) -> RunTexts:
    """The texts of all batches; `records` are indexed by `Generations.ids`."""
    ids, prompts = ([x for batch in run for x in getattr(batch, name)] for name in ("ids", "prompts"))
    texts = [text for batch in run for text in batch.seen or batch.texts]
    log_p, n_tokens = (torch.cat([getattr(batch, name) for batch in run]).double() for name in ("log_p", "n_tokens"))
    own = [records[i] for i in ids]
    reward = torch.cat([batch.reward for batch in run]).double()
    return RunTexts(ids, prompts, texts, own, reward, (-log_p / n_tokens).exp(), prompt_groups(prompts, own))


def maximum_weights(n: int, k: int) -> Tensor:
    """(n,) float64 weights w with Σ w_i v_(i), v sorted upwards, the mean of the maximum over all k-subsets of n values.

    w_i = C(i − 1, k − 1) / C(n, k), i from 1: the unbiased estimate of the expected maximum of k samples (a U-statistic).
    """
    return torch.tensor([math.comb(i, k - 1) / math.comb(n, k) for i in range(n)], dtype=torch.float64)


def expected_maximum(values: Tensor, groups: Sequence[Hashable], k: int) -> float:
    """Mean over groups of the unbiased estimate of E[max of k samples]; with k samples a group simply their maximum.

    Source: expected maximum toxicity, Gehman et al. 2020 (RealToxicityPrompts, arXiv:2009.11462), k = 25.

    Args:
        values: (N,) float64.
        groups: N keys, equal for samples of one prompt.
        k: samples, at most as many as the smallest group has.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    weights = {n: maximum_weights(n, k) for n in {len(m) for m in members.values()}}
    return sum(float(weights[len(m)] @ values[m].sort().values) for m in members.values()) / len(members)


class Judge:
    """A score of texts that is reported and not optimised.

    In `metrics.json`: `<name>`, the mean over texts; with a threshold `<name>_rate`, the share of texts whose score is over it;
    with `maximum_over` = k `<name>_max_<k>`, the mean over prompts of the expected maximum of k samples, and with both
    `<name>_any_<k>`, the mean over prompts of the probability that one of k samples or more is over the threshold.

    Args:
        reward: gives the score.
        threshold: of `<name>_rate`, on the score as it is reported (after `negate`).
        maximum_over: k.
        negate: report −r, for a score where larger is worse: toxicity from a reward that is its negative.
        name: in outputs; that of the reward by default.

    Raises:
        UserError: for a threshold that is not finite or `maximum_over` below 1.
    """

    def __init__(
        self, reward: Reward, threshold: float | None = None, maximum_over: int | None = None, negate: bool = False,
        name: str | None = None,
    ) -> None:  # fmt: skip
        if threshold is not None and not math.isfinite(threshold):
            raise UserError(f"{OPTION}.judges.init_args.threshold: {threshold} given, allowed: a finite number")
        if maximum_over is not None and maximum_over < 1:
            raise UserError(f"{OPTION}.judges.init_args.maximum_over: {maximum_over} given, allowed: 1 or more samples")
        self.reward, self.threshold, self.maximum_over, self.negate = reward, threshold, maximum_over, negate
        self.name = reward.name if name is None else name

    def check(self, records: Sequence[Record], fewest: int) -> None:
        """Try the reward on an empty text, and `maximum_over` on the number of texts of a prompt.

        Raises:
            UserError: if the record lacks what the reward reads, or `fewest` is too small.
        """
        call_reward(self.reward, [""], records[:1])
        if self.maximum_over is not None and self.maximum_over > fewest:
            raise UserError(
                f"{OPTION}.judges.init_args.maximum_over: {self.maximum_over} given for {self.name!r}, allowed: at most "
                f"{fewest}, the texts of a prompt (--data.init_args.n_texts)"
            )

    def figures(self, run: RunTexts) -> dict[str, Any]:
        """What is reported of the texts, by its key in `metrics.json`."""
        score = call_reward(self.reward, run.texts, run.records).double() * (-1 if self.negate else 1)
        over = None if self.threshold is None else (score > self.threshold).double()
        figures = {self.name: float(score.mean())}
        if over is not None:
            figures[f"{self.name}_rate"] = float(over.mean())
        if self.maximum_over is not None:
            figures[f"{self.name}_max_{self.maximum_over}"] = expected_maximum(score, run.groups, self.maximum_over)
            if over is not None:
                figures[f"{self.name}_any_{self.maximum_over}"] = expected_maximum(over, run.groups, self.maximum_over)
        return figures

    def rows(self) -> list[Row]:
        """Key, label and format of what `figures` gives, for a table."""
        rows = [(self.name, f"{self.name}, mean", "{:.3f}")]
        if self.threshold is not None:
            rows.append((f"{self.name}_rate", f"{self.name}, share of texts over {self.threshold:g}", "{:.3f}"))
        if self.maximum_over is not None:
            k = self.maximum_over
            rows.append((f"{self.name}_max_{k}", f"{self.name}, expected maximum of {k}", "{:.3f}"))
            if self.threshold is not None:
                rows.append((f"{self.name}_any_{k}", f"{self.name}, one of {k} over {self.threshold:g}", "{:.3f}"))
        return rows
