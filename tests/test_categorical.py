"""Draws against plain inversion in float64."""

import pytest
import torch

from dia_lightning.numerics import draw_categorical


@pytest.mark.parametrize("n_tokens", [5, 4096, 5000, 49_152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_draws_are_those_of_plain_inversion(n_tokens: int, dtype: torch.dtype) -> None:
    """Only a u within rounding of a token's border may fall to its neighbour: none of 400 does
    at this seed.
    """
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 100, n_tokens, generator=generator)).to(dtype)
    logits[..., 1] = -torch.inf
    u = torch.rand(4, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    want = torch.searchsorted(cumulative, u[..., None] * cumulative[..., -1:], right=True)[..., 0]
    drawn = draw_categorical(logits, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, want)
    assert not (drawn == 1).any()


def test_of_one_possible_token_it_is_that() -> None:
    logits = torch.full((3, 5000), -torch.inf)
    logits[torch.arange(3), torch.tensor([0, 2500, 4999])] = torch.tensor([700.0, 0.0, -700.0])
    assert draw_categorical(logits, torch.Generator().manual_seed(0)).tolist() == [0, 2500, 4999]
