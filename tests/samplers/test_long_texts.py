"""Texts of more than eight tokens, after which samplers begin to look whether all have ended."""

import pytest
import torch

from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.samplers.guided_decoding import decode_guided
from dia_lightning.samplers.twisted_smc import Twist, twisted_smc


def rows(lm: BaseLM, n: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.full((n, length), lm.end_id)
    return tokens, torch.zeros_like(tokens, dtype=torch.bool)


@pytest.mark.parametrize("length", [7, 8, 9, 12, 16])
def test_without_a_reward_particles_are_samples_of_the_base_model(lm: BaseLM, length: int) -> None:
    """To the token, and weights and log Z are 0. (From place 16 on `generate` draws for fewer
    rows.)
    """
    tokens, mask = rows(lm, 24, length)
    twist = Twist(None, lambda tokens, rows: torch.zeros(len(tokens)), 1.0)
    made = twisted_smc(lm, tokens, mask, 3, twist, torch.Generator().manual_seed(1))
    want = lm.generate(tokens, mask, torch.Generator().manual_seed(1))
    assert torch.equal(made.writing.text(), want)
    assert int((want != lm.end_id).sum(1).max()) >= length - 1
    assert made.log_w.dtype == made.log_z.dtype == torch.float64
    assert not made.log_w.any()
    assert made.log_z.tolist() == [0] * 3


@pytest.mark.parametrize("top_k", [0, 1, 5])
@pytest.mark.parametrize("length", [8, 9, 20])
def test_the_best_tokens_are_greedy_decoding(lm: BaseLM, length: int, top_k: int) -> None:
    tokens, mask = rows(lm, 3, length)
    given = lm.generate(tokens, mask, torch.Generator().manual_seed(0))
    mask[1, :2], mask[2, :5] = True, True
    tokens = torch.where(mask, given, tokens)
    made = decode_guided(lm, tokens, mask, None, 0.0, top_k, torch.Generator(), "argmax")
    assert torch.equal(made, lm.generate(tokens, mask, torch.Generator(), top_k=1))


def test_texts_that_end_early_stop_the_writing(lm: BaseLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """All end at the first token: the base model is asked eight times at most, not at each of 24
    places.
    """
    tokens, mask = rows(lm, 4, 24)
    asked: list[int] = []
    logits = torch.zeros(4, lm.tokenizer.vocab_size + 1)
    logits[:, lm.end_id] = 1e9

    def next_logits(self: object) -> torch.Tensor:
        asked.append(1)
        return logits

    monkeypatch.setattr("dia_lightning.lm.decoding.Decoding.next_logits", next_logits)
    twist = Twist(None, lambda tokens, rows: torch.zeros(len(tokens)), 1.0)
    twisted_smc(lm, tokens, mask, 1, twist, torch.Generator().manual_seed(0))
    assert len(asked) == 8
    asked.clear()
    decode_guided(lm, tokens, mask, None, 0.0, 0, torch.Generator(), "argmax")
    assert len(asked) == 8
