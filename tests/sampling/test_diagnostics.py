"""Diagnostics against closed forms, and `check_kernel` on right and wrong kernels."""

import math

import pytest
import torch

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import Keyword
from dia_lightning.sampling.denoise_accept import DenoiseAcceptKernel, Info, State
from dia_lightning.sampling.diagnostics import (
    KernelError,
    by_prompt,
    chain_diagnostics,
    check_kernel,
)
from dia_lightning.sampling.positions import Spans
from dia_lightning.sampling.suffix import SuffixRegeneration
from dia_lightning.target import TargetDensity


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


@pytest.fixture
def suffix(lm: BaseLM) -> SuffixRegeneration:
    return SuffixRegeneration(TargetDensity(lm, Keyword(["good", "food", "e"]), 0.0))


def draws(lm: BaseLM, n: int) -> torch.Tensor:
    empty = torch.full((n, 8), lm.end_id)
    return lm.generate(
        empty, torch.zeros_like(empty, dtype=torch.bool), torch.Generator().manual_seed(0)
    )


def test_right_kernels_pass(
    lm: BaseLM, embedding: TokenEmbedding, suffix: SuffixRegeneration
) -> None:
    """2,000 exact draws; a right kernel fails with probability 6e-6."""
    tokens, generator = draws(lm, 2000), torch.Generator().manual_seed(1)
    check_kernel(suffix, suffix.init(tokens), generator)
    table = embedding.weight.T

    def proposal(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return z @ table * 0.3

    schedule = make_schedule("cosine")
    kernel = DenoiseAcceptKernel(
        suffix.target, proposal, embedding, schedule, Spans(2), (0.5, 0.8), 2, lm.end_id
    )
    state = kernel.init(tokens)
    check_kernel(kernel, state, generator, steps=3)
    new, info = kernel.step(state, generator)
    assert 0.02 < float(info.accepted.double().mean()) < 1
    assert bool((new.tokens != tokens).any())


def test_wrong_kernels_are_named(lm: BaseLM, suffix: SuffixRegeneration) -> None:
    class Forgets(SuffixRegeneration):
        def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
            new, info = super().step(state, generator)
            return new._replace(log_base=state.log_base), info

    class Lies(SuffixRegeneration):
        def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
            new, info = super().step(state, generator)
            return new, info._replace(accepted=torch.zeros_like(info.accepted))

    class Drifts(SuffixRegeneration):
        def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
            new, info = super().step(state, generator)
            worse = new.log_base < state.log_base
            rows = [
                torch.where(worse.reshape(-1, *[1] * (a.ndim - 1)), b, a)
                for a, b in zip(new[:5], state[:5], strict=True)
            ]
            return State(*rows), info._replace(accepted=info.accepted & ~worse)

    tokens, generator = draws(lm, 2000), torch.Generator().manual_seed(1)
    for wrong, law in (
        (Forgets, "cache"),
        (Lies, "rejected means unchanged"),
        (Drifts, "invariance"),
    ):
        kernel = wrong(suffix.target)
        with pytest.raises(KernelError, match=law):
            check_kernel(kernel, kernel.init(tokens), generator)
    with pytest.raises(ValueError, match="100 chains"):
        check_kernel(suffix, suffix.init(tokens[:50]), generator)


def test_chains_of_one_value_have_no_diagnostics(recwarn: pytest.WarningsRecorder) -> None:
    found = chain_diagnostics(torch.zeros(8, 4, dtype=torch.float64))
    assert all(math.isnan(value) for value in found.values())
    assert not recwarn.list
