"""`check_target` on right and wrong targets."""

import pytest
import torch
from torch import Tensor

from dia_lightning.target import TargetDensity, Terms
from dia_lightning.testing import TableReward, check_target, table_lm
from dia_lightning.testing.target import TargetError


def test_check_target_names_the_broken_law() -> None:
    tokens = torch.tensor([[1, 2], [0, 4], [3, 3]])

    def target(function: object) -> object:
        return type("T", (), {"log_prob": staticmethod(function)})()

    broken = {
        "shape": lambda x: x.float(),
        "finite or −inf": lambda x: x.float().sum(1) / 0 * 0,
        "deterministic": lambda x: torch.rand(len(x)),
        "batch = one by one": lambda x: x.float().sum(1) / len(x),
        "tokens unchanged": lambda x: x.mul_(2).float().sum(1),
    }
    for law, function in broken.items():
        with pytest.raises(TargetError, match=law):
            check_target(target(function), tokens.clone())
    check_target(target(lambda x: torch.where(x[:, 0] == 0, -torch.inf, -1.0)), tokens)
    check_target(target(lambda x: -x.float().sum(1)), tokens)


class WrongSign(TargetDensity):
    def log_prob(self, tokens: Tensor) -> Tensor:
        log_base, reward = self.terms(tokens)
        return log_base - self.lam * reward


class NoLam(TargetDensity):
    def log_prob(self, tokens: Tensor) -> Tensor:
        return super().log_prob(tokens) / self.lam


class OldReward(TargetDensity):
    """`terms` keeps the first rewards that it gave."""

    first: Terms | None = None

    def terms(self, tokens: Tensor) -> Terms:
        now = super().terms(tokens)
        self.first = self.first or now
        return now._replace(reward=self.first.reward[: len(tokens)])


@pytest.mark.parametrize(
    ("wrong", "law"), [(WrongSign, "terms"), (NoLam, "terms"), (OldReward, "batch = one by one")]
)
def test_a_target_whose_parts_disagree(wrong: type[TargetDensity], law: str) -> None:
    lm = table_lm()
    check_target(TargetDensity(lm, TableReward(lm), 1.5), lm.rows)
    with pytest.raises(TargetError, match=law):
        check_target(wrong(lm, TableReward(lm), 1.5), lm.rows)
