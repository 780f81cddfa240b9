"""Checks for your own rewards, targets, moves and samplers, on a model whose every text can be
listed.
"""

from dia_lightning.rewards import check_reward
from dia_lightning.testing.kernel import check_kernel
from dia_lightning.testing.law import exact_law
from dia_lightning.testing.sampler import check_sampler
from dia_lightning.testing.table import TableLM, TableReward, table_lm
from dia_lightning.testing.target import check_target

__all__ = [
    "TableLM", "TableReward", "check_kernel", "check_reward", "check_sampler", "check_target",
    "exact_law", "table_lm",
]  # fmt: skip
