"""Diagnostics and the laws of kernels and targets at their limits: one row, one chain, a hair of
tolerance too many.
"""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.guidance import Prediction, Watched
from dia_lightning.numerics import NotFinite
from dia_lightning.sampling.diagnostics import (
    by_prompt,
    chain_diagnostics,
)
from dia_lightning.sampling.particles import POTENTIALS, Steering, doubling, paths, smc
from dia_lightning.sampling.state import State
from dia_lightning.target import Terms
from dia_lightning.testing import check_kernel, check_target
from dia_lightning.testing.kernel import KernelError
from dia_lightning.testing.target import TargetError
from tests.oracles.scripted import Scripted, chains

F64 = torch.float64


def test_the_fewest_chains_and_steps_with_diagnostics() -> None:
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    for steps, n in ((3, 5), (6, 1), (0, 5)):
        assert all(math.isnan(x) for x in chain_diagnostics(values[:steps, :n]).values())
    for steps, n in ((4, 2), (4, 5), (6, 2)):
        found = chain_diagnostics(values[:steps, :n])
        assert not any(math.isnan(x) for x in found.values())
        assert found["autocorrelation"] == pytest.approx(steps * n / found["ess"])
    assert all(math.isnan(x) for x in chain_diagnostics(torch.ones(6, 5)).values())
    shared = by_prompt(["a", "b", "a", "a", "b"], {"r": values})
    own = chain_diagnostics(values[:, [0, 2, 3]])
    assert shared["ess_r"][[0, 2, 3]].tolist() == pytest.approx([own["ess"] / 3] * 3)
    assert shared["rhat_r"][[0, 2, 3]].tolist() == pytest.approx([own["rhat"]] * 3)


def many(n: int = 100) -> State:
    return chains([0.0] * n, torch.tensor([[0, 0]]).repeat(n, 1))


def shifted(field: str, by: Tensor | float) -> Any:
    return lambda state: state._replace(**{field: getattr(state, field) + by})


def test_laws_of_kernels_at_their_limits() -> None:
    """Tolerance 1e-3 of the cache; 5 standard errors of the mean change; 100 chains; 5 steps
    unless told.
    """
    g = torch.Generator()
    right = Scripted()
    check_kernel(right, many(), g)
    assert right.steps == 5
    with pytest.raises(ValueError, match="at least 100 chains are needed, got 99"):
        check_kernel(right, many(99), g)
    with pytest.raises(KernelError, match="law 'no NaN'"):
        check_kernel(Scripted(log_ratio=math.nan), many(), g)
    check_kernel(Scripted(log_ratio=-math.inf), many(), g)
    spread = torch.cat([torch.ones(50, dtype=F64), -torch.ones(50, dtype=F64)])
    error = float(spread.std()) / 10
    for field, name in (("log_base", "log p"), ("reward", "reward")):
        # In units far below the cache's tolerance.
        for errors, passes in ((4.9, True), (5.1, False), (-5.1, False)):
            kernel = Scripted(shifted(field, 1e-5 * (spread + errors * error)))
            if passes:
                check_kernel(kernel, many(), g, steps=1)
                continue
            with pytest.raises(
                KernelError, match=f"law 'invariance': the mean of {name} went from 0.0000 to"
            ):
                check_kernel(kernel, many(), g, steps=1)
        check_kernel(
            Scripted(shifted(field, 1e-5 * (spread + 5.1 * error))), many(), g, 1, n_errors=5.2
        )
        for off, passes in ((0.9e-3, True), (1.1e-3, False)):
            kernel = Scripted(shifted(field, spread * off))
            if passes:
                check_kernel(kernel, many(), g, steps=1)
            else:
                with pytest.raises(KernelError, match="law 'cache': "):
                    check_kernel(kernel, many(), g, steps=1)
    # A change that is the same in all chains has no spread: anything above rounding counts.
    check_kernel(Scripted(shifted("reward", 4.9e-9)), many(), g, steps=1)
    with pytest.raises(KernelError, match="law 'invariance'"):
        check_kernel(Scripted(shifted("reward", 5.1e-9)), many(), g, steps=1)


