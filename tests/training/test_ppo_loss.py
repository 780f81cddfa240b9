"""The formulas of PPO and RLOO against loops, and against numbers worked out by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from dia_lightning.training.ppo_loss import (
    adapted_beta,
    clipped_loss,
    explained_variance,
    gae,
    leave_one_out,
    token_rewards,
    was_clipped,
    whiten,
)


def ragged(seed: int, prompts: bool = True) -> tuple[Tensor, Tensor]:
    """Noise (6, 5) and a mask of drawn tokens that begins after a prompt and ends early in some
    rows.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, generator=generator)
    first, last = torch.tensor([0, 1, 0, 2, 0, 4]) * prompts, torch.tensor([4, 3, 0, 2, 2, 4])
    place = torch.arange(5)
    return x, (place >= first[:, None]) & (place <= last[:, None])


def test_token_rewards_by_hand() -> None:
    """β 0.5; a prompt token, two drawn ones and nothing after the end; and a text of one token."""
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    log_ratio = torch.tensor([[9.0, 1.0, -2.0, 9.0], [4.0, 9.0, 9.0, 9.0]])
    found = token_rewards(torch.tensor([10.0, 3.0]), log_ratio, mask, 0.5)
    assert found.tolist() == [[0, -0.5, 11, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_gae_is_the_double_loop(gae_lambda: float) -> None:
    rewards, mask = ragged(0)
    values = ragged(1)[0]
    want = torch.zeros(6, 5)
    for b in range(6):
        drawn = [t for t in range(5) if mask[b, t]]
        for t in drawn:
            for s in drawn[drawn.index(t) :]:
                after = float(values[b, s + 1]) if s + 1 in drawn else 0.0
                want[b, t] += gae_lambda ** (s - t) * (
                    float(rewards[b, s]) + after - float(values[b, s])
                )
    torch.testing.assert_close(gae(rewards, values, mask, gae_lambda), want)


def test_gae_at_one_is_the_sum_of_what_follows_less_the_value() -> None:
    rewards, mask = ragged(0)
    values = ragged(1)[0]
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(gae(rewards, values, mask, 1.0), (to_come - values) * mask)


def test_the_clipped_loss_by_hand_and_its_gradient() -> None:
    """Ratios 0.5, 1, 1.1 and 2 at advantages 2 and −3, ε = 0.2: held where a step would go
    further out.
    """
    ratio = torch.tensor([0.5, 1.0, 1.1, 2.0] * 2)
    advantages = torch.tensor([2.0] * 4 + [-3.0] * 4)
    log_ratio = ratio.log().requires_grad_()
    loss = clipped_loss(log_ratio, advantages, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.0, -2.0, -2.2, -2.4, 2.4, 3.0, 3.3, 6.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    torch.testing.assert_close(gradient, torch.tensor([-1.0, -2.0, -2.2, 0.0, 0.0, 3.0, 3.3, 6.0]))
    assert (
        was_clipped(log_ratio, advantages, 0.2).tolist() == [False] * 3 + [True] * 2 + [False] * 3
    )


def test_the_controller_by_hand() -> None:
    """Target 5: at 6 nats e = 0.2; at 20 it is held at 0.2; at 5 nothing; at 4.5 e = −0.1; at 0
    held at −0.2.
    """
    found = [
        float(adapted_beta(torch.tensor(0.5), torch.tensor(kl), 5.0))
        for kl in (6.0, 20.0, 5.0, 4.5, 0.0)
    ]
    assert found == pytest.approx([0.51, 0.51, 0.5, 0.495, 0.49])


def test_leave_one_out_by_hand() -> None:
    """A group of three, 1, 2 and 6, and one of two, 5 and 1, mixed."""
    scores = torch.tensor([1.0, 5.0, 2.0, 1.0, 6.0])
    found = leave_one_out(scores, torch.tensor([0, 1, 0, 1, 0]))
    assert found.tolist() == [1 - 4, 5 - 1, 2 - 3.5, 1 - 5, 6 - 1.5]


def in_two_processes(f: Callable[[int, Callable[[Tensor], Tensor]], Tensor]) -> list[Tensor]:
    """f(rank, total) of two threads, `total` the sum over both."""
    barrier, shared = threading.Barrier(2, timeout=30), [torch.empty(0)] * 2

    def run(rank: int) -> Tensor:
        def total(x: Tensor) -> Tensor:
            shared[rank] = x
            barrier.wait()
            result = shared[0] + shared[1]
            barrier.wait()
            return result

        return f(rank, total)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def test_two_processes_whiten_as_one() -> None:
    x, mask = ragged(0)
    kept = x[mask].double()
    want = torch.zeros(6, 5).masked_scatter(
        mask, ((kept - kept.mean()) / kept.std(correction=0)).float()
    )
    torch.testing.assert_close(whiten(x, mask, lambda y: y), want)
    found = in_two_processes(lambda rank, total: whiten(x[rank::2], mask[rank::2], total))
    torch.testing.assert_close(torch.stack(found, 1).flatten(0, 1), want)


def test_two_processes_explain_as_one() -> None:
    target, mask = ragged(0)
    estimate = 0.7 * target + 0.5 * ragged(1)[0] + 3
    kept, error = target[mask].double(), (target - estimate)[mask].double()
    want = float(1 - error.var() / kept.var())
    assert float(explained_variance(target, estimate, mask, lambda y: y)) == pytest.approx(want)
    found = in_two_processes(
        lambda rank, total: explained_variance(
            target[rank::2], estimate[rank::2], mask[rank::2], total
        )
    )
    assert [float(x) for x in found] == pytest.approx([want, want])
    assert explained_variance(torch.ones(6, 5), estimate, mask, lambda y: y).isnan()
