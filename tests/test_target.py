"""The target density against transformers and the reward themselves, and the laws of any target."""

import pytest
import torch
from torch import Tensor

from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import Keyword
from dia_lightning.target import TargetDensity, TargetError, check_target, terms_of
from dia_lightning.types import Batch


def batch(lm: BaseLM, prompt: str, n: int = 6) -> Batch:
    ids = lm.tokenizer(prompt)["input_ids"]
    tokens = torch.full((n, 10), lm.end_id)
    mask = torch.zeros(n, 10, dtype=torch.bool)
    tokens[:, : len(ids)], mask[:, : len(ids)] = torch.tensor(ids), True
    return Batch(
        0,
        list(range(n)),
        [prompt] * n,
        lm.generate(tokens, mask, torch.Generator().manual_seed(0)),
        mask,
    )


def test_log_prob_is_log_p_plus_lambda_reward_of_the_whole_text(lm: BaseLM) -> None:
    rows = batch(lm, "the good")
    reward = Keyword(["good"])
    target = TargetDensity(lm, reward, 2.5, rows)
    texts = [
        lm.tokenizer.decode([i for i in row if i != lm.end_id]) for row in rows.tokens.tolist()
    ]
    n_prompt = int(rows.prompt_mask[0].sum())
    for i, row in enumerate(rows.tokens):
        ends = (row[n_prompt:] == lm.end_id).nonzero()
        n = n_prompt + int(ends[0]) + 1 if len(ends) else 10
        inputs = torch.cat([torch.tensor([lm.bos_id]), row[:n]])[None]
        labels = inputs.clone()
        labels[:, : n_prompt + 1] = -100
        loss = lm.model(inputs, labels=labels).loss
        want = -float(loss) * (n - n_prompt) + 2.5 * float(reward([texts[i]])[0])
        assert abs(float(target.log_prob(rows.tokens)[i]) - want) < 1e-3
    assert target.calls == {"base_lm": 36, "reward": 36}


def test_any_object_with_log_prob_is_a_target() -> None:
    class Sum:
        def log_prob(self, tokens: Tensor) -> Tensor:
            return -tokens.float().sum(1)

    tokens = torch.tensor([[1, 2], [0, 4], [3, 3]])
    terms = terms_of(Sum(), tokens)
    assert terms.log_base.tolist() == [-3, -4, -6]
    assert terms.log_base.dtype == torch.float64
    assert terms.reward.tolist() == [0, 0, 0]
    check_target(Sum(), tokens)


def test_check_target_names_the_broken_law(lm: BaseLM) -> None:
    tokens = torch.tensor([[1, 2], [0, 4], [3, 3]])

    def target(function: object) -> object:
        return type("T", (), {"log_prob": staticmethod(function)})()

    broken = {
        "shape": lambda x: x.float(),
        "finite or −inf": lambda x: x.float().sum(1) / 0 * 0,
        "deterministic": lambda x: torch.rand(len(x)),
        "batch = one by one": lambda x: x.float().sum(1) / len(x),
        "tokens unchanged": lambda x: x.mul_(2).float().sum(1),
    }
    for law, function in broken.items():
        with pytest.raises(TargetError, match=law):
            check_target(target(function), tokens.clone())
    check_target(target(lambda x: torch.where(x[:, 0] == 0, -torch.inf, -1.0)), tokens)
    check_target(TargetDensity(lm, Keyword(["good"]), 1.0), batch(lm, "").tokens)
