"""What a task measures beyond the figures that every run has: judges, references and reward
hacking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from dia_lightning.errors import UserError
from dia_lightning.metrics.hacking import Hacking, flagged_texts, hacking_figures
from dia_lightning.metrics.judge import Judge, Row, RunTexts, prompt_groups, run_texts
from dia_lightning.metrics.reference import ReferenceBLEU, reference_rouge
from dia_lightning.terminal import one_line
from dia_lightning.types import Generations, Record

_RESERVED = {
    "schema", "complete", "method", "config_hash", "versions", "base", "n", "reward", "reward_std",
    "perplexity", "nfe", "log_p_per_token", "self_bleu", "latency_s_per_100_tokens", "accept_rate",
    "distinct_1", "distinct_2", "distinct_3", "distinct_4", "seconds_per_text", "flops_per_text",
    "peak_memory_mib", "tokens", "flops", "training", "bleu_signature", "hacking_reasons", "log_z",
    "log_z_upper", "ess", "roots", "resampled", "temperatures", "tokenizer", "reasons",
}  # fmt: skip
_REFERENCE_ROWS = [("bleu", "BLEU (0 – 100)", "{:.2f}")] + [
    (f"rouge_{x}", f"ROUGE-{x.upper()}", "{:.3f}") for x in "12l"
]


class Evaluated(NamedTuple):
    """figures: for each run, by its keys in `metrics.json`; flagged: the method's texts that
    look like reward hacking.
    """

    figures: list[dict[str, Any]]
    flagged: list[dict[str, Any]]


def references_of(records: Sequence[Record], field: str) -> list[list[str]]:
    """The references of each text from its record, where the field holds a text or a list of texts.

    Raises:
        UserError: naming the first text whose record has none.
    """
    found = []
    for i, record in enumerate(records):
        value = record.get(field)
        references = [value] if isinstance(value, str) else value
        if (
            not isinstance(references, list)
            or not references
            or not all(isinstance(r, str) for r in references)
        ):
            has = ", ".join(record) or "none"
            raise UserError(
                f"references: {field!r} given, allowed: a field with a text or a list of"
                f" texts for every prompt; text {i} has {value!r:.60} there (fields: {has})"
            )
        found.append(references)
    return found


class Evaluation:
    """The measures of a task, as an option of `PredictionWriter`; changing them needs no new
    sampling.

    Args:
        judges: scores that are reported.
        references: field of the prompt file that holds a reference or a list of them: BLEU
            (sacrebleu) and ROUGE (rouge-score).
        hacking: what counts as reward hacking; without it there is no `hacking_rate`.

    Raises:
        UserError: if two figures would have one name.
    """

    def __init__(
        self, judges: list[Judge] | None = None, references: str | None = None,
        hacking: Hacking | None = None
    ) -> None:  # fmt: skip
        self.judges, self.references, self.hacking = judges or [], references, hacking
        keys = [key for key, _, _ in self.rows()]
        for judge in self.judges:
            if not judge.name.strip() or one_line(judge.name) != judge.name:
                raise UserError(
                    f"judges: the name {judge.name!r} given, allowed: visible characters"
                    " in one line"
                )
        # "nfe/base_lm" is how reports call what `nfe` has of "base_lm".
        taken = sorted(
            {key for key, n in Counter(keys).items() if n > 1 or key.partition("/")[0] in _RESERVED}
        )
        if taken:
            raise UserError(
                f"judges: two figures named {taken[0]!r} given, allowed: different names"
            )

    def rows(self) -> list[Row]:
        """Key, label and format of every figure that a table shows."""
        rows = [row for judge in self.judges for row in judge.rows()]
        rows += [] if self.references is None else _REFERENCE_ROWS
        return rows + ([] if self.hacking is None else self.hacking.rows())

    def check(
        self, prompts: Sequence[str], records: Sequence[Record], has_base: bool,
        rewards: Sequence[str] = (), n_texts: int = 1
    ) -> None:  # fmt: skip
        """Find what would fail only after hours of sampling.

        Args:
            prompts: of the run, each as often as it has `n_texts` texts.
            records: of those prompts.
            has_base: whether texts of the base model will be there.
            rewards: names under which the run reports its reward.

        Raises:
            UserError: naming the argument.
        """
        for key in {key for key, _, _ in self.rows()} & {f"reward_{name}" for name in rewards}:
            raise UserError(
                f"judges: the name {key!r} given, allowed: any other; a figure of the reward has it"
            )
        fewest = n_texts * min(Counter(prompt_groups(prompts, records)).values())
        for judge in self.judges:
            judge.check(records, fewest)
        if self.references is not None:
            references_of(records, self.references)
        if self.hacking is not None:
            self.hacking.check(records, has_base)

    def __call__(
        self, runs: Sequence[Sequence[Generations]], records: Sequence[Record],
        tokenizer: str = "auto"
    ) -> Evaluated:  # fmt: skip
        """Evaluate the method's run and, if it is there, the base model's after it, which must be
        of the same prompts.

        Args:
            runs: the batches of each.
            records: of every text, indexed by `Generations.ids`.
            tokenizer: of BLEU and ROUGE, see `reference_bleu`.
        """
        given = [run_texts(run, records) for run in runs]
        figures = [self._figures(run, tokenizer) for run in given]
        return Evaluated(
            figures, [] if self.hacking is None else self._hacking(self.hacking, given, figures)
        )

    def _figures(self, run: RunTexts, tokenizer: str) -> dict[str, Any]:
        figures = {key: value for judge in self.judges for key, value in judge.figures(run).items()}
        if self.references is not None:
            references = references_of(run.records, self.references)
            bleu = ReferenceBLEU(tokenizer, sync_on_compute=False)
            bleu.update(run.texts, references)
            figures |= {"bleu": float(bleu.compute()), "bleu_signature": bleu.signature()}
            rouge = reference_rouge(run.texts, references, tokenizer)
            figures |= {name: float(value) for name, value in rouge.items()}
        return figures

    @staticmethod
    def _hacking(
        hacking: Hacking, runs: list[RunTexts], figures: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Adds to the figures of each run; returns the flagged texts of the first."""
        scores = [hacking.scores(run) for run in runs]
        flags = [
            hacking.flags(run, score, runs[-1], scores[-1])
            for run, score in zip(runs, scores, strict=True)
        ]
        for found, flag in zip(figures, flags, strict=True):
            found |= hacking_figures(flag)
        return flagged_texts(runs[0], scores[0], flags[0])
