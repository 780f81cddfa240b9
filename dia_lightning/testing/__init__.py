"""Checks for your own rewards, targets, moves and samplers, on a model whose every text can be
listed.
"""

from dia_lightning.rewards import RewardError, check_reward
from dia_lightning.testing.kernel import KernelError, check_kernel
from dia_lightning.testing.law import Law, exact_law
from dia_lightning.testing.sampler import SamplerError, check_sampler
from dia_lightning.testing.table import TableLM, TableReward, table_lm
from dia_lightning.testing.target import TargetError, check_target

__all__ = [
    "KernelError", "Law", "RewardError", "SamplerError", "TableLM", "TableReward", "TargetError",
    "check_kernel", "check_reward", "check_sampler", "check_target", "exact_law", "table_lm",
]  # fmt: skip
