"""Noise times, noised rows and the warp, in plain loops and by NumPy."""

import numpy as np
import pytest
import torch

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.loss import draw_times, noise, warp_knots
from dia_lightning.diffusion.schedule import make_schedule

KINDS = ["all", "prefix", "scattered", "span", "staggered"]
KNOTS = torch.linspace(0, 1, 65) ** 1.7


@pytest.mark.parametrize(("n", "length"), [(4000, 12), (501, 7), (500, 3), (500, 2), (500, 1)])
def test_training_times_row_by_row(n: int, length: int) -> None:
    """Each row by its kind: one level for all, behind a prefix, at random places, in a span,
    rising to the right.
    """
    schedule, generator = make_schedule("cosine"), torch.Generator().manual_seed(2)
    schedule.set_warp(KNOTS)
    got = draw_times(n, length, schedule, torch.Generator().manual_seed(2)).double()
    offset = float(torch.rand(1, generator=generator))
    order = torch.randperm(n, generator=generator).tolist()
    kinds, shares = (torch.rand(n, generator=generator).tolist() for _ in range(2))
    scatter = torch.rand(n, max(3, length), generator=generator).tolist()
    seen, want, places = set(), [], np.linspace(0, 1, length) if length > 1 else [1.0]
    for row, kind, share, draws in zip(order, kinds, shares, scatter, strict=True):
        u = (row + offset) / n
        name = ["all", "prefix", "scattered", "span", "staggered"][
            int(np.searchsorted([0.15, 0.25, 0.35, 0.65], kind, "right"))
        ]
        seen.add(name)
        levels = [u] * length
        if name == "prefix":
            levels = [0.0 if j / length < share else u for j in range(length)]
        elif name == "scattered":
            levels = [0.0 if draws[j] < share else u for j in range(length)]
        elif name == "span":
            width, begin = length**share / length, 0.75 * draws[1]
            known = begin + max(0.0, 2 * draws[2] - 1) * width
            u = 1.0 if draws[0] < 0.5 else u
            levels = [u if known <= j / length < begin + width else 0.0 for j in range(length)]
        elif name == "staggered":
            ahead = length**share
            levels = [min(1.0, max(0.0, (1 + ahead) * u - ahead * (1 - place))) for place in places]
        want.append(np.interp(levels, np.linspace(0, 1, 65), KNOTS.numpy()))
    np.testing.assert_allclose(got, np.array(want), atol=2e-5)
    assert seen == set(KINDS)


def test_noised_rows_by_hand() -> None:
    """z = α E(x) + σ ε where t > 0; the ends of the rows of even number are clean."""
    embedding, schedule = TokenEmbedding(torch.randn(5, 4)), make_schedule("cosine")
    tokens = torch.tensor([[1, 2, 4, 4], [3, 4, 4, 4], [0, 1, 4, 4]])
    ends = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    times = torch.tensor([[0.0, 0.3, 0.6, 0.9], [1.0, 0.5, 0.2, 0.7], [0.4, 0.0, 0.1, 1.0]])
    eps = torch.randn(3, 4, 4)
    z, t, noised = noise(tokens, times, ends, torch.tensor([6, 7, 8]), embedding, schedule, eps)
    for b in range(3):
        for i in range(4):
            level = 0.0 if ends[b, i] and b != 1 else float(times[b, i])
            assert float(t[b, i]) == pytest.approx(level)
            assert bool(noised[b, i]) == (level > 0)
            at = torch.tensor(level)
            clean = embedding.weight[tokens[b, i]]
            want = schedule.alpha(at) * clean + schedule.sigma(at) * eps[b, i] if level else clean
            torch.testing.assert_close(z[b, i], want)


@pytest.mark.parametrize("floor", [None, 0.05, 0.7])
@pytest.mark.parametrize("n_knots", [8, 64])
def test_warp_knots_by_interpolation(n_knots: int, floor: float | None) -> None:
    """The inverse of a piecewise linear distribution function: a fifth of u evenly unless told,
    the rest as the loss rises.
    """
    t = torch.tensor([0.1, 0.3, 0.4, 0.8])
    loss = torch.tensor([0.5, 0.2, 1.5, 2.5])
    even = 0.2 if floor is None else floor
    edges = np.array([0, 0.2, 0.35, 0.6, 1])
    # Where the loss falls, the highest so far counts.
    level = np.array([0, (0.5 + 0.5) / 2, (0.5 + 1.5) / 2, (1.5 + 2.5) / 2, 2.5])
    share = (1 - even) * level / 2.5 + even * edges
    want = np.interp(np.linspace(0, 1, n_knots + 1), share, edges)
    got = warp_knots(t, loss, n_knots, **({} if floor is None else {"floor": floor}))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert (got[0], got[-1]) == (0, 1)
