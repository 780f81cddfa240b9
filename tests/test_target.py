"""The target density against transformers and the reward themselves."""

import torch
from torch import Tensor

from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import Keyword
from dia_lightning.target import TargetDensity, terms_of
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
