"""What a task may measure beyond the figures of every run: an interface (see `lab.judges`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from dia_lightning.types import Generations, Record

# Key of a figure in `metrics.json`, its label and its format.
Row = tuple[str, str, str]


class Evaluated(NamedTuple):
    """Figures of each run, by their keys in `metrics.json`, and lines of `hacking.jsonl` or
    None.
    """

    figures: list[dict[str, Any]]
    flagged: list[dict[str, Any]] | None = None


class Evaluator(ABC):
    """Measures finished runs; `PredictionWriter` calls it."""

    @abstractmethod
    def rows(self) -> list[Row]:
        """Every figure that a table shows."""

    @abstractmethod
    def check(
        self,
        prompts: Sequence[str],
        records: Sequence[Record],
        has_base: bool,
        rewards: Sequence[str] = (),
        n_texts: int = 1,
    ) -> None:
        """Raise UserError for what would otherwise fail only after hours of sampling.

        Args:
            prompts: of the run, each repeated `n_texts` times.
            records: of those prompts.
            has_base: whether the run also draws texts of the base model.
            rewards: names under which the run reports its reward.
            n_texts: texts for each prompt.
        """

    @abstractmethod
    def __call__(
        self,
        runs: Sequence[Sequence[Generations]],
        records: Sequence[Record],
        tokenizer: str = "auto",
    ) -> Evaluated:
        """Evaluate the method's run and, where given, the base model's run after it.

        Args:
            runs: the batches of each run.
            records: of every text, indexed by `Generations.ids`.
            tokenizer: for BLEU and ROUGE, see `reference_bleu`.
        """
