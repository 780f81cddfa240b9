"""A sampler's texts against exact π."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dia_lightning.samplers import GuidedSamplerModule, Sampler
from dia_lightning.testing.law import exact_law, misfit
from dia_lightning.testing.table import TableLM, TableReward, table_lm
from dia_lightning.types import Batch, Reward


class SamplerError(ValueError):
    """A sampler broke one of its laws; the message names the law, and the text that shows it
    best.
    """


def check_sampler(
    sampler: Sampler, lam: float = 1.5, n: int = 2000, prompts: Sequence[str] = ("", "a"),
    lm: TableLM | None = None, reward: Reward | None = None, denoiser: str | None = None,
    critic: str | None = None, false_alarm: float = 1e-4, seed: int = 0,
) -> None:  # fmt: skip
    """Draw texts of a listed language model by `GuidedSamplerModule.predict_step`; returns if they
    are draws of π.

    The laws: 'same seed, same texts'; 'prompts stay'; and 'target', the texts of each prompt are
    independent draws of π(x) ∝ p_θ(x | prompt) exp(λ r(x)), by a χ² test. A sampler that is exact
    only in a limit (many rounds, many particles) passes where it is near enough for n texts; texts
    of one population depend on each other, which needs many particles a text.

    Args:
        sampler: settings, as a run has them. lam: λ; 0 tries p_θ itself.
        n: texts for each prompt, all in one batch, 100 or more. prompts: letters of the model.
        lm, reward: another listed model or reward than `table_lm()` and `TableReward(lm)`.
        denoiser, critic: folders of the networks that the sampler needs, trained or made for `lm`.
        false_alarm: probability that an exact sampler fails, over all prompts.

    Raises:
        SamplerError: naming the law.
        ValueError: if n is too small to tell.
        UserError: as for `GuidedSamplerModule`, for example where a network is missing.
    """
    if n < 100:
        raise ValueError(f"n: {n} given, allowed: 100 or more")
    lm = table_lm() if lm is None else lm
    reward = TableReward(lm) if reward is None else reward
    listed: Any = lm
    module = GuidedSamplerModule(
        reward, sampler, listed, denoiser, critic, lam, compare_base=False, seed=seed
    )
    few = lm.batch([*prompts] * 8)
    first, second = _tokens(module, few), _tokens(module, few)
    if first.shape != second.shape or (first != second).any():
        raise SamplerError(
            "law 'same seed, same texts': two draws with one seed differ; take all random numbers"
            " from `generator`"
        )
    batch = lm.batch([*prompts] * n)
    tokens = _tokens(module, batch)
    moved = ((tokens != batch.tokens) & batch.prompt_mask).any(1)
    if moved.any():
        i = int(moved.nonzero()[0])
        raise SamplerError(
            f"law 'prompts stay': the text of the prompt {batch.prompts[i]!r} has the tokens"
            f" {tokens[i].tolist()}"
        )
    for i, prompt in enumerate(prompts):
        law = exact_law(lm, reward, lam, prompt)
        if wrong := misfit(law, tokens[i :: len(prompts)], false_alarm / len(prompts)):
            raise SamplerError(f"law 'target', prompt {prompt!r}, λ = {lam:g}: {wrong}")


def _tokens(module: GuidedSamplerModule, batch: Batch) -> Tensor:
    return module.predict_step(batch)[0].tokens
