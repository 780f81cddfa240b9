"""Schedules: laws that hold for all, the warp and its inverse, staggered times."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dia_lightning.diffusion.convert import eps_from_z0, score_from_z0, z0_from_eps
from dia_lightning.diffusion.loss import warp_knots
from dia_lightning.diffusion.schedule import SCHEDULES, make_schedule, staggered, time_grid
from dia_lightning.errors import UserError

T = torch.linspace(0, 1, 101)


@pytest.mark.parametrize("name", SCHEDULES)
def test_marginals(name: str) -> None:
    schedule = make_schedule(name)
    alpha, sigma = schedule.alpha(T), schedule.sigma(T)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(101))
    assert alpha[0] == 1
    assert 0 < alpha[-1] < 0.01
    assert bool((alpha.diff() < 0).all())


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_compose_to_the_marginal(name: str) -> None:
    """z_t = α_{t|s} z_s + σ_{t|s} ε has the marginal α_t, σ_t, for every pair s ≤ t."""
    schedule = make_schedule(name)
    s, t = T[:-1], T[1:]
    torch.testing.assert_close(schedule.alpha_step(t, s) * schedule.alpha(s), schedule.alpha(t))
    variance = schedule.alpha_step(t, s) ** 2 * schedule.sigma(s) ** 2 + schedule.var_step(t, s)
    torch.testing.assert_close(variance, schedule.sigma(t) ** 2)


def test_known_values() -> None:
    half = torch.tensor([0.5])
    assert abs(float(make_schedule("cosine").alpha(half)) - 0.5**0.5) < 2e-3
    assert abs(float(make_schedule("sqrt").alpha(half)) - (1 - 0.5**0.5) ** 0.5) < 1e-5
    assert (
        abs(float(make_schedule("linear").alpha(half)) - 0.2811829) < 1e-5
    )  # exp(−19.9/16 − 0.025)


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(UserError, match=r"schedule: 'cosin' given, allowed: cosine, sqrt, linear"):
        make_schedule("cosin")


@given(st.lists(st.floats(0.01, 5), min_size=64, max_size=64))
def test_warp_has_its_inverse(increments: list[float]) -> None:
    schedule = make_schedule("cosine")
    knots = torch.cat([torch.zeros(1), torch.tensor(increments).cumsum(0)])
    knots = knots / knots[-1]
    schedule.set_warp(knots)
    u = torch.linspace(0, 1, 333)
    assert bool((schedule.warp(u).diff() > 0).all())
    torch.testing.assert_close(schedule.unwarp(schedule.warp(u)), u, atol=2e-4, rtol=0)
    assert schedule.warp(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]


def test_a_warp_that_does_not_rise_is_refused() -> None:
    with pytest.raises(ValueError, match="rise strictly"):
        make_schedule("cosine").set_warp(torch.tensor([0.0, 0.5, 0.5, 1.0]))


def test_warp_spends_u_where_the_loss_rises() -> None:
    """Loss 0 below t = 0.6, rising to 1 at 0.9, then flat: without a floor all of u lies in the
    rise.
    """
    t = (torch.arange(100) + 0.5) / 100
    loss = ((t - 0.6) / 0.3).clamp(0, 1)
    knots = warp_knots(t, loss, 64, floor=0.0001)
    assert knots[1] > 0.55
    assert 0.74 < knots[32] < 0.76
    assert knots[62] < 0.91
    even = warp_knots(t, loss, 64, floor=1.0)
    torch.testing.assert_close(even, torch.linspace(0, 1, 65), atol=1e-5, rtol=0)


def test_staggered_times() -> None:
    u = torch.linspace(0, 1, 21)
    together = staggered(u, 7, torch.zeros(21))
    torch.testing.assert_close(together, u[:, None].expand(21, 7))
    apart = staggered(u, 7, torch.full((21,), 3.0))
    assert apart[0].tolist() == [0.0] * 7
    assert apart[-1].tolist() == [1.0] * 7
    assert bool((apart.diff(dim=1) >= 0).all())
    assert bool((apart.diff(dim=0) >= 0).all())
    one_by_one = staggered(torch.linspace(0, 1, 9), 8, torch.full((9,), 1e6))
    assert ((one_by_one > 0) & (one_by_one < 1)).sum(1).max() <= 1


def test_time_grid_falls_from_noise_to_clean() -> None:
    grid = time_grid(make_schedule("cosine"), 10, 5, 2.0)
    assert grid.shape == (11, 5)
    assert grid[0].tolist() == [1.0] * 5
    assert grid[-1].tolist() == [0.0] * 5
    assert bool((grid.diff(dim=0) <= 0).all())


def test_conversions_have_inverses() -> None:
    generator = torch.Generator().manual_seed(0)
    z, z0, alpha = (
        torch.randn(4, 3, generator=generator),
        torch.randn(4, 3, generator=generator),
        torch.full((4, 1), 0.6),
    )
    sigma = (1 - alpha**2).sqrt()
    torch.testing.assert_close(z0_from_eps(z, eps_from_z0(z, z0, alpha, sigma), alpha, sigma), z0)
    torch.testing.assert_close(
        score_from_z0(z, z0, alpha, sigma), -eps_from_z0(z, z0, alpha, sigma) / sigma
    )