def test_the_cache_is_held_to_its_size() -> None:
    """Of terms near 100, 1e-4 of them more than the 1e-3 of small ones."""

    class Large(Scripted):
        def terms(self, tokens: Tensor) -> Terms:
            return Terms(
                torch.full((len(tokens),), -100.0, dtype=F64),
                torch.full((len(tokens),), 100.0, dtype=F64),
            )

    spread = torch.cat([torch.ones(50, dtype=F64), -torch.ones(50, dtype=F64)])
    state = many()._replace(
        reward=torch.full((100,), 100.0, dtype=F64), log_base=torch.full((100,), -100.0, dtype=F64)
    )
    for field in ("log_base", "reward"):
        check_kernel(Large(shifted(field, 0.0105 * spread)), state, torch.Generator(), steps=1)
        with pytest.raises(
            KernelError, match=f"law 'cache': {field} differs from the target's own by 0.0115"
        ):
            check_kernel(Large(shifted(field, 0.0115 * spread)), state, torch.Generator(), steps=1)


def test_laws_of_tokens() -> None:
    """A token that is added shows in the number of distinct ones, an exchange of places does
    not.
    """
    g, one = torch.Generator(), torch.tensor([0, 1])
    with pytest.raises(KernelError, match="the mean of the number of distinct tokens"):
        check_kernel(Scripted(shifted("tokens", one)), many(), g, steps=1)
    turned = many()._replace(tokens=one.repeat(100, 1))
    check_kernel(Scripted(lambda s: s._replace(tokens=s.tokens.flip(1))), turned, g, steps=1)
    kernel = Scripted(lambda s: s._replace(tokens=s.tokens.flip(1)), [[True] * 99 + [False]])
    with pytest.raises(KernelError, match="law 'rejected means unchanged'"):
        check_kernel(kernel, turned, g, steps=1)
    fixed = turned._replace(prompt_mask=torch.tensor([[False, True]] + [[False, False]] * 99))
    with pytest.raises(KernelError, match="law 'prompts stay'"):
        check_kernel(Scripted(lambda s: s._replace(tokens=s.tokens.flip(1))), fixed, g, steps=1)


def test_laws_of_targets_at_their_limits() -> None:
    """One row is enough to break a law; a batch may differ from single rows by 1e-3."""
    tokens = torch.tensor([[1, 2], [0, 4], [3, 3]])

    class Target:
        def __init__(self, log_prob: Any) -> None:
            self.log_prob = log_prob

    def alone(off: float) -> Any:
        return lambda x: x.double().sum(1) + off * (len(x) == 1) * (x[:, 0] == 3)

    check_target(Target(alone(0.9e-3)), tokens)
    check_target(Target(alone(0.05)), tokens, atol=0.1)
    check_target(Target(alone(0.5)), tokens, atol=0.5)
    with pytest.raises(TargetError, match=r"law 'batch = one by one': .* for row 2: "):
        check_target(Target(alone(1.1e-3)), tokens)
    asked: list[int] = []

    def moody(x: Tensor) -> Tensor:
        asked.append(1)
        return x.double().sum(1) + 1e-6 * len(asked) * (x[:, 0] == 0)

    with pytest.raises(TargetError, match=r"law 'deterministic': .* for row 1: "):
        check_target(Target(moody), tokens)
    for value in (math.nan, math.inf):
        with pytest.raises(TargetError, match=r"law 'finite or −inf': .* for row 1: "):
            check_target(
                Target(lambda x, value=value: torch.where(x[:, 0] == 0, value, 0.0)), tokens
            )
    for dtype in (torch.float16, torch.int64):
        with pytest.raises(TargetError, match="law 'shape'"):
            check_target(Target(lambda x, dtype=dtype: x.sum(1).to(dtype)), tokens)
    with pytest.raises(TargetError, match="law 'shape'"):
        check_target(Target(lambda x: x.float()), tokens)


# Potentials.


