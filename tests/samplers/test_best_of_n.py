"""BestOfN on a table that is small enough to enumerate: the law of the best of n in closed form."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dia_lightning.data.prompts import prompt_rows
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.row_cache import rows_at_once
from dia_lightning.samplers import BestOfN, GuidedSamplerModule, best_of_n
from dia_lightning.types import Batch
from tests.oracles.table_lm import REWARD
from tests.oracles.table_model import P, TableReward, chi_square_ok, free, table_lm
from tests.samplers.test_particle_steering import ShareOfVowels, batch


@pytest.fixture
def on_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseLM, "load", lambda name: table_lm())


def best_law(n: int) -> np.ndarray:
    """P(best = x) = F(x)ⁿ − F(x−)ⁿ, F the distribution function of the reward under p."""
    order = REWARD.argsort()
    upper = P[order].cumsum()
    law = np.empty_like(P)
    law[order] = upper**n - (upper - P[order]) ** n
    return law


@pytest.mark.parametrize("n", [1, 3])
def test_law_of_the_best_of_n(on_table: None, n: int) -> None:
    """χ² of 4000 texts at false-alarm rate 10⁻³, seed fixed; the laws of neighbouring n do not
    pass.
    """
    drawn = GuidedSamplerModule(TableReward(), BestOfN(n)).draw(
        free(4000), torch.Generator().manual_seed(1)
    )
    assert chi_square_ok(drawn.tokens, best_law(n))
    assert not chi_square_ok(drawn.tokens, best_law(n + 1))


def test_law_by_weight(on_table: None) -> None:
    """One of two by weight: P(x) = 2 p(x) Σ_y p(y) w(x) / (w(x) + w(y)); χ² of 4000 texts at
    false-alarm rate 10⁻³.
    """
    lam = 2.5
    module = GuidedSamplerModule(TableReward(), BestOfN(2, weighted=True), lam=lam)
    drawn = module.draw(free(4000), torch.Generator().manual_seed(2))
    w = np.exp(lam * REWARD)
    law = 2 * P * ((P / (w[:, None] + w)).sum(1) * w)
    assert abs(law.sum() - 1) < 1e-9
    assert chi_square_ok(drawn.tokens, law)
    assert not chi_square_ok(drawn.tokens, best_law(2))
    # E[exp(log Ẑ)] = Z: 4 standard errors.
    assert drawn.diagnostics is not None
    z = drawn.diagnostics["log_z"].exp()
    assert abs(float(z.mean()) - P @ w) < 4 * float(z.std()) / 4000**0.5
    assert bool(((drawn.diagnostics["ess"] >= 0.5) & (drawn.diagnostics["ess"] <= 1)).all())


def test_candidates_are_drawn_in_parts_and_scored_in_one_call(
    lm_folder: Path, lm: BaseLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text is the best of the candidates of its own prompt."""
    n, given = 300, batch(lm, ["the good", "the"])
    module = GuidedSamplerModule(ShareOfVowels(), BestOfN(n), str(lm_folder))
    asked: list[int] = []
    parts: list[torch.Tensor] = []
    generate = module.lm.generate

    def spy(tokens: torch.Tensor, *args: Any) -> torch.Tensor:
        parts.append(generate(tokens, *args))
        return parts[-1]

    def count(reward: Any, texts: list[str], records: Any) -> torch.Tensor:
        asked.append(len(texts))
        return ShareOfVowels()(texts)

    monkeypatch.setattr(module.lm, "generate", spy)
    monkeypatch.setattr(best_of_n, "call_reward", count)
    drawn = module.draw(given, torch.Generator().manual_seed(0))
    at_once = rows_at_once(given.tokens)
    assert asked == [2 * n]
    assert [len(x) for x in parts] == [at_once, 2 * n - at_once]
    for i, own in enumerate(torch.cat(parts).split(n)):
        mask = given.prompt_mask[i].expand_as(own)
        assert torch.equal(own[mask], given.tokens[i].expand_as(own)[mask])
        rewards = ShareOfVowels()([text.strip() for text in lm.decode(own, mask, with_prompt=True)])
        assert torch.equal(drawn.tokens[i], own[rewards.argmax()])


def test_options_are_checked(lm_folder: Path) -> None:
    with pytest.raises(UserError, match=r"^n: 0 given, allowed: 1 or more"):
        BestOfN(n=0)
    with pytest.raises(UserError, match=r"^lam: -1.0 given"):
        GuidedSamplerModule(ShareOfVowels(), BestOfN(), str(lm_folder), lam=-1.0)


def test_blanks_are_refused(lm_folder: Path, lm: BaseLM) -> None:
    prompts = ["the[blank:2] pub"]
    given = Batch(0, [0], prompts, *prompt_rows(lm, prompts, 8))
    with pytest.raises(
        UserError, match="blanks or a length given, but BestOfN writes from left to right"
    ):
        GuidedSamplerModule(ShareOfVowels(), BestOfN(), str(lm_folder)).draw(
            given, torch.Generator()
        )
