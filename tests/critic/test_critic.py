"""What each objective converges to, against the closed form."""

import torch

from dia_lightning.critic.loss import OBJECTIVES
from dia_lightning.critic.network import CriticNetwork
from dia_lightning.diffusion.denoiser import NetworkSize
from dia_lightning.diffusion.schedule import make_schedule

REWARD, PROBS = torch.tensor([-1.0, 0.2, 2.0]), torch.tensor([0.5, 0.3, 0.2])


def minimiser(objective: str, lam: float) -> float:
    """The constant h that minimises the expected loss, by a fine grid."""
    grid = torch.linspace(-4, 6, 20_001)
    losses = OBJECTIVES[objective](grid[:, None].expand(-1, 3), REWARD.expand(len(grid), 3), lam) @ PROBS
    return float(grid[losses.argmin()])


def test_mse_finds_the_mean() -> None:
    assert abs(minimiser("mse", 1.0) - float(REWARD @ PROBS)) < 1e-3


def test_soft_finds_the_log_mean_exp() -> None:
    for lam in (0.5, 1.0, 2.5):
        assert abs(minimiser("soft", lam) - float(torch.log(PROBS @ torch.exp(lam * REWARD)))) < 1e-3


def test_value_is_in_the_units_of_the_reward() -> None:
    torch.manual_seed(0)
    critic = CriticNetwork(6, make_schedule("cosine"), NetworkSize(8, 1, 2, 5))
    z, t = torch.randn(3, 5, 6), torch.full((3, 5), 0.5)
    plain = critic(z, t)
    critic.mean.fill_(2.0)
    critic.scale.fill_(3.0)
    torch.testing.assert_close(critic(z, t), 2 + 3 * plain)
