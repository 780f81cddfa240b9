"""Parallel tempering: the swap by enumeration, every rung's marginal, and a mode that the cold
chain alone never finds.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.lm.row_cache import TokenTerms
from dia_lightning.sampling.denoise_accept import DenoiserDrafts
from dia_lightning.sampling.drafts import SuffixDrafts
from dia_lightning.sampling.ensemble import EnsembleKernel
from dia_lightning.sampling.positions import RandomTokens
from dia_lightning.sampling.state import State
from dia_lightning.sampling.tempering import Tempering, swap_neighbours
from dia_lightning.target import Terms
from tests.oracles.table_lm import LOG_P, REWARD, ROWS, TableTarget, codes, pi

LADDER = [0.0, 0.5, 1.0]


def state_at(rows: Tensor, ladder: list[float]) -> State:
    """Chains at the rows (G · K,) of the table, by number, with what p_θ said of them."""
    lam = torch.tensor(ladder, dtype=torch.float64).repeat(len(rows) // len(ladder))
    tokens, mask = torch.tensor(ROWS)[rows], torch.zeros(len(rows), len(ROWS[0]), dtype=torch.bool)
    read = TokenTerms(rows[:, None].float(), -rows[:, None].float())
    return State(
        tokens, mask, torch.from_numpy(LOG_P)[rows], torch.from_numpy(REWARD)[rows], lam, read
    )


def test_swap_probability_of_every_pair() -> None:
    """All 31² pairs of texts, 400 times each: ½ min(1, exp((λ_1 − λ_2)(r_2 − r_1))), half of the
    time there is no partner.

    7 standard errors an entry, false-alarm rate below 1e-8 for all 961.
    """
    n, m = 400, len(ROWS)
    pairs = torch.cartesian_prod(torch.arange(m), torch.arange(m)).repeat_interleave(n, 0)
    state = state_at(pairs.flatten(), [0.5, 2.0])
    new, info = swap_neighbours(state, 2, torch.Generator().manual_seed(0))
    swapped = info.accepted.reshape(-1, 2)
    assert torch.equal(swapped[:, 0], swapped[:, 1])
    got = swapped[:, 0].double().reshape(-1, n).mean(1).numpy()
    weight = np.exp(LOG_P + 0.5 * REWARD), np.exp(LOG_P + 2.0 * REWARD)
    # By the joint density π_1(a) π_2(b) before and after.
    ratio = np.outer(weight[0], weight[1]).T / np.outer(weight[0], weight[1])
    want = 0.5 * np.minimum(1, ratio).flatten()
    assert (np.abs(got - want) < 7 * np.sqrt(want * (1 - want) / n) + 1e-4).all()
    # Everything goes along but λ.
    source = torch.where(swapped[:, :1], pairs.flip(1), pairs).flatten()
    want_state = state_at(source, [0.5, 2.0])
    for field, expected in zip(new[:5], want_state[:5], strict=True):
        assert torch.equal(field, expected)
    assert new.read is not None
    assert want_state.read is not None
    assert torch.equal(new.read.log_p, want_state.read.log_p)
    assert torch.equal(new.read.log_goes_on, want_state.read.log_goes_on)


def test_every_rung_has_its_marginal() -> None:
    """4,000 groups, all from p_θ: total variation of each to π at its λ against that of exact
    draws.
    """
    target, n, rng = TableTarget(LADDER[-1]), 4000, np.random.default_rng(0)
    first = torch.from_numpy(rng.choice(len(ROWS), n * len(LADDER), p=pi(0.0)))
    suffix = EnsembleKernel(target, SuffixDrafts(target.lm))  # type: ignore[arg-type]
    kernel = Tempering(target, [suffix], LADDER)  # type: ignore[arg-type]
    state = kernel.init(torch.tensor(ROWS)[first])
    generator, swaps = torch.Generator().manual_seed(1), []
    for _ in range(20):
        state, info = kernel.step(state, generator)
        swaps.append(info.log_ratio.exp().clamp_max(1).mean())
    assert float(torch.stack(swaps).mean()) > 0.2
    for rung, lam in enumerate(LADDER):
        tokens = state.tokens[rung :: len(LADDER)]
        assert bool((state.lam[rung :: len(LADDER)] == lam).all())
        exact = rng.multinomial(n, pi(lam), size=50) / n
        floor = np.abs(exact - pi(lam)).sum(1) / 2
        counts = np.bincount(codes(tokens), minlength=len(ROWS))
        assert np.abs(pi(0.0) - pi(lam)).sum() / 2 >= 0.1 * lam
        assert np.abs(counts / n - pi(lam)).sum() / 2 < floor.mean() + 5 * floor.std(), lam
    np.testing.assert_allclose(state.reward.numpy(), REWARD[codes(state.tokens)])


class TwoModes:
    """A flat p over 4 tokens of 3 kinds; r falls with the distance from 0000 and from 1111,
    whichever is nearer.
    """

    lam = 6.0

    def terms(self, tokens: Tensor) -> Terms:
        away = torch.minimum((tokens != 0).sum(1), (tokens != 1).sum(1)).double()
        return Terms(torch.zeros_like(away), -away)


def test_a_mode_that_the_cold_chain_misses() -> None:
    """From 0000 with moves of one token, 300 chains, 150 steps: the way to 1111 leads over e^−12.
    Half belongs there.

    With tempering the share near 1111 is within 6 standard errors of ½ (2e-9), without it no chain
    gets there.
    """
    target, n, ladder = TwoModes(), 300, [0.0, 1.5, 3.0, 4.5, 6.0]
    embedding = TokenEmbedding(torch.eye(3))
    drafts = DenoiserDrafts(
        lambda z, t: torch.zeros(*t.shape, 3), embedding, make_schedule("cosine"), RandomTokens(1)
    )
    step = EnsembleKernel(target, drafts)  # type: ignore[arg-type]

    def near_the_other(tokens: Tensor) -> float:
        return float(((tokens == 1).sum(1) > (tokens == 0).sum(1)).double().mean())

    alone, generator = (
        step.init(torch.zeros(n, 4, dtype=torch.int64)),
        torch.Generator().manual_seed(0),
    )
    kernel = Tempering(target, [step], ladder)  # type: ignore[arg-type]
    state = kernel.init(torch.zeros(n * len(ladder), 4, dtype=torch.int64))
    for _ in range(150):
        alone, _ = step.step(alone, generator)
        state, _ = kernel.step(state, generator)
    assert near_the_other(alone.tokens) == 0
    cold = state.tokens[len(ladder) - 1 :: len(ladder)]
    assert abs(near_the_other(cold) - 0.5) < 6 * 0.5 / n**0.5


def test_impossible_rewards_are_not_swapped_into_nan() -> None:
    state = state_at(torch.tensor([0, 1, 2, 3]), [0.5, 2.0])
    state = state._replace(
        reward=torch.tensor([-torch.inf, -torch.inf, torch.nan, 0.0], dtype=torch.float64)
    )
    for seed in range(5):
        _, info = swap_neighbours(state, 2, torch.Generator().manual_seed(seed))
        assert not info.log_ratio.isnan().any()
        assert not info.accepted.any()


def test_arguments_are_checked() -> None:
    for ladder in ([], [-1.0, 2.0], [1.0, 1.0], [2.0, 1.0]):
        with pytest.raises(ValueError, match="ladder must rise"):
            Tempering(TableTarget(), [], ladder)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a multiple of the 3 rungs"):
        Tempering(TableTarget(), [], LADDER).init(torch.tensor(ROWS[:4]))  # type: ignore[arg-type]