@pytest.mark.parametrize("values", [[-2.0, -1.0, -3.0], [0.5, -1.0, 2.0], [1.0, 3.0, 2.0]])
def test_potentials_by_hand(values: list[float]) -> None:
    """Logs of the products of exp(v), exp(max v), exp(Σ v) so far; of `difference` and `das` the
    last value is left.
    """
    products = {
        "difference": values,
        "das": values,
        "max": [sum(max(values[: j + 1]) for j in range(k + 1)) for k in range(3)],
        "sum": [sum(sum(values[: j + 1]) for j in range(k + 1)) for k in range(3)],
    }
    assert set(products) == set(POTENTIALS)
    for name, want in products.items():
        log_g, memory = (
            torch.zeros(1, dtype=F64),
            torch.full((1,), POTENTIALS[name].start, dtype=F64),
        )
        for value, product in zip(values, want, strict=True):
            log_g, memory = POTENTIALS[name].update(log_g, memory, torch.tensor([value], dtype=F64))
            assert log_g.item() == pytest.approx(product)
        assert POTENTIALS[name].tempered == (name == "das")
    assert [doubling(x) for x in (0, 0.5, 1)] == pytest.approx([0, 2**0.5 - 1, 1])
    plain = Steering(len, None, 1.0)  # type: ignore[arg-type]
    assert (plain.potential, plain.every, plain.ess, plain.resampling) == (
        "difference",
        1,
        0.5,
        "systematic",
    )
    assert plain.tempering is doubling


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_a_position_that_has_arrived_stays(lam: float) -> None:
    """Whatever the network says of it: 3 of 5 places arrive in different steps, one is given,
    and none moves again.
    """
    embedding, schedule = TokenEmbedding(torch.randn(6, 4)), make_schedule("cosine")
    times = torch.tensor(
        [[0, 1, 1, 1, 1], [0, 0, 0.5, 0.8, 0.9], [0, 0, 0, 0.3, 0.6], [0, 0, 0, 0, 0.2], [0.0] * 5]
    )
    z0, logits = torch.zeros(60, 5, 4), torch.zeros(60, 5, 6)

    def predict(z: Tensor, t: Tensor, z0_prev: Tensor | None) -> Prediction:
        return Prediction(z0, z0, logits, logits + 1e-3)

    steering = Steering(lambda tokens: tokens.double().sum(1), None, lam, ess=0.0)
    start, generator = torch.randn(60, 5, 4), torch.Generator().manual_seed(0)
    found = smc(predict, schedule, start, times, generator, steering, embedding, keep=True)
    assert found.positions is not None
    for k, (t, s) in enumerate(pairwise(times)):
        before, after = found.positions[k], found.positions[k + 1]
        assert torch.equal(after[:, t == s], before[:, t == s])
        assert bool((after[:, t > s] != before[:, t > s]).any(2).all())
        arrived = after[:, (t > 0) & (s == 0)]
        assert torch.equal(embedding(embedding.decode(arrived)), arrived)
    with pytest.raises(ValueError, match=r"^paths: the positions were not kept"):
        paths(found._replace(positions=None), torch.zeros(1, dtype=torch.int64))
    assert paths(found, torch.tensor([7])).shape == (5, 1, 5, 4)
    assert (
        found.log_w.dtype == found.log_z.dtype == found.reward.dtype == found.trace.ess.dtype == F64
    )


@pytest.mark.parametrize("wrong", [1, 2, 5])
def test_the_call_that_lost_it_is_named(wrong: int) -> None:
    """And the rows, of either estimate; calls before and after it do not matter."""
    calls: list[int] = []

    def predict(z: Tensor, t: Tensor, z0_prev: Tensor | None) -> Prediction:
        calls.append(1)
        z0 = z.clone()
        z0[1, 0, 0] = math.nan if len(calls) >= wrong else 0.0
        return Prediction(z0, z, z)

    watched, z = Watched(predict), torch.zeros(3, 2, 2)
    for _ in range(wrong - 1):
        watched(z, z[..., 0], None)
    watched.check()
    for _ in range(2):
        watched(z, z[..., 0], None)
    with pytest.raises(
        NotFinite, match=rf"the guided estimate .* in the denoiser's call {wrong}, row 1 of 3"
    ):
        watched.check()
