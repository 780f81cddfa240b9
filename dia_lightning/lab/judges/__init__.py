"""Evaluation of a task: judges, references and reward hacking."""

from dia_lightning.lab.judges.evaluation import Evaluation
from dia_lightning.lab.judges.hacking import Hacking
from dia_lightning.lab.judges.judge import Judge

__all__ = ["Evaluation", "Hacking", "Judge"]
