"""The listed language model against its own scores and samples, and π by other arithmetic."""

import math

import numpy as np
import pytest
import torch

from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import Keyword
from dia_lightning.testing import TableLM, TableReward, exact_law, table_lm
from dia_lightning.testing.law import misfit


@pytest.mark.parametrize("size", [(2, 4), (1, 2), (5, 2), (2, 7)])
def test_every_text_is_listed_with_its_probability(size: tuple[int, int]) -> None:
    """Against the model's own pass, which reads logits; N = Σ_n letters^n."""
    lm = table_lm(*size)
    assert len(lm.rows) == sum(size[0] ** n for n in range(size[1] + 1))
    assert len(set(lm.texts())) == len(lm.rows)
    assert math.isclose(np.exp(lm.log_p).sum(), 1)
    scored = BaseLM.log_prob(lm, lm.rows)
    np.testing.assert_allclose(scored.numpy(), lm.log_p, atol=1e-5)


def test_samples_have_the_law_of_the_table() -> None:
    """10,000 texts of each of two prompts; a table drawn from another seed does not pass."""
    lm = table_lm()
    for prompt in ("", "ba"):
        batch = lm.batch([prompt] * 10_000)
        generator = torch.Generator().manual_seed(0)
        tokens = lm.generate(batch.tokens, batch.prompt_mask, generator)
        assert misfit(exact_law(lm, Keyword(["a"]), 0.0, prompt), tokens, 1e-3) == ""
        other = exact_law(table_lm(seed=1), Keyword(["a"]), 0.0, prompt)
        assert "was drawn" in misfit(other, tokens, 1e-3)


@pytest.mark.parametrize("prompt", ["", "b", "aba"])
def test_exact_law_in_plain_loops(prompt: str) -> None:
    lm, lam = table_lm(seed=2), 0.8
    reward = TableReward(lm, seed=5)
    law, weights = exact_law(lm, reward, lam, prompt), {}
    base = {text: math.exp(p) for text, p in zip(lm.texts(), lm.log_p, strict=True)}
    for text, p in base.items():
        if text.startswith(prompt):
            weights[text] = p * math.exp(lam * float(reward([text])[0]))
    assert law.texts == list(weights)
    total = sum(weights.values())
    np.testing.assert_allclose(law.pi, np.array(list(weights.values())) / total, rtol=1e-9)
    z = total / sum(base[text] for text in weights)
    assert math.isclose(law.log_z, math.log(z), rel_tol=1e-9)
    drawn = law.draw(20_000, torch.Generator().manual_seed(0))
    assert misfit(law, drawn, 1e-3) == ""


def test_the_false_alarm_rate_is_as_stated() -> None:
    """600 times 500 exact draws at a rate of 0.1: 60 ± 7.3 alarms, held to 4 standard errors."""
    lm = table_lm()
    law, generator = exact_law(lm, TableReward(lm), 1.0), torch.Generator().manual_seed(0)
    alarms = sum(misfit(law, law.draw(500, generator), 0.1) != "" for _ in range(600))
    assert abs(alarms - 60) < 4 * 7.3


def test_wrong_tables_and_prompts_are_named() -> None:
    for size in ((0, 4), (27, 2), (2, 1), (26, 9)):
        with pytest.raises(ValueError, match="letters and length"):
            table_lm(*size)
    half = np.array([0.5, 0.5])
    for row in (
        np.array([0.5, 0.6]),
        np.array([1.5, -0.5]),
        np.array([1.0]),
        np.array([1, np.nan]),
    ):
        with pytest.raises(ValueError, match=r"given after \(1,\)"):
            TableLM({(): half, (0,): half, (1,): row})
    with pytest.raises(ValueError, match=r"\[\] given after \(1,\)"):
        TableLM({(): half, (0,): half})
    for prompt in ("c", "abab", "a b"):
        with pytest.raises(ValueError, match="fewer than 4 of the letters ab"):
            table_lm().batch(["", prompt])
    lm = table_lm()
    with pytest.raises(ValueError, match="too few"):
        misfit(exact_law(lm, TableReward(lm), 1.0), lm.rows[:3], 0.1)
