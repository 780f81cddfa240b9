"""π of a listed language model, and whether texts are draws of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dia_lightning.rewards.base import call_reward
from dia_lightning.testing.table import Floats, TableLM
from dia_lightning.types import Reward


class Law(NamedTuple):
    """Every text that begins with a prompt, and its probability.

    rows: (N, T) int64 tokens in canonical form. texts: the same as read, prompt included. log_p:
        (N,) log p_θ(x | prompt) in nats. reward: (N,) r. pi: (N,) π(x), sums to 1. log_z: log
        E_{p_θ}[exp(λ r)], nats.
    """

    rows: Tensor
    texts: list[str]
    log_p: Floats
    reward: Floats
    pi: Floats
    log_z: float

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, T) independent exact draws of π."""
        place = torch.multinomial(torch.from_numpy(self.pi), n, True, generator=generator)
        return self.rows[place]


def exact_law(lm: TableLM, reward: Reward, lam: float, prompt: str = "") -> Law:
    """π(x) ∝ p_θ(x | prompt) exp(λ r(x)), by listing every text.

    Args:
        lm: p_θ. reward: r, asked for prompt and text as one; not a conditional one. lam: λ.

    Raises:
        ValueError: if the prompt is not fewer than T letters of the model.
        RewardError: as for `call_reward`.
    """
    begin = lm.batch([prompt]).tokens[0, : len(prompt)]
    fits = (lm.rows[:, : len(prompt)] == begin).all(1).numpy()
    texts = [text for text, fit in zip(lm.texts(), fits, strict=True) if fit]
    values = call_reward(reward, texts).double().numpy()
    log_p = lm.log_p[fits] - np.logaddexp.reduce(lm.log_p[fits])
    log_z = float(np.logaddexp.reduce(log_p + lam * values))
    pi = np.exp(log_p + lam * values - log_z)
    return Law(lm.rows[torch.from_numpy(fits)], texts, log_p, values, pi / pi.sum(), log_z)


def misfit(law: Law, tokens: Tensor, false_alarm: float) -> str:
    """Why `tokens` (n, T) are not n independent draws of π; "" if nothing speaks against it.

    Pearson's χ² test; texts expected fewer than 5 times count together. Exact draws fail it with
    probability `false_alarm`, about.

    Raises:
        ValueError: if n is too small for two cells.
    """
    from scipy.stats import chi2

    place = {row: i for i, row in enumerate(map(tuple, law.rows.tolist()))}
    found = [place.get(tuple(row), -1) for row in tokens.tolist()]
    if -1 in found:
        row = tokens[found.index(-1)].tolist()
        return f"the tokens {row} are no text of this prompt in canonical form"
    got, n = np.bincount(found, minlength=len(law.pi)), len(found)
    want = n * law.pi
    order = np.argsort(want)
    # Rare texts, and as many more as make their cell large enough.
    n_rare = int((want < 5).sum())
    while 0 < n_rare < len(want) and want[order[:n_rare]].sum() < 5:
        n_rare += 1
    cells = [*order[n_rare:, None], *([order[:n_rare]] if n_rare else [])]
    if len(cells) < 2:
        raise ValueError(f"n: {n} texts given, too few for {len(want)} different ones")
    counts = np.array([(got[cell].sum(), want[cell].sum()) for cell in cells])
    statistic = float((np.diff(counts)[:, 0] ** 2 / counts[:, 1]).sum())
    p_value = float(chi2.sf(statistic, len(cells) - 1))
    if p_value >= false_alarm:
        return ""
    distance = np.abs(got - want).sum() / (2 * n)
    floor = np.sqrt(2 / np.pi * law.pi * (1 - law.pi) / n).sum() / 2
    worst = int(np.argmax(np.abs(got - want) / np.sqrt(want + 1)))
    return (
        f"of {n} texts {law.texts[worst]!r} was drawn {got[worst]} times, {want[worst]:.1f}"
        f" expected; total variation {distance:.3f}, {floor:.3f} for exact draws (χ² ="
        f" {statistic:.1f} with {len(cells) - 1} degrees of freedom, p = {p_value:.0e}, allowed:"
        f" {false_alarm:g})"
    )
