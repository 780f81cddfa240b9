"""Diagnostics against closed forms."""

import math

import pytest
import torch

from dia_lightning.sampling.diagnostics import by_prompt, chain_diagnostics


def autoregressive(rho: float, steps: int, chains: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(chains, generator=generator)]
    for _ in range(steps - 1):
        x.append(rho * x[-1] + (1 - rho**2) ** 0.5 * torch.randn(chains, generator=generator))
    return torch.stack(x)


def test_autocorrelation_time_of_an_autoregressive_chain() -> None:
    """τ = (1 + ρ) / (1 − ρ) = 4 for ρ = 0.6; 64 chains of 500 steps estimate it to about 3 %."""
    got = chain_diagnostics(autoregressive(0.6, 500, 64))
    assert abs(got["autocorrelation"] - 4) < 0.4
    assert abs(got["rhat"] - 1) < 0.01
    assert abs(got["ess"] - 500 * 64 / 4) < 0.1 * 500 * 64 / 4


def test_chains_that_do_not_mix_show() -> None:
    stuck = autoregressive(0.0, 50, 8) * 0.1 + torch.arange(8.0)
    assert chain_diagnostics(stuck)["rhat"] > 2


def test_each_prompt_is_looked_at_alone() -> None:
    values = autoregressive(0.0, 40, 8)
    values[:, ::2] += 100
    got = by_prompt(["a", "b"] * 4, {"reward": values})
    assert (got["rhat_reward"] < 1.1).all()
    want = chain_diagnostics(values[:, ::2])["ess"]
    assert float(got["ess_reward"][::2].sum()) == pytest.approx(want)


def test_too_short_to_tell() -> None:
    assert (
        chain_diagnostics(torch.zeros(3, 5))["rhat"] != chain_diagnostics(torch.zeros(3, 5))["rhat"]
    )


def test_chains_of_one_value_have_no_diagnostics(recwarn: pytest.WarningsRecorder) -> None:
    found = chain_diagnostics(torch.zeros(8, 4, dtype=torch.float64))
    assert all(math.isnan(value) for value in found.values())
    assert not recwarn.list
