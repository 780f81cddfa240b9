"""`Perplexity` against the model's own logits, text by text and token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import Perplexity, check_reward

TEXTS = [
    "the good food is great near the river.",
    "the pub",
    "pub the the",
    "river food cheap cheap",
]


def by_hand(lm: BaseLM, text: str) -> float:
    ids = [lm.bos_id, *lm.tokenizer(text, add_special_tokens=False)["input_ids"], lm.end_id][
        : lm.max_length + 1
    ]
    with torch.no_grad():
        log_p = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_p[i, ids[i + 1]].item() for i in range(len(ids) - 1)) / (len(ids) - 1)


def test_it_is_the_mean_log_probability_of_a_token(lm: BaseLM, lm_folder: Path) -> None:
    texts = [*TEXTS, "", "food " * 100]
    expected = torch.tensor([by_hand(lm, text) for text in texts])
    torch.testing.assert_close(Perplexity(str(lm_folder))(texts), expected, rtol=0, atol=1e-5)


def test_it_obeys_the_laws(lm_folder: Path) -> None:
    check_reward(Perplexity(str(lm_folder)), TEXTS)


def test_errors_name_the_rewards_own_option(lm_folder: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"^model: no such folder: \./nowhere",
    ):
        Perplexity("./nowhere")
    with pytest.raises(UserError, match=r"^device: 'gpu' given, allowed"):
        Perplexity(str(lm_folder), device="gpu")
