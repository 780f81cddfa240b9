"""Suffix regeneration on a model small enough to enumerate."""

import numpy as np
import pytest
import torch

from dia_lightning.sampling.drafts import SuffixDrafts
from dia_lightning.sampling.ensemble import EnsembleKernel
from tests.oracles.table_lm import END, LAM, LM, LOG_P, REWARD, ROWS, T, TableTarget, codes, pi


def test_pi_is_left_invariant() -> None:
    """8,000 exact draws and one move: (x, x') as frequent as (x', x), false-alarm rate 1e-3."""
    assert abs(np.exp(LOG_P).sum() - 1) < 1e-12
    n = 8000
    drawn = np.random.default_rng(0).choice(len(ROWS), n, p=pi())
    kernel = EnsembleKernel(TableTarget(), SuffixDrafts(LM))  # type: ignore[arg-type]
    state, info = kernel.step(
        kernel.init(torch.tensor(ROWS)[drawn]), torch.Generator().manual_seed(0)
    )
    after = codes(state.tokens)
    assert 0.2 < info.accepted.double().mean() < 0.95
    pairs = np.zeros((len(ROWS), len(ROWS)))
    np.add.at(pairs, (drawn, after), 1)
    upper = np.triu((pairs + pairs.T) >= 10, 1)
    chi2, df = ((pairs - pairs.T)[upper] ** 2 / (pairs + pairs.T)[upper]).sum(), upper.sum()
    assert df > 10
    assert chi2 < df * (1 - 2 / (9 * df) + 3.09 * (2 / (9 * df)) ** 0.5) ** 3
    torch.testing.assert_close(state.log_prob, torch.tensor(LOG_P[after] + LAM * REWARD[after]))


def test_without_reward_only_the_length_matters() -> None:
    """At λ = 0 the ratio is n(x) / n(x'), the numbers of places to cut."""
    kernel = EnsembleKernel(TableTarget(), SuffixDrafts(LM))  # type: ignore[arg-type]
    tokens = torch.tensor([[0, 1, END, END]]).repeat(400, 1)
    state = kernel.init(tokens, lam=torch.zeros(400, dtype=torch.float64))
    new, info = kernel.step(state, torch.Generator().manual_seed(1))
    n_new = torch.where((new.tokens == END).any(1), (new.tokens == END).int().argmax(1) + 1, T)
    moved = info.accepted
    want = (3 / n_new[moved].double()).log()
    torch.testing.assert_close(info.log_ratio[moved], want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_prompt", [1, 2])
def test_places_to_cut_lie_behind_the_prompt(n_prompt: int) -> None:
    kernel = EnsembleKernel(TableTarget(), SuffixDrafts(LM))  # type: ignore[arg-type]
    tokens = torch.tensor([[0, 1, END, END]]).repeat(2000, 1)
    state = kernel.init(
        tokens, torch.arange(T).expand(2000, -1) < n_prompt, torch.zeros(2000, dtype=torch.float64)
    )
    new, info = kernel.step(state, torch.Generator().manual_seed(1))
    assert torch.equal(new.tokens[:, :n_prompt], tokens[:, :n_prompt])
    n_new = (
        torch.where((new.tokens == END).any(1), (new.tokens == END).int().argmax(1) + 1, T)
        - n_prompt
    )
    moved = info.accepted & (new.tokens != tokens).any(1)
    assert bool(moved.any())
    want = ((3 - n_prompt) / n_new[moved].double()).log()
    torch.testing.assert_close(info.log_ratio[moved], want, atol=1e-6, rtol=0)
    # The last place before the end is cut too, and the first behind the prompt.
    first = (new.tokens[:, n_prompt] != tokens[:, n_prompt]).double().mean()
    assert 0 < float(first) < 1
